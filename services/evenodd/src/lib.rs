//! The operator's tool: a module for each subcommand. `broker` and `streams` hold what they share.

// A command for people prints its results.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod broker;
mod keys;
mod provision;
pub mod streams;
mod takeover;
mod token;
mod up;
mod verify;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use runtime::{settings, telemetry};

/// Runs, provisions and checks the Evenodd pipeline.
#[derive(Parser, Debug)]
#[command(name = "evenodd", version, subcommand_required = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    log: telemetry::LogSettings,
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

/// The whole of `main`. Status 0 if all is well, 1 if not, 2 for wrong settings.
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
    let result = match cli.command {
        Command::Up(up) => up.run(&cli.log).await,
        Command::Provision(provision) => provision.run().await,
        Command::Keys(keys) => keys.run(),
        Command::Takeover(takeover) => takeover.run().await,
        Command::Verify(verify) => verify.run().await,
        Command::Token(token) => token.run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
