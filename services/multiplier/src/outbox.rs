//! The outbox: products that are due and not yet acknowledged, published in their order.
//!
//! It is a bounded queue and one task. The task retries the first product until the stream has
//! acknowledged it, or until it is so old that a retry could store it a second time; then it is
//! logged as abandoned.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use contract::streams::DUPLICATE_WINDOW;
use contract::{Outcome, Product, Slot};
use runtime::jetstream::{Ack, PublishError};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{error, info, warn};

/// The most products that wait. At two slots a second this is what becomes due within the
/// duplicate window, after which they are given up anyway.
const CAPACITY: usize = 1200;
/// A product is given up when it is this old: safely before the stream forgets its message id.
const MAX_AGE: Duration = DUPLICATE_WINDOW.saturating_sub(Duration::from_secs(30));
/// Pauses between two attempts, doubling from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// A product that is to be published.
#[derive(Clone, Copy, Debug)]
pub struct Due {
    /// The slot it belongs to, and its message id.
    pub slot: Slot,
    /// What to publish.
    pub product: Product,
    /// When its slot began, since the Unix epoch.
    pub since: Duration,
    /// When it became due.
    pub pushed: Instant,
}

/// The way in. Once it is dropped, the task publishes what is left and ends.
pub struct Outbox {
    queue: mpsc::Sender<(Due, oneshot::Sender<Outcome>)>,
    /// How many products are due and not settled.
    waiting: Arc<AtomicUsize>,
}

impl Outbox {
    /// Starts the task. `publish` makes one attempt; `now` is the time since the Unix epoch.
    pub fn start<F>(
        publish: impl Fn(Due) -> F + Send + Sync + 'static,
        now: impl Fn() -> Duration + Send + Sync + 'static,
    ) -> (Self, JoinHandle<()>)
    where
        F: Future<Output = Result<Ack, PublishError>> + Send,
    {
        let (queue, mut waiting_products) =
            mpsc::channel::<(Due, oneshot::Sender<Outcome>)>(CAPACITY);
        let waiting = Arc::new(AtomicUsize::new(0));
        let counter = waiting.clone();
        let task = tokio::spawn(async move {
            while let Some((due, receipt)) = waiting_products.recv().await {
                if let Some(outcome) = settle(due, &publish, &now).await {
                    // The tick may have stopped waiting for it.
                    let _ = receipt.send(outcome);
                }
                counter.fetch_sub(1, Ordering::Relaxed);
            }
        });
        (Self { queue, waiting }, task)
    }

    /// Puts a product at the end of the queue. The receipt resolves once it is in the history,
    /// and fails if it was abandoned.
    pub fn push(&self, due: Due) -> oneshot::Receiver<Outcome> {
        let (receipt, outcome) = oneshot::channel();
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if self.queue.try_send((due, receipt)).is_err() {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            abandon(due, "the outbox is full");
        }
        outcome
    }

    /// How many products are due and not settled; stays readable when the outbox is gone.
    pub fn waiting(&self) -> Arc<AtomicUsize> {
        self.waiting.clone()
    }
}

/// Tries until the product is in the history (what became of it) or too old (`None`).
async fn settle<F>(
    due: Due,
    publish: &impl Fn(Due) -> F,
    now: &impl Fn() -> Duration,
) -> Option<Outcome>
where
    F: Future<Output = Result<Ack, PublishError>>,
{
    let mut pause = FIRST_PAUSE;
    let mut failures = 0u32;
    // By either clock: the one of the wall may be set back, the other one does not know how long
    // ago the slot was.
    while now().saturating_sub(due.since) < MAX_AGE && due.pushed.elapsed() < MAX_AGE {
        let error = match publish(due).await {
            Ok(ack) => {
                if failures > 0 {
                    info!(slot = %due.slot, failures, "published after all");
                }
                // After a failure the duplicate is most likely this very product.
                let duplicate = ack.duplicate && failures == 0;
                return Some(if duplicate { Outcome::Duplicate } else { Outcome::Published });
            }
            Err(error) => error,
        };
        failures += 1;
        if failures == 1 && !matches!(error, PublishError::InProcess) {
            warn!(slot = %due.slot, number = due.product.number(), %error, "not published yet; retrying");
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..=1.0))).await;
        pause = LAST_PAUSE.min(pause * 2);
    }
    abandon(due, "it could not be published while a retry was safe");
    None
}

