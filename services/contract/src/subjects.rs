//! Subjects. The names are a promise to everybody who subscribes: they do not change.

/// Requests for a random even number.
pub const EVEN: &str = "numbers.even";
/// Requests for a random odd number.
pub const ODD: &str = "numbers.odd";
/// Multipliers publish draws here; the stream [`TICKS`](crate::streams::TICKS) keeps the first one
/// of each slot.
pub const DRAW: &str = "ticks.draw";
/// The server republishes here what [`TICKS`](crate::streams::TICKS) has stored: one draw a slot.
pub const DONE: &str = "ticks.done";
/// Multipliers publish products here; the stream [`NUMBERS`](crate::streams::NUMBERS) keeps one for
/// each slot.
pub const PUBLISH: &str = "numbers.publish";
/// The server republishes here what [`NUMBERS`](crate::streams::NUMBERS) has stored: this is what
/// everybody subscribes to.
pub const PUBLISHED: &str = "numbers.published";

/// Whether a subject is one of these, or may become one. No service replies to them: the sender of a
/// request names the subject of the reply, and could have it written into a stream.
#[must_use]
pub fn is_ours(subject: &str) -> bool {
    subject.starts_with("numbers.") || subject.starts_with("ticks.")
}
