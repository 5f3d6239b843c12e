//! The clock: it starts each slot once, and knows which slots are stored already.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use contract::streams::DUPLICATE_WINDOW;
use contract::{Draw, Message, Slot, SlotLength};
use futures::{Stream, StreamExt};
use runtime::history::Entry;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::warn;

use crate::outbox::World;

/// A slot is given up at this age: 30 s before the stream forgets its message id, so that neither a
/// publication under way nor [`TOLERANCE`] can make a retry a second message.
const MAX_AGE: Duration = DUPLICATE_WINDOW.saturating_sub(Duration::from_secs(30));
/// How far the clocks of two replicas may differ, and both still draw. Also how old the knowledge of
/// what is stored may be.
const TOLERANCE: Duration = Duration::from_secs(10);
/// A clock that differs more than this from the broker's is reported.
const OFFSET: Duration = Duration::from_secs(1);

/// One slot, from the moment in which it begins.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// The slot.
    pub slot: Slot,
    /// When it began, since the Unix epoch.
    pub began: Duration,
    /// When it ends.
    pub ends: Instant,
}

/// The time of this machine, and what the stored draws tell of it.
#[derive(Clone)]
pub struct Clock {
    /// How long a slot is.
    pub length: SlotLength,
    wall: Arc<dyn Fn() -> Duration + Send + Sync>,
    known: Arc<watch::Sender<Known>>,
}

/// What is known of the draws that are stored.
#[derive(Clone, Copy, Default)]
struct Known {
    /// The latest slot of them.
    latest: Slot,
    /// When that was heard, at the moment in which it was stored.
    live: Option<Instant>,
    /// When that was read.
    read: Option<Instant>,
    /// Whether this machine's clock was reported.
    is_off: bool,
}

fn is_recent(at: Option<Instant>) -> bool {
    at.is_some_and(|at| at.elapsed() < TOLERANCE)
}

impl Clock {
    /// `wall` gives the time since the Unix epoch.
    pub fn new(length: SlotLength, wall: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self { length, wall: Arc::new(wall), known: Arc::default() }
    }

    /// Starts one slot after the other, for ever.
    pub async fn run(&self, queue: mpsc::Sender<Turn>) -> Infallible {
        let mut last = self.length.slot_at((self.wall)());
        loop {
            let turn = self.next(last).await;
            last = turn.slot;
            // At two slots a second there is always room. The outbox ends later than this.
            let _ = queue.send(turn).await;
        }
    }

    /// Learns what is stored: from draws that are heard, until there are no more, and by reading
    /// while those tell nothing. `id` is that of this replica.
    pub async fn follow(
        &self,
        world: &impl World,
        mut heard: impl Stream<Item = Entry> + Unpin,
        id: &str,
    ) {
        let mut fault = None;
        loop {
            let pause = match world.latest().await {
                Ok(entries) => {
                    self.learn(&entries);
                    fault = None;
                    TOLERANCE / 3
                }
                Err(error) => {
                    let error = Some(error.to_string());
                    if error != fault {
                        warn!(error, "cannot read TICKS; no slot begins until it can be read");
                        fault = error;
                    }
                    TOLERANCE / 50
                }
            };
            let mut until = Instant::now() + pause;
            while let Ok(entry) = timeout_at(until, heard.next()).await {
                let Some(entry) = entry else { return };
                if self.hear(&entry, id) {
                    until = Instant::now() + TOLERANCE / 3;
                }
            }
        }
    }

