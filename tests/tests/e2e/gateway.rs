//! Service 4: the last 100 records, outages of the broker, and limits.

use std::time::Duration;

use contract::{Message, subjects};
use nix::sys::signal::Signal;
use tests::http::{Lines, get, request};
use tests::{Broker, Pipeline, Scratch, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Waits until `GET /numbers` has this last sequence, and returns all its sequences.
pub async fn sequences(address: &str, last_seq: u64) -> Vec<u64> {
    let read = async || {
        let answer = get(address, "/numbers", &[]).await;
        (answer.status == 200).then(|| answer.json())
    };
    eventually("the gateway has caught up", async || {
        read().await.is_some_and(|body| body["last_seq"] == last_seq)
    })
    .await;
    let body = read().await.unwrap();
    assert_eq!(body["stream"], "NUMBERS");
    let numbers = body["numbers"].as_array().unwrap();
    assert_eq!(body["count"], numbers.len());
    numbers.iter().map(|number| number["seq"].as_u64().unwrap()).collect()
}

fn last_hundred(last: u64) -> Vec<u64> {
    (1..=last).rev().take(100).collect()
}

#[tokio::test]
async fn the_last_hundred_are_served_live_and_after_a_start() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    assert_eq!(sequences(&address, 0).await, last_hundred(0));
    let mut published = 0;
    for count in [1, 99, 100, 101, 230] {
        while published < count {
            published += 1;
            pipeline.publish(published).await;
        }
        assert_eq!(sequences(&address, count).await, last_hundred(count));
        let (_started_later, address) = pipeline.gateway().await;
        assert_eq!(sequences(&address, count).await, last_hundred(count));
    }
}

#[tokio::test]
async fn invalid_payloads_are_skipped() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    let invalid: [&[u8]; 6] = [
        b"",
        b"hello",
        b"{}",
        br#"{"number":7,"even":2,"odd":3}"#,
        br#"{"number":6,"even":3,"odd":2}"#,
        &[0xff; 2000],
    ];
    let mut expected = Vec::new();
    for seq in 1..=420 {
        // Two valid payloads, then six invalid ones. From 300 on all are invalid.
        if seq % 8 < 2 && seq < 300 {
            pipeline.publish(seq).await;
            expected.insert(0, seq);
        } else {
            let payload = invalid[usize::try_from(seq).unwrap() % 6];
            pipeline.store(seq, payload.to_vec()).await;
        }
    }
    expected.truncate(100);
    assert_eq!(sequences(&address, 420).await, expected);
    let (_started_later, address) = pipeline.gateway().await;
    assert_eq!(sequences(&address, 420).await, expected);
    let (status, output) = pipeline.evenodd(&["verify"]).await;
    assert_eq!(status, Some(1), "{output}");
    assert!(output.contains("sequence 4: ") && output.contains("sequence 420: "), "{output}");
}

/// A client can direct the answers to its requests into the history. There they resemble the
/// answers with which the gateway reads the history, which must not confuse the two.
#[tokio::test]
async fn answers_in_the_history_are_skipped() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    // Without a message id, a copy of this message is not a duplicate.
    let valid = contract::Product::new(846, 511).unwrap().encode();
    pipeline.client.publish(subjects::PUBLISH, valid.into()).await.unwrap();
    eventually("it is stored", async || pipeline.history().await.len() == 1).await;
    let asks = [
        // A copy and an end of a batch, an answer for a missing message, and a long answer.
        ("$JS.API.DIRECT.GET.NUMBERS", r#"{"seq":1,"batch":1}"#),
        ("$JS.API.DIRECT.GET.NUMBERS", r#"{"seq":999999}"#),
        ("$JS.API.STREAM.INFO.NUMBERS", ""),
    ];
    for (last, (api, question)) in [3, 4, 5].into_iter().zip(asks) {
        let reply = subjects::PUBLISH;
        pipeline.client.publish_with_reply(api, reply, question.into()).await.unwrap();
        eventually("it is stored", async || pipeline.history().await.len() == last).await;
    }
    pipeline.publish(1).await;
    assert_eq!(sequences(&address, 6).await, [6, 2, 1]);
    let entries = pipeline.history().await;
    assert_eq!(entries.iter().map(|entry| entry.sequence).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    assert!(entries.is_sorted_by_key(|entry| entry.time), "{entries:?}");
    let (status, output) = pipeline.evenodd(&["verify"]).await;
    assert_eq!(status, Some(1), "{output}");
    assert!(output.contains("sequence 3: not a valid message"), "{output}");
}

#[tokio::test]
async fn limits_content_types_and_errors() {
    let pipeline = Pipeline::new().await;
    for slot in 1..=3 {
        pipeline.publish(slot).await;
    }
    let (_gateway, address) = pipeline.gateway().await;
    sequences(&address, 3).await;
    let two = get(&address, "/numbers?limit=2", &[]).await;
    assert_eq!(two.json()["numbers"].as_array().unwrap().len(), 2);
    let newest = &two.json()["numbers"][0];
    assert_eq!(newest["number"], 432_306);
    assert_eq!((&newest["even"], &newest["odd"]), (&846.into(), &511.into()));
    let time = newest["published_at"].as_str().unwrap();
    assert!(time.len() == 30 && time.ends_with('Z'), "{time}");

    let text = get(&address, "/numbers", &["Accept: text/plain"]).await;
    assert_eq!(text.body, "432306\n432306\n432306\n");
    let head = request(&address, "HEAD", "/numbers", &[]).await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));

    for wrong in ["limit=0", "limit=101", "limit=-1", "limit=x", "limit", "limits=3"] {
        let answer = get(&address, &format!("/numbers?{wrong}"), &[]).await;
        assert_eq!(answer.status, 400, "{wrong}");
        assert!(answer.head.contains("application/problem+json"));
        assert!(answer.json()["detail"].as_str().unwrap().contains("limit"), "{answer:?}");
    }
    assert_eq!(get(&address, "/nothing", &[]).await.status, 404);
    // People type a slash at the end.
    for (path, expected) in
        [("/numbers/", 400), ("/history/", 200), ("/healthz/", 200), ("//", 404)]
    {
        assert_eq!(get(&address, path, &[]).await.status, expected, "{path}");
    }
    let docs = get(&address, "/docs/", &[]).await;
    assert_eq!((docs.status, docs.header("location")), (308, Some("../docs")));
    let post = request(&address, "POST", "/numbers", &[]).await;
    assert_eq!(post.status, 405);
    assert!(post.head.contains("allow: GET, HEAD"));
}

