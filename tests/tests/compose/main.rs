//! Tests of the cluster of `docker-compose.yml`: one cluster, and one step after the other.
//! `make test-compose` runs all steps, and `make test-compose ARGS="kills cuts"` only these.

#![allow(clippy::disallowed_types, clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

mod cuts;
mod kills;
mod permissions;
mod restarts;
mod scaling;
mod start;
mod takeover;
mod tokens;
mod update;

use std::net::TcpListener;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::Instant;

use async_nats::Client;
use futures::FutureExt;
use tests::Scratch;
use tests::cluster::{self, HTTP, Keys, NATS, compose, in_time, is_whole};

/// The running cluster.
pub struct Cluster {
    keys: Keys,
    operator: Client,
    scratch: Scratch,
}

impl Cluster {
    /// Connects to the running containers.
    async fn attach() -> Self {
        let scratch = Scratch::new();
        let keys = Keys::copy(&scratch, "keys");
        let operator = keys.operator().await;
        Self { keys, operator, scratch }
    }

    /// Waits until all containers are healthy and all brokers are current.
    async fn heals(&self) {
        in_time("it heals", async || is_whole(&self.operator).await).await;
    }
}

/// A step: its name, and the test that it runs on the cluster.
type Step = (&'static str, fn(Cluster) -> Pin<Box<dyn Future<Output = ()>>>);

/// All steps, in their order. Each leaves a healthy cluster behind.
const STEPS: [Step; 11] = [
    ("start", |cluster| Box::pin(start::the_cluster_is_redundant(cluster))),
    ("permissions", |cluster| Box::pin(permissions::each_user_may_do_only_what_it_needs(cluster))),
    ("strangers", |cluster| Box::pin(permissions::strangers_are_refused(cluster))),
    ("tokens", |cluster| Box::pin(tokens::the_gateways_can_ask_for_a_token(cluster))),
    ("scaling", |cluster| Box::pin(scaling::services_come_and_go(cluster))),
    ("kills", |cluster| Box::pin(kills::any_process_may_be_killed(cluster))),
    ("blackouts", |cluster| Box::pin(kills::all_brokers_may_be_killed_at_once(cluster))),
    ("cuts", |cluster| Box::pin(cuts::any_container_may_be_cut_off(cluster))),
    ("update", |cluster| Box::pin(update::a_new_version_takes_over(cluster))),
    ("restarts", |cluster| Box::pin(restarts::brokers_are_restarted_in_turn(cluster))),
    ("takeover", |cluster| Box::pin(takeover::a_history_is_taken_over(cluster))),
];

#[tokio::main]
async fn main() -> ExitCode {
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let unknown = wanted.iter().find(|name| STEPS.iter().all(|(step, _)| step != name));
    if let Some(name) = unknown {
        eprintln!(
            "there is no step {name}; the steps are {}",
            STEPS.map(|(step, _)| step).join(" ")
        );
        return ExitCode::from(2);
    }
    cluster::remove(takeover::OLD);
    compose(&["down", "--volumes", "--timeout", "5"]);
    for address in [HTTP, NATS] {
        if let Err(error) = TcpListener::bind(address) {
            eprintln!(
                "cannot listen on {address}: {error}. The cluster needs this port: stop what uses it."
            );
            return ExitCode::FAILURE;
        }
    }
    compose(&["build"]);
    start::from_nothing().await;
    for (name, step) in STEPS {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| wanted == name) {
            continue;
        }
        let begun = Instant::now();
        println!("{name} ...");
        let run = async { step(Cluster::attach().await).await };
        if let Err(panic) = AssertUnwindSafe(run).catch_unwind().await {
            println!("the last lines of the containers:");
            println!("{}", compose(&["ps", "--all"]));
            println!("{}", compose(&["logs", "--no-color", "--tail", "40"]));
            cluster::remove(takeover::OLD);
            compose(&["down", "--volumes", "--timeout", "5"]);
            // The reason comes last, where it is easy to find.
            let why = panic.downcast_ref::<String>().map_or("see above", String::as_str);
            println!("{name} FAILED: {why}");
            return ExitCode::FAILURE;
        }
        println!("{name} ok ({} s)", begun.elapsed().as_secs());
    }
    compose(&["down", "--volumes"]);
    assert!(cluster::containers("").is_empty());
    ExitCode::SUCCESS
}
