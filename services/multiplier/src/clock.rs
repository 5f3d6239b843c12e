//! The clock: it starts each slot once, and knows which slots are stored already.

use std::sync::Arc;
use std::time::Duration;

use contract::streams::DUPLICATE_WINDOW;
use contract::{Draw, Message, Slot, SlotLength};
use runtime::history::Entry;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::warn;

/// A slot is given up at this age: 30 s before the stream forgets its message id, so that neither a
/// publication under way nor [`TOLERANCE`] can make a retry a second message.
const MAX_AGE: Duration = DUPLICATE_WINDOW.saturating_sub(Duration::from_secs(30));
/// How far the clocks of two replicas may differ, and both still draw. Also how old the knowledge of
/// what is stored may be.
pub const TOLERANCE: Duration = Duration::from_secs(10);
/// A clock that differs more than this from the broker's is reported.
const OFFSET: Duration = Duration::from_secs(1);
/// How often to look at a clock that is behind.
const CHECK: Duration = Duration::from_secs(10);

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
    heard: Arc<watch::Sender<Heard>>,
}

/// What is known of the draws that are stored.
#[derive(Clone, Copy, Default)]
struct Heard {
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
        Self { length, wall: Arc::new(wall), heard: Arc::default() }
    }

    /// The slot of this moment.
    #[must_use]
    pub fn slot(&self) -> Slot {
        self.length.slot_at((self.wall)())
    }

    /// Waits for a slot later than `last` to begin. A replica that was stopped for a while goes on
    /// with the slot of this moment. One whose clock is behind `last`, or behind what is stored, waits
    /// for it, and so does one that does not know what is stored: the stream may have forgotten the
    /// message ids of these slots, and would store them again.
    pub async fn next(&self, last: Slot) -> Turn {
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
                let slot = self.length.slot_at(now);
                let left = self.length.start_of(slot.next()).saturating_sub(now);
                let began = self.length.start_of(slot);
                return Turn { slot, began, ends: Instant::now() + left };
            }
            if wait > self.length.duration() + OFFSET && !told {
                let wait_s = wait.as_secs();
                warn!(%first, wait_s, "the clock is behind slots that are stored: waiting for it");
                told = true;
            }
            sleep(wait.min(CHECK)).await;
        }
    }

    /// The first slot that may be drawn, if it is known what is stored. What was stored just now the
    /// stream remembers for long enough.
    fn first(&self) -> Option<Slot> {
        let Heard { latest, live, read, .. } = *self.heard.borrow();
        let next = self.length.start_of(latest.next());
        let first = if is_recent(live) { next.saturating_sub(TOLERANCE) } else { next };
        (is_recent(live) || is_recent(read)).then(|| self.length.slot_at(first))
    }

    /// Takes note of the draws that were stored last.
    pub fn learn(&self, entries: &[Entry]) {
        let latest = entries.iter().filter_map(|entry| self.slot_of(entry)).max();
        self.heard.send_modify(|heard| {
            heard.latest = heard.latest.max(latest.unwrap_or_default());
            heard.read = Some(Instant::now());
        });
    }

    /// The slot of a stored draw, unless it lies in the future: one replica whose clock is far ahead
    /// must not stop the others.
    fn slot_of(&self, entry: &Entry) -> Option<Slot> {
        let slot = Draw::decode(&entry.payload).ok()?.slot;
        (self.length.start_of(slot) <= entry.since_epoch() + TOLERANCE).then_some(slot)
    }

    /// Takes note of a draw in the moment in which it is stored. Reports this machine's clock, once,
    /// if the draw shows that it differs from the broker's; `id` is that of this replica.
    pub fn hear(&self, entry: &Entry, id: &str) {
        let Ok(draw) = Draw::decode(&entry.payload) else { return };
        let (began, stored) = (self.length.start_of(draw.slot), entry.since_epoch());
        let own = draw.multiplier == id;
        // Either is certain, however late the draw is heard.
        let ahead = if own { began.saturating_sub(stored) } else { Duration::ZERO };
        let behind = stored.saturating_sub((self.wall)());
        let is_off = ahead.max(behind) > OFFSET;
        self.heard.send_modify(|heard| {
            if is_off && !heard.is_off {
                let (ahead_ms, behind_ms) = (ahead.as_millis(), behind.as_millis());
                warn!(ahead_ms, behind_ms, "this clock differs from the broker's; is NTP running?");
            }
            if let Some(slot) = self.slot_of(entry).filter(|slot| *slot >= heard.latest) {
                heard.latest = slot;
                heard.live = Some(Instant::now());
            }
            heard.is_off = is_off || heard.is_off && !own;
        });
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
