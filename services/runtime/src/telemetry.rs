//! Logging: for a person on a terminal, or as JSON for a machine. Always on standard error.

use std::io::IsTerminal;

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

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

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people; in colour on a terminal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

fn log_filter(text: &str) -> Result<String, ParseError> {
    EnvFilter::builder().parse(text).map(|_| text.to_owned())
}

/// Starts logging, with a filter in the syntax of `tracing`'s `EnvFilter` unless the settings have
/// one.
pub fn start(settings: &LogSettings, default_filter: &str) {
    let filter = settings.log.as_deref().unwrap_or(default_filter);
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_ansi(std::io::stderr().is_terminal())
        // Standard error may be gone (a closed terminal): that must not take the task down that
        // had something to say.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    // A second start in one process (tests) keeps the first.
    let _ = match settings.log_format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}
