//! The process as its operator sees it: probes, metrics, logs, signals.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use nix::sys::signal::Signal;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::https::{Connection, trusting};
use crate::support::program::Program;
use crate::support::review;

/// For what takes milliseconds, on a machine that does something else.
const PATIENCE: Duration = Duration::from_secs(60);

/// A control plane in a directory of its own.
struct Plane {
    program: Program,
    directory: TempDir,
    addresses: Value,
}

impl Plane {
    fn start(flags: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let home = directory.path().join("state");
        let path = home.to_str().expect("UTF-8");
        let mut args = arguments(path);
        args.extend(flags);
        let program = Program::malha(&args);
        program.wait_for("malha serves from", PATIENCE);
        Self {
            program,
            addresses: wait_for_addresses(&home),
            directory,
        }
    }

    fn addr(&self, port: &str) -> SocketAddr {
        address(&self.addresses, port)
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    fn ask(&self, line: &str) -> (u16, String) {
        ask(self.addr("admin"), line)
    }

    async fn connect(&self) -> std::io::Result<Connection> {
        connect(&self.state(), &self.addresses).await
    }

    /// What was logged so far; fails where a line is not one JSON object.
    fn log(&self) -> Vec<Value> {
        self.program
            .said()
            .lines()
            .filter(|line| line.starts_with('{'))
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
            .collect()
    }
}

/// A child that is gone when the test ends.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn arguments(state: &str) -> Vec<&str> {
    let mut args = vec!["serve", "--standalone", state];
    for addr in [
        "--webhook-addr",
        "--ca-addr",
        "--admin-addr",
        "--query-addr",
    ] {
        args.extend([addr, "127.0.0.1:0"]);
    }
    args
}

/// Where it listens, once it does.
fn wait_for_addresses(state: &Path) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Ok(addresses) = fs::read(state.join("addresses.json")) {
            return serde_json::from_slice(&addresses).expect("JSON");
        }
        assert!(Instant::now() < deadline, "it never serves");
        thread::sleep(Duration::from_millis(10));
    }
}

fn address(addresses: &Value, port: &str) -> SocketAddr {
    addresses[port]
        .as_str()
        .and_then(|addr| addr.parse().ok())
        .expect("an address")
}

