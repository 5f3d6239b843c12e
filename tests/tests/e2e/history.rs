//! Service 4: pages and exports of the history.

use std::time::Duration;

use futures::StreamExt;
use serde_json::Value;
use tests::brokers::COUNT;
use tests::http::{Lines, get, request};
use tests::{Brokers, Pipeline, Scratch, eventually};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::gateway::sequences;

const LAST: u64 = 2500;

/// 2500 messages, two of them invalid, and a gateway that has caught up.
async fn pipeline() -> (Pipeline, tests::Process, String) {
    let pipeline = Pipeline::new().await;
    for slot in 1..=LAST {
        match slot {
            10 | 2450 => pipeline.store(slot, b"no number".to_vec()).await,
            _ => pipeline.publish(slot).await,
        };
    }
    let args = ["--history-reads", "1000"];
    let (gateway, address) = pipeline.gateway_with(&args).await;
    sequences(&address, LAST).await;
    (pipeline, gateway, address)
}

fn valid(seq: &u64) -> bool {
    ![10, 2450].contains(seq)
}

fn expected(after: u64, last: u64) -> Vec<u64> {
    (after + 1..=last).filter(valid).collect()
}

/// The `seq` of every line.
fn lines(body: &str) -> Vec<u64> {
    let seq = |line: &str| serde_json::from_str::<Value>(line).unwrap()["seq"].as_u64().unwrap();
    body.lines().map(seq).collect()
}

#[tokio::test]
async fn pages_from_the_first_to_the_last() {
    let (_pipeline, _gateway, address) = pipeline().await;
    for limit in [1000, 333, 100] {
        let mut path = format!("/history?limit={limit}");
        let mut seen = Vec::new();
        loop {
            let page = get(&address, &path, &[]).await;
            assert_eq!(page.status, 200, "{page:?}");
            let sequences = page.sequences();
            assert!(sequences.len() <= limit);
            assert_eq!(page.json()["count"], sequences.len());
            assert_eq!(page.json()["last_seq"], LAST);
            seen.extend(sequences);
            let next = page.json()["next"].as_u64();
            let link = next.map(|next| format!("<?after={next}&limit={limit}>; rel=\"next\""));
            assert_eq!(page.header("link"), link.as_deref());
            let Some(next) = next else { break };
            path = format!("/history?after={next}&limit={limit}");
        }
        assert_eq!(seen, expected(0, LAST), "limit {limit}");
    }
    let default = get(&address, "/history", &[]).await;
    assert_eq!(default.json()["next"], 100);
    let end = get(&address, &format!("/history?after={LAST}"), &[]).await;
    assert_eq!((end.sequences().len(), &end.json()["next"]), (0, &Value::Null));
}

#[tokio::test]
async fn pages_from_a_time_on() {
    let (pipeline, _gateway, address) = pipeline().await;
    let stored = pipeline.entries(1, 1000).await;
    let recent = pipeline.entries(LAST - 60, 61).await;
    for entry in [&stored[0], &stored[500], &stored[999], &recent[5], &recent[60]] {
        let from = entry.time.format(&Rfc3339).unwrap();
        let page = get(&address, &format!("/history?from={from}&limit=3"), &[]).await;
        let first = entry.sequence;
        let last = (first + 2).min(LAST);
        assert_eq!(page.sequences(), expected(first - 1, last), "{from}: {page:?}");
        // One nanosecond later, the page begins with the next message.
        let later = (entry.time + Duration::from_nanos(1)).format(&Rfc3339).unwrap();
        let page = get(&address, &format!("/history?from={later}&limit=1"), &[]).await;
        assert_eq!(page.sequences(), expected(first, (first + 1).min(LAST)), "{later}");
    }
    for (from, all) in [
        ("0000-01-01T00:00:00%2B00:01", true),
        ("1600-01-01T00:00:00Z", true),
        ("1970-01-01T00:00:00Z", true),
        ("2200-01-01T00:00:00Z", false),
        ("2300-01-01T00:00:00Z", false),
        ("9999-12-31T23:59:59-00:01", false),
    ] {
        let page = get(&address, &format!("/history?from={from}&limit=5"), &[]).await;
        assert_eq!(page.sequences().len(), if all { 5 } else { 0 }, "{from}");
        let export = get(&address, &format!("/history.ndjson?from={from}"), &[]).await;
        let expected = if all { expected(0, LAST) } else { Vec::new() };
        assert_eq!(lines(&export.body), expected, "{from}");
    }
}

