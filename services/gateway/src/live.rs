//! The live feed. Every client has a position in the stream and goes on from it: from the snapshot
//! when that holds what follows, from the history when not. So there is no queue for a client that
//! is slow, and none that has to be filled for one that comes back.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use contract::streams::NUMBERS;
use futures::Stream;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::Gateway;
use crate::reader::valid;
use crate::snapshot::{CATCH_UP, Format, Snapshot, stream_id};

/// A quiet feed shows that it is alive this often.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How many messages a client that is far behind gets at once; bounds the memory that it takes.
const BATCH: usize = 250;
/// The pause after a read that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Where a client wants to begin.
#[derive(Debug, Default)]
pub struct Wish {
    /// The last sequence that it has seen; without one it begins with the next number.
    pub after: Option<u64>,
    /// The stream that it has seen it in.
    pub stream: Option<String>,
}

/// One client's feed.
pub struct Feed {
    gateway: Arc<Gateway>,
    snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    format: Format,
    /// Which stream, and the last sequence that the client has.
    created: OffsetDateTime,
    position: u64,
    /// Since when the position is beyond the end of the stream.
    beyond: Option<Instant>,
    /// What to say first.
    greeting: Option<String>,
    /// When the client's permission ends.
    ends: Option<Instant>,
    ended: bool,
    _permit: OwnedSemaphorePermit,
}

impl Feed {
    /// A feed that begins as wished, and ends when the client's permission does.
    pub fn new(
        gateway: Arc<Gateway>,
        snapshot: &Snapshot,
        wish: Wish,
        format: Format,
        ends: Option<Instant>,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        // Clients of a replica that has stopped come back over some seconds, not all at once.
        let retry_ms = rand::random_range(500..3000);
        let mut feed = Self {
            snapshots: gateway.state.subscribe(),
            gateway,
            format,
            created: snapshot.created,
            position: wish.after.unwrap_or(snapshot.last_seq),
            beyond: None,
            greeting: (format == Format::Events).then(|| format!("retry: {retry_ms}\n\n")),
            ends,
            ended: false,
            _permit: permit,
        };
        if wish.stream.is_some_and(|id| id != stream_id(snapshot.created)) {
            let reset = feed.reset(snapshot, "this is not the stream that was read before");
            feed.greeting = Some(feed.greeting.unwrap_or_default() + &reset);
        }
        feed
    }

    /// The body of the answer. It ends when the client goes away or the gateway stops.
    pub fn stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
        futures::stream::unfold(self, async |mut feed| {
            let chunk = feed.next().await?;
            Some((Ok(chunk), feed))
        })
    }

    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        if let Some(greeting) = self.greeting.take() {
            return Some(greeting.into());
        }
        let heartbeat = Instant::now() + HEARTBEAT;
        loop {
            if let Some(last_word) = self.last_word() {
                return Some(last_word);
            }
            let wake = self.ends.map_or(heartbeat, |ends| ends.min(heartbeat));
            if let Some(chunk) = self.ready(wake).await {
                return Some(chunk);
            }
            // The position may turn out to be beyond the end without a new snapshot.
            let look = Instant::now() + CATCH_UP / 4;
            let wake = if self.beyond.is_some() { look.min(wake) } else { wake };
            tokio::select! {
                _ = self.snapshots.changed() => {}
                () = sleep_until(wake) => {}
                () = self.gateway.shutdown.cancelled() => {}
            }
            if heartbeat <= Instant::now() {
                // A comment, or an empty line.
                let events = self.format == Format::Events;
                return Some(Bytes::from_static(if events { b":\n\n" } else { b"\n" }));
            }
        }
    }

    /// What can be said at once.
    async fn ready(&mut self, wake: Instant) -> Option<Bytes> {
        let snapshot = self.snapshots.borrow_and_update().clone()?;
        if snapshot.created != self.created {
            return Some(self.reset(&snapshot, "the stream was made anew").into());
        }
        if self.position > snapshot.last_seq {
            // This replica may be behind; without the broker nobody can tell.
            let since = *self.beyond.get_or_insert_with(Instant::now);
            // The stream was asked after a moment in which it could have caught up.
            if since.elapsed() > CATCH_UP + self.gateway.state.age() {
                return Some(self.reset(&snapshot, "nothing was published there yet").into());
            }
            return None;
        }
        self.beyond = None;
        if let Some(chunk) = snapshot.feed_after(self.position, self.format) {
            self.position = snapshot.last_seq;
            return Some(chunk).filter(|chunk| !chunk.is_empty());
        }
        self.read_on(wake).await
    }

    /// The next part of the history, until the snapshot holds what follows.
    async fn read_on(&mut self, wake: Instant) -> Option<Bytes> {
        let read = tokio::select! {
            read = self.gateway.history.read_for_feed(self.position, BATCH) => read,
            () = sleep_until(wake) => return None,
            () = self.gateway.shutdown.cancelled() => return None,
        };
        self.snapshots.mark_changed();
        let Ok(entries) = read else {
            sleep(AFTER_FAILURE).await;
            return None;
        };
        self.position = entries.last().map_or(self.position, |last| last.sequence);
        let chunk = self.format.all(&valid(&entries));
        (!chunk.is_empty()).then(|| chunk.into())
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
        self.beyond = None;
        self.event("reset", facts)
    }

    /// Why the feed ends, if it does now.
    fn last_word(&mut self) -> Option<Bytes> {
        let (name, reason) = if self.gateway.shutdown.is_cancelled() {
            ("shutdown", "this gateway stops; go on with another one")
        } else if self.ends.is_some_and(|ends| ends <= Instant::now()) {
            ("expired", "the access token has expired")
        } else {
            return None;
        };
        self.ended = true;
        Some(self.event(name, json!({ "reason": reason })).into())
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
