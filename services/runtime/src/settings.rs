//! Settings: flags, each with an environment variable of the same name after `EVENODD_`.
//!
//! Clap reads them once at the start, and ends the process with status 2 if one is wrong.

use std::time::Duration;

use async_nats::ServerAddr;
use clap::Args;
use clap::builder::ValueParser;

use crate::credentials::Credentials;
use crate::telemetry::LogSettings;

/// The settings of every service.
#[derive(Args, Clone, Debug)]
pub struct CommonSettings {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub nats: NatsSettings,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub log: LogSettings,

    /// How long a service may take to finish its work after SIGTERM or Ctrl-C, in milliseconds
    #[arg(long, env = "EVENODD_DRAIN_MS", value_name = "MS", default_value = "5000", value_parser = milliseconds(100..=600_000))]
    pub drain_ms: Duration,
}

/// How to reach the broker.
#[derive(Args, Clone, Debug)]
pub struct NatsSettings {
    /// The NATS servers, separated by commas; any one of them is enough to start
    #[arg(
        long,
        env = "EVENODD_NATS",
        value_name = "URL",
        value_delimiter = ',',
        hide_env_values = true, // it may contain a password
        default_value = "nats://127.0.0.1:4222",
        value_parser = server
    )]
    pub nats: Vec<ServerAddr>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub credentials: Credentials,
}

/// Parses the address of a NATS server.
///
/// # Errors
/// If the text is not an address.
pub fn server(text: &str) -> Result<ServerAddr, String> {
    if text.trim().is_empty() {
        return Err("the address is empty; give one such as nats://host:4222".to_owned());
    }
    text.parse().map_err(|e| format!("{e}"))
}

/// A parser for a number of milliseconds within bounds.
pub fn milliseconds(bounds: std::ops::RangeInclusive<u64>) -> ValueParser {
    use clap::builder::TypedValueParser;
    let parser = clap::value_parser!(u64).range(bounds);
    ValueParser::new(parser.map(Duration::from_millis))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser, Debug)]
    struct Settings {
        #[command(flatten)]
        common: CommonSettings,
    }

    #[test]
    fn valid_settings_are_read() {
        let args = ["x", "--nats", "nats://a:1,nats://b:2", "--drain-ms", "700"];
        let settings = Settings::try_parse_from(args).unwrap();
        assert_eq!(settings.common.nats.nats.len(), 2);
        assert_eq!(settings.common.drain_ms, Duration::from_millis(700));
    }

    #[test]
    fn errors_name_the_wrong_setting() {
        for (flag, value) in
            [("--drain-ms", "1"), ("--log", "a=b=c"), ("--log-format", "xml"), ("--nats", ":")]
        {
            let error = Settings::try_parse_from(["x", flag, value]).unwrap_err();
            assert!(error.to_string().contains(flag), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
