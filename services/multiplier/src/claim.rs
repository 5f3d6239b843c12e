//! Which replica does the tick of a slot.
//!
//! A claim is a publication with the slot as its message id: the stream stores one for each slot,
//! and whose that is does the tick, and says so on `ticks.taking`. Whoever has no answer after a
//! while, because the stream has no leader or the broker is frozen, settles it with the others who
//! have none: each says on `ticks.taking` that it would take the slot, and of those that heard
//! each other the one with the smallest id does, unless they heard that the stream has given it to
//! somebody. A replica that hears nothing, not even itself, is cut off, and goes on only if another
//! broker answers it.

use std::time::{Duration, Instant};

use anyhow::Context;
use async_nats::{Client, Subscriber};
use contract::streams::TICKS;
use contract::{Claim, Message, Slot, subjects};
use futures::{FutureExt, StreamExt};
use runtime::jetstream::{self, Ack, PublishError};
use runtime::{connection, history};
use tracing::{debug, info, warn};

/// The most bids that are kept; a replica makes two at the most.
const MAX_BIDS: usize = 256;

/// One replica's side of the matter.
pub struct Claims {
    client: Client,
    id: String,
    taking: Subscriber,
    bids: Vec<Claim>,
    times: Times,
    /// Whether the last slot was settled by bids.
    by_bids: bool,
}

/// How long things may take, all in proportion to the slot.
#[derive(Clone, Copy)]
struct Times {
    /// 500 ms.
    slot: Duration,
    /// 100 ms: after that the replicas settle it themselves.
    patience: Duration,
    /// 40 ms: within that replicas hear each other's bids.
    bidding: Duration,
    /// 300 ms: a claim that is answered until then leaves time enough for the tick.
    last_chance: Duration,
}

impl Claims {
    /// For the replica with this id.
    ///
    /// # Errors
    /// If the connection was closed.
    pub async fn new(client: &Client, id: &str, slot: Duration) -> anyhow::Result<Self> {
        Ok(Self {
            taking: client.subscribe(subjects::TAKING).await?,
            client: client.clone(),
            id: id.to_owned(),
            bids: Vec::new(),
            by_bids: false,
            times: Times {
                slot,
                patience: slot / 5,
                bidding: slot * 2 / 25,
                last_chance: slot * 3 / 5,
            },
        })
    }

    /// Whether this replica is to do the tick of this slot, which began at that time.
    pub async fn take(&mut self, slot: Slot, begun: Instant) -> bool {
        if begun.elapsed() > self.times.last_chance {
            return false;
        }
        self.bids.retain(|bid| bid.slot >= slot);
        let claim = Claim { slot, multiplier: self.id.clone(), granted: false };
        // Whoever comes near the time of the bids, because it was stopped or not connected, may not have
        // heard them. It makes none of its own.
        let late = begun.elapsed();
        let in_time = late < self.times.patience / 2;
        let deadline = if in_time { self.times.patience } else { late + self.times.patience };
        let answer = publish(&self.client, &claim, deadline.saturating_sub(late)).await;
        self.hear_what_came(slot);
        let fault = match answer {
            Ok(Ack { duplicate: true, .. }) | Err(PublishError::InProcess) => {
                return self.settled(None, false);
            }
            Ok(_) if begun.elapsed() <= deadline && !self.has_bids(slot) => {
                self.bid(&Claim { granted: true, ..claim }).await;
                return self.settled(None, true);
            }
            // Others bid, or may have, and do not hear any more that this one has the slot.
            Ok(_) => "others had no answer in time".to_owned(),
            Err(error) => error.to_string(),
        };
        tokio::time::sleep(self.times.patience.saturating_sub(begun.elapsed())).await;
        self.hear_what_came(slot);
        if !in_time && !self.has_bids(slot) {
            debug!(%slot, fault, "left to others, if there are any");
            return false;
        }
        let mine = self.settle(&claim, begun).await;
        self.settled(Some(fault), mine)
    }

