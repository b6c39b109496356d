//! The `caBundle` of our webhook configurations: what the API server trusts when it calls us.
//!
//! ```text
//! the live object ─┬─> Live: does it verify this leaf for this name?   (every replica, for readiness)
//! wanted bundle ───┴─> drift -> Pace -> one server-side apply          (the leader)
//! ```
//!
//! One field of entries that exist is written, nothing else, with a field manager of its own; the installer's manifests
//! leave that field out, so that nobody fights over it. Bundles are compared as sets of certificates: order, blanks and
//! comments are no drift. The write names the `resourceVersion` it was decided on, so neither a replica that no longer
//! leads nor an entry that vanished in between does harm: the API server answers 409, and the object is read again.
//!
//! Every write names *all* entries: with server-side apply, a field that a manager no longer mentions is one it gives up,
//! and an entry that nobody else holds would lose its bundle.

mod drift;
mod live;

use std::{fmt::Debug, future::Future, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use k8s_openapi::api::{
    admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration},
    core::v1::ObjectReference,
};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams},
};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use self::{drift::FIELD_MANAGER, live::Mismatch};
use self::{
    drift::{Cause, Drift, Entry, drift},
    live::Configuration,
};
use super::{
    ask,
    events::{Kind, Note, Notes},
    follow::Follow,
    lease::Claim,
    pace::Pace,
};
use crate::ca::bundle::Bundle;

/// How far a watch may lag behind our own write.
const MOMENT: Duration = Duration::from_secs(5);

/// The webhook configurations whose entries carry our bundle.
#[derive(Clone, Debug)]
pub struct Targets {
    /// The MutatingWebhookConfiguration; readiness hangs on it.
    pub injector: String,
    /// The ValidatingWebhookConfiguration with advice.
    pub advice: String,
}

/// `malha_webhook_ca_bundle_matches` and `malha_webhook_repairs_total`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    matches: Family<Webhook, Gauge>,
    repairs: Family<Repair, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Webhook {
    webhook: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Repair {
    cause: Cause,
}

impl EncodeLabelValue for Cause {
    fn encode(
        &self,
        encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>,
    ) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.as_str(), encoder)
    }
}

impl Metrics {
    /// Makes them known to the scraper.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "malha_webhook_ca_bundle_matches",
            "Whether every entry of a webhook configuration carries exactly our trust bundle (1) or not (0)",
            self.matches.clone(),
        );
        registry.register(
            "malha_webhook_repairs",
            "Writes of a webhook configuration's caBundle by what was found there",
            self.repairs.clone(),
        );
        for cause in Cause::ALL {
            drop(self.repairs.get_or_create(&Repair { cause }));
        }
    }

    /// `None` where there is nothing that could match.
    fn tell(&self, webhook: &str, matches: Option<bool>) {
        let webhook = Webhook {
            webhook: webhook.to_owned(),
        };
        match matches {
            Some(matches) => drop(self.matches.get_or_create(&webhook).set(i64::from(matches))),
            None => drop(self.matches.remove(&webhook)),
        }
    }
}

/// What the API server trusts right now, as last read.
#[derive(Clone, Debug)]
pub struct Live {
    injector: String,
    seen: Arc<ArcSwap<Option<Vec<Entry>>>>,
    changed: watch::Receiver<()>,
}

impl Live {
    /// Whether the API server, with the bundle that it holds for each entry of the injector's configuration, accepts
    /// `chain` (leaf first, DER) for `dns_name` at `now`.
    ///
    /// # Errors
    /// The first entry that does not, or that there is none.
    pub fn verifies(
        &self,
        chain: &[Vec<u8>],
        dns_name: &str,
        now: jiff::Timestamp,
    ) -> Result<(), Mismatch> {
        let seen = self.seen.load();
        let entries = seen.as_deref();
        live::verifies(&self.injector, entries, chain, dns_name, now)
    }

    /// Tells that the live bundle may be another.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.clone()
    }
}

/// Everything that keeping the bundles takes.
pub struct Keeper<T> {
    /// The cluster.
    pub client: Client,
    /// Where the bundle is written to.
    pub targets: Targets,
    /// What holds the wanted bundle.
    pub wanted: watch::Receiver<T>,
    /// The wanted bundle in it.
    pub bundle_of: fn(&T) -> Bundle,
    /// Only while it stands, anything is written.
    pub claim: Claim,
    /// Where repairs are told.
    pub notes: Notes,
    /// What is counted.
    pub metrics: Metrics,
    /// The end.
    pub stop: CancellationToken,
}

