//! The names of the two streams, and the settings that their readers and writers rely on.

use std::time::Duration;

/// The history: every published product, for good.
pub const NUMBERS: &str = "NUMBERS";
/// The ticks of the last [`TICKS_AGE`]: the first draw of each slot.
pub const TICKS: &str = "TICKS";

/// How long a stream remembers a message id. A publisher may retry a publication for this long, and
/// the stream still stores it at most once.
pub const DUPLICATE_WINDOW: Duration = Duration::from_mins(10);
/// How long the stream keeps a draw: longer than a multiplier may take to settle the slot.
pub const TICKS_AGE: Duration = Duration::from_mins(20);
