//! The signer end to end: `malha serve --standalone`, asked for certificates over gRPC, with tokens that it checks offline.
//!
//! Server and generator share two cores. A figure by core is the server's alone: answers by its CPU time, whatever the
//! generator costs.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use malha::{
    ca::{
        bundle::Bundle,
        peer::{self, Side},
        pem,
    },
    proto::istio_ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_client::IstioCertificateServiceClient,
    },
    runtime::clock::system,
    standalone::{Directory, TokenMaker},
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::{
    task::JoinSet,
    time::{interval, sleep_until, timeout},
};
use tonic::{Status, metadata::AsciiMetadataValue, transport::Channel};

use crate::{
    Bench,
    clock::{self, Rounds},
    delta::{NAME, connect, try_connect},
    serve::{CORES, Server, generator, percentile},
};

const ROUNDS: usize = 5;
/// Under way at once on the one connection; the server grants 100.
const STREAMS: usize = 64;
/// Each with a token of its own, so that none asks more often than a service account may.
const ACCOUNTS: usize = 1_000;
/// How long a client waits for one try.
const DEADLINE: Duration = Duration::from_secs(3);

pub(crate) fn run(bench: &Bench) {
    let figures = ["csr_per_s_core", "csr_p50", "csr_p99", "csr_p99_disturbed"];
    let at_once = ["csr_1000_at_once", "csr_1000_lost"];
    if !bench.wants(&figures) && !bench.wants(&at_once) {
        return;
    }
    let runtime = generator();
    let directory = tempfile::tempdir().expect("a directory");
    let server = Server::start_at(directory.path(), "127.0.0.1:0");
    let mut clients = Clients::of(&server, directory.path());
    if bench.wants(&figures) {
        runtime.block_on(on_one_connection(bench, &server, &mut clients));
    }
    if bench.wants(&at_once) {
        runtime.block_on(all_at_once(bench, &mut clients));
    }
}

async fn on_one_connection(bench: &Bench, server: &Server, clients: &mut Clients) {
    let channel = clients.signer.connect().await;
    let each = bench.round(Duration::from_secs(4));
    closed(&channel, clients, each / 4).await;
    let (mut by_core, mut rate) = (Rounds::default(), Rounds::default());
    for _ in 0..ROUNDS {
        let (start, before) = (Instant::now(), clock::process(server.pid()));
        let answers = closed(&channel, clients, each).await as f64;
        let spent = clock::process(server.pid()) - before;
        rate.push(answers / start.elapsed().as_secs_f64());
        by_core.push(answers / spent.as_secs_f64());
    }
    let how = format!(
        "certificates by second of the server's CPU, P-256, ES256 tokens checked each time, one HTTP/2 connection with {STREAMS} streams"
    );
    bench.figure("csr_per_s_core", &by_core, "1/s", &how);
    let how = format!(
        "the same by wall time, closed loop, server with {CORES} worker threads and generator on the same {CORES} cores"
    );
    bench.figure("csr_per_s", &rate, "1/s", &how);

    let half = rate.median() / 2.0;
    let (mut p50, mut p99, mut disturbed) =
        (Rounds::default(), Rounds::default(), Rounds::default());
    for _ in 0..ROUNDS {
        let latencies = open(&channel, clients, half, each).await;
        p50.push(percentile(&latencies, 0.50));
        p99.push(percentile(&latencies, 0.99));
        // in turns, so that whatever else the machine does hits both alike
        let noise = tokio::spawn(noise(clients.signer.connect().await, clients.noisy()));
        let latencies = open(&channel, clients, half, each).await;
        noise.abort();
        disturbed.push(percentile(&latencies, 0.99));
    }
    let how = format!(
        "open loop at {half:.0} a second, half of the above, from the intended instant of sending"
    );
    bench.figure("csr_p50", &p50, "ms", &how);
    bench.figure("csr_p99", &p99, "ms", &how);
    let how = "the same while another, on a connection of its own, asks 1,000 times a second, five times as often as it may";
    bench.figure("csr_p99_disturbed", &disturbed, "ms", how);
}

/// As after a node's reboot: each connects, shakes hands and asks in the same moment, and gives up after [`DEADLINE`].
async fn all_at_once(bench: &Bench, clients: &mut Clients) {
    let (mut last, mut lost) = (Rounds::default(), Rounds::default());
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let mut tries = JoinSet::new();
        for _ in 0..ACCOUNTS {
            let (signer, asked) = (clients.signer.clone(), clients.next());
            tries.spawn(async move {
                let served = timeout(DEADLINE, signer.serves(asked)).await;
                served.unwrap_or(false)
            });
        }
        let served = tries.join_all().await;
        last.push(start.elapsed().as_secs_f64() * 1e3);
        lost.push(served.iter().filter(|served| !**served).count() as f64);
    }
    let how = format!(
        "{ACCOUNTS} clients, each with a connection of its own, all at once: until the last has its certificate"
    );
    bench.figure("csr_1000_at_once", &last, "ms", &how);
    let how = format!(
        "of these, not served within {} s at the first try",
        DEADLINE.as_secs()
    );
    bench.figure("csr_1000_lost", &lost, "clients", &how);
}

/// Where to ask, and whom to trust.
#[derive(Clone)]
pub(crate) struct Signer {
    addr: SocketAddr,
    roots: Arc<[CertificateDer<'static>]>,
}

impl Signer {
    pub(crate) async fn connect(&self) -> Channel {
        connect(self.addr, NAME, &self.roots, None).await
    }

