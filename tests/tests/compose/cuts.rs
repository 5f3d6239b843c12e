//! Brokers, multipliers and gateways are cut off the network and reconnected.

use std::time::Duration;

use tests::cluster::{self, BROKERS, compose, containers, docker};
use tests::watch::{Follow, Poll, Watch, without_gap_or_repeat};

use crate::Cluster;

pub async fn any_container_may_be_cut_off(cluster: Cluster) {
    let brokers = BROKERS.map(|broker| (cluster::container(broker), broker));
    let services = ["multiplier", "gateway"]
        .into_iter()
        .flat_map(|service| containers(service).into_iter().map(move |name| (name, service)));
    for (container, service) in brokers.into_iter().chain(services) {
        cluster.heals().await;
        let (watch, poll, follow) = (Watch::start().await, Poll::start(), Follow::start());
        tokio::time::sleep(Duration::from_secs(2)).await;
        cluster::disconnect(&container);
        tokio::time::sleep(Duration::from_secs(12)).await;
        cluster::reconnect(&container, service);
        tokio::time::sleep(Duration::from_secs(8)).await;
        let (polled, sequences) = (poll.stop().await, follow.stop().await);
        let watched = watch.stop(&cluster.operator).await;
        println!(
            "  {container}: {} missed, tick gap {} ms, publish delay {} ms ({} late), {} requests, the \
             longest time without an answer {} ms",
            watched.missed.len(),
            watched.tick_gap.as_millis(),
            watched.publish_delay.as_millis(),
            watched.late,
            polled.answered,
            polled.longest_gap.as_millis(),
        );
        assert_eq!(polled.faults, Vec::<String>::new(), "{container}");
        // After 0.8 s HAProxy repeats a request on another gateway.
        assert!(polled.longest_gap < Duration::from_secs(2), "{container}: {polled:?}");
        assert!(without_gap_or_repeat(&sequences), "{container}: {sequences:?}");
        assert_eq!(watched.missed, [], "{container}");
        assert_eq!(watched.heard_twice_beside(&container), 0, "{container}: {watched:?}");
    }
    the_network_is_partitioned(&cluster).await;
    cluster.heals().await;
    // A broker that knows another one by address finds no certificate for it, and retries for ever.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let log = compose(&[&["logs", "--no-color", "--since", "3s"], &BROKERS[..]].concat());
    assert!(!log.contains("handshake error"), "{log}");
    // A server reports an unreadable store (docs/adr/0011-no-compression.md) once, when it reads it
    // again: after some time without publications, when its cache has expired.
    let log = compose(&[&["logs", "--no-color"], &BROKERS[..]].concat());
    let unreadable: Vec<_> = log.lines().filter(|line| line.contains("ritical")).collect();
    assert!(unreadable.is_empty(), "{unreadable:#?}");
}

/// One side has a broker, a multiplier and a generator of each parity. The other has all the rest.
async fn the_network_is_partitioned(cluster: &Cluster) {
    cluster.heals().await;
    let other = format!("{}-other", cluster::PROJECT);
    docker(&["network", "create", &other]);
    let container = |service: &str| (containers(service).remove(0), service.to_owned());
    let part = ["nats-3", "multiplier", "even", "odd"].map(container);
    let watch = Watch::start().await;
    for (container, service) in &part {
        cluster::disconnect(container);
        docker(&["network", "connect", "--alias", service, &other, container]);
    }
    tokio::time::sleep(Duration::from_secs(20)).await;
    for (container, service) in &part {
        docker(&["network", "disconnect", &other, container]);
        cluster::reconnect(container, service);
    }
    docker(&["network", "rm", &other]);
    cluster.heals().await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    let watched = watch.stop(&cluster.operator).await;
    println!("  network partition: {watched:?}");
    assert_eq!(watched.missed, []);
    assert_eq!(watched.heard_twice_beside(&part[0].0), 0);
}
