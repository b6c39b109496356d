//! Envoy's life: started with its bootstrap, started again when it dies, told to end last.

use std::{
    ffi::OsString,
    io,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use nix::{sys::signal::Signal, unistd::Pid};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    admin::Admin,
    children::{Child, Children, Ended},
    metrics::Metrics,
    settings::Settings,
};

/// What is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The program, found in `PATH` if it has no `/`.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// A socket that a dead Envoy leaves behind.
    pub admin_socket: PathBuf,
}

/// Whether Envoy runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Not yet, or not again.
    Absent,
    /// As this process.
    Running(Pid),
}

/// Why the agent gives Envoy up.
#[derive(Debug, thiserror::Error)]
pub enum EnvoyError {
    /// The program is not there, or no program.
    #[error("{} cannot be started; is it in the image? MALHA_ENVOY names another path", .program.display())]
    NotStarted {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It has never been ready and dies again and again.
    #[error(
        "Envoy ended {times} times in a row before it was ever ready, at last by {last}; its own messages say why"
    )]
    NeverReady {
        /// How often.
        times: u32,
        /// How at last.
        last: Ended,
    },
}

impl EnvoyError {
    /// What the agent ends with: the kubelet shows it, and a shell's codes are what people know.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotStarted { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            Self::NotStarted { .. } => 126,
            // An exit with 0 would say that all is well.
            Self::NeverReady { last, .. } => last.exit_code().max(1),
        }
    }
}

/// Existing connections get this long to end when the control plane takes their listener or filter chain away.
const DRAIN_SECONDS: u32 = 45;

impl Launch {
    /// Envoy with the bootstrap of these settings.
    pub fn new(settings: &Settings, concurrency: u32) -> Self {
        let mut arguments: Vec<OsString> = vec![
            "--config-path".into(),
            settings.bootstrap_file().into(),
            "--concurrency".into(),
            concurrency.to_string().into(),
            "--log-level".into(),
            settings.log.envoy.to_string().into(),
            "--drain-time-s".into(),
            DRAIN_SECONDS.to_string().into(),
            // Whoever asks for a drain means now; spread over the drain time it never reaches idle clients.
            "--drain-strategy".into(),
            "immediate".into(),
            // It wants shared memory and a socket of a fixed name, and we never hand one Envoy over to the next.
            "--disable-hot-restart".into(),
            // Fields of a newer control plane are not a fault of the configuration.
            "--ignore-unknown-dynamic-fields".into(),
            "--local-address-ip-version".into(),
            match settings.primary_ip().is_ipv6() {
                true => "v6".into(),
                false => "v4".into(),
            },
        ];
        if !settings.log.components.is_empty() {
            arguments.push("--component-log-level".into());
            arguments.push(settings.log.components.clone().into());
        }
        Self {
            program: settings.envoy.clone(),
            arguments,
            admin_socket: settings.admin_socket(),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null());
        command
    }
}

/// How many workers: whole cores of the limit, one for less, two without a limit.
///
/// The container's own `cpu.max` knows (cgroup v2: quota and period in microseconds, or `max`); where it cannot be read,
/// `CPU_LIMIT` is what the kubelet says, rounded up, and the node's size where there is no limit.
pub fn concurrency(cpu_max: Option<&str>, cpu_limit: Option<u32>) -> u32 {
    let quota = cpu_max.and_then(|text| {
        let (quota, period) = text.trim().split_once(' ')?;
        let period: u32 = period.parse().ok().filter(|period| *period > 0)?;
        match quota {
            "max" => Some(None),
            quota => Some(Some(quota.parse::<u32>().ok()? / period)),
        }
    });
    match (quota, cpu_limit) {
        (Some(None), _) | (None, None) => 2,
        (Some(Some(cores)), _) | (None, Some(cores)) => cores.max(1),
    }
}

