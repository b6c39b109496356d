//! What every control plane has, wherever its state lives: three ports, two certificates, the webhook, the signer.
//!
//! [`Plane::begin`] takes the ports -> [`Plane::open`] waits for the journal -> [`Plane::run`] serves until the stop

use std::{net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use axum::Router;
use prometheus_client::registry::Registry;
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    overrides::Overrides,
    sanity::{Sanity, Skewed},
    whole,
};
use crate::{
    ads::{self, Hub},
    ca::{
        Authority, KeyedChain, journal::JournalHome, profile::Profile, rotation::CLOCK_TOLERANCE,
    },
    caller::Authenticate,
    cli::{Exit, Failure, exit::OrExit as _},
    clock::Clock,
    config::Settings,
    custody::{self, Custody, CustodyError},
    identity::SpiffeId,
    inject::{ClusterFacts, Injector},
    mesh::Batch,
    runtime::{
        self, admin,
        readiness::{Gate, Readiness},
        tasks::Tasks,
    },
    signing::{self, Audit, Signing},
    tls::{self, Alpn, Bound, ClientTrust, Limits, ServingCertificate},
    webhook::{self, Webhook},
    xds::{self, Catalogue},
};

/// A process that has its ports and answers on the admin port; its journal is not open yet.
pub(super) struct Plane {
    pub(super) settings: Settings,
    pub(super) clock: Clock,
    pub(super) stop: CancellationToken,
    pub(super) tasks: Tasks,
    pub(super) readiness: Readiness,
    signing_gate: signing::Gate,
    pub(super) injector: Arc<ArcSwap<Injector>>,
    /// Who tells proxies, and where the mesh is told to it.
    pub(super) hub: Arc<Hub>,
    pub(super) feed: mpsc::Sender<Batch>,
    fed: mpsc::Receiver<Batch>,
    gates: Gates,
    overrides: Overrides,
    webhook: Port,
    ca: Port,
    admin: SocketAddr,
    query: Bound,
    metrics: Metrics,
}

/// What must have happened before this is ready, beside its [ports](Port). All of them stand from the first moment on, so
/// that it is not ready in between.
struct Gates {
    journal: Gate,
    mesh: Gate,
}

/// A TLS listener that is taken but not served yet, and where its certificates come from.
struct Port {
    names: Names,
    /// Opens when it answers.
    gate: Gate,
    bound: Bound,
    certificate: Arc<ServingCertificate>,
    /// Who may show a client certificate; `None` where nobody is asked.
    clients: Option<Arc<ClientTrust>>,
    chains: watch::Sender<Option<Arc<KeyedChain>>>,
}

/// What the tasks of a port are called.
struct Names {
    /// The metrics call it that, too.
    port: &'static str,
    certificate: &'static str,
    /// And its gate.
    listener: &'static str,
}

const WEBHOOK: Names = Names {
    port: "webhook",
    certificate: "webhook certificate",
    listener: "webhook listener",
};

const CA: Names = Names {
    port: "ca",
    certificate: "CA certificate",
    listener: "CA listener",
};

/// What differs between a cluster and a directory.
pub(super) struct Home<H, A> {
    pub(super) custody: Arc<Custody<H>>,
    pub(super) authenticate: A,
    pub(super) cluster: Arc<dyn ClusterFacts>,
    /// Whether this process leads the replicas, now.
    pub(super) leads: watch::Receiver<bool>,
    /// How far the clock is off by what the cluster says.
    pub(super) skew: Skewed,
    /// DNS names by which the webhook is dialled; the first is the one it must prove.
    pub(super) webhook_names: Vec<String>,
    /// DNS names by which the signer is dialled; likewise.
    pub(super) ca_names: Vec<String>,
    /// Whose audit records these are.
    pub(super) replica: String,
}

/// Where the listeners answer.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(super) struct Addresses {
    pub(super) webhook: SocketAddr,
    pub(super) ca: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) query: SocketAddr,
}

/// What the rooms count, known to the scraper from the first moment on.
#[derive(Default)]
struct Metrics {
    listeners: tls::Metrics,
    webhook: webhook::Metrics,
    signing: signing::Metrics,
    custody: custody::Metrics,
    ads: ads::Metrics,
}

