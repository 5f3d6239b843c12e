//! Measures the speed and the costs of the gateway on this machine: `make bench`, or only parts:
//! `cargo bench --package tests --bench http -- requests live history`.
//!
//! Clients and servers share the machine, so the clients affect every figure.

#![allow(clippy::disallowed_types, clippy::unwrap_used, clippy::print_stdout)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use async_nats::Client;
use async_nats::header::{HeaderMap, NATS_MESSAGE_ID};
use contract::{Message, Product, Slot, streams::NUMBERS, subjects};
use futures::{StreamExt, stream};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use runtime::{history, jetstream};
use tests::{Broker, Pipeline, Process, Scratch, eventually, patience, repository};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// How many rounds of measurements there are.
const ROUNDS: usize = 5;
/// How many records a live feed sends, two a second.
const FEED: u64 = 40;
/// The most clients of a live feed, and the number of other files that the two processes need.
const CLIENTS: u64 = 10_000;
const OTHER_FILES: u64 = 200;
/// The length of a long history: 500 days, with half of the ticks published.
const LONG: u64 = 1_000_000;
/// How many publications may wait for their acknowledgement. The server drops more than 10,000.
const WINDOW: u64 = 5000;

#[tokio::main]
async fn main() {
    let parts: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|name| name == part);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    if wanted("requests") || wanted("live") {
        let pipeline = Pipeline::new().await;
        for slot in 1..=100 {
            publish(&pipeline.client, slot).await;
        }
        if wanted("requests") {
            requests(&pipeline).await;
        }
        if wanted("live") {
            let mut published = 100;
            for clients in [1, 1000, CLIENTS.min(hard.saturating_sub(OTHER_FILES))] {
                live(&pipeline, clients, published).await;
                published += FEED;
            }
        }
    }
    if wanted("history") {
        long_history().await;
    }
}

/// Compares `GET /numbers` with nginx, which serves a file of the same bytes.
async fn requests(pipeline: &Pipeline) {
    let (Some(wrk), Some(nginx)) = (tool("wrk"), tool("nginx")) else {
        println!("GET /numbers               skipped: apt-get install wrk nginx-light");
        return;
    };
    let (process, gateway) = ready(pipeline).await;
    let www = pipeline.scratch.path("www");
    fs::create_dir(&www).unwrap();
    let nginx = Nginx::start(&pipeline.scratch, &nginx).await;
    let servers = [&gateway, &nginx.sendfile, &nginx.copying];
    let pids = [&process, &nginx.process, &nginx.process].map(Process::pid);
    let names = ["gateway", "nginx, sendfile on", "nginx, sendfile off"];
    for (title, header, file) in [
        ("GET /numbers", "Accept: */*", "numbers"),
        ("the same in gzip", "Accept-Encoding: gzip", "numbers.gz"),
    ] {
        let answer = get(&gateway, "/numbers", header).await;
        fs::write(www.join(file), body(&answer)).unwrap();
        for server in servers {
            let same = body(&get(server, "/numbers", header).await) == body(&answer);
            assert!(same, "{server} serves other bytes");
        }
        println!("{title}, {} bytes", body(&answer).len());
        let mut rates = [const { Vec::new() }; 3];
        let mut slowest = [const { Vec::new() }; 3];
        let mut costs = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            for (at, server) in servers.iter().enumerate() {
                let used = processor_time(pids[at]);
                let (count, rate, p99) = load(&wrk, server, header);
                costs[at].push((processor_time(pids[at]) - used).as_secs_f64() * 1e6 / count);
                rates[at].push(rate);
                slowest[at].push(p99);
            }
        }
        let (rates, slowest, costs) = (rates.map(median), slowest.map(median), costs.map(median));
        for (at, name) in names.iter().enumerate() {
            println!(
                "  {name:<24} {:>7.0} /s   p99 {:.2} ms   processor {:.1} us each   gateway/this {:.2}",
                rates[at],
                slowest[at],
                costs[at],
                rates[0] / rates[at],
            );
        }
    }
}

