//! The pod's identity: got, renewed, and handed to whoever in the pod may have it.
//!
//! ```text
//! token, new key -> request -> control plane -> answer, checked as a peer would ─┐
//!        mounted file, that answer, the control plane's push -> trust ───────────┴-> Identity
//! Identity -> sds -> Envoy          Identity -> workload_api -> every SPIFFE program of the pod
//! ```
//!
//! [`Keeper`] owns all of it; the program that has one binds the two sockets, and runs what each of them returns.

mod answer;
mod dial;
mod dice;
mod metrics;
mod push;
pub mod renewal;
mod request;
mod sds;
mod socket;
mod trust;
mod workload_api;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aws_lc_rs::digest::{Context, SHA256};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use self::{
    answer::Accepted,
    renewal::{Moment, Plan, Step, step},
    trust::{Trust, Voice, read_roots},
};
pub use self::{
    answer::AnswerError,
    dial::{ControlPlane, DialError},
    metrics::Metrics,
    request::RequestError,
    sds::{Board, Holding, Sds, SecretName, Version},
    socket::SocketError,
    trust::RootsError,
    workload_api::WorkloadApi,
};
use crate::{
    ca::{
        KeyedChain,
        bundle::Bundle,
        peer::{self, Side},
    },
    clock::Clock,
    identity::SpiffeId,
};

/// What the pod is, and whom it trusts, at one moment: a chain that is acceptable under the bundle beside it.
pub struct Identity {
    /// Who the pod is.
    pub id: SpiffeId,
    /// Leaf first, never a root; and its key.
    pub keyed: Arc<KeyedChain>,
    /// The roots.
    pub bundle: Bundle,
    versions: [(SecretName, Version); 2],
}

impl Identity {
    /// Of these parts, which nobody checks here.
    pub fn new(id: SpiffeId, keyed: Arc<KeyedChain>, bundle: Bundle) -> Self {
        let versions = [
            (
                SecretName::Default,
                version(keyed.chain.iter().map(Vec::as_slice)),
            ),
            (SecretName::RootCa, bundle_version(&bundle)),
        ];
        Self {
            id,
            keyed,
            bundle,
            versions,
        }
    }

    /// Of the chain and of the bundle: hashes of their content.
    pub fn versions(&self) -> [(SecretName, Version); 2] {
        self.versions
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("id", &self.id)
            .field("validity", &self.keyed.validity)
            .field("versions", &self.versions)
            .finish_non_exhaustive()
    }
}

fn bundle_version(bundle: &Bundle) -> Version {
    version(bundle.certificates())
}

/// 64 bits of a hash over certificates. Nothing secret goes in: versions stand in Envoy's configuration dump.
fn version<'a>(certificates: impl Iterator<Item = &'a [u8]>) -> Version {
    let mut context = Context::new(&SHA256);
    certificates.for_each(|der| context.update(der));
    let digest = context.finish();
    let bytes = digest.as_ref().iter().take(8);
    Version(bytes.fold(0, |hash, byte| (hash << 8) | u64::from(*byte)))
}

/// Where a pod gets its identity from.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who the pod must be told it is.
    pub id: SpiffeId,
    /// `MALHA_CONTROL_PLANE`.
    pub control_plane: ControlPlane,
    /// `MALHA_CLUSTER`; empty for the control plane's own.
    pub cluster: String,
    /// How Envoy and this program call themselves in xDS: `<pod>.<namespace>`.
    pub pod: String,
    /// The projected token.
    pub token: PathBuf,
    /// The mounted trust bundle.
    pub roots: PathBuf,
    /// The life to ask for; none: what the control plane likes.
    pub life: Option<Duration>,
    /// The longest time between two certificates; none: half of a life, give or take.
    pub renew_every: Option<Duration>,
}

/// Keeps the pod's identity fresh.
pub struct Keeper {
    settings: Settings,
    clock: Clock,
    store: Store,
    board: Board,
    metrics: Metrics,
}

impl Keeper {
    /// Nothing is asked and nothing is served yet.
    pub fn new(settings: Settings, clock: Clock, metrics: Metrics) -> Self {
        Self {
            store: Store {
                id: settings.id.clone(),
                state: Mutex::default(),
                tell: watch::channel(None).0,
                metrics: metrics.clone(),
            },
            settings,
            clock,
            board: Board::default(),
            metrics,
        }
    }

