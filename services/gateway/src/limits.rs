//! The limits on what clients may take, alone and together.

use std::time::Duration;

use runtime::settings::milliseconds;

/// The limits on what clients may take.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Limits {
    /// How many connections may be open at once; further ones wait to be accepted
    #[arg(long, env = "EVENODD_MAX_CONNECTIONS", value_name = "N", default_value = "12000", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_connections: u32,

    /// How long a client may take to send the head of a request, in milliseconds; an idle
    /// connection is closed after the same time
    #[arg(long, env = "EVENODD_HEADER_MS", value_name = "MS", default_value = "10000", value_parser = milliseconds(10..=600_000))]
    pub header_ms: Duration,

    /// How long the head of a request may be, in bytes
    #[arg(long, env = "EVENODD_HEADER_BYTES", value_name = "N", default_value = "16384", value_parser = clap::value_parser!(u32).range(8192..=1_048_576))]
    pub header_bytes: u32,

    /// The timeout for preparing a response, and for a client that reads nothing of it, in
    /// milliseconds
    #[arg(long, env = "EVENODD_REQUEST_MS", value_name = "MS", default_value = "30000", value_parser = milliseconds(100..=600_000))]
    pub request_ms: Duration,

    /// How many event streams may be open at once; further ones are refused
    #[arg(long, env = "EVENODD_MAX_EVENT_STREAMS", value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub max_event_streams: u32,

    /// How many exports of the history may be in progress at once; further ones are refused
    #[arg(long, env = "EVENODD_MAX_EXPORTS", value_name = "N", default_value = "4", value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub max_exports: u32,

    /// How many reads of the history a second are allowed, beyond the last 100 numbers
    #[arg(long, env = "EVENODD_HISTORY_READS", value_name = "N", default_value = "20", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub history_reads: u32,
}
