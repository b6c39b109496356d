//! The operator's verbs, run as an operator runs them. What they print stands in `tests/golden/cli/*.trycmd`; `make
//! golden` writes those anew.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

#[test]
fn transcripts() {
    trycmd::TestCases::new()
        .env("LC_ALL", "C.UTF-8")
        .env("NO_COLOR", "1")
        .case("tests/golden/cli/*.trycmd");
}

#[test]
fn what_is_injected_is_taken_back_as_data() {
    let stream = workloads();
    let injected = stdout(malha(["inject", "-f", "-"], &stream));
    assert_eq!(
        injected.matches("name: malha-proxy").count(),
        9,
        "{injected}"
    );
    let restored = stdout(malha(["uninject", "-f", "-"], &injected));
    assert_eq!(documents(&restored), documents(&stream));
    // and once injected, a second time changes nothing
    assert_eq!(stdout(malha(["inject", "-f", "-"], &injected)), injected);
}

#[test]
fn the_patch_leads_where_the_manifests_stand() {
    let stream = workloads();
    let patches = stdout(malha(["inject", "-f", "-", "-o", "patch"], &stream));
    let injected = stdout(malha(["inject", "-f", "-", "-o", "json"], &stream));
    let patches: Vec<json_patch::Patch> = serde_json::Deserializer::from_str(&patches)
        .into_iter()
        .collect::<Result<_, _>>()
        .expect("patches");
    let injected = objects(&injected);
    let mut patched = documents(&stream);
    assert_eq!(patches.len(), patched.len());
    for (document, patch) in patched.iter_mut().zip(&patches) {
        json_patch::patch(document, patch).expect("applies");
    }
    assert_eq!(patched, injected);
}

#[test]
fn yaml_and_json_in_give_the_same_out() {
    let yaml = workloads();
    let json: String = documents(&yaml)
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("\n");
    let args = ["inject", "-f", "-", "-o", "json"];
    assert_eq!(
        objects(&stdout(malha(args, &yaml))),
        objects(&stdout(malha(args, &json)))
    );
}

#[test]
fn strings_that_kubectl_would_read_as_something_else_stay_strings() {
    let values = [
        "yes",
        "on",
        "0755",
        "1e3",
        "1_000",
        "2001-12-14",
        "null",
        "~",
        "12:30",
        "line\nline\n",
        " x",
        "a: b",
        "p\u{7f}q\u{1}\u{1b}[1m",
    ];
    let env: Vec<_> = values
        .iter()
        .enumerate()
        .map(|(index, value)| json!({ "name": format!("V{index}"), "value": value }))
        .collect();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "strings", "labels": { "y": "n", "on": "off" } },
        "spec": { "containers": [{ "name": "app", "image": "example.com/app:1", "env": env }] },
    });
    let injected = stdout(malha(["inject", "-f", "-"], &pod.to_string()));
    let read = &documents(&injected)[0];
    assert_eq!(read["spec"]["containers"][0]["env"], json!(env));
    assert_eq!(read["metadata"]["labels"]["y"], "n");
    for unquoted in ["value: yes\n", "value: 0755\n", "  y: n\n", "  on: off\n"] {
        assert!(!injected.contains(unquoted), "{unquoted:?} in\n{injected}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_fault() {
    for args in [
        &["completions", "bash"][..],
        &["--help"],
        &["inject", "-f", "tests/golden/cli/inject.in/optout.yaml"],
    ] {
        let mut child = command(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("malha starts");
        drop(child.stdout.take());
        let mut said = String::new();
        child
            .stderr
            .take()
            .expect("piped")
            .read_to_string(&mut said)
            .expect("text");
        let status = child.wait().expect("malha ends");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
        assert_eq!(status.code(), Some(0), "{args:?}: {said}");
    }
}

#[test]
fn colour_and_marks_follow_the_terminal_and_the_locale() {
    let explain = |variables: &[(&str, &str)]| {
        let mut command = command(["explain", "-f", "tests/golden/cli/explain.in/pods.yaml"]);
        for name in ["LC_ALL", "LC_CTYPE", "LANG", "NO_COLOR", "CLICOLOR_FORCE"] {
            command.env_remove(name);
        }
        command.envs(variables.iter().copied());
        stdout(command.output().expect("malha runs"))
    };
    let plain = explain(&[("LANG", "C.UTF-8")]);
    assert!(plain.contains("√ ") && !plain.contains('\u{1b}'), "{plain}");
    assert!(explain(&[("LANG", "C.UTF-8"), ("CLICOLOR_FORCE", "1")]).contains("\u{1b}["));
    let ascii = explain(&[("LANG", "C")]);
    assert!(ascii.contains("  ok ") && !ascii.contains('√'), "{ascii}");
}

#[test]
fn completions_are_scripts_that_their_shell_can_read() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = stdout(malha(["completions", shell], ""));
        assert!(script.contains("needs-renewal"), "{shell}");
    }
    let script = stdout(malha(["completions", "bash"], ""));
    let read = run(Command::new("bash").arg("-n"), &script);
    assert!(read.status.success(), "{}", text(&read.stderr));
}

