//! Settings: flags, each with an environment variable of the same name after `EVENODD_`.
//!
//! They are read once, at the edge. Whoever starts a service with three faults in its settings
//! sees all three, and exit status 2.

use std::ffi::OsString;
use std::time::Duration;

use async_nats::ServerAddr;
use clap::builder::ValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Command, FromArgMatches, Parser};
use tracing_subscriber::EnvFilter;

use crate::credentials::Credentials;
use crate::telemetry::LogFormat;

/// What every service can be told.
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

/// Where the broker is.
#[derive(Args, Clone, Debug)]
pub struct NatsSettings {
    /// The NATS servers, separated by commas; any one of them is enough to start
    #[arg(
        long,
        env = "EVENODD_NATS",
        value_name = "URL",
        value_delimiter = ',',
        hide_env_values = true, // it may hold a password
        default_value = "nats://127.0.0.1:4222",
        value_parser = server
    )]
    pub nats: Vec<ServerAddr>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub credentials: Credentials,
}

/// What is logged, and how.
#[derive(Args, Clone, Debug)]
pub struct LogSettings {
    /// How log lines are written
    #[arg(
        long,
        global = true,
        env = "EVENODD_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "text"
    )]
    pub log_format: LogFormat,

    /// What is logged: error, warn, info, debug, trace, or a list such as multiplier=debug,info
    #[arg(long, global = true, env = "EVENODD_LOG", value_name = "FILTER", value_parser = log_filter)]
    pub log: Option<String>,
}

/// The address of a NATS server.
///
/// # Errors
/// If the text is none.
pub fn server(text: &str) -> Result<ServerAddr, String> {
    if text.trim().is_empty() {
        return Err("it is empty; it is something like nats://host:4222".to_owned());
    }
    text.parse().map_err(|e| format!("{e}"))
}

fn log_filter(text: &str) -> Result<String, String> {
    match EnvFilter::builder().parse(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(e) => Err(e.to_string()),
    }
}

/// A parser for a number of milliseconds within bounds.
pub fn milliseconds(bounds: std::ops::RangeInclusive<u64>) -> ValueParser {
    use clap::builder::TypedValueParser;
    let parser = clap::value_parser!(u64).range(bounds);
    ValueParser::new(parser.map(Duration::from_millis))
}

/// Reads the settings from the command line and the environment. Where they are wrong, it says
/// everything that is wrong and ends the process with status 2.
pub fn parse<T: Parser>() -> T {
    parse_command(T::command()).0
}

/// The same for a command with more subcommands than `T` knows; also the one that was given.
pub(crate) fn parse_command<T: FromArgMatches>(command: Command) -> (T, Option<String>) {
    match try_parse(command, &std::env::args_os().collect::<Vec<_>>()) {
        Ok(read) => read,
        Err(Stop::Help(error)) => error.exit(),
        Err(Stop::Faults(faults)) => refuse(&faults),
    }
}

/// Says what is wrong and ends the process with status 2.
pub(crate) fn refuse(faults: &[String]) -> ! {
    use std::io::Write;
    let mut stderr = std::io::stderr().lock();
    for fault in faults {
        let _ = writeln!(stderr, "error: {fault}");
    }
    let _ = writeln!(stderr, "\nFor more information, try '--help'.");
    std::process::exit(2);
}

/// Why there are no settings.
#[derive(Debug)]
enum Stop {
    /// Help or version was asked for.
    Help(clap::Error),
    /// Every fault, each in one line.
    Faults(Vec<String>),
}

