//! The first start of the cluster, and checks of what then runs.

use contract::Message;
use std::time::{Duration, Instant};

use contract::streams::{NUMBERS, TICKS};
use futures::StreamExt;
use serde_json::{Value, json};
use tests::cluster::{self, BROKERS, HTTP, NATS, compose, containers, docker, in_time, inspect};
use tests::http::{get, try_get};
use tests::patience;

use crate::Cluster;

/// The number of containers of each service after the start.
const CONTAINERS: [(&str, usize); 9] = [
    ("nats-1", 1),
    ("nats-2", 1),
    ("nats-3", 1),
    ("even", 2),
    ("odd", 2),
    ("multiplier", 2),
    ("gateway", 2),
    ("haproxy", 1),
    ("keys", 0),
];

/// `docker compose up`, with the images in place: there are records within a minute.
pub async fn from_nothing() {
    let begun = Instant::now();
    compose(&["up", "--detach"]);
    let up = begun.elapsed();
    in_time("there are records", async || {
        let answer = try_get(HTTP, "/numbers").await;
        answer.is_ok_and(|answer| answer.status == 200 && answer.json()["count"] != 0)
    })
    .await;
    let numbers = begun.elapsed();
    assert!(numbers < Duration::from_mins(1), "{numbers:?}");
    println!(
        "up after {:.1} s, the first record after {:.1} s",
        up.as_secs_f64(),
        numbers.as_secs_f64()
    );
}

pub async fn the_cluster_is_redundant(cluster: Cluster) {
    cluster.heals().await;
    for (service, count) in CONTAINERS {
        assert_eq!(containers(service).len(), count, "{service}");
    }
    for broker in BROKERS {
        let varz = ["wget", "-q", "-O", "-", "http://127.0.0.1:8222/varz"];
        let varz = docker(&[&["exec", &cluster::container(broker)], &varz[..]].concat());
        let varz: Value = varz.parse().unwrap();
        assert_eq!(varz["jetstream"]["config"]["sync_always"], true, "{broker}: {varz}");
    }
    for stream in [NUMBERS, TICKS] {
        let info = cluster::stream_info(&cluster.operator, stream).await.unwrap();
        assert_eq!(info.config.num_replicas, 3, "{stream}");
        let group = info.cluster.unwrap();
        let mut members: Vec<_> = group.replicas.iter().map(|peer| peer.name.clone()).collect();
        members.extend(group.leader);
        members.sort();
        assert_eq!(members, BROKERS, "{stream}");
    }
    // A client with the defaults of its library: no key, no certificate.
    let anybody = async_nats::connect(NATS).await.unwrap();
    let mut live = anybody.subscribe("numbers.published").await.unwrap();
    let message = tokio::time::timeout(patience(), live.next()).await.unwrap();
    contract::Product::decode(&message.unwrap().payload).unwrap();
    for (path, status) in [("/", 200), ("/metrics", 404), ("/%6Detrics/", 404), ("/replicas", 200)]
    {
        assert_eq!(get(HTTP, path, &[]).await.status, status, "{path}");
    }
    in_time("all replicas are alive", async || {
        let replicas = get(HTTP, "/replicas", &[]).await.json();
        replicas["replicas"].as_array().is_some_and(|all| all.len() == 8)
    })
    .await;
    every_container_is_confined();
    secrets_are_where_they_belong(&cluster);
    println!(
        "images: {}",
        docker(&["images", "--format", "{{.Repository}}:{{.Tag}} {{.Size}}", "evenodd"])
    );
    let containers = containers("");
    let mut stats = vec!["stats", "--no-stream", "--format", "  {{.Name}} {{.MemUsage}}"];
    stats.extend(containers.iter().map(String::as_str));
    println!("memory:\n{}", docker(&stats));
}

fn every_container_is_confined() {
    for container in containers("") {
        let host: Value = inspect(&container, "{{json .HostConfig}}").parse().unwrap();
        let set = json!({
            "ReadonlyRootfs": true,
            "CapDrop": ["ALL"],
            "CapAdd": null,
            "SecurityOpt": ["no-new-privileges:true"],
            "Privileged": false,
            "RestartPolicy": { "Name": "unless-stopped", "MaximumRetryCount": 0 },
            "LogConfig": { "Type": "json-file", "Config": { "max-file": "3", "max-size": "10m" } },
        });
        for (setting, value) in set.as_object().unwrap() {
            assert_eq!(&host[setting], value, "{container}: {setting}");
        }
        for limit in ["Memory", "PidsLimit"] {
            assert!(host[limit].as_u64() > Some(0), "{container}: {limit}");
        }
        let user = inspect(&container, "{{.Config.User}}");
        assert!(
            !user.is_empty() && !user.starts_with('0') && user != "root",
            "{container}: {user}"
        );
    }
    let published = compose(&["ps", "--format", "{{.Service}} {{.Publishers}}"]);
    for line in
        published.lines().filter(|line| line.contains("127.0.0.1") || line.contains("0.0.0.0"))
    {
        assert!(line.starts_with("haproxy "), "{line}");
        assert!(!line.contains("0.0.0.0"), "only this machine reaches the ports: {line}");
    }
}

/// Only the service that needs a secret can read it in the volume. The groups ensure this.
fn secrets_are_where_they_belong(cluster: &Cluster) {
    let volume = format!("{}:/keys:ro", "evenodd-test_keys");
    for (service, own) in [
        ("even", "even.nk"),
        ("gateway", "gateway.nk"),
        ("nats-2", "nats-2.key"),
        ("keys", "ca.key"),
    ] {
        let user = inspect(&cluster::container(service), "{{.Config.User}}");
        for file in cluster.keys.contents().keys() {
            // Uses the image of the brokers because it has a shell. Only the user matters.
            let read = format!("cat /keys/{file} >/dev/null 2>&1 && echo yes || echo no");
            let args = ["run", "--rm", "--user", &user, "--volume", &volume, "--entrypoint", "sh"];
            let args = [&args[..], &["nats:2.15.1-alpine", "-c", &read]].concat();
            let public = file.ends_with(".pem") || file == "users.conf";
            // The service `keys` owns all files, because it made them.
            let may = public || file == own || service == "keys";
            assert_eq!(docker(&args), if may { "yes" } else { "no" }, "{service} and {file}");
        }
    }
    for image in ["evenodd", "haproxy:3.2-alpine", "nats:2.15.1-alpine"] {
        let history = docker(&["history", "--no-trunc", image]);
        assert!(!history.contains("PRIVATE"), "{image}");
    }
}
