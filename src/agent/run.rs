//! `malha-agent run`: everything of the pod's side, from start to end.
//!
//! One thread. Envoy is the child of the whole; each other part is a task of its own that is started again when it fails,
//! so that no fault in one of them reaches Envoy or its connections.

use std::{
    error::Error, fs, future::Future, io, os::unix::fs::OpenOptionsExt, path::Path,
    process::ExitCode, sync::Arc, time::Duration,
};

use nix::sys::signal::Signal;
use prometheus_client::registry::Registry;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::{
    bootstrap::{bootstrap, memory_limit},
    children::Children,
    drain::drain,
    envoy::{EnvoyError, Launch, Life, concurrency, supervise},
    identity,
    metrics::Metrics,
    pod::Pod,
    serve::{self, BindError},
    settings::Settings,
};
use crate::clock::Clock;

/// Why the agent ends although nobody asked it to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A port of the sidecar's is taken.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The directory of sockets and bootstrap cannot be written.
    #[error("cannot write {path}; is a volume mounted there that this user may write?")]
    Directory {
        /// What was to be written.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// Signals cannot be taken over.
    #[error("the system refuses signal handlers")]
    Signals(#[source] io::Error),
    /// Envoy is beyond help.
    #[error(transparent)]
    Envoy(#[from] EnvoyError),
}

impl RunError {
    /// What the process ends with (`sysexits.h` where there is no better one).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Bind(_) | Self::Signals(_) => 71,
            Self::Directory { .. } => 73,
            Self::Envoy(error) => error.exit_code(),
        }
    }
}

/// Starts parts of the agent and keeps them going.
#[derive(Clone, Debug)]
pub struct Keeper {
    metrics: Metrics,
}

/// A part that ends unasked is started again after this long.
const AGAIN: Duration = Duration::from_secs(1);