fn abandon(due: Due, reason: &str) {
    /// Since the process started.
    static ABANDONED: AtomicUsize = AtomicUsize::new(0);
    let total = ABANDONED.fetch_add(1, Ordering::Relaxed) + 1;
    let number = due.product.number();
    let (even, odd) = (due.product.even(), due.product.odd());
    error!(slot = %due.slot, number, even, odd, total, "abandoned: {reason}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn due(slot: u64) -> Due {
        Due {
            slot: Slot(slot),
            product: Product::new(846, 511).unwrap(),
            since: Duration::ZERO,
            pushed: Instant::now(),
        }
    }

    const STORED: Ack = Ack { sequence: 1, duplicate: false };
    const DUPLICATE: Ack = Ack { sequence: 1, duplicate: true };

    type Attempts = Arc<Mutex<Vec<(u64, Duration)>>>;

    /// An outbox whose attempts get their result from `answer`, and what was attempted when.
    fn outbox(
        mut answer: impl FnMut(Slot) -> Result<Ack, PublishError> + Send + 'static,
    ) -> (Outbox, JoinHandle<()>, Attempts) {
        let begun = Instant::now();
        let attempts = Arc::new(Mutex::new(Vec::new()));
        let log = attempts.clone();
        let publish = Mutex::new(move |due: Due| {
            log.lock().unwrap().push((due.slot.0, begun.elapsed()));
            answer(due.slot)
        });
        let (outbox, task) = Outbox::start(
            move |due| std::future::ready((publish.lock().unwrap())(due)),
            move || begun.elapsed(),
        );
        (outbox, task, attempts)
    }

    #[tokio::test(start_paused = true)]
    async fn retries_in_order_until_acknowledged() {
        let mut failures = 5;
        let (outbox, task, attempts) = outbox(move |_| {
            failures -= 1;
            if failures > 0 {
                Err(PublishError::InProcess)
            } else {
                failures = 5;
                Ok(DUPLICATE)
            }
        });
        let receipts: Vec<_> = (1..=3).map(|slot| outbox.push(due(slot))).collect();
        assert_eq!(outbox.waiting().load(Ordering::Relaxed), 3);
        drop(outbox);
        task.await.unwrap();
        for receipt in receipts {
            // A duplicate after a failed attempt is our own product.
            assert_eq!(receipt.await, Ok(Outcome::Published));
        }
        let slots: Vec<u64> = attempts.lock().unwrap().iter().map(|a| a.0).collect();
        assert!(slots.is_sorted() && slots.len() == 15, "{slots:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_duplicate_at_once_is_somebody_elses() {
        let (outbox, _task, _) = outbox(|_| Ok(DUPLICATE));
        assert_eq!(outbox.push(due(1)).await, Ok(Outcome::Duplicate));
    }

    #[tokio::test(start_paused = true)]
    async fn gives_up_before_a_retry_could_store_twice() {
        let (outbox, task, attempts) = outbox(|slot| {
            if slot == Slot(1) { Err(PublishError::Failed("full".into())) } else { Ok(STORED) }
        });
        let first = outbox.push(due(1));
        let second =
            outbox.push(Due { since: MAX_AGE, pushed: Instant::now() + MAX_AGE, ..due(2) });
        drop(outbox);
        task.await.unwrap();
        assert!(first.await.is_err());
        assert_eq!(second.await, Ok(Outcome::Published));
        let attempts = attempts.lock().unwrap();
        assert!(attempts.iter().all(|&(slot, at)| slot == 2 || at < MAX_AGE));
        // Back-off: some thousands of attempts in ten minutes, not millions.
        assert!((1000..6000).contains(&attempts.len()), "{}", attempts.len());
    }

    #[tokio::test(start_paused = true)]
    async fn is_bounded() {
        let (outbox, _task, _) = outbox(|_| Err(PublishError::InProcess));
        for slot in 0..5000 {
            drop(outbox.push(due(slot)));
        }
        assert_eq!(outbox.waiting().load(Ordering::Relaxed), CAPACITY);
    }
}
