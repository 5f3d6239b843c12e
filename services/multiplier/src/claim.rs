//! Which replica does the tick of a slot.
//!
//! A claim is a publication with the slot as its message id: the stream stores one for each slot,
//! and whose that is does the tick. While the stream does not answer, because it has no leader or
//! the broker is frozen, the replicas settle it among themselves: each says on `ticks.taking`
//! that it would take the slot, and of those that heard each other the one with the smallest id
//! does. A replica that hears no bid, not even its own, is cut off, and goes on only if its claim
//! is answered after all.

use std::time::{Duration, Instant};

use async_nats::{Client, Subscriber};
use contract::streams::TICKS;
use contract::{Claim, Message, Slot, subjects};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use runtime::jetstream::{self, Ack, PublishError};
use runtime::{connection, history};
use tracing::{debug, info, warn};

/// The most bids that are kept; there are as many as replicas.
const MAX_BIDS: usize = 64;

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

    /// Whether this replica is to do the tick of this slot.
    pub async fn take(&mut self, slot: Slot) -> bool {
        let claim = Claim { slot, multiplier: self.id.clone() };
        let (client, times) = (self.client.clone(), self.times);
        let mut verdicts = FuturesUnordered::from_iter([
            first_claim(&client, &claim, times).boxed(),
            async {
                tokio::time::sleep(times.patience).await;
                claim_again(&client, &claim, times).await
            }
            .boxed(),
        ]);
        let mut fault = "no answer".to_owned();
        let verdict = async {
            while let Some(verdict) = verdicts.next().await {
                match verdict {
                    Ok(mine) => return mine,
                    Err(error) => fault = error,
                }
            }
            std::future::pending().await
        };
        let (mine, by_bids) = tokio::select! {
            biased;
            mine = verdict => (mine, false),
            mine = self.settle(&claim) => (mine, true),
        };
        if by_bids && !self.by_bids {
            warn!("claims are not answered ({fault}); the replicas settle slots among themselves");
        } else if self.by_bids && !by_bids {
            info!("claims are answered again");
        }
        self.by_bids = by_bids;
        mine
    }

    /// Settles a slot without `JetStream`, after it had time to answer.
    async fn settle(&mut self, claim: &Claim) -> bool {
        let begun = Instant::now();
        self.bids.retain(|bid| bid.slot >= claim.slot);
        self.hear_what_came(claim.slot);
        tokio::time::sleep(self.times.patience).await;
        self.hear_what_came(claim.slot);
        // Whoever bid before this replica has the slot. To bid all the same would be to bid
        // against somebody who may have stopped listening.
        let late = self.bids.iter().any(|bid| bid.slot == claim.slot);
        if !late {
            let bid = claim.encode().into();
            if let Err(error) = self.client.publish(subjects::TAKING, bid).await {
                debug!(%error, "no bid");
            }
        }
        // Also without a bid of its own: the stream may still give it the slot.
        let mut end = std::pin::pin!(tokio::time::sleep(self.times.bidding));
        loop {
            tokio::select! {
                Some(message) = self.taking.next() => hear(&mut self.bids, claim.slot, &message.payload),
                () = &mut end => break,
            }
        }
        // Nothing heard, not even its own bid: this replica is cut off, or the broker stands still.
        // What can still come is the answer to the claim, or to one by way of another broker.
        if !self.bids.iter().any(|bid| bid.slot == claim.slot) {
            let left = self.times.last_chance.saturating_sub(begun.elapsed());
            let elsewhere = async {
                connection::reconnect(&self.client).await;
                match claim_again(&self.client, claim, self.times).await {
                    Ok(mine) => mine,
                    Err(_) => std::future::pending().await,
                }
            };
            return tokio::time::timeout(left, elsewhere).await.unwrap_or(false);
        }
        // A replica that was stopped in between has missed what the others said.
        if begun.elapsed() > self.times.slot {
            return false;
        }
        let bids = self.bids.iter().filter(|bid| bid.slot == claim.slot);
        let winner = bids.map(|bid| &bid.multiplier).min();
        debug!(slot = %claim.slot, ?winner, "settled by bids");
        winner == Some(&self.id)
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

/// Whether the slot is this replica's, or why the stream did not say.
async fn first_claim(client: &Client, claim: &Claim, times: Times) -> Result<bool, String> {
    match publish(client, claim, times.slot).await {
        Ok(ack) => Ok(!ack.duplicate),
        Err(PublishError::InProcess) => Ok(false),
        Err(error) => Err(error.to_string()),
    }
}

/// The answer to the first claim may be what got lost: asks again, and on `duplicate` looks whose
/// claim it is that was stored.
async fn claim_again(client: &Client, claim: &Claim, times: Times) -> Result<bool, String> {
    let ack = publish(client, claim, times.slot).await.map_err(|error| error.to_string())?;
    if !ack.duplicate {
        return Ok(true);
    }
    let stored =
        history::read(client, TICKS, ack.sequence, 1).await.map_err(|error| error.to_string())?;
    match stored.first() {
        Some(entry) if entry.sequence == ack.sequence => match Claim::decode(&entry.payload) {
            Ok(owner) => Ok(owner == *claim),
            Err(error) => Err(error.to_string()),
        },
        _ => Err("the claim that was stored is gone".to_owned()),
    }
}
