//! Who leads: one Lease (`coordination.k8s.io/v1`), held by at most one replica at a time.
//!
//! Lease + what was observed of it + monotonic time -> `Next` -> one write by compare-and-swap
//!
//! The rules are those of client-go's leader election. Nobody compares its wall clock with another's: a candidate waits
//! until it has *itself* seen the Lease unchanged for the whole duration. The holder trusts its claim until
//! `RENEW_WITHIN` after it *began* its last successful renewal, which is earlier than any candidate may take over. A
//! process that was paused (SIGSTOP, a frozen VM) finds the claim over by its own monotonic clock before it acts.

use std::{
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{ApiError, ask_within, dice};
use crate::clock::Clock;

/// How long a Lease stands after its last renewal before another replica may take it.
const DURATION: Duration = Duration::from_secs(15);

/// The longest that a Lease of somebody else's making is respected, whatever it asks for.
const LONGEST: Duration = Duration::from_secs(60);

/// How long a holder trusts its own claim: 5 s before the first candidate may act, which is more than one request.
const RENEW_WITHIN: Duration = Duration::from_secs(10);

/// The pause between two looks: three tries fit into [`RENEW_WITHIN`].
const RETRY: Duration = Duration::from_secs(2);

/// How long one request about the Lease may take; a slower one would eat the tries that are left.
const PATIENCE: Duration = Duration::from_secs(3);

/// Which Lease, and who asks for it.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The Lease's namespace.
    pub namespace: String,
    /// The Lease's name, such as `malha-leader`.
    pub name: String,
    /// This replica, unique among them: its pod's name.
    pub identity: String,
}

/// Whether this replica leads, told by a clock of its own and not only by what was last heard.
#[derive(Clone, Debug)]
pub struct Claim {
    leading: watch::Receiver<bool>,
    until: Arc<Mutex<Option<Instant>>>,
}

impl Claim {
    /// Whether the claim stands at this moment. Ask again right before each write: the answer ages.
    pub fn stands(&self) -> bool {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Tells each change of leadership as it is noticed.
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.leading.clone()
    }

    /// A claim that always stands, for a process that is alone with its state.
    pub fn unrivalled() -> Self {
        let (tell, leading) = watch::channel(true);
        drop(tell);
        let far = Instant::now() + Duration::from_secs(100 * 365 * 24 * 3600);
        Self {
            leading,
            until: Arc::new(Mutex::new(Some(far))),
        }
    }
}

/// `malha_leader` and `malha_leader_transitions_total`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    leader: Family<Component, Gauge>,
    transitions: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Component {
    component: &'static str,
}

const COMPONENT: Component = Component {
    component: "control-plane",
};

impl Metrics {
    /// Makes them known to the scraper.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "malha_leader",
            "Whether this replica leads (1) or not (0)",
            self.leader.clone(),
        );
        registry.register(
            "malha_leader_transitions",
            "How often this replica began or ceased to lead",
            self.transitions.clone(),
        );
        self.leader.get_or_create(&COMPONENT).set(0);
    }
}

/// The claim on a Lease, and the future that keeps it: it tries to hold the Lease until `stop`, then gives it up.
/// Dropping the future ends the claim, too.
pub fn hold(
    client: Client,
    candidate: Candidate,
    clock: Clock,
    metrics: Metrics,
    stop: CancellationToken,
) -> (Claim, impl Future<Output = ()> + Send) {
    let (tell, leading) = watch::channel(false);
    let until = Arc::new(Mutex::new(None));
    let claim = Claim {
        leading,
        until: until.clone(),
    };
    let holder = Holder {
        api: Api::namespaced(client, &candidate.namespace),
        candidate,
        clock,
        metrics,
        tell,
        until,
        observed: None,
        failing: false,
    };
    (claim, holder.run(stop))
}

struct Holder {
    api: Api<Lease>,
    candidate: Candidate,
    clock: Clock,
    metrics: Metrics,
    tell: watch::Sender<bool>,
    until: Arc<Mutex<Option<Instant>>>,
    observed: Option<Observed>,
    failing: bool,
}

/// The Lease as last seen to change, and when that was by our own monotonic clock.
#[derive(Clone, Debug)]
struct Observed {
    version: String,
    holder: String,
    duration: Duration,
    since: Instant,
}

