//! A real Kubernetes with a node, and Malha on it as users install it: images of this build, `malha install --apply`. A
//! kubelet starts what the injector wrote.
//!
//! ```ignore
//! #[tokio::test(flavor = "multi_thread")]
//! async fn something_holds_on_a_real_node() {
//!     let Some(node) = node::shared().await else { return };   // says why when it skips
//!     let shop = node.namespace("shop", &[("istio-injection", "enabled")]).await;
//!     shop.apply(include_str!("node/..")).await;
//!     shop.ready("pod/web").await;                             // or fails with Events, exit codes and logs
//!     let answer = shop.exec("pod/client", "app", &["curl", "-s", "http://web"]).await;
//!     ..
//! }   // the namespace goes; where the test failed, what happened in it is printed first
//! ```
//! It takes root, because a node is made of namespaces and cgroups. `MALHA_CLUSTER=DIR` uses the one that `make
//! cluster-up` started there instead of starting another; `MALHA_IMAGES=DIR` the archives that `make image` left there
//! instead of packing the debug programs, which is what continuous integration tests: the same code, without the quarter
//! of an hour that optimising it takes. `MALHA_RIG_KEEP=1` leaves the cluster for looking around.
//!
//! Images for workloads: `rig.local/agnhost:1` (server and client of Kubernetes' own tests) and `rig.local/tools:1`
//! (busybox, curl, openssl, tcpdump, nft); [`Node::load_debian`] brings in others.
//! Pods have addresses of both families; those with the annotation `rig.local/families: ipv6` have IPv6 alone.

#![allow(dead_code, reason = "a harness serves tests that come and go")]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use tokio::sync::OnceCell;

use crate::{envoy, rig};

/// How long a pod may take to become ready. A machine whose cores are all busy takes ten times the usual two seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server `web` behind a Service of its name, and a pod `client` with a shell and curl.
pub(crate) const WEB_AND_CLIENT: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: rig.local/agnhost:1
    args: [netexec, --http-port=8080]
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: client, image: "rig.local/tools:1", command: [sleep, "100000"]}
"#;

/// The node that the tests of this binary share, with Malha on it.
///
/// `None` without root, without the programs or without Envoy: the test is skipped, and standard error says why; with
/// `CI=true` it fails instead.
pub(crate) async fn shared() -> Option<&'static Node> {
    static SHARED: OnceCell<Result<Node, String>> = OnceCell::const_new();
    let envoy = match ready_to_start() {
        Ok(envoy) => envoy,
        Err(why) => {
            assert!(!rig::in_ci(), "{why}");
            rig::skip(&why);
            return None;
        }
    };
    let started = SHARED
        .get_or_init(|| async {
            let start = tokio::task::spawn_blocking(move || Node::start(&envoy));
            let started = start.await.map_err(|error| error.to_string())?;
            started.map_err(|error| format!("{error:#}"))
        })
        .await;
    match started {
        Ok(node) => Some(node),
        Err(error) => panic!("the node did not start: {error}"),
    }
}

/// Where Envoy is, if everything is there that a node needs.
fn ready_to_start() -> Result<PathBuf, String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("root is needed: a node is made of namespaces, mounts and cgroups".to_owned());
    }
    let build = repository().join("tests/cluster/programs/build");
    let output = Command::new(build).arg("--where").output();
    let output = output.map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    envoy::find()
}

/// A cluster with a node. It ends with this process, however that ends.
pub(crate) struct Node {
    dir: PathBuf,
    /// What the shell that removes the cluster waits for; `None` where the cluster is not ours.
    _alive: Option<ChildStdin>,
    names: AtomicU32,
}

impl Node {
    fn start(envoy: &Path) -> Result<Self> {
        let (dir, alive) = match std::env::var_os("MALHA_CLUSTER") {
            Some(dir) => (PathBuf::from(dir), None),
            None => {
                let dir = tempfile::Builder::new().prefix("malha-node-").tempdir()?;
                let dir = dir.keep();
                let alive = hire_a_janitor(&dir)?;
                succeed(script("up").arg(&dir))?;
                (dir, Some(alive))
            }
        };
        let node = Self {
            dir,
            _alive: alive,
            names: AtomicU32::new(0),
        };
        node.load(&images(&node.dir, envoy)?)?;
        node.install()
            .with_context(|| node.what_happened("malha-system"))?;
        Ok(node)
    }

