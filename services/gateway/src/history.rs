//! The whole history: pages of it, one number of it, and all of it as a stream.
//!
//! What the snapshot holds is answered from there. Everything older is read from the broker by
//! direct get, never by a consumer, and within bounds: blocks of a compressed stream that are read
//! at random stay in the broker's memory for a while.

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::Client;
use bytes::Bytes;
use contract::streams::NUMBERS;
use futures::{Stream, stream};
use runtime::history::{self, Entry, MAX_BATCH, Start};
use serde::Serialize;
use time::OffsetDateTime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::problem::Problem;
use crate::reader::valid;
use crate::snapshot::{Format, Number, Snapshot};

/// Reads that are in progress at once.
const AT_ONCE: usize = 8;
/// How long a request waits for its turn before it is refused.
const TURN: Duration = Duration::from_secs(1);
/// From one read of an export to the next: at most 100,000 numbers a second.
const EXPORT_PACE: Duration = Duration::from_millis(10);

/// Bounded reads of the history.
pub struct History {
    client: Client,
    at_once: Semaphore,
    exports: Arc<Semaphore>,
    rate: Rate,
}

/// Where a page or an export begins.
#[derive(Clone, Copy, Debug)]
pub enum Position {
    /// With the sequence that follows this one.
    After(u64),
    /// With the first number that was stored at this time or later.
    From(OffsetDateTime),
}

/// A part of the history.
#[derive(Serialize)]
pub struct Page {
    stream: &'static str,
    /// The last sequence of the stream, as far as this replica knows.
    last_seq: u64,
    count: usize,
    /// Its valid numbers.
    pub numbers: Vec<Number>,
    /// The sequence after which the next page begins; `None` at the end.
    pub next: Option<u64>,
}

impl Page {
    fn new(snapshot: &Snapshot, numbers: Vec<Number>, next: Option<u64>) -> Self {
        Self { stream: NUMBERS, last_seq: snapshot.last_seq, count: numbers.len(), numbers, next }
    }
}

impl History {
    /// Bounds: random reads a second, and exports at once.
    pub fn new(client: Client, reads_per_s: u32, exports: u32) -> Self {
        Self {
            client,
            at_once: Semaphore::new(AT_ONCE),
            exports: Arc::new(Semaphore::new(exports as usize)),
            rate: Rate::new(reads_per_s),
        }
    }

    /// A page of up to `limit` messages.
    ///
    /// # Errors
    /// 429 if too much is read already, 503 if the broker does not answer.
    pub async fn page(
        &self,
        snapshot: &Snapshot,
        position: Position,
        limit: usize,
    ) -> Result<Page, Problem> {
        let held: Option<Vec<Number>> = match position {
            Position::After(seq) => snapshot
                .numbers_after(seq)
                .map(|numbers| numbers.take(limit + 1).cloned().collect()),
            Position::From(time) => snapshot
                .numbers_from(time)
                .map(|numbers| numbers.take(limit + 1).cloned().collect()),
        };
        if let Some(mut numbers) = held {
            let more = numbers.len() > limit;
            numbers.truncate(limit);
            let next = numbers.last().filter(|_| more).map(|number| number.seq);
            return Ok(Page::new(snapshot, numbers, next));
        }
        self.rate.admit().map_err(too_many)?;
        let turn = tokio::time::timeout(TURN, self.read(position.into(), limit));
        let mut entries = turn.await.map_err(|_| too_many(TURN))??;
        // The stream may have grown since; then the rest is on the next page.
        entries.retain(|entry| entry.sequence <= snapshot.last_seq);
        let end = entries.last().map(|entry| entry.sequence);
        let next = end.filter(|end| *end < snapshot.last_seq);
        Ok(Page::new(snapshot, valid(&entries), next))
    }

