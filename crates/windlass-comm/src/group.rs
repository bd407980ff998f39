//! One rank's handle on its world.

use std::cell::Cell;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::datum::{Datum, Element, Real};
use crate::error::{Error, Result};
use crate::fold::fold;
use crate::local::{Member, lend};
use crate::request::{Collective, Extent, Request};
use crate::traffic::Traffic;

/// One rank's handle on its world, used by the thread of that rank.
///
/// All ranks must call the same collectives in the same order. A `tag` names what a collective is for in errors:
/// "gather layers.3".
pub struct Group {
    transport: Transport,
    traffic: Cell<Traffic>,
}

enum Transport {
    Solo,
    Dry {
        rank: usize,
        size: usize,
    },
    Local(Member),
    #[cfg(feature = "mpi")]
    Mpi(Box<crate::mpi::World>),
}

/// Cuts `length` elements into one contiguous range per rank; the first `length % size` ranks have one more.
pub fn balanced(length: usize, size: usize) -> Vec<Range<usize>> {
    let (each, more) = (length / size, length % size);
    let start = |rank: usize| rank * each + rank.min(more);
    (0..size).map(|rank| start(rank)..start(rank + 1)).collect()
}

impl Group {
    /// A world of one rank: collectives copy where there is something to copy, and send nothing.
    pub fn solo() -> Group {
        Group::new(Transport::Solo)
    }

    /// One rank of a world that is not there: collectives move nothing and count what they would send. For planning.
    ///
    /// # Panics
    /// When `rank` is not below `size`.
    #[track_caller]
    pub fn dry(rank: usize, size: usize) -> Group {
        assert!(rank < size, "rank {rank} of {size}");
        Group::new(Transport::Dry { rank, size })
    }

    /// A world whose ranks are threads of this process: one handle for each, in rank order.
    ///
    /// Ranks that have not come to a collective `timeout` after another one did are given up.
    ///
    /// # Panics
    /// If `size` is zero.
    pub fn local(size: usize, timeout: Duration) -> Vec<Group> {
        assert!(size > 0, "a world of {size} ranks");
        let members = Member::world(size, timeout);
        let group = |member| Group::new(Transport::Local(member));
        members.into_iter().map(group).collect()
    }

    /// The world of the MPI job that this process belongs to; once a process.
    ///
    /// It is left when the handle is dropped, in step with all ranks. After a failure it is left as it is, and the
    /// launcher ends the job when this process ends.
    ///
    /// # Errors
    /// If the library is in use already, or was built without support for threads.
    #[cfg(feature = "mpi")]
    pub fn mpi(timeout: Duration) -> Result<Group> {
        let world = crate::mpi::World::join(timeout)?;
        Ok(Group::new(Transport::Mpi(Box::new(world))))
    }

    fn new(transport: Transport) -> Group {
        Group {
            transport,
            traffic: Cell::new(Traffic::default()),
        }
    }

    /// This rank, counted from 0.
    pub fn rank(&self) -> usize {
        match &self.transport {
            Transport::Solo => 0,
            Transport::Dry { rank, .. } => *rank,
            Transport::Local(member) => member.rank,
            #[cfg(feature = "mpi")]
            Transport::Mpi(world) => world.rank(),
        }
    }

    /// The number of ranks.
    pub fn size(&self) -> usize {
        match &self.transport {
            Transport::Solo => 1,
            Transport::Dry { size, .. } => *size,
            Transport::Local(member) => member.size,
            #[cfg(feature = "mpi")]
            Transport::Mpi(world) => world.size(),
        }
    }

