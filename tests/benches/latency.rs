//! Measures how long the steps of a tick take on this machine: `make bench`.

#![allow(clippy::disallowed_types, clippy::unwrap_used, clippy::print_stdout)]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_nats::Client;
use contract::{Draw, Message, Parity, Product, Slot, SlotLength, subjects};
use runtime::jetstream;
use tests::http::Lines;
use tests::{Audit, Brokers, Pipeline, Process, Scratch, Ticks, gateway};

const ROUNDS: usize = 5000;
/// The length of a slot for the whole path: shorter than in deployments, which gives more samples.
const SLOT_MS: &str = "100";

fn print(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1000.0;
    println!("{what:<40} p50 {:.3} ms   p99 {:.3} ms", at(50), at(99));
}

#[tokio::main]
async fn main() {
    steps().await;
    let pipeline = Pipeline::new().await;
    whole_path("one broker", &pipeline.scratch, &pipeline.broker.url(), &pipeline.client).await;
    let scratch = Scratch::new();
    let brokers = Brokers::start(&scratch).await;
    let url = brokers.url();
    brokers.provision(&scratch).await;
    whole_path("three brokers", &scratch, &url, &brokers.client_of(0).await).await;
}

/// Each step alone, on one broker.
async fn steps() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let publish = async |subject, slot, payload: Vec<u8>| {
        let begun = Instant::now();
        let timeout = Duration::from_secs(5);
        let payload = payload.into();
        jetstream::publish(&pipeline.client, subject, Slot(slot), payload, timeout).await.unwrap();
        begun.elapsed()
    };
    let product = Product::new(846, 511).unwrap();
    let (mut draws, mut acks, mut requests) = (Vec::new(), Vec::new(), Vec::new());
    for slot in 0..ROUNDS as u64 {
        let (even, odd) = (Some(product.even()), Some(product.odd()));
        let draw = Draw { slot: Slot(slot), multiplier: "bench".to_owned(), even, odd };
        draws.push(publish(subjects::DRAW, slot, draw.encode()).await);
        acks.push(publish(subjects::PUBLISH, slot, product.encode()).await);
        let begun = Instant::now();
        let subject = Parity::Even.subject();
        pipeline.client.request(subject, "".into()).await.unwrap();
        requests.push(begun.elapsed());
    }
    print("request for a factor", requests);
    print("draw to acknowledgement", draws);
    print("product to acknowledgement", acks);
}

/// Measures the time from the beginning of a slot until its draw is stored, and until a client of
/// the gateway has its record.
async fn whole_path(what: &str, scratch: &Scratch, url: &str, client: &Client) {
    const NUMBERS: usize = 400;
    let mut processes = Vec::new();
    for parity in ["even", "odd", "even", "odd"] {
        let args = ["--parity", parity, "--nats", url];
        processes.push(Process::start(scratch, "generator", &args));
    }
    for _ in 0..2 {
        let args = ["--nats", url, "--slot-ms", SLOT_MS];
        processes.push(Process::start(scratch, "multiplier", &args));
    }
    let (_gateway, address) = gateway(scratch, url, &[]).await;
    Ticks::watch(client).await.take(20).await;
    let mut feed = Lines::open(&address, "/numbers/live", &[]).await;
    let mut seen = Vec::new();
    while seen.len() < NUMBERS {
        let event = feed.event().await.unwrap();
        if event.name == "number" {
            seen.push((event.id, SystemTime::now().duration_since(UNIX_EPOCH).unwrap()));
        }
    }
    drop(processes);
    let length: SlotLength = SLOT_MS.parse().unwrap();
    let audit = Audit::of(client).await;
    let stored = audit.draws.iter().map(|(slot, draw)| draw.at - length.start_of(*slot));
    print(&format!("{what}: slot to draw"), stored.collect());
    let slot_of = |sequence| audit.numbers.iter().find(|(_, n)| n.sequence == sequence).unwrap().0;
    let read = seen.iter().map(|(sequence, at)| *at - length.start_of(*slot_of(*sequence)));
    print(&format!("{what}: slot to HTTP client"), read.collect());
}