#[tokio::test]
async fn the_whole_history_as_ndjson_and_csv() {
    let (pipeline, _gateway, address) = pipeline().await;
    let all = get(&address, "/history.ndjson", &[]).await;
    assert_eq!(all.header("content-type"), Some("application/x-ndjson"));
    assert_eq!(lines(&all.body), expected(0, LAST));
    let first = all.body.lines().next().unwrap();
    assert_eq!(first, get(&address, "/numbers/1", &[]).await.body.trim_end());

    let table = get(&address, "/history.csv", &[]).await;
    assert_eq!(table.header("content-type"), Some("text/csv; charset=utf-8"));
    let mut rows = table.body.lines();
    assert_eq!(rows.next(), Some("seq,number,even,odd,published_at"));
    let number: Value = serde_json::from_str(first).unwrap();
    let time = number["published_at"].as_str().unwrap();
    assert_eq!(rows.next().unwrap(), format!("1,432306,846,511,{time}"));
    assert_eq!(rows.count(), expected(1, LAST).len());

    // From the time of one message until that of another, which is excluded.
    let stored = pipeline.entries(1, 1000).await;
    let recent = pipeline.entries(LAST - 60, 61).await;
    let times: Vec<_> =
        [&stored[700], &recent[10]].map(|e| e.time.format(&Rfc3339).unwrap()).into();
    let path = format!("/history.ndjson?from={}&until={}", times[0], times[1]);
    let part = get(&address, &path, &[]).await;
    assert_eq!(lines(&part.body), expected(700, recent[10].sequence - 1));
    let after = get(&address, "/history.ndjson?after=2000", &[]).await;
    assert_eq!(lines(&after.body), expected(2000, LAST));
    let path = format!("/history.csv?until={}", times[0]);
    assert_eq!(get(&address, &path, &[]).await.body.lines().count(), 700);
    let head = request(&address, "HEAD", "/history.csv", &[]).await;
    assert_eq!((head.status, head.bytes.len()), (200, 0));
}

#[tokio::test]
async fn an_empty_history_is_not_an_error() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    sequences(&address, 0).await;
    assert!(get(&address, "/history", &[]).await.sequences().is_empty());
    assert_eq!(get(&address, "/history.ndjson", &[]).await.body, "");
    let table = get(&address, "/history.csv", &[]).await.body;
    assert_eq!(table, "seq,number,even,odd,published_at\n");
    let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap();
    assert_eq!(get(&address, &format!("/history?from={now}"), &[]).await.status, 200);
}

#[tokio::test]
async fn errors_explain_wrong_requests() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    sequences(&address, 0).await;
    for (path, hint) in [
        ("/history?limit=0", "1 to 1000"),
        ("/history?limit=1001", "1 to 1000"),
        ("/history?after=-1", "after is a number"),
        ("/history?after=%2B1", "after is a number"),
        ("/history?from=today", "RFC 3339"),
        ("/history?after=1&from=2026-01-01T00:00:00Z", "not both"),
        ("/history?page=2", "after, from, limit"),
        ("/history.csv?limit=2", "after, from, until"),
        ("/history.ndjson?until=1", "RFC 3339"),
        ("/numbers/1?x", "this takes none"),
    ] {
        let answer = get(&address, path, &[]).await;
        assert_eq!(answer.status, 400, "{path}");
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        let detail = answer.json()["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(hint), "{path}: {detail}");
    }
}

