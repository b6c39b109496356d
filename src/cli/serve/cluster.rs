//! A control plane whose state lives in the cluster: one of several replicas.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use prometheus_client::registry::Registry;
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    plane::{Home, Plane},
    sanity, whole,
};
use crate::{
    ca::{Authority, KeyedChain, journal::JournalHome},
    cli::{Exit, Failure, ca, exit::OrExit as _},
    clock::Clock,
    config::{self, Settings},
    custody::{Custody, CustodyError},
    inject::Injector,
    k8s::{
        self, Access,
        ca_bundle::{self, Keeper, Live, Targets},
        conditions,
        events::{self, Note, Notes},
        journal::{PLUGGED, SecretHome},
        lease::{self, Candidate, Claim},
        mesh, pods,
        tokens::{ClusterTokens, Options, Validation},
        trust_bundle,
        world::{self, World},
    },
    runtime::readiness::Gate,
};

/// What the cluster's rooms count.
#[derive(Default)]
struct Metrics {
    world: world::Metrics,
    lease: lease::Metrics,
    ca_bundle: ca_bundle::Metrics,
    trust_bundle: trust_bundle::Metrics,
    pods: pods::Metrics,
}

/// How often it is asked again whether the API server trusts the webhook, should no change be heard of.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How long an API server that answers may keep its clock to itself.
const DATELESS: Duration = Duration::from_secs(15);

pub(super) async fn serve(
    access: &Access,
    settings: Settings,
    stop: CancellationToken,
) -> Result<(), Failure> {
    let client = k8s::connect(access)
        .await
        .context("no cluster to serve; without one, serve with --standalone DIR")
        .or_exit(Exit::BadInput)?;
    let metrics = Metrics::default();
    let mut plane = Plane::begin(settings, stop, |registry| metrics.register(registry)).await?;
    let replica = Replica::join(client, &mut plane, &metrics);
    let trusted = plane
        .readiness
        .gate("caBundle that the API server trusts us by");
    replica.tell_proxies_and_users(&mut plane);

    let home = ca::secret_home(replica.client.clone(), &replica.namespace);
    if !until_clock_is_sane(&replica.world, &replica.stop).await {
        return Ok(());
    }
    let plug = Plug::new(&replica.namespace, replica.notes.clone());
    let Some(custody) = plane.open(&home, |error| plug.refused(error)).await? else {
        return Ok(());
    };
    replica.follow_journal(&mut plane, &home, plug, &custody);
    replica.publish_webhook_trust(&mut plane, &custody, &metrics, trusted);
    replica.publish_workload_trust(&mut plane, &custody, &metrics);
    replica.survey_pods(&mut plane, &metrics);
    let authenticate = replica.authenticate(&mut plane);
    let world = replica.world.clone();
    plane
        .run(Home {
            custody,
            authenticate,
            cluster: replica.world.clone(),
            leads: replica.claim.watch(),
            skew: Box::new(move || world.clock_skew()),
            webhook_names: vec![replica.webhook_name()],
            ca_names: vec![
                replica.webhook_name(),
                format!("malha.{}", replica.namespace),
            ],
            replica: replica.name,
        })
        .await
}

/// One of several, and what each of its parts needs of the cluster.
struct Replica {
    client: Client,
    namespace: String,
    name: String,
    clock: Clock,
    stop: CancellationToken,
    world: Arc<World>,
    /// Whether it leads.
    claim: Claim,
    /// Where Events go.
    notes: Notes,
}

