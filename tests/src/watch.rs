//! What clients see of a cluster while faults happen.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_nats::{Client, Subscriber};
use contract::streams::TICKS;
use contract::{Slot, SlotLength, subjects};
use futures::{FutureExt, StreamExt};
use runtime::history::{self, Entry};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::Audit;
use crate::cluster::{self, BROKERS, HTTP};
use crate::http::{Answer, Lines, try_get};
use crate::ticks::slot;

/// Requests `/numbers` repeatedly, each time on a new connection.
pub struct Poll {
    stop: CancellationToken,
    task: JoinHandle<Polled>,
}

/// The result of a [`Poll`].
#[derive(Debug, Default)]
pub struct Polled {
    /// How many requests were answered.
    pub answered: usize,
    /// What was wrong with the other requests.
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

    /// Stops, and returns the result.
    pub async fn stop(self) -> Polled {
        self.stop.cancel();
        self.task.await.unwrap()
    }
}

/// Whether the answer has all the records that it announces.
fn is_whole(answer: &Answer) -> bool {
    let body = serde_json::from_str::<Value>(&answer.body).unwrap_or_default();
    let count = body["numbers"].as_array().map(|numbers| numbers.len() as u64);
    answer.status == 200 && count.is_some() && body["count"].as_u64() == count
}

/// Follows the live feed as a browser does: when the feed ends, it resumes at its position.
pub struct Follow {
    stop: CancellationToken,
    task: JoinHandle<Vec<u64>>,
}

impl Follow {
    /// Starts with the next record.
    #[must_use]
    pub fn start() -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(follow(stop.clone()));
        Self { stop, task }
    }

    /// Stops, and returns the sequences in the order of their arrival.
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
        // HAProxy itself may be down for a moment.
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

/// Watches the streams, and subscribes to `numbers.published` at every broker without a key.
pub struct Watch {
    from: Slot,
    heard: Vec<(&'static str, Subscriber)>,
}

/// What a [`Watch`] has seen.
#[derive(Debug)]
pub struct Watched {
    /// Slots without a draw.
    pub missed: Vec<Slot>,
    /// Slots whose draw has no product.
    pub without_numbers: Vec<Slot>,
    /// The longest time from one stored draw to the next.
    pub tick_gap: Duration,
    /// The longest time from the beginning of a slot until its product was stored.
    pub publish_delay: Duration,
    /// How many products were stored in a slot later than their own.
    pub late: usize,
    /// How many records were heard twice, for each broker that has any.
    pub heard_twice: BTreeMap<&'static str, usize>,
}

impl Watched {
    /// How many records were heard twice, except by the subscriber of the container that failed.
    #[must_use]
    pub fn heard_twice_beside(&self, failed: &str) -> usize {
        let twice = self.heard_twice.iter();
        twice
            .filter(|(broker, _)| cluster::container(broker) != failed)
            .map(|(_, count)| count)
            .sum()
    }
}

impl Watch {
    /// Starts with the next slot.
    pub async fn start() -> Self {
        let mut heard = Vec::new();
        for broker in BROKERS {
            let address = format!("{}:4222", cluster::ip(&cluster::container(broker)));
            let client = async_nats::connect(address).await.unwrap();
            heard.push((broker, client.subscribe(subjects::PUBLISHED).await.unwrap()));
            client.flush().await.unwrap();
        }
        Self { from: now().next(), heard }
    }

    /// Stops with the slot before this one.
    ///
    /// # Panics
    /// If a draw above the threshold is not in the history.
    pub async fn stop(self, operator: &Client) -> Watched {
        let until = now();
        // A leader election may still be going on.
        cluster::in_time("slots are drawn up to now", async || {
            let last = history::last(operator, TICKS).await;
            last.is_ok_and(|last| last.is_some_and(|last| slot(&last) >= until))
        })
        .await;
        let audit = Audit::of(operator).await;
        let slots = (self.from.0..until.0).map(Slot);
        let draws: Vec<_> = audit.draws.range(self.from..until).map(|(_, draw)| draw.at).collect();
        let gaps = draws.windows(2).map(|pair| pair[1].saturating_sub(pair[0]));
        let length = SlotLength::DEFAULT;
        let delays = audit.numbers.range(self.from..until);
        let delays = delays.map(|(slot, number)| number.at.saturating_sub(length.start_of(*slot)));
        let delays: Vec<_> = delays.collect();
        let mut heard_twice = BTreeMap::new();
        for (broker, mut heard) in self.heard {
            let mut sequences = BTreeSet::new();
            while let Some(Some(message)) = heard.next().now_or_never() {
                if !sequences.insert(Entry::try_from(message).unwrap().sequence) {
                    *heard_twice.entry(broker).or_default() += 1;
                }
            }
        }
        let without_numbers = audit.without_numbers();
        Watched {
            missed: slots.filter(|slot| !audit.draws.contains_key(slot)).collect(),
            without_numbers: without_numbers.into_iter().filter(|s| *s >= self.from).collect(),
            tick_gap: gaps.max().unwrap_or_default(),
            publish_delay: delays.iter().copied().max().unwrap_or_default(),
            late: delays.iter().filter(|delay| **delay > length.duration()).count(),
            heard_twice,
        }
    }
}

/// The current slot.
#[must_use]
pub fn now() -> Slot {
    SlotLength::DEFAULT.slot_at(SystemTime::now().duration_since(UNIX_EPOCH).unwrap())
}

/// Whether these are all sequences from the first to the last, each once.
#[must_use]
pub fn without_gap_or_repeat(sequences: &[u64]) -> bool {
    let distinct: BTreeSet<_> = sequences.iter().collect();
    let (first, last) = (sequences.first().unwrap(), sequences.last().unwrap());
    distinct.len() == sequences.len() && last - first + 1 == sequences.len() as u64
}
