//! Service 3: in every slot of 500 ms one of the replicas asks for an even and an odd number,
//! multiplies them, and publishes the product if it is greater than the threshold.
//!
//! Here is the loop over the slots. `claim` decides which replica does the tick, `numbers`
//! gets the two numbers, `outbox` publishes. There is no leader and no lease: see
//! docs/adr/0001-slots-and-claims.md.

mod claim;
mod numbers;
mod outbox;

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_nats::Client;
use clap::Parser;
use contract::{Message, Outcome, Parity, Product, Slot, SlotLength, TickDone, subjects};
use runtime::health::HealthSettings;
use runtime::jetstream::{self, PublishError};
use runtime::micro::{self, Description, Micro};
use runtime::settings::CommonSettings;
use runtime::{Service, connection};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::claim::Claims;
use crate::outbox::{Due, Outbox};

const ABOUT: Description = Description {
    name: "multiplier",
    description: "multiplies an even and an odd number twice a second",
    version: env!("CARGO_PKG_VERSION"),
    subject: subjects::DONE,
};

/// How long the acknowledgement of a publication may take before it is sent again.
const ACK_TIMEOUT: Duration = Duration::from_millis(500);

/// How often to look at a clock that was set back.
const CLOCK_CHECK: Duration = Duration::from_secs(10);

/// Multiplies an even and an odd number twice a second, and publishes products above 100000.
#[derive(Parser, Clone, Debug)]
#[command(name = "multiplier", version)]
pub struct Settings {
    #[command(flatten)]
    common: CommonSettings,

    #[command(flatten)]
    health: HealthSettings,

    /// The length of a slot in milliseconds, the same for all replicas; only tests change it
    #[arg(long, env = "EVENODD_SLOT_MS", value_name = "MS", default_value = "500", hide = true)]
    slot_ms: SlotLength,
}

impl Service for Settings {
    fn common(&self) -> &CommonSettings {
        &self.common
    }

    fn health(&self) -> Option<(SocketAddr, &'static str)> {
        self.health.page()
    }

    async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let health = self.health.listen().await?;
        let client = connection::connect(&self.common.nats, ABOUT.name, ABOUT.name).await?;
        let micro = micro::announce(&client, ABOUT).await?;
        let claims = Claims::new(&client, &micro.id, self.slot_ms.duration()).await?;
        let publishing = client.clone();
        let (outbox, mut publisher) =
            Outbox::start(move |due| publish(publishing.clone(), due), unix_time);
        let waiting = outbox.waiting();
        info!(id = micro.id, "ticking");

        let flushing = client.clone();
        let ticker = Ticker { client, slot_length: self.slot_ms, micro, claims, outbox };
        let stopping = tokio::spawn({
            let shutdown = shutdown.clone();
            async move {
                shutdown.cancelled().await;
                Instant::now()
            }
        });
        tokio::select! {
            () = ticker.run(&shutdown) => {}
            never = health.serve(flushing.clone()) => match never {},
            // The outbox ends after the ticker, unless it has failed.
            result = &mut publisher => return Ok(result?),
        }
        // A little less than the whole: what is not published is then told with its number.
        let drain = self.common.drain_ms.mul_f64(0.9);
        let left = drain.saturating_sub(stopping.await?.elapsed());
        match tokio::time::timeout(left, publisher).await {
            Ok(ended) => ended?,
            Err(_) => anyhow::bail!(
                "{} products were due, and NATS did not take them within {} ms: they are lost",
                waiting.load(Ordering::Relaxed),
                drain.as_millis()
            ),
        }
        connection::flush(&flushing).await;
        Ok(())
    }
}

/// One attempt to publish.
async fn publish(client: Client, due: Due) -> Result<jetstream::Ack, PublishError> {
    // What is sent without a connection would wait in the client and come out late.
    if !connection::is_connected(&client) {
        return Err(PublishError::Failed("not connected to NATS".to_owned()));
    }
    let body = due.product.encode().into();
    jetstream::publish(&client, subjects::PUBLISHED, due.slot, body, ACK_TIMEOUT).await
}