/// Two connections of each of 8,000 pods: its agent's and its proxy's.
const CA_CONNECTIONS: usize = 16_384;
/// Where memory is short, connections have half of it; each costs its buffers, in bytes. Whoever comes beyond them waits in
/// the kernel, or is turned away and tries again: a herd must not end the process, and begin anew with its next life.
const CONNECTION_MEMORY: u64 = 40 * 1024;

/// Long enough that an agent which tries again, with growing pauses, finds its connection open.
const CA_IDLE: Duration = Duration::from_secs(300);

/// The first and the longest pause between two tries to open the journal.
const OPEN_PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// The pause between two calls of a listener that does not answer yet.
const PROVE_PAUSE: Duration = Duration::from_millis(50);

/// What open requests and the lease may take beyond the drain. With the default drain of 10 s it stays within the 30 s
/// that a kubelet grants.
const FINISH: Duration = Duration::from_secs(10);

impl Plane {
    /// Takes the ports and answers on the admin port. `count` adds what else is counted.
    pub(super) async fn begin(
        settings: Settings,
        stop: CancellationToken,
        count: impl FnOnce(&mut Registry),
    ) -> Result<Self, Failure> {
        let clock = runtime::clock::system();
        let overrides = Overrides::of(&settings);
        let injector = overrides.load().or_exit(Exit::BadInput)?;
        let limits = Limits {
            drain: settings.drain,
            ..Limits::default()
        };
        let metrics = Metrics::default();
        let readiness = Readiness::new(stop.clone());
        let gates = Gates {
            journal: readiness.gate("CA journal"),
            mesh: readiness.gate("first lists of the mesh"),
        };
        let gate = readiness.gate(WEBHOOK.listener);
        let webhook = Port::webhook(settings.webhook_addr, limits.clone(), gate, &metrics).await?;
        let gate = readiness.gate(CA.listener);
        let ca = Port::ca(settings.ca_addr, limits, gate, &metrics).await?;
        let few = Limits {
            connections: 100,
            ..Limits::default()
        };
        let query = Bound::plain(settings.query_addr, few.clone())
            .await
            .or_exit(Exit::Internal)?
            .counted(&metrics.listeners, "query");
        let admin = Bound::plain(settings.admin_addr, few)
            .await
            .or_exit(Exit::Internal)?
            .counted(&metrics.listeners, "admin");
        let admin_addr = admin.local_addr();

        let mut registry = runtime::metrics::registry(clock.now());
        metrics.register(&mut registry);
        count(&mut registry);
        let mut tasks = Tasks::new(stop.clone());
        // It answers until it is dropped: while the others drain, probes still want to know.
        let app = admin::router(readiness.clone(), Arc::new(registry));
        tasks.attend("admin", admin.serve(app, CancellationToken::new()));
        let catalogue = Catalogue::new(xds::Settings {
            trust_domain: settings.trust_domain.clone(),
            root_namespace: settings.namespace.as_str().into(),
            cluster_domain: settings.cluster_domain.as_str().into(),
        });
        let hub = Hub::new(
            catalogue,
            ads::Limits::default(),
            clock.clone(),
            metrics.ads.clone(),
            stop.clone(),
        );
        // small: who tells waits while what was told is taken over
        let (feed, fed) = mpsc::channel(16);
        Ok(Self {
            settings,
            clock,
            hub,
            feed,
            fed,
            query,
            stop,
            tasks,
            readiness,
            signing_gate: signing::Gate::default(),
            injector: Arc::new(ArcSwap::from_pointee(injector)),
            gates,
            overrides,
            webhook,
            ca,
            admin: admin_addr,
            metrics,
        })
    }

    /// The chain that the webhook serves; `None` until the first is issued.
    pub(super) fn webhook_chain(&self) -> watch::Receiver<Option<Arc<KeyedChain>>> {
        self.webhook.chains.subscribe()
    }

    /// Where the listeners answer.
    pub(super) fn addresses(&self) -> Addresses {
        Addresses {
            webhook: self.webhook.bound.local_addr(),
            ca: self.ca.bound.local_addr(),
            admin: self.admin,
            query: self.query.local_addr(),
        }
    }

