//! Configuration for proxies: delta xDS over mutual TLS (`envoy.service.discovery.v3`).
//!
//! ```text
//! feed   -> Batch -> Hub: catalogue -> Touched -> the streams that it concerns
//! stream -> request -> who is it? -> Session (xds::delta) -> response -> ACK or NACK -> ledger -> conditions, `malha ps`
//! ```
//!
//! One future, [`Hub::keep`], takes changes over; streams read the catalogue under a lock when they write. What a stream
//! must look at again is kept as names in its session, so a slow one costs no memory. A proxy is told its own node's
//! configuration alone: its certificate must be that of the pod it says it is.

mod caller;
mod metrics;
mod questions;
mod stream;
mod wire;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use axum::{Router, routing::post};
use envoy_types::pb::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{CertificateValidationContext, Secret, secret::Type},
};
use jiff::Timestamp;
use prost::Message as _;
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use self::wire::Program;
pub use self::{metrics::Metrics, questions::router as questions};
use crate::{
    ca::{Authority, bundle::Bundle},
    clock::Clock,
    identity::SpiffeId,
    mesh::{Batch, ObjectName, ObjectRef},
    xds::{
        Catalogue, Kind, Resource, Touched,
        delta::{Outcome, Session, State, View, content_hash},
    },
};

/// What a stream may take, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of one request: a client that comes back names everything it holds, at some 60 bytes each.
    pub request_bytes: usize,
    /// About the bytes of one response.
    pub response_bytes: usize,
    /// From the stream's begin to its first request.
    pub first_request: Duration,
    /// How long a pod that is not known yet, or a world that is not, is waited for before the client is told to come
    /// again.
    pub unknown: Duration,
    /// How long new listeners and routes wait for clusters to get warm.
    pub warming: Duration,
    /// An answer that is out for longer is reported.
    pub late: Duration,
    /// An answer that is out for longer ends the stream.
    pub lost: Duration,
    /// Streams of one proxy: Envoy's, its agent's, and those that are dead and do not know it yet.
    pub streams_of_a_proxy: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_bytes: 4 << 20,
            response_bytes: 64 << 10,
            first_request: Duration::from_secs(10),
            unknown: Duration::from_secs(5),
            warming: Duration::from_secs(2),
            late: Duration::from_secs(30),
            lost: Duration::from_secs(300),
            streams_of_a_proxy: 8,
        }
    }
}

/// The trust bundle's name, as Istio's agents know it.
pub const BUNDLE: &str = "ROOTCA";

/// What all streams share.
pub struct Hub {
    catalogue: RwLock<Catalogue>,
    bundle: ArcSwapOption<Resource>,
    /// Whether the world was told whole once.
    whole: watch::Sender<bool>,
    /// Tells that the world is another one.
    changed: watch::Sender<()>,
    /// Tells that a proxy acknowledged or refused something, came or went.
    progressed: watch::Sender<()>,
    streams: Mutex<Streams>,
    next: AtomicU32,
    limits: Limits,
    clock: Clock,
    metrics: Metrics,
    stop: CancellationToken,
}

/// Who is connected, and who asked for what.
///
/// A number takes 4 bytes where a pointer would take 8: with 20,000 proxies that ask for 1000 names each it is this
/// index that decides how much memory is needed.
#[derive(Debug, Default)]
struct Streams {
    seats: HashMap<u32, Arc<Seat>>,
    by_proxy: HashMap<ObjectName, BTreeSet<u32>>,
    by_name: HashMap<(Kind, Arc<str>), BTreeSet<u32>>,
}

/// One stream.
#[derive(Debug)]
struct Seat {
    number: u32,
    proxy: ObjectName,
    identity: SpiffeId,
    certificate_ends: Timestamp,
    since: Timestamp,
    program: Program,
    wake: Notify,
    book: Mutex<Book>,
}

/// What a stream holds, and when that was.
#[derive(Debug, Default)]
struct Book {
    session: Session,
    /// The first change of each kind that is not sent yet.
    touched: BTreeMap<Kind, Instant>,
    /// Responses without an answer.
    flights: BTreeMap<u64, Flight>,
    acked: BTreeMap<Kind, Timestamp>,
}

#[derive(Debug)]
struct Flight {
    kind: Kind,
    sent: Instant,
    /// The change that it tells of; none for what a client asked for.
    touched: Option<Instant>,
}