    /// Waits for the slot after `last` to begin. A replica that was paused for a while, and with it
    /// perhaps all others of this machine, makes up for the slots of the last ten seconds. One whose
    /// clock is behind `last`, or behind what is stored, waits until it has caught up, and so does one
    /// that does not know what is stored: the stream may have forgotten the message ids of these slots,
    /// and would store them again.
    async fn next(&self, last: Slot) -> Turn {
        let mut told = false;
        loop {
            let Some(first) = self.first() else {
                sleep(self.length.duration() / 10).await;
                continue;
            };
            let first = first.max(last.next());
            let now = (self.wall)();
            let wait = self.length.start_of(first).saturating_sub(now);
            if wait.is_zero() {
                let slot = first.max(self.length.slot_at(now.saturating_sub(TOLERANCE)));
                let left = self.length.start_of(slot.next()).saturating_sub(now);
                let began = self.length.start_of(slot);
                return Turn { slot, began, ends: Instant::now() + left };
            }
            if wait > self.length.duration() + OFFSET && !told {
                warn!(%first, ?wait, "the clock is behind slots that are stored: waiting for it");
                told = true;
            }
            sleep(wait.min(TOLERANCE)).await;
        }
    }

    /// The first slot that may be drawn, if it is known what is stored. What was stored just now the
    /// stream remembers for long enough.
    fn first(&self) -> Option<Slot> {
        let Known { latest, live, read, .. } = *self.known.borrow();
        let next = self.length.start_of(latest.next());
        let first = if is_recent(live) { next.saturating_sub(TOLERANCE) } else { next };
        (is_recent(live) || is_recent(read)).then(|| self.length.slot_at(first))
    }

    /// Takes note of the draws that were stored last. What is read counts more than what was heard: where
    /// there are no keys, anybody may say anything on `ticks.done`.
    fn learn(&self, entries: &[Entry]) {
        let slot_of = |entry: &Entry| {
            let draw = Draw::decode(&entry.payload).ok()?;
            Some(self.credible(draw.slot, entry.since_epoch()))
        };
        let latest = entries.iter().filter_map(slot_of).max();
        self.known.send_modify(|known| {
            known.latest = latest.unwrap_or(known.latest);
            known.read = Some(Instant::now());
        });
    }

    /// The slot of a stored draw, or the broker's own slot if the draw's is far in the broker's future:
    /// one replica whose clock is far ahead must not stop the others.
    fn credible(&self, slot: Slot, stored: Duration) -> Slot {
        let is_near = self.length.start_of(slot) <= stored + TOLERANCE;
        if is_near { slot } else { self.length.slot_at(stored) }
    }

    /// Takes note of a draw in the moment in which it is stored. Reports this machine's clock, once,
    /// if the draw shows that it differs from the broker's; `id` is that of this replica. Returns whether
    /// the draw is of the latest slot.
    fn hear(&self, entry: &Entry, id: &str) -> bool {
        let Ok(draw) = Draw::decode(&entry.payload) else { return false };
        let (began, stored) = (self.length.start_of(draw.slot), entry.since_epoch());
        let own = draw.multiplier == id;
        // Either is certain, however late the draw is heard.
        let ahead = if own { began.saturating_sub(stored) } else { Duration::ZERO };
        let behind = stored.saturating_sub((self.wall)());
        let is_off = ahead.max(behind) > OFFSET;
        let slot = self.credible(draw.slot, stored);
        self.known.send_if_modified(|known| {
            if is_off && !known.is_off {
                warn!(?ahead, ?behind, "this clock differs from the broker's; is NTP running?");
            }
            known.is_off = is_off || known.is_off && !own;
            let is_latest = slot >= known.latest;
            if is_latest {
                (known.latest, known.live) = (slot, Some(Instant::now()));
            }
            is_latest
        })
    }

    /// Until when to ask generators: nine tenths of the slot, the rest is for the publications; and
    /// a fifth of a slot if that is over.
    #[must_use]
    pub fn budget(&self, turn: &Turn) -> Instant {
        let length = self.length.duration();
        (turn.ends - length / 10).max(Instant::now() + length / 5)
    }

    /// Whether a retry could store a second message. It goes by two clocks: this machine's may be
    /// set back, and tokio's does not count the time in which the machine is suspended.
    #[must_use]
    pub fn is_too_old(&self, turn: &Turn) -> bool {
        (self.wall)().saturating_sub(turn.began) >= MAX_AGE || turn.ends.elapsed() >= MAX_AGE
    }
}
