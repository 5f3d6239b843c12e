//! Service 4: the last 100 records, single records, and the headers of answers.

use std::io::Read;

use tests::http::{get, request};
use tests::{Pipeline, eventually};

use crate::gateway::sequences;

#[tokio::test]
async fn an_unchanged_answer_is_not_sent_again() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    for slot in 1..=3 {
        pipeline.publish(slot).await;
    }
    sequences(&address, 3).await;
    let first = get(&address, "/numbers", &[]).await;
    let etag = first.header("etag").unwrap();
    assert_eq!(first.header("cache-control"), Some("no-cache"));
    for tags in [etag.to_owned(), format!("\"x\", {etag}"), "*".to_owned()] {
        let header = format!("If-None-Match: {tags}");
        let again = get(&address, "/numbers", &[&header]).await;
        assert_eq!((again.status, again.bytes.len()), (304, 0), "{tags}");
        assert_eq!(again.header("etag"), Some(etag));
        assert_eq!(again.header("vary"), first.header("vary"));
    }
    // Another replica has the same tag.
    let (_other, other) = pipeline.gateway().await;
    sequences(&other, 3).await;
    let header = format!("If-None-Match: {etag}");
    assert_eq!(get(&other, "/numbers", &[&header]).await.status, 304);
    pipeline.publish(4).await;
    sequences(&address, 4).await;
    let changed = get(&address, "/numbers", &[&header]).await;
    assert_eq!(changed.status, 200);
    assert_ne!(changed.header("etag"), Some(etag));
}

#[tokio::test]
async fn gzip_decodes_to_the_same_bytes() {
    let pipeline = Pipeline::new().await;
    for slot in 1..=120 {
        pipeline.publish(slot).await;
    }
    let (_gateway, address) = pipeline.gateway().await;
    sequences(&address, 120).await;
    let plain = get(&address, "/numbers", &[]).await;
    assert_eq!(plain.header("content-encoding"), None);
    let accepts = ["Accept-Encoding: gzip, deflate, br, zstd"];
    let answer = get(&address, "/numbers", &accepts).await;
    assert_eq!(answer.header("content-encoding"), Some("gzip"));
    assert_eq!(answer.header("vary"), Some("Accept, Accept-Encoding"));
    assert!(answer.bytes.len() < plain.bytes.len() / 3);
    let mut decoded = Vec::new();
    flate2::read::GzDecoder::new(&*answer.bytes).read_to_end(&mut decoded).unwrap();
    assert_eq!(decoded, plain.bytes);
    let head = request(&address, "HEAD", "/numbers", &accepts).await;
    assert_eq!((head.status, head.bytes.len()), (200, 0));
    assert_eq!(head.header("content-length"), answer.header("content-length"));
}

#[tokio::test]
async fn single_records() {
    let pipeline = Pipeline::new().await;
    for slot in 1..=130 {
        match slot {
            7 | 125 => pipeline.store(slot, b"no number".to_vec()).await,
            _ => pipeline.publish(slot).await,
        };
    }
    let (_gateway, address) = pipeline.gateway().await;
    sequences(&address, 130).await;
    for seq in [1, 8, 30, 31, 32, 124, 130] {
        let answer = get(&address, &format!("/numbers/{seq}"), &[]).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.json()["seq"], seq);
        assert_eq!(answer.json()["number"], 432_306);
    }
    for (seq, reason) in [
        ("7", "not a valid number"),
        ("125", "not a valid number"),
        ("131", "the last sequence is 130"),
        ("18446744073709551615", "the last sequence is 130"),
    ] {
        let answer = get(&address, &format!("/numbers/{seq}"), &[]).await;
        assert_eq!(answer.status, 404, "{answer:?}");
        assert!(answer.json()["detail"].as_str().unwrap().contains(reason), "{answer:?}");
    }
    for seq in ["0", "-1", "+1", "x", "", "18446744073709551616", "1/2"] {
        let answer = get(&address, &format!("/numbers/{seq}"), &[]).await;
        assert_eq!(answer.status, 400, "{answer:?}");
    }
}

