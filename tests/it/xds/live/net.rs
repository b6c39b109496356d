//! Network namespaces on one bridge. Everything goes when [`Net`] is dropped.

use std::{
    fs::File,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use http_body_util::Full;
use hyper::{Response, body::Bytes, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::super::validate;

/// As `malha-init` installs it, without what users may set: outbound to 15001, inbound to 15006, the proxy's own group
/// exempt, except where a pod was sent to itself.
const RULES: &str = "
table ip malha {
  chain output {
    type nat hook output priority -100;
    meta skgid 1337 oifname lo ip daddr != 127.0.0.0/8 ip saddr != 127.0.0.6 meta l4proto tcp redirect to :15006
    meta skgid 1337 return
    oifname lo ip daddr 127.0.0.0/8 return
    meta l4proto tcp redirect to :15001
  }
  chain prerouting {
    type nat hook prerouting priority -100;
    meta l4proto tcp redirect to :15006
  }
}
table ip6 malha {
  chain output {
    type nat hook output priority -100;
    meta skgid 1337 oifname lo ip6 daddr != ::1 ip6 saddr != ::6 meta l4proto tcp redirect to :15006
    meta skgid 1337 return
    oifname lo ip6 daddr ::1 return
    meta l4proto tcp redirect to :15001
  }
  chain prerouting {
    type nat hook prerouting priority -100;
    meta l4proto tcp redirect to :15006
  }
}
";

pub(super) struct Net {
    /// Makes names of this test's own.
    prefix: String,
    directory: tempfile::TempDir,
}

impl Net {
    /// `pods` get 10.244.77.1, .2 and so on; `outside` is the bridge's own side, .254.
    pub(super) fn new_or_skip(pods: [&str; 2]) -> Option<Self> {
        let programs = ["ip", "nft", "setpriv", "nsenter", "curl", "openssl"];
        let missing = programs.iter().find(|program| {
            let found = Command::new("sh")
                .args(["-c", &format!("command -v {program}")])
                .output();
            !found.is_ok_and(|found| found.status.success())
        });
        let why = match missing {
            _ if !nix::unistd::Uid::effective().is_root() => {
                "root is needed for network namespaces".to_owned()
            }
            Some(program) => format!("{program} is needed"),
            None if !Path::new("/proc/net/if_inet6").exists() => {
                "the kernel has no IPv6".to_owned()
            }
            None => String::new(),
        };
        if !why.is_empty() {
            let in_ci = std::env::var_os("CI").is_some_and(|ci| !ci.is_empty() && ci != "false");
            assert!(!in_ci, "{why}");
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED real_envoys_talk_as_each_mode_says: {why}"
            );
            return None;
        }
        let net = Self {
            prefix: format!("malha-xds-{}", std::process::id()),
            directory: tempfile::tempdir().expect("a directory"),
        };
        net.build(pods);
        Some(net)
    }

    fn build(&self, pods: [&str; 2]) {
        let outside = self.namespace("outside");
        run(&["ip", "netns", "add", &outside]);
        let ip = |arguments: &str| {
            let arguments = format!("ip -n {outside} {arguments}");
            run(&arguments.split(' ').collect::<Vec<_>>());
        };
        ip("link set lo up");
        ip("link add br0 type bridge");
        ip("addr add 10.244.77.254/24 dev br0");
        ip("-6 addr add fd00:244:77::fe/64 dev br0 nodad");
        ip("link set br0 up");
        for (number, pod) in pods.into_iter().enumerate() {
            let namespace = self.namespace(pod);
            run(&["ip", "netns", "add", &namespace]);
            let port = format!("p{number}");
            ip(&format!(
                "link add {port} type veth peer name eth0 netns {namespace}"
            ));
            ip(&format!("link set {port} master br0"));
            ip(&format!("link set {port} up"));
            let number = number + 1;
            for arguments in [
                "link set lo up".to_owned(),
                "-6 addr add ::6/128 dev lo".to_owned(),
                format!("addr add 10.244.77.{number}/24 dev eth0"),
                format!("-6 addr add fd00:244:77::{number}/64 dev eth0 nodad"),
                "link set eth0 up".to_owned(),
                "route add default via 10.244.77.254".to_owned(),
                "-6 route add default via fd00:244:77::fe".to_owned(),
            ] {
                let arguments = format!("ip -n {namespace} {arguments}");
                run(&arguments.split(' ').collect::<Vec<_>>());
            }
            let rules = self.directory().join("rules");
            std::fs::write(&rules, RULES).expect("a writable directory");
            let rules = rules.to_str().expect("UTF-8");
            run(&["ip", "netns", "exec", &namespace, "nft", "-f", rules]);
        }
    }

    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn namespace(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// Runs `act` on a thread of its own in a namespace.
    fn inside<T: Send + 'static>(
        &self,
        name: &str,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let namespace = Path::new("/run/netns").join(self.namespace(name));
        std::thread::spawn(move || {
            let file = File::open(namespace).expect("the namespace");
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).expect("root may");
            act()
        })
    }

    /// An application that answers with the client's identity as its proxy tells it. HTTP/1 and HTTP/2.
    pub(super) fn serve_http(&self, name: &str, port: u16) {
        let (ready, is_ready) = std::sync::mpsc::channel();
        self.inside(name, move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.expect("a runtime").block_on(async move {
                let listener = tokio::net::TcpListener::bind(("::", port)).await;
                let listener = listener.expect("a free port in a new namespace");
                ready.send(()).expect("the test waits");
                while let Ok((connection, _)) = listener.accept().await {
                    tokio::spawn(async move {
                        let answer = service_fn(|request: hyper::Request<_>| async move {
                            let _: &hyper::Request<hyper::body::Incoming> = &request;
                            let client = request.headers().get("x-forwarded-client-cert");
                            let client = client.and_then(|value| value.to_str().ok());
                            let uri = client.and_then(|parts| {
                                parts.split(';').find(|part| part.starts_with("URI="))
                            });
                            let mut uri = uri.unwrap_or_default().to_owned();
                            if request.headers().contains_key("x-envoy-retry-on") {
                                uri += " and a header for proxies";
                            }
                            let body = Full::new(Bytes::from(uri));
                            Ok::<_, std::convert::Infallible>(Response::new(body))
                        });
                        let server =
                            hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                        let _ = server
                            .serve_connection(TokioIo::new(connection), answer)
                            .await;
                    });
                }
            });
        });
        is_ready.recv().expect("the server starts");
    }

    /// A server that speaks first.
    pub(super) fn serve_greeting(&self, name: &str, port: u16) {
        let (ready, is_ready) = std::sync::mpsc::channel();
        self.inside(name, move || {
            let listener = std::net::TcpListener::bind(("::", port)).expect("a free port");
            ready.send(()).expect("the test waits");
            for connection in listener.incoming() {
                let _ = connection.and_then(|mut connection| connection.write_all(b"hello"));
            }
        });
        is_ready.recv().expect("the server starts");
    }

    pub(super) fn greeting(&self, from: &str, ip: &str, port: u16) -> Result<String, String> {
        let address: SocketAddr = format!("{ip}:{port}").parse().expect("an address");
        let asked = self.inside(from, move || {
            let mut connection = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
            connection.set_read_timeout(Some(Duration::from_secs(25)))?;
            let mut said = [0; 5];
            connection.read_exact(&mut said)?;
            Ok::<_, std::io::Error>(String::from_utf8_lossy(&said).into_owned())
        });
        asked
            .join()
            .expect("no panic")
            .map_err(|error| error.to_string())
    }

    /// The body of a 200, `None` if empty; else the status, or what curl says.
    pub(super) fn get(
        &self,
        from: &str,
        ip: &str,
        port: u16,
        host: &str,
        more: &[&str],
    ) -> Result<Option<String>, String> {
        let url = format!("http://{ip}:{port}/");
        let mut curl = self.command(from, "curl");
        curl.args([
            "-s",
            "-m",
            "10",
            "-w",
            "\n%{http_code}",
            "-H",
            &format!("Host: {host}"),
        ]);
        let output = curl.args(more).arg(url).output().expect("curl runs");
        if !output.status.success() {
            return Err(format!("curl {}", output.status.code().unwrap_or_default()));
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        match text.rsplit_once('\n') {
            Some((body, "200")) => Ok(Some(body.to_owned()).filter(|body| !body.is_empty())),
            Some((body, status)) => Err(format!("{status} {body}")),
            None => Err(text),
        }
    }

    pub(super) fn tls_without_certificate(&self, from: &str, ip: &str, port: u16) {
        let mut openssl = self.command(from, "openssl");
        openssl.args([
            "s_client",
            "-alpn",
            "istio",
            "-connect",
            &format!("{ip}:{port}"),
        ]);
        openssl.stdin(Stdio::null()).output().expect("openssl runs");
    }

    fn command(&self, namespace: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(namespace), program]);
        command
    }

    /// Envoy in a pod, of the group that redirection lets through.
    pub(super) fn envoy(&self, envoy: &Path, node: &str) -> Pod {
        use prost::Message;
        let bootstrap = validate::live_bootstrap(node, self.directory());
        let file = self.directory().join(format!("{node}.pb"));
        std::fs::write(&file, bootstrap.encode_to_vec()).expect("a writable directory");
        let log = File::create(self.directory().join(format!("{node}.log"))).expect("a log");
        let mut command = self.command(node, "setpriv");
        let child = command
            .args(["--regid", "1337", "--clear-groups"])
            .arg(envoy)
            .args([
                "--concurrency",
                "1",
                "--disable-hot-restart",
                "-l",
                "warning",
                "-c",
            ])
            .arg(file)
            .stderr(log)
            .spawn()
            .expect("Envoy starts");
        Pod {
            child,
            admin: self.directory().join(format!("{node}.admin")),
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in ["client-a.jobs", "web-a.shop", "outside"] {
            let _ = Command::new("ip")
                .args(["netns", "del", &self.namespace(name)])
                .output();
        }
    }
}

