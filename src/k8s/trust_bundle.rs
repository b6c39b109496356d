//! The ConfigMaps that give pods their trust bundle: one of the same name in every namespace that may hold a pod of ours.
//!
//! ```text
//! World: namespaces ─┐
//! ConfigMaps seen ───┼─> cause -> Pace -> one server-side apply each   (the leader)
//! wanted bundle ─────┘
//! ```
//!
//! Every namespace but the protected ones: a label on a pod alone makes it one of the mesh, so that any namespace may need
//! the bundle within the second, and a pod whose ConfigMap is missing waits for a retry of its kubelet. That costs some 1
//! KiB a namespace in etcd, and a write each when the set of roots changes, which is twice in years; Istio does the same.
//! The control plane's own namespace gets one too. It is written after the journal was, so that where it stands without a
//! journal, the journal was lost (see [`journal`](super::journal)).
//!
//! The webhook asks nobody for it: a namespace is told by its watch before its first pod can be made, and written to at
//! once. Bundles are compared as sets of certificates: order, blanks and comments are no drift. Of each ConfigMap a hash is
//! kept, not its text.

use std::{collections::HashMap, future::Future, pin::pin, sync::Arc, time::Duration};

use aws_lc_rs::digest;
use futures::{FutureExt, StreamExt};
use k8s_openapi::{
    api::core::v1::{ConfigMap, ObjectReference},
    apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    WATCH_SECONDS, ask,
    events::{Kind, Note, Notes},
    journal::AUTHORITY,
    lease::Claim,
    pace::Pace,
    world::{self, World},
};
use crate::{ca::bundle::Bundle, inject::select::is_protected};

/// The key that the sidecar's volume mounts.
pub const KEY: &str = "root-cert.pem";

/// The name under which the API server records that the key is ours.
pub const FIELD_MANAGER: &str = "malha-trust-bundle";

/// How far a watch may lag behind our own write.
const MOMENT: Duration = Duration::from_secs(5);

/// Changes within this time are looked at together: pods come and go far more often than namespaces.
const SETTLE: Duration = Duration::from_millis(100);

/// Writes between two looks, so that a namespace that was just made waits behind a few others and not behind all of them
/// when the roots have changed. Its first ConfigMap goes before a change of others'.
const TOGETHER: usize = 20;

/// How long at most until it is looked again: a claim may stand again, or the settings name another ConfigMap, without
/// anything that tells.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Objects in one page of a list.
const PAGE: u32 = 200;

/// `malha_trust_bundle_namespaces` and `malha_trust_bundle_writes_total`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    namespaces: Family<State, Gauge>,
    writes: Family<Write, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Write {
    cause: &'static str,
}

impl Metrics {
    /// Makes them known to the scraper.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "malha_trust_bundle_namespaces",
            "Namespaces whose ConfigMap holds exactly our trust bundle (good), or does not yet (bad)",
            self.namespaces.clone(),
        );
        registry.register(
            "malha_trust_bundle_writes",
            "Writes of a namespace's trust bundle by what was found there",
            self.writes.clone(),
        );
        for cause in Cause::ALL {
            drop(self.writes.get_or_create(&Write::of(cause)));
        }
    }

    fn tell(&self, state: &'static str, count: usize) {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.namespaces.get_or_create(&State { state }).set(count);
    }
}

impl Write {
    fn of(cause: Cause) -> Self {
        let cause = cause.as_str();
        Self { cause }
    }
}

/// Everything that keeping the ConfigMaps takes.
pub struct Keeper<T> {
    /// The cluster.
    pub client: Client,
    /// What is known of it.
    pub world: Arc<World>,
    /// The control plane's own namespace.
    pub home: String,
    /// What the ConfigMap is called, now; empty where pods take their bundle from somewhere else.
    pub name: Box<dyn Fn() -> String + Send + Sync>,
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

/// Keeps them until the stop.
pub fn keep<T>(keeper: Keeper<T>) -> impl Future<Output = ()> + Send
where
    T: Clone + Send + Sync + 'static,
{
    let stop = keeper.stop.clone();
    async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = keep_for_ever(keeper) => {}
        }
    }
}

/// The settings can be changed while we run, and with them the ConfigMap's name.
async fn keep_for_ever<T: Clone + Send + Sync>(keeper: Keeper<T>) {
    loop {
        let name = (keeper.name)();
        if name.is_empty() {
            tokio::time::sleep(LOOK_AGAIN).await;
            continue;
        }
        let writer = Writer {
            keeper: &keeper,
            places: HashMap::new(),
            listing: HashMap::new(),
            listed: false,
            failing: false,
            name,
        };
        writer.run().await;
    }
}

/// A hash of a set of certificates.
type Digest = [u8; 32];

fn digest_of(bundle: &Bundle) -> Digest {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, bundle.to_pem().as_bytes()).as_ref());
    hash
}

