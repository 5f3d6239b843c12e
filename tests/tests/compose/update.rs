//! `deploy/update`: the services get another version while clients use them.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use tests::cluster::{BROKERS, PROJECT, compose, container, containers, docker, inspect};
use tests::repository;
use tests::watch::{Follow, Poll, Watch, without_gap_or_repeat};

use crate::Cluster;
use crate::restarts::started_at;

const SERVICES: [(&str, usize); 4] = [("even", 2), ("odd", 2), ("multiplier", 2), ("gateway", 3)];

/// Clients that must see no gap while something happens.
struct Users(Watch, Poll, Follow);

impl Users {
    async fn start() -> Self {
        Self(Watch::start().await, Poll::start(), Follow::start())
    }

    async fn saw_nothing(self, cluster: &Cluster) {
        let (polled, sequences) = (self.1.stop().await, self.2.stop().await);
        let watched = self.0.stop(&cluster.operator).await;
        println!(
            "  {} requests, the longest time without an answer {} ms; {watched:?}",
            polled.answered,
            polled.longest_gap.as_millis(),
        );
        assert_eq!(polled.faults, Vec::<String>::new());
        assert!(without_gap_or_repeat(&sequences), "{sequences:?}");
        assert_eq!((watched.missed, watched.heard_twice), (vec![], BTreeMap::new()));
    }
}

pub async fn a_new_version_takes_over(cluster: Cluster) {
    let new = image_id("evenodd");
    // At first the services run another image.
    build("evenodd", "FROM evenodd\nLABEL version=before\n");
    let before = image_id("evenodd");
    tokio::task::block_in_place(|| compose(&["up", "--detach", "--scale", "gateway=3"]));
    cluster.heals().await;
    let brokers = || BROKERS.map(container).map(started_at);
    let untouched = brokers();

    let users = Users::start().await;
    assert!(update(&[]));
    all_run(&new);
    users.saw_nothing(&cluster).await;
    // The next `up` changes nothing.
    let started = || containers("").into_iter().map(started_at).collect::<Vec<_>>();
    let running = started();
    tokio::task::block_in_place(|| compose(&["up", "--detach", "--scale", "gateway=3"]));
    assert_eq!(started(), running);

    // A version that does not become healthy is removed again.
    let copy = "FROM evenodd\nCOPY --from=evenodd /usr/local/bin/evenodd /usr/local/bin/gateway\n";
    build("evenodd:broken", copy);
    let users = Users::start().await;
    assert!(!update(&["evenodd:broken"]));
    users.saw_nothing(&cluster).await;
    assert_eq!(started(), running);
    all_run(&new);

    // A healthy version can be undone too.
    let users = Users::start().await;
    assert!(update(&["evenodd:previous"]));
    users.saw_nothing(&cluster).await;
    all_run(&before);
    assert_eq!(brokers(), untouched);
    assert!(update(&["evenodd:previous"]));
    all_run(&new);
}

/// Runs `deploy/update`, and returns whether it succeeded.
fn update(args: &[&str]) -> bool {
    tokio::task::block_in_place(|| {
        let mut update = Command::new("deploy/update");
        update.args(args).current_dir(repository()).env("COMPOSE_PROJECT_NAME", PROJECT);
        let output = update.output().unwrap();
        println!(
            "  {}",
            String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default()
        );
        output.status.success()
    })
}

fn build(image: &str, dockerfile: &str) {
    tokio::task::block_in_place(|| {
        let mut build = Command::new("docker");
        build.args(["build", "--quiet", "--tag", image, "-"]).stdin(Stdio::piped());
        let mut build = build.stdout(Stdio::null()).spawn().unwrap();
        build.stdin.take().unwrap().write_all(dockerfile.as_bytes()).unwrap();
        assert!(build.wait().unwrap().success());
    });
}

fn image_id(image: &str) -> String {
    docker(&["image", "inspect", "--format", "{{.Id}}", image])
}

/// All replicas of every service run this image, and new ones will too.
fn all_run(image: &str) {
    assert_eq!(image_id("evenodd"), image);
    for (service, count) in SERVICES {
        let containers = containers(service);
        assert_eq!(containers.len(), count, "{service}");
        for name in containers {
            assert_eq!(inspect(&name, "{{.Image}}"), image, "{name}");
        }
    }
}
