//! `malha tour`: a standalone control plane that shows itself at work, by clients that nobody here wrote: curl and
//! openssl call its HTTPS ports as an API server and a workload would.
//!
//! The server and the walk run in one process, so nothing is left behind however it ends: the walk only reads the
//! addresses that the server announces.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, SystemTime},
};

use anstyle::Style;
use anyhow::{Context as _, anyhow};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::Parser as _;
use nix::sys::signal::{Signal, raise};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Cli, Exit, Failure, Terminal, Verb, exit::OrExit as _, serve, terminal::paint};
use crate::standalone::Directory;

const POD: &str = include_str!("../../manifests/samples/pod.yaml");
const NAMESPACE: &str = include_str!("../../manifests/samples/namespace.yaml");

/// Start a control plane here and watch it work: a pod is patched and a certificate signed, without a cluster.
///
/// Calls its own HTTPS ports with curl and openssl, says what to try next, and goes on serving until Ctrl-C.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where the control plane keeps its state; made where there is none.
    #[arg(long, value_name = "DIR", default_value = "mesh")]
    dir: PathBuf,
    /// End after the tour, with 0 where all went well.
    #[arg(long)]
    once: bool,
    /// Listen on any free ports instead of 15017, 15012 and 15014.
    #[arg(long)]
    free_ports: bool,
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    for program in ["curl", "openssl"] {
        let version = if program == "curl" {
            "--version"
        } else {
            "version"
        };
        call(Command::new(program).arg(version))
            .with_context(|| {
                format!(
                    "the tour needs {program}; install it, such as by apt-get install {program}"
                )
            })
            .or_exit(Exit::Usage)?;
    }
    let mut serve = serve_args(&args)?;
    serve.audit = Some(audit_file(&args.dir)?);
    let (tell, told) = mpsc::channel();
    let walk = Walk::new(&args, *terminal);
    let once = args.once;
    thread::spawn(move || {
        let walked = walk.walk();
        let go_on = walked.is_ok() && !once;
        // The receiver is there for as long as the process is.
        let _ = tell.send(walked);
        if !go_on {
            // The server ends as it does for everybody: it drains, and its ports are free again.
            let _ = raise(Signal::SIGTERM);
        }
    });
    let served = serve::run(serve, terminal).map_err(|failure| with_way_out(failure, &args))?;
    told.try_recv().unwrap_or(Ok(())).map(|()| served)
}

/// A busy port is the likeliest fault, and here it does not matter which ports are taken.
fn with_way_out(mut failure: Failure, args: &Args) -> Failure {
    let io = failure
        .error
        .chain()
        .find_map(|cause| cause.downcast_ref::<io::Error>());
    if io.is_some_and(|io| io.kind() == io::ErrorKind::AddrInUse) && !args.free_ports {
        failure.error = failure
            .error
            .context("try again with --free-ports (make run ARGS=--free-ports)");
    }
    failure
}

fn serve_args(args: &Args) -> Result<serve::Args, Failure> {
    let mut words: Vec<&OsStr> = ["malha", "serve", "--log", "warn", "--standalone"]
        .map(OsStr::new)
        .to_vec();
    words.push(args.dir.as_os_str());
    if args.free_ports {
        let flags = [
            "--webhook-addr=127.0.0.1:0",
            "--ca-addr=127.0.0.1:0",
            "--admin-addr=127.0.0.1:0",
            "--query-addr=127.0.0.1:0",
        ];
        words.extend(flags.map(OsStr::new));
    }
    match Cli::try_parse_from(words).or_exit(Exit::Usage)?.verb {
        Verb::Serve(serve) => Ok(serve),
        _ => unreachable!("the words say serve"),
    }
}

/// Where the audit records go, so that they do not stand in the middle of the story.
fn audit_file(directory: &Path) -> Result<File, Failure> {
    Directory::open(directory).or_exit(Exit::BadInput)?;
    let path = directory.join(AUDIT);
    let mut options = File::options();
    let opened = options.create(true).append(true).mode(0o600).open(&path);
    opened
        .with_context(|| format!("cannot open {}", path.display()))
        .or_exit(Exit::BadInput)
}

const AUDIT: &str = "audit.jsonl";

/// What calls the server, and where it leaves what it sends and gets.
struct Walk {
    dir: PathBuf,
    tour: PathBuf,
    malha: String,
    /// The announcement of an earlier server that was killed.
    stale: Option<(u64, SystemTime)>,
    once: bool,
    terminal: Terminal,
}

/// Where the server answers, as it announces it.
#[derive(Deserialize)]
struct Addresses {
    webhook: SocketAddr,
    ca: SocketAddr,
}

