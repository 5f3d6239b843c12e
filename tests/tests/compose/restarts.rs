//! Orderly restarts of the brokers, one after the other, and of the whole cluster.

use std::collections::BTreeMap;
use std::time::Duration;

use contract::streams::NUMBERS;
use tests::cluster::{self, BROKERS, HTTP, Keys, compose, in_time};
use tests::http::try_get;
use tests::watch::{Follow, Poll, Watch, without_gap_or_repeat};

use crate::Cluster;

pub async fn brokers_are_restarted_in_turn(cluster: Cluster) {
    cluster.heals().await;
    let (poll, follow) = (Poll::start(), Follow::start());
    for broker in BROKERS {
        cluster.heals().await;
        let watch = Watch::start().await;
        // Sends SIGUSR2 (lame duck mode), and starts the server again when it has ended.
        tokio::task::block_in_place(|| compose(&["restart", broker]));
        let watched = watch.stop(&cluster.operator).await;
        println!(
            "  {broker}: tick gap {} ms, publish delay {} ms",
            watched.tick_gap.as_millis(),
            watched.publish_delay.as_millis()
        );
        assert_eq!((watched.missed, watched.heard_twice), (vec![], BTreeMap::new()), "{broker}");
        assert_eq!(
            watched.late, 0,
            "{broker}: a product was published in a later slot than its own"
        );
    }
    cluster.heals().await;
    let (polled, sequences) = (poll.stop().await, follow.stop().await);
    assert_eq!(polled.faults, Vec::<String>::new());
    assert!(without_gap_or_repeat(&sequences), "{sequences:?}");
    everything_goes_down_and_up(cluster).await;
}

async fn everything_goes_down_and_up(cluster: Cluster) {
    let before = cluster::stream_info(&cluster.operator, NUMBERS).await.unwrap();
    let keys = cluster.keys.contents();
    tokio::task::block_in_place(|| {
        compose(&["down"]);
        compose(&["up", "--detach"]);
    });
    let again = Keys::copy(&cluster.scratch, "again");
    assert_eq!(again.contents(), keys);
    in_time("the history goes on", async || {
        let answer = try_get(HTTP, "/numbers").await;
        answer.is_ok_and(|answer| {
            answer.status == 200
                && answer.json()["last_seq"].as_u64() > Some(before.state.last_sequence + 2)
        })
    })
    .await;
    let operator = again.operator().await;
    let after = cluster::stream_info(&operator, NUMBERS).await.unwrap();
    assert_eq!(after.created, before.created);
    assert_eq!(after.state.first_sequence, 1);
    let verified = compose(&["run", "--rm", "provision", "verify"]);
    println!("  {}", verified.replace('\n', "\n  "));

    // A second `up` changes nothing.
    let started = cluster::containers("").into_iter().map(started_at).collect::<Vec<_>>();
    tokio::task::block_in_place(|| compose(&["up", "--detach"]));
    assert_eq!(cluster::containers("").into_iter().map(started_at).collect::<Vec<_>>(), started);
    assert_eq!(Keys::copy(&cluster.scratch, "once more").contents(), keys);

    // Without its volumes everything is new.
    tokio::task::block_in_place(|| compose(&["down", "--volumes"]));
    crate::start::from_nothing().await;
    let new = Cluster::attach().await;
    let secrets = new.keys.contents();
    for (file, content) in &keys {
        assert_ne!(Some(content), secrets.get(file), "{file}");
    }
    let info = cluster::stream_info(&new.operator, NUMBERS).await.unwrap();
    assert_ne!(info.created, before.created);
    assert!(info.state.last_sequence < before.state.last_sequence);
    tokio::time::sleep(Duration::from_secs(1)).await;
}

/// A container, and when it was started.
pub fn started_at(container: String) -> (String, String) {
    let at = cluster::inspect(&container, "{{.State.StartedAt}}");
    (container, at)
}