/// What the API server trusts, and the future that follows it and, while this replica leads, keeps it as wanted.
pub fn keep<T>(keeper: Keeper<T>) -> (Live, impl Future<Output = ()> + Send)
where
    T: Clone + Send + Sync + 'static,
{
    let Keeper {
        client,
        targets,
        wanted,
        bundle_of,
        claim,
        notes,
        metrics,
        stop,
    } = keeper;
    let seen = Arc::new(ArcSwap::from_pointee(None));
    let (tell, changed) = watch::channel(());
    let live = Live {
        injector: targets.injector.clone(),
        seen: seen.clone(),
        changed,
    };
    let injector = Writer {
        api: Api::<MutatingWebhookConfiguration>::all(client.clone()),
        name: targets.injector,
        wanted: wanted.clone(),
        bundle_of,
        claim: claim.clone(),
        notes: notes.clone(),
        metrics: metrics.clone(),
        publish: move |entries| {
            seen.store(Arc::new(entries));
            tell.send_replace(());
        },
        required: true,
        pace: Pace::default(),
        written: None,
    };
    let advice = Writer {
        api: Api::<ValidatingWebhookConfiguration>::all(client),
        name: targets.advice,
        wanted,
        bundle_of,
        claim,
        notes,
        metrics,
        publish: |_| {},
        required: false,
        pace: Pace::default(),
        written: None,
    };
    (live, async move {
        tokio::select! {
            () = stop.cancelled() => {}
            _ = futures::future::join(injector.run(), advice.run()) => {}
        }
    })
}

/// Follows one configuration and writes it.
struct Writer<K, T, P> {
    api: Api<K>,
    name: String,
    wanted: watch::Receiver<T>,
    bundle_of: fn(&T) -> Bundle,
    claim: Claim,
    notes: Notes,
    metrics: Metrics,
    publish: P,
    /// Without it the mesh is broken; without advice it is not.
    required: bool,
    pace: Pace,
    /// The version our last write made, and when.
    written: Option<(u64, Instant)>,
}