impl Hub {
    /// Nobody is connected and nothing is known yet.
    pub fn new(
        catalogue: Catalogue,
        limits: Limits,
        clock: Clock,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            catalogue: RwLock::new(catalogue),
            bundle: ArcSwapOption::empty(),
            whole: watch::Sender::new(false),
            changed: watch::Sender::new(()),
            progressed: watch::Sender::new(()),
            streams: Mutex::default(),
            next: AtomicU32::new(0),
            limits,
            clock,
            metrics,
            stop,
        })
    }

    /// Takes over what the feed tells and each new trust bundle, until the stop. What comes while one change is taken
    /// over goes in with the next: under load many changes cost one look.
    pub async fn keep(
        self: Arc<Self>,
        mut feed: mpsc::Receiver<Batch>,
        mut authorities: watch::Receiver<Arc<Authority>>,
    ) {
        self.publish(authorities.borrow_and_update().bundle());
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                Some(batch) = feed.recv() => {
                    let mut batches = vec![batch];
                    while batches.len() < 64
                        && let Ok(batch) = feed.try_recv()
                    {
                        batches.push(batch);
                    }
                    self.apply(batches);
                }
                Ok(()) = authorities.changed() => {
                    let bundle = authorities.borrow_and_update().bundle().clone();
                    self.publish(&bundle);
                }
                else => return self.stop.cancelled().await,
            }
        }
    }

    /// Told once every proxy can be answered.
    pub fn whole(&self) -> watch::Receiver<bool> {
        self.whole.subscribe()
    }

    /// Tells that [`Hub::outcomes`] may differ from the last look.
    pub fn progress(&self) -> watch::Receiver<()> {
        self.progressed.subscribe()
    }

    /// What became of the users' objects, as far as this replica's proxies know.
    pub fn outcomes(&self) -> BTreeMap<ObjectRef, Outcome> {
        let mut outcomes: BTreeMap<ObjectRef, Outcome> = BTreeMap::new();
        for seat in self.seats() {
            let book = lock(&seat.book);
            let mut worst: BTreeMap<&ObjectRef, (State, Option<&Arc<str>>)> = BTreeMap::new();
            for (source, state, text) in book.session.sources() {
                let so_far = worst.entry(source).or_insert((State::Synced, None));
                if text.is_some() || (so_far.1.is_none() && state == State::Pending) {
                    *so_far = (state, text);
                }
            }
            for (source, (state, text)) in worst {
                let outcome = outcomes.entry(source.clone()).or_default();
                match (state, text) {
                    (_, Some(text)) => {
                        outcome.refused.insert(seat.proxy.clone(), text.clone());
                    }
                    (State::Synced, None) => outcome.acked += 1,
                    (State::Pending | State::Rejected, None) => outcome.pending += 1,
                }
            }
        }
        outcomes
    }

    fn apply(&self, batches: Vec<Batch>) {
        let whole = batches.iter().any(|batch| batch.whole);
        let events = batches.into_iter().flat_map(|batch| batch.events);
        let touched = {
            let mut catalogue = self
                .catalogue
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            catalogue.apply(events)
        };
        self.touch(&touched);
        if whole && !self.whole.send_replace(true) {
            tracing::info!("the mesh is known; proxies are answered");
        }
        self.changed.send_replace(());
    }

    fn touch(&self, touched: &Touched) {
        let now = Instant::now();
        let streams = lock(&self.streams);
        for (kind, name) in &touched.shared {
            let everyone = matches!(kind, Kind::Cluster | Kind::Listener);
            let asked = streams.by_name.get(&(*kind, name.clone()));
            let named = asked.into_iter().flatten();
            let named = named.filter_map(|number| streams.seats.get(number));
            let all = everyone.then(|| streams.seats.values());
            for seat in named.chain(all.into_iter().flatten()) {
                seat.touch(now, |session| session.touch(*kind, name).then_some(*kind));
            }
        }
        for proxy in &touched.proxies {
            let numbers = streams.by_proxy.get(proxy).into_iter().flatten();
            for seat in numbers.filter_map(|number| streams.seats.get(number)) {
                seat.touch(now, |session| session.touch_all().then_some(Kind::Listener));
            }
        }
    }

    fn publish(&self, bundle: &Bundle) {
        self.bundle.store(Some(Arc::new(secret(bundle))));
        let name: Arc<str> = BUNDLE.into();
        let shared = BTreeSet::from([(Kind::Secret, name)]);
        self.touch(&Touched {
            shared,
            ..Touched::default()
        });
    }

    fn seats(&self) -> Vec<Arc<Seat>> {
        lock(&self.streams).seats.values().cloned().collect()
    }

    fn catalogue(&self) -> RwLockReadGuard<'_, Catalogue> {
        self.catalogue
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is for a proxy, while the answer is held.
    fn own<'a>(&'a self, proxy: &'a ObjectName) -> Own<'a> {
        Own {
            catalogue: self.catalogue(),
            bundle: self.bundle.load_full(),
            proxy,
        }
    }
}

