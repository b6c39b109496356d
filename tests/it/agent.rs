//! `malha-agent run` with a real Envoy: what the kubelet, Prometheus, an operator and a signal find.

mod plane;
pub(crate) mod sidecar;

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    process::Command,
    sync::mpsc,
    thread,
    time::Duration,
};

use malha::agent::{bootstrap::bootstrap, settings::Settings};
use nix::sys::signal::{Signal, kill};

use self::{
    plane::Told,
    sidecar::{SOON, Sidecar, children, get, try_get, until},
};
use crate::{envoy, support::program::Program};

/// An application whose answers the test holds back; it ends when it is told to.
struct Application {
    port: u16,
    /// A request has come.
    asked: mpsc::Receiver<()>,
    /// Let one be answered.
    answer: mpsc::Sender<()>,
}

impl Application {
    /// Answers `requests` requests, then closes its port.
    fn start(requests: usize) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let (ask, asked) = mpsc::channel();
        let (answer, may_answer) = mpsc::channel::<()>();
        thread::spawn(move || {
            for _ in 0..requests {
                let (mut stream, _) = listener.accept().expect("a connection");
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                let _ = ask.send(());
                let _ = may_answer.recv();
                let _ = stream.write_all(
                    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello",
                );
            }
        });
        Self {
            port,
            asked,
            answer,
        }
    }
}

