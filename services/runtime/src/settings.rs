//! Settings: flags, each with an environment variable of the same name after `EVENODD_`.
//!
//! Clap reads them once at the start, and ends the process with status 2 if one is wrong.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use anyhow::ensure;
use async_nats::ServerAddr;
use clap::builder::{Resettable, ValueParser};
use clap::{Arg, Args, Command};
use tracing::warn;

use crate::credentials::Credentials;
use crate::telemetry::LogSettings;

/// The variables of all binaries and of the tests. Each binary knows those of the others, because
/// `evenodd up` hands its environment on.
const VARIABLES: &str = "DATA DRAIN_MS EVEN GATEWAYS GROUPS HEADER_BYTES HEADER_MS HEALTH \
    HISTORY_READS HTTP JWT_AUDIENCE JWT_ISSUER JWT_KEY JWT_SECRET KEYS LINGER_MS LOG LOG_FORMAT \
    MAX_CONNECTIONS MAX_EVENT_STREAMS MAX_EXPORTS MULTIPLIERS NATS NATS_PORT NATS_SERVER NKEY ODD \
    PARITY PUBLISH REPLICAS REQUEST_MS SEED SERVERS SLOT_MS TEST_PATIENCE TLS_CA WAIT_MS";
const PREFIX: &str = "EVENODD_";

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

    /// Answer `GET /healthz` on this address: 200, or 503 and why the service does not work
    #[arg(long, env = "EVENODD_HEALTH", value_name = "ADDRESS:PORT", value_parser = listen_address)]
    pub health: Option<SocketAddr>,
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
pub fn server(text: &str) -> anyhow::Result<ServerAddr> {
    // The client takes an empty text for an address.
    ensure!(!text.trim().is_empty(), "the address is empty; give one such as nats://host:4222");
    Ok(text.parse()?)
}

/// Parses where to listen: an address or a host name, and a port. A name is resolved now, and only
/// once.
///
/// # Errors
/// If the text has no port, or the name has no address.
pub fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let addresses = text
        .to_socket_addrs()
        .map_err(|e| format!("{e}; give one such as 127.0.0.1:8080 or localhost:8080"))?;
    // `localhost` has an address of IPv6 too, but most clients are told 127.0.0.1.
    addresses.min_by_key(SocketAddr::is_ipv6).ok_or_else(|| "the name has no address".to_owned())
}

/// Makes a variable that is empty count as unset, for the command and its subcommands.
#[must_use]
pub fn ignore_empty(command: Command) -> Command {
    let ignore = |arg: Arg| match arg.get_env().and_then(std::env::var_os) {
        Some(value) if value.is_empty() => arg.env(Resettable::Reset),
        _ => arg,
    };
    command.mut_args(ignore).mut_subcommands(ignore_empty)
}

/// Logs a warning for each variable of [`unknown`].
pub fn warn_of_unknown() {
    unknown().for_each(|name| warn!("{name} is not a setting, and has no effect; see --help"));
}

/// The variables that begin as ours do and are none. One that is empty counts as unset.
pub fn unknown() -> impl Iterator<Item = String> {
    std::env::vars_os().filter_map(|(name, value)| {
        let name = name.into_string().ok()?;
        let ours = name.strip_prefix(PREFIX)?;
        let is_known = VARIABLES.split_whitespace().any(|known| known == ours);
        (!is_known && !value.is_empty()).then_some(name)
    })
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
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

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
        for (flag, value) in [
            ("--drain-ms", "1"),
            ("--log", "a=b=c"),
            ("--log-format", "xml"),
            ("--nats", ":"),
            ("--nats", ""),
            ("--nats", "nats://a, "),
        ] {
            let error = Settings::try_parse_from(["x", flag, value]).unwrap_err();
            assert!(error.to_string().contains(flag), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn an_address_to_listen_on_may_be_a_host_name() {
        let address = |text| listen_address(text).map(|address| address.to_string());
        assert_eq!(address("127.0.0.1:80"), Ok("127.0.0.1:80".to_owned()));
        assert_eq!(address("[::1]:80"), Ok("[::1]:80".to_owned()));
        assert_eq!(address("localhost:80"), Ok("127.0.0.1:80".to_owned()));
        for wrong in ["localhost", ":80", "80", "", "localhost:65536", "nowhere.invalid:80"] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
    }

    /// All names after `before` in the files of a directory.
    fn names_in(directory: &Path, before: &str, names: &mut BTreeSet<String>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && !["target", "data", "node_modules", ".git"].contains(&name.as_str())
            {
                names_in(&path, before, names);
            } else if let Ok(text) = fs::read_to_string(&path) {
                let is_part = |c: char| c.is_ascii_uppercase() || c == '_';
                let found = text.split(before).skip(1);
                let found = found.map(|rest| rest.split(|c| !is_part(c)).next().unwrap());
                names.extend(found.filter(|name| !name.is_empty()).map(str::to_owned));
            }
        }
    }

    /// `VARIABLES` has exactly the variables of all flags, and those that only tests and
    /// docker-compose.yml read.
    #[test]
    fn the_variables_of_all_binaries_are_known() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mut names = BTreeSet::from(["PUBLISH", "SEED", "TEST_PATIENCE"].map(str::to_owned));
        // In two parts, so that this line is not found.
        names_in(&repository.join("services"), &["env = \"", PREFIX].concat(), &mut names);
        let known: Vec<_> = VARIABLES.split_whitespace().collect();
        assert_eq!(known, names.iter().map(String::as_str).collect::<Vec<_>>());
        let mut used = BTreeSet::new();
        for directory in ["deploy", "docs", "nats", "haproxy", ".github", ".ci", "tests/src"] {
            names_in(&repository.join(directory), PREFIX, &mut used);
        }
        assert!(used.is_subset(&names), "{used:?}");
    }
}