impl Replica {
    /// Follows the cluster, and asks to lead.
    fn join(client: Client, plane: &mut Plane, metrics: &Metrics) -> Self {
        let (clock, stop) = (plane.clock.clone(), plane.stop.clone());
        let namespace = plane.settings.namespace.clone();
        let name = replica_name();
        let world = World::new();
        let following = world.clone().follow(
            client.clone(),
            clock.clone(),
            metrics.world.clone(),
            stop.clone(),
        );
        plane.tasks.own("watches", following);
        let gate = plane.readiness.gate("first lists of the cluster");
        let synced = until_synced(world.clone(), gate, stop.clone());
        plane.tasks.own("first lists", synced);
        let (notes, writing) =
            events::write(client.clone(), clock.clone(), name.clone(), stop.clone());
        plane.tasks.own("events", writing);
        let candidate = Candidate {
            namespace: namespace.clone(),
            name: "malha-leader".to_owned(),
            identity: name.clone(),
        };
        let (claim, holding) = lease::hold(
            client.clone(),
            candidate,
            clock.clone(),
            metrics.lease.clone(),
            stop.clone(),
        );
        plane.tasks.own("lease", holding);
        Self {
            client,
            namespace,
            name,
            clock,
            stop,
            world,
            claim,
            notes,
        }
    }

    /// The mesh to proxies, and what they made of it to the objects it came from.
    fn tell_proxies_and_users(&self, plane: &mut Plane) {
        let policies = mesh::Policies::new();
        let telling = mesh::follow(
            self.client.clone(),
            plane.feed.clone(),
            policies.clone(),
            self.stop.clone(),
        );
        plane.tasks.own("mesh watches", telling);
        let hub = plane.hub.clone();
        let judging = conditions::keep(conditions::Watch {
            client: self.client.clone(),
            policies,
            progress: hub.progress(),
            outcomes: move || hub.outcomes(),
            claim: self.claim.clone(),
            notes: self.notes.clone(),
            replica: self.name.clone(),
            clock: self.clock.clone(),
            stop: self.stop.clone(),
        });
        plane.tasks.own("conditions", judging);
    }

    /// What other replicas and operators write is taken over.
    fn follow_journal(
        &self,
        plane: &mut Plane,
        home: &SecretHome,
        plug: Plug,
        custody: &Arc<Custody<SecretHome>>,
    ) {
        let (changes, listening) = home.changes(self.stop.clone());
        plane.tasks.own("journal watch", listening);
        let refreshing = refresh_on_change(custody.clone(), changes, self.stop.clone());
        plane.tasks.own("journal refresh", refreshing);
        let (changes, listening) = home.plugged_changes(self.stop.clone());
        plane.tasks.own("plugged-in issuer watch", listening);
        let plugging = plug.keep(custody.clone(), changes, self.stop.clone());
        plane.tasks.own("plugged-in issuer", plugging);
    }

    /// What API servers trust the webhooks by; the gate opens when it fits what they are served.
    fn publish_webhook_trust(
        &self,
        plane: &mut Plane,
        custody: &Arc<Custody<SecretHome>>,
        metrics: &Metrics,
        gate: Gate,
    ) {
        let (live, publishing) = ca_bundle::keep(Keeper {
            client: self.client.clone(),
            targets: Targets {
                injector: "malha-injector".to_owned(),
                advice: "malha-advice".to_owned(),
            },
            wanted: custody.watch(),
            bundle_of: |authority: &Arc<Authority>| authority.bundle().clone(),
            claim: self.claim.clone(),
            notes: self.notes.clone(),
            metrics: metrics.ca_bundle.clone(),
            stop: self.stop.clone(),
        });
        plane.tasks.own("caBundle", publishing);
        let trusted = Trusted {
            live,
            chain: plane.webhook_chain(),
            dns_name: self.webhook_name(),
            clock: self.clock.clone(),
        };
        let proving = trusted.prove(gate, self.stop.clone());
        plane.tasks.own("caBundle check", proving);
    }

    /// What pods trust the control plane and each other by.
    fn publish_workload_trust(
        &self,
        plane: &mut Plane,
        custody: &Arc<Custody<SecretHome>>,
        metrics: &Metrics,
    ) {
        let bundling = trust_bundle::keep(trust_bundle::Keeper {
            client: self.client.clone(),
            world: self.world.clone(),
            home: self.namespace.clone(),
            name: config_map_of(plane.injector.clone()),
            wanted: custody.watch(),
            bundle_of: |authority: &Arc<Authority>| authority.bundle().clone(),
            claim: self.claim.clone(),
            notes: self.notes.clone(),
            metrics: metrics.trust_bundle.clone(),
            stop: self.stop.clone(),
        });
        plane.tasks.own("trust bundles", bundling);
    }

