//! `evenodd provision`: makes the streams, or compares those that exist with what they must be.
//!
//! It applies what cannot lose a message and refuses everything else. It never deletes a stream. An
//! update alone can delete history, in spite of `deny_delete` and `deny_purge`.

use std::collections::BTreeSet;
use std::io;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use async_nats::Client;
use async_nats::jetstream;
use async_nats::jetstream::stream::Config;
use clap::Args;
use contract::streams::{NUMBERS, TICKS};
use runtime::settings::{NatsSettings, milliseconds};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{broker, streams};

/// Make the streams, or compare them with what they must be
///
/// Exit status 0: they are as they must be now. Exit status 1: they are not, and nothing that could lose a message was changed.
#[derive(Args, Clone, Debug)]
pub struct Provision {
    #[command(flatten)]
    pub nats: NatsSettings,

    /// How many servers keep each stream, at least: 1 on one machine, 3 in a cluster
    #[arg(long, env = "EVENODD_REPLICAS", value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=5))]
    pub replicas: u8,

    /// How long to retry, in milliseconds: the broker and `JetStream` may be about to start
    #[arg(long, env = "EVENODD_WAIT_MS", value_name = "MS", default_value = "30000", value_parser = milliseconds(0..=3_600_000))]
    pub wait_ms: Duration,
}

impl Provision {
    /// Provisions one stream after the other, and prints what it did. A line that cannot be printed is
    /// an error only in the end.
    pub async fn run(self, print: impl Fn(String) -> io::Result<()>) -> anyhow::Result<ExitCode> {
        let deadline = Instant::now() + self.wait_ms;
        let client = broker::connect(&self.nats, "--nats", self.wait_ms).await?;
        let replicas = self.replicas.into();
        let mut printed = Ok(());
        for wanted in [streams::numbers(replicas), streams::ticks(replicas)] {
            let name = wanted.name.clone();
            let has = broker::stream_config(&client, &name, deadline).await?;
            let done = provision(&client, has, wanted, deadline).await;
            let done = done.with_context(|| format!("stream {name}"))?;
            printed = printed.and(print(format!("stream {name}: {done}")));
        }
        printed?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Makes a stream as it is wanted, if nothing that it has can be lost, and says what was done.
async fn provision(
    client: &Client,
    has: Option<Config>,
    mut wanted: Config,
    deadline: Instant,
) -> anyhow::Result<String> {
    let context = jetstream::new(client.clone());
    let Some(has) = has else {
        let subject = &wanted.subjects[0];
        // The server's own error would not name the other stream.
        if let Ok(owner) = context.stream_by_subject(subject).await {
            bail!(
                "the subject {subject} belongs to the stream {owner} already; take it from there \
                 first, or use another account"
            );
        }
        // A cluster cannot make the stream before enough servers are up.
        broker::retry(deadline, async || Ok(context.create_stream(&wanted).await?)).await?;
        return Ok("created".to_owned());
    };
    // More replicas than asked for are no fault.
    wanted.num_replicas = wanted.num_replicas.max(has.num_replicas);
    let (lines, are_safe) = differences(&has, &wanted)?;
    if lines.is_empty() {
        return Ok("as it must be".to_owned());
    }
    ensure!(
        are_safe,
        "REFUSED, nothing was changed: what is marked with ! could lose history{lines}\n  \
         Change the stream by hand if this is meant, or provision with the settings it has."
    );
    context.update_stream(&wanted).await?;
    Ok(format!("changed{lines}"))
}

/// A line for each setting that differs, and whether all of them can be changed without losing
/// anything.
fn differences(has: &Config, wanted: &Config) -> anyhow::Result<(String, bool)> {
    let stream = &wanted.name;
    let (has, wanted) = (serde_json::to_value(has)?, serde_json::to_value(wanted)?);
    let objects = [&has, &wanted].into_iter().filter_map(Value::as_object);
    let settings: BTreeSet<_> = objects.flat_map(|object| object.keys()).collect();
    let (mut lines, mut are_safe) = (String::new(), true);
    for setting in settings {
        // A setting that is left out is null.
        let (has, wanted) = (&has[setting], &wanted[setting]);
        // The metadata are the server's own notes, such as its version.
        if has != wanted && setting != "metadata" {
            let is_safe = loses_nothing(stream, setting, has, wanted);
            let mark = if is_safe { ' ' } else { '!' };
            lines += &format!("\n  {mark} {setting}: has {has}, wanted {wanted}");
            are_safe &= is_safe;
        }
    }
    Ok((lines, are_safe))
}

/// Whether a change can be made without any risk for what is stored.
fn loses_nothing(stream: &str, setting: &str, has: &Value, wanted: &Value) -> bool {
    match setting {
        "description" | "allow_direct" | "deny_delete" | "deny_purge" | "compression"
        | "republish" => true,
        // The subjects before the server republished. What is stored keeps its subject.
        "subjects" if stream == NUMBERS => *has == json!(["numbers.published"]),
        "subjects" if stream == TICKS => *has == json!(["ticks.claim"]),
        "num_replicas" | "duplicate_window" => wanted.as_u64() > has.as_u64(),
        // A limit may be taken away. Setting or changing one can delete messages.
        "max_msgs" | "max_bytes" | "max_msgs_per_subject" | "max_msg_size" => *wanted == -1,
        // Draws are no history.
        "max_age" => *wanted == 0 || stream == TICKS,
        "discard" => *wanted == "new",
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl Fn(&mut Config)) -> bool {
        let wanted = streams::numbers(3);
        let mut has = wanted.clone();
        change(&mut has);
        let (lines, are_safe) = differences(&has, &wanted).unwrap();
        assert!(!lines.is_empty(), "nothing differs");
        !are_safe
    }

    #[test]
    fn equal_configurations_do_not_differ() {
        let wanted = streams::numbers(1);
        assert_eq!(differences(&wanted, &wanted).unwrap(), (String::new(), true));
    }

    #[test]
    fn what_loses_nothing_is_applied() {
        assert!(!refused(|has| has.num_replicas = 1));
        assert!(!refused(|has| has.description = None));
        assert!(!refused(|has| has.max_messages = 1000));
        assert!(!refused(|has| has.max_age = Duration::from_secs(60)));
        assert!(!refused(|has| has.deny_purge = false));
        assert!(!refused(|has| has.republish = None));
        assert!(!refused(|has| has.subjects = vec!["numbers.published".into()]));
    }

    #[test]
    fn what_could_lose_something_is_refused() {
        assert!(refused(|has| has.num_replicas = 5));
        assert!(refused(|has| has.storage = jetstream::stream::StorageType::Memory));
        assert!(refused(|has| has.retention = jetstream::stream::RetentionPolicy::WorkQueue));
        assert!(refused(|has| has.subjects = vec!["numbers.>".into()]));
        assert!(refused(|has| has.sealed = true));
    }

    #[test]
    fn no_limit_is_ever_set() {
        let mut wanted = streams::numbers(1);
        wanted.max_messages = 1;
        let (lines, are_safe) = differences(&streams::numbers(1), &wanted).unwrap();
        assert!(!are_safe);
        assert_eq!(lines, "\n  ! max_msgs: has -1, wanted 1");
    }
}