/// A running Envoy.
pub(super) struct Pod {
    child: Child,
    admin: PathBuf,
}

impl Pod {
    /// An answer of its admin interface; empty while there is none.
    pub(super) fn admin(&self, path: &str) -> String {
        let curl = Command::new("curl")
            .args(["-s", "-m", "5", "--unix-socket"])
            .arg(&self.admin)
            .arg(format!("http://admin{path}"))
            .output();
        let body = curl.map(|output| output.stdout).unwrap_or_default();
        String::from_utf8_lossy(&body).into_owned()
    }

    /// What it logged and counted, for a test that fails.
    pub(super) fn story(&self) -> String {
        let log = std::fs::read_to_string(self.admin.with_extension("log")).unwrap_or_default();
        let stats = self.admin("/stats?usedonly");
        let interesting = |line: &&str| {
            let names = [
                "cx_",
                "ssl.",
                "rq_",
                "no_filter",
                "update_rejected",
                "downstream",
            ];
            names.iter().any(|name| line.contains(name)) && !line.ends_with(": 0")
        };
        let stats: Vec<_> = stats.lines().filter(interesting).collect();
        format!("{}:\n{log}{}\n", self.admin.display(), stats.join("\n"))
    }

    /// The sum of all counters that end so.
    pub(super) fn counter(&self, name: &str) -> u64 {
        let stats = self.admin("/stats");
        let lines = stats.lines().filter_map(|line| line.split_once(": "));
        let wanted = lines.filter(|(key, _)| key.ends_with(name));
        wanted
            .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
            .sum()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(command: &[&str]) {
    let output = Command::new(command[0])
        .args(&command[1..])
        .output()
        .expect("it runs");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