/// A ConfigMap as it was last seen.
#[derive(Clone, Debug, PartialEq, Eq)]
struct There {
    /// Which certificates it holds; `None` where that cannot be read.
    digest: Option<Digest>,
    /// Whether the API server's records say that the key is as we wrote it.
    ours: bool,
    version: Option<u64>,
    uid: Option<String>,
}

impl There {
    fn read(object: &ConfigMap) -> Self {
        let text = object.data.as_ref().and_then(|data| data.get(KEY));
        let bundle = text.and_then(|text| Bundle::parse_pem(text.as_bytes()).ok());
        let records = object.metadata.managed_fields.as_deref();
        Self {
            digest: bundle.as_ref().map(digest_of),
            ours: is_ours(records.unwrap_or_default()),
            version: version(object),
            uid: object.metadata.uid.clone(),
        }
    }
}

/// Whoever changes the key's text becomes its only owner.
fn is_ours(records: &[ManagedFieldsEntry]) -> bool {
    let path = format!("/f:data/f:{KEY}");
    records.iter().any(|record| {
        let fields = record.fields_v1.as_ref();
        record.manager.as_deref() == Some(FIELD_MANAGER)
            && fields.is_some_and(|fields| fields.0.pointer(&path).is_some())
    })
}

/// The object's version as a number. Kubernetes calls it opaque, but every API server's is a growing number; one that is
/// not only costs a write that changes nothing.
fn version(object: &ConfigMap) -> Option<u64> {
    object.metadata.resource_version.as_deref()?.parse().ok()
}

/// What is known of a namespace's ConfigMap.
#[derive(Debug, Default)]
struct Place {
    there: Option<There>,
    /// It was there before.
    known: bool,
    /// The version that our last write made, and when.
    written: Option<(u64, Instant)>,
    pace: Pace,
    /// When it may be written.
    due: Option<Instant>,
}

/// Why a namespace's bundle is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    /// It never was there: pods may wait for it.
    New,
    /// It was there, and is no more.
    Deleted,
    /// Somebody else's certificates, or none that can be read.
    Foreign,
    /// What we wrote ourselves, earlier.
    Stale,
}

impl Cause {
    const ALL: [Self; 4] = [Self::New, Self::Deleted, Self::Foreign, Self::Stale];

    /// The metric label.
    fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Deleted => "deleted",
            Self::Foreign => "foreign",
            Self::Stale => "stale",
        }
    }
}

impl Place {
    /// Why it must be written; `None` where it holds what is wanted.
    fn cause(&self, wanted: &Digest) -> Option<Cause> {
        match &self.there {
            None if self.known => Some(Cause::Deleted),
            None => Some(Cause::New),
            Some(there) if there.digest.as_ref() == Some(wanted) => None,
            Some(there) if there.ours => Some(Cause::Stale),
            Some(_) => Some(Cause::Foreign),
        }
    }

    /// Whether an event tells of a version before the one that our own write made a moment ago. Only a moment: an API
    /// server that was restored from a backup counts its versions from an earlier one on.
    fn is_past(&self, told: Option<u64>) -> bool {
        match (self.written, told) {
            (Some((written, at)), Some(told)) => told < written && at.elapsed() < MOMENT,
            _ => false,
        }
    }

    fn see(&mut self, there: Option<There>) {
        self.known |= there.is_some();
        self.there = there;
    }
}

/// Follows all ConfigMaps of one name and writes them.
struct Writer<'a, T> {
    keeper: &'a Keeper<T>,
    name: String,
    places: HashMap<String, Place>,
    /// A list that is under way.
    listing: HashMap<String, There>,
    /// A whole list was seen: what is not known now is not there.
    listed: bool,
    failing: bool,
}

