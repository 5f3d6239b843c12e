//! Each user may do what it needs and nothing else. Clients without a key may only subscribe.

use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, HeaderMap};
use contract::{Draw, Message};
use futures::{FutureExt, StreamExt};
use tests::cluster::{self, BROKERS, NATS, USERS, compose, container, docker, inspect, ip};
use tests::patience;
use tokio::sync::mpsc;

use crate::Cluster;

/// The subjects to which each user tries to publish. A header keeps the streams from storing the
/// messages.
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

/// What each user tries to subscribe to: a subject, and a queue group after a space.
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

/// For each user, the subjects and subscriptions that are allowed.
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

/// A connection, and the refusals that the server has sent on it.
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

    /// Whether the server refuses the last operation. The server sends nothing if it allows it.
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

pub async fn each_user_may_do_only_what_it_needs(cluster: Cluster) {
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
        // Everything that is allowed is among what is tried.
        assert!(publish.iter().all(|subject| PUBLISH.contains(subject)));
        assert!(subscribe.iter().all(|subject| SUBSCRIBE.contains(subject)));
    }
    no_service_replies_to_a_subject_of_the_pipeline(&cluster).await;
    // The services themselves have tried nothing that is forbidden.
    let logs = compose(&["logs", "--no-color", "multiplier", "gateway"]);
    assert!(!logs.contains("Violation"), "{logs}");
}

/// The requester chooses the reply subject. A service must not reply to a subject of the pipeline.
async fn no_service_replies_to_a_subject_of_the_pipeline(cluster: &Cluster) {
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

/// A foreign key is refused, and so is a server with a foreign certificate.
pub async fn strangers_are_refused(cluster: Cluster) {
    cluster.heals().await;
    let ips = BROKERS.map(|broker| ip(&container(broker)));
    // The keys of another cluster: an authority, server certificates and users unknown to this one.
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
            .expect_err("a foreign key is accepted");
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
    // A server tries to join the cluster: without TLS, with a foreign certificate, and with the
    // right one. The last attempt succeeds, which shows that the test can detect a join.
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
        assert!(running, "the server does not run");
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

/// The routes of a broker, from its monitoring.
fn routes_of(broker: &str) -> String {
    let url = "http://127.0.0.1:8222/routez";
    docker(&["exec", &container(broker), "wget", "-q", "-O", "-", url])
}