impl<K, T, P> Writer<K, T, P>
where
    K: Configuration
        + Resource<DynamicType = ()>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + 'static,
    T: Clone,
    P: Fn(Option<Vec<Entry>>),
{
    async fn run(mut self) {
        let mut follow = Follow::new(self.api.clone(), &self.name);
        let mut leading = self.claim.watch();
        let mut wanted = self.wanted.clone();
        let mut current: Option<K> = None;
        let mut due: Option<Instant> = None;
        loop {
            tokio::select! {
                seen = follow.next() => {
                    if self.is_past(seen.as_ref()) {
                        continue;
                    }
                    self.publish(seen.as_ref());
                    current = seen;
                }
                Ok(()) = leading.changed() => {}
                Ok(()) = wanted.changed() => {}
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
            due = match self.reconcile(current.as_ref(), due).await {
                Outcome::Rest => None,
                Outcome::At(instant) => Some(instant),
                Outcome::Wrote(object) => {
                    self.publish(Some(&*object));
                    current = Some(*object);
                    None
                }
                Outcome::ReadAgain => {
                    follow.read_again();
                    current = None;
                    None
                }
            };
        }
    }

    /// Whether an event tells of a version before the one that our own write made a moment ago. Only a moment: an API
    /// server that was restored from a backup counts its versions from an earlier one on.
    fn is_past(&self, seen: Option<&K>) -> bool {
        match (self.written, seen.and_then(version)) {
            (Some((written, at)), Some(seen)) => seen < written && at.elapsed() < MOMENT,
            _ => false,
        }
    }

    fn publish(&self, seen: Option<&K>) {
        let wanted = (self.bundle_of)(&self.wanted.borrow());
        let entries = seen.map(K::entries);
        let matches = match entries.as_deref() {
            Some(entries) => Some(drift(entries, &wanted).is_none()),
            None => self.required.then_some(false),
        };
        self.metrics.tell(&self.name, matches);
        (self.publish)(entries);
    }

    async fn reconcile(&mut self, current: Option<&K>, due: Option<Instant>) -> Outcome<K> {
        let wanted = (self.bundle_of)(&self.wanted.borrow());
        let Some(object) = current else {
            return Outcome::Rest;
        };
        let entries = object.entries();
        let drift = drift(&entries, &wanted);
        self.metrics.tell(&self.name, Some(drift.is_none()));
        let Some(drift) = drift else {
            return Outcome::Rest;
        };
        let now = Instant::now();
        if !self.claim.stands() {
            // said to lead, but not since the last renewal: that is told again by nobody, so look again
            let leading = *self.claim.watch().borrow();
            return if leading {
                Outcome::At(now + Duration::from_secs(1))
            } else {
                Outcome::Rest
            };
        }
        let when = due.unwrap_or_else(|| self.pace.drifted(now));
        if now < when {
            debug!(webhook = self.name, cause = drift.cause.as_str(), wait = ?(when - now), "undone again");
            return Outcome::At(when);
        }
        self.write(object, &entries, &wanted, &drift).await
    }

    async fn write(
        &mut self,
        object: &K,
        entries: &[Entry],
        wanted: &Bundle,
        drift: &Drift,
    ) -> Outcome<K> {
        let patch = apply::<K>(&self.name, object, entries, wanted);
        let params = PatchParams::apply(FIELD_MANAGER).force();
        match ask(self.api.patch(&self.name, &params, &Patch::Apply(&patch))).await {
            Ok(written) => {
                self.pace.wrote(Instant::now());
                self.written = version(&written).map(|version| (version, Instant::now()));
                self.tell(object, drift);
                Outcome::Wrote(Box::new(written))
            }
            Err(error) if matches!(error.code(), Some(404 | 409)) => {
                debug!(webhook = self.name, %error, "changed meanwhile, reading it again");
                self.pace.missed(Instant::now());
                Outcome::ReadAgain
            }
            Err(error) => {
                warn!(webhook = self.name, %error, "cannot write the caBundle, trying again");
                self.pace.failed(Instant::now());
                Outcome::ReadAgain
            }
        }
    }

    fn tell(&self, object: &K, drift: &Drift) {
        let entries = drift.entries.join(", ");
        let cause = drift.cause.as_str();
        if drift.first {
            info!(
                webhook = self.name,
                entries, "wrote the caBundle for the first time"
            );
            return;
        }
        info!(webhook = self.name, entries, cause, "repaired the caBundle");
        self.metrics
            .repairs
            .get_or_create(&Repair { cause: drift.cause })
            .inc();
        if drift.cause == Cause::Stale {
            return;
        }
        let text = format!(
            "The caBundle of {entries} was {}; it holds Malha's trust bundle again. Leave this field out of whatever \
             installs the configuration: Malha alone writes it.",
            drift.cause.in_words()
        );
        self.notes.tell(Note {
            regarding: ObjectReference {
                api_version: Some(K::api_version(&()).into_owned()),
                kind: Some(K::kind(&()).into_owned()),
                name: Some(self.name.clone()),
                uid: object.meta().uid.clone(),
                ..ObjectReference::default()
            },
            kind: Kind::Warning,
            reason: "WebhookRepaired",
            action: "Repair",
            text,
            distinction: object.meta().resource_version.clone().unwrap_or_default(),
        });
    }
}

/// What a look at the object came to.
enum Outcome<K> {
    /// Nothing to do until something changes.
    Rest,
    /// Write at this instant, if it is still needed.
    At(Instant),
    /// Written; this is the object now.
    Wrote(Box<K>),
    /// Somebody else was faster, or it failed: what we have read is not to be trusted any more.
    ReadAgain,
}

/// The one field of every entry, bound to the version that was seen.
fn apply<K>(name: &str, object: &K, entries: &[Entry], wanted: &Bundle) -> serde_json::Value
where
    K: Configuration + Resource<DynamicType = ()>,
{
    use base64::{Engine, engine::general_purpose::STANDARD};
    let bundle = STANDARD.encode(wanted.to_pem());
    let entries: Vec<_> = entries
        .iter()
        .map(|entry| json!({"name": entry.name, "clientConfig": {"caBundle": bundle}}))
        .collect();
    json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {
            "name": name,
            "uid": object.meta().uid,
            "resourceVersion": object.meta().resource_version,
        },
        "webhooks": entries,
    })
}

/// The object's version as a number. Kubernetes calls it opaque, but every API server's is a growing number; one that is
/// not only costs a needless 409.
fn version<K: Resource>(object: &K) -> Option<u64> {
    object.meta().resource_version.as_deref()?.parse().ok()
}
