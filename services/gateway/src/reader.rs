//! Follows the stream, without a consumer: a live message is only a nudge to look, and what is
//! new is read from the stream, in order (docs/adr/0003-the-gateway-reads-ahead.md).

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::stream::Info;
use async_nats::{Client, Subscriber};
use contract::streams::NUMBERS;
use contract::subjects;
use futures::{FutureExt, StreamExt};
use runtime::history::{self, Entry, MAX_BATCH};
use runtime::jetstream;
use time::OffsetDateTime;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::snapshot::{LAST, Number, Snapshot, State};

/// How often to look without a nudge: one may be lost.
const LOOK: Duration = Duration::from_secs(1);
/// How often to make sure that the stream is still the same one.
const IDENTITY: Duration = Duration::from_secs(5);
/// The leader answers within this time, or there is none. Nothing is read meanwhile.
const LEADER_PATIENCE: Duration = Duration::from_millis(250);
/// Before the first number is known there is nothing else to do.
const FIRST_PATIENCE: Duration = Duration::from_secs(2);
/// A nudge may be quicker than the replica that is asked: it is asked again after these.
const AGAIN: [Duration; 5] = [
    Duration::from_millis(1),
    Duration::from_millis(2),
    Duration::from_millis(4),
    Duration::from_millis(16),
    Duration::from_millis(64),
];
/// How far back the start looks for 100 valid numbers among invalid messages.
const MAX_BACK: u64 = 100_000;

/// The task that keeps the state as new as the stream.
pub struct Reader {
    client: Client,
    state: Arc<State>,
    nudges: Subscriber,
    /// What is going wrong, so that it is logged once; empty while all is well.
    fault: String,
    /// The stream that was read is not there any more.
    replaced: bool,
}

impl Reader {
    /// Listens for nudges.
    ///
    /// # Errors
    /// If the connection was closed.
    pub async fn new(client: Client, state: Arc<State>) -> anyhow::Result<Self> {
        let nudges = client.subscribe(subjects::PUBLISHED).await?;
        Ok(Self { client, state, nudges, fault: String::new(), replaced: false })
    }

    /// Follows the stream for ever. What goes wrong is logged once, and tried again.
    ///
    /// # Errors
    /// If the connection was closed for good.
    pub async fn run(mut self) -> anyhow::Result<()> {
        loop {
            let Err(error) = self.follow().await else {
                anyhow::bail!("the connection to NATS was closed");
            };
            let error = format!("{error:#}");
            if error != self.fault {
                warn!("cannot read the history, trying again: {error}");
                self.fault = error;
            }
            tokio::time::sleep(LOOK / 4).await;
        }
    }

    /// Follows one stream until something goes wrong, or (`Ok`) the nudges end.
    async fn follow(&mut self) -> anyhow::Result<()> {
        let before = self.state.snapshot();
        let patience = if before.is_some() { LEADER_PATIENCE } else { FIRST_PATIENCE };
        let mut snapshot = match (before, self.info(patience).await) {
            // Read on after an interruption.
            (Some(snapshot), Ok(now)) if is_same(snapshot.created, snapshot.last_seq, &now) => {
                snapshot
            }
            // A stream that has no leader for a while can be read all the same.
            (Some(snapshot), Err(_)) if !self.replaced => snapshot,
            (before, info) => {
                let start = Arc::new(self.start(info?.created).await?);
                if before.is_some() {
                    warn!("{NOT_THE_SAME}: starting over");
                }
                self.replaced = false;
                self.state.replace(start.clone());
                info!(last_seq = start.last_seq, "caught up with the history");
                start
            }
        };
        let mut look = tokio::time::interval(LOOK);
        let mut identity_at = Instant::now();
        loop {
            let nudged = tokio::select! {
                nudge = self.nudges.next() => match nudge {
                    // One look serves all that have come by now.
                    Some(_) => {
                        while let Some(Some(_)) = self.nudges.next().now_or_never() {}
                        true
                    }
                    None => return Ok(()),
                },
                _ = look.tick() => false,
            };
            let before = snapshot.last_seq;
            snapshot = self.read_on(snapshot).await?;
            if nudged {
                for pause in AGAIN {
                    if snapshot.last_seq > before {
                        break;
                    }
                    tokio::time::sleep(pause).await;
                    snapshot = self.read_on(snapshot).await?;
                }
            }
            self.state.confirm();
            if !self.fault.is_empty() {
                info!(last_seq = snapshot.last_seq, "the history is read again");
                self.fault.clear();
            }
            if identity_at.elapsed() >= IDENTITY {
                identity_at = Instant::now();
                if let Ok(now) = self.info(LEADER_PATIENCE).await {
                    // Made anew, or put back to an earlier state: the next round starts over.
                    self.replaced = !is_same(snapshot.created, before, &now);
                    anyhow::ensure!(!self.replaced, NOT_THE_SAME);
                }
            }
        }
    }

