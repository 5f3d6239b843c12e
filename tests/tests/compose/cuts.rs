//! Brokers, multipliers and gateways are taken off the network and put back.

use std::time::Duration;

use contract::streams::TICKS;
use tests::cluster::{self, BROKERS, compose, containers};
use tests::watch::{Follow, Poll, Watch, between_ticks, without_gap_or_repeat};

use crate::Cluster;

pub async fn any_cable_may_break(cluster: Cluster) {
    let brokers = BROKERS.map(|broker| (cluster::container(broker), broker));
    let services = ["multiplier", "gateway"]
        .into_iter()
        .flat_map(|service| containers(service).into_iter().map(move |name| (name, service)));
    for (container, service) in brokers.into_iter().chain(services) {
        cluster.heals().await;
        let ticks = cluster::stream_info(&cluster.operator, TICKS).await.unwrap();
        let leads = ticks.cluster.unwrap().leader.as_deref() == Some(service);
        let (watch, poll, follow) = (Watch::start().await, Poll::start(), Follow::start());
        tokio::time::sleep(Duration::from_secs(2)).await;
        between_ticks().await;
        cluster::disconnect(&container);
        tokio::time::sleep(Duration::from_secs(12)).await;
        cluster::reconnect(&container, service);
        tokio::time::sleep(Duration::from_secs(8)).await;
        let (polled, sequences) = (poll.stop().await, follow.stop().await);
        let watched = watch.stop(&cluster.operator).await;
        println!(
            "  {container}{}: {} missed, {} doubled, tick gap {} ms, publish delay {} ms ({} late), {} \
             requests, the longest time without an answer {} ms",
            if leads { ", which leads TICKS" } else { "" },
            watched.missed.len(),
            watched.doubled.len(),
            watched.tick_gap.as_millis(),
            watched.publish_delay.as_millis(),
            watched.late,
            polled.answered,
            polled.longest_gap.as_millis(),
        );
        assert_eq!(polled.faults, Vec::<String>::new(), "{container}");
        // What a gateway has taken and cannot answer is asked of another one after 5 s.
        assert!(polled.longest_gap < Duration::from_secs(7), "{container}: {polled:?}");
        assert!(without_gap_or_repeat(&sequences), "{container}: {sequences:?}");
        // A broker that is cut off takes, at worst, the leader of claims and all multipliers'
        // connections with it in one moment (docs/adr/0001-slots-and-claims.md).
        assert!(watched.missed.len() <= usize::from(leads), "{container}: {watched:?}");
        assert!(watched.doubled.is_empty(), "{container}: {watched:?}");
    }
    cluster.heals().await;
    // Brokers that know each other by address find no certificate for it, and try again for ever.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let log = compose(&[&["logs", "--no-color", "--since", "3s"], &BROKERS[..]].concat());
    assert!(!log.contains("handshake error"), "{log}");
    // A store that cannot be read any more (docs/adr/0011-no-compression.md) is told of once, when its
    // server has forgotten what it wrote and reads it: after a while without publications.
    let log = compose(&[&["logs", "--no-color"], &BROKERS[..]].concat());
    let unreadable: Vec<_> = log.lines().filter(|line| line.contains("ritical")).collect();
    assert!(unreadable.is_empty(), "{unreadable:#?}");
}