/// clap stops at the first fault. So each faulty argument is made harmless once its fault is
/// noted, and the rest is read again.
fn try_parse<T: FromArgMatches>(
    mut command: Command,
    args: &[OsString],
) -> Result<(T, Option<String>), Stop> {
    let mut args = args.to_vec();
    let mut faults = Vec::new();
    let mut known = Vec::new();
    loop {
        let error = match command.clone().try_get_matches_from(&args) {
            Ok(matches) if faults.is_empty() => match T::from_arg_matches(&matches) {
                Ok(settings) => {
                    return Ok((settings, matches.subcommand_name().map(ToOwned::to_owned)));
                }
                Err(error) => error,
            },
            Ok(_) => return Err(Stop::Faults(faults)),
            Err(error) => error,
        };
        if !error.use_stderr() {
            return Err(Stop::Help(error));
        }
        let name = faulty_argument(&error).unwrap_or_default();
        // A flag without its value stays faulty whatever would be accepted.
        if known.contains(&name) {
            return Err(Stop::Faults(faults));
        }
        faults.push(first_paragraph(&error));
        known.push(name.clone());
        let harmless = match error.kind() {
            ErrorKind::ValueValidation | ErrorKind::InvalidValue => accept_anything(command, &name),
            ErrorKind::UnknownArgument => {
                let is_it = |arg: &OsString| {
                    let arg = arg.to_string_lossy();
                    arg.split('=').next() == Some(name.as_str())
                };
                // The first one is the program's own name.
                let found = args.iter().skip(1).position(is_it);
                found.map(|at| {
                    args.remove(at + 1);
                    command
                })
            }
            _ => None,
        };
        match harmless {
            Some(next) => command = next,
            None => return Err(Stop::Faults(faults)),
        }
    }
}

fn first_paragraph(error: &clap::Error) -> String {
    let text = error.to_string();
    let fault = text.split("\n\nUsage:").next().unwrap_or(&text);
    let fault = fault.split("\n\nFor more information").next().unwrap_or(fault);
    fault.trim_start_matches("error: ").trim_end().to_owned()
}

/// The argument that clap complains of: `--drain-ms` of `--drain-ms <MS>`.
fn faulty_argument(error: &clap::Error) -> Option<String> {
    match error.get(ContextKind::InvalidArg)? {
        ContextValue::String(text) => text.split_whitespace().next().map(ToOwned::to_owned),
        _ => None,
    }
}

fn accept_anything(command: Command, flag: &str) -> Option<Command> {
    fn relax(command: Command, flag: &str) -> Command {
        let names: Vec<_> = command.get_subcommands().map(|c| c.get_name().to_owned()).collect();
        let ids: Vec<_> = command
            .get_arguments()
            .filter(|a| a.get_long().is_some_and(|long| flag == format!("--{long}")))
            .map(|a| a.get_id().clone())
            .collect();
        let command = ids.into_iter().fold(command, |command, id| {
            command.mut_arg(id, |arg| {
                arg.value_parser(ValueParser::os_string()).default_value(None::<&str>)
            })
        });
        names
            .into_iter()
            .fold(command, |command, name| command.mut_subcommand(name, |sub| relax(sub, flag)))
    }
    flag.starts_with("--").then(|| relax(command, flag))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[derive(Parser, Debug)]
    struct Settings {
        #[command(flatten)]
        common: CommonSettings,
        #[arg(long)]
        needed: Option<u8>,
    }

    fn read(args: &str) -> Result<Settings, Stop> {
        let args: Vec<OsString> = args.split_whitespace().map(Into::into).collect();
        try_parse(Settings::command(), &args).map(|(settings, _)| settings)
    }

    fn faults(args: &str) -> Vec<String> {
        match read(args) {
            Err(Stop::Faults(faults)) => faults,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn right_settings_are_read() {
        let settings = read("x --nats nats://a:1,nats://b:2 --drain-ms 700 --needed 3").unwrap();
        assert_eq!(settings.common.nats.nats.len(), 2);
        assert_eq!(settings.common.drain_ms, Duration::from_millis(700));
        assert_eq!(settings.needed, Some(3));
    }

    #[test]
    fn every_fault_is_reported_at_once() {
        let faults =
            faults("x --drain-ms 1 --log a=b=c --log-format xml --needed 300 --colour --nats :");
        for (fault, flag) in faults.iter().zip(0..) {
            assert!(!fault.contains('\n') || fault.contains("possible values"), "{flag}: {fault}");
        }
        for flag in ["--drain-ms", "--log ", "--log-format", "--needed", "--colour", "--nats"] {
            assert_eq!(
                faults.iter().filter(|f| f.contains(flag)).count(),
                1,
                "{flag} in {faults:#?}"
            );
        }
    }

    #[test]
    fn a_flag_without_its_value_is_one_fault() {
        assert_eq!(faults("x --needed").len(), 1);
        assert_eq!(faults("x --needed --drain-ms 1").len(), 1);
        assert_eq!(faults("x --drain-ms 1 --needed").len(), 2);
    }

    #[test]
    fn help_is_no_fault() {
        assert!(matches!(read("x --help"), Err(Stop::Help(_))));
    }
}