    async fn info(&self, patience: Duration) -> anyhow::Result<Info> {
        jetstream::info(&self.client, NUMBERS, patience).await
    }

    /// The last 100 valid numbers of a stream that is read for the first time.
    async fn start(&self, created: OffsetDateTime) -> anyhow::Result<Snapshot> {
        let Some(last) = history::last(&self.client, NUMBERS).await? else {
            return Ok(Snapshot::empty(created, 0));
        };
        let last = last.sequence;
        let mut back = LAST as u64;
        loop {
            let from = last.saturating_sub(back - 1).max(1);
            let mut numbers = Vec::new();
            let mut next = from;
            while next <= last {
                let entries = history::read(&self.client, NUMBERS, next, MAX_BATCH).await?;
                let Some(end) = entries.last() else { break };
                next = end.sequence + 1;
                numbers.extend(valid(&entries));
                // Of a long stretch only the end counts, and that there was something before it.
                numbers.drain(..numbers.len().saturating_sub(LAST + 1));
            }
            let snapshot =
                Snapshot::empty(created, from - 1).with(numbers, next.saturating_sub(1).max(last));
            if snapshot.len() == LAST || from == 1 || back >= MAX_BACK {
                return Ok(snapshot);
            }
            back = (back * 10).min(MAX_BACK);
        }
    }

    /// Reads what has come since, and lets everybody see it.
    async fn read_on(&self, mut snapshot: Arc<Snapshot>) -> anyhow::Result<Arc<Snapshot>> {
        loop {
            let next = snapshot.last_seq + 1;
            let entries = history::read(&self.client, NUMBERS, next, MAX_BATCH).await?;
            let Some(end) = entries.last() else {
                return Ok(snapshot);
            };
            snapshot = Arc::new(snapshot.with(valid(&entries), end.sequence));
            self.state.replace(snapshot.clone());
            if entries.len() < MAX_BATCH {
                return Ok(snapshot);
            }
        }
    }
}

const NOT_THE_SAME: &str = "the stream is not the one that was read";

/// Whether a stream that was made then and read as far as `seq` is the one that there is.
fn is_same(created: OffsetDateTime, seq: u64, now: &Info) -> bool {
    created == now.created && seq <= now.state.last_sequence
}

/// The numbers that messages hold. A message that holds none is skipped, and never stops anybody.
pub fn valid(entries: &[Entry]) -> Vec<Number> {
    let mut invalid = 0;
    let mut numbers = Vec::with_capacity(entries.len());
    for entry in entries {
        match Number::from_entry(entry) {
            Ok(number) => numbers.push(number),
            Err(error) => {
                invalid += 1;
                if invalid == 1 {
                    warn!(seq = entry.sequence, "skipped: {error:#}");
                }
            }
        }
    }
    if invalid > 1 {
        warn!(invalid, "messages without a number were skipped");
    }
    numbers
}
