//! What every service needs to run: settings, the connection, telemetry, shutdown, and the
//! `JetStream` requests that more than one service makes. It knows no subjects and no slots.

pub mod connection;
mod credentials;
pub mod health;
mod hedge;
pub mod history;
pub mod jetstream;
pub mod micro;
mod process;
pub mod settings;
pub mod telemetry;

pub use credentials::Credentials;
pub use hedge::hedged;
pub use process::{Service, Shutdown, main};
