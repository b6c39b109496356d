//! The whole program under load: `malha serve --standalone`, asked for admissions over HTTPS.
//!
//! The server is a process of its own with two worker threads; it and the generator share the same two cores, as they
//! would share a small node.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::runtime::{Builder, Runtime};

use crate::{
    Bench,
    clock::{self, Rounds},
    load::{self, Target},
    pods,
};

pub(crate) const CORES: usize = 2;
const CONNECTIONS: usize = 32;
const ROUNDS: usize = 5;
const REVIEWS: u64 = 100_000;

const LOAD: [&str; 5] = [
    "https_reviews_per_s",
    "https_review_cpu",
    "https_review_p50",
    "https_review_p99",
    "https_review_rate",
];
const MEMORY: [&str; 2] = ["rss_idle", "rss_after_100k"];

pub(crate) fn run(bench: &Bench) {
    if !bench.wants(&LOAD) && !bench.wants(&MEMORY) && !bench.wants(&["serve_ready"]) {
        return;
    }
    stay_on(CORES);
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let pod = pods::of_size(10_240);
    let review = pods::review(&pod);
    if bench.wants(&["serve_ready"]) {
        ready(bench);
    }
    if bench.wants(&MEMORY) {
        memory(bench, &runtime, &review);
    }
    if bench.wants(&LOAD) {
        throughput(bench, &runtime, &review, pod.to_string().len());
    }
}

/// From exec to listening, with a journal to make (two keys, two certificates) and with one to read.
fn ready(bench: &Bench) {
    let (mut first, mut later) = (Rounds::default(), Rounds::default());
    for _ in 0..ROUNDS {
        let directory = tempfile::tempdir().expect("a directory");
        for rounds in [&mut first, &mut later] {
            let server = Server::start(directory.path());
            rounds.push(server.ready_after.as_secs_f64() * 1e3);
        }
    }
    bench.figure(
        "serve_ready_first",
        &first,
        "ms",
        "wall time from exec to listening, making a new authority",
    );
    bench.figure(
        "serve_ready",
        &later,
        "ms",
        "wall time from exec to listening, reading the authority it made",
    );
}

fn memory(bench: &Bench, runtime: &Runtime, review: &[u8]) {
    let reviews = if bench.quick { REVIEWS / 20 } else { REVIEWS };
    let (mut idle, mut after) = (Rounds::default(), Rounds::default());
    for _ in 0..ROUNDS {
        let directory = tempfile::tempdir().expect("a directory");
        let server = Server::start(directory.path());
        thread::sleep(bench.round(Duration::from_secs(2)));
        idle.push(clock::resident_mib(server.pid()));
        let answered = load::closed_count(runtime, &server.target(review), CONNECTIONS, reviews);
        assert!(answered >= reviews, "only {answered} answers");
        after.push(clock::resident_mib(server.pid()));
    }
    bench.figure(
        "rss_idle",
        &idle,
        "MiB",
        "VmRSS of malha serve --standalone, ready for 2 s",
    );
    let how = format!(
        "VmRSS of the same right after {reviews} reviews of 10 KB pods on {CONNECTIONS} connections"
    );
    bench.figure("rss_after_100k", &after, "MiB", &how);
}

fn throughput(bench: &Bench, runtime: &Runtime, review: &[u8], pod: usize) {
    let directory = tempfile::tempdir().expect("a directory");
    let server = Server::start(directory.path());
    let target = server.target(review);
    let each = bench.round(Duration::from_secs(4));
    load::closed(runtime, &target, CONNECTIONS, each / 4);
    let (mut rate, mut cpu) = (Rounds::default(), Rounds::default());
    for _ in 0..ROUNDS {
        let (start, before) = (Instant::now(), clock::process(server.pid()));
        let answers = load::closed(runtime, &target, CONNECTIONS, each);
        let (spent, wall) = (clock::process(server.pid()) - before, start.elapsed());
        rate.push(answers as f64 / wall.as_secs_f64());
        cpu.push(spent.as_secs_f64() * 1e6 / answers as f64);
    }
    let how = format!(
        "closed loop, {CONNECTIONS} connections, HTTP/1.1 keep-alive, TLS 1.3, reviews of {} bytes with pods of {pod}, \
         server with {CORES} worker threads and generator on the same {CORES} cores",
        review.len()
    );
    bench.figure("https_reviews_per_s", &rate, "1/s", &how);
    bench.figure(
        "https_review_cpu",
        &cpu,
        "us",
        "CPU of the server's process by review, handshakes included; same load",
    );

    let half = rate.median() / 2.0;
    let (mut p50, mut p99) = (Rounds::default(), Rounds::default());
    for _ in 0..ROUNDS {
        let latencies = load::open(runtime, &target, 2 * CONNECTIONS, half, each);
        p50.push(percentile(&latencies, 0.50));
        p99.push(percentile(&latencies, 0.99));
    }
    let how = format!(
        "open loop at {half:.0} a second, half of the above, from the intended instant of sending"
    );
    bench.figure("https_review_p50", &p50, "ms", &how);
    bench.figure("https_review_p99", &p99, "ms", &how);
}

