//! `evenodd provision`: makes the streams, or compares those that exist with what they must be.
//!
//! It applies what cannot lose a message and refuses everything else. It never deletes a stream. An
//! update alone can delete history, in spite of `deny_delete` and `deny_purge`.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
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

/// Make the streams, or compare them with what they must be
///
/// Exit status 0: they are as they must be now. Exit status 1: they are not, and nothing that could lose a message was changed.
#[derive(Args, Clone, Debug)]
pub struct Provision {
    #[command(flatten)]
    nats: NatsSettings,

    /// How many servers keep each stream, at least: 1 on one machine, 3 in a cluster
    #[arg(long, env = "EVENODD_REPLICAS", value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=5))]
    replicas: u8,

    /// How long to wait for the connection, and then for `JetStream` to be ready, in milliseconds
    #[arg(long, env = "EVENODD_WAIT_MS", value_name = "MS", default_value = "30000", value_parser = milliseconds(0..=3_600_000))]
    wait_ms: Duration,
}

impl Provision {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        let client = broker::connect(&self.nats, "--nats", self.wait_ms).await?;
        let mut status = ExitCode::SUCCESS;
        for report in provision(&client, self.replicas, self.wait_ms).await? {
            println!("{report}");
            if report.is_refused() {
                status = ExitCode::FAILURE;
            }
        }
        Ok(status)
    }
}

/// What provisioning found in one stream, and did to it.
#[derive(Debug)]
pub struct Report {
    stream: String,
    is_new: bool,
    differences: Vec<Difference>,
}

/// A setting that differs from what it must be.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    setting: String,
    has: Value,
    wanted: Value,
    is_safe: bool,
}

impl Report {
    /// Whether nothing was changed, because a change could lose something.
    pub fn is_refused(&self) -> bool {
        self.differences.iter().any(|difference| !difference.is_safe)
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let verdict = if self.is_new {
            "created"
        } else if self.is_refused() {
            "REFUSED, nothing was changed: what is marked with ! could lose history.\n  \
             Change the stream by hand if this is meant, or provision with the settings it has."
        } else if self.differences.is_empty() {
            "as it must be"
        } else {
            "changed"
        };
        write!(f, "stream {}: {verdict}", self.stream)?;
        for Difference { setting, has, wanted, is_safe } in &self.differences {
            let mark = if *is_safe { ' ' } else { '!' };
            write!(f, "\n  {mark} {setting}: has {has}, wanted {wanted}")?;
        }
        Ok(())
    }
}

/// Provisions both streams, once JetStream is ready.
///
/// # Errors
/// If it is not within `timeout`, or does not do what it is asked.
pub async fn provision(
    client: &Client,
    replicas: u8,
    timeout: Duration,
) -> anyhow::Result<Vec<Report>> {
    let replicas = replicas.into();
    let mut reports = Vec::new();
    for wanted in [streams::numbers(replicas), streams::ticks(replicas)] {
        let attempt = async || provision_stream(client, wanted.clone()).await;
        reports.push(broker::when_ready(timeout, attempt).await?);
    }
    Ok(reports)
}

async fn provision_stream(client: &Client, mut wanted: Config) -> anyhow::Result<Report> {
    let context = jetstream::new(client.clone());
    let stream = wanted.name.clone();
    let Some(has) = broker::stream_config(client, &stream).await? else {
        create(&context, wanted).await?;
        return Ok(Report { stream, is_new: true, differences: Vec::new() });
    };
    // More replicas than asked for are no fault.
    wanted.num_replicas = wanted.num_replicas.max(has.num_replicas);
    let report = Report { stream, is_new: false, differences: differences(&has, &wanted)? };
    if !report.differences.is_empty() && !report.is_refused() {
        let updated = context.update_stream(&wanted).await;
        updated.with_context(|| format!("cannot change the stream {}", wanted.name))?;
    }
    Ok(report)
}

async fn create(context: &Context, wanted: Config) -> anyhow::Result<()> {
    let Err(error) = context.create_stream(&wanted).await else { return Ok(()) };
    let code = match error.kind() {
        CreateStreamErrorKind::TimedOut | CreateStreamErrorKind::JetStreamUnavailable => {
            bail!(NotReady(error.to_string()))
        }
        CreateStreamErrorKind::JetStream(answer) => Some(answer.error_code()),
        _ => None,
    };
    match code {
        Some(ErrorCode::CLUSTER_NO_PEERS | ErrorCode::CLUSTER_NOT_AVAILABLE) => {
            bail!(NotReady(error.to_string()))
        }
        Some(ErrorCode::STREAM_SUBJECT_OVERLAP) => {
            let subject = wanted.subjects.join(", ");
            let owner = context.stream_by_subject(&subject).await;
            bail!(
                "the subject {subject} belongs to the stream {} already; take it from there first, \
                 or use another account",
                owner.unwrap_or_else(|_| "?".to_owned())
            )
        }
        _ => Err(error).with_context(|| format!("cannot create the stream {}", wanted.name)),
    }
}

/// The settings in which two configurations of a stream differ.
fn differences(has: &Config, wanted: &Config) -> anyhow::Result<Vec<Difference>> {
    let stream = &wanted.name;
    let (has, wanted) = (serde_json::to_value(has)?, serde_json::to_value(wanted)?);
    let objects = [&has, &wanted].into_iter().filter_map(Value::as_object);
    let mut settings: BTreeSet<_> = objects.flat_map(|object| object.keys()).collect();
    // The server's own notes, such as the API level that the stream was made with.
    settings.remove(&"metadata".to_owned());
    let mut differences = Vec::new();
    for setting in settings {
        // A setting that is left out is `null`.
        let (has, wanted) = (&has[setting], &wanted[setting]);
        if has != wanted {
            differences.push(Difference {
                setting: setting.clone(),
                has: has.clone(),
                wanted: wanted.clone(),
                is_safe: loses_nothing(stream, setting, has, wanted),
            });
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
        assert!(!differences.is_empty(), "nothing differs");
        !differences.iter().all(|difference| difference.is_safe)
    }

    #[test]
    fn equal_configurations_do_not_differ() {
        let wanted = streams::numbers(1);
        assert_eq!(differences(&wanted, &wanted).unwrap(), []);
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
        let differences = differences(&streams::numbers(1), &wanted).unwrap();
        assert!(!differences[0].is_safe, "{differences:?}");
    }
}
