//! The outbox settles the slots that have begun, one after the other.
//!
//! To settle a slot, a replica draws for it, finds out which draw the stream keeps, and publishes
//! the product of that draw if it is due. Every replica does this for every slot, and retries until
//! it is acknowledged. It therefore does not matter which replica dies, or when (docs/adr/0001).

use std::future::Future;
use std::time::Duration;

use anyhow::bail;
use contract::{Draw, Message, Parity, Slot, subjects};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use runtime::Shutdown;
use runtime::history::Entry;
use runtime::jetstream::Ack;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tracing::{debug, error, info, warn};

use crate::clock::{Clock, Turn};

/// The most slots that wait: those of ten minutes, at two a second. Older ones are given up.
pub const CAPACITY: usize = 1200;
/// The pause between two attempts doubles from the first of these to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_millis(500);
/// How often to look for a stored draw, over about 3 s. If it is still missing, it was deleted.
const MAX_READS: u32 = 14;
/// The most slots that one log line reports as given up: those of a minute.
const REPORT: u64 = 120;

/// The generators and the streams, as the outbox and the clock use them.
pub trait World: Send + Sync {
    /// Requests a factor of this parity. Returns `None` if no generator gives one in time.
    fn factor(&self, parity: Parity, until: Instant) -> impl Future<Output = Option<u16>> + Send;

    /// Publishes once, with the slot as the message id, and waits for the acknowledgement.
    fn publish(
        &self,
        subject: &'static str,
        slot: Slot,
        payload: Vec<u8>,
    ) -> impl Future<Output = anyhow::Result<Ack>> + Send;

    /// The draws that were stored last, in the order of the stream. They must include the latest
    /// slot, even if many draws from an outage were stored after it.
    fn latest(&self) -> impl Future<Output = anyhow::Result<Vec<Entry>>> + Send;

    /// The first stored draw with this sequence or a greater one. Returns `None` if the answering
    /// replica of the stream does not have one yet.
    fn read(&self, sequence: u64) -> impl Future<Output = anyhow::Result<Option<Entry>>> + Send;
}

/// Settles slots.
pub struct Outbox<W> {
    id: String,
    clock: Clock,
    world: W,
    jitter: StdRng,
    /// Whether the last attempt failed.
    failing: bool,
}

impl<W: World> Outbox<W> {
    /// An outbox for the replica with this id. `seed` determines the jitter of the pauses.
    pub fn new(id: &str, clock: Clock, world: W, seed: u64) -> Self {
        let (id, jitter) = (id.to_owned(), StdRng::seed_from_u64(seed));
        Self { id, clock, world, jitter, failing: false }
    }

    /// Settles the slots in their order, until `turns` ends or the deadline of the shutdown. Calls
    /// `settled` with the draw that the stream keeps and the time that the slot took.
    ///
    /// # Errors
    /// The last slots, if they had to be given up.
    pub async fn run(
        mut self,
        mut turns: mpsc::Receiver<Turn>,
        settled: impl Fn(&Draw, Duration) + Send,
        shutdown: Shutdown,
    ) -> Result<(), String> {
        // The slots that were given up and not yet reported: the first, the last, and how many.
        let mut given_up = None;
        while let Some(turn) = turns.recv().await {
            let begun = Instant::now();
            let mut tick = Tick::new(turn.slot, &self.id);
            let is_settled = tokio::select! {
                biased;
                () = shutdown.is_over() => false,
                is_settled = self.settle(&turn, &mut tick) => is_settled,
            };
            if is_settled {
                debug!(draw = ?tick.draw, "settled");
                settled(&tick.draw, begun.elapsed());
            } else {
                let (first, _, slots) = given_up.unwrap_or((turn.slot, turn.slot, 0));
                given_up = Some((first, turn.slot, slots + 1));
            }
            // Those of the shutdown are the last ones, and are reported together.
            let is_due = |slots| is_settled || slots >= REPORT && !shutdown.has_begun();
            if let Some(slots) = given_up.take_if(|(_, _, slots)| is_due(*slots)) {
                error!("{}", describe(slots));
            }
        }
        given_up.map_or(Ok(()), |slots| Err(describe(slots)))
    }

