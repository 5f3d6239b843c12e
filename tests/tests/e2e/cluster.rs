//! Three brokers. The tests kill or freeze some of them, and kill multipliers as well. Every slot
//! must have one draw, every product that is due must be in the history, and subscribers must hear
//! it once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::Client;
use contract::streams::{NUMBERS, TICKS};
use contract::subjects;
use futures::StreamExt;
use runtime::history::Entry;
use tests::brokers::COUNT;
use tests::{Audit, Brokers, Process, Replicas, Scratch, Ticks, eventually, patience};
use tokio::sync::MutexGuard;
use tokio::time::{Instant, sleep};

/// A cluster with two generators of each parity, and a subscriber at each broker.
struct Cluster {
    brokers: Brokers,
    clients: Vec<Client>,
    /// How often each record was heard at each broker, by sequence.
    heard: Vec<Arc<Mutex<BTreeMap<u64, usize>>>>,
    replicas: Replicas,
    slot_ms: u64,
    scratch: Scratch,
    _generators: Vec<Process>,
    _alone: MutexGuard<'static, ()>,
}

impl Cluster {
    async fn start(slot_ms: u64) -> Self {
        let alone = tests::alone().await;
        let scratch = Scratch::new();
        let brokers = Brokers::start(&scratch).await;
        let url = brokers.url();
        brokers.provision(&scratch).await;
        let (mut clients, mut heard) = (Vec::new(), Vec::new());
        for node in 0..COUNT {
            let client = brokers.client_of(node).await;
            heard.push(listen(&client).await);
            clients.push(client);
        }
        let mut generators = Vec::new();
        for parity in ["even", "odd", "even", "odd"] {
            let args = ["--parity", parity, "--nats", &url];
            generators.push(Process::start(&scratch, "generator", &args));
        }
        let cluster = Self {
            brokers,
            clients,
            heard,
            replicas: Replicas::default(),
            slot_ms,
            scratch,
            _generators: generators,
            _alone: alone,
        };
        cluster.heals(0).await;
        cluster
    }

    /// Starts a multiplier that first connects to one of these brokers.
    fn multiplier(&self, url: &str) -> Process {
        let slot_ms = self.slot_ms.to_string();
        Process::start(&self.scratch, "multiplier", &["--nats", url, "--slot-ms", &slot_ms])
    }

    async fn multipliers<const N: usize>(&self) -> [Process; N] {
        let mut ticks = Ticks::watch(&self.clients[0]).await;
        let multipliers = [(); N].map(|()| self.multiplier(&self.brokers.url()));
        for _ in &multipliers {
            self.replicas.appear(&self.clients[0], "multiplier").await;
        }
        ticks.take(10).await;
        multipliers
    }

    /// Waits until all brokers are current, according to this one.
    async fn heals(&self, node: usize) {
        self.brokers.heal(&self.clients[node], &[TICKS, NUMBERS]).await;
    }

    async fn leader(&self, stream: &str, node: usize) -> usize {
        let mut leader = None;
        eventually("there is a leader", async || {
            leader = self.brokers.leader(&self.clients[node], stream).await;
            leader.is_some()
        })
        .await;
        leader.unwrap()
    }

    /// Waits until `offset` after the beginning of the next slot. It sleeps in the kernel, because
    /// tokio's timers are not precise enough.
    fn sleep_into_next_slot(&self, offset: Duration) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let slot = Duration::from_millis(self.slot_ms);
        let into = Duration::from_nanos(u64::try_from(now.as_nanos() % slot.as_nanos()).unwrap());
        tokio::task::block_in_place(|| std::thread::sleep(slot - into + offset));
    }

    /// Checks on this broker that nothing was missed, lost or stored twice. The subscribers at
    /// brokers that did not fail (`all_heard_at`) must have heard every record once. Each broker that
    /// was killed may have led the history. Then the next leader may send its last message again
    /// (docs/adr/0012).
    async fn is_right(&self, node: usize, all_heard_at: &[usize]) -> Audit {
        let mut audit = Audit::of(&self.clients[node]).await;
        // A multiplier may have finished while another one still works on the slots of an outage.
        let deadline = Instant::now() + patience();
        while !audit.missed().is_empty() && Instant::now() < deadline {
            sleep(Duration::from_millis(100)).await;
            audit = Audit::of(&self.clients[node]).await;
        }
        assert_eq!(audit.missed(), [], "{:?}", self.scratch);
        for (node, heard) in self.heard.iter().enumerate() {
            let heard = heard.lock().unwrap().clone();
            if !all_heard_at.contains(&node) {
                continue;
            }
            let again: usize = heard.values().map(|times| times - 1).sum();
            assert!(again <= self.brokers.kills, "at broker {node}: {heard:?}");
            let sequences = audit.numbers.values().map(|number| number.sequence);
            let missing: Vec<_> = sequences.filter(|s| !heard.contains_key(s)).collect();
            assert!(missing.is_empty(), "at broker {node}: {missing:?}");
        }
        audit
    }
}

async fn listen(client: &Client) -> Arc<Mutex<BTreeMap<u64, usize>>> {
    let mut live = client.subscribe(subjects::PUBLISHED).await.unwrap();
    client.flush().await.unwrap();
    let heard = Arc::new(Mutex::new(BTreeMap::new()));
    tokio::spawn({
        let heard = heard.clone();
        async move {
            while let Some(message) = live.next().await {
                let sequence = Entry::try_from(message).unwrap().sequence;
                *heard.lock().unwrap().entry(sequence).or_default() += 1;
            }
        }
    });
    heard
}

