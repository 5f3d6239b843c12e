//! Logging to standard error: as text for people, or as JSON for machines. Also what commands print.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// The settings of logging.
#[derive(Args, Clone, Debug)]
pub struct LogSettings {
    /// The format of log lines
    #[arg(
        long,
        global = true,
        env = "EVENODD_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "text"
    )]
    pub log_format: LogFormat,

    /// The log level: error, warn, info, debug, trace, or a list such as multiplier=debug,info
    #[arg(long, global = true, env = "EVENODD_LOG", value_name = "FILTER", value_parser = log_filter)]
    pub log: Option<String>,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text for people, in colour on a terminal (see no-color.org).
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

fn log_filter(text: &str) -> Result<String, ParseError> {
    EnvFilter::builder().parse(text).map(|_| text.to_owned())
}

/// Starts logging. `default_filter`, in the syntax of `tracing`'s `EnvFilter`, applies if the
/// settings have no filter.
pub fn start(settings: &LogSettings, default_filter: &str) {
    let filter = settings.log.as_deref().unwrap_or(default_filter);
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_ansi(io::stderr().is_terminal() && !no_color)
        // Standard error may be closed, for example with its terminal. The task that logs must
        // survive that.
        .log_internal_errors(false)
        .with_writer(io::stderr);
    // Tests start logging several times in one process; the first start counts.
    let _ = match settings.log_format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// Prints a result of a command. Unlike `println!` it does not panic.
///
/// # Errors
/// If standard output is closed or full.
pub fn print(text: impl Display) -> io::Result<()> {
    writeln!(io::stdout(), "{text}")
        .map_err(|e| io::Error::new(e.kind(), format!("cannot write to standard output: {e}")))
}