/// Runs wrk. Returns how many requests were answered, how many a second, and the 99th percentile of
/// the latency in milliseconds.
fn load(wrk: &Path, address: &str, header: &str) -> (f64, f64, f64) {
    let output = Command::new(wrk)
        .args(["-t1", "-c64", "-d4s", "--latency", "-H", header])
        .arg(format!("http://{address}/numbers"))
        .output()
        .unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    for wrong in ["Non-2xx", "Socket errors"] {
        if let Some(line) = output.lines().find(|line| line.contains(wrong)) {
            println!("{address}: {line}");
        }
    }
    let value = |label: &str| {
        let line = output.lines().find(|line| line.contains(label));
        line.unwrap_or_else(|| panic!("{output}")).trim()
    };
    let number = |text: &str| text.trim_end_matches(char::is_alphabetic).parse::<f64>().unwrap();
    // With the space, this does not match a percentage such as 70.99%.
    let p99 = value(" 99% ");
    let milliseconds = match p99.trim_start_matches(|c: char| !c.is_alphabetic()) {
        "us" => 0.001,
        "ms" => 1.0,
        _ => 1000.0,
    };
    let count = value("requests in").split(' ').next().unwrap();
    (
        number(count),
        number(value("Requests/sec:").split(' ').next_back().unwrap()),
        number(p99.split(' ').next_back().unwrap()) * milliseconds,
    )
}

/// An nginx that serves the directory `www` with its cache of open files. One port uses sendfile,
/// as in Debian's nginx.conf. The other one copies, which costs less for a file of this size.
struct Nginx {
    process: Process,
    sendfile: String,
    copying: String,
}

impl Nginx {
    async fn start(scratch: &Scratch, binary: &Path) -> Self {
        // nginx does not report the port that it got, so this reserves two. The other settings are
        // as in Debian's nginx.conf.
        let listeners = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let [sendfile, copying] = listeners.map(|l| l.local_addr().unwrap().to_string());
        let configuration = format!(
            "daemon off; pid nginx.pid; user root root; worker_processes auto;
             events {{ worker_connections 1024; }}
             http {{
               access_log off; tcp_nopush on; gzip_static on;
               open_file_cache max=100; open_file_cache_valid 1h;
               keepalive_requests 1000000000; default_type application/json;
               client_body_temp_path tmp; root www;
               server {{ listen {sendfile}; sendfile on; }}
               server {{ listen {copying}; sendfile off; }}
             }}"
        );
        fs::write(scratch.path("nginx.conf"), configuration).unwrap();
        let prefix = scratch.path("");
        let arguments = ["-e", "stderr", "-c", "nginx.conf", "-p"].map(str::to_owned);
        let mut command = vec![binary.to_str().unwrap().to_owned()];
        command.extend(arguments);
        command.push(prefix.to_str().unwrap().to_owned());
        let process = Process::start_command(scratch, "nginx", command);
        eventually("nginx listens", async || TcpStream::connect(&copying).await.is_ok()).await;
        Self { process, sendfile, copying }
    }
}

