//! Each user may do what it needs and nothing else; whoever is none may look.

use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, HeaderMap};
use contract::{Draw, Message};
use futures::{FutureExt, StreamExt};
use tests::cluster::{self, BROKERS, NATS, USERS, compose, container, docker, inspect, ip};
use tests::patience;
use tokio::sync::mpsc;

use crate::Cluster;

/// What one may try to publish to. Messages carry a header with which no stream takes them.
const PUBLISH: [&str; 32] = [
    "numbers.even",
    "numbers.odd",
    "numbers.publish",
    "numbers.published",
    "ticks.draw",
    "ticks.done",
    "elsewhere",
    "$JS.API.INFO",
    "$JS.API.STREAM.CREATE.OTHER",
    "$JS.API.STREAM.UPDATE.NUMBERS",
    "$JS.API.STREAM.DELETE.NUMBERS",
    "$JS.API.STREAM.PURGE.NUMBERS",
    "$JS.API.STREAM.MSG.DELETE.NUMBERS",
    "$JS.API.STREAM.MSG.GET.NUMBERS",
    "$JS.API.STREAM.SNAPSHOT.NUMBERS",
    "$JS.API.STREAM.RESTORE.NUMBERS",
    "$JS.API.STREAM.LEADER.STEPDOWN.NUMBERS",
    "$JS.API.STREAM.PEER.REMOVE.NUMBERS",
    "$JS.API.CONSUMER.CREATE.NUMBERS",
    "$JS.API.STREAM.DELETE.TICKS",
    "$JS.API.STREAM.INFO.NUMBERS",
    "$JS.API.DIRECT.GET.NUMBERS",
    "$JS.API.DIRECT.GET.TICKS",
    "$SRV.PING",
    "$SRV.STATS",
    "$SYS.REQ.SERVER.PING",
    "_INBOX.x",
    "_INBOX_even.x",
    "_INBOX_odd.x",
    "_INBOX_multiplier.x",
    "_INBOX_gateway.x",
    "_INBOX_operator.x",
];

/// What one may try to listen to: a subject, and perhaps a queue group.
const SUBSCRIBE: [&str; 22] = [
    ">",
    "*.*",
    "numbers.published",
    "numbers.even",
    "numbers.even even",
    "numbers.even other",
    "numbers.odd odd",
    "numbers.publish",
    "ticks.draw",
    "ticks.done",
    "$SRV.PING",
    "$SRV.STATS.even",
    "$SRV.STATS.multiplier.x",
    "$SRV.STATS.gateway.x",
    "$JS.API.>",
    "$JS.EVENT.>",
    "_INBOX.>",
    "_INBOX_even.>",
    "_INBOX_multiplier.>",
    "_INBOX_gateway.>",
    "_INBOX_operator.>",
    "_INBOX_*.>",
];

/// Who may do which of these.
const ALLOWED: [(&str, &[&str], &[&str]); 5] = [
    (
        "even",
        &["_INBOX_multiplier.x", "_INBOX_gateway.x", "_INBOX_operator.x"],
        &["numbers.even even", "$SRV.PING", "$SRV.STATS.even"],
    ),
    (
        "odd",
        &["_INBOX_multiplier.x", "_INBOX_gateway.x", "_INBOX_operator.x"],
        &["numbers.odd odd", "$SRV.PING"],
    ),
    (
        "multiplier",
        &[
            "numbers.even",
            "numbers.odd",
            "numbers.publish",
            "ticks.draw",
            "$JS.API.DIRECT.GET.TICKS",
            "_INBOX_gateway.x",
            "_INBOX_operator.x",
        ],
        &["ticks.done", "$SRV.PING", "$SRV.STATS.multiplier.x", "_INBOX_multiplier.>"],
    ),
    (
        "gateway",
        &[
            "$JS.API.STREAM.INFO.NUMBERS",
            "$JS.API.DIRECT.GET.NUMBERS",
            "$SRV.STATS",
            "_INBOX_gateway.x",
            "_INBOX_operator.x",
        ],
        &[
            "numbers.published",
            "ticks.done",
            "$SRV.PING",
            "$SRV.STATS.gateway.x",
            "_INBOX_gateway.>",
        ],
    ),
    ("viewer", &[], &["numbers.published", "ticks.done"]),
];

