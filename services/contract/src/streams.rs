//! The two streams and what each must be like. `evenodd provision` makes them; nothing else does.

use std::time::Duration;

use async_nats::jetstream::stream::{
    Compression, Config, DiscardPolicy, RetentionPolicy, StorageType,
};

use crate::subjects;

/// The history: every published number, for good.
pub const NUMBERS: &str = "NUMBERS";
/// The claims: its duplicate detection gives each slot to one multiplier.
pub const TICKS: &str = "TICKS";

/// For how long a message id is remembered. A publication that was not acknowledged may be
/// retried for this long and is still stored at most once.
pub const DUPLICATE_WINDOW: Duration = Duration::from_mins(10);

/// The configuration of [`NUMBERS`].
///
/// No limit on its size: `discard: new` turns a full disk into refused publications, which are
/// retried, instead of lost history. No compression: docs/adr/0011-no-compression.md.
#[must_use]
pub fn numbers(replicas: usize) -> Config {
    Config {
        name: NUMBERS.into(),
        description: Some("Every published number, for good".into()),
        subjects: vec![subjects::PUBLISHED.into()],
        compression: Some(Compression::None),
        discard: DiscardPolicy::New,
        deny_delete: true,
        deny_purge: true,
        ..unlimited(replicas)
    }
}

/// The configuration of [`TICKS`].
///
/// It keeps the latest claim alone: what matters is the memory of message ids. On file, because a
/// single server forgets a stream in memory, configuration and all, when it is restarted.
#[must_use]
pub fn ticks(replicas: usize) -> Config {
    Config {
        name: TICKS.into(),
        description: Some("Claims of slots; only their deduplication matters".into()),
        subjects: vec![subjects::CLAIM.into()],
        compression: Some(Compression::None),
        discard: DiscardPolicy::Old,
        max_messages: 1,
        ..unlimited(replicas)
    }
}

/// What both have in common, with the values that the server itself writes for "no limit".
fn unlimited(replicas: usize) -> Config {
    Config {
        storage: StorageType::File,
        retention: RetentionPolicy::Limits,
        max_messages: -1,
        max_bytes: -1,
        max_messages_per_subject: -1,
        max_message_size: -1,
        max_consumers: -1,
        max_age: Duration::ZERO,
        duplicate_window: DUPLICATE_WINDOW,
        allow_direct: true,
        num_replicas: replicas,
        ..Config::default()
    }
}