    /// Whether one try, over a connection of its own, brings a certificate.
    pub(crate) async fn serves(&self, asked: Asked) -> bool {
        match try_connect(self.addr, NAME, &self.roots, None).await {
            Ok(channel) => call(&channel, asked).await.is_ok(),
            Err(_) => false,
        }
    }
}

/// Everybody who may ask, and what they ask.
pub(crate) struct Clients {
    pub(crate) signer: Signer,
    /// The last is the noisy one's.
    bearers: Vec<AsciiMetadataValue>,
    csr: String,
    asked: usize,
}

impl Clients {
    pub(crate) fn of(server: &Server, directory: &Path) -> Self {
        let directory = Directory::open_existing(directory).expect("the server made it");
        let domain = "cluster.local".parse().expect("a trust domain");
        let maker = TokenMaker::open(&directory, domain).expect("its key");
        let now = system().now();
        let bearer = |number: usize| {
            let hour = Duration::from_secs(3600);
            let token = maker.mint("shop", &format!("web-{number}"), hour, now);
            let bearer = format!("Bearer {}", token.expect("a token"));
            bearer.parse().expect("a token is ASCII")
        };
        let key = rcgen::KeyPair::generate().expect("a P-256 key");
        let csr = rcgen::CertificateParams::default().serialize_request(&key);
        Self {
            signer: Signer {
                addr: server.ca,
                roots: CertificateDer::pem_slice_iter(&server.roots_pem)
                    .collect::<Result<_, _>>()
                    .expect("PEM"),
            },
            bearers: (0..=ACCOUNTS).map(bearer).collect(),
            csr: csr.and_then(|csr| csr.pem()).expect("a CSR"),
            asked: 0,
        }
    }

    /// One that was never asked, so that none is answered from memory: the lives differ where the tokens are the same.
    pub(crate) fn next(&mut self) -> Asked {
        let number = self.asked;
        self.asked += 1;
        self.request(number % ACCOUNTS, number / ACCOUNTS)
    }

    fn noisy(&self) -> Asked {
        self.request(ACCOUNTS, 0)
    }

    fn request(&self, account: usize, more_seconds: usize) -> Asked {
        Asked {
            bearer: self.bearers[account].clone(),
            message: IstioCertificateRequest {
                csr: self.csr.clone(),
                validity_duration: 3600 + i64::try_from(more_seconds).expect("it fits"),
                metadata: None,
            },
        }
    }
}

#[derive(Clone)]
pub(crate) struct Asked {
    pub(crate) bearer: AsciiMetadataValue,
    pub(crate) message: IstioCertificateRequest,
}

/// The chain, roots last.
async fn ask(channel: &Channel, asked: Asked) -> Vec<String> {
    let answer = call(channel, asked).await;
    answer.expect("a certificate").cert_chain
}

pub(crate) async fn call(
    channel: &Channel,
    asked: Asked,
) -> Result<IstioCertificateResponse, Status> {
    let mut request = tonic::Request::new(asked.message);
    request.metadata_mut().insert("authorization", asked.bearer);
    let mut client = IstioCertificateServiceClient::new(channel.clone());
    let answer = client.create_certificate(request).await;
    answer.map(tonic::Response::into_inner)
}

/// Asks in every millisecond, whatever is answered.
async fn noise(channel: Channel, mut asked: Asked) {
    let mut pace = interval(Duration::from_millis(1));
    loop {
        pace.tick().await;
        asked.message.validity_duration += 1;
        let (channel, asked) = (channel.clone(), asked.clone());
        tokio::spawn(async move { call(&channel, asked).await });
    }
}

/// Closed loop: so many streams, each asking again as soon as it was answered. Answers in that time.
async fn closed(channel: &Channel, clients: &mut Clients, how_long: Duration) -> usize {
    let start = Instant::now();
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let (channel, asked) = (channel.clone(), clients.next());
        streams.spawn(async move { ask(&channel, asked).await });
    }
    let (mut answers, mut last) = (0, Vec::new());
    while let Some(answered) = streams.join_next().await {
        answers += 1;
        last = answered.expect("every request is answered");
        if start.elapsed() < how_long {
            let (channel, asked) = (channel.clone(), clients.next());
            streams.spawn(async move { ask(&channel, asked).await });
        }
    }
    verify(&last);
    answers
}

/// Open loop: a request is due at its instant whatever became of the earlier ones, and its latency counts from that
/// instant. All latencies, sorted.
async fn open(
    channel: &Channel,
    clients: &mut Clients,
    rate: f64,
    how_long: Duration,
) -> Vec<Duration> {
    let start = Instant::now();
    let mut streams = JoinSet::new();
    let mut number = 0.0;
    loop {
        let intended = start + Duration::from_secs_f64(number / rate);
        if intended > start + how_long {
            break;
        }
        number += 1.0;
        // tokio's timer knows whole milliseconds only; what is due by then goes out together
        sleep_until(intended.into()).await;
        let (channel, asked) = (channel.clone(), clients.next());
        streams.spawn(async move {
            ask(&channel, asked).await;
            intended.elapsed()
        });
    }
    let mut latencies = streams.join_all().await;
    latencies.sort_unstable();
    latencies
}

/// As a peer would look at it.
fn verify(chain: &[String]) {
    let ders = |texts: &[String]| -> Vec<Vec<u8>> {
        let text = texts.concat();
        let read = pem::parse(text.as_bytes()).expect("PEM");
        read.blocks.into_iter().map(|block| block.der).collect()
    };
    let (roots, chain) = chain.split_last().expect("the roots, at least");
    let bundle = Bundle::parse_pem(roots.as_bytes()).expect("roots");
    peer::verify(&ders(chain), &bundle, Side::Client, system().now()).expect("a good chain");
}