/// A server on a busy machine is ready in a second or two.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(5);

impl Walk {
    fn new(args: &Args, terminal: Terminal) -> Self {
        Self {
            tour: args.dir.join("tour"),
            malha: std::env::args()
                .next()
                .unwrap_or_else(|| "malha".to_owned()),
            stale: identity_of(&args.dir.join("addresses.json")),
            dir: args.dir.clone(),
            once: args.once,
            terminal,
        }
    }

    fn walk(mut self) -> Result<(), Failure> {
        let at = self.addresses().or_exit(Exit::Unreachable)?;
        let admission = self.admission(&at).or_exit(Exit::Refused)?;
        self.terminal.styled(&admission)?;
        let certificate = self.certificate(&at).or_exit(Exit::Refused)?;
        self.terminal.styled(&certificate)?;
        let rest = self.what_to_try(&at);
        self.terminal.styled(&rest)
    }

    fn addresses(&self) -> anyhow::Result<Addresses> {
        let file = self.dir.join("addresses.json");
        for _ in 0..PATIENCE.as_millis() / PAUSE.as_millis() {
            let found = identity_of(&file);
            if found.is_some() && found != self.stale {
                let text = fs::read(&file)?;
                return Ok(serde_json::from_slice(&text)?);
            }
            thread::sleep(PAUSE);
        }
        Err(anyhow!(
            "the server is not ready after {} s; start it alone to see why: {} serve --standalone {}",
            PATIENCE.as_secs(),
            self.malha,
            self.dir.display()
        ))
    }

    /// Creates a pod, as an API server would ask about it.
    fn admission(&self, at: &Addresses) -> anyhow::Result<String> {
        fs::create_dir_all(&self.tour)?;
        self.write("pod.yaml", POD)?;
        self.write("namespace.yaml", NAMESPACE)?;
        let pod: Value = serde_saphyr::from_str(POD)?;
        let review = review_of(&pod);
        let sent = self.write("review.json", &review.to_string())?;
        let url = format!("https://localhost:{}/inject/ns", at.webhook.port());
        let answer: Value =
            serde_json::from_slice(&self.curl(&url, "application/json", &sent, None)?)?;
        let response = &answer["response"];
        if response["allowed"] != true || response["patchType"] != "JSONPatch" {
            return Err(anyhow!(
                "the webhook did not patch the sample pod: {response}"
            ));
        }
        let patch = STANDARD.decode(response["patch"].as_str().unwrap_or_default())?;
        let operations: json_patch::Patch = serde_json::from_slice(&patch)?;
        let mut patched = pod.clone();
        json_patch::patch(&mut patched, &operations)?;
        let operations: Vec<Value> = serde_json::from_slice(&patch)?;
        let title = title("1. A pod is created in a namespace labelled istio-injection=enabled");
        let mut text = format!(
            "\n{title}\n   AdmissionReview of {} -> {url} -> {} ({} operations, {} bytes)\n",
            self.tour.join("pod.yaml").display(),
            response["auditAnnotations"]["reason"]
                .as_str()
                .unwrap_or("allowed"),
            operations.len(),
            patch.len(),
        );
        for operation in &operations {
            text.push_str(&format!("   {}\n", told(operation, &pod)));
        }
        Ok(text)
    }

