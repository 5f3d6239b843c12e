//! The live feed. Every client has a position in the stream and goes on from it: from the snapshot
//! if that holds what follows, from the history if not. A slow client has no queue that could
//! overflow, and one that comes back is like any other.

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use contract::streams::NUMBERS;
use futures::future::OptionFuture;
use futures::{Stream, StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::format::Format;
use crate::gateway::Gateway;
use crate::record::valid;
use crate::snapshot::Snapshot;
use crate::state::{CATCH_UP, Latest};

/// A feed without new numbers shows this often that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How many messages a client that is far behind gets at once; bounds the memory that it takes.
const BATCH: usize = 250;
/// The pause after a read that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// One client's feed.
pub struct Feed {
    pub gateway: Arc<Gateway>,
    pub snapshots: watch::Receiver<Latest>,
    /// Events, or else lines.
    pub format: Format,
    /// When the client's access token expires.
    pub expires: Option<Instant>,
    /// The stream that the client follows, and the last sequence of it that the client has.
    pub stream: String,
    pub position: u64,
    pub _permit: OwnedSemaphorePermit,
}

impl Feed {
    /// The body of the response. It ends when the client goes away, its token expires, or the
    /// gateway stops.
    pub fn body(self) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
        // Spreads the reconnects after a replica has stopped.
        let retry = format!("retry: {}\n\n", rand::random_range(500..3000));
        let greeting = (self.format == Format::Events).then(|| Bytes::from(retry));
        let chunks = stream::unfold(Some(self), async |feed| {
            let mut feed = feed?;
            let (chunk, goes_on) = feed.next().await;
            Some((chunk, goes_on.then_some(feed)))
        });
        stream::iter(greeting).chain(chunks).map(Ok)
    }

    /// The next chunk, asked for when the client has taken the one before, and whether the feed
    /// goes on after it.
    async fn next(&mut self) -> (Bytes, bool) {
        let closing = self.gateway.closing.clone().cancelled_owned();
        let expiry = OptionFuture::from(self.expires.map(sleep_until));
        // A comment, or an empty line.
        let heartbeat = if self.format == Format::Events { ":\n\n" } else { "\n" };
        tokio::select! {
            biased;
            () = closing => self.end("shutdown", "this gateway stops; go on with another one"),
            Some(()) = expiry => self.end("expired", "the access token has expired"),
            numbers = self.numbers() => (numbers, true),
            () = sleep(HEARTBEAT) => (heartbeat.into(), true),
        }
    }

    /// The last chunk.
    fn end(&self, name: &str, reason: &str) -> (Bytes, bool) {
        (self.event(name, json!({ "reason": reason })), false)
    }

    /// What follows the client's position, as soon as there is something. Cancel safe: the position
    /// changes only together with the result.
    async fn numbers(&mut self) -> Bytes {
        loop {
            let latest = self.snapshots.borrow_and_update().clone();
            // Does not happen: a feed begins with a snapshot.
            let Some(snapshot) = latest else { return pending().await };
            let chunk = if snapshot.stream != self.stream {
                self.reset(&snapshot, "this is not the stream that was read before")
            } else if self.position > snapshot.last_seq {
                self.catch_up().await
            } else if let Some(chunk) = snapshot.feed_after(self.position, self.format) {
                self.position = snapshot.last_seq;
                if chunk.is_empty() {
                    // It fails only if the state is dropped, and the gateway owns that.
                    let _ = self.snapshots.changed().await;
                }
                chunk
            } else {
                self.read_on().await
            };
            if !chunk.is_empty() {
                return chunk;
            }
        }
    }

    /// Waits until this replica has what the client has seen at another one. If the stream turns
    /// out to end before the client's position, the position is reset. Without the broker this
    /// cannot be known, and the wait goes on.
    async fn catch_up(&mut self) -> Bytes {
        let position = self.position;
        let deadline = Instant::now() + CATCH_UP;
        let mut confirmed = self.gateway.state.confirmed.subscribe();
        let ends_before = |snapshot: &Arc<Snapshot>| snapshot.last_seq < position;
        tokio::select! {
            _ = self.snapshots.wait_for(|latest| !latest.as_ref().is_some_and(ends_before)) => {}
            _ = confirmed.wait_for(|at| *at > deadline) => {}
        }
        let beyond = self.snapshots.borrow().clone().filter(ends_before);
        let reset = beyond.map(|end| self.reset(&end, "nothing was published there yet"));
        reset.unwrap_or_default()
    }

    /// The next part of the history; empty after a read that failed, or that found no record.
    async fn read_on(&mut self) -> Bytes {
        let Ok(entries) = self.gateway.history.read_for_feed(self.position, BATCH).await else {
            sleep(AFTER_FAILURE).await;
            return Bytes::new();
        };
        self.position = entries.last().map_or(self.position, |last| last.sequence);
        self.format.all(&valid(&entries)).into()
    }

    /// Tells the client that its position means nothing in this stream, and goes on with the next
    /// number.
    fn reset(&mut self, snapshot: &Snapshot, reason: &str) -> Bytes {
        let facts = json!({
            "reason": reason,
            "position": self.position,
            "stream": NUMBERS,
            "created": snapshot.stream,
            "last_seq": snapshot.last_seq,
        });
        self.stream.clone_from(&snapshot.stream);
        self.position = snapshot.last_seq;
        self.event("reset", facts)
    }

    fn event(&self, name: &str, mut facts: Value) -> Bytes {
        if self.format == Format::Events {
            let position = self.position;
            return format!("id: {position}\nevent: {name}\ndata: {facts}\n\n").into();
        }
        facts["event"] = name.into();
        format!("{facts}\n").into()
    }
}
