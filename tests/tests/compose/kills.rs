//! SIGKILL to each container in turn.

use std::time::Duration;

use contract::Slot;
use tests::cluster::{self, containers, in_time, inspect};
use tests::watch::{Follow, Poll, Watch, between_ticks, without_gap_or_repeat};

use crate::Cluster;

pub async fn any_process_may_die(cluster: Cluster) {
    for container in containers("") {
        cluster.heals().await;
        let before = inspect(&container, "{{.RestartCount}}");
        let (watch, poll, follow) = (Watch::start().await, Poll::start(), Follow::start());
        tokio::time::sleep(Duration::from_secs(2)).await;
        between_ticks().await;
        cluster::crash(&container);
        // An election takes 4 to 9 s.
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
        assert_eq!((watched.missed, watched.doubled), (Vec::<Slot>::new(), vec![]), "{container}");
        // The way in itself is away until Docker has started it again.
        if !container.contains("haproxy") {
            assert_eq!(polled.faults, Vec::<String>::new(), "{container}");
            assert!(without_gap_or_repeat(&sequences), "{container}: {sequences:?}");
        }
        in_time("it is started again", async || inspect(&container, "{{.RestartCount}}") != before)
            .await;
    }
    cluster.heals().await;
}