#[tokio::test]
async fn serves_what_it_has_while_the_broker_is_down() {
    let mut pipeline = Pipeline::new().await;
    for slot in 1..=5 {
        pipeline.publish(slot).await;
    }
    let (_gateway, address) = pipeline.gateway().await;
    assert_eq!(sequences(&address, 5).await, last_hundred(5));
    let readyz = async || get(&address, "/readyz", &[]).await.status;
    eventually("ready", async || readyz().await == 200).await;
    pipeline.broker.kill();
    eventually("not ready", async || readyz().await == 503).await;
    assert_eq!(get(&address, "/healthz", &[]).await.status, 200);
    assert_eq!(sequences(&address, 5).await, last_hundred(5));
    pipeline.broker.restart().await;
    eventually("ready again", async || readyz().await == 200).await;
    pipeline.publish(6).await;
    assert_eq!(sequences(&address, 6).await, last_hundred(6));
    // The gateway also notices a frozen broker.
    pipeline.broker.freeze();
    eventually("not ready", async || readyz().await == 503).await;
    pipeline.broker.thaw();
    eventually("ready again", async || readyz().await == 200).await;
}

/// A load balancer learns that a gateway is about to stop while clients are still served.
#[tokio::test]
async fn serves_for_a_while_after_sigterm() {
    let pipeline = Pipeline::new().await;
    pipeline.publish(1).await;
    let (mut gateway, address) = pipeline.gateway_with(&["--linger-ms", "1500"]).await;
    assert_eq!(sequences(&address, 1).await, [1]);
    let mut feed = Lines::open(&address, "/numbers/live", &[]).await;
    gateway.signal(Signal::SIGTERM);
    eventually("not ready", async || get(&address, "/readyz", &[]).await.status == 404).await;
    assert_eq!(get(&address, "/healthz", &[]).await.status, 200);
    pipeline.publish(2).await;
    assert_eq!(sequences(&address, 2).await, [2, 1]);
    assert_eq!(feed.sequences(1).await, [2]);
    assert_eq!(feed.event().await.unwrap().name, "shutdown");
    assert!(gateway.wait().await.success());
}

#[tokio::test]
async fn starts_before_the_broker_and_the_stream() {
    let scratch = Scratch::new();
    let mut broker = Broker::start(&scratch).await;
    let url = broker.url();
    broker.kill();
    let (mut gateway, address) = tests::gateway(&scratch, &url, &[]).await;
    let address = &*address;
    assert_eq!(get(address, "/healthz", &[]).await.status, 200);
    assert_eq!(get(address, "/readyz", &[]).await.status, 503);
    assert_eq!(get(address, "/numbers", &[]).await.status, 503);
    broker.restart().await;
    gateway.wait_for("cannot read the history").await;
    let _provisioned = Pipeline::on(scratch, broker).await;
    assert_eq!(sequences(address, 0).await, last_hundred(0));
}

