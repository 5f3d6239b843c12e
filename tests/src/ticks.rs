//! Watches `ticks.done`, and compares the two streams.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::{Client, Subscriber};
use contract::streams::{NUMBERS, TICKS};
use contract::{Draw, Message, Product, Slot, subjects};
use futures::StreamExt;
use runtime::history::{self, Entry, MAX_BATCH};

use crate::{eventually, patience};

/// A subscription to all ticks.
pub struct Ticks {
    draws: Subscriber,
    seen: Vec<Draw>,
}

impl Ticks {
    /// Subscribes. All ticks after the return of this function are heard.
    pub async fn watch(client: &Client) -> Self {
        let draws = client.subscribe(subjects::DONE).await.unwrap();
        client.flush().await.unwrap();
        Self { draws, seen: Vec::new() }
    }

    /// The next tick.
    pub async fn next(&mut self) -> Draw {
        let message = tokio::time::timeout(patience(), self.draws.next())
            .await
            .expect("no tick for a long time")
            .expect("the connection was closed");
        let draw = Draw::decode(&message.payload).unwrap();
        self.seen.push(draw.clone());
        draw
    }

    /// The next `count` ticks.
    pub async fn take(&mut self, count: usize) -> Vec<Draw> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            taken.push(self.next().await);
        }
        taken
    }

    /// Reads ticks until `condition` holds for one.
    pub async fn until(&mut self, condition: impl Fn(&Draw) -> bool) -> Draw {
        let deadline = tokio::time::Instant::now() + patience();
        loop {
            assert!(tokio::time::Instant::now() < deadline, "no such tick");
            let draw = self.next().await;
            if condition(&draw) {
                return draw;
            }
        }
    }

    /// All ticks so far, including those before a pause.
    pub async fn all_so_far(&mut self) -> &[Draw] {
        let quiet = Duration::from_millis(300);
        while let Ok(Some(message)) = tokio::time::timeout(quiet, self.draws.next()).await {
            self.seen.push(Draw::decode(&message.payload).unwrap());
        }
        &self.seen
    }
}

/// The contents of both streams, by slot.
#[derive(Debug)]
pub struct Audit {
    /// The draw of each slot.
    pub draws: BTreeMap<Slot, Stored<Draw>>,
    /// The products in the history, from the first of these draws on.
    pub numbers: BTreeMap<Slot, Stored<Product>>,
}

/// A message of a stream.
#[derive(Clone, Debug)]
pub struct Stored<T> {
    /// The sequence in the stream.
    pub sequence: u64,
    /// When it was stored, since the Unix epoch.
    pub at: Duration,
    /// The decoded payload.
    pub value: T,
}

impl Audit {
    /// Waits until every product that is due is in the history, and reads both streams.
    ///
    /// # Panics
    /// If a product that is due does not reach the history, or if a slot has two draws, two
    /// products, or a product that is not that of its draw.
    pub async fn of(client: &Client) -> Self {
        let mut audit = Self { draws: BTreeMap::new(), numbers: BTreeMap::new() };
        eventually("every product that is due is in the history", async || {
            // In this order every product in `numbers` has its draw, even if one is stored
            // meanwhile.
            audit.numbers = by_slot(client, NUMBERS).await;
            audit.draws = by_slot(client, TICKS).await;
            let due = audit.draws.iter().filter(|(_, draw)| draw.value.due().is_some());
            due.map(|(slot, _)| slot).all(|slot| audit.numbers.contains_key(slot))
        })
        .await;
        let first = audit.draws.first_key_value().map(|(slot, _)| *slot);
        audit.numbers.retain(|slot, _| Some(*slot) >= first);
        for (slot, draw) in &audit.draws {
            assert_eq!(draw.value.slot, *slot);
        }
        for (slot, number) in &audit.numbers {
            let draw = audit.draws.get(slot).unwrap_or_else(|| panic!("slot {slot} has no draw"));
            assert_eq!(draw.value.due(), Some(number.value), "slot {slot}");
        }
        audit
    }

    /// The slots between the first and the last one that have no draw.
    #[must_use]
    pub fn missed(&self) -> Vec<Slot> {
        let (first, last) = (self.draws.first_key_value(), self.draws.last_key_value());
        let (Some((first, _)), Some((last, _))) = (first, last) else { return Vec::new() };
        (first.0..last.0).map(Slot).filter(|slot| !self.draws.contains_key(slot)).collect()
    }

    /// The slots whose draw lacks a factor, because no generator answered in time.
    #[must_use]
    pub fn without_numbers(&self) -> Vec<Slot> {
        let without = self.draws.iter().filter(|(_, draw)| draw.value.product().is_none());
        without.map(|(slot, _)| *slot).collect()
    }
}

async fn by_slot<T: Message>(client: &Client, stream: &'static str) -> BTreeMap<Slot, Stored<T>> {
    let mut messages = BTreeMap::new();
    for entry in all(client, stream).await {
        let value = T::decode(&entry.payload).unwrap();
        let stored = Stored { sequence: entry.sequence, at: entry.since_epoch(), value };
        assert!(messages.insert(slot(&entry), stored).is_none(), "{} is there twice", slot(&entry));
    }
    messages
}

/// The message id of an entry.
#[must_use]
pub fn slot(entry: &Entry) -> Slot {
    entry.message_id.as_deref().unwrap().parse().unwrap()
}

/// All messages of a stream.
pub async fn all(client: &Client, stream: &'static str) -> Vec<Entry> {
    let mut entries = Vec::<Entry>::new();
    loop {
        let next = entries.last().map_or(0, |last| last.sequence) + 1;
        let mut more = history::read(client, stream, next, MAX_BATCH).await.unwrap();
        if more.is_empty() {
            return entries;
        }
        entries.append(&mut more);
    }
}