/// What the admin port says to `line`, a request line.
fn ask(admin: SocketAddr, line: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(admin).expect("the admin port");
    write!(
        stream,
        "{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    .expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body);
    (
        status.expect("a status"),
        body.unwrap_or_default().to_owned(),
    )
}

async fn connect(state: &Path, addresses: &Value) -> std::io::Result<Connection> {
    let bundle = fs::read(state.join("bundle.pem")).expect("a bundle");
    let roots: Vec<_> = CertificateDer::pem_slice_iter(&bundle)
        .collect::<Result<_, _>>()
        .expect("certificates");
    let config = trusting(roots.iter().map(AsRef::as_ref));
    let webhook = address(addresses, "webhook");
    Connection::open(webhook, "malha.malha-system.svc", config).await
}

#[test]
fn the_admin_port_tells_and_does_nothing_else() {
    let plane = Plane::start(&[]);
    assert_eq!(plane.ask("GET /livez"), (200, "alive\n".to_owned()));
    assert_eq!(plane.ask("GET /readyz"), (200, "ready\n".to_owned()));
    for line in [
        "POST /livez",
        "PUT /metrics",
        "DELETE /readyz",
        "OPTIONS /livez",
        "HEAD /livez",
    ] {
        assert_eq!(plane.ask(line).0, 405, "{line}");
    }
    for path in [
        "/",
        "/quitquitquit",
        "/shutdown",
        "/debug/pprof/",
        "/logging",
        "/config",
        "/livez/",
        "//livez",
        "/metrics/../livez",
        "http://127.0.0.1/debug",
    ] {
        for method in ["GET", "POST"] {
            assert_eq!(
                plane.ask(&format!("{method} {path}")).0,
                404,
                "{method} {path}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_count_each_admission_once_and_have_one_block_for_each_name() {
    let plane = Plane::start(&[]);
    let mut connection = plane.connect().await.expect("a handshake");
    for _ in 0..7 {
        connection
            .post("/inject/ns", b"{}")
            .await
            .expect("an answer");
    }
    let (status, text) = plane.ask("GET /metrics");
    assert_eq!(status, 200);
    assert!(text.ends_with("# EOF\n"), "OpenMetrics has an end");
    let refused = "malha_injector_admission_requests_total{result=\"error\",reason=\"BadRequest\",dry_run=\"false\"} 7\n";
    assert!(text.contains(refused), "{text}");
    assert!(text.contains("malha_build_info{version="), "{text}");
    let mut names: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split(' ').next())
        .collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all, "a name has two blocks");
    let series = text.lines().filter(|line| !line.starts_with('#')).count();
    assert!(series <= 600, "{series} series");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_decision_is_one_line_of_json_whatever_it_is_about() {
    let plane = Plane::start(&[]);
    let pod = json!({
        "metadata": {"generateName": "a\n{\"level\":\"ERROR\"}\u{1b}[2J"},
        "spec": {"containers": [{"name": "web", "image": "web:1"}]},
    });
    let mut connection = plane.connect().await.expect("a handshake");
    for uid in ["plain", "line\nbreak", "\"quoted\"", "\u{0}\u{2028}\r"] {
        let review = review::of_pod(uid, "sh\nop", &pod).to_string();
        let answer = connection
            .post("/inject/ns", review.as_bytes())
            .await
            .expect("an answer");
        assert_eq!(answer.json()["response"]["uid"], uid);
    }
    plane.program.wait_for("\\u{2028}", PATIENCE);
    let lines: Vec<_> = plane
        .log()
        .into_iter()
        .filter(|line| line["message"] == "admission")
        .collect();
    assert_eq!(lines.len(), 4);
    for line in &lines {
        assert_eq!(line["namespace"], "sh\\nop");
        assert_eq!(line["name"], "a\\n{\"level\":\"ERROR\"}\\u{1b}[2J");
        assert_eq!(line["level"], "INFO");
        assert!(line["reason"].is_string() && line["dry_run"] == false);
    }
    assert_eq!(lines[0]["uid"], "plain");
}

/// Nobody reads what is logged, so the pipe is full after some hundred lines and the queue after some thousand.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_delays_no_admission() {
    let directory = tempfile::tempdir().expect("a directory");
    let state = directory.path().join("state");
    let mut command = Command::new(env!("CARGO_BIN_EXE_malha"));
    command.args(arguments(state.to_str().expect("UTF-8")));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("malha starts");
    let ears_shut = child.stderr.take();
    let program = Guard(child);
    let addresses = wait_for_addresses(&state);
    let mut connection = connect(&state, &addresses).await.expect("a handshake");
    let review = review::of_pod("u", "shop", &json!({"spec": {}})).to_string();
    let flood = 10_000;
    for _ in 0..flood {
        let answer = connection.post("/inject/ns", review.as_bytes()).await;
        assert_eq!(answer.expect("an answer").status, 200);
    }
    let (_, metrics) = ask(address(&addresses, "admin"), "GET /metrics");
    let lost: f64 = metrics
        .lines()
        .find_map(|line| line.strip_prefix("malha_log_lines_lost_total "))
        .and_then(|lost| lost.parse().ok())
        .expect("a count");
    assert!(lost > 0.0 && lost < f64::from(flood), "{lost} lines lost");
    drop((program, ears_shut));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_signal_drains() {
    let mut plane = Plane::start(&["--drain", "2s"]);
    let mut kept = plane.connect().await.expect("a handshake");
    kept.post("/inject/ns", b"{}").await.expect("an answer");
    plane.program.signal(Signal::SIGTERM);
    plane.program.wait_for("\"stopping;", PATIENCE);
    assert_eq!(
        plane.ask("GET /readyz"),
        (503, "not ready: stopping\n".to_owned())
    );
    assert_eq!(plane.ask("GET /livez").0, 200);
    let answer = kept.post("/inject/ns", b"{}").await.expect("an answer");
    assert_eq!(answer.header("connection"), Some("close"));
    let answer = plane
        .connect()
        .await
        .expect("still accepted")
        .post("/inject/ns", b"{}")
        .await
        .expect("an answer");
    assert_eq!(answer.header("connection"), Some("close"));
    let ended = plane.program.wait(PATIENCE);
    assert_eq!(ended.code(), Some(0), "{}", plane.program.said());
    let errors: Vec<_> = plane
        .log()
        .into_iter()
        .filter(|line| line["level"] == "ERROR")
        .collect();
    assert_eq!(errors, [] as [Value; 0]);
}

#[test]
fn the_second_signal_wins() {
    for (second, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let mut plane = Plane::start(&["--drain", "5m"]);
        plane.program.signal(Signal::SIGTERM);
        plane.program.wait_for("\"stopping;", PATIENCE);
        plane.program.signal(second);
        assert_eq!(plane.program.wait(PATIENCE).code(), Some(code));
        // What was logged last is written all the same.
        plane.program.wait_for("ending at once", PATIENCE);
    }
}

#[test]
fn no_core_file_is_ever_written() {
    let plane = Plane::start(&[]);
    let limits = fs::read_to_string(format!("/proc/{}/limits", plane.program.pid()))
        .expect("our child's limits");
    let core: Vec<_> = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"))
        .expect("a limit")
        .split_whitespace()
        .collect();
    assert_eq!(core, ["0", "0", "bytes"]);
}

#[test]
fn settings_that_a_directory_cannot_honour_are_refused() {
    let place = tempfile::tempdir().expect("a directory");
    let state = place.path().join("state");
    for (flag, value, why) in [
        ("validation", "tokenreview", "there is no API server to ask"),
        ("require-bound-pod", "true", "there are no pods"),
        ("audiences", "istio-ca", "set it to malha-ca"),
        ("audiences", "malha-ca,istio-ca", "set it to malha-ca"),
    ] {
        let mut args = arguments(state.to_str().expect("UTF-8"));
        let name = format!("--{flag}");
        args.extend([name.as_str(), value]);
        let mut program = Program::malha(&args);
        assert_eq!(program.wait(PATIENCE).code(), Some(64), "{flag}={value}");
        let said = program.wait_for(why, PATIENCE);
        assert!(said.contains(&format!("{flag} is {value}")), "{said}");
        assert!(!state.exists(), "{flag}={value}: nothing was made");
    }
    let said = ["--validation", "jwks", "--audiences", "malha-ca"];
    drop(Plane::start(
        &[&said[..], &["--require-bound-pod", "false"]].concat(),
    ));
}

#[test]
fn a_port_that_is_taken_ends_the_process_with_what_to_look_at() {
    let plane = Plane::start(&[]);
    let taken = plane.addr("webhook").to_string();
    let other = tempfile::tempdir().expect("a directory");
    let path = other.path().join("state");
    let mut args = vec!["serve", "--standalone", path.to_str().expect("UTF-8")];
    args.extend(["--webhook-addr", &taken]);
    args.extend(["--ca-addr", "127.0.0.1:0", "--admin-addr", "127.0.0.1:0"]);
    args.extend(["--query-addr", "127.0.0.1:0"]);
    let mut program = Program::malha(&args);
    assert!(!program.wait(PATIENCE).success());
    program.wait_for(
        &format!("cannot listen on {taken}; is another program using the port?"),
        PATIENCE,
    );
}
