//! The mesh as the API server tells it: Services, EndpointSlices, pods, namespaces, PeerAuthentications.
//!
//! watches -> `mesh::{kubernetes, istio}` parse -> [`Batch`]es, without delay
//!
//! Pods and namespaces are watched here *and* in [`world`](super::world), which keeps other facts of more pods (an ended
//! one still owns its name there). What is shared would be the bytes of a watch, and the price a decoder that knows both;
//! a second stream costs the API server's cache a few microseconds a change, and here nothing is kept but names.
//!
//! An object comes as JSON and is read by itself: one that nobody can read is skipped with a line, and does not make its
//! whole list unreadable. An API server that is away is waited for, and what it said last stays; so is a CRD that is not
//! installed.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashSet},
    marker::PhantomData,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, pin_mut};
use k8s_openapi::{
    ClusterResourceScope, NamespaceResourceScope,
    api::{core::v1, discovery::v1::EndpointSlice},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Resource,
    runtime::watcher::{self, Event as Heard, watcher},
};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::Value;
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{Pauses, WATCH_SECONDS, dice, world::complain};
use crate::mesh::{Batch, Event, Finding, ObjectName, istio, kubernetes};

/// Objects in one page of a list.
const PAGE: u32 = 200;

/// Events that are handed on at once, at most.
const BATCH: usize = 256;

/// What conditions are written on: the users' objects, as last seen.
#[derive(Debug)]
pub struct Policies {
    known: Mutex<BTreeMap<ObjectName, Policy>>,
    changed: watch::Sender<()>,
}

/// A PeerAuthentication, as far as its conditions need it.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.generation`.
    pub generation: i64,
    /// What is wrong with it.
    pub findings: Vec<Finding>,
    /// Whether it has an effect at all.
    pub accepted: bool,
    /// `status.conditions`.
    pub conditions: Vec<Value>,
}

impl Policies {
    /// None is known yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            known: Mutex::default(),
            changed: watch::Sender::new(()),
        })
    }

    /// Tells that one is not what it was at the last look.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// All of them.
    pub fn all(&self) -> BTreeMap<ObjectName, Policy> {
        self.lock().clone()
    }

    fn set(&self, name: &ObjectName, policy: Option<Policy>) {
        match policy {
            Some(policy) => self.lock().insert(name.clone(), policy),
            None => self.lock().remove(name),
        };
        self.changed.send_replace(());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<ObjectName, Policy>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells `feed` of the mesh, until `stop`. The batch after which every kind was listed once says so.
pub async fn follow(
    client: Client,
    feed: mpsc::Sender<Batch>,
    policies: Arc<Policies>,
    stop: CancellationToken,
) {
    let teller = Teller {
        feed,
        policies,
        missing: AtomicUsize::new(5),
    };
    let following = async {
        tokio::join!(
            follow_kind::<v1::Namespace>(&client, &teller),
            follow_kind::<v1::Service>(&client, &teller),
            follow_kind::<EndpointSlice>(&client, &teller),
            follow_kind::<v1::Pod>(&client, &teller),
            follow_kind::<PeerAuthentication>(&client, &teller),
        )
    };
    tokio::select! {
        () = stop.cancelled() => {}
        _ = following => {}
    }
}

struct Teller {
    feed: mpsc::Sender<Batch>,
    policies: Arc<Policies>,
    /// Kinds that were never listed whole.
    missing: AtomicUsize,
}

impl Teller {
    /// Waits where the feed is full: the API server then waits, too.
    async fn tell(&self, events: Vec<Event>) {
        if !events.is_empty() {
            let batch = Batch {
                events,
                whole: false,
            };
            // nobody listens any more at the very end only
            let _ = self.feed.send(batch).await;
        }
    }

    async fn listed(&self) {
        if self.missing.fetch_sub(1, Ordering::AcqRel) == 1 {
            let batch = Batch {
                events: Vec::new(),
                whole: true,
            };
            let _ = self.feed.send(batch).await;
        }
    }
}

/// Something of the API server's that the mesh is made of.
trait Watched: Clone + std::fmt::Debug + Sized + Send + 'static {
    const GROUP: &'static str;
    const VERSION: &'static str;
    const KIND: &'static str;
    const PLURAL: &'static str;
    /// Objects that do not matter need not be sent.
    const FIELDS: Option<&'static str> = None;
    type Scope: Send + 'static;

    /// What an object says; `None` where it says nothing to the mesh.
    fn read(body: Value, teller: &Teller) -> Result<Option<Event>, serde_json::Error>;
    /// It is no more.
    fn gone(name: ObjectName, teller: &Teller) -> Event;
}

/// An object as it came.
#[derive(Clone, Debug)]
struct Raw<W> {
    metadata: ObjectMeta,
    body: Value,
    kind: PhantomData<fn() -> W>,
}

