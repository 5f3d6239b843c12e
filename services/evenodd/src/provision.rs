//! `evenodd provision`: makes the streams, or compares those that exist with what they must be.
//!
//! It applies what cannot lose a message and refuses everything else. It never deletes a stream:
//! an update alone can throw history away, in spite of `deny_delete` and `deny_purge`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use async_nats::jetstream::context::{Context, GetStreamErrorKind};
use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{self, ErrorCode};
use clap::Args;
use contract::streams::{NUMBERS, TICKS};
use runtime::connection;
use runtime::settings::{NatsSettings, milliseconds};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{USER, streams};

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

    /// How long to wait for `JetStream` to answer, in milliseconds
    #[arg(long, env = "EVENODD_WAIT_MS", value_name = "MS", default_value = "30000", value_parser = milliseconds(0..=3_600_000))]
    wait_ms: Duration,
}

impl Provision {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        let client = connection::connect(&self.nats, USER, "evenodd provision").await?;
        let mut all_well = true;
        for outcome in provision(&client, self.replicas, self.wait_ms).await? {
            println!("{outcome}");
            all_well &= outcome.refused.is_empty();
        }
        Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// What provisioning did to one stream.
#[derive(Debug, Default)]
pub struct Outcome {
    stream: String,
    created: bool,
    applied: Vec<Difference>,
    /// If there is any of these, nothing was applied.
    pub refused: Vec<Difference>,
}

/// A setting that a stream has otherwise than it must.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference {
    setting: String,
    has: Value,
    wanted: Value,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "stream {}: ", self.stream)?;
        if self.created {
            write!(f, "created")
        } else if !self.refused.is_empty() {
            write!(
                f,
                "REFUSED, nothing was changed: it differs in what could lose history\n{}\
                 \n  Change the stream by hand if this is meant, or provision with the settings it has.",
                lines(&self.refused, "  ! ")
            )?;
            if !self.applied.is_empty() {
                write!(f, "\n  It would also change\n{}", lines(&self.applied, "    "))?;
            }
            Ok(())
        } else if !self.applied.is_empty() {
            write!(f, "changed\n{}", lines(&self.applied, "    "))
        } else {
            write!(f, "as it must be")
        }
    }
}

fn lines(differences: &[Difference], indent: &str) -> String {
    let line =
        |d: &Difference| format!("{indent}{}: has {}, wanted {}", d.setting, d.has, d.wanted);
    differences.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Provisions both streams, once `JetStream` answers.
///
/// # Errors
/// If it does not within `wait`, or does not do what it is asked.
pub async fn provision(
    client: &async_nats::Client,
    replicas: u8,
    wait: Duration,
) -> anyhow::Result<Vec<Outcome>> {
    let context = jetstream::new(client.clone());
    let replicas = usize::from(replicas);
    let deadline = Instant::now() + wait;
    let mut outcomes = Vec::new();
    for wanted in [streams::numbers(replicas), streams::ticks(replicas)] {
        let outcome = loop {
            match provision_stream(&context, &wanted).await {
                Err(error) if error.is::<NotYet>() && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(250)).await;
                }
                result => break result.with_context(|| format!("stream {}", wanted.name))?,
            }
        };
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

/// `JetStream` does not answer, or cannot do it at this moment.
#[derive(Debug, thiserror::Error)]
#[error("{0} (is the broker running, with JetStream?)")]
struct NotYet(String);

async fn provision_stream(context: &Context, wanted: &Config) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome { stream: wanted.name.clone(), ..Outcome::default() };
    let has = match context.get_stream(&wanted.name).await {
        Ok(stream) => stream.cached_info().config.clone(),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(answer)
                if answer.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                create(context, wanted).await?;
                outcome.created = true;
                return Ok(outcome);
            }
            _ => bail!(NotYet(error.to_string())),
        },
    };
    // More replicas than asked for are no fault.
    let wanted =
        &Config { num_replicas: wanted.num_replicas.max(has.num_replicas), ..wanted.clone() };
    let (applied, refused) = differences(&has, wanted)?
        .into_iter()
        .partition(|change| loses_nothing(&wanted.name, change));
    outcome.applied = applied;
    outcome.refused = refused;
    if outcome.refused.is_empty() && !outcome.applied.is_empty() {
        context.update_stream(wanted).await?;
    }
    Ok(outcome)
}

