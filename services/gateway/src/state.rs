//! What the reader knows of the stream, shared with everything that answers from it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::problem::{Problem, Result};
use crate::snapshot::Snapshot;

/// The snapshot is stale when the stream has not confirmed it for this long. The reader looks
/// every second.
pub const STALE: Duration = Duration::from_secs(3);
/// How long a client that has seen more than this replica waits for it to catch up.
pub const CATCH_UP: Duration = Duration::from_secs(1);
/// How far beyond the end a sequence may be for a client to have seen it at another replica.
const AHEAD: u64 = 16;

/// The latest snapshot; `None` until the stream was read for the first time.
pub type Latest = Option<Arc<Snapshot>>;

/// What the reader knows.
pub struct State {
    /// The latest snapshot, set by the reader.
    pub latest: watch::Sender<Latest>,
    /// When the stream last had nothing newer than the snapshot; at first, when the process
    /// started.
    pub confirmed: watch::Sender<Instant>,
}

impl State {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self { latest: watch::Sender::new(None), confirmed: watch::Sender::new(Instant::now()) }
    }

    /// The latest snapshot.
    ///
    /// # Errors
    /// 503 until the stream was read for the first time.
    pub fn snapshot(&self) -> Result<Arc<Snapshot>> {
        let latest = self.latest.borrow().clone();
        latest.ok_or_else(|| Problem::unavailable("the history was not read yet; see /readyz"))
    }

    /// The latest snapshot, after up to a second for this replica to catch up with a client that
    /// has seen this sequence. There is no wait if it is far beyond the end: it was made up.
    ///
    /// # Errors
    /// As [`snapshot`](Self::snapshot).
    pub async fn snapshot_with(&self, seq: u64) -> Result<Arc<Snapshot>> {
        if seq.saturating_sub(self.snapshot()?.last_seq) <= AHEAD {
            let mut latest = self.latest.subscribe();
            let caught_up = latest.wait_for(|s| s.as_ref().is_none_or(|s| s.last_seq >= seq));
            let _ = timeout(CATCH_UP, caught_up).await;
        }
        self.snapshot()
    }

    /// How long ago the snapshot was known to be as new as the stream.
    pub fn age(&self) -> Duration {
        self.confirmed.borrow().elapsed()
    }
}
