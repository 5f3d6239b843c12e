//! What a gateway can be told: mostly, how much clients may take.

use std::time::Duration;

use runtime::settings::milliseconds;

use crate::access::Access;

/// What a gateway can be told, besides where it listens and where NATS is.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// How many connections may be open at once; further ones wait to be accepted
    #[arg(long, env = "EVENODD_MAX_CONNECTIONS", value_name = "N", default_value = "12000", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) max_connections: u32,

    /// How long a client may take to send the head of a request, in milliseconds; an idle
    /// connection is closed after the same time
    #[arg(long, env = "EVENODD_HEADER_MS", value_name = "MS", default_value = "10000", value_parser = milliseconds(10..=600_000))]
    pub(crate) header_ms: Duration,

    /// How long the head of a request may be, in bytes
    #[arg(long, env = "EVENODD_HEADER_BYTES", value_name = "N", default_value = "16384", value_parser = clap::value_parser!(u32).range(8192..=1_048_576))]
    pub(crate) header_bytes: u32,

    /// The timeout for preparing a response, and for a client that reads nothing of it, in
    /// milliseconds
    #[arg(long, env = "EVENODD_REQUEST_MS", value_name = "MS", default_value = "30000", value_parser = milliseconds(100..=600_000))]
    pub(crate) request_ms: Duration,

    /// How many event streams may be open at once; further ones are refused
    #[arg(long, env = "EVENODD_MAX_EVENT_STREAMS", value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub(crate) max_event_streams: u32,

    /// How many exports of the history may be in progress at once; further ones are refused
    #[arg(long, env = "EVENODD_MAX_EXPORTS", value_name = "N", default_value = "4", value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub(crate) max_exports: u32,

    /// How many reads of the history a second are allowed, beyond the last 100 numbers
    #[arg(long, env = "EVENODD_HISTORY_READS", value_name = "N", default_value = "20", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) history_reads: u32,

    /// How long to go on as before after SIGTERM, in milliseconds; part of --drain-ms. /readyz is
    /// 404 from the first moment, so that a load balancer sends new clients elsewhere
    #[arg(long, env = "EVENODD_LINGER_MS", value_name = "MS", default_value = "0", value_parser = milliseconds(0..=600_000))]
    pub(crate) linger_ms: Duration,

    #[command(flatten)]
    pub(crate) access: Access,
}
