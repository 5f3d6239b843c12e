//! SIGKILL to each container in turn, and to all brokers at once.

use std::slice;
use std::time::Duration;

use contract::streams::NUMBERS;
use tests::cluster::{self, BROKERS, compose, containers, in_time, inspect};
use tests::watch::{Follow, Poll, Watch, without_gap_or_repeat};

use crate::Cluster;

pub async fn any_process_may_be_killed(cluster: Cluster) {
    for container in containers("") {
        cluster.heals().await;
        let before = inspect(&container, "{{.RestartCount}}");
        let (watch, poll, follow) = (Watch::start().await, Poll::start(), Follow::start());
        tokio::time::sleep(Duration::from_secs(2)).await;
        cluster::crash(slice::from_ref(&container));
        // A leader election takes 4 to 9 s.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let (polled, sequences) = (poll.stop().await, follow.stop().await);
        let watched = watch.stop(&cluster.operator).await;
        println!(
            "  {container}: tick gap {} ms, publish delay {} ms ({} late), {} requests, the longest \
             time without an answer {} ms",
            watched.tick_gap.as_millis(),
            watched.publish_delay.as_millis(),
            watched.late,
            polled.answered,
            polled.longest_gap.as_millis(),
        );
        assert_eq!(watched.missed, [], "{container}");
        // When the leader of the history crashes, the next leader may send its last message again.
        let again = usize::from(container.contains("nats-"));
        assert!(
            watched.heard_twice.values().all(|count| *count <= again),
            "{container}: {watched:?}"
        );
        assert_eq!(watched.without_numbers, [], "{container}");
        // Nothing can be reached until Docker has restarted HAProxy.
        if !container.contains("haproxy") {
            assert_eq!(polled.faults, Vec::<String>::new(), "{container}");
            assert!(without_gap_or_repeat(&sequences), "{container}: {sequences:?}");
        }
        in_time("it is started again", async || inspect(&container, "{{.RestartCount}}") != before)
            .await;
    }
    cluster.heals().await;
}

/// With this many messages, a block of the history is so large that a server may rewrite it when it
/// starts.
const REWRITTEN: u64 = 320;

/// All brokers crash at the same moment, three times.
pub async fn all_brokers_may_be_killed_at_once(cluster: Cluster) {
    let brokers = BROKERS.map(cluster::container);
    // About 80 are published in a minute.
    cluster::within(Duration::from_mins(6), "there are enough messages", async || {
        let info = cluster::stream_info(&cluster.operator, NUMBERS).await;
        info.is_some_and(|info| info.state.last_sequence >= REWRITTEN)
    })
    .await;
    for _ in 0..3 {
        cluster.heals().await;
        let (watch, poll, follow) = (Watch::start().await, Poll::start(), Follow::start());
        tokio::time::sleep(Duration::from_secs(3)).await;
        cluster::crash(&brokers);
        cluster.heals().await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        let (polled, sequences) = (poll.stop().await, follow.stop().await);
        let watched = watch.stop(&cluster.operator).await;
        println!(
            "  {} slots missed, tick gap {} ms, heard twice {:?}, {} requests, the longest time without an \
             answer {} ms",
            watched.missed.len(),
            watched.tick_gap.as_millis(),
            watched.heard_twice,
            polled.answered,
            polled.longest_gap.as_millis(),
        );
        assert_eq!((watched.missed, watched.without_numbers), (vec![], vec![]));
        assert_eq!(polled.faults, Vec::<String>::new());
        assert!(without_gap_or_repeat(&sequences), "{sequences:?}");
    }
    println!("  {}", compose(&["run", "--rm", "provision", "verify"]).replace('\n', "\n  "));
}