/// After this long a life counts as one: the back-off begins anew.
const SETTLED: Duration = Duration::from_secs(60);
/// The first death costs no time, for connections wait; then 0.2, 0.4, 0.8 .. s.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// A proxy that is missing is worse than a busy one.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Early deaths before anything was ever ready; then the kubelet shall see it, and wait longer than we would.
const HOPELESS: u32 = 5;
/// Envoy closes its connections and ends within a second.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Keeps Envoy running until `stop`, then ends it.
///
/// # Errors
/// Where Envoy cannot be started, or has never been ready and keeps dying.
pub async fn supervise(
    launch: Launch,
    children: Children,
    life: watch::Sender<Life>,
    mut signals: mpsc::Receiver<Signal>,
    metrics: Metrics,
    stop: CancellationToken,
) -> Result<(), EnvoyError> {
    let mut deaths = 0;
    let mut ever_ready = false;
    loop {
        // A socket without listener would be taken for an Envoy that hangs.
        let _ = std::fs::remove_file(&launch.admin_socket);
        let started = Instant::now();
        let mut child =
            children
                .start(&mut launch.command())
                .map_err(|source| EnvoyError::NotStarted {
                    program: launch.program.clone(),
                    source,
                })?;
        tracing::info!(pid = %child.pid(), "Envoy started");
        life.send_replace(Life::Running(child.pid()));
        let ended = loop {
            tokio::select! {
                ended = child.ended() => break ended,
                Some(signal) = signals.recv() => child.signal(signal),
                ready = wait_until_ready(&launch), if !ever_ready => ever_ready = ready,
                () = stop.cancelled() => {
                    end(&mut child).await;
                    life.send_replace(Life::Absent);
                    return Ok(());
                }
            }
        };
        life.send_replace(Life::Absent);
        metrics.envoy_restarted();
        deaths = if started.elapsed() > SETTLED {
            1
        } else {
            deaths + 1
        };
        if !ever_ready && deaths >= HOPELESS {
            return Err(EnvoyError::NeverReady {
                times: deaths,
                last: ended,
            });
        }
        let pause = pause(deaths);
        tracing::error!(%ended, lived_seconds = started.elapsed().as_secs_f32(), pause_ms = pause.as_millis(), "Envoy died; starting it again");
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => return Ok(()),
        }
    }
}

async fn wait_until_ready(launch: &Launch) -> bool {
    let admin = Admin::new(&launch.admin_socket);
    while !matches!(admin.is_ready().await, Ok(true)) {
        sleep(Duration::from_millis(500)).await;
    }
    true
}

fn pause(deaths: u32) -> Duration {
    match deaths.checked_sub(2) {
        None => Duration::ZERO,
        Some(doublings) => FIRST_PAUSE
            .saturating_mul(2_u32.saturating_pow(doublings))
            .min(LONGEST_PAUSE),
    }
}

async fn end(child: &mut Child) {
    child.signal(Signal::SIGTERM);
    if let Ok(ended) = timeout(LAST_WORDS, child.ended()).await {
        tracing::info!(%ended, "Envoy ended");
        return;
    }
    tracing::warn!("Envoy does not end; killing it");
    child.signal(Signal::SIGKILL);
    let _ = timeout(LAST_WORDS, child.ended()).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_follow_the_limit() {
        for (cpu_max, cpu_limit, want) in [
            (Some("200000 100000\n"), Some(2), 2),
            (Some("150000 100000\n"), Some(2), 1),
            (Some("50000 100000\n"), Some(1), 1),
            (Some("max 100000\n"), Some(64), 2),
            (Some("what"), Some(3), 3),
            (None, Some(3), 3),
            (None, Some(0), 1),
            (None, None, 2),
        ] {
            assert_eq!(
                concurrency(cpu_max, cpu_limit),
                want,
                "{cpu_max:?} {cpu_limit:?}"
            );
        }
    }

    #[test]
    fn the_first_death_costs_no_time_and_the_tenth_ten_seconds() {
        let pauses: Vec<_> = (1..=10).map(|deaths| pause(deaths).as_millis()).collect();
        assert_eq!(
            pauses,
            [0, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000, 10_000]
        );
    }

    #[test]
    fn the_exit_code_is_the_one_that_a_shell_would_give() {
        let not_found = EnvoyError::NotStarted {
            program: "envoy".into(),
            source: io::ErrorKind::NotFound.into(),
        };
        assert_eq!(not_found.exit_code(), 127);
        let killed = EnvoyError::NeverReady {
            times: 5,
            last: Ended::Killed(Signal::SIGSEGV),
        };
        assert_eq!(killed.exit_code(), 139);
        let clean = EnvoyError::NeverReady {
            times: 5,
            last: Ended::Exited(0),
        };
        assert_eq!(clean.exit_code(), 1);
    }
}
