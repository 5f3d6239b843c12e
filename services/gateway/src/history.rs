//! The whole history: pages of it, one number of it, and all of it as a stream.
//!
//! What the snapshot holds is answered from there. Everything older is read from the broker by
//! direct get, never by a consumer, and within bounds: blocks of the stream that are read at random
//! stay in the broker's memory for a while.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_nats::Client;
use bytes::Bytes;
use contract::streams::NUMBERS;
use futures::{Stream, StreamExt, stream};
use runtime::history::{self, Entry, MAX_BATCH, Start};
use serde::Serialize;
use time::OffsetDateTime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::format::Format;
use crate::problem::Problem;
use crate::record::{Record, valid};
use crate::snapshot::Snapshot;

/// Reads that are in progress at once.
const AT_ONCE: usize = 8;
/// How long a request waits for its turn before it is refused.
const TURN: Duration = Duration::from_secs(1);
/// How long to wait before a read that should have found something is made again.
const BEHIND: [Duration; 3] =
    [Duration::from_millis(20), Duration::from_millis(80), Duration::from_millis(200)];
/// From one read of an export to the next: at most 100,000 records a second.
const EXPORT_PACE: Duration = Duration::from_millis(10);

/// Bounded reads of the history. Requests and feeds have a budget each, so that neither takes the
/// other's; both are filled again at the same rate.
pub struct History {
    client: Client,
    at_once: Semaphore,
    exports: Arc<Semaphore>,
    reads_per_s: u32,
    for_requests: Semaphore,
    for_feeds: Semaphore,
}

/// A part of the history.
#[derive(Serialize)]
pub struct Page {
    stream: &'static str,
    /// The last sequence of the stream, as far as this replica knows.
    last_seq: u64,
    count: usize,
    /// The records.
    pub numbers: Vec<Record>,
    /// The sequence after which the next page begins; `None` at the end.
    pub next: Option<u64>,
}

impl History {
    /// Reads a second, and exports at once, are limited.
    pub fn new(client: Client, reads_per_s: u32, exports: u32) -> Self {
        Self {
            client,
            at_once: Semaphore::new(AT_ONCE),
            exports: Arc::new(Semaphore::new(exports as usize)),
            reads_per_s,
            for_requests: Semaphore::new(reads_per_s as usize),
            for_feeds: Semaphore::new(reads_per_s as usize),
        }
    }

    /// Fills the budgets again, for ever.
    pub async fn refill(&self) -> Infallible {
        let mut interval = tokio::time::interval(Duration::from_secs(1) / self.reads_per_s);
        loop {
            interval.tick().await;
            for budget in [&self.for_requests, &self.for_feeds] {
                if budget.available_permits() < self.reads_per_s as usize {
                    budget.add_permits(1);
                }
            }
        }
    }

    /// A page of up to `limit` messages.
    ///
    /// # Errors
    /// 429 if too much is read already, 503 if the broker does not answer.
    pub async fn page(
        &self,
        snapshot: &Snapshot,
        start: Start,
        limit: usize,
    ) -> Result<Page, Problem> {
        let last_seq = snapshot.last_seq;
        let (numbers, end) = if let Some(held) = snapshot.held(start) {
            let mut held = held.cloned();
            let numbers: Vec<Record> = held.by_ref().take(limit).collect();
            let end = numbers.last().filter(|_| held.next().is_some()).map(|record| record.seq);
            (numbers, end)
        } else {
            let mut entries = self.read_for_request(start, limit).await?;
            // The stream may have grown since; then the rest is on the next page.
            entries.retain(|entry| entry.sequence <= last_seq);
            let end = entries.last().map(|entry| entry.sequence);
            (valid(&entries), end.filter(|end| *end < last_seq))
        };
        Ok(Page { stream: NUMBERS, last_seq, count: numbers.len(), numbers, next: end })
    }

    /// A read for a request, which begins soon or not at all.
    async fn read_for_request(&self, start: Start, limit: usize) -> Result<Vec<Entry>, Problem> {
        self.for_requests.try_acquire().map_err(|_| Problem::too_many_reads(TURN))?.forget();
        let turn = tokio::time::timeout(TURN, self.at_once.acquire());
        let _turn = turn.await.map_err(|_| Problem::too_many_reads(TURN))?;
        self.read(start, limit).await
    }

