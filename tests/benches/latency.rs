//! How long the steps of a tick take on this machine: `make bench`.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::time::{Duration, Instant};

use contract::{Claim, Message, Parity, Product, Slot, subjects};
use runtime::jetstream;
use tests::Pipeline;

const ROUNDS: usize = 5000;

fn print(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1000.0;
    println!("{what:<24} p50 {:.3} ms   p99 {:.3} ms", at(50), at(99));
}

#[tokio::main]
async fn main() {
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
    let (mut claims, mut acks, mut requests) = (Vec::new(), Vec::new(), Vec::new());
    for slot in 0..ROUNDS as u64 {
        let claim = Claim { slot: Slot(slot), multiplier: "bench".to_owned(), granted: false };
        claims.push(publish(subjects::CLAIM, slot, claim.encode()).await);
        acks.push(publish(subjects::PUBLISHED, slot, product.encode()).await);
        let begun = Instant::now();
        let subject = Parity::Even.subject();
        pipeline.client.request(subject, "".into()).await.unwrap();
        requests.push(begun.elapsed());
    }
    print("claim to answer", claims);
    print("publication to ack", acks);
    print("request for a number", requests);
}
