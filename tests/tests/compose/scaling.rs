//! Services are scaled up and down while clients use them.

use std::collections::BTreeMap;
use std::time::Duration;

use tests::cluster::{compose, containers, in_time};
use tests::watch::{Follow, Poll, Watch, without_gap_or_repeat};

use crate::Cluster;

pub async fn services_come_and_go(cluster: Cluster) {
    cluster.heals().await;
    let (watch, poll, follow) = (Watch::start().await, Poll::start(), Follow::start());
    for (even, odd, multiplier, gateway) in [(3, 3, 4, 4), (1, 1, 1, 1), (2, 2, 2, 2)] {
        let scale =
            [("even", even), ("odd", odd), ("multiplier", multiplier), ("gateway", gateway)];
        let mut args = vec!["up".to_owned(), "--detach".to_owned(), "--no-recreate".to_owned()];
        for (service, count) in scale {
            args.extend(["--scale".to_owned(), format!("{service}={count}")]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        tokio::task::block_in_place(|| compose(&args));
        for (service, count) in scale {
            in_time(service, async || containers(service).len() == count).await;
        }
        tokio::time::sleep(Duration::from_secs(8)).await;
    }
    let (polled, sequences) = (poll.stop().await, follow.stop().await);
    let watched = watch.stop(&cluster.operator).await;
    println!(
        "  {} requests, the longest time without an answer {} ms; {} events; {watched:?}",
        polled.answered,
        polled.longest_gap.as_millis(),
        sequences.len()
    );
    assert_eq!(polled.faults, Vec::<String>::new());
    assert!(without_gap_or_repeat(&sequences), "{sequences:?}");
    assert_eq!((watched.missed, watched.heard_twice), (vec![], BTreeMap::new()));
}
