//! Watching `ticks.done`.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::{Client, Subscriber};
use contract::{Message, Slot, TickDone, subjects};
use futures::StreamExt;

use crate::PATIENCE;

/// All records of ticks since it was made.
pub struct Ticks {
    records: Subscriber,
    seen: Vec<TickDone>,
}

impl Ticks {
    /// Starts to listen. What is ticked once this has returned is heard.
    pub async fn watch(client: &Client) -> Self {
        let records = client.subscribe(subjects::DONE).await.unwrap();
        client.flush().await.unwrap();
        Self { records, seen: Vec::new() }
    }

    /// The next record.
    pub async fn next(&mut self) -> TickDone {
        let message = tokio::time::timeout(PATIENCE, self.records.next())
            .await
            .expect("no tick for a long time")
            .expect("the connection was closed");
        let done = TickDone::decode(&message.payload).unwrap();
        self.seen.push(done.clone());
        done
    }

    /// The next `count` records.
    pub async fn take(&mut self, count: usize) -> Vec<TickDone> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            taken.push(self.next().await);
        }
        taken
    }

    /// Reads on until there is a record for which `condition` holds.
    pub async fn until(&mut self, condition: impl Fn(&TickDone) -> bool) -> TickDone {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            assert!(tokio::time::Instant::now() < deadline, "no such tick");
            let done = self.next().await;
            if condition(&done) {
                return done;
            }
        }
    }

    /// Everything that came by now, after the ticking has stopped.
    pub async fn all_so_far(&mut self) -> &[TickDone] {
        let quiet = Duration::from_millis(300);
        while let Ok(Some(message)) = tokio::time::timeout(quiet, self.records.next()).await {
            self.seen.push(TickDone::decode(&message.payload).unwrap());
        }
        &self.seen
    }

    /// Everything seen so far.
    #[must_use]
    pub fn seen(&self) -> &[TickDone] {
        &self.seen
    }

    /// The slots between the first and the last one seen that were not ticked exactly once, and
    /// how often each of them was.
    #[must_use]
    pub fn irregular(&self) -> BTreeMap<Slot, usize> {
        let mut counts = BTreeMap::<Slot, usize>::new();
        for done in &self.seen {
            *counts.entry(done.slot).or_default() += 1;
        }
        let (Some((&first, _)), Some((&last, _))) =
            (counts.first_key_value(), counts.last_key_value())
        else {
            return BTreeMap::new();
        };
        (first.0..=last.0)
            .map(|slot| (Slot(slot), counts.get(&Slot(slot)).copied().unwrap_or(0)))
            .filter(|&(_, count)| count != 1)
            .collect()
    }
}