#[test]
fn a_cluster_that_does_not_answer_is_named_and_ends_with_69() {
    let directory = tempfile::tempdir().expect("a directory");
    let kubeconfig = directory.path().join("kubeconfig");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .expect("a port");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{ "name": "c", "cluster": { "server": format!("http://{nobody}") } }],
        "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        "users": [{ "name": "u", "user": {} }],
    });
    fs::write(&kubeconfig, config.to_string()).expect("written");
    let kubeconfig = kubeconfig.to_str().expect("UTF-8");
    for verb in [&["status"][..], &["rotate", "--intermediate", "--if-due"]] {
        let args = [&["ca"], verb, &["--kubeconfig", kubeconfig]].concat();
        let output = command(&args).output().expect("malha runs");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(69), "{said}");
        assert!(
            said.contains("Secret malha-system/malha-ca cannot be reached"),
            "{said}"
        );
    }
}

/// The tour calls the HTTPS ports by curl and openssl; what it leaves behind serves the other verbs.
#[test]
fn the_tour_shows_a_patch_and_a_certificate_and_the_verbs_work_on_what_it_leaves() {
    let directory = tempfile::tempdir().expect("a directory");
    let mesh = directory.path().join("mesh");
    let mesh = mesh.to_str().expect("UTF-8");
    let tour = command(["tour", "--once", "--free-ports", "--dir", mesh])
        .output()
        .expect("malha runs");
    let said = text(&tour.stderr);
    assert!(said.contains("malha serves from"), "{said}");
    assert!(!said.contains('{') && !said.contains("try:"), "{said}");
    let shown = stdout(tour);
    for words in [
        "Injected",
        "add     /spec/initContainers/1  malha-proxy",
        "spiffe://cluster.local/ns/shop/sa/orders",
        "chain.pem: OK",
    ] {
        assert!(shown.contains(words), "no {words:?} in\n{shown}");
    }
    assert!(!shown.contains("kube-system/sa/admin\n"), "{shown}");

    let file = |name: &str| format!("{mesh}/{name}");
    let audit = file("audit.jsonl");
    let mode = fs::metadata(&audit).expect("records").mode();
    assert_eq!(mode & 0o777, 0o600);
    let records = fs::read_to_string(&audit).expect("records");
    let issued = objects(&records)
        .into_iter()
        .filter(|record| record.to_string().contains("ns/shop/sa/orders"))
        .count();
    assert_eq!(issued, 1, "{records}");
    assert!(
        malha::signing::verify_chain(records.lines()).is_ok_and(|count| count > 0),
        "{records}"
    );
    let (chain, bundle) = (file("tour/chain.pem"), file("bundle.pem"));
    let inspected = stdout(malha(
        ["cert", "inspect", &chain, "--bundle", &bundle, "-o", "json"],
        "",
    ));
    let report: Value = serde_json::from_str(&inspected).expect("JSON");
    assert_eq!(
        report["certificates"][0]["names"],
        json!(["spiffe://cluster.local/ns/shop/sa/orders"])
    );
    assert_eq!(report["verdict"]["verified"], true);
    assert_eq!(
        stdout(malha(["cert", "inspect", &chain, "-o", "pem"], "")),
        fs::read_to_string(&chain).expect("a chain")
    );
    let stranger =
        rcgen::generate_simple_self_signed(["stranger".to_owned()]).expect("a certificate");
    let other = file("tour/stranger.pem");
    fs::write(&other, stranger.cert.pem()).expect("written");
    let strangers = malha(["cert", "inspect", &chain, "--bundle", &other], "");
    assert_eq!(
        strangers.status.code(),
        Some(1),
        "{}",
        text(&strangers.stdout)
    );

    let renewal = |expires_in: &str| {
        malha(
            ["cert", "needs-renewal", &chain, "--expires-in", expires_in],
            "",
        )
        .status
        .code()
    };
    assert_eq!(renewal("50%"), Some(1));
    assert_eq!(renewal("25h"), Some(0));

    let status = || -> Value {
        let shown = stdout(malha(
            ["ca", "status", "--standalone", mesh, "-o", "json"],
            "",
        ));
        assert!(
            !shown.contains("PRIVATE") && !shown.contains("\"key\""),
            "{shown}"
        );
        serde_json::from_str(&shown).expect("JSON")
    };
    let signs = |status: &Value| -> Value {
        let all = status["authorities"][0]["intermediates"]
            .as_array()
            .expect("a list")
            .clone();
        all.into_iter()
            .find(|intermediate| intermediate["state"] == "active")
            .expect("one signs")["keyId"]
            .clone()
    };
    let before = status();
    let rotate = |flags: &[&str]| {
        malha(
            [&["ca", "rotate", "--standalone", mesh], flags].concat(),
            "",
        )
    };
    let refused = rotate(&[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains("root"),
        "{}",
        text(&refused.stderr)
    );
    assert!(stdout(rotate(&["--intermediate", "--if-due"])).contains("nothing is due"));
    assert!(
        stdout(rotate(&["--intermediate", "--dry-run"]))
            .starts_with("dry run: nothing was written")
    );
    assert_eq!(status()["authorities"], before["authorities"]);
    stdout(rotate(&["--intermediate"]));
    assert_ne!(signs(&status()), signs(&before));
    assert_eq!(
        status()["generation"],
        before["generation"],
        "no trust has changed"
    );

    let token = stdout(malha(
        ["token", "--standalone", mesh, "-n", "shop", "-s", "cart"],
        "",
    ));
    assert_eq!(token.trim().split('.').count(), 3, "{token}");
    for (flags, code) in [
        (["-n", "shop", "-s", "Not_A_Name"], 64),
        (["-n", "..", "-s", "cart"], 64),
    ] {
        let output = malha([&["token", "--standalone", mesh][..], &flags].concat(), "");
        assert_eq!(
            output.status.code(),
            Some(code),
            "{flags:?}: {}",
            text(&output.stderr)
        );
    }
    let forever = malha(
        [
            "token",
            "--standalone",
            mesh,
            "-n",
            "shop",
            "-s",
            "cart",
            "--ttl",
            "48h",
        ],
        "",
    );
    assert_eq!(forever.status.code(), Some(64), "{}", text(&forever.stderr));
}

#[test]
fn a_busy_port_is_named_with_a_way_out() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let directory = tempfile::tempdir().expect("a directory");
    let mesh = directory.path().join("mesh");
    let args = [
        "serve",
        "--webhook-addr",
        &address,
        "--ca-addr",
        "127.0.0.1:0",
        "--admin-addr",
        "127.0.0.1:0",
        "--query-addr",
        "127.0.0.1:0",
        "--standalone",
    ];
    let output = command(args).arg(&mesh).output().expect("malha runs");
    assert_eq!(output.status.code(), Some(70));
    assert!(
        text(&output.stderr).contains(&format!("cannot listen on {address}")),
        "{}",
        text(&output.stderr)
    );
}

