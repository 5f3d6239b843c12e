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

use clap::{Parser, Subcommand};
use runtime::{settings, telemetry};

/// Runs, provisions and checks the Evenodd pipeline.
#[derive(Parser, Debug)]
#[command(name = "evenodd", version, subcommand_required = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    log: settings::LogSettings,
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
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // Only warnings: a command's result is its output.
    telemetry::start(&cli.log, "warn,async_nats=error,async_nats::connector=off");
    // One thread, which lives to the end: Linux sends a child of `up` its death signal when the thread
    // that started it ends.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.map_err(Into::into).and_then(|runtime| {
        runtime.block_on(async {
            match cli.command {
                Command::Up(up) => up.run(&cli.log).await,
                Command::Provision(provision) => provision.run().await,
                Command::Keys(keys) => keys.run(),
                Command::Takeover(takeover) => takeover.run().await,
                Command::Verify(verify) => verify.run().await,
                Command::Token(token) => token.run(),
            }
        })
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