    /// Which pods should have a sidecar and have none.
    fn survey_pods(&self, plane: &mut Plane, metrics: &Metrics) {
        let surveying = pods::keep(pods::Watch {
            client: self.client.clone(),
            world: self.world.clone(),
            injector: plane.injector.clone(),
            claim: self.claim.clone(),
            notes: self.notes.clone(),
            metrics: metrics.pods.clone(),
            clock: self.clock.clone(),
            stop: self.stop.clone(),
        });
        plane.tasks.own("pods", surveying);
    }

    /// Who is calling, by the API server's keys.
    fn authenticate(&self, plane: &mut Plane) -> ClusterTokens {
        let options = options(&plane.settings);
        let tokens = ClusterTokens::new(self.client.clone(), self.world.clone(), options);
        let keys = tokens.follow(self.clock.clone(), self.stop.clone());
        plane.tasks.own("token keys", keys);
        tokens
    }

    /// By which API servers dial it.
    fn webhook_name(&self) -> String {
        format!("malha.{}.svc", self.namespace)
    }
}

/// What the pods that are injected now will mount.
fn config_map_of(injector: Arc<ArcSwap<Injector>>) -> Box<dyn Fn() -> String + Send + Sync> {
    Box::new(move || {
        let injector = injector.load();
        let trust = &injector.settings().trust_bundle;
        match trust.cluster_trust_bundle.is_empty() {
            true => trust.config_map.clone(),
            false => String::new(),
        }
    })
}

/// Whether it may be put right while we wait: a Secret that is restored, an API server that comes back. A replica that
/// ended instead would be restarted with growing pauses and take the admissions of its node pool down with it.
fn mends(error: &CustodyError) -> bool {
    !matches!(
        error,
        CustodyError::Policy(_) | CustodyError::OtherTrustDomain { .. }
    )
}

/// The pod's name, which the kubelet makes the host's; unique among replicas that run elsewhere, too.
fn replica_name() -> String {
    let host = nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok());
    match (std::env::var("POD_NAME"), host) {
        (Ok(pod), _) if !pod.is_empty() => pod,
        (_, host) => format!(
            "{}-{}",
            host.as_deref().unwrap_or("malha"),
            std::process::id()
        ),
    }
}

fn options(settings: &Settings) -> Options {
    Options {
        trust_domain: settings.trust_domain.clone(),
        audiences: settings.audiences.clone(),
        require_bound_pod: settings.require_bound_pod,
        validation: match settings.validation {
            config::Validation::Auto => Validation::Auto,
            config::Validation::Jwks => Validation::Jwks,
            config::Validation::TokenReview => Validation::TokenReview,
        },
        node_proxies: settings.node_proxies.clone(),
        own_namespace: settings.namespace.clone(),
    }
}

impl Metrics {
    fn register(&self, registry: &mut Registry) {
        self.world.register(registry);
        self.lease.register(registry);
        self.ca_bundle.register(registry);
        self.trust_bundle.register(registry);
        self.pods.register(registry);
    }
}

async fn until_synced(world: Arc<World>, gate: Gate, stop: CancellationToken) {
    let mut changes = world.changes();
    while !world.synced() {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = timeout(LOOK_AGAIN, changes.changed()) => {}
        }
    }
    gate.open();
    stop.cancelled().await;
}

/// Waits for an API server that agrees about the time: opening the journal may write to it, and a future instant in it
/// would stop every other replica. One that tells no date after [`DATELESS`] is taken at its word. Whether it came so far
/// before the stop.
async fn until_clock_is_sane(world: &World, stop: &CancellationToken) -> bool {
    let mut heard = None;
    loop {
        let pause = match world.clock_skew() {
            Some(skew) if sanity::is_sane(skew.ahead) => return true,
            Some(skew) => {
                tracing::error!(
                    seconds_ahead = skew.ahead.as_secs(),
                    "the clock is too far from the API server's; nothing is done until one of them is right"
                );
                LOOK_AGAIN * 10
            }
            None => LOOK_AGAIN / 20,
        };
        if world.silence().is_some() {
            heard.get_or_insert_with(Instant::now);
        }
        let dateless = world.clock_skew().is_none();
        if dateless && heard.is_some_and(|heard: Instant| heard.elapsed() > DATELESS) {
            return true;
        }
        if timeout(pause, stop.cancelled()).await.is_ok() {
            return false;
        }
    }
}