/// What to do about a Lease.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Nobody ever made it.
    Create,
    /// It is ours.
    Renew,
    /// It is free, or its holder has been silent for the whole duration.
    Take,
    /// Somebody else holds it.
    Wait,
}

fn next(lease: Option<&Observed>, identity: &str, now: Instant) -> Next {
    let Some(lease) = lease else {
        return Next::Create;
    };
    if lease.holder == identity {
        Next::Renew
    } else if lease.holder.is_empty() || now >= lease.since + lease.duration {
        Next::Take
    } else {
        Next::Wait
    }
}

impl Holder {
    async fn run(mut self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let began = Instant::now();
            let looked = self.try_once(began).await;
            if looked.is_ok() {
                self.failing = false;
            }
            match looked {
                Ok(true) => self.won(began),
                Ok(false) => self.lost("another replica holds it"),
                Err(error) => {
                    self.complain(&error);
                    self.expire(began, &error);
                }
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep(RETRY.mul_f64(0.9 + 0.2 * dice())) => {}
            }
        }
        self.give_up().await;
    }

    /// One look and at most one write; whether the Lease is ours afterwards.
    async fn try_once(&mut self, now: Instant) -> Result<bool, ApiError> {
        let lease = within(self.api.get_opt(&self.candidate.name)).await?;
        self.observe(lease.as_ref(), now);
        let written = match next(self.observed.as_ref(), &self.candidate.identity, now) {
            Next::Wait => return Ok(false),
            Next::Create => {
                let fresh = self.claimed(None);
                within(self.api.create(&PostParams::default(), &fresh)).await
            }
            Next::Renew | Next::Take => {
                let renewed = self.claimed(lease);
                within(
                    self.api
                        .replace(&self.candidate.name, &PostParams::default(), &renewed),
                )
                .await
            }
        };
        match written {
            Ok(lease) => {
                self.observe(Some(&lease), now);
                Ok(true)
            }
            // somebody else was first: look again next time
            Err(error) if error.code() == Some(409) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn observe(&mut self, lease: Option<&Lease>, now: Instant) {
        let Some(lease) = lease else {
            self.observed = None;
            return;
        };
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        if self
            .observed
            .as_ref()
            .is_some_and(|seen| seen.version == version)
        {
            return;
        }
        let spec = lease.spec.clone().unwrap_or_default();
        let seconds = spec.lease_duration_seconds.unwrap_or_default();
        self.observed = Some(Observed {
            version,
            holder: spec.holder_identity.unwrap_or_default(),
            duration: Duration::from_secs(u64::try_from(seconds).unwrap_or_default()).min(LONGEST),
            since: now,
        });
    }

    /// The Lease with our claim in it; what others have written beside it stays.
    fn claimed(&self, lease: Option<Lease>) -> Lease {
        let now = self.clock.now();
        let mut lease = lease.unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                name: Some(self.candidate.name.clone()),
                namespace: Some(self.candidate.namespace.clone()),
                ..ObjectMeta::default()
            },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        claim(spec, &self.candidate.identity, now);
        lease
    }

    fn won(&self, began: Instant) {
        let until = began + RENEW_WITHIN;
        if until <= Instant::now() {
            // written, but we were paused meanwhile for longer than a claim lasts
            return self.lost("it was paused while it renewed");
        }
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
        if self.tell(true) {
            info!(lease = %self.candidate.name, identity = %self.candidate.identity, "this replica leads");
            self.metrics.transitions.inc();
            self.metrics.leader.get_or_create(&COMPONENT).set(1);
        }
    }

    fn lost(&self, why: &str) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if self.tell(false) {
            warn!(lease = %self.candidate.name, identity = %self.candidate.identity, why, "this replica leads no longer");
            self.metrics.transitions.inc();
            self.metrics.leader.get_or_create(&COMPONENT).set(0);
        }
    }

    /// Tells a change only; whether it is one.
    fn tell(&self, leads: bool) -> bool {
        self.tell
            .send_if_modified(|told| std::mem::replace(told, leads) != leads)
    }

    /// One line for a row of failures: without the right to the Lease nobody ever leads, and that must be seen.
    fn complain(&mut self, error: &ApiError) {
        let lease = &self.candidate.name;
        if std::mem::replace(&mut self.failing, true) {
            debug!(lease, %error, "the Lease still cannot be read or written");
        } else {
            warn!(lease, %error, "the Lease cannot be read or written, trying again");
        }
    }

    /// A failed renewal does not end the claim before its time.
    fn expire(&self, now: Instant, error: &ApiError) {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        let next_look = now.max(Instant::now()) + RETRY;
        if until.is_none_or(|until| until <= next_look) {
            self.lost(&error.to_string());
        }
    }

    /// Frees the Lease, so that the next leader need not wait for its end.
    async fn give_up(&self) {
        let led = *self.tell.borrow();
        self.lost("it is shutting down");
        if !led {
            return;
        }
        let Ok(Some(mut lease)) = within(self.api.get_opt(&self.candidate.name)).await else {
            return;
        };
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if spec.holder_identity.as_deref() != Some(self.candidate.identity.as_str()) {
            return;
        }
        spec.holder_identity = None;
        spec.lease_duration_seconds = Some(1);
        spec.renew_time = Some(MicroTime(self.clock.now()));
        let params = PostParams::default();
        let freed = self.api.replace(&self.candidate.name, &params, &lease);
        if let Err(error) = within(freed).await {
            debug!(lease = %self.candidate.name, %error, "the lease could not be given up; it ends by itself");
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.lost("its task ended");
    }
}

