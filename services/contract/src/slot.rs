//! Slots: numbered intervals of Unix time. One tick is due in each.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The number of a slot: Unix time divided by the [`SlotLength`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Slot(pub u64);

impl Slot {
    /// The slot after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Slot {
    type Err = std::num::ParseIntError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        s.parse().map(Self)
    }
}

/// The length of a slot: 500 ms everywhere except in tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotLength(NonZeroU64);

impl FromStr for SlotLength {
    type Err = std::num::ParseIntError;

    /// A number of milliseconds, at least 1.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        s.parse().map(Self)
    }
}

impl SlotLength {
    /// The length that every deployment uses.
    pub const DEFAULT: Self = Self(NonZeroU64::new(500).expect("it is not zero"));

    /// The length as a duration.
    #[must_use]
    pub fn duration(self) -> Duration {
        Duration::from_millis(self.0.get())
    }

    /// The slot that contains the given time since the Unix epoch.
    #[must_use]
    pub fn slot_at(self, since_epoch: Duration) -> Slot {
        let ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        Slot(ms / self.0)
    }

    /// When a slot begins, since the Unix epoch; saturates in the far future.
    #[must_use]
    pub fn start_of(self, slot: Slot) -> Duration {
        Duration::from_millis(slot.0.saturating_mul(self.0.get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_time_lies_within_its_slot(ms in 0..u64::MAX / 4, length in 1..100_000u64) {
            let length = SlotLength(NonZeroU64::new(length).unwrap());
            let at = Duration::from_millis(ms);
            let slot = length.slot_at(at);
            prop_assert!(length.start_of(slot) <= at);
            prop_assert!(at < length.start_of(slot.next()));
        }

        #[test]
        fn a_slot_contains_its_start(slot in 0..u64::MAX / 100_000, length in 1..100_000u64) {
            let length = SlotLength(NonZeroU64::new(length).unwrap());
            prop_assert_eq!(length.slot_at(length.start_of(Slot(slot))), Slot(slot));
        }

        #[test]
        fn a_slot_parses_from_its_text(slot: u64) {
            prop_assert_eq!(Slot(slot).to_string().parse(), Ok(Slot(slot)));
        }
    }

    #[test]
    fn the_length_of_a_slot_is_not_zero() {
        assert!("0".parse::<SlotLength>().is_err());
        assert_eq!("500".parse(), Ok(SlotLength::DEFAULT));
    }
}