/// Reads the journal again whenever its Secret changed. What cannot be read stays as it was: custody tells so itself.
async fn refresh_on_change<H: JournalHome>(
    custody: Arc<Custody<H>>,
    mut changes: watch::Receiver<Option<String>>,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changes.changed() => if changed.is_err() {
                return stop.cancelled().await;
            },
        }
        if let Err(error) = custody.refresh().await {
            tracing::warn!(
                error = whole(error),
                "the changed CA journal was not taken over"
            );
        }
    }
}

/// Sees to the operator's issuer: whoever leads looks at once when its Secret changed, and people are told what came of it.
struct Plug {
    secret: ObjectReference,
    notes: Notes,
}

impl Plug {
    fn new(namespace: &str, notes: Notes) -> Self {
        let secret = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Secret".to_owned()),
            namespace: Some(namespace.to_owned()),
            name: Some(PLUGGED.to_owned()),
            ..ObjectReference::default()
        };
        Self { secret, notes }
    }

    /// Tells of an issuer that keeps the authority from its first start; whether the error [`mends`].
    fn refused(&self, error: &CustodyError) -> bool {
        if let CustodyError::Plugged(_) = error {
            self.tell(
                events::Kind::Warning,
                "PluggedIssuerRefused",
                error.to_string(),
            );
        }
        mends(error)
    }

    async fn keep<H: JournalHome>(
        self,
        custody: Arc<Custody<H>>,
        mut changes: watch::Receiver<Option<String>>,
        stop: CancellationToken,
    ) {
        let mut news = custody.plugging();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = changes.changed() => match changed {
                    Ok(()) => custody.nudge(),
                    Err(_) => return stop.cancelled().await,
                },
                told = news.changed() => if told.is_ok() {
                    let news = news.borrow_and_update().clone();
                    if let Some(words) = news.words() {
                        let (kind, reason) = match news.is_warning() {
                            true => (events::Kind::Warning, "PluggedIssuerRefused"),
                            false => (events::Kind::Normal, "PluggedIssuerTaken"),
                        };
                        self.tell(kind, reason, words);
                    }
                },
            }
        }
    }

    fn tell(&self, kind: events::Kind, reason: &'static str, text: String) {
        self.notes.tell(Note {
            regarding: self.secret.clone(),
            kind,
            reason,
            action: "TakeOver",
            distinction: text.clone(),
            text,
        });
    }
}

/// Whether the API server, with the bundle that it holds, would trust what the webhook serves.
struct Trusted {
    live: Live,
    chain: watch::Receiver<Option<Arc<KeyedChain>>>,
    dns_name: String,
    clock: Clock,
}

impl Trusted {
    /// Opens the gate the first time it would. Later mismatches are repaired and counted, and do not make this replica
    /// unready: the signer beside the webhook must not go down with it.
    async fn prove(mut self, gate: Gate, stop: CancellationToken) {
        let mut changes = self.live.changes();
        while !self.holds() {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = timeout(LOOK_AGAIN, changes.changed()) => {}
                _ = self.chain.changed() => {}
            }
        }
        gate.open();
        stop.cancelled().await;
    }

    fn holds(&self) -> bool {
        let Some(keyed) = self.chain.borrow().clone() else {
            return false;
        };
        match self
            .live
            .verifies(&keyed.chain, &self.dns_name, self.clock.now())
        {
            Ok(()) => true,
            Err(mismatch) => {
                tracing::debug!(%mismatch, "the API server does not trust the webhook yet");
                false
            }
        }
    }
}