fn claim(spec: &mut LeaseSpec, identity: &str, now: Timestamp) {
    if spec.holder_identity.as_deref() != Some(identity) {
        spec.acquire_time = Some(MicroTime(now));
        spec.lease_transitions = Some(spec.lease_transitions.unwrap_or_default().saturating_add(1));
    }
    spec.holder_identity = Some(identity.to_owned());
    spec.lease_duration_seconds = Some(DURATION.as_secs() as i32);
    spec.renew_time = Some(MicroTime(now));
}

async fn within<T>(question: impl Future<Output = kube::Result<T>>) -> Result<T, ApiError> {
    ask_within(PATIENCE, question).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(holder: &str, since: Instant) -> Observed {
        Observed {
            version: "1".to_owned(),
            holder: holder.to_owned(),
            duration: DURATION,
            since,
        }
    }

    #[test]
    fn a_lease_is_taken_only_when_its_holder_was_silent_for_the_whole_time() {
        let start = Instant::now();
        let theirs = observed("other", start);
        assert_eq!(next(None, "me", start), Next::Create);
        assert_eq!(next(Some(&observed("me", start)), "me", start), Next::Renew);
        assert_eq!(next(Some(&observed("", start)), "me", start), Next::Take);
        let almost = start + DURATION - Duration::from_millis(1);
        assert_eq!(next(Some(&theirs), "me", almost), Next::Wait);
        assert_eq!(next(Some(&theirs), "me", start + DURATION), Next::Take);
    }

    #[test]
    fn a_holder_gives_up_before_anybody_may_take_over() {
        // its last renewal began at 0 and was seen by a candidate at 0 at the earliest
        assert!(RENEW_WITHIN + PATIENCE < DURATION);
        assert!(RETRY * 3 < RENEW_WITHIN);
    }

    #[test]
    fn a_claim_counts_transitions_and_keeps_what_it_does_not_know() {
        let now = Timestamp::UNIX_EPOCH;
        let mut spec = LeaseSpec {
            lease_transitions: Some(i32::MAX),
            preferred_holder: Some("kept".to_owned()),
            ..LeaseSpec::default()
        };
        claim(&mut spec, "me", now);
        assert_eq!(spec.lease_transitions, Some(i32::MAX));
        assert_eq!(spec.acquire_time, Some(MicroTime(now)));
        let later = now + jiff::SignedDuration::from_secs(2);
        claim(&mut spec, "me", later);
        assert_eq!(
            spec.acquire_time,
            Some(MicroTime(now)),
            "a renewal is no acquisition"
        );
        assert_eq!(spec.renew_time, Some(MicroTime(later)));
        assert_eq!(spec.preferred_holder.as_deref(), Some("kept"));
    }

    #[test]
    fn an_unrivalled_claim_stands() {
        assert!(Claim::unrivalled().stands());
    }
}