async fn create(context: &Context, wanted: &Config) -> anyhow::Result<()> {
    use async_nats::jetstream::context::CreateStreamErrorKind as Kind;
    match context.create_stream(wanted.clone()).await {
        Ok(_) => Ok(()),
        Err(error) => match error.kind() {
            Kind::JetStream(answer) if answer.error_code() == ErrorCode::STREAM_SUBJECT_OVERLAP => {
                let subject = wanted.subjects.join(", ");
                let owner = context.stream_by_subject(&subject).await;
                bail!(
                    "the subject {subject} belongs to the stream {} already; \
                     take it from there first, or use another account",
                    owner.unwrap_or_else(|_| "?".to_owned())
                )
            }
            // Too few servers so far, or no leader: a cluster that is just coming up.
            Kind::JetStream(answer)
                if [ErrorCode::CLUSTER_NO_PEERS, ErrorCode::CLUSTER_NOT_AVAILABLE]
                    .contains(&answer.error_code()) =>
            {
                bail!(NotYet(answer.to_string()))
            }
            Kind::TimedOut | Kind::JetStreamUnavailable => bail!(NotYet(error.to_string())),
            _ => Err(error.into()),
        },
    }
}

/// In which settings two configurations differ.
fn differences(has: &Config, wanted: &Config) -> anyhow::Result<Vec<Difference>> {
    let has = serde_json::to_value(has)?;
    let wanted = serde_json::to_value(wanted)?;
    let (Value::Object(has), Value::Object(wanted)) = (has, wanted) else {
        bail!("a configuration is not an object");
    };
    let mut settings: Vec<&String> = has.keys().chain(wanted.keys()).collect();
    settings.sort();
    settings.dedup();
    Ok(settings
        .into_iter()
        // The server's own notes, such as the API level it was made with.
        .filter(|setting| *setting != "metadata")
        .filter_map(|setting| {
            let value = |of: &serde_json::Map<String, Value>| {
                of.get(setting).cloned().unwrap_or(Value::Null)
            };
            let (has, wanted) = (value(&has), value(&wanted));
            (has != wanted).then(|| Difference { setting: setting.clone(), has, wanted })
        })
        .collect())
}

/// The subject of each stream before the server republished what it stores. What is stored is not
/// touched when it changes.
const FORMER_SUBJECTS: [(&str, &str); 2] = [(NUMBERS, "numbers.published"), (TICKS, "ticks.claim")];

/// Whether a change can be made without any risk for what is stored.
fn loses_nothing(stream: &str, change: &Difference) -> bool {
    match change.setting.as_str() {
        "description" | "allow_direct" | "deny_delete" | "deny_purge" | "compression"
        | "republish" => true,
        "subjects" => FORMER_SUBJECTS
            .iter()
            .any(|(of, former)| *of == stream && change.has == json!([former])),
        "num_replicas" | "duplicate_window" => change.wanted.as_u64() > change.has.as_u64(),
        // A limit may be taken away. Setting one, or another one, throws messages away.
        "max_msgs" | "max_bytes" | "max_msgs_per_subject" | "max_msg_size" => {
            change.wanted.as_i64() == Some(-1)
        }
        // Draws are no history.
        "max_age" => change.wanted.as_u64() == Some(0) || stream == TICKS,
        "discard" => change.wanted == "new",
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
        !differences.iter().all(|change| loses_nothing(NUMBERS, change))
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
        let applied = differences.iter().any(|change| loses_nothing(NUMBERS, change));
        assert!(!applied, "{differences:?}");
    }
}