    /// The identity, now and from now on. It stays when it ends: whoever shows it to others looks at its validity.
    pub fn identities(&self) -> watch::Receiver<Option<Arc<Identity>>> {
        self.store.watch()
    }

    /// What Envoy has acknowledged of it.
    pub fn holding(&self) -> watch::Receiver<Holding> {
        self.board.watch()
    }

    /// Takes the socket where Envoy gets its secrets.
    ///
    /// # Errors
    /// The path that cannot be taken.
    pub fn sds(&self, path: &Path) -> Result<Sds, SocketError> {
        Sds::bind(
            path,
            self.store.watch(),
            self.board.clone(),
            self.metrics.clone(),
        )
    }

    /// Takes the socket of the SPIFFE Workload API.
    ///
    /// # Errors
    /// The path that cannot be taken.
    pub fn workload_api(&self, path: &Path) -> Result<WorkloadApi, SocketError> {
        WorkloadApi::bind(path, self.store.watch(), self.clock.clone())
    }

    /// Gets the identity, renews it, and follows the roots, until `stop`.
    pub async fn keep(self, stop: CancellationToken) {
        tokio::join!(
            self.renew(&stop),
            self.read(&stop),
            push::subscribe(&self.settings, &self.store, self.board.watch(), &stop),
        );
    }

    async fn renew(&self, stop: &CancellationToken) {
        let start = Instant::now();
        let moment = || Moment {
            wall: self.clock.now(),
            steady: start.elapsed(),
        };
        let mut plan = Plan::begin();
        let mut changes = self.store.watch();
        loop {
            match step(&plan, moment()) {
                Step::Renew => {
                    let asked = tokio::select! {
                        () = stop.cancelled() => return,
                        asked = self.ask() => asked,
                    };
                    plan = self.note(plan, asked, moment());
                }
                Step::Wait(wait) => tokio::select! {
                    () = stop.cancelled() => return,
                    () = sleep(wait.min(GLANCE)) => {}
                    Ok(()) = changes.changed() => {
                        if !self.is_vouched_for() {
                            tracing::warn!("the roots that this pod trusts now do not lead to its own certificate; a new one is asked for");
                            plan = plan.overtaken();
                        }
                    }
                },
            }
        }
    }

    async fn ask(&self) -> Result<Accepted, RequestError> {
        let file = self.read_roots();
        let trust = self.store.lock().trust.clone();
        match file {
            // With roots from elsewhere a broken file is somebody else's trouble.
            Err(error) if trust.bundle().is_empty() => Err(error),
            _ => {
                let held = self.store.identity();
                let held = held.as_deref().map(|identity| &*identity.keyed);
                request::certificate(&self.settings, &trust, held, &self.clock).await
            }
        }
    }

    fn note(&self, plan: Plan, asked: Result<Accepted, RequestError>, now: Moment) -> Plan {
        match asked {
            Ok(accepted) => {
                let validity = accepted.keyed.validity;
                let plan = Plan::renewed(validity, self.settings.renew_every, now, dice::roll());
                self.metrics.received(validity, plan.due());
                self.store.certify(accepted);
                tracing::info!(
                    id = %self.settings.id,
                    not_after = %validity.not_after,
                    next = plan.due().map(tracing::field::display),
                    "the pod has a new certificate"
                );
                plan
            }
            Err(error) => {
                self.metrics.requested(error.label());
                let plan = plan.failed(now, error.push_back(), dice::roll());
                self.complain(&error, plan.rest(now));
                plan
            }
        }
    }

    /// What is at fault, what it means for the pod, and when it is tried again.
    fn complain(&self, error: &RequestError, pause: Duration) {
        let now = self.clock.now();
        let held = self.store.identity().map(|i| i.keyed.validity.not_after);
        let effect = match held {
            None => "the pod has no certificate yet, and Envoy waits for it".to_owned(),
            Some(end) if end <= now => format!("the pod's certificate ended at {end}"),
            Some(end) => format!("the pod's certificate stays in use, until {end} at the latest"),
        };
        let again = pause.as_secs_f32();
        let fault = error as &dyn std::error::Error;
        match error.is_passing() && held.is_some_and(|end| end > now) {
            true => tracing::warn!(
                error = fault,
                effect,
                again_in_seconds = again,
                "no new certificate"
            ),
            false => tracing::error!(
                error = fault,
                effect,
                again_in_seconds = again,
                "no new certificate"
            ),
        }
    }

