//! What became of the users' objects, on the objects: conditions in their status, an Event where a proxy refused one.
//!
//! objects + outcomes of this replica's proxies -> conditions wanted -> one PATCH where they differ
//!
//! `Accepted` tells what is wrong with what was written, and the leader writes it. `Programmed` tells what proxies made
//! of it, and each replica knows only its own: the leader says how many of the proxies *that are connected to it* have it
//! in effect, and any replica says at once that one of its proxies refused it. What another replica's proxies refused is
//! left alone by the leader until that replica takes it back, the object changes, or some minutes have gone by without a
//! word. Each message names the replica that counted.

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    ask,
    events::{Kind, Note, Notes},
    lease::Claim,
    mesh::{Policies, Policy},
};
use crate::{
    clock::Clock,
    mesh::{FindingReason, ObjectName, ObjectRef},
    xds::delta::Outcome,
};

/// One object's status is written at most this often.
const PAUSE: Duration = Duration::from_secs(5);

/// The pause between two looks: proxies answer in bursts.
const LOOK: Duration = Duration::from_millis(500);

/// How long what another replica's proxies refused is left alone.
const FOREIGN: Duration = Duration::from_secs(600);

/// What the conditions are made from.
pub struct Watch<F> {
    /// To write with.
    pub client: Client,
    /// The objects.
    pub policies: Arc<Policies>,
    /// What this replica's proxies made of them.
    pub outcomes: F,
    /// Tells that these may differ.
    pub progress: watch::Receiver<()>,
    /// Who leads.
    pub claim: Claim,
    /// Where Events go.
    pub notes: Notes,
    /// This replica's name.
    pub replica: String,
    /// For the time of a transition.
    pub clock: Clock,
    /// Until when.
    pub stop: CancellationToken,
}

/// Keeps conditions as they should be, until the stop.
pub fn keep<F>(watch: Watch<F>) -> impl Future<Output = ()> + Send
where
    F: Fn() -> BTreeMap<ObjectRef, Outcome> + Send + Sync + 'static,
{
    let stop = watch.stop.clone();
    async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = watch.run() => {}
        }
    }
}

/// A condition without its time.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Condition {
    r#type: &'static str,
    status: &'static str,
    reason: &'static str,
    message: String,
}

const REJECTED: &str = "Rejected";

impl<F: Fn() -> BTreeMap<ObjectRef, Outcome> + Send + Sync> Watch<F> {
    async fn run(mut self) {
        let mut changes = self.policies.changes();
        let mut written: HashMap<ObjectName, Instant> = HashMap::new();
        let mut warned = false;
        loop {
            self.look(&mut written, &mut warned).await;
            sleep(LOOK).await;
            tokio::select! {
                _ = changes.changed() => {}
                _ = self.progress.changed() => {}
                () = sleep(PAUSE) => {}
            }
        }
    }

    async fn look(&self, written: &mut HashMap<ObjectName, Instant>, warned: &mut bool) {
        let outcomes = (self.outcomes)();
        written.retain(|_, at| at.elapsed() < PAUSE);
        for (name, policy) in self.policies.all() {
            if written.contains_key(&name) {
                continue;
            }
            let object = ObjectRef {
                kind: "PeerAuthentication",
                name: name.clone(),
            };
            let outcome = outcomes.get(&object);
            let Some(status) = self.wanted(&policy, outcome) else {
                continue;
            };
            self.tell(&name, &policy, outcome);
            written.insert(name.clone(), Instant::now());
            let api: Api<DynamicObject> =
                Api::namespaced_with(self.client.clone(), &name.namespace, &resource());
            let patch = Patch::Merge(json!({ "status": status }));
            let patched = ask(api.patch_status(&name.name, &PatchParams::default(), &patch)).await;
            match patched {
                Ok(_) => {}
                // it was deleted meanwhile
                Err(error) if error.code() == Some(404) => {}
                Err(error) if !std::mem::replace(warned, true) => {
                    warn!(object = %name, %error, "the status of a mesh object cannot be written; may the control plane patch peerauthentications/status?");
                }
                Err(error) => debug!(object = %name, %error, "a status was not written"),
            }
        }
    }

    /// The status to write, if it differs from what stands there.
    fn wanted(&self, policy: &Policy, outcome: Option<&Outcome>) -> Option<Value> {
        let leads = self.claim.stands();
        let refused_here = outcome.is_some_and(|outcome| !outcome.refused.is_empty());
        let ours = standing(policy, "Programmed").is_some_and(|condition| {
            text(condition, "reason") == REJECTED
                && text(condition, "message").ends_with(&told_by(&self.replica))
        });
        if !(leads || refused_here || ours) {
            return None;
        }
        let mut wanted = Vec::new();
        if leads {
            wanted.push(accepted(policy));
        }
        if refused_here || ours || !self.is_foreign(policy) {
            wanted.push(programmed(outcome, &self.replica));
        }
        merged(policy, &wanted, self.clock.now())
    }