    /// What carries the messages: "solo", "local" or "mpi"; "dry" for nothing.
    pub fn transport(&self) -> &'static str {
        match &self.transport {
            Transport::Solo => "solo",
            Transport::Dry { .. } => "dry",
            Transport::Local(_) => "local",
            #[cfg(feature = "mpi")]
            Transport::Mpi(_) => "mpi",
        }
    }

    /// Waits for all ranks.
    ///
    /// # Errors
    /// If a rank is late, lost or elsewhere.
    pub fn barrier(&self, tag: &str) -> Result<()> {
        let request = Request {
            collective: Collective::Barrier,
            element: Element::U8,
            tag,
            extent: Extent::Length(0),
        };
        self.counted(Collective::Barrier, 0, || match &self.transport {
            Transport::Solo | Transport::Dry { .. } => Ok(()),
            Transport::Local(member) => {
                member
                    .hub
                    .arrive(member.rank, &request, lend::Lent::nothing())
            }
            #[cfg(feature = "mpi")]
            Transport::Mpi(world) => world.barrier(&request),
        })
    }

    /// Gathers shards in place: rank `r` contributes `data[shards[r]]`; afterwards every rank has all of them.
    ///
    /// `shards` are ascending ranges, one per rank; they may be uneven and empty.
    ///
    /// # Errors
    /// If a rank is late, lost or elsewhere; `data` is then undefined outside the own shard.
    ///
    /// # Panics
    /// If `shards` are not that.
    #[track_caller]
    pub fn all_gather<T: Datum>(
        &self,
        tag: &str,
        shards: &[Range<usize>],
        data: &mut [T],
    ) -> Result<()> {
        self.check_shards(shards, data.len());
        let own = shards[self.rank()].len();
        let bytes = self.bytes::<T>(own * (self.size() - 1));
        let request = request::<T>(Collective::AllGather, tag, Extent::Shards(shards));
        self.counted(Collective::AllGather, bytes, || match &self.transport {
            Transport::Solo | Transport::Dry { .. } => Ok(()),
            Transport::Local(member) => lend::all_gather(member, &request, shards, data),
            #[cfg(feature = "mpi")]
            Transport::Mpi(world) => world.all_gather(&request, shards, data),
        })
    }

    /// The own shard of the sum over ranks: `out = data of rank 0 [own shard] + data of rank 1 [own shard] + …`, added
    /// from left to right in [`Real::Sum`]. With `accumulate`, that sum is added to `out`.
    ///
    /// # Errors
    /// If a rank is late, lost or elsewhere.
    ///
    /// # Panics
    /// If `shards` are not ascending ranges in `data`, one per rank, or `out` has not the length of the own one.
    #[track_caller]
    pub fn reduce_scatter<T: Real>(
        &self,
        tag: &str,
        shards: &[Range<usize>],
        data: &[T],
        out: &mut [T::Sum],
        accumulate: bool,
    ) -> Result<()> {
        self.check_shards(shards, data.len());
        let shard = shards[self.rank()].clone();
        let (wanted, found) = (shard.len(), out.len());
        assert_eq!(wanted, found, "own shard and `out` of a reduce-scatter");
        let all: usize = shards.iter().map(Range::len).sum();
        let bytes = self.bytes::<T>(all - shard.len());
        let request = request::<T>(Collective::ReduceScatter, tag, Extent::Shards(shards));
        self.counted(Collective::ReduceScatter, bytes, || match &self.transport {
            Transport::Dry { .. } => Ok(()),
            Transport::Solo => {
                fold(&[&data[shard]], out, accumulate);
                Ok(())
            }
            Transport::Local(member) => {
                lend::reduce_scatter(member, &request, shard, data, out, accumulate)
            }
            #[cfg(feature = "mpi")]
            Transport::Mpi(world) => world.reduce_scatter(&request, shards, data, out, accumulate),
        })
    }

    /// The sum over ranks in place, on every rank: a reduce-scatter and an all-gather over [`balanced`] shards.
    ///
    /// # Errors
    /// If a rank is late, lost or elsewhere.
    pub fn all_reduce<T: Real<Sum = T>>(&self, tag: &str, data: &mut [T]) -> Result<()> {
        let shards = balanced(data.len(), self.size());
        let own = shards[self.rank()].len();
        let bytes = self.bytes::<T>(data.len() - own + own * (self.size() - 1));
        let request = request::<T>(Collective::AllReduce, tag, Extent::Length(data.len()));
        self.counted(Collective::AllReduce, bytes, || match &self.transport {
            Transport::Solo | Transport::Dry { .. } => Ok(()),
            Transport::Local(member) => lend::all_reduce(member, &request, &shards, data),
            #[cfg(feature = "mpi")]
            Transport::Mpi(world) => world.all_reduce(&request, &shards, data),
        })
    }

    /// The values of rank `root` to all ranks.
    ///
    /// # Errors
    /// If a rank is late, lost or elsewhere.
    ///
    /// # Panics
    /// If there is no rank `root`.
    #[track_caller]
    pub fn broadcast<T: Datum>(&self, tag: &str, root: usize, data: &mut [T]) -> Result<()> {
        let size = self.size();
        assert!(root < size, "broadcast from rank {root} of {size}");
        let others = if root == self.rank() { size - 1 } else { 0 };
        let bytes = self.bytes::<T>(data.len() * others);
        let length = data.len();
        let extent = Extent::FromRoot { root, length };
        let request = request::<T>(Collective::Broadcast, tag, extent);
        self.counted(Collective::Broadcast, bytes, || match &self.transport {
            Transport::Solo | Transport::Dry { .. } => Ok(()),
            Transport::Local(member) => lend::broadcast(member, &request, root, data),
            #[cfg(feature = "mpi")]
            Transport::Mpi(world) => world.broadcast(&request, root, data),
        })
    }

    /// A piece of `send` to each rank and a piece of `recv` from each, both in rank order.
    ///
    /// # Errors
    /// If a rank is late, lost or elsewhere, or expects another count than it is sent.
    ///
    /// # Panics
    /// If there is not one count per rank, or if they do not add up to the slices.
    #[track_caller]
    pub fn all_to_all<T: Datum>(
        &self,
        tag: &str,
        send: &[T],
        send_counts: &[usize],
        recv: &mut [T],
        recv_counts: &[usize],
    ) -> Result<()> {
        for (name, counts, length) in [
            ("sent", send_counts, send.len()),
            ("received", recv_counts, recv.len()),
        ] {
            let (size, given) = (self.size(), counts.len());
            assert_eq!(given, size, "counts and ranks of an all-to-all ({name})");
            let sum: usize = counts.iter().sum();
            assert_eq!(sum, length, "counts and slice of an all-to-all ({name})");
        }
        let bytes = self.bytes::<T>(send.len() - send_counts[self.rank()]);
        let pieces = Extent::Pieces {
            send: send_counts,
            recv: recv_counts,
        };
        let request = request::<T>(Collective::AllToAll, tag, pieces);
        self.counted(Collective::AllToAll, bytes, || match &self.transport {
            Transport::Dry { .. } => Ok(()),
            Transport::Solo => {
                recv.copy_from_slice(send);
                Ok(())
            }
            Transport::Local(member) => lend::all_to_all(member, &request, send, recv, recv_counts),
            #[cfg(feature = "mpi")]
            Transport::Mpi(world) => {
                world.all_to_all(&request, send, send_counts, recv, recv_counts)
            }
        })
    }

    /// The values of all ranks, in rank order: as many from each. For a few numbers; it counts as control traffic.
    ///
    /// # Errors
    /// If a rank is late, lost or elsewhere.
    pub fn collect<T: Datum>(&self, tag: &str, value: &[T]) -> Result<Vec<T>> {
        let bytes = self.bytes::<T>(value.len() * (self.size() - 1));
        let request = request::<T>(Collective::Collect, tag, Extent::Length(value.len()));
        self.counted(Collective::Collect, bytes, || match &self.transport {
            Transport::Solo => Ok(value.to_vec()),
            Transport::Dry { size, .. } => Ok(value.repeat(*size)),
            Transport::Local(member) => lend::collect(member, &request, value),
            #[cfg(feature = "mpi")]
            Transport::Mpi(world) => world.collect(&request, value),
        })
    }

    /// Checks that all ranks have the same `what`, given a hash of it.
    ///
    /// # Errors
    /// [`Error::Disagree`] on all ranks when they have not; or if a rank is late, lost or elsewhere.
    pub fn agree(&self, what: &str, hash: u64) -> Result<()> {
        let hashes = self.collect(what, &[hash])?;
        let differs = |&rank: &usize| hashes[rank] != hashes[0];
        let ranks: Vec<usize> = (0..hashes.len()).filter(differs).collect();
        if ranks.is_empty() {
            return Ok(());
        }
        let what = what.to_owned();
        Err(Error::Disagree { what, ranks })
    }

    /// Stops the world: collectives that the other ranks are in, or come to, fail at once and name this rank and `why`.
    pub fn abort(&self, why: &str) {
        match &self.transport {
            Transport::Solo | Transport::Dry { .. } => {}
            Transport::Local(member) => member.hub.abort(member.rank, why),
            #[cfg(feature = "mpi")]
            Transport::Mpi(world) => world.abort(why),
        }
    }

    /// Ends every process of an MPI job at once, also ranks that hang; between threads it does nothing. For a rank
    /// that has said what went wrong.
    pub fn end_job(&self, code: i32) {
        #[cfg(feature = "mpi")]
        if let Transport::Mpi(world) = &self.transport {
            world.end_job(code);
        }
        #[cfg(not(feature = "mpi"))]
        let _ = code;
    }

    /// What this rank has sent until now.
    pub fn traffic(&self) -> Traffic {
        self.traffic.get()
    }

    fn bytes<T>(&self, elements: usize) -> u64 {
        (elements * size_of::<T>()) as u64
    }

    /// Runs a collective and writes down what it cost; a failed one is not counted.
    fn counted<R>(
        &self,
        collective: Collective,
        bytes: u64,
        run: impl FnOnce() -> Result<R>,
    ) -> Result<R> {
        let start = Instant::now();
        let result = run()?;
        let mut traffic = self.traffic.get();
        traffic.add(collective, bytes, start.elapsed().as_secs_f64());
        self.traffic.set(traffic);
        Ok(result)
    }

    #[track_caller]
    fn check_shards(&self, shards: &[Range<usize>], length: usize) {
        let (size, given) = (self.size(), shards.len());
        assert_eq!(given, size, "shards and ranks");
        let mut at = 0;
        for (rank, &Range { start, end }) in shards.iter().enumerate() {
            let ascending = at <= start && start <= end && end <= length;
            assert!(
                ascending,
                "shard {rank} is {start}..{end}, after {at}, of {length}"
            );
            at = end;
        }
    }
}

fn request<'a, T: Datum>(collective: Collective, tag: &'a str, extent: Extent<'a>) -> Request<'a> {
    Request {
        collective,
        element: T::ELEMENT,
        tag,
        extent,
    }
}
