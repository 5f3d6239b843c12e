//! Services 1 and 2: ranges, replies and statistics.

use std::collections::HashSet;

use contract::Parity;
use futures::future::join_all;
use futures::{FutureExt, StreamExt};
use tests::{Pipeline, eventually};

#[tokio::test]
async fn each_parity_covers_its_whole_range() {
    let pipeline = Pipeline::new().await;
    let client = &pipeline.client;
    for parity in [Parity::Even, Parity::Odd] {
        let _replicas = [pipeline.generator(parity).await, pipeline.generator(parity).await];
        let mut seen = HashSet::new();
        // If n factors are equally likely, one is still missing after 25 n requests once in 10^8
        // runs.
        for _ in 0..parity.factors().len() * 25 / 100 {
            let requests = (0..100).map(|_| client.request(parity.subject(), "".into()));
            for reply in join_all(requests).await {
                seen.insert(parity.decode_reply(&reply.unwrap().payload).unwrap());
            }
        }
        assert_eq!(seen, parity.factors().collect());
    }
}

/// The requester chooses the reply subject. A service must not reply to a subject of the pipeline.
#[tokio::test]
async fn no_service_replies_to_a_subject_of_the_pipeline() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    // It answers `$SRV` as the multiplier does, but publishes no draws that the test would hear.
    let (_gateway, _) = pipeline.gateway().await;
    let client = &pipeline.client;
    let mut written = client.subscribe("ticks.>").await.unwrap();
    let mut answers = client.subscribe("elsewhere").await.unwrap();
    for subject in ["numbers.even", "$SRV.PING.gateway", "$SRV.STATS.odd"] {
        for reply in ["numbers.publish", "ticks.draw", "ticks.done", "elsewhere"] {
            client.publish_with_reply(subject, reply, "".into()).await.unwrap();
        }
    }
    // The answers of one even generator, one gateway and two odd generators.
    for _ in 0..4 {
        answers.next().await.unwrap();
    }
    client.flush().await.unwrap();
    assert!(written.next().now_or_never().is_none());
    assert_eq!(pipeline.history().await, []);
}

#[tokio::test]
async fn every_replica_is_listed_and_counts_its_requests() {
    let pipeline = Pipeline::new().await;
    let _replicas =
        [pipeline.generator(Parity::Even).await, pipeline.generator(Parity::Even).await];
    let client = &pipeline.client;
    for _ in 0..40 {
        client.request(Parity::Even.subject(), "".into()).await.unwrap();
    }
    eventually("both replicas report what they answered", async || {
        let stats = tests::services(client, "STATS.even").await;
        let counts: Vec<u64> =
            stats.iter().map(|s| s["endpoints"][0]["num_requests"].as_u64().unwrap()).collect();
        counts.len() == 2 && counts.iter().all(|&n| n > 0) && counts.iter().sum::<u64>() == 40
    })
    .await;
}
