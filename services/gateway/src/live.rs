//! The live feed. Every client has a position in the stream and goes on from it: from the snapshot
//! if that holds what follows, from the history if not. A slow client has no queue that could
//! overflow, and one that comes back is like any other.

use std::convert::Infallible;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use contract::streams::NUMBERS;
use futures::Stream;
use futures::future::OptionFuture;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::format::Format;
use crate::gateway::Gateway;
use crate::record::valid;
use crate::snapshot::{Snapshot, stream_id};
use crate::state::CATCH_UP;

/// A feed without new numbers shows this often that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How many messages a client that is far behind gets at once; bounds the memory that it takes.
const BATCH: usize = 250;
/// The pause after a read that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// What a client asks for.
pub struct Wish {
    /// The last sequence that the client has; without one it begins with the next number.
    pub after: Option<u64>,
    /// The stream that `after` belongs to, if the client says so.
    pub stream: Option<String>,
    /// Events or lines.
    pub format: Format,
    /// When the client's access token expires.
    pub expires: Option<Instant>,
}

/// One client's feed.
pub struct Feed {
    gateway: Arc<Gateway>,
    snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    format: Format,
    expires: Option<Instant>,
    /// Which stream, and the last sequence of it that the client has.
    created: OffsetDateTime,
    position: u64,
    /// What the client is told first; empty afterwards.
    greeting: String,
    ended: bool,
    _permit: OwnedSemaphorePermit,
}

/// What a feed does next.
enum Step {
    /// Sends this.
    Send(Bytes),
    /// Waits for a new snapshot: the client has everything.
    Wait,
    /// Waits for this replica to catch up with what the client has.
    CatchUp,
    /// Reads what the client has missed from the history.
    ReadOn,
}

impl Feed {
    /// A feed that begins as wished.
    pub fn new(
        gateway: Arc<Gateway>,
        snapshot: &Snapshot,
        wish: Wish,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        let mut feed = Self {
            snapshots: gateway.state.subscribe(),
            gateway,
            format: wish.format,
            expires: wish.expires,
            created: snapshot.created,
            position: wish.after.unwrap_or(snapshot.last_seq),
            greeting: String::new(),
            ended: false,
            _permit: permit,
        };
        if feed.format == Format::Events {
            // Clients of a replica that stops come back over some seconds, not all at once.
            feed.greeting = format!("retry: {}\n\n", rand::random_range(500..3000));
        }
        if wish.stream.is_some_and(|id| id != stream_id(snapshot.created)) {
            let reset = feed.reset(snapshot, "this is not the stream that was read before");
            feed.greeting += &reset;
        }
        feed
    }

    /// The body of the response. It ends when the client goes away, its token expires, or the
    /// gateway stops.
    pub fn stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
        futures::stream::unfold(self, async |mut feed| {
            let chunk = feed.next().await?;
            Some((Ok(chunk), feed))
        })
    }

    /// The next chunk of the body, asked for when the client has taken the one before.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        if !self.greeting.is_empty() {
            return Some(mem::take(&mut self.greeting).into());
        }
        let shutdown = self.gateway.shutdown.clone().cancelled_owned();
        let expiry = OptionFuture::from(self.expires.map(sleep_until));
        let chunk = tokio::select! {
            biased;
            () = shutdown => self.end("shutdown", "this gateway stops; go on with another one"),
            Some(()) = expiry => self.end("expired", "the access token has expired"),
            chunk = self.numbers() => chunk,
            () = sleep(HEARTBEAT) => match self.format {
                // A comment.
                Format::Events => Bytes::from_static(b":\n\n"),
                _ => Bytes::from_static(b"\n"),
            },
        };
        Some(chunk)
    }

    /// What follows the client's position, as soon as there is something. Cancel safe.
    async fn numbers(&mut self) -> Bytes {
        loop {
            match self.step() {
                Step::Send(chunk) => return chunk,
                Step::Wait => {
                    // The state lives as long as the gateway.
                    let _ = self.snapshots.changed().await;
                }
                Step::CatchUp => {
                    if let Some(reset) = self.catch_up().await {
                        return reset.into();
                    }
                }
                Step::ReadOn => {
                    let chunk = self.read_on().await;
                    if !chunk.is_empty() {
                        return chunk.into();
                    }
                }
            }
        }
    }

    fn step(&mut self) -> Step {
        let Some(snapshot) = self.snapshots.borrow_and_update().clone() else {
            return Step::Wait;
        };
        if snapshot.created != self.created {
            return Step::Send(self.reset(&snapshot, "the stream was made anew").into());
        }
        if self.position > snapshot.last_seq {
            return Step::CatchUp;
        }
        let Some(chunk) = snapshot.feed_after(self.position, self.format) else {
            return Step::ReadOn;
        };
        self.position = snapshot.last_seq;
        if chunk.is_empty() { Step::Wait } else { Step::Send(chunk) }
    }

    /// Waits until this replica has caught up with the client. If the stream confirms that it ends
    /// before the client's position, the position is reset. Without the broker nobody can tell.
    async fn catch_up(&mut self) -> Option<String> {
        let position = self.position;
        let deadline = Instant::now() + CATCH_UP;
        let mut confirmations = self.gateway.state.confirmations();
        tokio::select! {
            _ = self.snapshots.wait_for(|s| s.as_ref().is_some_and(|s| s.last_seq >= position)) => {}
            _ = confirmations.wait_for(|confirmed| *confirmed > deadline) => {}
        }
        let snapshot = self.snapshots.borrow().clone()?;
        let beyond = snapshot.last_seq < position;
        beyond.then(|| self.reset(&snapshot, "nothing was published there yet"))
    }

    /// The next part of the history; empty after a read that failed, or that found no number.
    async fn read_on(&mut self) -> String {
        match self.gateway.history.read_for_feed(self.position, BATCH).await {
            Ok(entries) => {
                self.position = entries.last().map_or(self.position, |last| last.sequence);
                self.format.all(&valid(&entries))
            }
            Err(_) => {
                sleep(AFTER_FAILURE).await;
                String::new()
            }
        }
    }

    /// The client's position means nothing in this stream: it goes on with the next number.
    fn reset(&mut self, snapshot: &Snapshot, reason: &str) -> String {
        let facts = json!({
            "reason": reason,
            "position": self.position,
            "stream": NUMBERS,
            "created": stream_id(snapshot.created),
            "last_seq": snapshot.last_seq,
        });
        self.created = snapshot.created;
        self.position = snapshot.last_seq;
        self.event("reset", facts)
    }

    /// The last chunk, which says why the feed ends.
    fn end(&mut self, name: &str, reason: &str) -> Bytes {
        self.ended = true;
        self.event(name, json!({ "reason": reason })).into()
    }

    fn event(&self, name: &str, mut facts: Value) -> String {
        if self.format == Format::Events {
            let position = self.position;
            return format!("id: {position}\nevent: {name}\ndata: {facts}\n\n");
        }
        facts["event"] = name.into();
        format!("{facts}\n")
    }
}
