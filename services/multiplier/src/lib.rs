//! Service 3. In every slot of 500 ms each replica requests an even and an odd factor and offers
//! them to the stream of draws. The stream keeps the first draw of a slot. Its product is published
//! if it is greater than the threshold.
//!
//! `clock` begins slots, `factors` requests two factors, `outbox` settles a slot. This module
//! connects them. No replica leads: see docs/adr/0001-one-draw-a-slot.md.

pub mod clock;
mod factors;
pub mod outbox;

use std::future::ready;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::ensure;
use async_nats::Client;
use clap::Parser;
use contract::streams::TICKS;
use contract::{Draw, Parity, Slot, SlotLength, subjects};
use futures::StreamExt;
use runtime::connection::{self, NOT_CONNECTED};
use runtime::health::Health;
use runtime::history::{self, Entry, MAX_BATCH};
use runtime::jetstream::{self, Ack};
use runtime::micro::{self, Description};
use runtime::settings::CommonSettings;
use runtime::{Service, Shutdown};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::info;

use crate::clock::Clock;
use crate::outbox::{CAPACITY, Outbox, World};

const ABOUT: Description = Description {
    name: "multiplier",
    description: "multiplies an even and an odd number twice a second",
    subject: subjects::DONE,
    reserved: subjects::is_ours,
};

/// How long to wait for an acknowledgement before publishing again.
const ACK_TIMEOUT: Duration = Duration::from_millis(500);

/// Multiplies an even and an odd number twice a second, and publishes products above the threshold.
#[derive(Parser, Clone, Debug)]
#[command(name = "multiplier", version)]
pub struct Settings {
    #[command(flatten)]
    common: CommonSettings,

    /// The length of a slot in milliseconds; it must be the same for all replicas, and only tests
    /// change it
    #[arg(long, env = "EVENODD_SLOT_MS", value_name = "MS", default_value = "500", hide = true)]
    slot_ms: SlotLength,
}

impl Service for Settings {
    fn name(&self) -> &'static str {
        ABOUT.name
    }

    fn common(&self) -> &CommonSettings {
        &self.common
    }

    async fn run(self, client: Client, shutdown: Shutdown, health: Health) -> anyhow::Result<()> {
        let mut clock = Clock::new(self.slot_ms, unix_time);
        clock.health = health;
        run(client, clock, shutdown).await
    }
}

/// The time since the Unix epoch, by this machine's clock.
fn unix_time() -> Duration {
    // A clock before 1970 counts as 1970: no slot begins until it is set.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Runs one replica until the shutdown. It then settles the slots that have begun, until the
/// deadline.
///
/// # Errors
/// If the connection was closed, or slots were not settled by the deadline.
pub async fn run(client: Client, clock: Clock, shutdown: Shutdown) -> anyhow::Result<()> {
    let micro = micro::announce(&client, ABOUT).await?;
    // Messages without the headers of an entry were not republished by the server.
    let draws = client.subscribe(subjects::DONE).await?;
    let draws = draws.filter_map(|message| ready(Entry::try_from(message).ok()));
    let (queue, turns) = mpsc::channel(CAPACITY);
    // With slots of 500 ms, another request for a factor every 20 ms.
    let world = Nats { client, hedge_after: clock.length.duration() / 25 };
    let outbox = Outbox::new(&micro.id, clock.clone(), world.clone(), rand::random());
    let counters = micro.counters.clone();
    let settled = move |draw: &Draw, took| counters.count(took, draw.product().is_none());
    let outbox = outbox.run(turns, settled, shutdown.clone());
    let mut outbox = AbortOnDropHandle::new(tokio::spawn(outbox));
    info!(id = micro.id, "drawing for every slot");
    tokio::select! {
        _ = shutdown.begun() => {}
        never = clock.run(queue) => match never {},
        () = clock.follow(&world, draws, &micro.id) => anyhow::bail!("the connection to NATS was closed"),
        result = &mut outbox => return result?.map_err(anyhow::Error::msg),
    }
    outbox.await?.map_err(anyhow::Error::msg)
}

/// The generators and the streams, reached over NATS.
#[derive(Clone)]
struct Nats {
    client: Client,
    hedge_after: Duration,
}

impl World for Nats {
    async fn factor(&self, parity: Parity, until: Instant) -> Option<u16> {
        factors::get(&self.client, parity, until, self.hedge_after).await
    }

    async fn publish(
        &self,
        subject: &'static str,
        slot: Slot,
        payload: Vec<u8>,
    ) -> anyhow::Result<Ack> {
        // Without a connection the client would queue the message and send it late.
        ensure!(connection::is_connected(&self.client), NOT_CONNECTED);
        jetstream::publish(&self.client, subject, slot, payload.into(), ACK_TIMEOUT).await
    }

    async fn latest(&self) -> anyhow::Result<Vec<Entry>> {
        ensure!(connection::is_connected(&self.client), NOT_CONNECTED);
        let last = history::last(&self.client, TICKS).await?.map_or(1, |last| last.sequence);
        let from = last.saturating_sub(MAX_BATCH as u64 - 1);
        history::read(&self.client, TICKS, from, MAX_BATCH).await
    }

    async fn read(&self, sequence: u64) -> anyhow::Result<Option<Entry>> {
        Ok(history::read(&self.client, TICKS, sequence, 1).await?.into_iter().next())
    }
}
