//! Hedged requests: while a request is unanswered, another one is sent, which most likely reaches
//! another replica. A replica that is frozen or lost therefore costs one pause.

use std::future::Future;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::{MissedTickBehavior, interval};

/// Makes an attempt, and another one after each `pause`, up to `limit` in all. Returns the first
/// value, or `None` if no attempt returns one. Earlier attempts keep running meanwhile.
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
    async fn the_first_value_is_returned_and_a_silent_replica_costs_one_pause() {
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
    async fn there_is_no_value_if_every_attempt_fails() {
        let mut attempts = 0;
        let value: Option<()> = hedged(PAUSE, 3, || {
            attempts += 1;
            async { None }
        })
        .await;
        assert_eq!((value, attempts), (None, 3));
    }
}
