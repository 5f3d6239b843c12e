//! The history of a single broker is copied into the cluster.

use contract::streams::NUMBERS;
use contract::{Message, Product, Slot, subjects};
use evenodd::streams;
use runtime::history::{self, MAX_BATCH};
use runtime::jetstream;
use std::time::Duration;
use tests::cluster::{self, BROKERS, HTTP, compose, docker, in_time, inspect, ip, network};
use tests::http::get;
use tests::watch;

use crate::Cluster;

const MESSAGES: u64 = 5000;
/// The container of the broker that has the history at first.
pub const OLD: &str = "evenodd-test-old";

pub async fn a_history_is_taken_over(cluster: Cluster) {
    let scratch = &cluster.scratch;
    tokio::task::block_in_place(|| {
        compose(&["down", "--volumes"]);
        // Only the brokers: nothing may be published before the history is copied.
        compose(&[&["up", "--detach"][..], &BROKERS].concat());
    });
    let store = format!("{}:/data", scratch.path("old").display());
    let old = docker(&[
        "run",
        "--detach",
        "--name",
        OLD,
        "--network",
        &network(),
        "--network-alias",
        "old",
        "--volume",
        &store,
        "nats:2.15.1-alpine",
        "--jetstream",
        "--store_dir",
        "/data",
    ]);
    let from = format!("{}:4222", ip(&old));
    in_time("the old broker listens", async || async_nats::connect(&from).await.is_ok()).await;
    let one = async_nats::connect(&from).await.unwrap();
    async_nats::jetstream::new(one.clone()).create_stream(streams::numbers(1)).await.unwrap();
    let now = watch::now();
    for n in 0..MESSAGES {
        let slot = Slot(now.0 - MESSAGES + n);
        let payload = Product::new(1000, 101 + 2 * (n % 450)).unwrap().encode().into();
        let timeout = Duration::from_secs(5);
        jetstream::publish(&one, subjects::PUBLISH, slot, payload, timeout).await.unwrap();
    }
    let takeover = ["run", "--rm", "provision", "takeover", "--from", "nats://old:4222"];
    let said = tokio::task::block_in_place(|| compose(&takeover));
    println!("  {said}");
    // A crash of all three shows that the copy is on their disks and not only in memory.
    let brokers = BROKERS.map(cluster::container);
    let restarts = || brokers.each_ref().map(|broker| inspect(broker, "{{.RestartCount}}"));
    let before = restarts();
    cluster::crash(&brokers);
    // `up` must not start them while the engine restarts them.
    in_time("the engine has restarted the brokers", async || {
        restarts().iter().zip(&before).all(|(now, before)| now != before)
    })
    .await;

    tokio::task::block_in_place(|| compose(&["up", "--detach"]));
    let cluster = Cluster::attach().await;
    cluster.heals().await;
    let info = cluster::stream_info(&cluster.operator, NUMBERS).await.unwrap();
    assert_eq!(info.config.num_replicas, 3);
    let mut next = 1;
    while next <= MESSAGES {
        let left = history::read(&one, NUMBERS, next, MAX_BATCH).await.unwrap();
        let copied = history::read(&cluster.operator, NUMBERS, next, MAX_BATCH).await.unwrap();
        let copied: Vec<_> = copied.into_iter().take(left.len()).collect();
        assert_eq!(copied, left);
        next += left.len() as u64;
    }
    in_time("the history goes on", async || {
        let numbers = get(HTTP, "/numbers", &[]).await;
        numbers.status == 200 && numbers.json()["last_seq"].as_u64() > Some(MESSAGES + 3)
    })
    .await;
    println!("  {}", compose(&["run", "--rm", "provision", "verify"]).replace('\n', "\n  "));
    cluster::remove(OLD);
}
