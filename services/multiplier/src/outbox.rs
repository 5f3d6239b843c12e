//! The outbox: slots that have begun, settled one after the other.
//!
//! To settle a slot is to draw for it, to find out whose draw the stream keeps, and to publish that
//! draw's product if it is due. Every replica does so for every slot, and repeats what fails until
//! it is acknowledged. So it does not matter which replica dies when (docs/adr/0001).

use std::future::Future;
use std::time::Duration;

use contract::{Draw, Message, Parity, Slot, subjects};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use runtime::history::{Entry, ReadError};
use runtime::jetstream::{Ack, PublishError};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::clock::{Clock, Turn};

/// The most slots that wait: at two a second what begins in ten minutes. Older ones are given up.
pub const CAPACITY: usize = 1200;
/// Pauses between two attempts, doubling from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// What the outbox needs of the world.
pub trait World: Send + Sync {
    /// A number of this parity, if a generator gives one in time.
    fn number(&self, parity: Parity, until: Instant) -> impl Future<Output = Option<u16>> + Send;

    /// Publishes with the slot as the message id, once, and waits for the acknowledgement.
    fn publish(
        &self,
        subject: &'static str,
        slot: Slot,
        payload: Vec<u8>,
    ) -> impl Future<Output = Result<Ack, PublishError>> + Send;

    /// The first stored draw with this sequence or a greater one, as far as the replica of the
    /// stream that answers has it.
    fn read(&self, sequence: u64) -> impl Future<Output = Result<Option<Entry>, ReadError>> + Send;
}

/// Why an attempt to settle a slot failed.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the draw at sequence {0} of TICKS cannot be read yet")]
    NotYet(u64),
}

/// Settles slots.
pub struct Outbox<W> {
    id: String,
    clock: Clock,
    world: W,
    stop: CancellationToken,
    jitter: StdRng,
    /// Whether the last attempt failed.
    failing: bool,
    /// The first and the last of the slots that were given up since one was settled, and how many.
    given_up: Option<(Slot, Slot, u64)>,
}

impl<W: World> Outbox<W> {
    /// For the replica with this id. After `stop` it finishes what may be due, and no more. `seed`
    /// decides the length of pauses.
    pub fn new(id: &str, clock: Clock, world: W, stop: CancellationToken, seed: u64) -> Self {
        let (id, jitter) = (id.to_owned(), StdRng::seed_from_u64(seed));
        Self { id, clock, world, stop, jitter, failing: false, given_up: None }
    }

    /// Settles what comes, in its order, and tells `settled` which draw the stream keeps and how
    /// long that took.
    pub async fn run(
        mut self,
        mut turns: mpsc::Receiver<Turn>,
        settled: impl Fn(&Draw, Duration) + Send,
    ) {
        while let Some(turn) = turns.recv().await
            && !self.stop.is_cancelled()
        {
            let begun = Instant::now();
            match self.settle(&turn).await {
                Some(draw) => {
                    self.tell_given_up();
                    debug!(?draw, "settled");
                    settled(&draw, begun.elapsed());
                }
                None => {
                    let (first, _, slots) = self.given_up.unwrap_or((turn.slot, turn.slot, 0));
                    self.given_up = Some((first, turn.slot, slots + 1));
                }
            }
        }
        self.tell_given_up();
    }

    /// The draw of the slot, once its product is in the history if it is due there; `None` if the
    /// slot became too old, or if nothing is due and this replica stops.
    async fn settle(&mut self, turn: &Turn) -> Option<Draw> {
        let (slot, multiplier) = (turn.slot, self.id.clone());
        let mut draw = Draw { slot, multiplier, even: None, odd: None };
        let mut is_stored = false;
        let mut pause = FIRST_PAUSE;
        while !self.clock.is_too_old(turn) {
            if self.stop.is_cancelled() && draw.due().is_none() {
                return None;
            }
            match self.attempt(turn, &mut draw, &mut is_stored).await {
                Ok(()) => {
                    if std::mem::take(&mut self.failing) {
                        info!(%slot, "slots are settled again");
                    }
                    return Some(draw);
                }
                // Both are a matter of milliseconds.
                Err(Fault::Publish(PublishError::InProcess) | Fault::NotYet(_)) => {}
                Err(fault) if !std::mem::replace(&mut self.failing, true) => {
                    warn!(%slot, %fault, "not settled yet; retrying for nine and a half minutes");
                }
                Err(fault) => debug!(%slot, %fault, "not settled yet"),
            }
            sleep(pause.mul_f64(self.jitter.random_range(0.5..=1.0))).await;
            pause = LAST_PAUSE.min(pause * 2);
        }
        None
    }

    /// `draw` is this replica's until the stream has stored one for the slot, and then that one.
    async fn attempt(
        &self,
        turn: &Turn,
        draw: &mut Draw,
        is_stored: &mut bool,
    ) -> Result<(), Fault> {
        if !*is_stored {
            // Without numbers it waits for generators as long as it may, and again at each attempt:
            // it must not come before the draw of a replica that has numbers.
            if draw.product().is_none() {
                let until = self.clock.budget(turn);
                let number = |parity| self.world.number(parity, until);
                (draw.even, draw.odd) = tokio::join!(number(Parity::Even), number(Parity::Odd));
            }
            let ack = self.world.publish(subjects::DRAW, turn.slot, draw.encode()).await?;
            if ack.duplicate {
                self.read(ack.sequence, draw).await?;
            }
            *is_stored = true;
        }
        if let Some(product) = draw.due() {
            self.world.publish(subjects::PUBLISH, turn.slot, product.encode()).await?;
        }
        Ok(())
    }

    /// Replaces a draw by the one that the stream has at this sequence. If that is not a valid draw
    /// of the slot, which no multiplier writes, the slot has no numbers.
    async fn read(&self, sequence: u64, draw: &mut Draw) -> Result<(), Fault> {
        let entry = self.world.read(sequence).await?.ok_or(Fault::NotYet(sequence))?;
        let slot = draw.slot;
        let wrong = match Draw::decode(&entry.payload) {
            _ if entry.sequence != sequence => "it was deleted".to_owned(),
            Ok(stored) if stored.slot != slot => format!("it is of slot {}", stored.slot),
            Ok(stored) => {
                *draw = stored;
                return Ok(());
            }
            Err(error) => error.to_string(),
        };
        error!(%slot, sequence, "the draw that TICKS keeps cannot be used: {wrong}");
        (draw.even, draw.odd) = (None, None);
        Ok(())
    }

    fn tell_given_up(&mut self) {
        if let Some((first, last, slots)) = self.given_up.take() {
            warn!(%first, %last, slots, "gave slots up; the other replicas have settled them, if any could");
        }
    }
}
