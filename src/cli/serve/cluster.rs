//! A control plane whose state lives in the cluster: one of several replicas.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use k8s_openapi::api::core::v1::ObjectReference;
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
        journal::PLUGGED,
        lease::{self, Candidate},
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
    let client = k8s::connect(access).await.or_exit(Exit::BadInput)?;
    let metrics = Metrics::default();
    let mut plane = Plane::begin(settings, stop.clone(), |registry| {
        metrics.register(registry)
    })
    .await?;
    let namespace = plane.settings.namespace.clone();
    let clock = plane.clock.clone();
    let replica = replica_name();

    let world = World::new();
    let following =
        world
            .clone()
            .follow(client.clone(), clock.clone(), metrics.world, stop.clone());
    plane.tasks.own("watches", following);
    let synced = plane.readiness.gate("first lists of the cluster");
    plane.tasks.own(
        "first lists",
        until_synced(world.clone(), synced, stop.clone()),
    );
    let trust = plane
        .readiness
        .gate("caBundle that the API server trusts us by");
    let (notes, writing) =
        events::write(client.clone(), clock.clone(), replica.clone(), stop.clone());
    plane.tasks.own("events", writing);
    let policies = mesh::Policies::new();
    let telling = mesh::follow(
        client.clone(),
        plane.feed.clone(),
        policies.clone(),
        stop.clone(),
    );
    plane.tasks.own("mesh watches", telling);
    let candidate = Candidate {
        namespace: namespace.clone(),
        name: "malha-leader".to_owned(),
        identity: replica.clone(),
    };
    let (claim, holding) = lease::hold(
        client.clone(),
        candidate,
        clock.clone(),
        metrics.lease,
        stop.clone(),
    );
    plane.tasks.own("lease", holding);

    let hub = plane.hub.clone();
    let judging = conditions::keep(conditions::Watch {
        client: client.clone(),
        policies,
        progress: hub.progress(),
        outcomes: move || hub.outcomes(),
        claim: claim.clone(),
        notes: notes.clone(),
        replica: replica.clone(),
        clock: clock.clone(),
        stop: stop.clone(),
    });
    plane.tasks.own("conditions", judging);

    let home = ca::secret_home(client.clone(), &namespace);
    if !until_clock_is_sane(&world, &stop).await {
        return Ok(());
    }
    let plug = Plug::new(&namespace, notes.clone());
    let Some(custody) = plane.open(&home, |error| plug.refused(error)).await? else {
        return Ok(());
    };
    let (changes, listening) = home.changes(stop.clone());
    plane.tasks.own("journal watch", listening);
    plane.tasks.own(
        "journal refresh",
        refresh_on_change(custody.clone(), changes, stop.clone()),
    );
    let (changes, listening) = home.plugged_changes(stop.clone());
    plane.tasks.own("plugged-in issuer watch", listening);
    plane.tasks.own(
        "plugged-in issuer",
        plug.keep(custody.clone(), changes, stop.clone()),
    );

    let (live, publishing) = ca_bundle::keep(Keeper {
        client: client.clone(),
        targets: Targets {
            injector: "malha-injector".to_owned(),
            advice: "malha-advice".to_owned(),
        },
        wanted: custody.watch(),
        bundle_of: |authority: &Arc<Authority>| authority.bundle().clone(),
        claim: claim.clone(),
        notes: notes.clone(),
        metrics: metrics.ca_bundle,
        stop: stop.clone(),
    });
    plane.tasks.own("caBundle", publishing);
    let bundling = trust_bundle::keep(trust_bundle::Keeper {
        client: client.clone(),
        world: world.clone(),
        home: namespace.clone(),
        name: config_map_of(plane.injector.clone()),
        wanted: custody.watch(),
        bundle_of: |authority: &Arc<Authority>| authority.bundle().clone(),
        claim: claim.clone(),
        notes: notes.clone(),
        metrics: metrics.trust_bundle,
        stop: stop.clone(),
    });
    plane.tasks.own("trust bundles", bundling);
    let webhook_name = format!("malha.{namespace}.svc");
    let trusted = Trusted {
        live,
        chain: plane.webhook_chain(),
        dns_name: webhook_name.clone(),
        clock: clock.clone(),
    };
    plane
        .tasks
        .own("caBundle check", trusted.prove(trust, stop.clone()));
    let surveying = pods::keep(pods::Watch {
        client: client.clone(),
        world: world.clone(),
        injector: plane.injector.clone(),
        claim: claim.clone(),
        notes,
        metrics: metrics.pods,
        clock: clock.clone(),
        stop: stop.clone(),
    });
    plane.tasks.own("pods", surveying);
    let authenticate = ClusterTokens::new(client, world.clone(), options(&plane.settings));
    plane
        .tasks
        .own("token keys", authenticate.follow(clock, stop));
    let skew = {
        let world = world.clone();
        Box::new(move || world.clock_skew())
    };
    plane
        .run(Home {
            custody,
            authenticate,
            cluster: world,
            leads: claim.watch(),
            skew,
            webhook_names: vec![webhook_name.clone()],
            ca_names: vec![webhook_name, format!("malha.{namespace}")],
            replica,
        })
        .await
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
