//! The transport between threads of one process: ranks lend each other their slices and read them in place.
//!
//! A collective is two meetings ([`hub`]): at the first, all ranks have come with the same request and lent their
//! memory; then each reads what it needs ([`lend`]); after the second, nobody reads any more. No byte is copied twice.

pub mod hub;
pub mod lend;

use std::sync::Arc;
use std::time::Duration;

use hub::Hub;

/// What became of a rank that is gone.
pub const LEFT: &str = "it has left the group";
pub const PANICKED: &str = "its thread panicked";

/// One rank's place in a world of threads. Dropping it takes the rank out of the world.
pub struct Member {
    pub hub: Arc<Hub>,
    pub rank: usize,
    pub size: usize,
}

impl Member {
    /// A world of this many ranks.
    pub fn world(size: usize, timeout: Duration) -> Vec<Member> {
        let hub = Arc::new(Hub::new(size, timeout));
        let member = |rank| Member {
            hub: hub.clone(),
            rank,
            size,
        };
        (0..size).map(member).collect()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let how = if std::thread::panicking() {
            PANICKED
        } else {
            LEFT
        };
        self.hub.leave(self.rank, how);
    }
}
