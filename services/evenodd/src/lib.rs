//! The operator's tool: a module for each subcommand. `broker` and `streams` hold what they share.

mod broker;
mod keys;
mod provision;
pub mod streams;
mod takeover;
mod token;
mod up;
mod verify;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use runtime::settings;
use runtime::telemetry::{self, LogFormat, LogSettings};

/// Runs, provisions and checks the Evenodd pipeline.
#[derive(Parser, Debug)]
#[command(name = "evenodd", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    log: LogSettings,
}

#[derive(Subcommand, Debug)]
enum Command {
    Up(up::Up),
    Provision(provision::Provision),
    Keys(keys::Keys),
    Takeover(takeover::Takeover),
    Verify(verify::Verify),
    Token(token::Token),
}

/// The whole of `main`. Status 0 if all is well, 1 if not, 2 for wrong settings, 3 if `verify` could
/// not look.
///
/// One thread, which lives to the end: Linux sends a child of `up` its death signal when the thread
/// that started it ends.
#[must_use]
#[tokio::main(flavor = "current_thread")]
pub async fn main() -> ExitCode {
    let matches = settings::ignore_empty(Cli::command()).get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    // Only warnings: a command's result is its output.
    telemetry::start(&cli.log, "warn,async_nats=error,async_nats::connector=off");
    settings::warn_of_unknown();
    let is_verify = matches!(cli.command, Command::Verify(_));
    let result = match cli.command {
        Command::Up(up) => up.run(&cli.log).await,
        Command::Provision(provision) => provision.run(telemetry::print).await,
        Command::Keys(keys) => keys.run(),
        Command::Takeover(takeover) => takeover.run().await,
        Command::Verify(verify) => verify.run().await,
        Command::Token(token) => token.run(),
    };
    result.unwrap_or_else(|error| {
        report(&cli.log, &format!("{error:#}"));
        // With status 1 `verify` says that there are faults.
        let could_not_look = is_verify && !error.is::<io::Error>();
        ExitCode::from(if could_not_look { 3 } else { 1 })
    })
}

/// Says why a command failed.
fn report(log: &LogSettings, text: &str) {
    let line = match log.log_format {
        LogFormat::Json => up::child::json(up::LABEL, "ERROR", text),
        LogFormat::Text => format!("error: {text}"),
    };
    // There is nowhere left to say that standard error is closed or full.
    let _ = writeln!(io::stderr(), "{line}");
}
