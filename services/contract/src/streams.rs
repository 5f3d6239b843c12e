//! The names of the two streams, and what their readers and writers rely on.

use std::time::Duration;

/// The history: every published number, for good.
pub const NUMBERS: &str = "NUMBERS";
/// The draws of the last [`TICKS_AGE`]: the first one of each slot.
pub const TICKS: &str = "TICKS";

/// For how long a stream remembers a message id. A publication that was not acknowledged may be
/// retried for this long and is still stored at most once.
pub const DUPLICATE_WINDOW: Duration = Duration::from_mins(10);
/// For how long a draw is kept: longer than anybody may still read it to settle its slot.
pub const TICKS_AGE: Duration = Duration::from_mins(20);
