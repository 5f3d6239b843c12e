//! Service 4: the live feed.

use std::time::Duration;

use tests::http::{Lines, get};
use tests::{Pipeline, Process, connect, eventually, patience, patient};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

use crate::gateway::sequences;

async fn published(pipeline: &Pipeline, slots: std::ops::RangeInclusive<u64>) {
    for slot in slots {
        pipeline.publish(slot).await;
    }
}

#[tokio::test]
async fn a_feed_sends_records_as_they_come() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    published(&pipeline, 1..=5).await;
    sequences(&address, 5).await;
    let mut live = Lines::open(&address, "/numbers/live", &[]).await;
    assert_eq!(live.status, 200);
    assert!(live.head.contains("content-type: text/event-stream\n"), "{}", live.head);
    let accept = ["Accept: application/x-ndjson"];
    let mut lines = Lines::open(&address, "/numbers/live?after=3", &accept).await;
    assert!(lines.head.contains("content-type: application/x-ndjson\n"));
    published(&pipeline, 6..=8).await;
    let event = live.event().await.unwrap();
    assert_eq!((event.name.as_str(), event.id), ("number", 6));
    let latest = get(&address, "/numbers/6", &[]).await;
    assert_eq!(event.data, latest.json());
    assert_eq!(live.sequences(2).await, [7, 8]);
    for seq in 4..=8 {
        let line = lines.line().await.unwrap();
        let number: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(number["seq"], seq);
    }
}

/// A feed resumes at any position, however old, on any replica. It skips invalid messages.
#[tokio::test]
async fn a_feed_resumes_at_the_position_of_the_client() {
    const LAST: u64 = 1300;
    let pipeline = Pipeline::new().await;
    for slot in 1..=LAST {
        if slot % 100 == 50 || (600..900).contains(&slot) {
            pipeline.store(slot, b"no number".to_vec()).await;
        } else {
            pipeline.publish(slot).await;
        }
    }
    let valid = |seq: &u64| seq % 100 != 50 && !(600..900).contains(seq);
    let (_one, one) = pipeline.gateway().await;
    let (_two, two) = pipeline.gateway().await;
    sequences(&one, LAST).await;
    sequences(&two, LAST).await;
    for (address, after) in
        [(&one, 0), (&two, 1), (&one, 610), (&two, 949), (&one, 1199), (&two, 1201), (&one, LAST)]
    {
        let header = format!("Last-Event-ID: {after}");
        // The header, which a browser sends, takes precedence over the URL.
        let mut live = Lines::open(address, "/numbers/live?after=17", &[&header]).await;
        let expected: Vec<u64> = (after + 1..=LAST).filter(valid).collect();
        assert_eq!(live.sequences(expected.len()).await, expected, "after {after}");
    }
    // Clients that cannot send headers add a parameter to the address.
    for name in ["lastEventId", "lastEventID", "last-event-id", "Last-Event-ID"] {
        let path = format!("/numbers/live?after=17&{name}={}", LAST - 2);
        let mut live = Lines::open(&one, &path, &["Last-Event-ID:"]).await;
        assert_eq!(live.sequences(2).await, [LAST - 1, LAST], "{name}");
        let path = format!("/numbers/live?after={}&{name}=", LAST - 1);
        assert_eq!(Lines::open(&one, &path, &[]).await.sequences(1).await, [LAST], "{name}");
    }
}

/// A client moves between two replicas while products are published and a gateway is killed.
#[tokio::test]
async fn a_client_that_moves_misses_nothing() {
    const LAST: u64 = 400;
    let pipeline = Pipeline::new().await;
    let (mut one, first) = pipeline.gateway().await;
    let (_two, second) = pipeline.gateway().await;
    sequences(&first, 0).await;
    sequences(&second, 0).await;
    let publishing = async {
        published(&pipeline, 1..=LAST).await;
    };
    let following = async {
        let mut seen = Vec::new();
        for turn in 0.. {
            let after = seen.last().copied().unwrap_or(0);
            if after == LAST {
                break;
            }
            let address = if turn % 2 == 0 && turn < 6 { &first } else { &second };
            if turn == 7 {
                one.kill();
            }
            let header = format!("Last-Event-ID: {after}");
            let mut live = Lines::open(address, "/numbers/live", &[&header]).await;
            let count = usize::try_from(40.min(LAST - after)).unwrap();
            seen.extend(live.sequences(count).await);
        }
        seen
    };
    let ((), seen) = tokio::join!(publishing, following);
    assert_eq!(seen, (1..=LAST).collect::<Vec<_>>());
}