/// Reads of records that are not in memory are limited. Other requests are not.
#[tokio::test]
async fn reads_of_old_records_are_limited() {
    let pipeline = Pipeline::new().await;
    for slot in 1..=300 {
        pipeline.publish(slot).await;
    }
    let (_gateway, address) = pipeline.gateway_with(&["--history-reads", "5"]).await;
    sequences(&address, 300).await;
    let mut refused = 0;
    for _ in 0..40 {
        let answer = get(&address, "/history?after=17&limit=1", &[]).await;
        match answer.status {
            200 => assert_eq!(answer.sequences(), [18]),
            429 => {
                assert_eq!(answer.header("retry-after"), Some("1"));
                refused += 1;
            }
            _ => panic!("{answer:?}"),
        }
        assert_eq!(get(&address, "/history?after=250", &[]).await.status, 200);
        assert_eq!(get(&address, "/numbers/300", &[]).await.status, 200);
    }
    assert!(refused > 10, "{refused}");
    // An export begins with such a read unless its first record is in memory.
    let exports = futures::stream::iter(0..20).then(async |_| {
        assert_eq!(get(&address, "/history.csv?after=250", &[]).await.status, 200);
        get(&address, "/history.csv?after=17", &[]).await.status
    });
    let statuses: Vec<u16> = exports.collect().await;
    assert!(statuses.contains(&429), "{statuses:?}");
    eventually("it is allowed again", async || {
        get(&address, "/numbers/17", &[]).await.status == 200
    })
    .await;
}

/// An export stops reading the stream while its client does not read, and no longer counts once the
/// client is gone. An export that fails does not look complete.
#[tokio::test]
async fn exports_wait_for_their_clients() {
    let mut pipeline = Pipeline::new().await;
    for slot in 1..=8000 {
        pipeline.publish(slot).await;
    }
    let args = ["--max-exports", "1", "--request-ms", "60000"];
    let (_gateway, address) = pipeline.gateway_with(&args).await;
    sequences(&address, 8000).await;
    let slow = TcpStream::connect(&address).await.unwrap();
    // A small receive buffer: the 700 KB of the export do not fit.
    socket2::SockRef::from(&slow).set_recv_buffer_size(4096).unwrap();
    let mut slow = slow;
    let ask = b"GET /history.ndjson HTTP/1.1\r\nHost: x\r\n\r\n";
    slow.write_all(ask).await.unwrap();
    let mut some = vec![0; 10_000];
    slow.read_exact(&mut some).await.unwrap();
    // If the client read, the export would take a tenth of a second.
    for _ in 0..10 {
        let busy = get(&address, "/history.csv", &[]).await;
        assert_eq!(busy.status, 429, "{busy:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(slow);
    eventually("the export has ended", async || {
        Lines::open(&address, "/history.csv", &[]).await.status == 200
    })
    .await;

    let mut broken = None;
    eventually("an export begins", async || {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        socket2::SockRef::from(&stream).set_recv_buffer_size(4096).unwrap();
        stream.write_all(ask).await.unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.unwrap();
        let begun = head.ends_with(b"200");
        broken = Some(stream);
        begun
    })
    .await;
    pipeline.broker.kill();
    let mut rest = Vec::new();
    let read = broken.unwrap();
    let mut read = tokio::io::BufReader::new(read);
    // The answer is cut, or ends without the last chunk.
    let _ = tokio::time::timeout(tests::patience(), read.read_to_end(&mut rest)).await.unwrap();
    assert!(!rest.ends_with(b"\r\n0\r\n\r\n"), "it looks complete");
    assert!(rest.len() < 700_000);
}

/// A silent broker still gets its share of the reads. Another broker answers in its place.
#[tokio::test]
async fn reads_succeed_in_spite_of_a_silent_replica() {
    let scratch = Scratch::new();
    let brokers = Brokers::start(&scratch).await;
    let url = brokers.url();
    brokers.provision(&scratch).await;
    let client = brokers.client_of(0).await;
    for slot in 1..=3000 {
        tests::publish(&client, slot).await;
    }
    let first = url.split(',').next().unwrap();
    let args = ["--history-reads", "1000"];
    let (_gateway, address) = tests::gateway(&scratch, first, &args).await;
    sequences(&address, 3000).await;
    for silent in 1..COUNT {
        brokers.freeze(silent);
        let mut unlucky = 0;
        for after in 0..30 {
            let page = get(&address, &format!("/history?after={after}&limit=3"), &[]).await;
            if page.status == 503 {
                unlucky += 1;
                continue;
            }
            assert_eq!(page.sequences(), [after + 1, after + 2, after + 3], "{page:?}");
        }
        // A request reaches the silent broker once in three, all five of a read once in 243.
        assert!(unlucky <= 3, "{unlucky} of 30");
        eventually("an export is complete", async || {
            let all = get(&address, "/history.ndjson", &[]).await;
            all.status == 200 && lines(&all.body) == (1..=3000).collect::<Vec<_>>()
        })
        .await;
        brokers.thaw(silent);
    }
}