/// In milliseconds, of latencies that are sorted.
pub(crate) fn percentile(latencies: &[Duration], share: f64) -> f64 {
    let index = (latencies.len() as f64 * share) as usize;
    latencies[index.min(latencies.len() - 1)].as_secs_f64() * 1e3
}

/// This process, and those it starts, on so many cores and no more.
fn stay_on(cores: usize) {
    let own = Pid::from_raw(0);
    let allowed = sched_getaffinity(own).expect("Linux tells it");
    let mut kept = CpuSet::new();
    let usable = (0..CpuSet::count()).filter(|core| allowed.is_set(*core).unwrap_or(false));
    for core in usable.take(cores) {
        kept.set(core).expect("it is in the set");
    }
    sched_setaffinity(own, &kept).expect("fewer cores are always granted");
}

/// Who asks, on the cores of whoever answers.
pub(crate) fn generator() -> Runtime {
    stay_on(CORES);
    Builder::new_multi_thread()
        .worker_threads(CORES)
        .enable_all()
        .build()
        .expect("a runtime")
}

const MALHA: &str = env!("CARGO_BIN_EXE_malha");

/// A control group whose processes may use so much memory together.
pub(crate) struct Memory(PathBuf);

impl Memory {
    /// Takes root, and a kernel that counts memory by control groups of either version.
    pub(crate) fn of(bytes: u64) -> io::Result<Self> {
        let versions = [
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", "memory.max"),
        ];
        let mut refused = io::ErrorKind::NotFound.into();
        for (root, limit) in versions {
            let group = Path::new(root).join(format!("malha-bench-{}", std::process::id()));
            let made = fs::create_dir(&group).map(|()| Self(group));
            let limited = made.and_then(|group| {
                fs::write(group.0.join(limit), bytes.to_string())?;
                Ok(group)
            });
            match limited {
                Ok(group) => return Ok(group),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A process that was killed may not have left yet.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

pub(crate) struct Server {
    child: Child,
    webhook: SocketAddr,
    pub(crate) ca: SocketAddr,
    pub(crate) roots_pem: Vec<u8>,
    ready_after: Duration,
}

impl Server {
    /// Starts one in `directory` and waits until it listens.
    fn start(directory: &Path) -> Self {
        Self::start_at(directory, "127.0.0.1:0")
    }

    /// As [`Self::start`], with the signer at an address.
    pub(crate) fn start_at(directory: &Path, ca: &str) -> Self {
        Self::start_by(Command::new(MALHA), directory, ca)
    }

    /// As [`Self::start_at`], as a process that may use so much memory, and is killed where it takes more.
    pub(crate) fn start_within(memory: &Memory, directory: &Path) -> Self {
        let mut command = Command::new("sh");
        let enter = r#"echo $$ >"$0/cgroup.procs" && exec "$@""#;
        command.args(["-c", enter]).arg(&memory.0).arg(MALHA);
        Self::start_by(command, directory, "127.0.0.1:0")
    }

    fn start_by(mut command: Command, directory: &Path, ca: &str) -> Self {
        let addresses = directory.join("addresses.json");
        let start = Instant::now();
        let mut child = command
            .args([
                "serve",
                "--webhook-addr=127.0.0.1:0",
                "--admin-addr=127.0.0.1:0",
                "--query-addr=127.0.0.1:0",
            ])
            .arg(format!("--ca-addr={ca}"))
            .arg("--standalone")
            .arg(directory)
            .env("TOKIO_WORKER_THREADS", CORES.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("malha starts");
        let text = loop {
            if let Ok(text) = fs::read(&addresses) {
                break text;
            }
            let ended = child.try_wait().expect("our child");
            assert!(ended.is_none(), "malha serve ended: {ended:?}");
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "malha serve is not ready"
            );
            thread::sleep(Duration::from_millis(1));
        };
        let ready_after = start.elapsed();
        let said: serde_json::Value = serde_json::from_slice(&text).expect("addresses");
        let address = |port: &str| {
            let addr = said[port].as_str();
            addr.and_then(|addr| addr.parse().ok()).expect("an address")
        };
        let (webhook, ca) = (address("webhook"), address("ca"));
        let roots_pem = fs::read(directory.join("bundle.pem")).expect("the trust bundle");
        Self {
            child,
            webhook,
            ca,
            roots_pem,
            ready_after,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn target(&self, review: &[u8]) -> Target {
        Target::new(
            self.webhook,
            &self.roots_pem,
            "/inject/ns?timeout=5s",
            review,
        )
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid fits"));
        // it removes addresses.json, so that the next start is not mistaken for ready
        let _ = kill(pid, Signal::SIGTERM);
        let _ = self.child.wait();
    }
}
