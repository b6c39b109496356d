//! The cluster as far as the CA and the webhook must know it without asking: watched beforehand, only facts kept.
//!
//! namespaces, pods, service accounts, nodes -> facts -> `Liveness`, [`ClusterFacts`], [`pods`](super::pods)
//!
//! Each kind is followed by one future that alone writes its map; readers take a read lock for the time of one look-up.
//! A list that is under way fills a second map, which replaces the first at its end, so that readers never see half a
//! cluster. A pod takes some 400 bytes: names that repeat (service accounts, nodes, images, owners) are shared.

mod facts;
mod kept;

use std::{
    fmt::Debug,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, pin_mut};
use http_body_util::BodyExt;
use hyper::{Request, header::DATE};
use jiff::{SignedDuration, Timestamp};
use kube::{
    Api, Client, Resource,
    client::Body,
    runtime::watcher::{self, Event, watcher},
};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use serde::de::DeserializeOwned;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use facts::{Namespace, Owner, Pod};
use facts::{NamespaceView, NodeView, PodView, ServiceAccountView, kubelet_minor};
use kept::{Kept, Names};

use super::{ApiError, Pauses, WATCH_SECONDS, ask, brief, dice};
use crate::{
    clock::Clock,
    inject::{ClusterFacts, NamespaceFacts},
};

/// Objects in one page of a list: what is held in memory at once while a big cluster is read.
const PAGE: u32 = 200;

/// The pause between two looks at the API server's health and clock.
const PULSE: Duration = Duration::from_secs(10);

/// No kubelet is known.
const UNKNOWN: u32 = u32::MAX;

/// What is known of the cluster.
#[derive(Debug)]
pub struct World {
    namespaces: Kept<Namespace>,
    pods: Kept<Pod>,
    service_accounts: Kept<Arc<str>>,
    nodes: Kept<Option<u32>>,
    oldest_kubelet: AtomicU32,
    heard: Mutex<Option<Instant>>,
    skew: Mutex<Option<Skew>>,
    changed: watch::Sender<()>,
}

/// How far this clock was ahead of the API server's when that was measured.
#[derive(Clone, Copy, Debug)]
pub struct Skew {
    /// Negative where it was behind.
    pub ahead: SignedDuration,
    /// By the clock that never jumps.
    pub measured: Instant,
}

/// `malha_clock_skew_seconds`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    skew: Gauge<f64, AtomicU64>,
}

impl Metrics {
    /// Makes them known to the scraper.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "malha_clock_skew_seconds",
            "This clock minus the API server's, which tells whole seconds",
            self.skew.clone(),
        );
    }
}