impl<'de, W> Deserialize<'de> for Raw<W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut body = Value::deserialize(deserializer)?;
        let mut metadata = ObjectMeta::default();
        if let Some(given) = body.get_mut("metadata").and_then(Value::as_object_mut) {
            given.remove("managedFields");
            // its author chooses it, up to a day later than what any reader's type holds
            given.remove("deletionTimestamp");
            let text = |field: &str| given.get(field)?.as_str().map(str::to_owned);
            metadata.name = text("name");
            metadata.namespace = text("namespace");
            metadata.resource_version = text("resourceVersion");
            metadata.uid = text("uid");
        }
        Ok(Self {
            metadata,
            body,
            kind: PhantomData,
        })
    }
}

impl<W: Watched> Resource for Raw<W> {
    type DynamicType = ();
    type Scope = W::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        W::KIND.into()
    }

    fn group((): &()) -> Cow<'_, str> {
        W::GROUP.into()
    }

    fn version((): &()) -> Cow<'_, str> {
        W::VERSION.into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        W::PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl<W: Watched> Raw<W> {
    fn name(&self) -> Option<ObjectName> {
        let namespace = self.metadata.namespace.as_deref().unwrap_or_default();
        Some(ObjectName::new(namespace, self.metadata.name.as_deref()?))
    }
}

/// Follows one kind for ever.
async fn follow_kind<W: Watched>(client: &Client, teller: &Teller)
where
    Raw<W>: Resource<DynamicType = ()>,
{
    let mut config = watcher::Config::default()
        .page_size(PAGE)
        .timeout(WATCH_SECONDS);
    if let Some(fields) = W::FIELDS {
        config = config.fields(fields);
    }
    let events = watcher(Api::<Raw<W>>::all(client.clone()), config).ready_chunks(BATCH);
    pin_mut!(events);
    let mut pauses = Pauses::new(Duration::from_millis(250), Duration::from_secs(10));
    let mut names = Names::default();
    let (mut listed, mut failing) = (false, false);
    while let Some(chunk) = events.next().await {
        let (mut news, mut pause) = (Vec::new(), None);
        for heard in chunk {
            match heard {
                Ok(heard) => {
                    if !matches!(heard, Heard::Init) {
                        pauses.reset();
                        if std::mem::take(&mut failing) {
                            info!(kind = W::PLURAL, "is watched again");
                        }
                    }
                    let done = matches!(heard, Heard::InitDone);
                    names.take(heard, teller, &mut news);
                    if done && !std::mem::replace(&mut listed, true) {
                        teller.tell(std::mem::take(&mut news)).await;
                        teller.listed().await;
                    }
                }
                Err(error) => {
                    let absent = is_not_served(&error);
                    if absent && !std::mem::replace(&mut listed, true) {
                        // nobody can have written one
                        teller.listed().await;
                    }
                    let first = !std::mem::replace(&mut failing, true);
                    match absent {
                        true if first => info!(
                            kind = W::PLURAL,
                            group = W::GROUP,
                            "is not served by this API server; waiting for its CRD"
                        ),
                        true => debug!(kind = W::PLURAL, "is still not served"),
                        false => complain(W::PLURAL, &error, first),
                    }
                    pause = Some(pauses.after_failure(dice()));
                }
            }
        }
        teller.tell(news).await;
        if let Some(pause) = pause {
            sleep(pause).await;
        }
    }
}

fn is_not_served(error: &watcher::Error) -> bool {
    let cause = match error {
        watcher::Error::InitialListFailed(cause)
        | watcher::Error::WatchStartFailed(cause)
        | watcher::Error::WatchFailed(cause) => cause,
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => return false,
    };
    matches!(cause, kube::Error::Api(status) if status.code == 404)
}

/// Names of what there is, so that a new list tells what is no more.
#[derive(Debug, Default)]
struct Names {
    known: HashSet<ObjectName>,
    listing: HashSet<ObjectName>,
}

impl Names {
    /// Turns what was heard into news. What a list repeats is told again: whoever keeps it knows whether it differs.
    fn take<W: Watched>(&mut self, heard: Heard<Raw<W>>, teller: &Teller, news: &mut Vec<Event>) {
        match heard {
            Heard::Init => self.listing.clear(),
            Heard::InitApply(object) => {
                if let Some(name) = object.name() {
                    self.listing.insert(name.clone());
                    self.known.insert(name.clone());
                    news.extend(read(name, object, teller));
                }
            }
            Heard::InitDone => {
                let listing = std::mem::take(&mut self.listing);
                let gone: Vec<_> = self.known.difference(&listing).cloned().collect();
                self.known = listing;
                news.extend(gone.into_iter().map(|name| W::gone(name, teller)));
            }
            Heard::Apply(object) => {
                if let Some(name) = object.name() {
                    self.known.insert(name.clone());
                    news.extend(read(name, object, teller));
                }
            }
            Heard::Delete(object) => {
                if let Some(name) = object.name() {
                    self.known.remove(&name);
                    news.push(W::gone(name, teller));
                }
            }
        }
    }
}