    /// What the README says.
    fn install(&self) -> Result<()> {
        let mut install = Command::new(env!("CARGO_BIN_EXE_malha"));
        install.args(["install", "--apply", "--kubeconfig"]);
        install.arg(self.kubeconfig());
        if self._alive.is_none() {
            // Another build may be running there under the same name, applied by somebody else.
            succeed(install.arg("--force"))?;
            let restart = [
                "rollout",
                "restart",
                "--namespace=malha-system",
                "deployment/malha",
            ];
            succeed(self.kubectl_command().args(restart))?;
        }
        succeed(&mut install)?;
        Ok(())
    }

    /// Brings OCI archives into the node.
    ///
    /// # Errors
    /// containerd's own words.
    pub(crate) fn load(&self, archives: &[PathBuf]) -> Result<()> {
        succeed(script("load").arg(&self.dir).args(archives))?;
        Ok(())
    }

    /// Makes the node know Malha's images by the names of a registry, too: as if they had been pulled from there.
    pub(crate) fn pull_from(&self, registry: &str) {
        let pid = std::fs::read_to_string(self.dir.join("n1/pid")).expect("the node runs");
        let programs = std::fs::read_to_string(self.dir.join("programs")).expect("its programs");
        for image in ["malha", "malha-init", "malha-proxy"] {
            let image = format!("{image}:{}", env!("CARGO_PKG_VERSION"));
            let mut tag = Command::new("nsenter");
            tag.args(["-t", pid.trim(), "-m", "-n", "-p"])
                .arg(Path::new(programs.trim()).join("ctr"))
                .args(["--namespace", "k8s.io", "images", "tag", "--force"])
                .arg(format!("docker.io/library/{image}"))
                .arg(format!("{registry}/{image}"));
            succeed(&mut tag).expect("the node has the image");
        }
    }

    /// Makes an image of Debian's packages, once on this machine, and brings it in as `rig.local/NAME:1`.
    ///
    /// `None` where there is no Debian to get them from: as with [`shared`].
    pub(crate) async fn load_debian(
        &'static self,
        name: &'static str,
        packages: &'static [&str],
    ) -> Option<()> {
        let load = move || {
            let made = script("debian").arg(name).args(packages).output();
            let made = made.expect("tests/cluster/node/debian starts");
            let error = String::from_utf8_lossy(&made.stderr).trim().to_owned();
            if made.status.code() == Some(69) {
                assert!(!rig::in_ci(), "{error}");
                rig::skip(&error);
                return None;
            }
            assert!(made.status.success(), "no image of {packages:?}: {error}");
            let archive = String::from_utf8_lossy(&made.stdout).trim().into();
            self.load(&[archive]).expect("the node takes the image");
            Some(())
        };
        let loaded = tokio::task::spawn_blocking(load).await;
        loaded.expect("no panic")
    }

    /// The kubeconfig of the user with all rights; it works from everywhere on this machine.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// A client with all rights. Make one in each test: its connections belong to the runtime it was made in.
    pub(crate) async fn client(&self) -> kube::Client {
        rig::client(&self.kubeconfig()).await
    }

