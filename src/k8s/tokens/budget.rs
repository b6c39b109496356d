//! How much the API server is asked. A review costs it a millisecond or two, and anybody who can reach our port can make us
//! ask with a token that names a foreign issuer; what is over the budget is told to come again, not refused.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// Reviews a second in the long run: a tenth of what a small API server answers.
const PER_SECOND: f64 = 100.0;

/// Reviews at once after a quiet time: the pods of a node that came back.
const BURST: f64 = 400.0;

/// Reviews under way at one time.
const AT_ONCE: usize = 32;

/// How long a caller waits for its turn.
const WAIT: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Budget {
    turns: Arc<Semaphore>,
    bucket: Mutex<Bucket>,
}

/// The budget is spent.
#[derive(Debug, thiserror::Error)]
#[error("too many tokens are waiting for the API server's review")]
pub(super) struct Busy;

impl Default for Budget {
    fn default() -> Self {
        Self {
            turns: Arc::new(Semaphore::new(AT_ONCE)),
            bucket: Mutex::new(Bucket {
                left: BURST,
                since: None,
            }),
        }
    }
}

impl Budget {
    /// Leave to ask once, for as long as what is returned is held.
    pub(super) async fn take(&self, now: Timestamp) -> Result<OwnedSemaphorePermit, Busy> {
        let affordable = {
            let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.spend(now)
        };
        if !affordable {
            return Err(Busy);
        }
        match timeout(WAIT, self.turns.clone().acquire_owned()).await {
            Ok(Ok(turn)) => Ok(turn),
            Ok(Err(_)) | Err(_) => Err(Busy),
        }
    }
}

/// A token bucket.
#[derive(Debug)]
struct Bucket {
    left: f64,
    since: Option<Timestamp>,
}

impl Bucket {
    fn spend(&mut self, now: Timestamp) -> bool {
        // a clock that is set back refills nothing, and counts from there
        let elapsed = self
            .since
            .map_or(0.0, |since| now.duration_since(since).as_secs_f64());
        self.since = Some(now);
        self.left = (self.left + elapsed.max(0.0) * PER_SECOND).min(BURST);
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    #[test]
    fn a_burst_is_granted_and_then_so_many_a_second() {
        let start = Timestamp::UNIX_EPOCH;
        let mut bucket = Bucket {
            left: BURST,
            since: None,
        };
        let granted = (0..1000).filter(|_| bucket.spend(start)).count();
        assert_eq!(granted, 400);
        let later = start + SignedDuration::from_secs(1);
        assert_eq!((0..1000).filter(|_| bucket.spend(later)).count(), 100);
        assert_eq!(
            (0..1000).filter(|_| bucket.spend(start)).count(),
            0,
            "the clock went back"
        );
        let much_later = start + SignedDuration::from_hours(1);
        assert_eq!((0..1000).filter(|_| bucket.spend(much_later)).count(), 400);
    }
}