    /// The messages after a sequence, for a feed, which waits until there is budget for it.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn read_for_feed(&self, after: u64, limit: usize) -> Result<Vec<Entry>, Problem> {
        // The semaphores are never closed.
        if let Ok(permit) = self.for_feeds.acquire().await {
            permit.forget();
        }
        self.read_in_turn(after, limit).await
    }

    /// The messages after a sequence, as soon as fewer than [`AT_ONCE`] reads are in progress.
    async fn read_in_turn(&self, after: u64, limit: usize) -> Result<Vec<Entry>, Problem> {
        let _turn = self.at_once.acquire().await;
        self.read(Start::Sequence(after + 1), limit).await
    }

    /// Reads what is known to be there. A replica of the stream that is behind does not have it
    /// yet; then another one is asked.
    async fn read(&self, start: Start, limit: usize) -> Result<Vec<Entry>, Problem> {
        for pause in BEHIND {
            let read = history::read(&self.client, NUMBERS, start, limit).await;
            let entries = read.map_err(|error| {
                Problem::unavailable(format!("the history cannot be read: {error}"))
            })?;
            if !entries.is_empty() {
                return Ok(entries);
            }
            tokio::time::sleep(pause).await;
        }
        Err(Problem::unavailable("the history cannot be read: its replica is behind"))
    }

    /// All records from `start` on, up to the last one that the snapshot knows of, or to the first
    /// one that was stored at `until` or later. Nothing is read that the client does not take. An
    /// export that fails ends with an error, so that no client takes it for complete.
    ///
    /// # Errors
    /// 429 if too many exports are in progress, 503 if the broker does not answer.
    pub async fn export(
        self: &Arc<Self>,
        snapshot: &Snapshot,
        start: Start,
        until: Option<OffsetDateTime>,
        format: Format,
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + 'static, Problem> {
        let permit = self.exports.clone().try_acquire_owned();
        let mut export = Export {
            history: self.clone(),
            last_seq: snapshot.last_seq,
            until,
            format,
            next: None,
            not_before: Instant::now(),
            _permit: permit.map_err(|_| Problem::too_many_reads(Duration::from_secs(10)))?,
        };
        let mut head = String::new();
        if format == Format::Csv {
            head.push_str("seq,number,even,odd,published_at\n");
        }
        // The first read is made before the response begins, so that it can still be an error.
        head += &match snapshot.held(start) {
            Some(held) => format.all(held.filter(|record| export.wants(record.seq, record.time))),
            None => export.take(self.read_for_request(start, MAX_BATCH).await?),
        };
        let rest = stream::try_unfold(export, async |mut export| {
            let Some(after) = export.next else { return Ok(None) };
            tokio::time::sleep_until(export.not_before).await;
            export.not_before = Instant::now() + EXPORT_PACE;
            let read = export.history.read_in_turn(after, MAX_BATCH).await;
            let entries = read.map_err(|problem| io::Error::other(problem.detail))?;
            let chunk = export.take(entries);
            Ok(Some((Bytes::from(chunk), export)))
        });
        Ok(stream::iter([Ok(Bytes::from(head))]).chain(rest))
    }
}

/// What is left to export.
struct Export {
    history: Arc<History>,
    last_seq: u64,
    until: Option<OffsetDateTime>,
    format: Format,
    /// After which sequence to go on, if at all.
    next: Option<u64>,
    not_before: Instant,
    _permit: OwnedSemaphorePermit,
}

impl Export {
    fn wants(&self, seq: u64, time: OffsetDateTime) -> bool {
        seq <= self.last_seq && self.until.is_none_or(|until| time < until)
    }

    /// Writes what belongs to the export, and notes where to go on.
    fn take(&mut self, mut entries: Vec<Entry>) -> String {
        let read = entries.len();
        entries.retain(|entry| self.wants(entry.sequence, entry.time));
        let end = entries.last().map(|entry| entry.sequence);
        self.next = end.filter(|end| entries.len() == read && *end < self.last_seq);
        self.format.all(&valid(&entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_budgets_are_filled_at_the_rate() {
        let client = async_nats::ConnectOptions::new().retry_on_initial_connect();
        let client = client.connect("127.0.0.1:1").await.unwrap();
        let history = History::new(client, 20, 1);
        let take = || match history.for_requests.try_acquire() {
            Ok(permit) => {
                permit.forget();
                true
            }
            Err(_) => false,
        };
        assert_eq!((0..100).filter(|_| take()).count(), 20);
        let taking = async {
            let mut taken = 0;
            for _ in 0..10_000 {
                tokio::time::sleep(Duration::from_millis(1)).await;
                taken += u32::from(take());
            }
            taken
        };
        tokio::select! {
            _ = history.refill() => unreachable!(),
            taken = taking => assert!((195..=205).contains(&taken), "{taken}"),
        }
        assert_eq!(history.for_feeds.available_permits(), 20);
    }
}