/// A connection, and what the server refuses on it.
struct User {
    client: Client,
    refusals: mpsc::UnboundedReceiver<String>,
}

impl User {
    async fn connect(options: ConnectOptions) -> Self {
        let (refused, refusals) = mpsc::unbounded_channel();
        let options = options.event_callback(move |event| {
            if let Event::ServerError(error) = &event {
                let _ = refused.send(error.to_string());
            }
            std::future::ready(())
        });
        Self { client: options.connect(NATS).await.unwrap(), refusals }
    }

    /// Whether the server refuses what was just asked of it. It says nothing if it does not.
    async fn is_refused(&mut self, expected: bool) -> bool {
        self.client.flush().await.unwrap();
        let patience = if expected { patience() } else { Duration::from_millis(100) };
        tokio::time::timeout(patience, self.refusals.recv()).await.is_ok()
    }

    async fn publish(&self, subject: &str) {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Expected-Stream", "NONE");
        self.client.publish_with_headers(subject.to_owned(), headers, "".into()).await.unwrap();
    }
}

pub async fn everybody_may_do_what_they_need(cluster: Cluster) {
    cluster.heals().await;
    for (name, publish, subscribe) in ALLOWED {
        let options =
            if name == "viewer" { ConnectOptions::new() } else { cluster.keys.options(name) };
        let mut user = User::connect(options).await;
        for subject in PUBLISH {
            user.publish(subject).await;
            let refused = !publish.contains(&subject);
            assert_eq!(user.is_refused(refused).await, refused, "{name} publishes to {subject}");
        }
        for subscription in SUBSCRIBE {
            let (subject, queue) = subscription.split_once(' ').unwrap_or((subscription, ""));
            let (subject, queue) = (subject.to_owned(), queue.to_owned());
            let _subscriber = match queue.as_str() {
                "" => user.client.subscribe(subject).await.unwrap(),
                _ => user.client.queue_subscribe(subject, queue).await.unwrap(),
            };
            let refused = !subscribe.contains(&subscription);
            assert_eq!(user.is_refused(refused).await, refused, "{name} listens to {subscription}");
        }
        // None of the lists has a word that is not tried.
        assert!(publish.iter().all(|subject| PUBLISH.contains(subject)));
        assert!(subscribe.iter().all(|subject| SUBSCRIBE.contains(subject)));
    }
    nobody_writes_through_a_reply_subject(&cluster).await;
    // The services themselves have asked for nothing that they may not.
    let logs = compose(&["logs", "--no-color", "multiplier", "gateway"]);
    assert!(!logs.contains("Violation"), "{logs}");
}