impl Streams {
    fn enter(&mut self, seat: Arc<Seat>) {
        let of_proxy = self.by_proxy.entry(seat.proxy.clone()).or_default();
        of_proxy.insert(seat.number);
        self.seats.insert(seat.number, seat);
    }

    fn leave(&mut self, seat: &Seat) {
        self.seats.remove(&seat.number);
        if let Some(of_proxy) = self.by_proxy.get_mut(&seat.proxy) {
            of_proxy.remove(&seat.number);
            if of_proxy.is_empty() {
                self.by_proxy.remove(&seat.proxy);
            }
        }
        let book = lock(&seat.book);
        for kind in Kind::ALL {
            for name in book.session.subscribed(kind) {
                self.unsubscribe(kind, name, seat.number);
            }
        }
    }

    fn subscribe(&mut self, kind: Kind, name: &Arc<str>, number: u32) {
        let asked = self.by_name.entry((kind, name.clone())).or_default();
        asked.insert(number);
    }

    fn unsubscribe(&mut self, kind: Kind, name: &Arc<str>, number: u32) {
        let key = (kind, name.clone());
        if let Some(asked) = self.by_name.get_mut(&key) {
            asked.remove(&number);
            if asked.is_empty() {
                self.by_name.remove(&key);
            }
        }
    }
}

impl Seat {
    fn touch(&self, now: Instant, touch: impl FnOnce(&mut Session) -> Option<Kind>) {
        let mut book = lock(&self.book);
        if let Some(kind) = touch(&mut book.session) {
            book.touched.entry(kind).or_insert(now);
            self.wake.notify_one();
        }
    }
}

/// What there is for one proxy.
struct Own<'a> {
    catalogue: RwLockReadGuard<'a, Catalogue>,
    bundle: Option<Arc<Resource>>,
    proxy: &'a ObjectName,
}

impl View for Own<'_> {
    fn find(&self, kind: Kind, name: &str) -> Option<Arc<Resource>> {
        match kind {
            Kind::Secret => self.bundle.clone().filter(|it| &*it.name == name),
            _ => self.catalogue.find(self.proxy, kind, name),
        }
    }

    fn all(&self, kind: Kind) -> Vec<Arc<Resource>> {
        match kind {
            Kind::Secret => Vec::new(),
            _ => self.catalogue.all(self.proxy, kind),
        }
    }
}

/// The bundle as Envoy's secret, PEM.
fn secret(bundle: &Bundle) -> Resource {
    let trusted_ca = DataSource {
        specifier: Some(Specifier::InlineBytes(bundle.to_pem().into_bytes())),
        ..DataSource::default()
    };
    let context = CertificateValidationContext {
        trusted_ca: Some(trusted_ca),
        ..CertificateValidationContext::default()
    };
    let secret = Secret {
        name: BUNDLE.to_owned(),
        r#type: Some(Type::ValidationContext(context)),
    };
    let body = secret.encode_to_vec();
    Resource {
        name: BUNDLE.into(),
        version: content_hash(&body),
        body: body.into(),
        source: None,
    }
}

/// The service, on the paths of gRPC.
pub fn router(hub: Arc<Hub>) -> Router {
    const SERVICE: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService";
    Router::new()
        .route(
            &format!("{SERVICE}/DeltaAggregatedResources"),
            post(stream::serve),
        )
        .route(
            &format!("{SERVICE}/StreamAggregatedResources"),
            post(stream::not_served),
        )
        .with_state(hub)
}

/// Nothing in here panics halfway through a change, so what a poisoned lock guards is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn number(next: &AtomicU32) -> u32 {
    next.fetch_add(1, Ordering::Relaxed)
}