    /// Makes a key and asks for a certificate, as a workload would.
    fn certificate(&self, at: &Addresses) -> anyhow::Result<String> {
        let file = |name: &str| self.tour.join(name);
        let (key, csr, chain, bundle) = (
            file("key.pem"),
            file("csr.pem"),
            file("chain.pem"),
            self.dir.join("bundle.pem"),
        );
        // It asks for much more than it will get.
        call(
            Command::new("openssl")
                .args([
                    "req",
                    "-new",
                    "-newkey",
                    "ec",
                    "-pkeyopt",
                    "ec_paramgen_curve:P-256",
                    "-nodes",
                ])
                .args([
                    "-subj",
                    "/CN=admin",
                    "-addext",
                    "subjectAltName=URI:spiffe://cluster.local/ns/kube-system/sa/admin",
                    "-addext",
                    "basicConstraints=CA:TRUE",
                ])
                .arg("-keyout")
                .arg(&key)
                .arg("-out")
                .arg(&csr),
        )?;
        let token = call(
            Command::new(std::env::current_exe()?)
                .args([
                    "token",
                    "--namespace",
                    "shop",
                    "--service-account",
                    "orders",
                    "--standalone",
                ])
                .arg(&self.dir),
        )?;
        let token = String::from_utf8(token)?;
        let url = format!("https://localhost:{}/v1/certificates", at.ca.port());
        let answer: Value = serde_json::from_slice(&self.curl(
            &url,
            "application/pkcs10",
            &csr,
            Some(token.trim()),
        )?)?;
        fs::write(
            &chain,
            answer["certificate_chain"]
                .as_str()
                .context("an answer without certificate_chain")?,
        )?;
        let verified = call(
            Command::new("openssl")
                .args(["verify", "-x509_strict", "-CAfile"])
                .arg(&bundle)
                .arg("-untrusted")
                .arg(&chain)
                .arg(&chain),
        )?;
        let shown = call(
            Command::new(std::env::current_exe()?)
                .args(["cert", "inspect", "--bundle"])
                .arg(&bundle)
                .arg(&chain),
        )?;
        let title = title(
            "2. A workload asks for its identity with the token of service account shop/orders",
        );
        Ok(format!(
            "\n{title}\n   openssl req -> {} -> {url} -> {}\n   the CSR asked for CN=admin, CA:TRUE and the identity of kube-system/admin: only its key was used\n   the audit record of it -> {}\n{}   $ openssl verify -x509_strict\n{}",
            csr.display(),
            answer["spiffe_id"].as_str().unwrap_or("no identity"),
            self.dir.join(AUDIT).display(),
            indented(&String::from_utf8_lossy(&shown)),
            indented(&String::from_utf8_lossy(&verified)),
        ))
    }

    fn what_to_try(&self, at: &Addresses) -> String {
        let Self { malha, .. } = self;
        let (dir, tour) = (self.dir.display(), self.tour.display());
        let (webhook, ca) = (at.webhook.port(), at.ca.port());
        let offline = format!(
            "   {malha} explain -f {tour}/pod.yaml -f {tour}/namespace.yaml\n   {malha} inject -f {tour}/pod.yaml | diff {tour}/pod.yaml -\n   {malha} cert inspect {tour}/chain.pem --bundle {dir}/bundle.pem -o wide\n   {malha} ca rotate --intermediate --standalone {dir}\n   {malha} ca status --standalone {dir}\n"
        );
        if self.once {
            return format!("\n{}\n{offline}", title("Try next"));
        }
        format!(
            "\n{}\n{offline}   curl --cacert {dir}/bundle.pem -H 'content-type: application/json' --data-binary @{tour}/review.json https://localhost:{webhook}/inject/ns\n   curl --cacert {dir}/bundle.pem -H 'content-type: application/pkcs10' -H \"authorization: Bearer $({malha} token -n shop -s orders --standalone {dir})\" --data-binary @{tour}/csr.pem https://localhost:{ca}/v1/certificates\n\nserving until Ctrl-C\n",
            title("Try next, in a second terminal"),
        )
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<PathBuf> {
        let path = self.tour.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Posts a file; anything but a 2xx is an error with the answer in it.
    fn curl(
        &self,
        url: &str,
        content_type: &str,
        body: &Path,
        token: Option<&str>,
    ) -> anyhow::Result<Vec<u8>> {
        let mut curl = Command::new("curl");
        curl.args([
            "--silent",
            "--show-error",
            "--fail-with-body",
            "--max-time",
            "10",
            "--noproxy",
            "*",
            "--cacert",
        ])
        .arg(self.dir.join("bundle.pem"))
        .args([
            "--header",
            &format!("content-type: {content_type}"),
            "--data-binary",
        ])
        .arg(format!("@{}", body.display()))
        .args(["--config", "-", url]);
        // Over standard input: the arguments of a process are seen by everybody.
        let config = token.map_or_else(String::new, |token| {
            format!("header = \"authorization: Bearer {token}\"\n")
        });
        call_with(&mut curl, config.as_bytes())
    }
}

/// What tells one file of a name from the next.
fn identity_of(file: &Path) -> Option<(u64, SystemTime)> {
    let found = fs::metadata(file).ok()?;
    Some((found.ino(), found.modified().ok()?))
}

/// What the API server sends when this pod is created (`admission.k8s.io/v1`).
fn review_of(pod: &Value) -> Value {
    let kind = json!({ "group": "", "version": "v1", "kind": "Pod" });
    let resource = json!({ "group": "", "version": "v1", "resource": "pods" });
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "8f2a3c1e-5b7d-4e6f-9a01-23456789abcd",
            "kind": kind,
            "resource": resource,
            "requestKind": kind,
            "requestResource": resource,
            "name": pod["metadata"]["name"],
            "namespace": pod["metadata"]["namespace"],
            "operation": "CREATE",
            "userInfo": { "username": "you" },
            "object": pod,
            "oldObject": null,
            "dryRun": false,
            "options": { "apiVersion": "meta.k8s.io/v1", "kind": "CreateOptions" },
        },
    })
}

