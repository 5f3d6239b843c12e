//! What the services agree on, and nothing else: subjects, wire messages, slots and streams.
//!
//! Everything here is pure: no connection, no clock, no task. The services take all names and types
//! from this crate. They spell out no subject of the pipeline themselves.

pub mod messages;
pub mod odds;
pub mod slot;
pub mod streams;
pub mod subjects;

pub use messages::{DecodeError, Draw, Message, Outcome, Parity, Product};
pub use slot::{Slot, SlotLength};

/// A product is published when it is greater than this.
pub const THRESHOLD: u32 = 100_000;