    /// Opens the journal, trying again as long as `mends` expects an error to pass, and meanwhile the log and `/readyz`
    /// say what is missing; `None` where the process is told to stop before.
    pub(super) async fn open<H: JournalHome + Clone>(
        &self,
        home: &H,
        mends: impl Fn(&CustodyError) -> bool,
    ) -> Result<Option<Arc<Custody<H>>>, Failure> {
        let mut pause = OPEN_PAUSE.0;
        loop {
            let opening = Custody::open(
                home.clone(),
                self.settings.rotation.clone(),
                self.settings.trust_domain.clone(),
                self.clock.clone(),
                self.metrics.custody.clone(),
            );
            let opened = tokio::select! {
                () = self.stop.cancelled() => return Ok(None),
                opened = opening => opened,
            };
            match opened {
                Ok(custody) => {
                    return Ok(Some(custody));
                }
                Err(error) if mends(&error) => {
                    let error = whole(error);
                    tracing::error!(error, retry_in = ?pause, "the CA journal cannot be opened");
                }
                Err(error) => return Err(Exit::BadInput.because(error)),
            }
            let _ = timeout(pause, self.stop.cancelled()).await;
            pause = (pause * 2).min(OPEN_PAUSE.1);
        }
    }

    /// Serves until the stop, or until a part of it fails.
    pub(super) async fn run<H: JournalHome, A: Authenticate>(
        mut self,
        home: Home<H, A>,
    ) -> Result<(), Failure> {
        let id = self.own_identity()?;
        self.gates.journal.open();
        let custody = home.custody;
        let authority = {
            let custody = custody.clone();
            move || custody.authority()
        };
        let signing = Signing::new(
            authority,
            home.authenticate,
            self.settings.rotation.leaf,
            signing::Limits::default(),
            self.clock.clone(),
            self.metrics.signing,
        );
        let signing = signing
            .with_gate(self.signing_gate.clone())
            .with_audit(Audit::new(home.replica))
            .with_cluster(self.settings.cluster.clone());
        // One port for whatever pods ask for: other services merge their routes into these.
        let signer = signing::router(Arc::new(signing)).merge(ads::router(self.hub.clone()));
        let webhook = webhook::router(Webhook {
            injector: self.injector.clone(),
            cluster: home.cluster,
            metrics: self.metrics.webhook,
            limits: webhook::Limits::default(),
        });
        let issuer = Issuer {
            custody: &custody,
            clock: &self.clock,
            stop: &self.stop,
        };
        let profile = |dns_names| Profile::Webhook { dns_names };
        issuer.serve(
            &mut self.tasks,
            self.webhook,
            webhook,
            home.webhook_names,
            profile,
        );
        let profile = |dns_names| Profile::ControlPlane { id, dns_names };
        issuer.serve(&mut self.tasks, self.ca, signer, home.ca_names, profile);

        let tell = self.hub.clone().keep(self.fed, custody.watch());
        self.tasks.own("mesh", tell);
        let listed = until_whole(self.hub.whole(), self.gates.mesh, self.stop.clone());
        self.tasks.own("first lists of the mesh", listed);
        let questions = self
            .query
            .serve(ads::questions(self.hub), self.stop.clone());
        self.tasks.own("questions", questions);

        let jumps = runtime::clock::jumps(self.clock, CLOCK_TOLERANCE);
        let sanity = Sanity {
            jump: jumps.told(),
            rebase: jumps.rebase(),
            skew: home.skew,
            leads: home.leads,
            gate: self.signing_gate,
        };
        let (acts, acting) = watch::channel(false);
        self.tasks.own("clock", jumps.watch(self.stop.clone()));
        let consequences = sanity.keep(acts, self.stop.clone());
        self.tasks.own("clock's consequences", consequences);
        let journal = custody.keep(acting, self.stop.clone());
        self.tasks.own("CA journal", journal);
        let overrides = self.overrides.keep(self.injector, self.stop);
        self.tasks.own("injector settings", overrides);
        self.tasks
            .run(self.settings.drain + FINISH)
            .await
            .or_exit(Exit::Internal)
    }

    /// Who the control plane itself is.
    fn own_identity(&self) -> Result<SpiffeId, Failure> {
        SpiffeId::new(
            &self.settings.trust_domain,
            &self.settings.namespace,
            "malha",
        )
        .or_exit(Exit::Usage)
    }
}

