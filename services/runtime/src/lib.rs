//! What every service needs to run, and no service's own business: settings, the connection,
//! telemetry, shutdown, and the few requests to `JetStream` that more than one of them makes.

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
