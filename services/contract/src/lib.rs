//! What the services agree on, and nothing else: subjects, wire messages, slots and streams.
//!
//! Everything here is pure: no connection, no clock, no task. Whoever speaks to the broker takes
//! the names and the types from this crate; no other place spells a subject.

pub mod messages;
pub mod odds;
pub mod slot;
pub mod streams;
pub mod subjects;

pub use messages::{DecodeError, Draw, Message, Outcome, Parity, Product};
pub use slot::{Slot, SlotLength};

/// A product is published when it is greater than this.
pub const THRESHOLD: u32 = 100_000;
