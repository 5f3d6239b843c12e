//! What people and programs outside see of a cluster while something happens to it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_nats::Client;
use contract::streams::NUMBERS;
use contract::{Outcome, Slot, SlotLength, TickDone};
use runtime::history;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::Ticks;
use crate::cluster::{self, BROKERS, HTTP};
use crate::http::{Answer, Lines, try_get};

/// Reads `/numbers` again and again, each time over a connection of its own.
pub struct Poll {
    stop: CancellationToken,
    task: JoinHandle<Polled>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Polled {
    /// How many requests were answered.
    pub answered: usize,
    /// What was wrong with the others.
    pub faults: Vec<String>,
    /// The longest time from one answer to the next.
    pub longest_gap: Duration,
}

impl Poll {
    /// Starts, with two requests at a time.
    #[must_use]
    pub fn start() -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let stop = stop.clone();
            async move {
                let mut polled = Polled::default();
                let mut latest = Instant::now();
                while !stop.is_cancelled() {
                    let ask = || try_get(HTTP, "/numbers");
                    let (one, other) = tokio::join!(ask(), ask());
                    for answer in [one, other] {
                        match answer {
                            Ok(answer) if is_whole(&answer) => {
                                polled.answered += 1;
                                polled.longest_gap = polled.longest_gap.max(latest.elapsed());
                                latest = Instant::now();
                            }
                            Ok(answer) => polled.faults.push(answer.head),
                            Err(error) => polled.faults.push(error.to_string()),
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                polled
            }
        });
        Self { stop, task }
    }

    /// Stops, and says what came of it.
    pub async fn stop(self) -> Polled {
        self.stop.cancel();
        self.task.await.unwrap()
    }
}

/// Whether it is the numbers, all that were announced.
fn is_whole(answer: &Answer) -> bool {
    let body = serde_json::from_str::<Value>(&answer.body).unwrap_or_default();
    let count = body["numbers"].as_array().map(|numbers| numbers.len() as u64);
    answer.status == 200 && count.is_some() && body["count"].as_u64() == count
}

/// Follows the live feed as a browser does: when it ends, it goes on where it was.
pub struct Follow {
    stop: CancellationToken,
    task: JoinHandle<Vec<u64>>,
}

impl Follow {
    /// Starts with what comes next.
    #[must_use]
    pub fn start() -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(follow(stop.clone()));
        Self { stop, task }
    }

    /// Stops, and returns the sequences that came, in their order.
    pub async fn stop(self) -> Vec<u64> {
        self.stop.cancel();
        self.task.await.unwrap()
    }
}

