//! Follows the stream, without a consumer: a live message is only a nudge to look, and what is
//! new is read from the stream, in order (docs/adr/0003-the-gateway-reads-ahead.md).

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use async_nats::{Client, Subscriber};
use contract::streams::NUMBERS;
use contract::subjects;
use futures::{FutureExt, StreamExt};
use runtime::history::{self, MAX_BATCH};
use runtime::jetstream;
use time::OffsetDateTime;
use tokio::time::{Instant, interval, sleep};
use tracing::{info, warn};

use crate::record::valid;
use crate::snapshot::{LAST, Snapshot};
use crate::state::State;

/// How often to look without a nudge, because a nudge may be lost.
const LOOK: Duration = Duration::from_secs(1);
/// How often to make sure that the stream is still the same one.
const IDENTITY: Duration = Duration::from_secs(5);
/// The timeout for the stream's leader once the stream is known. Nothing is read meanwhile.
const LEADER_PATIENCE: Duration = Duration::from_millis(250);
/// The same before anything was read, when there is nothing else to do.
const FIRST_PATIENCE: Duration = Duration::from_secs(2);
/// A nudge may arrive before the replica that is asked has the message. It is asked again after
/// these pauses.
const AGAIN_MS: [u64; 5] = [1, 2, 4, 16, 64];
/// How far back the start looks for 100 valid records among invalid messages.
const MAX_BACK: u64 = 100_000;

/// Keeps the state up to date with the stream, for ever. A failure is logged once and retried.
///
/// # Errors
/// If the connection was closed for good.
pub async fn run(client: &Client, state: &State) -> anyhow::Result<()> {
    let nudges = client.subscribe(subjects::PUBLISHED).await?;
    let mut reader = Reader { client, state, nudges, snapshot: None, fault: String::new() };
    loop {
        let Err(error) = reader.follow().await else { bail!("the connection to NATS was closed") };
        let error = format!("{error:#}");
        if error != reader.fault {
            warn!("cannot read the history, trying again: {error}");
            reader.fault = error;
        }
        sleep(LOOK / 4).await;
    }
}

struct Reader<'a> {
    client: &'a Client,
    state: &'a State,
    nudges: Subscriber,
    /// The snapshot to read on from; `None` before the first read, and after the stream was
    /// replaced.
    snapshot: Option<Arc<Snapshot>>,
    /// The failure that was logged last; empty while reads succeed.
    fault: String,
}

impl Reader<'_> {
    /// Follows the stream until something goes wrong, or (`Ok`) the nudges end.
    async fn follow(&mut self) -> anyhow::Result<()> {
        let mut identify = interval(IDENTITY);
        let mut look = interval(LOOK);
        loop {
            tokio::select! {
                // The first tick is immediate: the stream is identified before it is read.
                biased;
                _ = identify.tick() => self.identify().await?,
                nudge = self.nudges.next() => {
                    if nudge.is_none() {
                        return Ok(());
                    }
                    // One look serves all nudges that have arrived by now.
                    while let Some(Some(_)) = self.nudges.next().now_or_never() {}
                    self.look(&AGAIN_MS).await?;
                }
                _ = look.tick() => self.look(&[]).await?,
            }
        }
    }

    /// Makes sure that the stream is still the one that was read, and starts over if not. Only its
    /// leader knows. Without a leader the stream can still be read.
    async fn identify(&mut self) -> anyhow::Result<()> {
        if let Some(read) = &self.snapshot {
            match jetstream::info(self.client, NUMBERS, LEADER_PATIENCE).await {
                // It was made anew, or restored to an earlier state.
                Ok(now)
                    if now.created != read.created || now.state.last_sequence < read.last_seq => {}
                _ => return Ok(()),
            }
            warn!("the stream is not the one that was read: starting over");
            self.snapshot = None;
        }
        let info = jetstream::info(self.client, NUMBERS, FIRST_PATIENCE).await?;
        let snapshot = self.start(info.created).await?;
        info!(last_seq = snapshot.last_seq, "caught up with the history");
        self.publish(snapshot);
        Ok(())
    }

    /// The last 100 records of a stream that is read for the first time.
    async fn start(&self, created: OffsetDateTime) -> anyhow::Result<Snapshot> {
        let last = history::last(self.client, NUMBERS).await?.map_or(0, |entry| entry.sequence);
        let mut back = LAST as u64;
        loop {
            let mut snapshot = Snapshot::empty(created, last.saturating_sub(back));
            while snapshot.last_seq < last {
                let more = self.read_after(&snapshot).await?;
                snapshot = more.context("the replica of the stream that answers is behind")?;
            }
            if snapshot.len() == LAST || back >= last.min(MAX_BACK) {
                return Ok(snapshot);
            }
            back *= 10;
        }
    }

    /// Reads what is new. If there is nothing, asks again after each of these pauses.
    async fn look(&mut self, pauses_ms: &[u64]) -> anyhow::Result<()> {
        let mut pauses_ms = pauses_ms.iter();
        while !self.read_on().await?
            && let Some(ms) = pauses_ms.next()
        {
            sleep(Duration::from_millis(*ms)).await;
        }
        self.state.confirmed.send_replace(Instant::now());
        if !mem::take(&mut self.fault).is_empty() {
            info!("the history is read again");
        }
        Ok(())
    }

    /// Publishes what is new. Returns whether there was anything.
    async fn read_on(&mut self) -> anyhow::Result<bool> {
        let mut found = false;
        while let Some(snapshot) = &self.snapshot
            && let Some(more) = self.read_after(snapshot).await?
        {
            let is_full = more.last_seq - snapshot.last_seq >= MAX_BATCH as u64;
            self.publish(more);
            found = true;
            if !is_full {
                break;
            }
        }
        Ok(found)
    }

    /// The snapshot after the next batch of messages; `None` if there is nothing new.
    async fn read_after(&self, snapshot: &Snapshot) -> anyhow::Result<Option<Snapshot>> {
        let next = snapshot.last_seq + 1;
        let entries = history::read(self.client, NUMBERS, next, MAX_BATCH).await?;
        Ok(entries.last().map(|end| snapshot.with(valid(&entries), end.sequence)))
    }

    fn publish(&mut self, snapshot: Snapshot) {
        let snapshot = Arc::new(snapshot);
        self.state.latest.send_replace(Some(snapshot.clone()));
        self.snapshot = Some(snapshot);
    }
}
