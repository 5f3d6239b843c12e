//! Subjects. The names are a promise to everybody who subscribes: they do not change.

/// Requests for a random even number.
pub const EVEN: &str = "numbers.even";
/// Requests for a random odd number.
pub const ODD: &str = "numbers.odd";
/// The published numbers, live for anybody and kept in the stream [`NUMBERS`](crate::streams::NUMBERS).
pub const PUBLISHED: &str = "numbers.published";
/// Claims of slots, deduplicated by the stream [`TICKS`](crate::streams::TICKS).
pub const CLAIM: &str = "ticks.claim";
/// Bids for a slot while `JetStream` does not answer; never stored.
pub const TAKING: &str = "ticks.taking";
/// One record for every tick, whatever came of it; never stored.
pub const DONE: &str = "ticks.done";

/// Whether a subject is one of these, or may become one. Whoever asks a service names the subject
/// of the answer: to these no answer is sent, or it would be stored, or taken for a bid.
#[must_use]
pub fn is_ours(subject: &str) -> bool {
    subject.starts_with("numbers.") || subject.starts_with("ticks.")
}