/// Every kind with a pod template, a List, and what passes unchanged.
fn workloads() -> String {
    let template = json!({
        "metadata": { "labels": { "app": "web" } },
        "spec": {
            "restartPolicy": "Never",
            "initContainers": [{ "name": "setup", "image": "example.com/setup:1" }],
            "containers": [{
                "name": "web",
                "image": "example.com/web:1",
                "ports": [{ "name": "http", "containerPort": 8080 }],
                "readinessProbe": { "httpGet": { "path": "/ready", "port": "http" }, "periodSeconds": 7 },
            }],
        },
    });
    let named = |name: &str| json!({ "name": name, "namespace": "shop" });
    let workload = |api: &str, kind: &str| json!({ "apiVersion": api, "kind": kind, "metadata": named("web"), "spec": { "template": template } });
    let mut pod = template.clone();
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["name"] = "web".into();
    let mut all = vec![pod.clone()];
    for kind in ["Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"] {
        all.push(workload("apps/v1", kind));
    }
    all.push(workload("v1", "ReplicationController"));
    all.push(workload("batch/v1", "Job"));
    all.push(json!({ "apiVersion": "batch/v1", "kind": "CronJob", "metadata": named("web"), "spec": { "jobTemplate": { "spec": { "template": template } } } }));
    all.push(json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": named("web"), "data": { "y": "n", "0755": "a\nb\n" } }));
    all.push(json!({ "apiVersion": "v1", "kind": "List", "items": [{ "apiVersion": "v1", "kind": "Service", "metadata": named("web") }, pod] }));
    all.iter()
        .map(|object| format!("---\n{object}\n"))
        .collect()
}

fn documents(stream: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(stream).expect("YAML")
}

/// JSON, one object after the other.
fn objects(stream: &str) -> Vec<Value> {
    let objects = serde_json::Deserializer::from_str(stream).into_iter();
    objects.collect::<Result<_, _>>().expect("objects")
}

fn command<I: IntoIterator<Item = A>, A: AsRef<std::ffi::OsStr>>(args: I) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_malha"));
    command
        .args(args)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")));
    command
}

fn malha<I: IntoIterator<Item = A>, A: AsRef<std::ffi::OsStr>>(args: I, input: &str) -> Output {
    run(&mut command(args), input)
}

fn run(command: &mut Command, input: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    // Who does not read its input says why itself.
    let _ = child
        .stdin
        .take()
        .expect("piped")
        .write_all(input.as_bytes());
    child.wait_with_output().expect("it ends")
}

/// What was printed, of a verb that ended well.
fn stdout(output: Output) -> String {
    assert!(
        output.status.success(),
        "{}: {}",
        output.status,
        text(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