    /// Retries until the slot has a draw, and its product, if due, is in the history. Returns
    /// `false` if the slot became too old.
    async fn settle(&mut self, turn: &Turn, tick: &mut Tick) -> bool {
        let slot = turn.slot;
        let mut pause = FIRST_PAUSE;
        while !self.clock.is_too_old(turn) {
            let Err(fault) = self.attempt(turn, tick).await else {
                if std::mem::take(&mut self.failing) {
                    info!(%slot, "slots are settled again");
                }
                return true;
            };
            let fault = format!("{fault:#}");
            // Many faults pass within milliseconds: another replica is storing the same message, or
            // the replica of the stream that answers is behind.
            if pause < LAST_PAUSE || std::mem::replace(&mut self.failing, true) {
                debug!(%slot, %fault, "not settled yet");
            } else {
                warn!(%slot, %fault, "not settled yet; retrying for up to 9.5 minutes");
            }
            sleep(pause.mul_f64(self.jitter.random_range(0.5..=1.0))).await;
            pause = LAST_PAUSE.min(pause * 2);
        }
        false
    }

    async fn attempt(&self, turn: &Turn, tick: &mut Tick) -> anyhow::Result<()> {
        if !tick.is_stored {
            let draw = &mut tick.draw;
            // A draw without both factors must not be stored before the complete draw of another
            // replica. Each attempt therefore waits for the generators as long as it may.
            if draw.product().is_none() {
                let until = self.clock.budget(turn);
                let factor = |parity| self.world.factor(parity, until);
                (draw.even, draw.odd) = tokio::join!(factor(Parity::Even), factor(Parity::Odd));
            }
            let ack = self.world.publish(subjects::DRAW, turn.slot, draw.encode()).await?;
            if ack.duplicate {
                self.read(ack.sequence, tick).await?;
            }
            tick.is_stored = true;
        }
        if let Some(product) = tick.draw.due() {
            self.world.publish(subjects::PUBLISH, turn.slot, product.encode()).await?;
        }
        Ok(())
    }

    /// Replaces the draw by the one that the stream keeps at this sequence. If that is not a valid
    /// draw of the slot, the slot ends without factors. No multiplier writes such a message.
    async fn read(&self, sequence: u64, tick: &mut Tick) -> anyhow::Result<()> {
        let slot = tick.draw.slot;
        let entry = self.world.read(sequence).await?;
        tick.reads += u32::from(entry.is_none());
        if entry.is_none() && tick.reads < MAX_READS {
            bail!("the draw at sequence {sequence} of TICKS cannot be read yet");
        }
        let found = entry.filter(|entry| entry.sequence == sequence);
        let wrong = match found.map(|entry| Draw::decode(&entry.payload)) {
            Some(Ok(stored)) if stored.slot == slot => {
                tick.draw = stored;
                return Ok(());
            }
            Some(Ok(stored)) => format!("it belongs to slot {}", stored.slot),
            Some(Err(error)) => error.to_string(),
            None => "it was deleted".to_owned(),
        };
        error!(%slot, sequence, "the draw that TICKS keeps cannot be used: {wrong}");
        tick.draw = Tick::new(slot, &self.id).draw;
        Ok(())
    }
}

fn describe((first, last, slots): (Slot, Slot, u64)) -> String {
    format!(
        "gave up on slots {first} to {last} ({slots} in all); their products are lost unless \
         another replica publishes them"
    )
}

/// The state of a slot while it is being settled.
struct Tick {
    /// This replica's draw. Once the stream has stored a draw for the slot, that one.
    draw: Draw,
    is_stored: bool,
    /// How many reads did not find the stored draw.
    reads: u32,
}

impl Tick {
    fn new(slot: Slot, id: &str) -> Self {
        let draw = Draw { slot, multiplier: id.to_owned(), even: None, odd: None };
        Self { draw, is_stored: false, reads: 0 }
    }
}
