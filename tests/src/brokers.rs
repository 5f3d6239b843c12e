//! A cluster of three real nats-servers, as processes of this machine.

use std::fs;

use async_nats::jetstream;
use async_nats::{Client, ConnectOptions};
use nix::sys::signal::Signal;

use crate::{NATS_PORT, Process, Scratch, eventually, nats_server, network, repository};

/// The number of servers.
pub const COUNT: usize = 3;

/// A cluster of nats-servers, with the settings of `nats/single.conf` and without keys.
pub struct Brokers {
    nodes: Vec<Process>,
    urls: Vec<String>,
    /// How often one of them was killed.
    pub kills: usize,
}

impl Brokers {
    /// Starts three servers.
    pub async fn start(scratch: &Scratch) -> Self {
        let net = network();
        let hosts: Vec<_> = (1..=COUNT).map(|node| format!("{net}.{node}")).collect();
        let routes: Vec<_> = hosts.iter().map(|host| format!("nats://{host}:16222")).collect();
        let single = fs::read_to_string(repository().join("nats/single.conf")).unwrap();
        let mut nodes = Vec::new();
        for host in &hosts {
            let configuration = scratch.path(&format!("{host}.conf"));
            let own = single.replace("127.0.0.1", host);
            let own = own.replace("server_name: evenodd", &format!("server_name: \"{host}\""));
            assert!(own.contains(&format!("server_name: \"{host}\"")));
            let cluster = format!(
                "cluster {{ name: test, host: \"{host}\", port: 16222, routes: {routes:?}\n\
                 ping_interval: \"1s\", ping_max: 2 }}\n"
            );
            fs::write(&configuration, own + &cluster).unwrap();
            let store = scratch.path(host);
            let command = [
                nats_server().to_str().unwrap(),
                "-c",
                configuration.to_str().unwrap(),
                "-sd",
                store.to_str().unwrap(),
                "-p",
                &NATS_PORT.to_string(),
            ];
            let command = command.map(str::to_owned).into();
            nodes.push(Process::start_command(scratch, "nats-server", command));
        }
        let urls = hosts.iter().map(|host| format!("nats://{host}:{NATS_PORT}")).collect();
        Self { nodes, urls, kills: 0 }
    }

    /// Creates both streams, with a replica on each server.
    pub async fn provision(&self, scratch: &Scratch) {
        let args = ["provision", "--replicas", "3", "--nats", &self.url()];
        let mut provision = Process::start(scratch, "evenodd", &args);
        assert!(provision.wait().await.success(), "{}", provision.log());
    }

    /// Where clients connect, separated by commas.
    #[must_use]
    pub fn url(&self) -> String {
        self.urls.join(",")
    }

    /// A client that connects only to this server, even while that is down.
    pub async fn client_of(&self, node: usize) -> Client {
        let options = ConnectOptions::new().ignore_discovered_servers().retry_on_initial_connect();
        let client = options.connect(&self.urls[node]).await.unwrap();
        eventually("connected", async || runtime::connection::is_connected(&client)).await;
        client
    }

    /// The server that leads a stream, if there is a leader.
    pub async fn leader(&self, client: &Client, stream: &str) -> Option<usize> {
        let stream = jetstream::new(client.clone()).get_stream(stream).await.ok()?;
        let leader = stream.cached_info().cluster.as_ref()?.leader.clone()?;
        self.urls.iter().position(|url| url.contains(&format!("//{leader}:")))
    }

    /// Waits until each stream has a leader and both of its followers are current.
    pub async fn heal(&self, client: &Client, streams: &[&str]) {
        for stream in streams {
            eventually("the stream is current everywhere", async || {
                let stream = jetstream::new(client.clone()).get_stream(*stream).await;
                let info = stream.ok().and_then(|stream| stream.cached_info().cluster.clone());
                info.is_some_and(|cluster| {
                    let current = cluster.replicas.iter().filter(|peer| peer.current).count();
                    cluster.leader.is_some() && current == COUNT - 1
                })
            })
            .await;
        }
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self, node: usize) {
        self.kills += 1;
        self.nodes[node].kill();
    }

    /// Starts a killed server again, with the same store.
    pub fn start_again(&mut self, node: usize) {
        self.nodes[node].start_again();
    }

    /// Sends SIGSTOP: connections stay open, but the server does not answer.
    pub fn freeze(&self, node: usize) {
        self.nodes[node].signal(Signal::SIGSTOP);
    }

    /// Sends SIGCONT.
    pub fn thaw(&self, node: usize) {
        self.nodes[node].signal(Signal::SIGCONT);
    }
}
