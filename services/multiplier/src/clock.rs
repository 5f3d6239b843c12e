//! The clock begins each slot once, and tracks which slots already have a stored draw.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use contract::streams::DUPLICATE_WINDOW;
use contract::{Draw, Message, Slot, SlotLength};
use futures::{Stream, StreamExt};
use runtime::connection::NOT_CONNECTED;
use runtime::health::Health;
use runtime::history::Entry;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::warn;

use crate::outbox::World;

/// A multiplier gives up a slot at this age, 30 s before the stream forgets its message id. The
/// margin covers [`TOLERANCE`] and publications that are still under way. Without it the stream
/// could store a retry as a second message.
const MAX_AGE: Duration = DUPLICATE_WINDOW.saturating_sub(Duration::from_secs(30));
/// How far the clocks of two replicas may differ while both still draw. Also the maximum age of
/// what a replica knows about the stored draws.
const TOLERANCE: Duration = Duration::from_secs(10);
/// Why no slot begins.
const BEHIND: &str = "the clock is behind slots that are stored";
const UNKNOWN: &str = "it is not known which slots TICKS holds";
/// A multiplier logs a warning if its clock differs from the broker's by more than this.
const OFFSET: Duration = Duration::from_secs(1);

/// A slot that has begun.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// The slot.
    pub slot: Slot,
    /// When it ends.
    pub ends: Instant,
}

/// The time of this machine, and what is known about the stored draws.
#[derive(Clone)]
pub struct Clock {
    /// How long a slot is.
    pub length: SlotLength,
    /// Why no slot begins at this moment, although one should.
    pub health: Health,
    wall: Arc<dyn Fn() -> Duration + Send + Sync>,
    known: Arc<watch::Sender<Known>>,
}

/// What is known about the stored draws.
#[derive(Clone, Copy, Default)]
struct Known {
    /// The latest slot that has a stored draw.
    latest: Slot,
    /// When a draw of the latest slot was last heard on `ticks.done`.
    live: Option<Instant>,
    /// When the stream was last read.
    read: Option<Instant>,
    /// Whether a warning about this machine's clock was logged.
    is_off: bool,
}

fn is_recent(at: Option<Instant>) -> bool {
    at.is_some_and(|at| at.elapsed() < TOLERANCE)
}

impl Clock {
    /// `wall` returns the time since the Unix epoch.
    pub fn new(length: SlotLength, wall: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self { length, health: Health::default(), wall: Arc::new(wall), known: Arc::default() }
    }

    /// Begins slot after slot, for ever.
    pub async fn run(&self, queue: mpsc::Sender<Turn>) -> Infallible {
        let mut last = self.length.slot_at((self.wall)());
        loop {
            let turn = self.next(last).await;
            last = turn.slot;
            // The queue holds the slots of ten minutes, and the outbox gives up older ones: there
            // is always room. The outbox outlives this loop.
            let _ = queue.send(turn).await;
        }
    }

