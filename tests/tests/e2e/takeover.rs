//! `evenodd takeover`: a history is copied from one broker to another.

use evenodd::streams;
use runtime::history::{self, MAX_BATCH};
use tests::{Broker, Pipeline, Process, Scratch, connect};

/// Runs `takeover`, and returns its exit status and what it printed.
async fn takeover(from: &Broker, to: &Broker, scratch: &Scratch) -> (Option<i32>, String) {
    let args = ["takeover", "--from", &from.url(), "--nats", &to.url()];
    let mut process = Process::start(scratch, "evenodd", &args);
    (process.wait().await.code(), process.log())
}

#[tokio::test]
async fn sequences_and_times_are_kept_and_nothing_is_overwritten() {
    let old = Pipeline::new().await;
    // More than one chunk, and an invalid message, which belongs to the history too.
    for slot in 0..2000 {
        old.publish(1000 + slot).await;
    }
    old.store(9000, b"no number".to_vec()).await;
    // The old broker may have the settings of an earlier version.
    let mut former = streams::numbers(1);
    (former.subjects, former.republish) = (vec!["numbers.published".into()], None);
    async_nats::jetstream::new(old.client.clone()).update_stream(&former).await.unwrap();
    let scratch = Scratch::new();
    let new = Broker::start(&scratch).await;
    let (status, output) = takeover(&old.broker, &new, &scratch).await;
    assert_eq!(status, Some(0), "{output}");
    assert!(output.contains("copied 2001 messages, sequences 1 to 2001"), "{output}");
    let client = connect(&new).await;
    for from in [1, 1001, 2001] {
        let copied = history::read(&client, "NUMBERS", from, MAX_BATCH).await.unwrap();
        assert_eq!(copied, old.entries(from, MAX_BATCH).await);
    }
    let mut provision = Process::start(&scratch, "evenodd", &["provision", "--nats", &new.url()]);
    assert!(provision.wait().await.success());
    assert!(provision.log().contains("stream NUMBERS: as it must be"), "{}", provision.log());

    // The second takeover finds a history.
    let (status, output) = takeover(&old.broker, &new, &scratch).await;
    assert_eq!(status, Some(1));
    assert!(output.contains("there is a stream NUMBERS already"), "{output}");
    assert_eq!(
        old.entries(2001, 1).await,
        history::read(&client, "NUMBERS", 2001, 1).await.unwrap()
    );
}

#[tokio::test]
async fn a_missing_history_or_broker_is_named() {
    let scratch = Scratch::new();
    let (empty, other) = (Broker::start(&scratch).await, Scratch::new());
    let new = Broker::start(&other).await;
    let (status, output) = takeover(&empty, &new, &scratch).await;
    assert_eq!(status, Some(1));
    assert!(output.contains("--from: stream NUMBERS is not there"), "{output}");
    let mut gone = Broker::start(&Scratch::new()).await;
    gone.kill();
    let (status, output) = takeover(&gone, &new, &scratch).await;
    assert_eq!(status, Some(1));
    assert!(output.contains("--from: cannot connect to NATS at"), "{output}");
}
