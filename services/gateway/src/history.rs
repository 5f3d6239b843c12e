//! The whole history: pages of it, one number of it, and all of it as a stream.
//!
//! What the snapshot holds is answered from there. Everything older is read from the broker by
//! direct get, never by a consumer, and within bounds: blocks of the stream that are read at random
//! stay in the broker's memory for a while.

use std::convert::Infallible;
use std::future::ready;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_nats::Client;
use bytes::Bytes;
use contract::streams::NUMBERS;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use runtime::history::{self, Entry, MAX_BATCH, Start};
use serde::Serialize;
use time::OffsetDateTime;
use tokio::sync::Semaphore;
use tokio::time::MissedTickBehavior;

use crate::format::Format;
use crate::problem::{Problem, Result};
use crate::record::{Record, valid};
use crate::snapshot::Snapshot;

/// The maximum number of concurrent reads.
const AT_ONCE: usize = 8;
/// How long a request waits for its turn before it is refused.
const TURN: Duration = Duration::from_secs(1);
/// The pauses before a read that should have found something is repeated.
const BEHIND_MS: [u64; 3] = [20, 80, 200];
/// From one read of an export to the next: at most 100,000 records a second.
const EXPORT_PACE: Duration = Duration::from_millis(10);

/// Rate-limited reads of the history. Requests and feeds have separate budgets; both are refilled
/// at the same rate.
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

impl Page {
    fn new(last_seq: u64, numbers: Vec<Record>, next: Option<u64>) -> Self {
        Self { stream: NUMBERS, last_seq, count: numbers.len(), numbers, next }
    }

    /// What these messages hold, up to `last_seq`: the stream may have grown since.
    fn of(mut entries: Vec<Entry>, last_seq: u64) -> Self {
        entries.retain(|entry| entry.sequence <= last_seq);
        let end = entries.last().map(|entry| entry.sequence);
        Self::new(last_seq, valid(&entries), end.filter(|end| *end < last_seq))
    }
}

impl History {
    /// Limits the reads a second and the concurrent exports.
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

    /// Refills the budgets, for ever.
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
    /// 429 if a limit is reached, 503 if the broker does not answer.
    pub async fn page(&self, snapshot: &Snapshot, start: Start, limit: usize) -> Result<Page> {
        let last_seq = snapshot.last_seq;
        let Some(held) = snapshot.held(start) else {
            return Ok(Page::of(self.read_for_request(start, limit).await?, last_seq));
        };
        let mut held = held.cloned();
        let numbers: Vec<Record> = held.by_ref().take(limit).collect();
        let next = numbers.last().filter(|_| held.next().is_some()).map(|record| record.seq);
        Ok(Page::new(last_seq, numbers, next))
    }

    /// A read for a request. It is refused if it cannot begin soon.
    async fn read_for_request(&self, start: Start, limit: usize) -> Result<Vec<Entry>> {
        self.for_requests.try_acquire().map_err(|_| Problem::too_many_reads("1"))?.forget();
        let turn = tokio::time::timeout(TURN, self.at_once.acquire());
        let _turn = turn.await.map_err(|_| Problem::too_many_reads("1"))?;
        self.read(start, limit).await
    }

    /// The messages after a sequence, for a feed, which waits for its budget.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn read_for_feed(&self, after: u64, limit: usize) -> Result<Vec<Entry>> {
        // The semaphores are never closed.
        if let Ok(permit) = self.for_feeds.acquire().await {
            permit.forget();
        }
        self.read_in_turn(after, limit).await
    }

    /// The messages after a sequence, as soon as fewer than [`AT_ONCE`] reads are in progress.
    async fn read_in_turn(&self, after: u64, limit: usize) -> Result<Vec<Entry>> {
        let _turn = self.at_once.acquire().await;
        self.read(Start::Sequence(after + 1), limit).await
    }

    /// Reads messages that are known to exist. A replica of the stream that lags may not have them
    /// yet; the repeated read most likely reaches another replica.
    async fn read(&self, start: Start, limit: usize) -> Result<Vec<Entry>> {
        for pause in BEHIND_MS {
            let read = history::read(&self.client, NUMBERS, start, limit).await;
            let entries = read.map_err(|error| {
                Problem::unavailable(format!("the history cannot be read: {error:#}"))
            })?;
            if !entries.is_empty() {
                return Ok(entries);
            }
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        Err(Problem::unavailable("the history cannot be read: its replica is behind"))
    }

    /// All records from `start` on, up to the end of the snapshot or the first record that was
    /// stored at `until` or later. The history is read only as fast as the client takes it. An
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
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + 'static> {
        let permit = self.exports.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Problem::too_many_reads("10"))?;
        // The first read is made before the response begins, so that it can still be an error.
        let first = self.page(snapshot, start, MAX_BATCH).await?;
        let (next, last_seq) = (first.next, snapshot.last_seq);
        let mut pace = tokio::time::interval(EXPORT_PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let rest = stream::try_unfold((self.clone(), pace, next), move |state| async move {
            let (history, mut pace, Some(after)) = state else { return Ok(None) };
            pace.tick().await;
            let read = history.read_in_turn(after, MAX_BATCH).await;
            let entries = read.map_err(|problem| io::Error::other(problem.detail))?;
            let page = Page::of(entries, last_seq);
            let next = page.next;
            Ok(Some((page, (history, pace, next))))
        });
        let is_wanted = move |record: &Record| until.is_none_or(|until| record.time < until);
        let chunks = stream::iter([Ok(first)])
            .chain(rest)
            .try_take_while(move |page| ready(Ok(page.numbers.first().is_none_or(is_wanted))))
            .map_ok(move |page| {
                let _held_until_the_end = &permit;
                format.all(page.numbers.iter().filter(|record| is_wanted(record))).into()
            });
        let head = if format == Format::Csv { "seq,number,even,odd,published_at\n" } else { "" };
        Ok(stream::iter([Ok(Bytes::from(head))]).chain(chunks))
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
