//! `evenodd provision`: makes the streams, or compares those that exist with what they must be.
//!
//! It applies what cannot lose a message and refuses everything else. It never deletes a stream. An
//! update alone can delete history, in spite of `deny_delete` and `deny_purge`.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use async_nats::Client;
use async_nats::jetstream::context::{Context, CreateStreamErrorKind};
use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{self, ErrorCode};
use clap::Args;
use contract::streams::{NUMBERS, TICKS};
use runtime::settings::{NatsSettings, milliseconds};
use serde_json::{Value, json};

use crate::broker::{self, NotReady};
use crate::streams;

/// What JetStream answers while too few servers are up, or while none of them is its leader.
const STARTING: [ErrorCode; 2] = [ErrorCode::CLUSTER_NO_PEERS, ErrorCode::CLUSTER_NOT_AVAILABLE];

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

    /// How long to wait for the connection, and then for `JetStream` to be ready, in milliseconds
    #[arg(long, env = "EVENODD_WAIT_MS", value_name = "MS", default_value = "30000", value_parser = milliseconds(0..=3_600_000))]
    pub wait_ms: Duration,
}

impl Provision {
    /// Provisions one stream after the other, and prints what it did.
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        let client = broker::connect(&self.nats, "--nats", self.wait_ms).await?;
        let replicas = self.replicas.into();
        for wanted in [streams::numbers(replicas), streams::ticks(replicas)] {
            let attempt = async || provision(&client, wanted.clone()).await;
            let done = broker::when_ready(self.wait_ms, attempt).await;
            let done = done.with_context(|| format!("stream {}", wanted.name))?;
            println!("stream {}: {done}", wanted.name);
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Provisions a stream, and says what was done.
async fn provision(client: &Client, mut wanted: Config) -> anyhow::Result<String> {
    let context = jetstream::new(client.clone());
    let Some(has) = broker::stream_config(client, &wanted.name).await? else {
        create(&context, &wanted).await?;
        return Ok("created".to_owned());
    };
    // More replicas than asked for are no fault.
    wanted.num_replicas = wanted.num_replicas.max(has.num_replicas);
    let Differences { lines, are_safe } = differences(&has, &wanted)?;
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

async fn create(context: &Context, wanted: &Config) -> anyhow::Result<()> {
    use CreateStreamErrorKind::{JetStream, JetStreamUnavailable, TimedOut};
    let Err(error) = context.create_stream(wanted).await else { return Ok(()) };
    match error.kind() {
        TimedOut | JetStreamUnavailable => bail!(NotReady(error.to_string())),
        JetStream(answer) if STARTING.contains(&answer.error_code()) => {
            bail!(NotReady(error.to_string()))
        }
        JetStream(answer) if answer.error_code() == ErrorCode::STREAM_SUBJECT_OVERLAP => {
            let subject = wanted.subjects.join(", ");
            let owner = context.stream_by_subject(&subject).await;
            bail!(
                "the subject {subject} belongs to the stream {} already; take it from there first, \
                 or use another account",
                owner.unwrap_or_else(|_| "?".to_owned())
            )
        }
        _ => Err(error.into()),
    }
}

/// In which settings a stream differs from what it must be.
struct Differences {
    /// A line for each of them.
    lines: String,
    /// Whether all of them can be changed without losing anything.
    are_safe: bool,
}

fn differences(has: &Config, wanted: &Config) -> anyhow::Result<Differences> {
    let stream = &wanted.name;
    let (has, wanted) = (serde_json::to_value(has)?, serde_json::to_value(wanted)?);
    let objects = [&has, &wanted].into_iter().filter_map(Value::as_object);
    let settings: BTreeSet<_> = objects.flat_map(|object| object.keys()).collect();
    let mut differences = Differences { lines: String::new(), are_safe: true };
    for setting in settings {
        // A setting that is left out is null.
        let (has, wanted) = (&has[setting], &wanted[setting]);
        // The metadata are the server's own notes, such as its version.
        if has != wanted && setting != "metadata" {
            let is_safe = loses_nothing(stream, setting, has, wanted);
            let mark = if is_safe { ' ' } else { '!' };
            differences.lines += &format!("\n  {mark} {setting}: has {has}, wanted {wanted}");
            differences.are_safe &= is_safe;
        }
    }
    Ok(differences)
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
        let differences = differences(&has, &wanted).unwrap();
        assert!(!differences.lines.is_empty(), "nothing differs");
        !differences.are_safe
    }

    #[test]
    fn equal_configurations_do_not_differ() {
        let wanted = streams::numbers(1);
        assert_eq!(differences(&wanted, &wanted).unwrap().lines, "");
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
        let Differences { lines, are_safe } = differences(&streams::numbers(1), &wanted).unwrap();
        assert!(!are_safe);
        assert_eq!(lines, "\n  ! max_msgs: has -1, wanted 1");
    }
}
