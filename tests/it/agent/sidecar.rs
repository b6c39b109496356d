//! One `malha-agent run` with a real Envoy, beside a control plane of the test's and an application of the test's.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::runtime::Builder;

use super::plane::Plane;
use crate::support::program::Program;

/// A machine with two busy cores is slow.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// A sidecar. Dropped: the agent and its Envoy are killed.
pub(crate) struct Sidecar {
    pub(crate) agent: Program,
    pub(crate) plane: Plane,
    pub(crate) ports: Ports,
    pub(crate) directory: TempDir,
    variables: Vec<(String, String)>,
}

/// Where it listens.
#[derive(Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) agent: u16,
    pub(crate) status: u16,
    pub(crate) metrics: u16,
    /// For an inbound listener.
    pub(crate) inbound: u16,
}

impl Sidecar {
    /// Starts one; `more` is added to its environment, and may replace what stands there.
    pub(crate) fn start(envoy: &Path, more: &[(&str, &str)]) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build();
        let runtime = Arc::new(runtime.expect("a runtime"));
        let plane = Plane::start(&runtime);
        let directory = TempDir::new().expect("a directory");
        let path = |name: &str| directory.path().join(name).display().to_string();
        fs::write(path("token"), "the-token").expect("written");
        fs::write(path("roots.pem"), &plane.roots).expect("written");
        let [agent, status, metrics, inbound] = free_ports();
        let ports = Ports {
            agent,
            status,
            metrics,
            inbound,
        };
        let mut variables: Vec<(String, String)> = [
            ("MALHA_CONTROL_PLANE", format!("localhost:{}", plane.port)),
            ("MALHA_ENVOY", envoy.display().to_string()),
            ("MALHA_RUN_DIR", path("run")),
            ("MALHA_TOKEN", path("token")),
            ("MALHA_ROOTS", path("roots.pem")),
            ("MALHA_AGENT_PORT", agent.to_string()),
            ("MALHA_STATUS_PORT", status.to_string()),
            ("MALHA_ENVOY_METRICS_PORT", metrics.to_string()),
            ("MALHA_LOG", r#"{"agent":"debug"}"#.to_owned()),
            ("POD_IPS", "127.0.0.1".to_owned()),
            ("POD_NAME", "web-1".to_owned()),
            ("POD_NAMESPACE", "shop".to_owned()),
            ("SERVICE_ACCOUNT", "web".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        for (name, value) in more {
            variables.retain(|(there, _)| there != name);
            variables.push(((*name).to_owned(), (*value).to_owned()));
        }
        let borrowed: Vec<_> = borrowed(&variables);
        Self {
            agent: Program::agent(&["run"], &borrowed),
            plane,
            ports,
            variables: variables.clone(),
            directory,
        }
    }

    /// Runs another command of the agent's in the same environment.
    pub(crate) fn other(&self, words: &[&str]) -> Program {
        Program::agent(words, &borrowed(&self.variables))
    }

    pub(crate) fn run_directory(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    /// Status and text of readiness; 0 where nobody answers.
    pub(crate) fn readiness(&self) -> (u16, String) {
        try_get(self.ports.status, "/healthz/ready").unwrap_or_default()
    }

    pub(crate) fn wait_until_ready(&self) {
        until("ready", || {
            let (status, text) = self.readiness();
            (status == 200).then_some(()).ok_or(text)
        });
    }

    /// What Envoy's admin interface says, which only this user reaches; empty where it does not run.
    pub(crate) fn admin(&self, path: &str) -> String {
        let stream = UnixStream::connect(self.run_directory().join("admin.sock"));
        let answer = stream.ok().and_then(|stream| ask(stream, path));
        answer.map_or_else(String::new, |(_, text)| text)
    }

    pub(crate) fn envoy(&self) -> Option<Pid> {
        children(self.agent.pid())
            .into_iter()
            .find(|(_, name, _)| name == "envoy")
            .map(|(pid, ..)| pid)
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let children = children(self.agent.pid());
        self.agent.end();
        for (pid, ..) in children {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

fn borrowed(variables: &[(String, String)]) -> Vec<(&str, &str)> {
    let pairs = variables.iter();
    pairs.map(|(n, v)| (n.as_str(), v.as_str())).collect()
}

/// Children of a process: pid, name and state (`Z` is a zombie).
pub(crate) fn children(of: u32) -> Vec<(Pid, String, char)> {
    let list = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    let pids = list.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.filter_map(|pid: i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
        let state = rest.trim_start().chars().next()?;
        Some((Pid::from_raw(pid), name.to_owned(), state))
    })
    .collect()
}

/// Ports that were free a moment ago.
pub(crate) fn free_ports<const N: usize>() -> [u16; N] {
    let held = [(); N].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port"));
    held.map(|listener| listener.local_addr().expect("bound").port())
}

/// Tries until it works; the last reason is shown when it does not.
pub(crate) fn until<T>(what: &str, mut attempt: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        match attempt() {
            Ok(done) => return done,
            Err(reason) => assert!(
                Instant::now() < deadline,
                "not {what} within {SOON:?}: {reason}"
            ),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(crate) fn get(port: u16, path: &str) -> (u16, String) {
    try_get(port, path).unwrap_or_else(|| panic!("nobody answers {path} on {port}"))
}

pub(crate) fn try_get(port: u16, path: &str) -> Option<(u16, String)> {
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let stream = TcpStream::connect_timeout(&at, Duration::from_secs(5)).ok()?;
    stream.set_read_timeout(Some(SOON)).ok()?;
    ask(stream, path)
}

/// One request; status and body come back, `None` where the connection breaks off.
pub(crate) fn ask(mut stream: impl Read + Write, path: &str) -> Option<(u16, String)> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    let is_chunked = head
        .to_ascii_lowercase()
        .contains("transfer-encoding: chunked");
    let body = match is_chunked {
        true => unchunked(body),
        false => body.to_owned(),
    };
    Some((status, body))
}

fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap_or_default();
        let Some((chunk, after)) = rest.split_at_checked(size).filter(|_| size > 0) else {
            break;
        };
        whole.push_str(chunk);
        body = after.trim_start_matches("\r\n");
    }
    whole
}
