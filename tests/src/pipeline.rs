//! A broker, provisioned, with services on it.

use async_nats::Client;
use contract::streams::NUMBERS;
use contract::{Message, Parity, Product, Slot, subjects};
use runtime::history::{self, Entry};
use runtime::jetstream;
use tokio::net::TcpStream;

use crate::{Broker, HTTP_PORT, Process, Replicas, Scratch, connect, network, patience};

/// A provisioned broker and what runs on it. The parts are public: tests kill and freeze them.
pub struct Pipeline {
    /// The broker.
    pub broker: Broker,
    /// A client of the test's own.
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

    /// The same on a broker that is there already.
    pub async fn on(scratch: Scratch, broker: Broker) -> Self {
        let client = connect(&broker).await;
        let replicas = Replicas::default();
        let pipeline = Self { broker, client, replicas, scratch };
        let provision = pipeline.evenodd(&["provision"]).await;
        assert_eq!(provision.0, Some(0), "{}", provision.1);
        pipeline
    }

    /// A generator that answers.
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

    /// A multiplier with slots of this many milliseconds.
    pub async fn multiplier(&self, slot_ms: u64) -> Process {
        let (url, slot_ms) = (self.broker.url(), slot_ms.to_string());
        let args = ["--nats", &url, "--slot-ms", &slot_ms];
        self.started("multiplier", &args, "multiplier").await
    }

    /// As many multipliers as the caller takes.
    pub async fn multipliers<const N: usize>(&self, slot_ms: u64) -> [Process; N] {
        let mut all = Vec::with_capacity(N);
        for _ in 0..N {
            all.push(self.multiplier(slot_ms).await);
        }
        all.try_into().ok().unwrap()
    }

    /// A gateway, and the address it serves.
    pub async fn gateway(&self) -> (Process, String) {
        self.gateway_with(&[]).await
    }

    /// A gateway with further arguments.
    pub async fn gateway_with(&self, args: &[&str]) -> (Process, String) {
        let gateway = gateway(&self.scratch, &self.broker.url(), args).await;
        self.replicas.appear(&self.client, "gateway").await;
        gateway
    }

    /// Publishes one more product, the same every time, and returns its sequence.
    pub async fn publish(&self, slot: u64) -> u64 {
        publish(&self.client, slot).await
    }

    /// Publishes whatever it is.
    pub async fn store(&self, slot: u64, payload: Vec<u8>) -> u64 {
        store(&self.client, slot, payload).await
    }

    async fn started(&self, binary: &str, args: &[&str], service: &str) -> Process {
        let process = Process::start(&self.scratch, binary, args);
        self.replicas.appear(&self.client, service).await;
        process
    }

    /// Runs `evenodd` with these arguments on the broker: its exit status and output.
    pub async fn evenodd(&self, args: &[&str]) -> (Option<i32>, String) {
        let url = self.broker.url();
        let args = [args, &["--nats", &url]].concat();
        let mut process = Process::start(&self.scratch, "evenodd", &args);
        (process.wait().await.code(), process.log())
    }

    /// The whole history (of less than a thousand messages).
    pub async fn history(&self) -> Vec<Entry> {
        self.entries(1, history::MAX_BATCH).await
    }

    /// Up to `limit` stored messages, from a sequence on.
    pub async fn entries(&self, from: u64, limit: usize) -> Vec<Entry> {
        history::read(&self.client, NUMBERS, from, limit).await.unwrap()
    }

    /// `evenodd verify` finds no fault.
    pub async fn verify(&self) {
        let (status, output) = self.evenodd(&["verify"]).await;
        assert_eq!(status, Some(0), "{output}");
    }
}

/// A gateway that may or may not find a broker, and the address it serves.
pub async fn gateway(scratch: &Scratch, url: &str, args: &[&str]) -> (Process, String) {
    let address = format!("{}.1:{HTTP_PORT}", network());
    let args = [&["--nats", url, "--http", &address], args].concat();
    let mut process = Process::start(scratch, "gateway", &args);
    process.until("it listens", async |_| TcpStream::connect(&address).await.ok()).await;
    (process, address)
}

/// Publishes one more product, the same every time, and returns its sequence.
pub async fn publish(client: &Client, slot: u64) -> u64 {
    store(client, slot, Product::new(846, 511).unwrap().encode()).await
}

async fn store(client: &Client, slot: u64, payload: Vec<u8>) -> u64 {
    let (payload, timeout) = (payload.into(), patience());
    let ack = jetstream::publish(client, subjects::PUBLISH, Slot(slot), payload, timeout);
    ack.await.unwrap().sequence
}