/// Whoever asks names the subject of the answer. Whoever answers must not follow blindly.
async fn nobody_writes_through_a_reply_subject(cluster: &Cluster) {
    let gateway = User::connect(cluster.keys.options("gateway")).await.client;
    let mut draws = cluster.operator.subscribe("ticks.*").await.unwrap();
    cluster.operator.flush().await.unwrap();
    for (asker, subject) in [
        (&cluster.operator, "numbers.even"),
        (&cluster.operator, "numbers.odd"),
        (&cluster.operator, "$SRV.PING"),
        (&gateway, "$SRV.STATS"),
    ] {
        for reply in ["numbers.publish", "ticks.draw", "ticks.done"] {
            asker.publish_with_reply(subject, reply, "".into()).await.unwrap();
        }
        asker.flush().await.unwrap();
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut heard = 0;
    while let Some(Some(message)) = draws.next().now_or_never() {
        assert!(Draw::decode(&message.payload).is_ok(), "{message:?}");
        heard += 1;
    }
    assert!(heard > 0);
    let verified = compose(&["run", "--rm", "provision", "verify"]);
    println!("  {}", verified.lines().last().unwrap());
}

/// Without a key there is only what `viewer` may; without a certificate there are no routes.
pub async fn strangers_are_refused(cluster: Cluster) {
    cluster.heals().await;
    let ips = BROKERS.map(|broker| ip(&container(broker)));
    // Another cluster's keys: an authority, a server's certificate and users that are unknown here.
    let foreign = cluster.scratch.path("foreign");
    let directory = foreign.to_str().unwrap();
    let image = ["run", "--rm", "--user", "0", "--entrypoint", "evenodd", "--volume"];
    let volume = format!("{directory}:/keys");
    docker(&[&image[..], &[&volume, "evenodd", "keys", "--directory", "/keys"]].concat());
    for user in USERS {
        let seed = std::fs::read_to_string(foreign.join(format!("{user}.nk"))).unwrap();
        let options = ConnectOptions::new().nkey(seed).require_tls(true);
        let error = options
            .add_root_certificates(cluster.keys.path("ca.pem"))
            .connect(NATS)
            .await
            .expect_err("a foreign key is taken");
        assert!(error.to_string().contains("authorization violation"), "{error}");
        let options = cluster.keys.options(user).add_root_certificates(foreign.join("ca.pem"));
        let connected = tokio::time::timeout(Duration::from_secs(3), async {
            let client = options.connect(NATS).await.unwrap();
            while client.connection_state() != async_nats::connection::State::Connected {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        assert!(connected.await.is_err(), "a service trusts a foreign certificate");
    }
    // Somebody who would be a member of the cluster: in the clear, with a foreign certificate, and,
    // so that this test can fail, with the right one.
    for (tls, joins) in [(String::new(), false), (tls("/foreign"), false), (tls("/right"), true)] {
        let configuration = cluster.scratch.path("stranger.conf");
        let routes =
            ips.iter().map(|ip| format!("\"nats://{ip}:6222\"")).collect::<Vec<_>>().join(", ");
        std::fs::write(
            &configuration,
            format!(
                "server_name: stranger\nport: 4222\ncluster {{ name: evenodd, port: 6222, routes: [{routes}]\n{tls} }}"
            ),
        )
        .unwrap();
        let file = format!("{}:/stranger.conf:ro", configuration.display());
        let foreign = format!("{directory}:/foreign:ro");
        let right = format!("{}:/right:ro", cluster.keys.path("").display());
        let stranger = docker(&[
            "run",
            "--detach",
            "--network",
            &cluster::network(),
            "--user",
            "0",
            "--volume",
            &file,
            "--volume",
            &foreign,
            "--volume",
            &right,
            "nats:2.15.1-alpine",
            "--config",
            "/stranger.conf",
        ]);
        tokio::time::sleep(Duration::from_secs(4)).await;
        let seen = BROKERS.iter().any(|broker| routes_of(broker).contains("stranger"));
        let running = inspect(&stranger, "{{.State.Running}}") == "true";
        docker(&["rm", "--force", &stranger]);
        assert!(running, "it is no server");
        assert_eq!(seen, joins, "with {tls:?}");
    }
    cluster.heals().await;
}

fn tls(mounted: &str) -> String {
    format!(
        "tls {{ cert_file: \"{mounted}/nats-1.pem\", key_file: \"{mounted}/nats-1.key\", \
         ca_file: \"{mounted}/ca.pem\", verify: true, insecure: true }}"
    )
}

/// What a broker's monitoring says of its routes.
fn routes_of(broker: &str) -> String {
    let url = "http://127.0.0.1:8222/routez";
    docker(&["exec", &container(broker), "wget", "-q", "-O", "-", url])
}