    /// Says when the stream ceases to answer, and when it answers again.
    fn settled(&mut self, fault: Option<String>, mine: bool) -> bool {
        match &fault {
            Some(fault) if !self.by_bids => warn!(
                "claims are not answered ({fault}); the replicas settle slots among themselves"
            ),
            None if self.by_bids => info!("claims are answered again"),
            _ => {}
        }
        self.by_bids = fault.is_some();
        mine
    }

    /// Settles a slot without `JetStream`, after it had time to answer.
    async fn settle(&mut self, claim: &Claim, begun: Instant) -> bool {
        let mut end = std::pin::pin!(tokio::time::sleep(self.times.bidding));
        // Whoever bid before this replica has the slot. To bid all the same would be to bid
        // against somebody who may have stopped listening.
        if !self.has_bids(claim.slot) {
            self.bid(claim).await;
            // The answer to the claim may be what got lost. What another one brings is said in the
            // first half of the time, so that everybody hears of it in the second.
            let half = self.times.bidding / 2;
            let again = claim_again(&self.client, claim, half);
            if let Ok(Ok(stored)) = tokio::time::timeout(half, again).await {
                self.bid(&Claim { granted: true, ..stored }).await;
            }
        }
        loop {
            tokio::select! {
                Some(message) = self.taking.next() => hear(&mut self.bids, claim.slot, &message.payload),
                () = &mut end => break,
            }
        }
        // Nothing heard, not even its own bid: this replica is cut off, or the broker stands still.
        // What can still come is the answer to a claim by way of another broker.
        if !self.has_bids(claim.slot) {
            let left = self.times.last_chance.saturating_sub(begun.elapsed());
            let elsewhere = async {
                connection::reconnect(&self.client).await;
                claim_again(&self.client, claim, left).await
            };
            let stored = tokio::time::timeout(left, elsewhere).await;
            return matches!(stored, Ok(Ok(stored)) if stored == *claim);
        }
        // A replica that was stopped in between has missed what the others said.
        if begun.elapsed() > self.times.slot {
            return false;
        }
        let bids = self.bids.iter().filter(|bid| bid.slot == claim.slot);
        let winner = bids.min_by_key(|bid| (!bid.granted, &bid.multiplier));
        debug!(slot = %claim.slot, ?winner, "settled by bids");
        winner.is_some_and(|bid| bid.multiplier == self.id)
    }

    fn has_bids(&self, slot: Slot) -> bool {
        self.bids.iter().any(|bid| bid.slot == slot)
    }

    async fn bid(&self, bid: &Claim) {
        if let Err(error) = self.client.publish(subjects::TAKING, bid.encode().into()).await {
            debug!(%error, "no bid");
        }
    }

    fn hear_what_came(&mut self, slot: Slot) {
        while let Some(Some(message)) = self.taking.next().now_or_never() {
            hear(&mut self.bids, slot, &message.payload);
        }
    }
}

/// Keeps a bid for this slot, or for the next one from a replica whose clock is a little ahead.
fn hear(bids: &mut Vec<Claim>, slot: Slot, payload: &[u8]) {
    match Claim::decode(payload) {
        Ok(bid) if (slot..=slot.next()).contains(&bid.slot) && bids.len() < MAX_BIDS => {
            bids.push(bid);
        }
        Ok(_) => {}
        Err(error) => warn!(subject = subjects::TAKING, %error, "not a bid"),
    }
}

async fn publish(client: &Client, claim: &Claim, timeout: Duration) -> Result<Ack, PublishError> {
    let body = claim.encode().into();
    jetstream::publish(client, subjects::CLAIM, claim.slot, body, timeout).await
}

/// Claims again, and returns the claim that the stream has.
async fn claim_again(client: &Client, claim: &Claim, timeout: Duration) -> anyhow::Result<Claim> {
    let ack = publish(client, claim, timeout).await?;
    if !ack.duplicate {
        return Ok(claim.clone());
    }
    let stored = history::read(client, TICKS, ack.sequence, 1).await?;
    let stored = stored.first().filter(|stored| stored.sequence == ack.sequence);
    Ok(Claim::decode(&stored.context("the claim that was stored is gone")?.payload)?)
}