impl Drop for Nginx {
    /// SIGTERM, because the workers would survive a SIGKILL of their parent.
    fn drop(&mut self) {
        self.process.signal(Signal::SIGTERM);
        while self.process.exit_status().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Measures the time from a publication until every client of the live feed has the record.
async fn live(pipeline: &Pipeline, clients: u64, published: u64) {
    let (process, address) = ready(pipeline).await;
    let memory_before = memory(process.pid(), "VmRSS");
    let feeds: Vec<_> =
        stream::iter(0..clients).map(|_| subscribe(&address)).buffer_unordered(64).collect().await;
    let taken = memory(process.pid(), "VmRSS").saturating_sub(memory_before);
    let last = published + FEED;
    let feeds: Vec<_> = feeds.into_iter().map(|feed| tokio::spawn(arrivals(feed, last))).collect();
    let (begun, used) = (Instant::now(), processor_time(process.pid()));
    let mut pace = tokio::time::interval(Duration::from_millis(500));
    let (mut sent, mut acks) = (Vec::new(), Vec::new());
    for slot in published + 1..=last {
        pace.tick().await;
        let now = Instant::now();
        publish(&pipeline.client, slot).await;
        sent.push(now);
        acks.push(now.elapsed());
    }
    let mut delays = Vec::new();
    for feed in feeds {
        let arrivals = tokio::time::timeout(patience(), feed).await.unwrap().unwrap();
        assert_eq!(arrivals.len(), sent.len(), "a client missed a record");
        delays.extend(arrivals.iter().zip(&sent).map(|(at, sent)| *at - *sent));
    }
    let used = processor_time(process.pid()) - used;
    println!("live feed, clients: {clients}");
    print("publication to client", delays);
    print("publication to ack", acks);
    println!(
        "  {:<24} memory {:.0} MB at first, {:.1} KB per client   processor {:.1} %",
        "gateway",
        megabytes(memory_before),
        taken as f64 / 1024.0 / clients as f64,
        used.as_secs_f64() / begun.elapsed().as_secs_f64() * 100.0,
    );
}

/// Opens a live feed, and reads its first lines.
async fn subscribe(address: &str) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET /numbers/live HTTP/1.1\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut feed = BufReader::with_capacity(512, stream);
    let mut line = String::new();
    while !line.starts_with("retry:") {
        line.clear();
        assert_ne!(feed.read_line(&mut line).await.unwrap(), 0, "no feed");
    }
    feed
}

/// The times at which the records arrive, up to the one with this sequence.
async fn arrivals(mut feed: BufReader<TcpStream>, last: u64) -> Vec<Instant> {
    let mut times = Vec::new();
    let mut line = String::new();
    loop {
        line.clear();
        assert_ne!(feed.read_line(&mut line).await.unwrap(), 0, "cut");
        if let Some(seq) = line.strip_prefix("id: ") {
            times.push(Instant::now());
            if seq.trim().parse::<u64>().unwrap() == last {
                return times;
            }
        }
    }
}

/// Fills a history with a million products, without a sync for every message, and reads it.
async fn long_history() {
    let scratch = Scratch::new();
    let synced = fs::read_to_string(repository().join("nats/single.conf")).unwrap();
    let quick = scratch.path("quick.conf");
    fs::write(&quick, synced.replace("sync_interval: always", "")).unwrap();
    let broker = Broker::start_with(&scratch, &quick).await;
    let pipeline = Pipeline::on(scratch, broker).await;
    let begun = Instant::now();
    fill(&pipeline.client).await;
    let took = begun.elapsed().as_secs_f64();
    println!("a history of {LONG} products (published in {took:.1} s)");

    let mut starts = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let _gateway = ready(&pipeline).await;
        starts.push(begun.elapsed());
    }
    print("start of a gateway", starts);
    let (process, address) = ready(&pipeline).await;
    for path in ["/numbers", "/history?after=1000&limit=1000", "/history?after=500000&limit=1000"] {
        let mut times = Vec::new();
        for _ in 0..11 {
            // Stays below the gateway's limit for reads of the history.
            tokio::time::sleep(Duration::from_millis(100)).await;
            let begun = Instant::now();
            body(&get(&address, path, "Accept: */*").await);
            times.push(begun.elapsed());
        }
        print(path, times);
    }
    let processes = [("gateway", process.pid()), ("nats-server", pipeline.broker.pid())];
    for path in ["/history.ndjson", "/history.csv"] {
        let before = processes.map(|(_, pid)| memory(pid, "VmRSS"));
        for (_, pid) in processes {
            // Resets the peak of the resident memory (proc(5)).
            fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
        }
        let begun = Instant::now();
        let answer = get(&address, path, "Accept: */*").await;
        let took = begun.elapsed().as_secs_f64();
        let bytes = body(&answer);
        assert!(bytes.ends_with(b"\r\n0\r\n\r\n"), "the export was cut");
        println!("  {path:<24} {took:.1} s, {:.1} MB", megabytes(bytes.len() as u64));
        for ((name, pid), before) in processes.into_iter().zip(before) {
            println!(
                "    {name:<22} memory {:.0} MB before, {:.0} MB at most, {:.0} MB after",
                megabytes(before),
                megabytes(memory(pid, "VmHWM")),
                megabytes(memory(pid, "VmRSS")),
            );
        }
    }
}

