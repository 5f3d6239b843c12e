//! A broker, provisioned, with services on it.

use async_nats::Client;
use contract::Parity;
use contract::streams::NUMBERS;
use runtime::history::{self, Entry};

use crate::{Broker, Process, Scratch, connect};

/// A provisioned broker and what runs on it. The parts are public: tests kill and freeze them.
pub struct Pipeline {
    /// The broker.
    pub broker: Broker,
    /// A client of the test's own.
    pub client: Client,
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
        let pipeline = Self {
            broker,
            client,
            scratch,
        };
        let provision = pipeline.evenodd(&["provision"]).await;
        assert_eq!(provision.0, Some(0), "{}", provision.1);
        pipeline
    }

    /// A generator that answers.
    pub async fn generator(&self, parity: Parity) -> Process {
        let url = self.broker.url();
        let args = ["--parity", parity.name(), "--nats", &url];
        self.started("generator", &args, "answering").await
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
        self.started("multiplier", &args, "ticking").await
    }

    /// A gateway, and the address it serves.
    pub async fn gateway(&self) -> (Process, String) {
        let url = self.broker.url();
        let args = ["--nats", &url, "--http", "127.0.0.1:0"];
        let mut process = Process::start(&self.scratch, "gateway", &args);
        let line = process.wait_for("serving http://").await;
        process.wait_for("connected to NATS").await;
        let address = line.split("http://").nth(1).unwrap();
        let address = address.split('/').next().unwrap().to_owned();
        (process, address)
    }

    async fn started(&self, binary: &str, args: &[&str], log: &str) -> Process {
        let mut process = Process::start(&self.scratch, binary, args);
        process.wait_for(log).await;
        process.wait_for("connected to NATS").await;
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
        history::read(&self.client, NUMBERS, 1, history::MAX_BATCH)
            .await
            .unwrap()
    }

    /// `evenodd verify` finds no fault.
    pub async fn verify(&self) {
        let (status, output) = self.evenodd(&["verify"]).await;
        assert_eq!(status, Some(0), "{output}");
    }
}