#[tokio::test]
async fn an_unknown_position_is_reset() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    published(&pipeline, 1..=5).await;
    sequences(&address, 5).await;
    let mut beyond = Lines::open(&address, "/numbers/live?after=99", &[]).await;
    let reset = beyond.event().await.unwrap();
    assert_eq!((reset.name.as_str(), reset.id), ("reset", 5));
    assert_eq!((&reset.data["position"], &reset.data["last_seq"]), (&99.into(), &5.into()));
    let accept = ["Accept: application/x-ndjson"];
    let mut other = Lines::open(&address, "/numbers/live?after=3&stream=1234", &accept).await;
    let line: serde_json::Value = serde_json::from_str(&other.line().await.unwrap()).unwrap();
    assert_eq!(line["event"], "reset");
    // Both feeds continue with the next record.
    published(&pipeline, 6..=6).await;
    assert_eq!(beyond.sequences(1).await, [6]);
    assert!(other.line().await.unwrap().contains(r#""seq":6"#));
    // The ETag of an answer contains the id of the stream. With that id the position is known.
    let numbers = get(&address, "/numbers", &[]).await;
    let stream = numbers.header("etag").unwrap().split(['"', '-']).nth(1).unwrap();
    let path = format!("/numbers/live?after=4&stream={stream}");
    assert_eq!(Lines::open(&address, &path, &[]).await.sequences(2).await, [5, 6]);
    for wrong in ["after=-1", "after=x", "afters=1", "after=1&after=2", "lastEventId=x"] {
        let answer = get(&address, &format!("/numbers/live?{wrong}"), &[]).await;
        assert_eq!(answer.status, 400, "{wrong}");
    }
    for wrong in ["Last-Event-ID: x", "Last-Event-ID: +1"] {
        assert_eq!(get(&address, "/numbers/live", &[wrong]).await.status, 400);
    }
}

#[tokio::test]
async fn a_recreated_stream_resets_open_feeds() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    published(&pipeline, 1..=5).await;
    sequences(&address, 5).await;
    let mut live = Lines::open(&address, "/numbers/live?after=4", &[]).await;
    assert_eq!(live.sequences(1).await, [5]);
    let context = async_nats::jetstream::new(pipeline.client.clone());
    context.delete_stream(contract::streams::NUMBERS).await.unwrap();
    assert_eq!(pipeline.evenodd(&["provision"]).await.0, Some(0));
    published(&pipeline, 100..=100).await;
    let reset = live.event().await.unwrap();
    assert_eq!((reset.name.as_str(), reset.id), ("reset", 1));
    published(&pipeline, 101..=101).await;
    assert_eq!(live.sequences(1).await, [2]);
}

