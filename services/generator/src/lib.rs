//! Services 1 and 2: a random even or odd factor for every request.
//!
//! Each replica is a service of the NATS Services API (ADR-32), and `nats micro ls` lists it.
//! Replicas keep no state. Any number of them share the requests as a queue group.

use anyhow::Context;
use async_nats::{Client, Subject};
use clap::Parser;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use contract::{Parity, subjects};
use futures::StreamExt;
use runtime::health::Health;
use runtime::micro::{self, Counters, Description};
use runtime::settings::CommonSettings;
use runtime::{Service, Shutdown};
use tokio::time::Instant;
use tracing::{info, warn};

/// Replies to each request with a uniformly random number: even (0 to 1000) or odd (1 to 999).
#[derive(Parser, Clone, Debug)]
#[command(name = "generator", version)]
pub struct Settings {
    /// Whether to reply with even or odd numbers
    #[arg(long, env = "EVENODD_PARITY", value_name = "PARITY", value_parser = parity())]
    parity: Parity,

    #[command(flatten)]
    common: CommonSettings,
}

fn parity() -> impl TypedValueParser<Value = Parity> {
    let even = Parity::Even.name();
    PossibleValuesParser::new([even, Parity::Odd.name()])
        .map(move |name| if name == even { Parity::Even } else { Parity::Odd })
}

impl Service for Settings {
    fn name(&self) -> &'static str {
        self.parity.name()
    }

    fn common(&self) -> &CommonSettings {
        &self.common
    }

    async fn run(self, client: Client, shutdown: Shutdown, _: Health) -> anyhow::Result<()> {
        run(client, self.parity, shutdown).await
    }
}

/// Runs one replica until the shutdown. Requests that are still on their way to it are then lost,
/// and the multipliers send others (docs/adr/0004).
///
/// # Errors
/// If the connection was closed.
pub async fn run(client: Client, parity: Parity, shutdown: Shutdown) -> anyhow::Result<()> {
    let about = Description {
        name: parity.name(),
        description: match parity {
            Parity::Even => "random even numbers from 0 to 1000",
            Parity::Odd => "random odd numbers from 1 to 999",
        },
        subject: parity.subject(),
        reserved: subjects::is_ours,
    };
    let micro = micro::announce(&client, about).await?;
    let queue_group = parity.name().to_owned();
    let mut requests = client.queue_subscribe(parity.subject(), queue_group).await?;
    info!(subject = parity.subject(), id = micro.id, "answering requests");
    loop {
        let request = tokio::select! {
            request = requests.next() => request.context("the connection to NATS was closed")?,
            _ = shutdown.begun() => return Ok(()),
        };
        if let Some(reply) = about.reply_subject(request) {
            answer(&client, parity, reply, &micro.counters).await;
        }
    }
}

async fn answer(client: &Client, parity: Parity, reply: Subject, counters: &Counters) {
    let begun = Instant::now();
    let payload = Parity::encode_reply(random(parity));
    let sent = client.publish(reply, payload.into()).await;
    counters.count(begun.elapsed(), sent.is_err());
    if let Err(error) = sent {
        warn!(%error, "cannot send a reply");
    }
}

/// A uniformly random factor of this parity.
fn random(parity: Parity) -> u16 {
    let range = parity.range();
    let last = (range.end() - range.start()) / 2;
    range.start() + 2 * rand::random_range(0..=last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Every factor of the parity occurs and no other number does. Their frequencies pass a
    /// chi-squared test.
    #[test]
    fn factors_are_uniform_over_the_whole_range() {
        const EACH: u32 = 1000;
        for parity in [Parity::Even, Parity::Odd] {
            let count = u32::try_from(parity.factors().len()).unwrap();
            let mut seen = HashMap::<u16, u32>::new();
            for _ in 0..count * EACH {
                *seen.entry(random(parity)).or_default() += 1;
            }
            assert!(seen.keys().all(|&n| parity.check(n.into()).is_ok()));
            assert_eq!(seen.len(), parity.factors().len());
            // Chi-squared with n - 1 degrees of freedom: mean n - 1, variance 2(n - 1). Seven
            // standard deviations are exceeded once in 10^9 runs or so.
            let each = f64::from(EACH);
            let chi: f64 = seen.values().map(|&n| (f64::from(n) - each).powi(2) / each).sum();
            let freedom = f64::from(count - 1);
            assert!((chi - freedom).abs() < 7.0 * (2.0 * freedom).sqrt(), "{parity}: {chi}");
        }
    }
}
