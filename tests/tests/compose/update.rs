//! `make update`: a new version of the services, while people use them.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use tests::cluster::{BROKERS, PROJECT, compose, container, containers, docker, inspect, run};
use tests::watch::{Follow, Poll, Watch, without_gap_or_repeat};

use crate::Cluster;
use crate::restarts::started_at;

const SERVICES: [(&str, usize); 4] = [("even", 2), ("odd", 2), ("multiplier", 2), ("gateway", 3)];

pub async fn a_new_version_takes_over(cluster: Cluster) {
    let new = inspect_image();
    tokio::task::block_in_place(|| {
        // What runs at first is another image.
        let mut build = Command::new("docker");
        build.args(["build", "--quiet", "--tag", "evenodd", "-"]).stdin(Stdio::piped());
        let mut build = build.stdout(Stdio::null()).spawn().unwrap();
        let dockerfile = b"FROM evenodd\nLABEL version=before\n";
        std::io::Write::write_all(&mut build.stdin.take().unwrap(), dockerfile).unwrap();
        assert!(build.wait().unwrap().success());
        compose(&["up", "--detach", "--scale", "gateway=3"]);
    });
    cluster.heals().await;
    let others = || BROKERS.map(container).map(started_at);
    let untouched = others();
    let (watch, poll, follow) = (Watch::start().await, Poll::start(), Follow::start());
    tokio::task::block_in_place(|| {
        let _ = run("env", &[&format!("COMPOSE_PROJECT_NAME={PROJECT}"), "make", "update"]);
    });
    let (polled, sequences) = (poll.stop().await, follow.stop().await);
    let watched = watch.stop(&cluster.operator).await;
    println!(
        "  {} requests, the longest time without an answer {} ms; {watched:?}",
        polled.answered,
        polled.longest_gap.as_millis(),
    );
    assert_eq!(inspect_image(), new);
    assert_eq!(others(), untouched);
    for (service, count) in SERVICES {
        let containers = containers(service);
        assert_eq!(containers.len(), count, "{service}");
        for name in containers {
            assert_eq!(inspect(&name, "{{.Image}}"), new, "{name}");
        }
    }
    // The next `up` finds nothing to do.
    let before: Vec<_> = containers("").into_iter().map(started_at).collect();
    tokio::task::block_in_place(|| compose(&["up", "--detach", "--scale", "gateway=3"]));
    let after: Vec<_> = containers("").into_iter().map(started_at).collect();
    assert_eq!(after, before);
    assert_eq!(polled.faults, Vec::<String>::new());
    assert!(without_gap_or_repeat(&sequences), "{sequences:?}");
    assert_eq!((watched.missed, watched.heard_twice), (vec![], BTreeMap::new()));
}

fn inspect_image() -> String {
    docker(&["image", "inspect", "--format", "{{.Id}}", "evenodd"])
}
