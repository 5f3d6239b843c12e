//! The settings of the two streams. `provision` creates them, and `takeover` one of them; nothing else
//! does.

use async_nats::jetstream::stream::{
    Compression, Config, DiscardPolicy, Republish, RetentionPolicy, StorageType,
};
use contract::streams::{DUPLICATE_WINDOW, NUMBERS, TICKS, TICKS_AGE};
use contract::subjects;

/// The configuration of [`NUMBERS`].
///
/// No limit on its size: `discard: new` turns a full disk into refused publications, which are
/// retried, instead of lost history.
#[must_use]
pub fn numbers(replicas: usize) -> Config {
    Config {
        description: Some("Every published number, for good".into()),
        discard: DiscardPolicy::New,
        deny_delete: true,
        deny_purge: true,
        ..stream(NUMBERS, subjects::PUBLISH, subjects::PUBLISHED, replicas)
    }
}

/// The configuration of [`TICKS`].
#[must_use]
pub fn ticks(replicas: usize) -> Config {
    Config {
        description: Some("The first draw of each slot, for 20 minutes".into()),
        discard: DiscardPolicy::Old,
        max_age: TICKS_AGE,
        ..stream(TICKS, subjects::DRAW, subjects::DONE, replicas)
    }
}

/// What both have in common: synced files, no compression (docs/adr/0011-no-compression.md), and
/// the values that the server itself writes for "no limit".
fn stream(name: &str, subject: &str, republished: &str, replicas: usize) -> Config {
    Config {
        name: name.into(),
        subjects: vec![subject.into()],
        republish: Some(Republish {
            source: subject.into(),
            destination: republished.into(),
            headers_only: false,
        }),
        storage: StorageType::File,
        compression: Some(Compression::None),
        retention: RetentionPolicy::Limits,
        max_messages: -1,
        max_bytes: -1,
        max_messages_per_subject: -1,
        max_message_size: -1,
        max_consumers: -1,
        duplicate_window: DUPLICATE_WINDOW,
        allow_direct: true,
        num_replicas: replicas,
        ..Config::default()
    }
}
