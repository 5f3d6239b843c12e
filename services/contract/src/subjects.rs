//! The subjects. Subscribers outside the project depend on these names, so they never change.

/// Requests for a random even number.
pub const EVEN: &str = "numbers.even";
/// Requests for a random odd number.
pub const ODD: &str = "numbers.odd";
/// Multipliers publish draws here; the stream [`TICKS`](crate::streams::TICKS) keeps the first one
/// of each slot.
pub const DRAW: &str = "ticks.draw";
/// The server republishes a draw here once [`TICKS`](crate::streams::TICKS) has stored it: one a
/// slot.
pub const DONE: &str = "ticks.done";
/// Multipliers publish products here; the stream [`NUMBERS`](crate::streams::NUMBERS) keeps one for
/// each slot.
pub const PUBLISH: &str = "numbers.publish";
/// The server republishes a product here once [`NUMBERS`](crate::streams::NUMBERS) has stored it.
/// This is the subject to subscribe to.
pub const PUBLISHED: &str = "numbers.published";

/// Whether a subject belongs to the pipeline, now or in a later version. The requester chooses the
/// reply subject. A service must not reply to a subject of the pipeline, because a stream could
/// store the reply.
#[must_use]
pub fn is_ours(subject: &str) -> bool {
    subject.starts_with("numbers.") || subject.starts_with("ticks.")
}