/// Publishes [`LONG`] products as a multiplier does, but many at once.
async fn fill(client: &Client) {
    let inbox = client.new_inbox();
    let mut acks = client.subscribe(inbox.clone()).await.unwrap();
    for slot in 1..=LONG + WINDOW {
        if slot > WINDOW {
            let ack = tokio::time::timeout(patience(), acks.next()).await;
            let ack: serde_json::Value =
                serde_json::from_slice(&ack.unwrap().unwrap().payload).unwrap();
            assert_eq!(ack["seq"], slot - WINDOW, "{ack}");
        }
        if slot <= LONG {
            let mut headers = HeaderMap::new();
            headers.insert(NATS_MESSAGE_ID, Slot(slot).to_string());
            let payload = product(slot).encode().into();
            client
                .publish_with_reply_and_headers(subjects::PUBLISH, inbox.clone(), headers, payload)
                .await
                .unwrap();
        }
    }
    let last = history::last(client, NUMBERS).await;
    assert_eq!(last.unwrap().unwrap().sequence, LONG);
}

async fn publish(client: &Client, slot: u64) {
    let payload = product(slot).encode().into();
    let ack = jetstream::publish(client, subjects::PUBLISH, Slot(slot), payload, patience()).await;
    assert_eq!(ack.unwrap().sequence, slot);
}

/// A pseudo-random product above the threshold.
fn product(slot: u64) -> Product {
    let mixed = slot.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    Product::new(400 + 2 * (mixed % 301), 401 + 2 * (mixed / 301 % 300)).unwrap()
}

/// Starts a gateway, waits until it is ready, and returns it with its address.
async fn ready(pipeline: &Pipeline) -> (Process, String) {
    let (process, address) = tests::gateway(&pipeline.scratch, &pipeline.broker.url(), &[]).await;
    while !get(&address, "/readyz", "Accept: */*").await.starts_with(b"HTTP/1.1 200 ") {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    (process, address)
}

/// The whole response: head and body.
async fn get(address: &str, path: &str, header: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head =
        format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{header}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    answer
}

/// The body of a response, which must have status 200.
fn body(answer: &[u8]) -> &[u8] {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let (head, body) = answer.split_at(end + 4);
    assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(answer));
    body
}

/// A line of `/proc/pid/status`, in bytes.
fn memory(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// The processor time of a process and its children so far (proc(5); Linux counts in hundredths of
/// a second).
fn processor_time(pid: u32) -> Duration {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    let ticks = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields = stat.rsplit(") ").next().unwrap().split(' ');
        fields.skip(11).take(2).map(|n| n.parse::<u64>().unwrap()).sum::<u64>()
    };
    Duration::from_millis(children.chain([pid]).map(ticks).sum::<u64>() * 10)
}

/// The path of a program. `PATH` may lack the directories of servers.
fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
    let mut all = std::env::split_paths(&path).chain(more);
    all.find_map(|directory| Some(directory.join(name)).filter(|file| file.is_file()))
}

fn print(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1000.0;
    println!("  {what:<32} p50 {:.2} ms   p99 {:.2} ms", at(50), at(99));
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