impl Port {
    /// What API servers call. They show no certificate: none that we could know.
    async fn webhook(
        addr: SocketAddr,
        limits: Limits,
        gate: Gate,
        metrics: &Metrics,
    ) -> Result<Self, Failure> {
        let certificate = ServingCertificate::new();
        let bound = Bound::new(addr, certificate.clone(), Alpn::Http1, limits).await;
        let bound = bound.or_exit(Exit::Internal)?;
        Ok(Self {
            names: WEBHOOK,
            gate,
            bound: bound.counted(&metrics.listeners, WEBHOOK.port),
            certificate,
            clients: None,
            chains: watch::Sender::new(None),
        })
    }

    /// What every pod of the mesh holds connections to, and shows its certificate.
    async fn ca(
        addr: SocketAddr,
        limits: Limits,
        gate: Gate,
        metrics: &Metrics,
    ) -> Result<Self, Failure> {
        let limits = Limits {
            connections: ca_connections(runtime::memory::limit()),
            idle: CA_IDLE,
            ..limits
        };
        let (certificate, clients) = (ServingCertificate::new(), ClientTrust::new());
        let bound = Bound::asking(addr, certificate.clone(), clients.clone(), limits).await;
        let bound = bound.or_exit(Exit::Internal)?;
        Ok(Self {
            names: CA,
            gate,
            bound: bound.counted(&metrics.listeners, CA.port),
            certificate,
            clients: Some(clients),
            chains: watch::Sender::new(None),
        })
    }
}

/// Who gives ports their certificates, until when.
struct Issuer<'a, H> {
    custody: &'a Arc<Custody<H>>,
    clock: &'a Clock,
    stop: &'a CancellationToken,
}

impl<H: JournalHome> Issuer<'_, H> {
    /// Serves a port. Its certificate is issued again and again in time, and each serves from the next handshake on;
    /// clients are trusted by whatever bundle is current; its gate opens when it answers.
    fn serve(
        &self,
        tasks: &mut Tasks,
        port: Port,
        app: Router,
        dns_names: Vec<String>,
        profile: impl FnOnce(Vec<String>) -> Profile,
    ) {
        let custody = self.custody;
        let stop = || self.stop.clone();
        let addr = port.bound.local_addr();
        let proving = prove(addr, dns_names.clone(), custody.watch(), port.gate, stop());
        tasks.own(port.names.listener, proving);
        let following = port.certificate.follow(port.chains.subscribe(), stop());
        let profile = profile(dns_names);
        let clock = self.clock.clone();
        let keeping = custody::keep_serving(custody.clone(), profile, clock, port.chains, stop());
        tasks.own(port.names.certificate, async move {
            tokio::join!(keeping, following);
        });
        if let Some(clients) = port.clients {
            let bundle_of = |authority: &Arc<Authority>| authority.bundle().clone();
            let following = clients.follow(custody.watch(), bundle_of, stop());
            tasks.own("client certificates", following);
        }
        tasks.own(port.names.port, port.bound.serve(app, stop()));
    }
}

impl Metrics {
    fn register(&self, registry: &mut Registry) {
        self.listeners.register(registry);
        self.webhook.register(registry);
        self.signing.register(registry);
        self.custody.register(registry);
        self.ads.register(registry);
    }
}

/// How many connections the CA port keeps in a process that may use so much memory, in bytes.
fn ca_connections(memory: Option<u64>) -> usize {
    let share = memory.map_or(u64::MAX, |bytes| bytes / 2 / CONNECTION_MEMORY);
    usize::try_from(share).map_or(CA_CONNECTIONS, |share| share.min(CA_CONNECTIONS))
}

/// Opens the gate when every proxy can be answered.
async fn until_whole(mut whole: watch::Receiver<bool>, gate: Gate, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => return,
        told = whole.wait_for(|whole| *whole) => if told.is_ok() {
            gate.open();
        },
    }
    stop.cancelled().await;
}

/// Opens the gate when a call through the real listener succeeds, as a client with today's bundle would make it.
async fn prove(
    addr: SocketAddr,
    dns_names: Vec<String>,
    authorities: watch::Receiver<Arc<Authority>>,
    gate: Gate,
    stop: CancellationToken,
) {
    let name = dns_names.first().map_or("localhost", String::as_str);
    let answered = async {
        loop {
            let authority = authorities.borrow().clone();
            match tls::probe(addr, name, authority.bundle().certificates()).await {
                Ok(()) => return,
                Err(error) => tracing::debug!(error = whole(error), "not answering yet"),
            }
            sleep(PROVE_PAUSE).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => return,
        () = answered => gate.open(),
    }
    stop.cancelled().await;
}