    /// The messages after a sequence, for a reader that goes on from there. It waits for its turn;
    /// `first` is its first, random read.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn read_on(
        &self,
        after: u64,
        limit: usize,
        first: bool,
    ) -> Result<Vec<Entry>, Problem> {
        while first && let Err(wait) = self.rate.admit() {
            tokio::time::sleep(wait).await;
        }
        self.read(Position::After(after).into(), limit).await
    }

    async fn read(&self, start: Start, limit: usize) -> Result<Vec<Entry>, Problem> {
        // The semaphore is never closed.
        let _turn = self.at_once.acquire().await.ok();
        history::read(&self.client, NUMBERS, start, limit)
            .await
            .map_err(|error| Problem::unavailable(format!("the history cannot be read: {error}")))
    }

    /// All numbers from a position on, up to the last one that the snapshot knows of, or to the
    /// first one that was stored at `until` or later. Nothing is read that the client does not
    /// take, and an export that fails ends with an error, so that it is not taken for complete.
    ///
    /// # Errors
    /// 429 if too many exports are in progress, 503 if the broker does not answer.
    pub async fn export(
        self: &Arc<Self>,
        snapshot: &Snapshot,
        position: Position,
        until: Option<OffsetDateTime>,
        format: Format,
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + 'static, Problem> {
        let permit = self.exports.clone().try_acquire_owned();
        let permit = permit.map_err(|_| too_many(Duration::from_secs(10)))?;
        // The first read is made before the answer begins, so that it can still be an error.
        let entries = self.read(position.into(), MAX_BATCH).await?;
        let mut export = Export {
            history: self.clone(),
            last_seq: snapshot.last_seq,
            until,
            format,
            next: ControlFlow::Break(()),
            not_before: Instant::now(),
            _permit: permit,
        };
        let mut head = String::new();
        if format == Format::Csv {
            head.push_str("seq,number,even,odd,published_at\n");
        }
        head += &export.take(entries);
        let rest = stream::try_unfold(export, async |mut export| {
            let ControlFlow::Continue(after) = export.next else {
                return Ok(None);
            };
            tokio::time::sleep_until(export.not_before).await;
            export.not_before = Instant::now() + EXPORT_PACE;
            let entries = export.history.read_on(after, MAX_BATCH, false).await;
            let entries = entries.map_err(|problem| io::Error::other(problem.to_string()))?;
            let chunk = export.take(entries);
            Ok(Some((Bytes::from(chunk), export)))
        });
        let first = stream::iter([Ok(Bytes::from(head))]);
        Ok(futures::StreamExt::chain(first, rest))
    }
}

/// What is left to export.
struct Export {
    history: Arc<History>,
    last_seq: u64,
    until: Option<OffsetDateTime>,
    format: Format,
    /// After which sequence to go on, if at all.
    next: ControlFlow<(), u64>,
    not_before: Instant,
    _permit: OwnedSemaphorePermit,
}

impl Export {
    /// Writes what belongs to the export, and finds out where to go on.
    fn take(&mut self, mut entries: Vec<Entry>) -> String {
        let read = entries.len();
        entries.retain(|entry| {
            entry.sequence <= self.last_seq && self.until.is_none_or(|until| entry.time < until)
        });
        self.next = match entries.last() {
            Some(last) if entries.len() == read && last.sequence < self.last_seq => {
                ControlFlow::Continue(last.sequence)
            }
            _ => ControlFlow::Break(()),
        };
        self.format.all(&valid(&entries))
    }
}

impl From<Position> for Start {
    fn from(position: Position) -> Self {
        match position {
            Position::After(seq) => Self::Sequence(seq.saturating_add(1)),
            Position::From(time) => Self::Time(time),
        }
    }
}

fn too_many(wait: Duration) -> Problem {
    let detail = "too much of the history is being read at this moment";
    Problem::too_many_requests(detail, wait)
}

/// So many a second, and a second's worth of them at once (the generic cell rate algorithm).
struct Rate {
    interval: Duration,
    /// When the last one that was admitted would have come at an even pace.
    even: Mutex<Instant>,
}

impl Rate {
    const BURST: Duration = Duration::from_secs(1);

    fn new(per_s: u32) -> Self {
        Self { interval: Duration::from_secs(1) / per_s.max(1), even: Mutex::new(Instant::now()) }
    }

    /// Admits one, or says how long to wait.
    fn admit(&self) -> Result<(), Duration> {
        let now = Instant::now();
        let mut even = self.even.lock().unwrap_or_else(PoisonError::into_inner);
        let next = (*even).max(now) + self.interval;
        let ahead = next - now;
        if ahead > Self::BURST {
            return Err(ahead - Self::BURST);
        }
        *even = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_kept() {
        let rate = Rate::new(20);
        let burst = (0..100).filter(|_| rate.admit().is_ok()).count();
        assert_eq!(burst, 20);
        let wait = rate.admit().unwrap_err();
        assert!(wait <= Duration::from_millis(50), "{wait:?}");
        tokio::time::advance(wait).await;
        assert_eq!(rate.admit(), Ok(()));
        let mut admitted = 0;
        for _ in 0..10_000 {
            tokio::time::advance(Duration::from_millis(1)).await;
            admitted += u32::from(rate.admit().is_ok());
        }
        assert!((195..=205).contains(&admitted), "{admitted}");
    }
}