impl World {
    /// A world of which nothing is known yet; [`World::follow`] fills it.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            namespaces: Kept::new(),
            pods: Kept::new(),
            service_accounts: Kept::new(),
            nodes: Kept::new(),
            oldest_kubelet: AtomicU32::new(UNKNOWN),
            heard: Mutex::new(None),
            skew: Mutex::new(None),
            changed: watch::Sender::new(()),
        })
    }

    /// Whether every kind was listed whole at least once.
    pub fn synced(&self) -> bool {
        self.missing().next().is_none()
    }

    /// The kinds not listed yet, for a log line that says what is waited for.
    pub fn missing(&self) -> impl Iterator<Item = &'static str> {
        [
            ("namespaces", self.namespaces.synced()),
            ("pods", self.pods.synced()),
            ("serviceaccounts", self.service_accounts.synced()),
            ("nodes", self.nodes.synced()),
        ]
        .into_iter()
        .filter_map(|(kind, synced)| (!synced).then_some(kind))
    }

    /// How long ago the API server last answered; `None` before it ever did.
    pub fn silence(&self) -> Option<Duration> {
        let heard = *self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.map(|heard| heard.elapsed())
    }
    /// How far this clock is ahead of the API server's, as last measured.
    pub fn clock_skew(&self) -> Option<Skew> {
        *self.skew.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells that pods or namespaces are not what they were at the last look.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Looks at every pod, namespace by namespace: the namespace's name, and the name of each pod of it with what is known.
    pub fn each_namespace(&self, look: impl FnMut(&str, &mut dyn Iterator<Item = (&str, &Pod)>)) {
        self.pods.each_namespace(look);
    }

    /// What is known of a pod.
    pub fn find_pod(&self, namespace: &str, name: &str) -> Option<Pod> {
        self.pods.get(namespace, name)
    }

    /// Looks at the pods of one namespace.
    pub fn each_pod_in(&self, namespace: &str, look: impl FnMut(&Pod)) {
        self.pods.each_in(namespace, look);
    }

    /// What is known of a namespace.
    pub fn find_namespace(&self, name: &str) -> Option<Namespace> {
        self.namespaces.get("", name)
    }

    /// Looks at every namespace: its name, and what is known of it.
    pub fn each_of_the_namespaces(&self, mut look: impl FnMut(&str, &Namespace)) {
        self.namespaces
            .each_namespace(|_, all| all.for_each(|(name, facts)| look(name, facts)));
    }

    /// The UID of a service account.
    pub fn find_service_account(&self, namespace: &str, name: &str) -> Option<Arc<str>> {
        self.service_accounts.get(namespace, name)
    }

    /// Keeps this world as the cluster is, until `stop`.
    pub async fn follow(
        self: Arc<Self>,
        client: Client,
        clock: Clock,
        metrics: Metrics,
        stop: CancellationToken,
    ) {
        let following = async {
            tokio::join!(
                self.follow_pods(client.clone()),
                self.follow_namespaces(client.clone()),
                self.follow_service_accounts(client.clone()),
                self.follow_nodes(client.clone()),
                self.feel_pulse(client.clone(), clock, metrics),
            )
        };
        tokio::select! {
            () = stop.cancelled() => {}
            _ = following => {}
        }
    }

    async fn follow_pods(&self, client: Client) {
        let mut names = Names::default();
        let facts = |view| Some(Pod::of(view, &mut names));
        let changed = || self.tell_change();
        self.follow_kind::<PodView, _>(Api::all(client), &self.pods, facts, changed)
            .await;
    }

    async fn follow_namespaces(&self, client: Client) {
        let facts = |view: NamespaceView| Some(Namespace::of(view.into_metadata()));
        let changed = || self.tell_change();
        self.follow_kind(Api::all(client), &self.namespaces, facts, changed)
            .await;
    }

    async fn follow_service_accounts(&self, client: Client) {
        let facts = |view: ServiceAccountView| view.into_metadata().uid.map(Arc::<str>::from);
        self.follow_kind(Api::all(client), &self.service_accounts, facts, || ())
            .await;
    }

    async fn follow_nodes(&self, client: Client) {
        let facts = |view: NodeView| Some(kubelet_minor(&view));
        let changed = || {
            let mut oldest = UNKNOWN;
            self.nodes
                .each(|minor| oldest = oldest.min(minor.unwrap_or(UNKNOWN)));
            self.oldest_kubelet.store(oldest, Ordering::Relaxed);
        };
        self.follow_kind(Api::all(client), &self.nodes, facts, changed)
            .await;
    }

    /// Follows one kind for ever. `facts` says what is kept of an object; `changed` is called after each change of what
    /// is kept.
    async fn follow_kind<K, F>(
        &self,
        api: Api<K>,
        kept: &Kept<F>,
        mut facts: impl FnMut(K) -> Option<F>,
        changed: impl Fn(),
    ) where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
        F: Clone + PartialEq,
    {
        let config = watcher::Config::default()
            .page_size(PAGE)
            .timeout(WATCH_SECONDS);
        let events = watcher(api, config);
        pin_mut!(events);
        let mut pauses = Pauses::new(Duration::from_millis(500), Duration::from_secs(10));
        let mut listing = kept.begin();
        let mut failing = false;
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    // `Init` says that a list is about to be asked for, not that anybody answered.
                    if !matches!(event, Event::Init) {
                        self.hear();
                        pauses.reset();
                        if std::mem::take(&mut failing) {
                            info!(kind = %K::plural(&()), "is watched again");
                        }
                    }
                    let listed = matches!(event, Event::InitDone);
                    if take(event, kept, &mut listing, &mut facts) {
                        changed();
                    }
                    if listed {
                        self.tell_change();
                    }
                }
                Err(error) => {
                    let first = !std::mem::replace(&mut failing, true);
                    complain(&K::plural(&()), &error, first);
                    sleep(pauses.after_failure(dice())).await;
                }
            }
        }
    }

    /// Asks the API server from time to time how it is: the only way to notice that it is away while nothing changes, and
    /// to compare clocks.
    async fn feel_pulse(&self, client: Client, clock: Clock, metrics: Metrics) {
        loop {
            match clock_skew(&client, &clock).await {
                Ok(skew) => {
                    self.hear();
                    if let Some(skew) = skew {
                        metrics.skew.set(skew.as_secs_f64());
                        let skew = Skew {
                            ahead: skew,
                            measured: Instant::now(),
                        };
                        *self.skew.lock().unwrap_or_else(PoisonError::into_inner) = Some(skew);
                    }
                }
                Err(error) => debug!(%error, "the API server does not answer"),
            }
            sleep(PULSE).await;
        }
    }

    fn hear(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn tell_change(&self) {
        self.changed.send_replace(());
    }
}

impl ClusterFacts for World {
    fn oldest_kubelet(&self) -> Option<u32> {
        let minor = self.oldest_kubelet.load(Ordering::Relaxed);
        (minor != UNKNOWN).then_some(minor)
    }

    fn namespace(&self, name: &str) -> Option<NamespaceFacts> {
        self.find_namespace(name).map(|namespace| NamespaceFacts {
            name: name.to_owned(),
            labels: namespace.labels,
        })
    }
}

