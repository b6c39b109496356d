//! What a control plane keeps of requests that fail: nothing. A million of them, over gRPC and as noise before any TLS.

use std::{fs, io::Write as _, net::TcpStream, time::Duration};

use tokio::{task::JoinSet, time::sleep};
use tonic::transport::Channel;

use crate::{
    Bench,
    clock::{self, Rounds},
    serve::{Server, generator},
    sign::{Asked, Clients, call},
};

/// Enough that allocator and caches have what they want.
const BEFORE: usize = 100_000;
const REQUESTS: usize = 1_000_000;
const STREAMS: usize = 64;
/// One connection of noise to so many requests.
const NOISE: usize = 500;
/// Until what was cut off is cleared away.
const REST: Duration = Duration::from_secs(15);

pub(crate) fn run(bench: &Bench) {
    let figures = ["failing_memory", "failing_descriptors", "failing_threads"];
    if !bench.wants(&figures) {
        return;
    }
    let runtime = generator();
    let directory = tempfile::tempdir().expect("a directory");
    let server = Server::start_at(directory.path(), "127.0.0.1:0");
    let mut clients = Clients::of(&server, directory.path());
    let requests = if bench.quick { REQUESTS / 10 } else { REQUESTS };
    let [before, after] = [BEFORE, requests].map(|count| {
        runtime.block_on(fail(&server, &mut clients, count));
        Kept::of(server.pid())
    });
    let how = format!("after {requests} refused requests more than after the first {BEFORE}");
    let grown = [
        after.mib - before.mib,
        after.descriptors - before.descriptors,
        after.threads - before.threads,
    ];
    let units = ["MiB", "descriptors", "threads"];
    for ((name, grown), unit) in figures.iter().zip(grown).zip(units) {
        let mut rounds = Rounds::default();
        rounds.push(grown);
        bench.figure(name, &rounds, unit, &how);
    }
}

/// What a process holds.
struct Kept {
    mib: f64,
    descriptors: f64,
    threads: f64,
}

impl Kept {
    fn of(pid: u32) -> Self {
        let count = |what: &str| {
            let entries = fs::read_dir(format!("/proc/{pid}/{what}")).expect("the process runs");
            entries.count() as f64
        };
        Self {
            mib: clock::resident_mib(pid),
            descriptors: count("fd"),
            threads: count("task"),
        }
    }
}

async fn fail(server: &Server, clients: &mut Clients, count: usize) {
    let channel = clients.signer.connect().await;
    let mut streams = JoinSet::new();
    for number in 0..count {
        if number % NOISE == 0 {
            let mut noise = TcpStream::connect(server.ca).expect("it listens");
            noise.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("written");
        }
        if streams.len() == STREAMS {
            streams.join_next().await.expect("some").expect("refused");
        }
        streams.spawn(refused(channel.clone(), broken(clients.next(), number)));
    }
    streams.join_all().await;
    drop(channel);
    sleep(REST).await;
}

/// A token that nobody signed, none at all, a CSR that is none.
fn broken(mut asked: Asked, number: usize) -> Asked {
    match number % 3 {
        0 => asked.bearer = "Bearer e30.e30.e30".parse().expect("ASCII"),
        1 => asked.bearer = "Basic nobody".parse().expect("ASCII"),
        _ => asked.message.csr.truncate(100),
    }
    asked
}

async fn refused(channel: Channel, asked: Asked) {
    assert!(call(&channel, asked).await.is_err());
}