/// The time since the Unix epoch, by this machine's clock.
fn unix_time() -> Duration {
    // Before 1970 there are no slots; a clock that says so is as good as one that stands still.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The loop over the slots.
struct Ticker {
    client: Client,
    slot_length: SlotLength,
    micro: Micro,
    claims: Claims,
    outbox: Outbox,
}

impl Ticker {
    async fn run(mut self, shutdown: &CancellationToken) {
        let mut slot = self.slot_length.slot_at(unix_time());
        loop {
            tokio::select! {
                next = self.next_slot(slot) => slot = next,
                () = shutdown.cancelled() => return,
            }
            // Without a connection there is nothing to claim, and nobody to ask. A broker that
            // is restarted may be back before the slot is over.
            let patience = self.slot_length.duration() / 2;
            if connection::wait_until_connected(&self.client, patience).await
                && self.claims.take(slot, self.begin_of(slot)).await
            {
                self.tick(slot).await;
            }
        }
    }

    /// Sleeps until a later slot than `last` begins, and says which. A replica that was stopped for
    /// a while goes on with the slot of this moment; one whose clock was set back waits, because
    /// the slots that come again were ticked.
    async fn next_slot(&self, last: Slot) -> Slot {
        loop {
            let now = unix_time();
            let current = self.slot_length.slot_at(now);
            if current > last {
                return current;
            }
            if current.next() < last {
                warn!(slot = %current, ticked = %last, "the clock was set back: waiting for it");
                tokio::time::sleep(CLOCK_CHECK).await;
                continue;
            }
            let next = self.slot_length.start_of(last.next());
            tokio::time::sleep(next.saturating_sub(now)).await;
        }
    }

    /// When a slot began, by this machine's clock.
    fn begin_of(&self, slot: Slot) -> Instant {
        let ago = unix_time().saturating_sub(self.slot_length.start_of(slot));
        Instant::now().checked_sub(ago).unwrap_or_else(Instant::now)
    }

    async fn tick(&self, slot: Slot) {
        let begun = Instant::now();
        let length = self.slot_length.duration();
        // A new request every 20 ms, until nine tenths of the slot are over. The rest is for the
        // publication.
        let budget = (length * 9 / 10).saturating_sub(self.begin_of(slot).elapsed());
        let get = |parity| numbers::get(&self.client, parity, budget, length / 25);
        let (even, odd) = tokio::join!(get(Parity::Even), get(Parity::Odd));
        let product = match (even, odd) {
            (Some(even), Some(odd)) => Product::new(even.into(), odd.into()).ok(),
            _ => None,
        };
        let outcome = match product {
            Some(product) if product.is_above_threshold() => self.publish(slot, product).await,
            Some(_) => Outcome::BelowThreshold,
            None if even.is_some() => Outcome::NoOdd,
            None if odd.is_some() => Outcome::NoEven,
            None => Outcome::NoNumbers,
        };
        let failed = product.is_none();
        self.micro.counters.count(begun.elapsed(), failed);
        let done = TickDone {
            slot,
            multiplier: self.micro.id.clone(),
            even,
            odd,
            product: product.map(Product::number),
            outcome,
        };
        debug!(?done, "tick");
        if let Err(error) = self.client.publish(subjects::DONE, done.encode().into()).await {
            debug!(%error, "the record of the tick could not be sent");
        }
    }

    /// Hands a product to the outbox, and waits for the outcome while the slot lasts.
    async fn publish(&self, slot: Slot, product: Product) -> Outcome {
        let since = self.slot_length.start_of(slot);
        let receipt =
            self.outbox.push(Due { slot, product, since, pushed: tokio::time::Instant::now() });
        let end = self.slot_length.start_of(slot.next());
        let left = end.saturating_sub(unix_time() + self.slot_length.duration() / 20);
        match tokio::time::timeout(left, receipt).await {
            Ok(Ok(outcome)) => outcome,
            _ => Outcome::Pending,
        }
    }
}
