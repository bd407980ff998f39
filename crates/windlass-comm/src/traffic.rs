//! What the collectives of a rank have cost.

use crate::request::Collective;

/// Calls, bytes and time of one kind of collective.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Volume {
    /// How often it was called.
    pub calls: u64,
    /// Bytes that this rank sent to others; what it keeps for itself does not count.
    pub bytes: u64,
    /// Seconds from call to return, waiting for other ranks included.
    pub seconds: f64,
}

/// What one rank has sent since its group exists.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Own shard to all others: shard bytes x (N - 1).
    pub all_gather: Volume,
    /// The others' shards of own data: bytes outside the own shard.
    pub reduce_scatter: Volume,
    /// A reduce-scatter and an all-gather over balanced shards.
    pub all_reduce: Volume,
    /// The root sends bytes x (N - 1), the others nothing.
    pub broadcast: Volume,
    /// The pieces for others.
    pub all_to_all: Volume,
    /// Small messages: barriers, collected values and agreements.
    pub control: Volume,
}

impl Traffic {
    /// All kinds together, control included.
    pub fn total(&self) -> Volume {
        self.kinds()
            .iter()
            .fold(Volume::default(), |sum, (_, kind)| Volume {
                calls: sum.calls + kind.calls,
                bytes: sum.bytes + kind.bytes,
                seconds: sum.seconds + kind.seconds,
            })
    }

    /// Every kind with its name, in a fixed order.
    pub fn kinds(&self) -> [(&'static str, Volume); 6] {
        [
            ("all_gather", self.all_gather),
            ("reduce_scatter", self.reduce_scatter),
            ("all_reduce", self.all_reduce),
            ("broadcast", self.broadcast),
            ("all_to_all", self.all_to_all),
            ("control", self.control),
        ]
    }

    /// What came on top of an earlier reading.
    pub fn since(&self, earlier: &Traffic) -> Traffic {
        let less = |now: Volume, then: Volume| Volume {
            calls: now.calls - then.calls,
            bytes: now.bytes - then.bytes,
            seconds: now.seconds - then.seconds,
        };
        Traffic {
            all_gather: less(self.all_gather, earlier.all_gather),
            reduce_scatter: less(self.reduce_scatter, earlier.reduce_scatter),
            all_reduce: less(self.all_reduce, earlier.all_reduce),
            broadcast: less(self.broadcast, earlier.broadcast),
            all_to_all: less(self.all_to_all, earlier.all_to_all),
            control: less(self.control, earlier.control),
        }
    }

    pub(crate) fn add(&mut self, collective: Collective, bytes: u64, seconds: f64) {
        let volume = match collective {
            Collective::AllGather => &mut self.all_gather,
            Collective::ReduceScatter => &mut self.reduce_scatter,
            Collective::AllReduce => &mut self.all_reduce,
            Collective::Broadcast => &mut self.broadcast,
            Collective::AllToAll => &mut self.all_to_all,
            Collective::Barrier | Collective::Collect => &mut self.control,
        };
        volume.calls += 1;
        volume.bytes += bytes;
        volume.seconds += seconds;
    }
}