#[tokio::test]
async fn a_recreated_stream_is_noticed() {
    let pipeline = Pipeline::new().await;
    for slot in 1..=5 {
        pipeline.publish(slot).await;
    }
    let (_gateway, address) = pipeline.gateway().await;
    sequences(&address, 5).await;
    let context = async_nats::jetstream::new(pipeline.client.clone());
    context.delete_stream(contract::streams::NUMBERS).await.unwrap();
    assert_eq!(pipeline.evenodd(&["provision"]).await.0, Some(0));
    pipeline.publish(100).await;
    assert_eq!(sequences(&address, 1).await, [1]);
}

#[tokio::test]
async fn slow_and_silent_clients_are_cut() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway_with(&["--header-ms", "500"]).await;
    let address = &*address;
    let silent = async {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.read_to_end(&mut Vec::new()).await
    };
    let dripping = async {
        let mut client = TcpStream::connect(address).await.unwrap();
        for byte in b"GET /numbers HTTP/1.1\r\nHost: x\r\nX: ".iter().chain([b'x'; 1000].iter()) {
            if client.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let idle = async {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        client.read_to_end(&mut Vec::new()).await
    };
    // The default timeout is 10 s, and the dripping client would take 50 s.
    let all = async { tokio::join!(silent, dripping, idle) };
    let cut = tokio::time::timeout(Duration::from_secs(8), all).await;
    assert!(cut.is_ok(), "a connection is still open");
    let answer = request(address, "CONNECT", "a:1", &[]).await;
    assert_eq!(answer.status, 400);
    let large = format!("X: {}", "x".repeat(20_000));
    assert_eq!(get(address, "/healthz", &[&large]).await.status, 431);
}

/// Clients that send without end, or stop in the middle, get an answer or are cut. The gateway
/// keeps serving others.
#[tokio::test]
async fn flooding_clients_are_cut() {
    let pipeline = Pipeline::new().await;
    for slot in 1..=100 {
        pipeline.publish(slot).await;
    }
    let args = ["--header-ms", "1000", "--request-ms", "1000"];
    let (_gateway, address) = pipeline.gateway_with(&args).await;
    sequences(&address, 100).await;
    let address = &*address;
    let connect = async || TcpStream::connect(address).await.unwrap();
    let endless = async |head: &[u8], more: &[u8], read: bool| {
        let (mut from, mut to) = connect().await.into_split();
        let write = async {
            let _ = to.write_all(head).await;
            while to.write_all(more).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        let read = async {
            if !read {
                std::future::pending::<()>().await;
            }
            let _ = from.read_to_end(&mut Vec::new()).await;
        };
        tokio::select! {
            () = write => {}
            () = read => {}
        }
    };
    let get = b"GET /numbers HTTP/1.1\r\nHost: x\r\n\r\n";
    let all = async {
        tokio::join!(
            // An endless header, an endless body, and endless requests.
            endless(b"GET /numbers HTTP/1.1\r\nX: ", &[b'x'; 1000], true),
            endless(
                b"POST /numbers HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\n",
                &[b'x'; 1000],
                true
            ),
            endless(get, get, false),
            async {
                // Half a request, after which the client shuts down its side.
                let mut stream = connect().await;
                stream.write_all(b"GET /numb").await.unwrap();
                stream.shutdown().await.unwrap();
                let mut answer = Vec::new();
                let _ = stream.read_to_end(&mut answer).await;
            },
        )
    };
    let cut = tokio::time::timeout(Duration::from_secs(20), all).await;
    assert!(cut.is_ok(), "a connection is still open");
    assert_eq!(request(address, "GET", "/numbers", &[]).await.status, 200);
}

/// A client may shut down its side after the request, as `nc -N` does. Every route answers it.
#[tokio::test]
async fn half_closed_clients_are_answered() {
    let pipeline = Pipeline::new().await;
    for slot in 1..=300 {
        pipeline.publish(slot).await;
    }
    let (_gateway, address) = pipeline.gateway().await;
    sequences(&address, 300).await;
    eventually("ready", async || {
        get(&address, "/readyz", &[]).await.status == 200
            && get(&address, "/replicas", &[]).await.status == 200
    })
    .await;
    let half_closed = async |path: &str, version: &str| {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        let ask = format!("GET {path} HTTP/{version}\r\nHost: x\r\n\r\n");
        stream.write_all(ask.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        stream
    };
    for (path, expected, end) in [
        ("/numbers", 200, "]}\n"),
        ("/numbers/1", 200, "}\n"),
        ("/history?limit=150", 200, "}\n"),
        ("/history.csv", 200, "\r\n0\r\n\r\n"),
        ("/history.ndjson", 200, "\r\n0\r\n\r\n"),
        ("/replicas", 200, "}\n"),
        ("/", 200, "</footer>\n"),
        ("/docs", 200, "</footer>\n"),
        ("/openapi.json", 200, "}\n"),
        ("/healthz", 200, "}\n"),
        ("/readyz", 200, "}\n"),
        ("/numbers?limit=0", 400, "}\n"),
        ("/nothing", 404, "}\n"),
        // The gateway waits for this record for a second.
        ("/numbers/301", 404, "}\n"),
    ] {
        for _ in 0..5 {
            // The gateway closes the connection after its answer.
            let mut stream = half_closed(path, "1.1").await;
            let mut answer = String::new();
            let read = stream.read_to_string(&mut answer);
            tokio::time::timeout(tests::patience(), read).await.expect(path).unwrap();
            let status = answer.split(' ').nth(1).unwrap();
            assert_eq!(status, expected.to_string(), "{path}");
            assert!(answer.ends_with(end), "{path}: {answer}");
        }
    }
    let mut feed = Lines::over(half_closed("/numbers/live?after=298", "1.0").await).await;
    assert_eq!(feed.sequences(2).await, [299, 300]);
    pipeline.publish(301).await;
    assert_eq!(feed.sequences(1).await, [301]);
}

/// Requests that RFC 9112 says must be refused.
#[tokio::test]
async fn malformed_requests_are_refused() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    let send = async |request: &str| {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        tokio::time::timeout(tests::patience(), read).await.expect(request).unwrap();
        answer
    };
    // Section 3.2: one Host header with the name of a host.
    for hosts in [
        "",
        "Host: a\r\nHost: a\r\n",
        "Host: a\r\nHost: b\r\n",
        "Host: a b\r\n",
        "Host: a/b\r\n",
        "Host: a?b\r\n",
        "Host: user@a\r\n",
        "Host: a:b\r\n",
        "Host: a:80:80\r\n",
        "Host: [::1\r\n",
        "Host: http://a\r\n",
        "Host: \u{e9}\r\n",
    ] {
        for target in ["/healthz", "/numbers", "http://a/healthz"] {
            let answer = send(&format!("GET {target} HTTP/1.1\r\n{hosts}\r\n")).await;
            assert!(answer.starts_with("HTTP/1.1 400 "), "{hosts}: {answer}");
            assert!(answer.contains("application/problem+json"), "{hosts}: {answer}");
            assert!(answer.contains("Host header"), "{hosts}: {answer}");
        }
    }
    for hosts in ["Host: a", "Host: a_b.c:8080", "Host: [::1]:80", "Host: 127.0.0.1:", "Host:"] {
        let answer = send(&format!("GET /healthz HTTP/1.1\r\n{hosts}\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{hosts}: {answer}");
    }
    assert!(send("GET /healthz HTTP/1.0\r\n\r\n").await.starts_with("HTTP/1.0 200 "));
    // hyper refuses these itself, without a body, and closes the connection.
    for rest in [
        "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "Content-Length: 1, 2\r\n\r\nab",
        "Content-Length: +1\r\n\r\na",
        "Content-Length: -1\r\n\r\n",
        "Transfer-Encoding: gzip\r\n\r\n",
        "Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        "X : 1\r\n\r\n",
        "X: 1\r\n 2\r\n\r\n",
        "X\r\n\r\n",
        "X: a\rb\r\n\r\n",
        "X: a\0b\r\n\r\n",
    ] {
        let answer = send(&format!("GET /healthz HTTP/1.1\r\nHost: a\r\n{rest}")).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{rest}: {answer}");
        assert!(answer.ends_with("\r\n\r\n"), "{rest}: {answer}");
    }
    // With both lengths the request counts as chunked, and nothing after it as a request
    // (section 6.1).
    for chunks in ["0\r\n\r\n", "x\r\n\r\n"] {
        let both = "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n";
        let get = "GET /healthz HTTP/1.1\r\nHost: a\r\n";
        let answer = send(&format!("{get}{both}{chunks}{get}\r\n")).await;
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    }
}

/// Connections beyond the limit wait until there is room again.
#[tokio::test]
async fn connections_are_bounded() {
    let pipeline = Pipeline::new().await;
    let args = ["--max-connections", "10", "--header-ms", "1000"];
    let (gateway, address) = pipeline.gateway_with(&args).await;
    sequences(&address, 0).await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(&address).await.unwrap());
    }
    let open = || std::fs::read_dir(format!("/proc/{}/fd", gateway.pid())).unwrap().count();
    for _ in 0..50 {
        assert!(open() < 10 + 30, "{} files are open", open());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(silent);
    eventually("there is room", async || get(&address, "/healthz", &[]).await.status == 200).await;
}