impl<T: Clone + Send + Sync> Writer<'_, T> {
    /// Until the settings name another ConfigMap.
    async fn run(mut self) {
        let config = watcher::Config::default()
            .fields(&format!("metadata.name={}", self.name))
            .page_size(PAGE)
            .timeout(WATCH_SECONDS);
        let all = Api::<ConfigMap>::all(self.keeper.client.clone());
        let mut events = pin!(watcher(all, config).default_backoff());
        let mut changes = self.keeper.world.changes();
        let mut leading = self.keeper.claim.watch();
        let mut wanted = self.keeper.wanted.clone();
        let mut next_look = Instant::now();
        while (self.keeper.name)() == self.name {
            tokio::select! {
                Some(event) = events.next() => self.hear(event),
                Ok(()) = changes.changed() => {}
                Ok(()) = leading.changed() => {}
                Ok(()) = wanted.changed() => {}
                () = sleep_until(next_look + LOOK_AGAIN) => {}
            }
            while Instant::now() < next_look {
                tokio::select! {
                    Some(event) = events.next() => self.hear(event),
                    () = sleep_until(next_look) => {}
                }
            }
            while self.look().await {
                while let Some(Some(event)) = events.next().now_or_never() {
                    self.hear(event);
                }
            }
            next_look = Instant::now() + SETTLE;
        }
    }

    fn hear(&mut self, event: Result<Event<ConfigMap>, watcher::Error>) {
        match event {
            Ok(Event::Init) => self.listing.clear(),
            Ok(Event::InitApply(object)) => {
                if let Some(namespace) = object.metadata.namespace.clone() {
                    self.listing.insert(namespace, There::read(&object));
                }
            }
            Ok(Event::InitDone) => {
                self.recovered();
                self.relisted();
            }
            Ok(Event::Apply(object)) => {
                self.recovered();
                self.changed(&object, Some(There::read(&object)));
            }
            Ok(Event::Delete(object)) => self.changed(&object, None),
            Err(error) => {
                let first = !std::mem::replace(&mut self.failing, true);
                world::complain("the trust bundle's configmaps", &error, first);
            }
        }
    }

    fn recovered(&mut self) {
        if std::mem::take(&mut self.failing) {
            info!("the trust bundle's configmaps are watched again");
        }
    }

    fn relisted(&mut self) {
        let mut listing = std::mem::take(&mut self.listing);
        // a namespace that is gone takes what is known of its ConfigMap with it
        self.places.retain(|namespace, place| {
            let told = listing.remove(namespace);
            if !place.is_past(told.as_ref().and_then(|told| told.version)) {
                place.see(told);
            }
            place.there.is_some() || self.keeper.world.find_namespace(namespace).is_some()
        });
        for (namespace, there) in listing {
            self.places.entry(namespace).or_default().see(Some(there));
        }
        self.listed = true;
    }

    fn changed(&mut self, object: &ConfigMap, there: Option<There>) {
        let Some(namespace) = &object.metadata.namespace else {
            return;
        };
        let place = self.places.entry(namespace.clone()).or_default();
        if !place.is_past(version(object)) {
            place.see(there);
        }
    }

    /// One look at every namespace, and some writes; whether there may be more to do at once.
    async fn look(&mut self) -> bool {
        let bundle = (self.keeper.bundle_of)(&self.keeper.wanted.borrow());
        // nothing to publish yet, or not known what is there
        if bundle.is_empty() || !self.listed || !self.keeper.world.synced() {
            return false;
        }
        let wanted = digest_of(&bundle);
        let mut amiss = self.amiss(&wanted);
        if !self.keeper.claim.stands() {
            return false;
        }
        let now = Instant::now();
        amiss.retain(|(_, namespace)| {
            let place = self.places.entry(namespace.clone()).or_default();
            *place.due.get_or_insert_with(|| place.pace.drifted(now)) <= now
        });
        amiss.sort();
        let more = amiss.len() > TOGETHER;
        amiss.truncate(TOGETHER);
        let text = bundle.to_pem();
        for (cause, namespace) in amiss {
            if !self.keeper.claim.stands() {
                return false;
            }
            self.write(&namespace, cause, &text).await;
        }
        more
    }

    /// The namespaces whose bundle is not the wanted one.
    fn amiss(&mut self, wanted: &Digest) -> Vec<(Cause, String)> {
        let (mut amiss, mut good) = (Vec::new(), 0);
        let (places, home) = (&mut self.places, &self.keeper.home);
        self.keeper.world.each_of_the_namespaces(|name, facts| {
            if facts.terminating || (is_protected(name) && name != home) {
                return;
            }
            let place = places.get_mut(name);
            match place
                .as_deref()
                .map_or(Some(Cause::New), |place| place.cause(wanted))
            {
                Some(cause) => amiss.push((cause, name.to_owned())),
                None => {
                    good += 1;
                    // somebody may have put it right before we did
                    if let Some(place) = place {
                        place.due = None;
                    }
                }
            }
        });
        self.keeper.metrics.tell("good", good);
        self.keeper.metrics.tell("bad", amiss.len());
        amiss
    }

    async fn write(&mut self, namespace: &str, cause: Cause, text: &str) {
        let api = Api::<ConfigMap>::namespaced(self.keeper.client.clone(), namespace);
        let patch = apply(&self.name, namespace, &self.keeper.home, text);
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let written = ask(api.patch(&self.name, &params, &Patch::Apply(&patch))).await;
        let now = Instant::now();
        let place = self.places.entry(namespace.to_owned()).or_default();
        place.due = None;
        match written {
            Ok(object) => {
                place.pace.wrote(now);
                place.written = version(&object).map(|version| (version, now));
                let before = place.there.take();
                place.see(Some(There::read(&object)));
                self.tell(
                    namespace,
                    cause,
                    before.and_then(|before| before.uid),
                    &object,
                );
            }
            // it was deleted, or is about to be, and the watch has not told yet
            Err(error) if matches!(error.code(), Some(403 | 404)) => {
                debug!(namespace, %error, "cannot write the trust bundle");
                place.pace.failed(now);
            }
            Err(error) => {
                warn!(namespace, %error, "cannot write the trust bundle, trying again");
                place.pace.failed(now);
            }
        }
    }

    fn tell(&self, namespace: &str, cause: Cause, uid: Option<String>, object: &ConfigMap) {
        self.keeper
            .metrics
            .writes
            .get_or_create(&Write::of(cause))
            .inc();
        let what = match cause {
            Cause::New => return debug!(namespace, "wrote the trust bundle for the first time"),
            Cause::Stale => return debug!(namespace, "wrote the new trust bundle"),
            Cause::Deleted => "deleted",
            Cause::Foreign => "overwritten with something else",
        };
        info!(
            namespace,
            cause = cause.as_str(),
            "repaired the trust bundle"
        );
        self.keeper.notes.tell(Note {
            regarding: ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("ConfigMap".to_owned()),
                name: Some(self.name.clone()),
                namespace: Some(namespace.to_owned()),
                uid: uid.or_else(|| object.metadata.uid.clone()),
                ..ObjectReference::default()
            },
            kind: Kind::Warning,
            reason: "TrustBundleRepaired",
            action: "Repair",
            text: format!(
                "{KEY} was {what}; it holds Malha's trust bundle again. Without it the mesh's pods of this namespace \
                 cannot start: Malha alone writes it."
            ),
            distinction: object.metadata.resource_version.clone().unwrap_or_default(),
        });
    }
}