    /// Whether another replica's proxies refused what stands there, and not too long ago.
    fn is_foreign(&self, policy: &Policy) -> bool {
        standing(policy, "Programmed").is_some_and(|condition| {
            let since = text(condition, "lastTransitionTime").parse::<Timestamp>();
            let age = since.map(|since| self.clock.now().duration_since(since).unsigned_abs());
            text(condition, "reason") == REJECTED
                && !text(condition, "message").ends_with(&told_by(&self.replica))
                && condition.get("observedGeneration").and_then(Value::as_i64)
                    == Some(policy.generation)
                && age.is_ok_and(|age| age < FOREIGN)
        })
    }

    fn tell(&self, name: &ObjectName, policy: &Policy, outcome: Option<&Outcome>) {
        let refused = outcome.and_then(|outcome| outcome.refused.first_key_value());
        let Some((proxy, why)) = refused else {
            return;
        };
        self.notes.tell(Note {
            regarding: ObjectReference {
                api_version: Some("security.istio.io/v1".to_owned()),
                kind: Some("PeerAuthentication".to_owned()),
                name: Some(name.name.to_string()),
                namespace: Some(name.namespace.to_string()),
                uid: Some(policy.uid.clone()),
                ..ObjectReference::default()
            },
            kind: Kind::Warning,
            reason: "ConfigRejected",
            action: "Program",
            text: format!("the proxy of pod {proxy} refused what this object asks for, and keeps what it had: {why}"),
            distinction: format!("{} {why}", policy.generation),
        });
    }
}

fn resource() -> ApiResource {
    ApiResource {
        group: "security.istio.io".to_owned(),
        version: "v1".to_owned(),
        api_version: "security.istio.io/v1".to_owned(),
        kind: "PeerAuthentication".to_owned(),
        plural: "peerauthentications".to_owned(),
    }
}

/// What of it is served (`xds.md` 1.4).
fn accepted(policy: &Policy) -> Condition {
    let of = |reason: FindingReason| policy.findings.iter().find(|it| it.reason == reason);
    let found = [
        FindingReason::NotServed,
        FindingReason::InvalidValue,
        FindingReason::UnknownField,
    ];
    let worst = found.into_iter().find_map(of);
    let words: Vec<_> = policy
        .findings
        .iter()
        .map(|finding| format!("{} {}", finding.path, finding.text))
        .collect();
    let (status, reason) = match worst.map(|finding| finding.reason) {
        None if policy.accepted => ("True", "Accepted"),
        None | Some(FindingReason::NotServed) => ("False", "NotServed"),
        // what it guards is closed
        Some(FindingReason::InvalidValue) => ("False", "InvalidValue"),
        Some(FindingReason::UnknownField) => ("True", "PartiallyAccepted"),
    };
    let message = match words.is_empty() {
        true => "everything that it says is served".to_owned(),
        false => cut(&words.join("; "), 1024),
    };
    Condition {
        r#type: "Accepted",
        status,
        reason,
        message,
    }
}

/// What proxies made of it.
fn programmed(outcome: Option<&Outcome>, replica: &str) -> Condition {
    let no_proxy = Outcome::default();
    let outcome = outcome.unwrap_or(&no_proxy);
    let all = outcome.acked + outcome.pending + outcome.refused.len();
    let told_by = told_by(replica);
    let (status, reason, message) = match outcome.refused.first_key_value() {
        Some((proxy, why)) => (
            "False",
            REJECTED,
            format!(
                "{}/{all} proxies refused it and keep what they had; {proxy}: {}{told_by}",
                outcome.refused.len(),
                cut(why, 512)
            ),
        ),
        None if all == 0 => (
            "Unknown",
            "NoProxies",
            format!("no proxy that it binds is connected{told_by}"),
        ),
        None if outcome.pending > 0 => (
            "Unknown",
            "Pending",
            format!("{}/{all} proxies{told_by}", outcome.acked),
        ),
        None => ("True", "Acked", format!("{all}/{all} proxies{told_by}")),
    };
    Condition {
        r#type: "Programmed",
        status,
        reason,
        message,
    }
}

fn told_by(replica: &str) -> String {
    format!(" (of those connected to {replica})")
}

