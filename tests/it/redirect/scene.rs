//! A pod and the world outside it: two network namespaces and a link between them. They are gone with the process that
//! holds them, which ends with the test, however that ends.

use std::{
    fmt::Display,
    fs::File,
    io::{BufRead, BufReader, ErrorKind, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{getsockopt, sockopt},
};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

/// The proxy's group.
pub(super) const PROXY: Who = Who {
    uid: 1337,
    gid: 1337,
};
/// Some application.
pub(super) const APP: Who = Who {
    uid: 1000,
    gid: 1000,
};
const PATIENCE: Duration = Duration::from_secs(5);

/// The addresses of the two ends, IPv4 and IPv6.
pub(super) const POD: [&str; 2] = ["10.77.0.2", "fd77::2"];
pub(super) const WORLD: [&str; 2] = ["10.77.0.1", "fd77::1"];
/// Behind the world.
pub(super) const FAR: [&str; 2] = ["192.0.2.7", "2001:db8::7"];
pub(super) const LOCALHOST: [&str; 2] = ["127.0.0.1", "::1"];
/// What the proxy binds to when it passes a connection on.
pub(super) const PASSED_ON: [&str; 2] = ["127.0.0.6", "::6"];

/// Whether these tests can run here. Where they cannot, standard error says why; in CI (`CI=true`) that is a failure: a
/// pipeline that silently tests nothing is worse than a red one.
pub(super) fn can_run() -> bool {
    let missing = [
        "nft", "ip", "setcap", "capsh", "unshare", "nsenter", "python3",
    ]
    .into_iter()
    .find(|program| !is_there(program));
    let why = match missing {
        Some(program) => format!("{program} is not there; make test-unit installs it"),
        None if !nix::unistd::geteuid().is_root() => {
            "network namespaces need root; run it as root".to_owned()
        }
        None => match Command::new("unshare").args(["-n", "true"]).status() {
            Ok(status) if status.success() => return true,
            _ => "this machine makes no network namespaces".to_owned(),
        },
    };
    let ci = std::env::var_os("CI").is_some_and(|ci| !ci.is_empty() && ci != "false");
    assert!(!ci, "{why}");
    skip(&why);
    false
}

/// Not by `eprintln!`, which the test harness swallows when the test passes.
fn skip(why: &dyn Display) {
    let thread = thread::current();
    let name = thread.name().unwrap_or("a test");
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {why}");
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// Who opens a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Who {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// A network namespace.
pub(super) struct Namespace(Child);

impl Namespace {
    pub(super) fn new() -> Self {
        // `setpriv` outlives neither the test nor this process; ten minutes end it in any case.
        let holder = "ip link set lo up && echo ready && exec sleep 600";
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "-n", "sh", "-c", holder])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("setpriv starts");
        let mut line = String::new();
        let output = child.stdout.take().expect("piped");
        let read = BufReader::new(output).read_line(&mut line);
        let namespace = Self(child);
        assert_eq!(line, "ready\n", "{read:?}");
        namespace
    }

    pub(super) fn pid(&self) -> String {
        self.0.id().to_string()
    }

    /// Runs a program in it; it must succeed.
    pub(super) fn run(&self, command: &str) -> String {
        let output = self.command("sh").args(["-c", command]).output();
        let output = output.expect("nsenter starts");
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{command}: {out}{err}");
        out
    }

    /// A program that will run in it.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.pid(), "-n", program]);
        command
    }

    /// Does something in it, as somebody, on a thread of its own.
    pub(super) fn within<T: Send>(&self, who: Who, act: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/proc/{}/ns/net", self.0.id())).expect("a namespace");
        let inside = move || {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET).expect("root enters it");
            // These change this thread only, unlike libc's.
            set_thread_groups(&[]).expect("root may");
            set_thread_gid(rustix::thread::Gid::from_raw(who.gid)).expect("root may");
            set_thread_uid(rustix::thread::Uid::from_raw(who.uid)).expect("root may");
            act()
        };
        thread::scope(|scope| {
            let thread = scope.spawn(inside);
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub(super) fn listen(&self, address: &str, port: u16) -> TcpListener {
        let at = to(address, port);
        let listener = self.within(Who { uid: 0, gid: 0 }, || TcpListener::bind(at));
        let listener = listener.unwrap_or_else(|error| panic!("cannot listen on {at}: {error}"));
        listener.set_nonblocking(true).expect("it can");
        listener
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(super) fn to(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("an address"), port)
}

/// A pod with its proxy's ports and an application on every port that the tests use, and a world that listens too.
pub(super) struct Scene {
    pub(super) pod: Namespace,
    pub(super) world: Namespace,
    listeners: Vec<(&'static str, TcpListener)>,
}

/// Where a connection came out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Landed {
    /// `inbound`, `outbound`, `app` or `world`.
    pub(super) at: &'static str,
    /// Where it wanted to go, as the kernel remembers.
    pub(super) wanted: SocketAddr,
}

impl Scene {
    pub(super) fn new() -> Self {
        Self::with_families(&[0, 1])
    }

    /// IPv4 is 0, IPv6 is 1. Without IPv6 it is switched off in the pod.
    pub(super) fn with_families(families: &[usize]) -> Self {
        let (pod, world) = (Namespace::new(), Namespace::new());
        if !families.contains(&1) {
            pod.run("for c in all default lo; do echo 1 > /proc/sys/net/ipv6/conf/$c/disable_ipv6; done");
        }
        link(&pod, &world);
        let mut scene = Self {
            pod,
            world,
            listeners: Vec::new(),
        };
        for family in families {
            let bits = [24, 64][*family];
            scene.pod.run(&format!(
                "ip address add {0}/{bits} dev eth0 nodad && ip route add default via {1}",
                POD[*family], WORLD[*family]
            ));
            scene.world.run(&format!(
                "ip address add {}/{bits} dev eth0 nodad && ip address add {} dev lo",
                WORLD[*family], FAR[*family]
            ));
            scene.listen_all(*family);
        }
        scene
    }

    fn listen_all(&mut self, family: usize) {
        let everywhere = ["0.0.0.0", "::"][family];
        let mut add = |at, namespace: &Namespace, port| {
            let listener = namespace.listen(everywhere, port);
            self.listeners.push((at, listener));
        };
        add("inbound", &self.pod, 15006);
        add("outbound", &self.pod, 15001);
        for port in [22, 8080, 15021] {
            add("app", &self.pod, port);
        }
        for port in [25, 80, 443, 8080] {
            add("world", &self.world, port);
        }
    }

    /// Somebody in the pod opens a connection.
    pub(super) fn call_from_pod(&self, who: Who, address: &str, port: u16) -> Landed {
        self.connect(&self.pod, who, None, to(address, port))
    }

    /// The same from an address of the pod.
    pub(super) fn call_from_pod_as(
        &self,
        who: Who,
        source: &str,
        address: &str,
        port: u16,
    ) -> Landed {
        let source = source.parse().expect("an address");
        self.connect(&self.pod, who, Some(source), to(address, port))
    }

    /// The world calls the pod.
    pub(super) fn call_from_world(&self, address: &str, port: u16) -> Landed {
        self.connect(&self.world, APP, None, to(address, port))
    }

    fn connect(
        &self,
        namespace: &Namespace,
        who: Who,
        source: Option<IpAddr>,
        to: SocketAddr,
    ) -> Landed {
        let opened = namespace.within(who, || open(source, to));
        let stream = opened.unwrap_or_else(|error| panic!("{who:?} to {to}: {error}"));
        let from = stream.local_addr().expect("connected");
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            for (at, listener) in &self.listeners {
                match listener.accept() {
                    Ok((accepted, peer)) if peer.port() == from.port() => {
                        let wanted = original(&accepted);
                        return Landed { at, wanted };
                    }
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
        panic!("{who:?} to {to}: connected, but nobody has it");
    }

    /// Whether a datagram of the pod reaches the world.
    pub(super) fn datagram_arrives(&self, family: usize) -> bool {
        let at = to(WORLD[family], 53);
        let receiver = self.world.within(Who { uid: 0, gid: 0 }, || {
            UdpSocket::bind(at).expect("a port")
        });
        receiver.set_read_timeout(Some(PATIENCE)).expect("it can");
        let sender = self.pod.within(APP, || {
            UdpSocket::bind(to(["0.0.0.0", "::"][family], 0)).expect("a port")
        });
        sender.send_to(b"question", at).expect("it goes out");
        let mut buffer = [0; 16];
        receiver
            .recv_from(&mut buffer)
            .is_ok_and(|(length, _)| length == 8)
    }
}

fn link(pod: &Namespace, world: &Namespace) {
    pod.run(&format!(
        "ip link add eth0 type veth peer name eth0 netns {} && ip link set eth0 up",
        world.pid()
    ));
    world.run("ip link set eth0 up");
    for namespace in [pod, world] {
        // Each family has listeners of its own.
        namespace.run("echo 1 > /proc/sys/net/ipv6/bindv6only");
    }
}

fn open(source: Option<IpAddr>, to: SocketAddr) -> std::io::Result<TcpStream> {
    let Some(source) = source else {
        return TcpStream::connect_timeout(&to, PATIENCE);
    };
    let family = match source {
        IpAddr::V4(_) => rustix::net::AddressFamily::INET,
        IpAddr::V6(_) => rustix::net::AddressFamily::INET6,
    };
    let socket = rustix::net::socket(family, rustix::net::SocketType::STREAM, None)?;
    rustix::net::bind(&socket, &SocketAddr::new(source, 0))?;
    rustix::net::connect(&socket, &to)?;
    Ok(socket.into())
}

/// Where it wanted to go: what the kernel remembers of a redirected connection, else where it is.
fn original(stream: &TcpStream) -> SocketAddr {
    let local = stream.local_addr().expect("connected");
    let remembered: Option<SocketAddr> = match local {
        SocketAddr::V4(_) => getsockopt(stream, sockopt::OriginalDst).ok().map(|found| {
            let ip = u32::from_be(found.sin_addr.s_addr);
            (IpAddr::V4(ip.into()), u16::from_be(found.sin_port)).into()
        }),
        SocketAddr::V6(_) => getsockopt(stream, sockopt::Ip6tOriginalDst)
            .ok()
            .map(|found| {
                let ip = found.sin6_addr.s6_addr;
                (IpAddr::V6(ip.into()), u16::from_be(found.sin6_port)).into()
            }),
    };
    remembered.unwrap_or(local)
}

/// A pod with a way out, and nobody who listens.
pub(super) fn route(pod: &Namespace, world: &Namespace) {
    link(pod, world);
    for family in [0, 1] {
        let bits = [24, 64][family];
        pod.run(&format!(
            "ip address add {0}/{bits} dev eth0 nodad && ip route add default via {1}",
            POD[family], WORLD[family]
        ));
        world.run(&format!(
            "ip address add {}/{bits} dev eth0 nodad",
            WORLD[family]
        ));
    }
}