/// A client that has seen a record on one replica gets it from another one too.
#[tokio::test]
async fn a_replica_that_lags_catches_up_before_it_answers() {
    let pipeline = Pipeline::new().await;
    let (ahead, behind) = (pipeline.gateway().await, pipeline.gateway().await);
    pipeline.publish(1).await;
    sequences(&ahead.1, 1).await;
    sequences(&behind.1, 1).await;
    for round in 2..=10 {
        // The other replica is stopped while one more product is published.
        behind.0.signal(nix::sys::signal::Signal::SIGSTOP);
        pipeline.publish(round).await;
        sequences(&ahead.1, round).await;
        let seen = get(&ahead.1, "/numbers", &[]).await;
        let header = [&*format!("If-None-Match: {}", seen.header("etag").unwrap())];
        let (path, after) = (format!("/numbers/{round}"), format!("/history?after={round}"));
        let asked = async {
            tokio::join!(
                get(&behind.1, "/numbers", &header),
                get(&behind.1, &path, &[]),
                get(&behind.1, &after, &[]),
            )
        };
        let wakes = async {
            // By then the requests wait in its listen queue.
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            behind.0.signal(nix::sys::signal::Signal::SIGCONT);
        };
        let ((numbers, number, page), ()) = tokio::join!(asked, wakes);
        assert_eq!(numbers.status, 304, "round {round}: {numbers:?}");
        assert_eq!(number.status, 200, "round {round}: {number:?}");
        assert!(page.json()["last_seq"].as_u64() >= Some(round), "round {round}: {page:?}");
    }
}

#[tokio::test]
async fn an_answer_without_the_broker_has_an_age() {
    let mut pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    pipeline.publish(1).await;
    sequences(&address, 1).await;
    assert_eq!(get(&address, "/numbers", &[]).await.header("age"), None);
    pipeline.broker.kill();
    eventually("an age", async || {
        let answer = get(&address, "/numbers", &[]).await;
        assert_eq!(answer.status, 200);
        answer.header("age").is_some_and(|age| age.parse::<u64>().unwrap() >= 3)
    })
    .await;
    pipeline.broker.restart().await;
    eventually("no age", async || get(&address, "/numbers", &[]).await.header("age").is_none())
        .await;
}

#[tokio::test]
async fn answers_have_cors_and_security_headers() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    sequences(&address, 0).await;
    for path in ["/numbers", "/history", "/healthz", "/nothing", "/", "/docs"] {
        let answer = get(&address, path, &["Origin: https://example.org"]).await;
        assert_eq!(answer.header("access-control-allow-origin"), Some("*"), "{path}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(answer.header("referrer-policy"), Some("no-referrer"), "{path}");
        let policy = answer.header("content-security-policy").unwrap();
        assert!(policy.starts_with("default-src 'none'; "), "{path}: {policy}");
        assert!(!policy.contains("unsafe") && policy.contains("frame-ancestors 'none'"));
    }
    let preflight =
        request(&address, "OPTIONS", "/numbers", &["Origin: https://example.org"]).await;
    assert_eq!(preflight.status, 204);
    let allowed = preflight.header("access-control-allow-headers").unwrap();
    for name in ["Authorization", "Cache-Control", "Last-Event-ID"] {
        assert!(allowed.contains(name), "{allowed}");
    }
}

/// The gateway serves everything that the page and the documentation load.
#[tokio::test]
async fn the_page_is_complete() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    for page in ["/", "/docs"] {
        let answer = get(&address, page, &[]).await;
        assert_eq!(answer.status, 200);
        assert!(answer.header("content-type").unwrap().starts_with("text/html"));
        let links = answer.body.split(['"', '\'']);
        let links = links.filter(|part| part.ends_with(".js") || part.ends_with(".css"));
        let links: Vec<_> = links.collect();
        assert!(links.len() >= 2, "{page}: {links:?}");
        for link in links {
            let answer = get(&address, &format!("/{link}"), &[]).await;
            assert_eq!(answer.status, 200, "{link}");
            assert!(!answer.body.is_empty(), "{link}");
            assert!(!answer.body.contains("https://"), "{link}");
        }
        assert!(!answer.body.contains("https://"), "{page}");
    }
    let description = get(&address, "/openapi.json", &[]).await.json();
    assert_eq!(description["info"]["version"], env!("CARGO_PKG_VERSION"));
}
