//! What a rank asks its group for, in a form that ranks can compare.

use std::fmt;
use std::ops::Range;

use crate::datum::Element;

/// The kinds of collectives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Collective {
    /// All ranks wait for each other.
    Barrier,
    /// Every rank's shard to every rank.
    AllGather,
    /// Every rank gets its shard of the sum.
    ReduceScatter,
    /// Every rank gets all of the sum.
    AllReduce,
    /// One rank's values to every rank.
    Broadcast,
    /// A piece from every rank to every rank.
    AllToAll,
    /// A few values of every rank to every rank.
    Collect,
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Collective::Barrier => "barrier",
            Collective::AllGather => "all-gather",
            Collective::ReduceScatter => "reduce-scatter",
            Collective::AllReduce => "all-reduce",
            Collective::Broadcast => "broadcast",
            Collective::AllToAll => "all-to-all",
            Collective::Collect => "collect",
        })
    }
}

/// Which elements go where.
#[derive(Clone, Copy)]
pub enum Extent<'a> {
    /// As many values on every rank.
    Length(usize),
    /// The shard of each rank.
    Shards(&'a [Range<usize>]),
    /// The rank that sends, and how much.
    FromRoot { root: usize, length: usize },
    /// To each rank and from each rank.
    Pieces {
        send: &'a [usize],
        recv: &'a [usize],
    },
}

/// One rank's side of a collective.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub collective: Collective,
    pub element: Element,
    pub tag: &'a str,
    pub extent: Extent<'a>,
}

/// A request that is kept: its allocations are used again by the next one.
#[derive(Clone)]
pub struct Call {
    pub collective: Collective,
    pub element: Element,
    pub tag: String,
    /// The numbers of the extent, one after the other.
    pub numbers: Vec<usize>,
}

impl Call {
    pub fn new() -> Self {
        Self {
            collective: Collective::Barrier,
            element: Element::U8,
            tag: String::new(),
            numbers: Vec::new(),
        }
    }

    /// Takes over a request.
    pub fn set(&mut self, request: &Request<'_>) {
        self.collective = request.collective;
        self.element = request.element;
        self.tag.clear();
        self.tag.push_str(request.tag);
        self.numbers.clear();
        match request.extent {
            Extent::Length(length) => self.numbers.push(length),
            Extent::Shards(shards) => {
                let bounds = shards.iter().flat_map(|shard| [shard.start, shard.end]);
                self.numbers.extend(bounds);
            }
            Extent::FromRoot { root, length } => self.numbers.extend([root, length]),
            Extent::Pieces { send, recv } => {
                self.numbers.extend(send);
                self.numbers.extend(recv);
            }
        }
    }

    /// Whether this call of one rank and that of another belong together.
    pub fn fits(&self, rank: usize, other: &Call, other_rank: usize) -> bool {
        let extent_fits = if self.collective == Collective::AllToAll {
            self.numbers.len() == other.numbers.len()
                && self.sends(other_rank) == other.receives(rank)
                && self.receives(other_rank) == other.sends(rank)
        } else {
            self.numbers == other.numbers
        };
        self.collective == other.collective
            && self.element == other.element
            && self.tag == other.tag
            && extent_fits
    }

    fn sends(&self, to: usize) -> usize {
        self.numbers[to]
    }

    fn receives(&self, from: usize) -> usize {
        self.numbers[self.numbers.len() / 2 + from]
    }

    /// Where the piece for a rank starts in what this rank sends to all.
    pub fn sent_before(&self, to: usize) -> usize {
        self.numbers[..to].iter().sum()
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} '{}'", self.collective, self.tag)?;
        let element = self.element;
        let numbers = &self.numbers;
        match self.collective {
            Collective::Barrier => Ok(()),
            Collective::AllGather | Collective::ReduceScatter => {
                let shards = numbers.chunks_exact(2).map(|bounds| bounds[0]..bounds[1]);
                write!(f, " of {element} shards {}", List(shards.collect()))
            }
            Collective::AllReduce | Collective::Collect => {
                write!(f, " of {} {element}", numbers[0])
            }
            Collective::Broadcast => {
                write!(f, " of {} {element} from rank {}", numbers[1], numbers[0])
            }
            Collective::AllToAll => {
                let (send, recv) = numbers.split_at(numbers.len() / 2);
                let (send, recv) = (List(send.to_vec()), List(recv.to_vec()));
                write!(f, " of {element} sending {send} and receiving {recv}")
            }
        }
    }
}

/// A list of which a message shows the first eight.
struct List<T>(Vec<T>);

impl<T: fmt::Debug> fmt::Display for List<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(8)];
        let more = if shown.len() < self.0.len() {
            " …"
        } else {
            ""
        };
        write!(f, "{shown:?}{more}")
    }
}