async fn follow(stop: CancellationToken) -> Vec<u64> {
    let mut sequences: Vec<u64> = Vec::new();
    while !stop.is_cancelled() {
        let resume = sequences.last().map(|last| format!("Last-Event-ID: {last}"));
        let headers: Vec<&str> = resume.iter().map(String::as_str).collect();
        // HAProxy itself may be away for a moment.
        let feed = Lines::try_open(HTTP, "/numbers/live", &headers).await;
        let mut feed = feed.ok().filter(|feed| feed.status == 200);
        while let Some(feed) = &mut feed {
            let event = tokio::select! {
                event = feed.event() => event,
                () = stop.cancelled() => break,
            };
            let Some(event) = event else { break };
            match event.name.as_str() {
                "number" => sequences.push(event.id),
                "shutdown" => break,
                _ => panic!("{event:?}"),
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    sequences
}

/// `ticks.done`, heard at every broker by somebody without a key, so that one that dies loses none.
pub struct Watch {
    from: Slot,
    watchers: Vec<Ticks>,
}

/// What was ticked in a time.
#[derive(Debug)]
pub struct Watched {
    /// Slots without a tick.
    pub missed: Vec<Slot>,
    /// Slots with more than one.
    pub doubled: Vec<Slot>,
    /// The longest time from one tick to the next.
    pub tick_gap: Duration,
    /// The longest time from the beginning of a slot until its product was stored.
    pub publish_delay: Duration,
    /// How many products were stored in a slot later than their own.
    pub late: usize,
}

impl Watch {
    /// Starts with the next slot.
    pub async fn start() -> Self {
        let mut watchers = Vec::new();
        for broker in BROKERS {
            let address = format!("{}:4222", cluster::ip(&cluster::container(broker)));
            watchers.push(Ticks::watch(&async_nats::connect(address).await.unwrap()).await);
        }
        Self { from: now().next(), watchers }
    }

    /// Stops with the slot before this one.
    ///
    /// # Panics
    /// If something that was acknowledged is not in the history.
    pub async fn stop(mut self, operator: &Client) -> Watched {
        let until = now();
        let mut records = BTreeMap::<Slot, Vec<TickDone>>::new();
        for watcher in &mut self.watchers {
            for done in watcher.all_so_far().await {
                let same_slot = records.entry(done.slot).or_default();
                if !same_slot.contains(done) {
                    same_slot.push(done.clone());
                }
            }
        }
        let slots = (self.from.0..until.0).map(Slot);
        let count = |slot: &Slot| records.get(slot).map_or(0, Vec::len);
        let ticked: Vec<_> = slots.clone().filter(|slot| count(slot) > 0).collect();
        let gap = ticked.windows(2).map(|pair| pair[1].0 - pair[0].0).max().unwrap_or(0);
        let (mut publish_delay, mut late) = (Duration::ZERO, 0);
        let stored = stored_since(operator, self.from).await;
        for (slot, delay) in &stored {
            publish_delay = publish_delay.max(*delay);
            late += usize::from(*delay > SlotLength::DEFAULT.duration() && *slot < until);
        }
        for done in records.range(self.from..).flat_map(|(_, done)| done) {
            let acked = matches!(done.outcome, Outcome::Published);
            assert!(!acked || stored.contains_key(&done.slot), "lost: {done:?}");
        }
        Watched {
            missed: slots.clone().filter(|slot| count(slot) == 0).collect(),
            doubled: slots.filter(|slot| count(slot) > 1).collect(),
            tick_gap: SlotLength::DEFAULT.duration() * u32::try_from(gap).unwrap(),
            publish_delay,
            late,
        }
    }
}

/// The slot of this moment.
#[must_use]
pub fn now() -> Slot {
    SlotLength::DEFAULT.slot_at(SystemTime::now().duration_since(UNIX_EPOCH).unwrap())
}

/// Waits for the middle of a slot, when its tick is done and the next one not begun: what a fault
/// takes with it is then what the design says, and not the tick that is just being done.
pub async fn between_ticks() {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let middle = SlotLength::DEFAULT.start_of(now().next()) + SlotLength::DEFAULT.duration() / 2;
    tokio::time::sleep(middle - since).await;
}

/// The slots that are in the history from this one on, and how long after its beginning each was
/// stored.
async fn stored_since(operator: &Client, from: Slot) -> BTreeMap<Slot, Duration> {
    let mut last = 0;
    // There may still be an election.
    cluster::in_time("the history has a leader", async || {
        let info = cluster::stream_info(operator, NUMBERS).await;
        last = info.map_or(0, |info| info.state.last_sequence);
        last > 0
    })
    .await;
    // A window is a few minutes; what was stored before is left out below.
    let mut next = last.saturating_sub(2000).max(1);
    let mut stored = BTreeMap::new();
    while next <= last {
        let entries = history::read(operator, NUMBERS, next, history::MAX_BATCH).await.unwrap();
        for entry in &entries {
            assert!(entry.sequence == next, "sequence {next} is missing");
            next += 1;
            let slot: Slot = entry.message_id.as_deref().unwrap().parse().unwrap();
            let begun = SlotLength::DEFAULT.start_of(slot);
            let at =
                Duration::from_nanos(u64::try_from(entry.time.unix_timestamp_nanos()).unwrap());
            if slot >= from {
                assert!(
                    stored.insert(slot, at.saturating_sub(begun)).is_none(),
                    "{slot} is there twice"
                );
            }
        }
    }
    stored
}

/// Whether these are all the numbers from the first to the last, each once.
#[must_use]
pub fn without_gap_or_repeat(sequences: &[u64]) -> bool {
    let distinct: BTreeSet<_> = sequences.iter().collect();
    let (first, last) = (sequences.first().unwrap(), sequences.last().unwrap());
    distinct.len() == sequences.len() && last - first + 1 == sequences.len() as u64
}