    /// Whether peers that trust what this pod trusts accept its certificate. That it has ended is no matter here.
    fn is_vouched_for(&self) -> bool {
        let Some(identity) = self.store.identity() else {
            return true;
        };
        let within = identity.keyed.validity.not_after.min(self.clock.now());
        peer::verify(
            &identity.keyed.chain,
            &identity.bundle,
            Side::Client,
            within,
        )
        .is_ok()
    }

    /// Follows the mounted file. The kubelet swaps a symlink above it, which no watch on the file itself sees.
    async fn read(&self, stop: &CancellationToken) {
        let mut complained = String::new();
        loop {
            match self.read_roots() {
                Ok(()) => complained.clear(),
                Err(error) => {
                    let text = format!("{error}: {:?}", std::error::Error::source(&error));
                    if text != complained {
                        self.store.refuse(Voice::File);
                        tracing::error!(
                            error = &error as &dyn std::error::Error,
                            "the roots in use stay"
                        );
                        complained = text;
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(GLANCE) => {}
            }
        }
    }

    fn read_roots(&self) -> Result<(), RequestError> {
        let path = &self.settings.roots;
        // A file in memory of a few kilobytes: a thread to read it on would cost more.
        let text = fs::read(path).map_err(|source| RequestError::Roots {
            path: path.clone(),
            source,
        })?;
        let bundle = read_roots(&text).map_err(|source| RequestError::BadRoots {
            path: path.clone(),
            source,
        })?;
        self.store.hear(Voice::File, bundle);
        Ok(())
    }
}

/// How long a change that nobody announces may go unseen: of the wall clock, of a file.
const GLANCE: Duration = Duration::from_secs(5);

/// What all parts share; every change of it is told at once, as a whole.
struct Store {
    id: SpiffeId,
    state: Mutex<State>,
    tell: watch::Sender<Option<Arc<Identity>>>,
    metrics: Metrics,
}

#[derive(Default)]
struct State {
    trust: Trust,
    keyed: Option<Arc<KeyedChain>>,
}

impl Store {
    fn watch(&self) -> watch::Receiver<Option<Arc<Identity>>> {
        self.tell.subscribe()
    }

    fn identity(&self) -> Option<Arc<Identity>> {
        self.tell.borrow().clone()
    }

    fn bundle(&self) -> Bundle {
        self.lock().trust.bundle().clone()
    }

    /// Takes a bundle in; the version that Envoy will be told, where there is an identity to tell it with.
    fn hear(&self, voice: Voice, bundle: Bundle) -> Option<Version> {
        let mut state = self.lock();
        if state.trust.hear(voice, bundle) {
            let roots = state.trust.bundle().len();
            tracing::info!(source = %voice, roots, "the pod trusts another set of roots");
            self.metrics.bundle(voice, "taken");
            self.publish(&state);
        }
        state
            .keyed
            .is_some()
            .then(|| bundle_version(state.trust.bundle()))
    }

    fn refuse(&self, voice: Voice) {
        self.metrics.bundle(voice, "refused");
    }

    fn attend(&self, attended: bool) {
        self.lock().trust.attend(attended);
        self.metrics.connected(attended);
    }

    /// Certificate and roots in one step, so that nobody is told one without the other.
    fn certify(&self, accepted: Accepted) {
        let mut state = self.lock();
        if state.trust.hear(Voice::Answer, accepted.roots) {
            self.metrics.bundle(Voice::Answer, "taken");
        }
        state.keyed = Some(accepted.keyed);
        self.publish(&state);
    }

    fn publish(&self, state: &State) {
        if let Some(keyed) = state.keyed.clone() {
            let bundle = state.trust.bundle().clone();
            let identity = Identity::new(self.id.clone(), keyed, bundle);
            self.tell.send_replace(Some(Arc::new(identity)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is under it is whole after every line.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
