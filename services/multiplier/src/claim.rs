//! Which replica does the tick of a slot.
//!
//! A claim is a publication with the slot as its message id: the stream stores one for each slot,
//! and whose that is does the tick. While the stream does not answer, because it has no leader or
//! the broker is frozen, the replicas settle it among themselves: each says on `ticks.taking`
//! that it would take the slot, and of those that heard each other the one with the smallest id
//! does. A replica that does not hear its own bid is cut off, and leaves the slot alone.

use std::time::Duration;

use async_nats::{Client, Subscriber};
use contract::streams::TICKS;
use contract::{Claim, Slot, subjects};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use runtime::history;
use runtime::jetstream::{self, Ack, PublishError};
use tracing::{debug, warn};

/// The most bids that are kept; there are as many as replicas.
const MAX_BIDS: usize = 64;

/// One replica's side of the matter.
pub struct Claims {
    client: Client,
    id: String,
    taking: Subscriber,
    bids: Vec<Claim>,
    times: Times,
}

/// How long things may take, all in proportion to the slot.
#[derive(Clone, Copy)]
struct Times {
    /// 500 ms: no answer to a claim counts after that.
    slot: Duration,
    /// 100 ms: after that the replicas settle it themselves.
    patience: Duration,
    /// 40 ms: within that replicas hear each other's bids.
    bidding: Duration,
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
            times: Times {
                slot,
                patience: slot / 5,
                bidding: slot * 2 / 25,
            },
        })
    }

    /// Whether this replica is to do the tick of this slot.
    pub async fn take(&mut self, slot: Slot) -> bool {
        self.hear_what_came();
        self.bids.retain(|bid| bid.slot >= slot);
        let claim = Claim {
            slot,
            multiplier: self.id.clone(),
        };
        let (client, times) = (self.client.clone(), self.times);
        let mut verdicts = FuturesUnordered::from_iter([
            first_claim(&client, &claim, times).boxed(),
            second_claim(&client, &claim, times).boxed(),
        ]);
        let verdict = async {
            while let Some(verdict) = verdicts.next().await {
                if let Some(mine) = verdict {
                    return mine;
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            biased;
            mine = verdict => mine,
            mine = self.settle(&claim) => mine,
        }
    }

    /// Settles a slot without `JetStream`, after it had time to answer.
    async fn settle(&mut self, claim: &Claim) -> bool {
        tokio::time::sleep(self.times.patience).await;
        self.hear_what_came();
        if self.bids.iter().any(|bid| bid.slot == claim.slot) {
            return false;
        }
        let bid = claim.encode().into();
        if let Err(error) = self.client.publish(subjects::TAKING, bid).await {
            debug!(%error, "no bid");
            return false;
        }
        let mut end = std::pin::pin!(tokio::time::sleep(self.times.bidding));
        loop {
            tokio::select! {
                Some(message) = self.taking.next() => hear(&mut self.bids, &message.payload),
                () = &mut end => break,
            }
        }
        let bids = self.bids.iter().filter(|bid| bid.slot == claim.slot);
        let winner = bids.map(|bid| &bid.multiplier).min();
        debug!(slot = %claim.slot, ?winner, "settled without JetStream");
        winner == Some(&self.id)
    }

    fn hear_what_came(&mut self) {
        while let Some(Some(message)) = self.taking.next().now_or_never() {
            hear(&mut self.bids, &message.payload);
        }
    }
}

fn hear(bids: &mut Vec<Claim>, payload: &[u8]) {
    match Claim::decode(payload) {
        Ok(bid) if bids.len() < MAX_BIDS => bids.push(bid),
        Ok(_) => {}
        Err(error) => warn!(subject = subjects::TAKING, %error, "not a bid"),
    }
}

async fn publish(client: &Client, claim: &Claim, timeout: Duration) -> Result<Ack, PublishError> {
    let body = claim.encode().into();
    jetstream::publish(client, subjects::CLAIM, claim.slot, body, timeout).await
}

/// Whether the slot is this replica's; `None` if the stream did not say.
async fn first_claim(client: &Client, claim: &Claim, times: Times) -> Option<bool> {
    match publish(client, claim, times.slot).await {
        Ok(ack) => Some(!ack.duplicate),
        Err(PublishError::InProcess) => Some(false),
        Err(error) => {
            debug!(slot = %claim.slot, %error, "claim");
            None
        }
    }
}

/// The answer to the first claim may be what got lost: asks again a little later, and on
/// `duplicate` looks whose claim it is that was stored.
async fn second_claim(client: &Client, claim: &Claim, times: Times) -> Option<bool> {
    tokio::time::sleep(times.patience).await;
    let ack = publish(client, claim, times.slot).await.ok()?;
    if !ack.duplicate {
        return Some(true);
    }
    let stored = history::read(client, TICKS, ack.sequence, 1).await.ok()?;
    let owner = stored
        .first()
        .filter(|entry| entry.sequence == ack.sequence)?;
    let owner = Claim::decode(&owner.payload).ok()?;
    Some(owner == *claim)
}