    /// Runs kubectl with all rights and gives its standard output.
    ///
    /// # Panics
    /// kubectl does not succeed.
    pub(crate) async fn kubectl(&self, args: &[&str]) -> String {
        let output = self.try_kubectl(args, None).await;
        assert!(
            output.status.success(),
            "kubectl {}: {}{}",
            args.join(" "),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs kubectl with all rights, whatever comes of it; `input` is its standard input.
    pub(crate) async fn try_kubectl(&self, args: &[&str], input: Option<&str>) -> Output {
        let mut kubectl = self.kubectl_command();
        kubectl.args(args);
        rig::run(kubectl.into(), input).await
    }

    fn kubectl_command(&self) -> Command {
        let mut kubectl = Command::new(self.dir.join("kubectl"));
        kubectl.env("HOME", &self.dir); // the discovery cache of another cluster must not answer for this one
        kubectl
    }

    /// A program of this machine in the node's network: addresses of pods and Services are reached from there, and
    /// `tcpdump -i any` sees what crosses between pods.
    pub(crate) fn program_inside(&self, program: &str) -> Command {
        let mut nsenter = Command::new("nsenter");
        nsenter
            .arg(format!("--net={}", self.network().display()))
            .arg("--")
            .arg(program);
        nsenter
    }

    /// Runs `work` on a thread that is in the node's network. A runtime that is built there stays there.
    ///
    /// # Panics
    /// `work` does, or the network cannot be entered.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let network = File::open(self.network()).expect("the node's network");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(network, CloneFlags::CLONE_NEWNET).expect("entering the node's network");
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn network(&self) -> PathBuf {
        let pid = std::fs::read_to_string(self.dir.join("n1/pid")).expect("the node runs");
        PathBuf::from(format!("/proc/{}/ns/net", pid.trim()))
    }

    /// Makes a namespace with a name of its own that begins with `prefix`, and waits until pods may be made in it.
    pub(crate) async fn namespace(
        &'static self,
        prefix: &str,
        labels: &[(&str, &str)],
    ) -> Namespace {
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        // The process too: a cluster of MALHA_CLUSTER sees more than one run.
        let name = format!("{prefix}-{}-{number}", std::process::id());
        let labels: serde_json::Map<_, _> = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).into()))
            .collect();
        let namespace = serde_json::json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels},
        });
        let created = self
            .try_kubectl(&["create", "-f", "-"], Some(&namespace.to_string()))
            .await;
        assert!(created.status.success(), "{created:?}");
        rig::eventually(PATIENCE, "ServiceAccount default", || async {
            let account = ["get", "serviceaccount", "default", "--namespace", &name];
            let output = self.try_kubectl(&account, None).await;
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            output.status.success().then_some(()).ok_or(error)
        })
        .await;
        Namespace { node: self, name }
    }

    /// What a reader of a failed test wants to see of a namespace: pods, why containers ended, Events, logs.
    pub(crate) fn what_happened(&self, namespace: &str) -> String {
        let kubectl = |args: &[&str]| {
            let output = self
                .kubectl_command()
                .args(["--namespace", namespace])
                .args(args)
                .stdin(Stdio::null())
                .output();
            output.map_or_else(
                |error| error.to_string(),
                |output| {
                    String::from_utf8_lossy(&output.stdout).into_owned()
                        + &String::from_utf8_lossy(&output.stderr)
                },
            )
        };
        let mut told = format!("-- namespace {namespace} --\n");
        told += &kubectl(&["get", "pods,services,endpointslices", "-o", "wide"]);
        let states = "{range .items[*]}{.metadata.name}{range .status.initContainerStatuses[*]} {.name}: {.state}{end}\
                      {range .status.containerStatuses[*]} {.name}: {.state}{end}{\"\\n\"}{end}";
        told += &kubectl(&["get", "pods", "-o", &format!("jsonpath={states}")]);
        told += &kubectl(&["get", "events", "--sort-by=.lastTimestamp"]);
        for pod in kubectl(&["get", "pods", "-o", "name"]).lines() {
            told += &format!("-- logs of {pod} --\n");
            told += &kubectl(&["logs", pod, "--all-containers", "--prefix", "--tail=60"]);
        }
        told
    }
}

/// A place for a test. It goes when it is dropped, and in a failed test tells what happened in it before.
pub(crate) struct Namespace {
    node: &'static Node,
    name: String,
}

impl Namespace {
    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `kubectl apply` of YAML documents, in this namespace.
    pub(crate) async fn apply(&self, documents: &str) {
        let applied = self.try_apply(documents).await;
        assert!(
            applied.status.success(),
            "{}",
            String::from_utf8_lossy(&applied.stderr)
        );
    }

    /// [`Namespace::apply`] for when a refusal or a warning is the point.
    pub(crate) async fn try_apply(&self, documents: &str) -> Output {
        self.try_kubectl(&["apply", "-f", "-"], Some(documents))
            .await
    }

    /// Runs kubectl in this namespace and gives its standard output; panics as [`Node::kubectl`].
    pub(crate) async fn kubectl(&self, args: &[&str]) -> String {
        self.node.kubectl(&self.with_namespace(args)).await
    }