/// One operation in one line: what, where, and what is there now.
fn told(operation: &Value, pod: &Value) -> String {
    let text = |field: &str| operation[field].as_str().unwrap_or_default();
    let path = text("path").replace("~1", "/").replace("~0", "~");
    let value = match text("op") {
        "replace" => {
            let before = pod.pointer(text("path")).map(brief).unwrap_or_default();
            format!("{before} -> {}", brief(&operation["value"]))
        }
        _ => brief(&operation["value"]),
    };
    format!("{:<7} {path}  {value}", text("op"))
}

/// A value on the rest of a line: containers and volumes by their names, the keys of labels and annotations, else JSON.
fn brief(value: &Value) -> String {
    const LONGEST: usize = 110;
    let whole = match value {
        Value::Array(items) if items.iter().all(|item| item["name"].is_string()) => {
            let names: Vec<_> = items.iter().map(brief).collect();
            names.join(", ")
        }
        Value::Object(_) if value["image"].is_string() => container(value),
        Value::Object(_) if value["name"].is_string() => name(value).to_owned(),
        Value::Object(entries)
            if entries.values().all(Value::is_string)
                && entries.keys().any(|key| key.contains('/')) =>
        {
            entries
                .keys()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(", ")
        }
        value => value.to_string(),
    };
    match whole.char_indices().nth(LONGEST) {
        None => whole,
        Some((end, _)) => format!("{}..", &whole[..end]),
    }
}

fn container(value: &Value) -> String {
    let context = &value["securityContext"];
    let ports: Vec<_> = value["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| port["containerPort"].to_string())
        .collect();
    let mut facts = vec![
        value["image"].as_str().unwrap_or_default().to_owned(),
        format!("uid {}", context["runAsUser"]),
    ];
    facts.extend(
        value["restartPolicy"]
            .as_str()
            .map(|_| "native sidecar".to_owned()),
    );
    facts.extend(
        context["capabilities"]["add"]
            .as_array()
            .map(|added| format!("capabilities {}", Value::from(added.clone()))),
    );
    facts.extend((!ports.is_empty()).then(|| format!("ports {}", ports.join(" "))));
    format!("{} ({})", name(value), facts.join(", "))
}

fn name(value: &Value) -> &str {
    value["name"].as_str().unwrap_or_default()
}

fn title(text: &str) -> String {
    paint(Style::new().bold(), text)
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("   {line}\n")).collect()
}

fn call(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    call_with(command, b"")
}

/// Runs a program to its end; what it printed, or why it failed in its own words.
fn call_with(command: &mut Command, input: &[u8]) -> anyhow::Result<Vec<u8>> {
    let name = command.get_program().display().to_string();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read its input says why itself.
        let _ = stdin.write_all(input);
    }
    let output = child
        .wait_with_output()
        .with_context(|| format!("cannot wait for {name}"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = [output.stderr, output.stdout]
        .map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned());
    Err(anyhow!(
        "{name} failed ({}): {}",
        output.status,
        said.join(" ").trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_told_in_one_line() {
        let pod = json!({ "spec": { "containers": [{ "name": "a", "readinessProbe": { "httpGet": { "port": 1 } } }] } });
        let cases = [
            (
                json!({ "op": "add", "path": "/spec/volumes", "value": [{ "name": "x" }, { "name": "y" }] }),
                "add     /spec/volumes  x, y",
            ),
            (
                json!({ "op": "add", "path": "/metadata/labels/a~1b~0c", "value": "d" }),
                "add     /metadata/labels/a/b~c  \"d\"",
            ),
            (
                json!({ "op": "replace", "path": "/spec/containers/0/readinessProbe/httpGet", "value": { "port": 2 } }),
                "replace /spec/containers/0/readinessProbe/httpGet  {\"port\":1} -> {\"port\":2}",
            ),
        ];
        for (operation, want) in cases {
            assert_eq!(told(&operation, &pod), want);
        }
    }

    #[test]
    fn the_sample_is_a_pod_of_the_sample_namespace() {
        let pod: Value = serde_saphyr::from_str(POD).expect("YAML");
        let namespace: Value = serde_saphyr::from_str(NAMESPACE).expect("YAML");
        assert_eq!(pod["metadata"]["namespace"], namespace["metadata"]["name"]);
    }
}
