//! How often one caller may ask: token buckets per pod and per service account.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{Limits, Refusal};
use crate::{caller::Caller, identity::SpiffeId};

/// So many a second, and so many at once after a rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Refilled each second.
    pub per_second: u32,
    /// The most that can be saved up.
    pub burst: u32,
}

/// Both limits. A pod is known by its UID; a caller without a pod has its service account's limit only.
pub(super) struct Rates {
    pods: Mutex<Buckets<String>>,
    nodes: Mutex<Buckets<String>>,
    accounts: Mutex<Buckets<SpiffeId>>,
}

impl Rates {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            pods: Mutex::new(Buckets::new(limits.per_pod, limits.rates)),
            nodes: Mutex::new(Buckets::new(limits.per_node, limits.rates)),
            accounts: Mutex::new(Buckets::new(limits.per_account, limits.rates)),
        }
    }

    /// The pod comes first, so that one noisy pod is stopped before it eats what its replicas share.
    ///
    /// A node's proxy asks for many pods and service accounts, and has a limit of its own.
    pub(super) fn take(
        &self,
        caller: &Caller,
        for_others: bool,
        now: Instant,
    ) -> Result<(), Refusal> {
        let lock = PoisonError::into_inner;
        if for_others && let Some(node) = &caller.node {
            let mut nodes = self.nodes.lock().unwrap_or_else(lock);
            return nodes
                .take(&node.name, now)
                .map_err(|wait| Refusal::RateLimited {
                    subject: "node's proxy",
                    wait,
                });
        }
        if let Some(pod) = &caller.pod {
            let mut pods = self.pods.lock().unwrap_or_else(lock);
            pods.take(&pod.uid, now)
                .map_err(|wait| Refusal::RateLimited {
                    subject: "pod",
                    wait,
                })?;
        }
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        accounts
            .take(&caller.identity, now)
            .map_err(|wait| Refusal::RateLimited {
                subject: "service account",
                wait,
            })
    }
}

/// Token buckets, at most `most` of them. A bucket that is full again is the same as none, so those are what is thrown
/// away when there is no room; where none is full, any is thrown away: its owner gets a fresh burst, and the bound on
/// requests under way still holds.
struct Buckets<K> {
    rate: Rate,
    most: usize,
    buckets: HashMap<K, Bucket>,
}

#[derive(Clone, Copy)]
struct Bucket {
    /// What was in it then.
    filled: f64,
    then: Instant,
}

impl<K: Clone + Eq + Hash> Buckets<K> {
    fn new(rate: Rate, most: usize) -> Self {
        Self {
            rate,
            most,
            buckets: HashMap::new(),
        }
    }

    fn take(&mut self, key: &K, now: Instant) -> Result<(), Duration> {
        let burst = f64::from(self.rate.burst);
        let filled = self
            .buckets
            .get(key)
            .map_or(burst, |bucket| bucket.at(now, self.rate));
        if filled < 1.0 {
            let wait = (1.0 - filled) / f64::from(self.rate.per_second.max(1));
            return Err(Duration::from_secs_f64(wait));
        }
        self.make_room(now);
        self.buckets.insert(
            key.clone(),
            Bucket {
                filled: filled - 1.0,
                then: now,
            },
        );
        Ok(())
    }

    /// Sweeps at most once for every eighth of the room that is used up, so that a take costs little on average.
    fn make_room(&mut self, now: Instant) {
        if self.buckets.len() < self.most {
            return;
        }
        let rate = self.rate;
        self.buckets
            .retain(|_, bucket| bucket.at(now, rate) < f64::from(rate.burst));
        let target = self.most - self.most / 8;
        let surplus = self.buckets.len().saturating_sub(target);
        let evicted: Vec<K> = self.buckets.keys().take(surplus).cloned().collect();
        for key in &evicted {
            self.buckets.remove(key);
        }
    }
}

impl Bucket {
    fn at(self, now: Instant, rate: Rate) -> f64 {
        let rest = now.saturating_duration_since(self.then).as_secs_f64();
        (self.filled + rest * f64::from(rate.per_second)).min(f64::from(rate.burst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate {
        per_second: 2,
        burst: 3,
    };

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn a_caller_has_its_burst_and_then_its_rate() {
        let mut buckets = Buckets::new(RATE, 10);
        let start = Instant::now();
        for _ in 0..3 {
            buckets.take(&"a", start).unwrap();
        }
        assert_eq!(buckets.take(&"a", start), Err(seconds(0.5)));
        buckets.take(&"b", start).unwrap();
        buckets.take(&"a", start + seconds(0.5)).unwrap();
        assert_eq!(
            buckets.take(&"a", start + seconds(0.75)),
            Err(seconds(0.25))
        );
    }

    #[test]
    fn who_asks_while_refused_does_not_wait_longer_for_it() {
        let mut buckets = Buckets::new(RATE, 10);
        let start = Instant::now();
        let served = (0..100).filter(|tenth| {
            let now = start + Duration::from_millis(tenth * 100);
            buckets.take(&"a", now).is_ok()
        });
        // the burst, and two a second for 9.9 seconds
        assert_eq!(served.count(), 3 + 19);
    }

    #[test]
    fn a_clock_that_stands_still_or_a_long_rest_never_gives_more_than_the_burst() {
        let mut buckets = Buckets::new(RATE, 10);
        let start = Instant::now();
        buckets.take(&"a", start).unwrap();
        let later = start + seconds(1e6);
        assert_eq!(
            (0..10)
                .filter(|_| buckets.take(&"a", later).is_ok())
                .count(),
            3
        );
        assert!(buckets.take(&"a", start).is_err());
    }

    #[test]
    fn strangers_take_no_more_room_than_there_is_and_free_none_that_is_in_use() {
        let mut buckets = Buckets::new(RATE, 100);
        let start = Instant::now();
        for stranger in 0..1000 {
            buckets.take(&stranger, start).unwrap();
            assert!(buckets.buckets.len() <= 100);
        }
        let mut buckets = Buckets::new(RATE, 100);
        for stranger in 0..99 {
            buckets.take(&stranger, start).unwrap();
        }
        // by now those are full again, and only this one is worth remembering
        let later = start + seconds(10.0);
        for _ in 0..3 {
            buckets.take(&1000, later).unwrap();
        }
        for stranger in 2000..2050 {
            buckets.take(&stranger, later).unwrap();
        }
        assert!(buckets.take(&1000, later).is_err());
        assert!(buckets.buckets.len() <= 51);
    }
}