/// Takes one event in; whether what is kept changed.
fn take<K, F>(
    event: Event<K>,
    kept: &Kept<F>,
    listing: &mut kept::Listing<F>,
    facts: &mut impl FnMut(K) -> Option<F>,
) -> bool
where
    K: Resource<DynamicType = ()>,
    F: Clone + PartialEq,
{
    match event {
        Event::Init => *listing = kept.begin(),
        Event::InitApply(object) => {
            if let Some((namespace, name)) = key(&object)
                && let Some(facts) = facts(object)
            {
                listing.insert(&namespace, &name, facts);
            }
        }
        Event::InitDone => {
            kept.replace(std::mem::take(listing));
            return true;
        }
        Event::Apply(object) => {
            if let Some((namespace, name)) = key(&object)
                && let Some(facts) = facts(object)
            {
                return kept.insert(&namespace, &name, facts);
            }
        }
        Event::Delete(object) => {
            return key(&object).is_some_and(|(namespace, name)| kept.remove(&namespace, &name));
        }
    }
    false
}

fn key<K: Resource<DynamicType = ()>>(object: &K) -> Option<(String, String)> {
    let meta = object.meta();
    Some((
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone()?,
    ))
}

/// One line for an outage, however long it lasts.
pub(super) fn complain(kind: &str, error: &watcher::Error, first: bool) {
    let error = match error {
        watcher::Error::InitialListFailed(cause)
        | watcher::Error::WatchStartFailed(cause)
        | watcher::Error::WatchFailed(cause) => brief(cause),
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => error.to_string(),
    };
    if first {
        warn!(
            kind,
            error, "cannot be watched now; what is known stays in force"
        );
    } else {
        debug!(kind, error, "still cannot be watched");
    }
}

/// One question and its answer's date: this clock minus the server's, where it told.
///
/// # Errors
/// The API server gave no answer.
pub async fn clock_skew(
    client: &Client,
    clock: &Clock,
) -> Result<Option<SignedDuration>, ApiError> {
    let request = Request::get("/version")
        .body(Body::empty())
        .map_err(|error| ApiError::Refused(kube::Error::HttpError(error)))?;
    let asked = clock.now();
    let answer = ask(client.send(request)).await?;
    let answered = clock.now();
    let date = answer
        .headers()
        .get(DATE)
        .and_then(|date| date.to_str().ok());
    let skew = date.and_then(|date| skew(date, asked, answered));
    // read to its end, so that the connection can be used again
    let _ = ask(answer.into_body().collect()).await;
    Ok(skew)
}

/// The date tells whole seconds, so on average it is half a second behind the instant it was written at, and that instant
/// lies between question and answer.
fn skew(date: &str, asked: Timestamp, answered: Timestamp) -> Option<SignedDuration> {
    let theirs = jiff::fmt::rfc2822::DateTimeParser::new()
        .parse_timestamp(date)
        .ok()?;
    let halfway = answered.duration_since(asked) / 2;
    Some(asked.duration_since(theirs) + halfway - SignedDuration::from_millis(500))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a literal instant")
    }

    #[test]
    fn skew_is_ours_minus_theirs_with_the_round_trip_halved() {
        let date = "Sun, 22 Nov 2026 10:00:00 GMT";
        let told = skew(
            date,
            at("2026-11-22T10:00:29.5Z"),
            at("2026-11-22T10:00:31.5Z"),
        );
        assert_eq!(told, Some(SignedDuration::from_secs(30)));
        let behind = skew(
            date,
            at("2026-11-22T09:59:00.5Z"),
            at("2026-11-22T09:59:00.5Z"),
        );
        assert_eq!(behind, Some(SignedDuration::from_secs(-60)));
        assert_eq!(
            skew(
                "yesterday",
                at("2026-11-22T10:00:00Z"),
                at("2026-11-22T10:00:00Z")
            ),
            None
        );
    }

    fn account(name: &str, uid: &str) -> ServiceAccountView {
        let json = serde_json::json!({"metadata": {"name": name, "uid": uid}});
        serde_json::from_value(json).expect("readable")
    }

    #[test]
    fn a_new_list_replaces_what_was_kept_only_when_it_is_whole() {
        let kept: Kept<String> = Kept::new();
        let mut listing = kept.begin();
        let mut facts = |view: ServiceAccountView| view.into_metadata().uid;
        let mut tell = |event| take(event, &kept, &mut listing, &mut facts);

        assert!(!tell(Event::Init));
        assert!(!tell(Event::InitApply(account("a", "1"))));
        assert!(!kept.synced() && kept.get("", "a").is_none());
        assert!(tell(Event::InitDone));
        assert!(kept.synced() && kept.get("", "a").is_some());

        assert!(tell(Event::Apply(account("b", "2"))));
        assert!(
            !tell(Event::Apply(account("b", "2"))),
            "the same facts are no change"
        );
        assert!(tell(Event::Delete(account("a", "1"))));
        assert!(!tell(Event::Delete(account("a", "1"))));

        // the watch broke: a second list begins, readers go on seeing the first
        tell(Event::Init);
        tell(Event::InitApply(account("c", "3")));
        assert_eq!(kept.get("", "b").as_deref(), Some("2"));
        tell(Event::InitDone);
        assert_eq!(kept.get("", "b"), None);
        assert_eq!(kept.get("", "c").as_deref(), Some("3"));
    }
}
