//! A provisioned broker with services.

use async_nats::Client;
use contract::streams::NUMBERS;
use contract::{Message, Parity, Product, Slot, subjects};
use runtime::history::{self, Entry};
use runtime::jetstream;
use tokio::net::TcpStream;

use crate::{Broker, HTTP_PORT, Process, Replicas, Scratch, connect, network, patience};

/// A provisioned broker, on which a test starts services.
pub struct Pipeline {
    /// The broker.
    pub broker: Broker,
    /// The client of the test.
    pub client: Client,
    replicas: Replicas,
    /// The directory of the test. Dropped last.
    pub scratch: Scratch,
}

impl Pipeline {
    /// A broker with both streams and no services.
    pub async fn new() -> Self {
        let scratch = Scratch::new();
        let broker = Broker::start(&scratch).await;
        Self::on(scratch, broker).await
    }

    /// As [`Self::new`], on a broker that already runs.
    pub async fn on(scratch: Scratch, broker: Broker) -> Self {
        let client = connect(&broker).await;
        let replicas = Replicas::default();
        let pipeline = Self { broker, client, replicas, scratch };
        let provision = pipeline.evenodd(&["provision"]).await;
        assert_eq!(provision.0, Some(0), "{}", provision.1);
        pipeline
    }

    /// Starts a generator and waits until it answers.
    pub async fn generator(&self, parity: Parity) -> Process {
        let url = self.broker.url();
        let args = ["--parity", parity.name(), "--nats", &url];
        self.started("generator", &args, parity.name()).await
    }

    /// Two generators of each parity.
    pub async fn generators(&self) -> [Process; 4] {
        [
            self.generator(Parity::Even).await,
            self.generator(Parity::Even).await,
            self.generator(Parity::Odd).await,
            self.generator(Parity::Odd).await,
        ]
    }

    /// Starts a multiplier with this length of a slot.
    pub async fn multiplier(&self, slot_ms: u64) -> Process {
        let (url, slot_ms) = (self.broker.url(), slot_ms.to_string());
        let args = ["--nats", &url, "--slot-ms", &slot_ms];
        self.started("multiplier", &args, "multiplier").await
    }

    /// Starts `N` multipliers.
    pub async fn multipliers<const N: usize>(&self, slot_ms: u64) -> [Process; N] {
        let mut all = Vec::with_capacity(N);
        for _ in 0..N {
            all.push(self.multiplier(slot_ms).await);
        }
        all.try_into().ok().unwrap()
    }

    /// Starts a gateway, and returns it with its address.
    pub async fn gateway(&self) -> (Process, String) {
        self.gateway_with(&[]).await
    }

    /// Starts a gateway with further arguments.
    pub async fn gateway_with(&self, args: &[&str]) -> (Process, String) {
        let gateway = gateway(&self.scratch, &self.broker.url(), args).await;
        self.replicas.appear(&self.client, "gateway").await;
        gateway
    }

    /// Publishes a product, which is always the same one, and returns its sequence.
    pub async fn publish(&self, slot: u64) -> u64 {
        publish(&self.client, slot).await
    }

    /// Publishes any payload, and returns its sequence.
    pub async fn store(&self, slot: u64, payload: Vec<u8>) -> u64 {
        store(&self.client, slot, payload).await
    }

    async fn started(&self, binary: &str, args: &[&str], service: &str) -> Process {
        let process = Process::start(&self.scratch, binary, args);
        self.replicas.appear(&self.client, service).await;
        process
    }

    /// Runs `evenodd` with these arguments on the broker, and returns its exit status and output.
    pub async fn evenodd(&self, args: &[&str]) -> (Option<i32>, String) {
        let url = self.broker.url();
        let args = [args, &["--nats", &url]].concat();
        let mut process = Process::start(&self.scratch, "evenodd", &args);
        (process.wait().await.code(), process.log())
    }

    /// The whole history, if it has at most a thousand messages.
    pub async fn history(&self) -> Vec<Entry> {
        self.entries(1, history::MAX_BATCH).await
    }

    /// Up to `limit` stored messages, from a sequence on.
    pub async fn entries(&self, from: u64, limit: usize) -> Vec<Entry> {
        history::read(&self.client, NUMBERS, from, limit).await.unwrap()
    }

    /// Asserts that `evenodd verify` finds no fault.
    pub async fn verify(&self) {
        let (status, output) = self.evenodd(&["verify"]).await;
        assert_eq!(status, Some(0), "{output}");
    }
}

/// Starts a gateway, with or without a broker, and returns it with its address.
pub async fn gateway(scratch: &Scratch, url: &str, args: &[&str]) -> (Process, String) {
    let address = format!("{}.1:{HTTP_PORT}", network());
    let args = [&["--nats", url, "--http", &address], args].concat();
    let mut process = Process::start(scratch, "gateway", &args);
    process.until("it listens", async |_| TcpStream::connect(&address).await.ok()).await;
    (process, address)
}

/// Publishes a product, which is always the same one, and returns its sequence.
pub async fn publish(client: &Client, slot: u64) -> u64 {
    store(client, slot, Product::new(846, 511).unwrap().encode()).await
}

async fn store(client: &Client, slot: u64, payload: Vec<u8>) -> u64 {
    let (payload, timeout) = (payload.into(), patience());
    let ack = jetstream::publish(client, subjects::PUBLISH, Slot(slot), payload, timeout);
    ack.await.unwrap().sequence
}