/// Kills a multiplier `offset` after the beginning of a slot and starts it again. Waits until this
/// broker sees it, and until it draws.
async fn kill(cluster: &Cluster, node: usize, multiplier: &mut Process, offset: Duration) {
    cluster.sleep_into_next_slot(offset);
    multiplier.kill();
    multiplier.start_again();
    cluster.replicas.appear(&cluster.clients[node], "multiplier").await;
    sleep(Duration::from_millis(2 * cluster.slot_ms)).await;
}

/// Kills multipliers 200 times, spread over the first 20 ms of a slot, in which they do all their
/// work.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_multiplier_costs_nothing() {
    const KILLS: u32 = 200;
    let cluster = Cluster::start(100).await;
    let mut multipliers = cluster.multipliers::<2>().await;
    for n in 0..KILLS {
        let offset = Duration::from_millis(20) * n / KILLS;
        kill(&cluster, 0, &mut multipliers[n as usize % 2], offset).await;
    }
    cluster.is_right(0, &[0, 1, 2]).await;
}

/// Kills multipliers 20 times, each time while the stream of draws has no leader.
#[tokio::test(flavor = "multi_thread")]
async fn a_multiplier_killed_during_a_leader_election_costs_nothing() {
    const KILLS: u32 = 20;
    let mut cluster = Cluster::start(100).await;
    let mut multipliers = cluster.multipliers::<2>().await;
    let mut stays = 0;
    for n in 0..KILLS {
        let leader = cluster.leader(TICKS, stays).await;
        stays = (leader + 1) % COUNT;
        cluster.brokers.kill(leader);
        let offset = Duration::from_millis(20) * n / KILLS;
        kill(&cluster, stays, &mut multipliers[n as usize % 2], offset).await;
        cluster.brokers.start_again(leader);
        cluster.heals(stays).await;
    }
    // Every broker has failed at some time, so no subscriber heard everything.
    cluster.is_right(stays, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leaders_may_be_killed_or_frozen() {
    let mut cluster = Cluster::start(500).await;
    let _multipliers = cluster.multipliers::<2>().await;
    let mut failed = Vec::new();
    let mut stays = 0;
    for (stream, frozen) in [(TICKS, false), (NUMBERS, false), (TICKS, true), (NUMBERS, true)] {
        let leader = cluster.leader(stream, stays).await;
        stays = (leader + 1) % COUNT;
        failed.push(leader);
        if frozen {
            cluster.brokers.freeze(leader);
            sleep(Duration::from_secs(12)).await;
            cluster.brokers.thaw(leader);
        } else {
            cluster.brokers.kill(leader);
            sleep(Duration::from_secs(8)).await;
            cluster.brokers.start_again(leader);
        }
        cluster.heals(stays).await;
    }
    let lasting: Vec<_> = (0..COUNT).filter(|node| !failed.contains(node)).collect();
    cluster.is_right(stays, &lasting).await;
}

/// No other multiplier draws for them. They reconnect to another broker and draw the slots that
/// they missed.
#[tokio::test(flavor = "multi_thread")]
async fn all_multipliers_may_be_on_a_frozen_broker() {
    let cluster = Cluster::start(500).await;
    let leader = cluster.leader(TICKS, 0).await;
    let other = (leader + 1) % COUNT;
    for frozen in [leader, other] {
        let stays = (frozen + 1) % COUNT;
        let url = cluster.brokers.url();
        let url = url.split(',').nth(frozen).unwrap();
        let mut ticks = Ticks::watch(&cluster.clients[stays]).await;
        let mut multipliers = [cluster.multiplier(url), cluster.multiplier(url)];
        ticks.take(6).await;
        cluster.brokers.freeze(frozen);
        let last = ticks.next().await.slot;
        ticks.until(|draw| draw.slot.0 > last.0 + 24).await;
        cluster.brokers.thaw(frozen);
        cluster.heals(stays).await;
        ticks.take(4).await;
        // If both were killed, a product that is due at that moment would be lost.
        for multiplier in &mut multipliers {
            assert!(multiplier.terminate().await.success(), "{}", multiplier.log());
        }
    }
    // Between the two rounds no multiplier was running.
    let audit = Audit::of(&cluster.clients[(other + 1) % COUNT]).await;
    let draws: Vec<_> = audit.draws.keys().map(|slot| slot.0).collect();
    let gaps = draws.windows(2).filter(|pair| pair[1] > pair[0] + 1).count();
    assert!(gaps <= 1, "{:?}", audit.missed());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_of_three_brokers_may_be_away_for_a_while() {
    let mut cluster = Cluster::start(500).await;
    let _multipliers = cluster.multipliers::<2>().await;
    let stays = cluster.leader(TICKS, 0).await;
    let away: Vec<_> = (0..COUNT).filter(|node| *node != stays).collect();
    let fault = tests::watch::now();
    away.iter().for_each(|node| cluster.brokers.kill(*node));
    sleep(Duration::from_secs(20)).await;
    away.iter().for_each(|node| cluster.brokers.start_again(*node));
    let mut ticks = Ticks::watch(&cluster.clients[stays]).await;
    let back = tests::watch::now();
    ticks.until(|draw| draw.slot > back).await;
    cluster.heals(stays).await;
    let audit = cluster.is_right(stays, &[stays]).await;
    // Generators kept answering through the broker that stayed. At the moment of the fault, all
    // generators of one parity may have been connected to a broker that was killed.
    let without = audit.without_numbers();
    assert!(without.iter().all(|slot| (fault..=fault.next()).contains(slot)), "{without:?}");
    let away = audit.draws.range(..back).rev().take(40);
    assert!(away.filter(|(_, draw)| draw.value.due().is_some()).count() > 10);
}