impl Keeper {
    /// Runs what `part` makes, and makes it anew whenever it ends or panics.
    pub fn keep<F, T>(&self, name: &'static str, part: F) -> JoinHandle<()>
    where
        F: Fn() -> T + Send + 'static,
        T: Future + Send + 'static,
        T::Output: Send + 'static,
    {
        let metrics = self.metrics.clone();
        tokio::spawn(async move {
            loop {
                let ended = tokio::spawn(part()).await;
                metrics.task_restarted();
                match ended {
                    Ok(_) => tracing::error!(part = name, "ended unasked; starting it again"),
                    Err(error) => {
                        tracing::error!(part = name, %error, "this is a bug in malha-agent; starting the part again");
                    }
                }
                sleep(AGAIN).await;
            }
        })
    }
}

/// Runs until the pod ends, or Envoy cannot be kept alive.
///
/// # Errors
/// Why the container must be started again.
pub async fn run(settings: Settings, clock: Clock) -> Result<ExitCode, RunError> {
    let mut signals = Signals::install().map_err(RunError::Signals)?;
    write_bootstrap(&settings)?;
    let status = serve::bind(settings.listen_on(settings.status_port))?;
    let probes = serve::bind(settings.listen_on(settings.agent_port))?;

    let metrics = Metrics::default();
    let of_identity = identity::Metrics::default();
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    of_identity.register(&mut registry);
    let (life, lives) = watch::channel(Life::Absent);
    let draining = CancellationToken::new();
    let launch = Launch::new(&settings, workers(&settings));
    let pod = Arc::new(Pod::new(
        settings,
        lives,
        draining.clone(),
        metrics.clone(),
        registry,
    ));
    Children::adopt_orphans();
    let children = Children::default();
    let keeper = Keeper {
        metrics: metrics.clone(),
    };
    let reaped = children.clone();
    keeper.keep("reaper", move || reaped.clone().reap());
    keep_serving(
        &keeper,
        "probes",
        probes,
        &pod,
        |listener, pod| async move { serve::probes(&listener, &pod).await },
    );
    keep_serving(
        &keeper,
        "readiness",
        status,
        &pod,
        |listener, pod| async move { serve::status(&listener, &pod).await },
    );
    let owner = Arc::clone(&pod);
    keeper.keep("identity", move || {
        let (pod, metrics, clock) = (Arc::clone(&owner), of_identity.clone(), clock.clone());
        async move {
            if let Err(error) = identify(&pod.settings, metrics, clock).await {
                tracing::error!(error = &*error as &dyn Error, "no identity can be served");
            }
        }
    });

    let (forward, forwarded) = mpsc::channel(4);
    let stop = CancellationToken::new();
    let envoy = supervise(launch, children, life, forwarded, metrics, stop.clone());
    let mut envoy = std::pin::pin!(envoy);
    loop {
        let signal = tokio::select! {
            ended = &mut envoy => return ended.map(|()| ExitCode::SUCCESS).map_err(Into::into),
            signal = signals.next() => signal,
        };
        match signal {
            Signal::SIGTERM | Signal::SIGINT => {
                tracing::info!(%signal, drain_seconds = pod.settings.termination_drain.as_secs_f32(), "draining; a second signal ends the pod's proxy at once");
                break;
            }
            // A full queue means that Envoy has enough of them.
            other => drop(forward.try_send(other)),
        }
    }
    draining.cancel();
    let mut second = None;
    tokio::select! {
        ended = &mut envoy => return ended.map(|()| ExitCode::SUCCESS).map_err(Into::into),
        () = drain(&pod) => {}
        signal = signals.second() => second = Some(signal),
    }
    stop.cancel();
    let Some(signal) = second else {
        tokio::select! {
            ended = &mut envoy => ended?,
            signal = signals.second() => {
                kill(&pod);
                return Ok(code_of(signal));
            }
        }
        tracing::info!("ended");
        return Ok(ExitCode::SUCCESS);
    };
    tracing::warn!(%signal, "second signal: ending at once");
    kill(&pod);
    Ok(code_of(signal))
}

/// Gets and renews the pod's identity, and serves it to Envoy and to the application.
async fn identify(
    settings: &Settings,
    metrics: identity::Metrics,
    clock: Clock,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let keeper = identity::Keeper::new(
        identity::Settings {
            id: settings.id.clone(),
            control_plane: settings.control_plane.to_string().parse()?,
            cluster: settings.cluster.clone(),
            pod: settings.node_id(),
            token: settings.token.clone(),
            roots: settings.roots.clone(),
            life: None,
            renew_every: settings.renew_every,
        },
        clock,
        metrics,
    );
    let sds = keeper.sds(&settings.sds_socket())?;
    let workload_api = keeper.workload_api(&settings.file("workload/socket"))?;
    // Nobody stops them: they end with the process, after Envoy.
    let stop = CancellationToken::new();
    tokio::select! {
        () = keeper.keep(stop.clone()) => Ok(()),
        ended = sds.serve(stop.clone()) => Ok(ended?),
        ended = workload_api.serve(stop.clone()) => Ok(ended?),
    }
}

fn code_of(signal: Signal) -> ExitCode {
    ExitCode::from(128 + u8::try_from(signal as i32).unwrap_or(0))
}

fn kill(pod: &Pod) {
    if let Life::Running(pid) = *pod.life.borrow() {
        let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
    }
}

fn keep_serving<F, T>(
    keeper: &Keeper,
    name: &'static str,
    listener: tokio::net::TcpListener,
    pod: &Arc<Pod>,
    serve: F,
) where
    F: Fn(Arc<tokio::net::TcpListener>, Arc<Pod>) -> T + Send + 'static,
    T: Future + Send + 'static,
    T::Output: Send + 'static,
{
    let (listener, pod) = (Arc::new(listener), Arc::clone(pod));
    keeper.keep(name, move || serve(Arc::clone(&listener), Arc::clone(&pod)));
}

/// Writes what Envoy starts with.
fn write_bootstrap(settings: &Settings) -> Result<(), RunError> {
    let path = settings.bootstrap_file();
    let fault = |source| RunError::Directory {
        path: path.display().to_string(),
        source,
    };
    fs::create_dir_all(&settings.directory).map_err(fault)?;
    // A container that starts again finds the one of before.
    let _ = fs::remove_file(&path);
    let limit = memory_limit(cgroup("memory.max").as_deref());
    let file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(fault)?;
    serde_json::to_writer_pretty(&file, &bootstrap(settings, limit))
        .map_err(|error| fault(error.into()))
}

fn workers(settings: &Settings) -> u32 {
    concurrency(cgroup("cpu.max").as_deref(), settings.cpu_limit)
}

/// The container's own limits, where it sees them as the root of its hierarchy (cgroup v2).
fn cgroup(file: &str) -> Option<String> {
    fs::read_to_string(Path::new("/sys/fs/cgroup").join(file)).ok()
}

/// Signals that PID 1 hears.
struct Signals {
    heard: mpsc::Receiver<Signal>,
}

impl Signals {
    fn install() -> io::Result<Self> {
        let (hear, heard) = mpsc::channel(4);
        for (kind, name) in [
            (SignalKind::terminate(), Signal::SIGTERM),
            (SignalKind::interrupt(), Signal::SIGINT),
            (SignalKind::hangup(), Signal::SIGHUP),
            (SignalKind::user_defined1(), Signal::SIGUSR1),
            (SignalKind::user_defined2(), Signal::SIGUSR2),
        ] {
            let mut signals = signal(kind)?;
            let hear = hear.clone();
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    if hear.send(name).await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self { heard })
    }

    async fn next(&mut self) -> Signal {
        match self.heard.recv().await {
            Some(signal) => signal,
            None => std::future::pending().await,
        }
    }

    /// The next one that asks for the end.
    async fn second(&mut self) -> Signal {
        loop {
            let signal = self.next().await;
            if matches!(signal, Signal::SIGTERM | Signal::SIGINT) {
                return signal;
            }
        }
    }
}

/// The chain of causes, as one line for a person.
pub fn told(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        next = cause.source();
    }
    line
}