    /// Runs kubectl in this namespace, whatever comes of it.
    pub(crate) async fn try_kubectl(&self, args: &[&str], input: Option<&str>) -> Output {
        self.node
            .try_kubectl(&self.with_namespace(args), input)
            .await
    }

    fn with_namespace<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        let mut all = vec!["--namespace", self.name.as_str()];
        all.extend(args);
        all
    }

    /// Waits until pods are ready (`pod/NAME`), or a Deployment or such is rolled out (`deployment/NAME`).
    pub(crate) async fn ready(&self, what: &str) {
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        if what.starts_with("pod/") {
            let args = ["wait", "--for=condition=Ready", &timeout, what];
            self.kubectl(&args).await;
        } else {
            self.kubectl(&["rollout", "status", &timeout, what]).await;
        }
    }

    /// Writes a file in a container that has a shell.
    pub(crate) async fn put(&self, pod: &str, container: &str, path: &str, text: &str) {
        let write = format!("cat >{path}");
        let args = [
            "exec",
            "-i",
            pod,
            "--container",
            container,
            "--",
            "sh",
            "-c",
        ];
        let written = self
            .try_kubectl(&[&args[..], &[&write]].concat(), Some(text))
            .await;
        assert!(written.status.success(), "{path}: {written:?}");
    }

    /// Runs a command in a container and gives what it printed; `Err` is what it said when it failed, and its status.
    pub(crate) async fn exec(
        &self,
        pod: &str,
        container: &str,
        command: &[&str],
    ) -> Result<String, String> {
        let mut args = vec!["exec", pod, "--container", container, "--"];
        args.extend(command);
        let output = self.try_kubectl(&args, None).await;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            Ok(said)
        } else {
            let error = String::from_utf8_lossy(&output.stderr);
            Err(format!("{}: {said}{error}", output.status))
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "{}", self.node.what_happened(&self.name));
        }
        if !rig::process::keep() {
            let delete = ["delete", "namespace", &self.name, "--wait=false"];
            let _ = self.node.kubectl_command().args(delete).output();
        }
    }
}

/// The first process of a container or a pod, by the id or uid that its cgroup is named after, as this machine numbers it.
pub(crate) fn process_of(id: &str) -> Option<u32> {
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let of_id = processes.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let cgroup = std::fs::read_to_string(entry.path().join("cgroup")).ok()?;
        cgroup.contains(id).then_some(pid)
    });
    of_id.min()
}

/// Starts the shell that removes the cluster when this process is gone, for whatever reason: it waits for the end of a
/// pipe whose other end only we hold.
fn hire_a_janitor(dir: &Path) -> Result<ChildStdin> {
    let keep = if rig::process::keep() {
        "echo left in $1 >&2; exit"
    } else {
        ":"
    };
    let mut shell = Command::new("/bin/sh");
    shell
        .args([
            "-c",
            &format!("read -r _; {keep}; \"$0\" \"$1\"; rm -rf \"$1\""),
        ])
        .arg(script("down").get_program())
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    // Ctrl-C is for the test, not for the one who cleans up after it.
    std::os::unix::process::CommandExt::process_group(&mut shell, 0);
    let mut shell = shell.spawn().context("cannot start /bin/sh")?;
    shell.stdin.take().context("stdin of the janitor")
}

/// The archives: those of `MALHA_IMAGES`, or the programs of this build packed into `dir`.
fn images(dir: &Path, envoy: &Path) -> Result<Vec<PathBuf>> {
    let out = match std::env::var_os("MALHA_IMAGES") {
        Some(given) => PathBuf::from(given),
        None => {
            let out = dir.join("images");
            let built = Path::new(env!("CARGO_BIN_EXE_malha"));
            let mut build = Command::new(repository().join("images/build"));
            build.arg("--programs").args(built.parent());
            succeed(build.arg("--envoy").arg(envoy).arg("--out").arg(&out))?;
            out
        }
    };
    let names = ["malha", "malha-init", "malha-proxy"];
    Ok(names
        .map(|name| out.join(name).with_extension("tar"))
        .into())
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn script(name: &str) -> Command {
    Command::new(repository().join("tests/cluster/node").join(name))
}

/// Runs a program to its end; an error holds all that it said.
fn succeed(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} ended with {}: {said}{error}", output.status);
    }
    Ok(said)
}