fn read<W: Watched>(name: ObjectName, object: Raw<W>, teller: &Teller) -> Option<Event> {
    match W::read(object.body, teller) {
        Ok(Some(event)) => Some(event),
        Ok(None) => Some(W::gone(name, teller)),
        Err(error) => {
            warn!(kind = W::PLURAL, %name, %error, "cannot be read and stays as it was last");
            None
        }
    }
}

fn parsed<T: DeserializeOwned>(body: Value) -> Result<T, serde_json::Error> {
    serde_json::from_value(body)
}

impl Watched for v1::Namespace {
    const GROUP: &'static str = "";
    const VERSION: &'static str = "v1";
    const KIND: &'static str = "Namespace";
    const PLURAL: &'static str = "namespaces";
    type Scope = ClusterResourceScope;

    fn read(body: Value, _: &Teller) -> Result<Option<Event>, serde_json::Error> {
        let read = kubernetes::namespace(&parsed(body)?);
        Ok(read.map(|(name, namespace)| Event::Namespace(name, Some(namespace))))
    }

    fn gone(name: ObjectName, _: &Teller) -> Event {
        Event::Namespace(name.name, None)
    }
}

impl Watched for v1::Service {
    const GROUP: &'static str = "";
    const VERSION: &'static str = "v1";
    const KIND: &'static str = "Service";
    const PLURAL: &'static str = "services";
    type Scope = NamespaceResourceScope;

    fn read(body: Value, _: &Teller) -> Result<Option<Event>, serde_json::Error> {
        let read = kubernetes::service(&parsed(body)?);
        Ok(read.map(|(name, service)| Event::Service(name, Some(service))))
    }

    fn gone(name: ObjectName, _: &Teller) -> Event {
        Event::Service(name, None)
    }
}

impl Watched for EndpointSlice {
    const GROUP: &'static str = "discovery.k8s.io";
    const VERSION: &'static str = "v1";
    const KIND: &'static str = "EndpointSlice";
    const PLURAL: &'static str = "endpointslices";
    type Scope = NamespaceResourceScope;

    fn read(body: Value, _: &Teller) -> Result<Option<Event>, serde_json::Error> {
        let read = kubernetes::slice(&parsed(body)?);
        Ok(read.map(|(name, slice)| Event::Slice(name, Some(slice))))
    }

    fn gone(name: ObjectName, _: &Teller) -> Event {
        Event::Slice(name, None)
    }
}

impl Watched for v1::Pod {
    const GROUP: &'static str = "";
    const VERSION: &'static str = "v1";
    const KIND: &'static str = "Pod";
    const PLURAL: &'static str = "pods";
    // one that ended is told as deleted, and a cluster of Jobs holds more of those than of others
    const FIELDS: Option<&'static str> = Some("status.phase!=Succeeded,status.phase!=Failed");
    type Scope = NamespaceResourceScope;

    fn read(body: Value, _: &Teller) -> Result<Option<Event>, serde_json::Error> {
        let read = kubernetes::workload(&parsed(body)?);
        Ok(read.map(|(name, workload)| Event::Workload(name, Some(workload))))
    }

    fn gone(name: ObjectName, _: &Teller) -> Event {
        Event::Workload(name, None)
    }
}

/// `security.istio.io`, read as `mesh::istio` does.
#[derive(Clone, Copy, Debug)]
struct PeerAuthentication;

impl Watched for PeerAuthentication {
    const GROUP: &'static str = "security.istio.io";
    const VERSION: &'static str = "v1";
    const KIND: &'static str = "PeerAuthentication";
    const PLURAL: &'static str = "peerauthentications";
    type Scope = NamespaceResourceScope;

    fn read(mut body: Value, teller: &Teller) -> Result<Option<Event>, serde_json::Error> {
        if let Some(object) = body.as_object_mut() {
            // items of a list may leave it to the list to say what they are
            object
                .entry("apiVersion")
                .or_insert_with(|| "security.istio.io/v1".into());
        }
        let text = |pointer: &str| body.pointer(pointer).and_then(Value::as_str);
        let (Some(namespace), Some(name)) = (text("/metadata/namespace"), text("/metadata/name"))
        else {
            return Ok(None);
        };
        let name = ObjectName::new(namespace, name);
        let (read, findings) = istio::peer_authentication(&body);
        for finding in &findings {
            debug!(object = %name, code = finding.reason.code(), path = finding.path, text = finding.text, "PeerAuthentication");
        }
        let conditions = body.pointer("/status/conditions").and_then(Value::as_array);
        let policy = Policy {
            uid: text("/metadata/uid").unwrap_or_default().to_owned(),
            generation: body
                .pointer("/metadata/generation")
                .and_then(Value::as_i64)
                .unwrap_or_default(),
            accepted: read.is_some(),
            findings,
            conditions: conditions.cloned().unwrap_or_default(),
        };
        teller.policies.set(&name, Some(policy));
        Ok(read.map(|policy| Event::PeerAuthentication(name, Some(policy))))
    }

    fn gone(name: ObjectName, teller: &Teller) -> Event {
        teller.policies.set(&name, None);
        Event::PeerAuthentication(name, None)
    }
}