#[tokio::test]
async fn clients_are_told_that_a_gateway_stops() {
    let pipeline = Pipeline::new().await;
    let (mut gateway, address) = pipeline.gateway().await;
    published(&pipeline, 1..=2).await;
    sequences(&address, 2).await;
    let mut live = Lines::open(&address, "/numbers/live?after=1", &[]).await;
    assert_eq!(live.sequences(1).await, [2]);
    let accept = ["Accept: application/x-ndjson"];
    let mut lines = Lines::open(&address, "/numbers/live", &accept).await;
    let (status, event, line) = tokio::join!(gateway.terminate(), live.event(), lines.line());
    assert_eq!(status.code(), Some(0));
    let event = event.unwrap();
    assert_eq!((event.name.as_str(), event.id), ("shutdown", 2));
    assert!(line.unwrap().contains(r#""event":"shutdown""#));
    assert!(live.event().await.is_none());
}

/// Open feeds survive the loss of the broker, and miss nothing.
#[tokio::test]
async fn a_feed_survives_the_broker() {
    let mut pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    published(&pipeline, 1..=3).await;
    sequences(&address, 3).await;
    let mut live = Lines::open(&address, "/numbers/live?after=1", &[]).await;
    assert_eq!(live.sequences(2).await, [2, 3]);
    pipeline.broker.kill();
    // This client claims a later record than the gateway has, and the gateway cannot check that
    // now.
    let mut ahead = Lines::open(&address, "/numbers/live?after=4", &[]).await;
    pipeline.broker.restart().await;
    pipeline.client = connect(&pipeline.broker).await;
    published(&pipeline, 4..=6).await;
    assert_eq!(live.sequences(3).await, [4, 5, 6]);
    assert_eq!(ahead.sequences(2).await, [5, 6]);
}

#[tokio::test]
async fn event_streams_are_limited() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway_with(&["--max-event-streams", "2"]).await;
    sequences(&address, 0).await;
    let one = Lines::open(&address, "/numbers/live", &[]).await;
    let _two = Lines::open(&address, "/numbers/live", &[]).await;
    let three = get(&address, "/numbers/live", &[]).await;
    assert_eq!(three.status, 503);
    assert!(three.header("retry-after").is_some());
    assert_eq!(get(&address, "/numbers", &[]).await.status, 200);
    drop(one);
    // The gateway notices that a client is gone when it sends it something.
    let mut slot = 0;
    eventually("there is room again", async || {
        slot += 1;
        pipeline.publish(slot).await;
        Lines::open(&address, "/numbers/live", &[]).await.status == 200
    })
    .await;
}

/// Without new records, the second heartbeat after the client has gone frees its place.
#[tokio::test]
async fn a_heartbeat_frees_the_place_of_a_client_that_is_gone() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway_with(&["--max-event-streams", "1"]).await;
    sequences(&address, 0).await;
    drop(Lines::open(&address, "/numbers/live", &[]).await);
    assert_eq!(get(&address, "/numbers/live", &[]).await.status, 503);
    let freed = async {
        while Lines::open(&address, "/numbers/live", &[]).await.status != 200 {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(patient(Duration::from_secs(45)), freed).await.expect("it is still taken");
}

/// The resident memory of a process in KB, without the buffers that the kernel holds for it.
fn resident_kb(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Clients that request the whole history as a feed and never read take bounded memory, are cut,
/// and do not disturb other clients.
#[tokio::test]
async fn clients_that_never_read_are_cut() {
    const CLIENTS: usize = 200;
    let pipeline = Pipeline::new().await;
    published(&pipeline, 1..=5000).await;
    let (gateway, address) =
        pipeline.gateway_with(&["--request-ms", "2000", "--history-reads", "1000"]).await;
    sequences(&address, 5000).await;
    let before_kb = resident_kb(&gateway);
    let mut silent = Vec::new();
    for _ in 0..CLIENTS {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut stream = socket.connect(address.parse().unwrap()).await.unwrap();
        stream.write_all(b"GET /numbers/live?after=0 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        silent.push(stream);
    }
    let mut live = Lines::open(&address, "/numbers/live", &[]).await;
    let open = || std::fs::read_dir(format!("/proc/{}/fd", gateway.pid())).unwrap().count();
    eventually("they are open", async || open() > CLIENTS).await;
    let mut most_kb = 0;
    let mut slot = 5000;
    eventually("they are cut", async || {
        most_kb = most_kb.max(resident_kb(&gateway));
        slot += 1;
        pipeline.publish(slot).await;
        assert_eq!(live.sequences(1).await, [slot]);
        slot > 5020 && open() < CLIENTS / 4
    })
    .await;
    // 250 messages are 38 KB.
    let per_client_kb = most_kb.saturating_sub(before_kb) / CLIENTS as u64;
    assert!(per_client_kb < 100, "{per_client_kb} KB a client");
}

/// As many event streams as the machine allows, up to 10,000. Each gets every record.
#[tokio::test]
async fn ten_thousand_event_streams() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let clients = usize::try_from(hard.saturating_sub(2000)).unwrap().min(10_000);
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    sequences(&address, 0).await;
    let mut feeds = Vec::with_capacity(clients);
    for _ in 0..clients {
        feeds.push(Lines::open(&address, "/numbers/live?after=0", &[]).await);
    }
    published(&pipeline, 1..=3).await;
    let all = futures::future::join_all(feeds.iter_mut().map(async |feed| feed.sequences(3).await));
    let all = tokio::time::timeout(patience(), all).await.expect("some have not got all");
    assert!(all.iter().all(|seen| *seen == [1, 2, 3]));
    // The gateway still serves other requests.
    assert_eq!(get(&address, "/numbers", &[]).await.status, 200);
}