    /// Learns which slots are stored: from the draws in `heard`, and by reading the stream while
    /// those say nothing new. Returns when `heard` ends. `id` is the id of this replica.
    pub async fn follow(
        &self,
        world: &impl World,
        mut heard: impl Stream<Item = Entry> + Unpin,
        id: &str,
    ) {
        // The failure that was logged last. The connection itself logs that there is none.
        let mut fault = NOT_CONNECTED.to_owned();
        loop {
            let pause = match world.latest().await {
                Ok(entries) => {
                    self.learn(&entries);
                    NOT_CONNECTED.clone_into(&mut fault);
                    TOLERANCE / 3
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    if error != fault {
                        warn!(error, "cannot read TICKS; retrying, but no slot begins after 10 s");
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

    /// Waits until the slot after `last` begins. After a pause of the process, or of the whole
    /// machine, this makes up for the slots of the last ten seconds.
    ///
    /// A replica must not draw a slot again after the stream has forgotten its message id. It
    /// therefore waits while its clock is behind `last`, while its clock is behind the stored
    /// draws, and while it does not know what is stored.
    async fn next(&self, last: Slot) -> Turn {
        loop {
            let Some(first) = self.first() else {
                self.set_health(Some(UNKNOWN));
                sleep(self.length.duration() / 10).await;
                continue;
            };
            let first = first.max(last.next());
            let now = (self.wall)();
            let wait = self.length.start_of(first).saturating_sub(now);
            if wait.is_zero() {
                self.set_health(None);
                let slot = first.max(self.length.slot_at(now.saturating_sub(TOLERANCE)));
                let left = self.length.start_of(slot.next()).saturating_sub(now);
                return Turn { slot, ends: Instant::now() + left };
            }
            let is_behind = wait > self.length.duration() + OFFSET;
            if self.set_health(is_behind.then_some(BEHIND)) && is_behind {
                warn!(%first, ?wait, "{BEHIND}; waiting until it has passed them");
            }
            sleep(wait.min(TOLERANCE / 10)).await;
        }
    }

    /// Returns whether this is new.
    fn set_health(&self, health: Option<&'static str>) -> bool {
        self.health.send_if_modified(|current| std::mem::replace(current, health) != health)
    }

    /// The first slot that this replica may draw, or `None` if it does not know what is stored.
    /// While draws are heard live, this may be up to [`TOLERANCE`] before the latest slot: the
    /// stream still remembers the message ids of these slots.
    fn first(&self) -> Option<Slot> {
        let Known { latest, live, read, .. } = *self.known.borrow();
        let next = self.length.start_of(latest.next());
        let first = if is_recent(live) { next.saturating_sub(TOLERANCE) } else { next };
        (is_recent(live) || is_recent(read)).then(|| self.length.slot_at(first))
    }

    /// Takes note of the draws that were stored last. They override what was heard: on a broker
    /// without keys, any client can publish to `ticks.done`.
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

    /// The slot of a stored draw. If it is far in the broker's future, the broker's own slot
    /// instead: a replica whose clock is far ahead must not stop the others.
    fn credible(&self, slot: Slot, stored: Duration) -> Slot {
        let is_near = self.length.start_of(slot) <= stored + TOLERANCE;
        if is_near { slot } else { self.length.slot_at(stored) }
    }

    /// Takes note of a draw that was just stored, and returns whether it belongs to the latest
    /// slot. Logs one warning if the draw shows that this machine's clock differs from the
    /// broker's. `id` is the id of this replica.
    fn hear(&self, entry: &Entry, id: &str) -> bool {
        let Ok(draw) = Draw::decode(&entry.payload) else { return false };
        let (began, stored) = (self.length.start_of(draw.slot), entry.since_epoch());
        let own = draw.multiplier == id;
        // Both are lower bounds of the difference, however late the draw is heard.
        let ahead = if own { began.saturating_sub(stored) } else { Duration::ZERO };
        let behind = stored.saturating_sub((self.wall)());
        let offset = ahead.max(behind);
        let slot = self.credible(draw.slot, stored);
        self.known.send_if_modified(|known| {
            // Below the half, so that an offset close to the limit is logged only once.
            let is_off = offset > if known.is_off { OFFSET / 2 } else { OFFSET };
            if is_off && !known.is_off {
                warn!(
                    ?ahead,
                    ?behind,
                    "this machine's clock differs from the broker's; is NTP running?"
                );
            }
            known.is_off = is_off || known.is_off && !own;
            let is_latest = slot >= known.latest;
            if is_latest {
                (known.latest, known.live) = (slot, Some(Instant::now()));
            }
            is_latest
        })
    }

    /// The deadline for requests to generators: after nine tenths of the slot, which leaves the
    /// rest for publishing. Once that has passed, a fifth of a slot from now.
    #[must_use]
    pub fn budget(&self, turn: &Turn) -> Instant {
        let length = self.length.duration();
        (turn.ends - length / 10).max(Instant::now() + length / 5)
    }

    /// Whether a retry could store a second message. This compares with two clocks: this machine's
    /// may be set back, and tokio's does not count the time while the machine is suspended.
    #[must_use]
    pub fn is_too_old(&self, turn: &Turn) -> bool {
        let began = self.length.start_of(turn.slot);
        (self.wall)().saturating_sub(began) >= MAX_AGE || turn.ends.elapsed() >= MAX_AGE
    }
}
