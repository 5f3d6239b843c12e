//! Hedged requests: while one is not answered another one is sent, which most likely reaches another
//! replica. So a replica that is frozen or lost costs one pause.

use std::future::Future;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::{MissedTickBehavior, interval};

/// Makes an attempt, and one more after each `pause`, up to `limit` of them, until one returns a value.
/// `None` if none does. All attempts that have begun run on until then.
pub async fn hedged<T, F: Future<Output = Option<T>>>(
    pause: Duration,
    limit: usize,
    mut attempt: impl FnMut() -> F,
) -> Option<T> {
    let mut running = FuturesUnordered::new();
    let mut left = limit;
    let mut pause = interval(pause);
    pause.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            Some(value) = running.next() => if let Some(value) = value {
                return Some(value);
            },
            _ = pause.tick(), if left > 0 => {
                left -= 1;
                running.push(attempt());
            }
            else => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{Instant, sleep};

    const PAUSE: Duration = Duration::from_millis(20);

    #[tokio::test(start_paused = true)]
    async fn the_first_value_counts_and_a_silent_replica_costs_one_pause() {
        let begun = Instant::now();
        let mut attempts = 0;
        let value = hedged(PAUSE, 5, || {
            attempts += 1;
            let attempt = attempts;
            async move {
                let took = if attempt == 1 { Duration::from_secs(60) } else { PAUSE / 4 };
                sleep(took).await;
                Some(attempt)
            }
        });
        assert_eq!(value.await, Some(2));
        assert_eq!(begun.elapsed(), PAUSE + PAUSE / 4);
    }

    #[tokio::test(start_paused = true)]
    async fn after_the_last_attempt_there_is_no_value() {
        let mut attempts = 0;
        let value: Option<()> = hedged(PAUSE, 3, || {
            attempts += 1;
            async { None }
        })
        .await;
        assert_eq!((value, attempts), (None, 3));
    }
}