#[test]
fn a_sidecar_is_ready_when_envoy_has_everything_and_shows_what_it_should() {
    let Some(envoy) = envoy::find_or_skip() else {
        return;
    };
    let application = canned(&[
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n# TYPE app_jobs_total counter\napp_jobs_total 7\n"
            .to_owned(),
    ]);
    let prometheus = format!(r#"{{"scrape":"true","port":"{application}"}}"#);
    let sidecar = Sidecar::start(&envoy, &[("MALHA_PROMETHEUS", &prometheus)]);
    let told = sidecar.agent.wait_for("settings in effect", SOON);
    assert!(told.contains("\"node\":\"web-1.shop\""), "{told}");

    // A certificate, but neither listeners nor clusters: not ready, and `wait` says so.
    until("connected", || {
        let stats = sidecar.admin("/stats?filter=control_plane");
        stats
            .contains("control_plane.connected_state: 1")
            .then_some(())
            .ok_or(stats)
    });
    let (status, text) = sidecar.readiness();
    assert_eq!(status, 503);
    assert!(text.contains("Envoy waits for"), "{text}");
    let mut waits = sidecar.other(&["wait", "--timeout", "300ms"]);
    assert_eq!(waits.wait(SOON).code(), Some(75));
    assert!(
        waits
            .said()
            .contains("the sidecar is not ready after 0.3 s: Envoy waits")
    );

    sidecar
        .plane
        .tell(Told::inbound(sidecar.ports.inbound, application));
    sidecar.wait_until_ready();
    assert_eq!(sidecar.readiness(), (200, "ready\n".to_owned()));
    let mut waits = sidecar.other(&["wait", "--timeout", "60s"]);
    assert_eq!(waits.wait(SOON).code(), Some(0));

    // Envoy's own interface is the agent's user's alone; 15090 gives metrics and nothing else.
    let socket = fs::metadata(sidecar.run_directory().join("admin.sock")).expect("a socket");
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    let file = fs::metadata(sidecar.run_directory().join("bootstrap.json")).expect("a file");
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
    let (status, metrics) = get(sidecar.ports.metrics, "/stats/prometheus");
    assert_eq!(status, 200);
    assert!(metrics.contains("envoy_server_live"), "{metrics}");
    for path in [
        "/quitquitquit",
        "/config_dump",
        "/",
        "/stats",
        "/stats/prometheus/x",
    ] {
        assert_eq!(get(sidecar.ports.metrics, path).0, 404, "{path}");
    }

    // One exposition of all three.
    let (status, merged) = get(sidecar.ports.agent, "/stats/prometheus");
    assert_eq!(status, 200);
    for line in [
        "# TYPE envoy_server_live gauge",
        "envoy_cluster_upstream_cx_total{envoy_cluster_name=\"xds\"}",
        "envoy_cluster_membership_total{envoy_cluster_name=\"inbound|8080||\"} 1",
        "app_jobs_total 7",
        "malha_agent_envoy_restarts_total 0",
        "malha_agent_xds_connected 1",
        "malha_agent_scrape_failures_total{source=\"application\"} 0",
        "malha_agent_certificate_expiration_timestamp_seconds ",
    ] {
        assert!(merged.contains(line), "{line}: {merged}");
    }
    // The application has answered once and is gone: that is counted, and the rest is as ever.
    let (_, merged) = get(sidecar.ports.agent, "/stats/prometheus");
    assert!(
        merged.contains("malha_agent_scrape_failures_total{source=\"application\"} 1"),
        "{merged}"
    );
    assert!(merged.contains("envoy_server_live"), "{merged}");
    let (status, text) = get(sidecar.ports.agent, "/app-health/web/livez");
    assert_eq!(status, 404);
    assert!(text.contains("handlers of no container"), "{text}");

    let mut dumps = sidecar.other(&["dump"]);
    assert_eq!(dumps.wait(SOON).code(), Some(0));
    let said = dumps.said();
    let dump: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(dump["listeners"][0]["name"], "virtualInbound");
    assert_eq!(
        dump["listeners"][0]["active_state"]["version_info"],
        "00000000000000ab"
    );
    assert_eq!(dump["clusters"][0]["cluster"]["name"], "inbound|8080||");
    assert_eq!(dump["secrets"], serde_json::json!(["ROOTCA", "default"]));
    assert!(!said.contains("PRIVATE KEY") && !said.contains("private_key"));
}

#[test]
fn a_killed_envoy_is_started_again_and_ready_again() {
    let Some(envoy) = envoy::find_or_skip() else {
        return;
    };
    let sidecar = Sidecar::start(&envoy, &[]);
    sidecar.plane.tell(Told::default());
    sidecar.wait_until_ready();
    let first = sidecar.envoy().expect("Envoy runs");
    kill(first, Signal::SIGKILL).expect("killed");
    sidecar.agent.wait_for("Envoy died", SOON);
    until("another Envoy", || match sidecar.envoy() {
        Some(pid) if pid != first => Ok(()),
        other => Err(format!("{other:?}")),
    });
    sidecar.wait_until_ready();
    let (_, metrics) = get(sidecar.ports.agent, "/stats/prometheus");
    assert!(
        metrics.contains("malha_agent_envoy_restarts_total 1"),
        "{metrics}"
    );
    assert!(
        children(sidecar.agent.pid())
            .iter()
            .all(|(_, _, state)| *state != 'Z')
    );
}

#[test]
fn an_open_request_is_finished_after_sigterm_and_the_exit_code_is_0() {
    let Some(envoy) = envoy::find_or_skip() else {
        return;
    };
    let application = Application::start(1);
    let ports = format!(r#"[{{"containerPort":{}}}]"#, application.port);
    let mut sidecar = Sidecar::start(&envoy, &[("MALHA_PORTS", &ports)]);
    let inbound = sidecar.ports.inbound;
    sidecar.plane.tell(Told::inbound(inbound, application.port));
    sidecar.wait_until_ready();
    let request = thread::spawn(move || get(inbound, "/slow"));
    application.asked.recv_timeout(SOON).expect("a request");
    sidecar.agent.signal(Signal::SIGTERM);
    sidecar.agent.wait_for("draining; a second signal", SOON);
    until("unready", || match sidecar.readiness() {
        (503, text) if text.contains("ending") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    // Long enough that an agent that does not wait would be gone.
    thread::sleep(Duration::from_secs(1));
    application.answer.send(()).expect("the application waits");
    assert_eq!(
        request.join().expect("an answer"),
        (200, "hello".to_owned())
    );
    // Its port is closed now, so nobody waits for the 25 s.
    assert_eq!(sidecar.agent.wait(Duration::from_secs(20)).code(), Some(0));
    assert!(sidecar.agent.said().contains("nothing is open any more"));
}

#[test]
fn the_drain_ends_when_its_time_is_over_and_a_second_signal_ends_it_at_once() {
    let Some(envoy) = envoy::find_or_skip() else {
        return;
    };
    // An application that never closes its port.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let ports = format!(r#"[{{"containerPort":{port}}}]"#);
    for (drain, signals, code) in [("1s", 1, 0), ("60s", 2, 143)] {
        let variables = [
            ("MALHA_PORTS", ports.as_str()),
            ("MALHA_TERMINATION_DRAIN", drain),
        ];
        let mut sidecar = Sidecar::start(&envoy, &variables);
        sidecar.plane.tell(Told::default());
        sidecar.wait_until_ready();
        let envoy = sidecar.envoy().expect("Envoy runs");
        sidecar.agent.signal(Signal::SIGTERM);
        sidecar.agent.wait_for("draining; a second signal", SOON);
        for _ in 1..signals {
            sidecar.agent.signal(Signal::SIGTERM);
        }
        assert_eq!(sidecar.agent.wait(SOON).code(), Some(code), "{drain}");
        until("the end of Envoy", || match kill(envoy, None) {
            Err(_) => Ok(()),
            Ok(()) => Err("it runs".to_owned()),
        });
    }
}

#[test]
fn orphans_are_reaped() {
    let Some(envoy) = envoy::find_or_skip() else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let script = directory.path().join("envoy");
    // A process whose parent is gone when it ends.
    let text = format!(
        "#!/bin/sh\n(sleep 0.3 &)\nexec {} \"$@\"\n",
        envoy.display()
    );
    fs::write(&script, text).expect("written");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("a program");
    let sidecar = Sidecar::start(&script, &[]);
    sidecar.agent.wait_for("an orphan ended", SOON);
    let children = children(sidecar.agent.pid());
    assert!(
        children.iter().all(|(_, _, state)| *state != 'Z'),
        "{children:?}"
    );
}

#[test]
fn an_envoy_that_cannot_live_ends_the_container_with_its_code() {
    let directory = tempfile::tempdir().expect("a directory");
    let script = directory.path().join("envoy");
    fs::write(&script, "#!/bin/sh\nexit 3\n").expect("written");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("a program");
    let missing = directory.path().join("missing");
    for (program, code, text) in [
        (
            &script,
            3,
            "Envoy ended 5 times in a row before it was ever ready",
        ),
        (&missing, 127, "cannot be started; is it in the image?"),
    ] {
        let mut sidecar = Sidecar::start(program, &[]);
        assert_eq!(sidecar.agent.wait(SOON).code(), Some(code));
        assert!(
            sidecar.agent.said().contains(text),
            "{}",
            sidecar.agent.said()
        );
    }
}

#[test]
fn words_and_variables_that_mean_nothing_are_answered_with_what_is_allowed() {
    for (words, variables, code, text) in [
        (&["--version"][..], &[][..], 0, "malha-agent 0."),
        (&["--help"], &[], 0, "Usage: malha-agent <command>"),
        (
            &["serve"],
            &[],
            64,
            "\"serve\" is no command: run, wait or dump",
        ),
        (&["run"], &[], 78, "MALHA_CONTROL_PLANE is not set"),
        (
            &["dump"],
            &[("MALHA_RUN_DIR", "/nowhere")],
            69,
            "/nowhere/admin.sock does not answer",
        ),
        (
            &["wait"],
            &[("MALHA_STATUS_PORT", "x")],
            78,
            "MALHA_STATUS_PORT is \"x\"",
        ),
    ] {
        let all = [
            ("POD_NAME", "x"),
            ("POD_NAMESPACE", "x"),
            ("SERVICE_ACCOUNT", "x"),
            ("POD_IPS", "::1"),
        ];
        let all: Vec<_> = all.iter().chain(variables).copied().collect();
        let mut agent = Program::agent(words, &all);
        assert_eq!(
            agent.wait(SOON).code(),
            Some(code),
            "{words:?}: {}",
            agent.said()
        );
        assert!(agent.said().contains(text), "{words:?}: {}", agent.said());
    }
}

#[test]
fn envoy_accepts_the_bootstrap_of_every_kind_of_pod() {
    let Some(envoy) = envoy::find_or_skip() else {
        return;
    };
    for (name, ips, plane, memory) in [
        (
            "IPv4",
            "10.0.0.7",
            "malha.malha-system.svc:15012",
            Some(1 << 30),
        ),
        (
            "both families",
            "10.0.0.7,fd00::7",
            "malha.malha-system.svc:15012",
            None,
        ),
        (
            "IPv6 alone",
            "fd00::7",
            "malha.malha-system.svc:15012",
            Some(256 << 20),
        ),
        (
            "a control plane at an address",
            "10.0.0.7",
            "[fd00::1]:15012",
            None,
        ),
    ] {
        let directory = tempfile::tempdir().expect("a directory");
        let run = directory.path().display().to_string();
        let settings = Settings::read(|variable| match variable {
            "POD_IPS" => Some(ips.to_owned()),
            "MALHA_CONTROL_PLANE" => Some(plane.to_owned()),
            "MALHA_RUN_DIR" => Some(run.clone()),
            "POD_NAME" => Some("web-1".to_owned()),
            "POD_NAMESPACE" => Some("shop".to_owned()),
            "SERVICE_ACCOUNT" => Some("web".to_owned()),
            _ => None,
        })
        .expect("settings");
        let file = settings.bootstrap_file();
        fs::write(&file, bootstrap(&settings, memory).to_string()).expect("written");
        let output = Command::new(&envoy)
            .args(["--mode", "validate", "--log-level", "warning", "-c"])
            .arg(&file)
            .output()
            .expect("Envoy starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {said}");
        assert!(
            !said.to_lowercase().contains("deprecated"),
            "{name}: {said}"
        );
    }
}

/// An application that gives one answer a connection, and closes its port after the last.
fn canned(answers: &[String]) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let answers = answers.to_vec();
    thread::spawn(move || {
        for answer in answers {
            let (mut stream, _): (TcpStream, _) = listener.accept().expect("a connection");
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    port
}

#[test]
fn probes_are_answered_before_envoy_is_ready_and_failed_handlers_break_off() {
    let Some(envoy) = envoy::find_or_skip() else {
        return;
    };
    let ok = "HTTP/1.1 204 No Content\r\n\r\n".to_owned();
    let application = canned(&[ok]);
    let gone = sidecar::free_ports::<1>()[0];
    let probes = format!(
        r#"{{"/app-health/web/livez":{{"httpGet":{{"port":{application}}}}},
            "/app-health/web/readyz":{{"tcpSocket":{{"port":{gone}}}}},
            "/app-lifecycle/web/prestop":{{"httpGet":{{"port":{gone}}}}}}}"#
    );
    let sidecar = Sidecar::start(&envoy, &[("MALHA_PROBES", &probes)]);
    let port = sidecar.ports.agent;
    until("listening", || {
        try_get(port, "/").map(drop).ok_or_else(|| "no".to_owned())
    });
    assert_eq!(get(port, "/app-health/web/livez").0, 204);
    let (status, text) = get(port, "/app-health/web/readyz");
    assert_eq!(status, 503);
    assert!(text.contains("refuses connections"), "{text}");
    // Any answer at all would be a success to the kubelet.
    assert_eq!(try_get(port, "/app-lifecycle/web/prestop"), None);
    let (status, text) = get(port, "/app-health/other/livez");
    assert_eq!(status, 404);
    assert!(text.contains("handlers of web"), "{text}");
}