/// The conditions that stand there with the wanted ones put in; `None` where nothing differs.
fn merged(policy: &Policy, wanted: &[Condition], now: Timestamp) -> Option<Value> {
    let mut conditions = policy.conditions.clone();
    let mut differs = false;
    for wanted in wanted {
        let standing = standing(policy, wanted.r#type);
        if standing.is_some_and(|it| wanted.stands(it, policy.generation)) {
            continue;
        }
        differs = true;
        let same_status = standing.filter(|it| text(it, "status") == wanted.status);
        let since = same_status.map(|it| text(it, "lastTransitionTime"));
        let since = since.filter(|since| !since.is_empty());
        let since = since.map_or_else(|| whole_seconds(now), str::to_owned);
        let condition = json!({
            "type": wanted.r#type,
            "status": wanted.status,
            "reason": wanted.reason,
            "message": wanted.message,
            "lastTransitionTime": since,
            "observedGeneration": policy.generation,
        });
        match conditions
            .iter_mut()
            .find(|it| text(it, "type") == wanted.r#type)
        {
            Some(place) => *place = condition,
            None => conditions.push(condition),
        }
    }
    differs.then(|| json!({ "conditions": conditions, "observedGeneration": policy.generation }))
}

impl Condition {
    fn stands(&self, condition: &Value, generation: i64) -> bool {
        text(condition, "status") == self.status
            && text(condition, "reason") == self.reason
            && text(condition, "message") == self.message
            && condition.get("observedGeneration").and_then(Value::as_i64) == Some(generation)
    }
}

fn standing<'a>(policy: &'a Policy, r#type: &str) -> Option<&'a Value> {
    let mut conditions = policy.conditions.iter();
    conditions.find(|condition| text(condition, "type") == r#type)
}

fn text<'a>(condition: &'a Value, field: &str) -> &'a str {
    condition
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// RFC 3339 without a fraction, as `metav1.Time` is written.
fn whole_seconds(now: Timestamp) -> String {
    now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn cut(text: &str, characters: usize) -> String {
    text.chars().take(characters).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::Finding;

    fn policy(findings: Vec<Finding>) -> Policy {
        Policy {
            uid: "u".to_owned(),
            generation: 3,
            findings,
            accepted: true,
            conditions: Vec::new(),
        }
    }

    fn finding(reason: FindingReason) -> Finding {
        Finding {
            reason,
            path: "spec.mtls.mode".to_owned(),
            text: "is no mode".to_owned(),
        }
    }

    #[test]
    fn accepted_says_the_worst_that_was_found() {
        use FindingReason::{InvalidValue, NotServed, UnknownField};
        for (found, want) in [
            (vec![], ("True", "Accepted")),
            (vec![UnknownField], ("True", "PartiallyAccepted")),
            (vec![UnknownField, InvalidValue], ("False", "InvalidValue")),
            (vec![NotServed], ("False", "NotServed")),
        ] {
            let condition = accepted(&policy(found.iter().copied().map(finding).collect()));
            assert_eq!((condition.status, condition.reason), want, "{found:?}");
        }
    }

    #[test]
    fn programmed_counts_the_proxies_and_tells_who_counted() {
        let refused: BTreeMap<_, Arc<str>> =
            [(ObjectName::new("shop", "web"), "no such thing".into())].into();
        for (acked, pending, refused, want) in [
            (
                0,
                0,
                BTreeMap::new(),
                "Unknown NoProxies no proxy that it binds is connected (of those connected to malha-0)",
            ),
            (
                3,
                0,
                BTreeMap::new(),
                "True Acked 3/3 proxies (of those connected to malha-0)",
            ),
            (
                2,
                1,
                BTreeMap::new(),
                "Unknown Pending 2/3 proxies (of those connected to malha-0)",
            ),
            (
                2,
                1,
                refused,
                "False Rejected 1/4 proxies refused it and keep what they had; shop/web: no such thing (of those connected to malha-0)",
            ),
        ] {
            let outcome = Outcome {
                acked,
                pending,
                refused,
            };
            let it = programmed(Some(&outcome), "malha-0");
            assert_eq!(format!("{} {} {}", it.status, it.reason, it.message), want);
        }
    }

    #[test]
    fn what_stands_there_is_not_written_again_and_others_conditions_stay() {
        let now: Timestamp = "2026-11-22T10:00:00.5Z".parse().expect("a literal instant");
        let mut policy = policy(Vec::new());
        policy.conditions = vec![json!({"type": "Reconciled", "status": "True"})];
        let outcome = Outcome {
            acked: 1,
            ..Outcome::default()
        };
        let wanted = [accepted(&policy), programmed(Some(&outcome), "a")];
        let status = merged(&policy, &wanted, now).expect("nothing of it stands there");
        assert_eq!(status["observedGeneration"], 3);
        let conditions = status["conditions"].as_array().expect("conditions");
        assert_eq!(conditions.len(), 3);
        assert_eq!(conditions[0]["type"], "Reconciled");
        assert_eq!(conditions[1]["lastTransitionTime"], "2026-11-22T10:00:00Z");

        policy.conditions = conditions.clone();
        assert_eq!(merged(&policy, &wanted, now), None);

        // another count is another message, but no transition
        let later: Timestamp = "2026-11-22T11:00:00Z".parse().expect("a literal instant");
        let outcome = Outcome {
            acked: 2,
            ..Outcome::default()
        };
        let wanted = [programmed(Some(&outcome), "a")];
        let status = merged(&policy, &wanted, later).expect("another message");
        assert_eq!(
            status["conditions"][2]["message"],
            "2/2 proxies (of those connected to a)"
        );
        assert_eq!(
            status["conditions"][2]["lastTransitionTime"],
            "2026-11-22T10:00:00Z"
        );
    }
}