/// The one key, and whose it is.
fn apply(name: &str, namespace: &str, home: &str, text: &str) -> serde_json::Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/managed-by": "malha"},
            "annotations": {AUTHORITY: home},
        },
        "data": {KEY: text},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there(digest: Option<u8>, ours: bool) -> Place {
        let mut place = Place::default();
        place.see(Some(There {
            digest: digest.map(|byte| [byte; 32]),
            ours,
            version: Some(7),
            uid: None,
        }));
        place
    }

    #[test]
    fn a_bundle_is_written_for_a_cause() {
        let mut deleted = there(Some(1), true);
        deleted.see(None);
        let cases = [
            (Place::default(), Some(Cause::New)),
            (deleted, Some(Cause::Deleted)),
            (there(Some(1), true), None),
            // as good as ours, whoever wrote it
            (there(Some(1), false), None),
            (there(Some(2), true), Some(Cause::Stale)),
            (there(Some(2), false), Some(Cause::Foreign)),
            (there(None, true), Some(Cause::Stale)),
            (there(None, false), Some(Cause::Foreign)),
        ];
        for (place, want) in cases {
            assert_eq!(place.cause(&[1; 32]), want, "{place:?}");
        }
        let mut order = Cause::ALL;
        order.sort();
        assert_eq!(order[0], Cause::New, "pods may wait for it");
    }

    #[test]
    fn a_watch_that_lags_behind_our_write_is_not_believed() {
        let mut place = there(Some(1), true);
        assert!(!place.is_past(Some(3)));
        place.written = Some((7, Instant::now()));
        assert!(place.is_past(Some(6)));
        assert!(!place.is_past(Some(7)) && !place.is_past(Some(8)) && !place.is_past(None));
    }

    #[test]
    fn the_records_say_whose_the_key_is() {
        let by = |manager: &str, key: &str| -> ManagedFieldsEntry {
            let fields = json!({"f:data": {format!("f:{key}"): {}}});
            serde_json::from_value(json!({"manager": manager, "fieldsV1": fields}))
                .expect("a record")
        };
        assert!(is_ours(&[by("kubectl", "x"), by(FIELD_MANAGER, KEY)]));
        assert!(!is_ours(&[by("kubectl", KEY), by(FIELD_MANAGER, "x")]));
        assert!(!is_ours(&[]));
    }

    #[test]
    fn order_and_comments_make_no_other_bundle() {
        let object = |text: &str| -> ConfigMap {
            serde_json::from_value(json!({"data": {KEY: text}})).expect("a ConfigMap")
        };
        let [one, two] = [1, 2].map(|_| {
            let made = rcgen::generate_simple_self_signed(["x".to_owned()]).expect("made");
            crate::ca::pem::encode("CERTIFICATE", made.cert.der())
        });
        let read = |text: String| There::read(&object(&text)).digest;
        let both = read(format!("{one}{two}"));
        assert!(both.is_some());
        assert_eq!(
            read(format!("# second\n{two}\n# first\n{}", one.trim_end())),
            both
        );
        assert_ne!(read(one), both);
        assert_eq!(read("hello".to_owned()), None);
        assert_eq!(There::read(&ConfigMap::default()).digest, None);
    }
}
