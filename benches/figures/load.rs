//! A load generator that costs little, because it shares the cores with what it loads: requests are encoded once, and of
//! an answer only the status and the length are read. HTTP/1.1 over TLS 1.3, keep-alive, one request at a time on each
//! connection.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Runtime,
    sync::mpsc,
    task::JoinSet,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// What is called and with what.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) addr: SocketAddr,
    tls: TlsConnector,
    request: Arc<[u8]>,
}

impl Target {
    pub(crate) fn new(addr: SocketAddr, roots_pem: &[u8], path: &str, body: &[u8]) -> Self {
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(roots_pem) {
            roots.add(root.expect("PEM")).expect("a root certificate");
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider speaks TLS 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let mut request = format!(
            "POST {path} HTTP/1.1\r\nHost: malha\r\nContent-Type: application/json\r\nAccept: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        Self {
            addr,
            tls: TlsConnector::from(Arc::new(config)),
            request: request.into(),
        }
    }

    async fn connect(&self) -> io::Result<Connection> {
        let tcp = TcpStream::connect(self.addr).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from("localhost").expect("a name");
        let stream = self.tls.connect(name, tcp).await?;
        Ok(Connection {
            stream,
            buffer: vec![0; 64 * 1024],
        })
    }
}

struct Connection {
    stream: TlsStream<TcpStream>,
    buffer: Vec<u8>,
}

impl Connection {
    /// One request and its whole answer, which must be a 200.
    async fn ask(&mut self, request: &[u8]) -> io::Result<()> {
        self.stream.write_all(request).await?;
        self.stream.flush().await?;
        let mut filled = 0;
        let mut wanted = usize::MAX;
        while filled < wanted {
            if filled == self.buffer.len() {
                self.buffer.resize(filled * 2, 0);
            }
            match self.stream.read(&mut self.buffer[filled..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
            if wanted == usize::MAX
                && let Some(end) = self.buffer[..filled]
                    .windows(4)
                    .position(|four| four == b"\r\n\r\n")
            {
                wanted = end + 4 + body_length(&self.buffer[..end])?;
            }
        }
        Ok(())
    }
}

fn body_length(head: &[u8]) -> io::Result<usize> {
    let head = std::str::from_utf8(head).map_err(io::Error::other)?;
    if !head.starts_with("HTTP/1.1 200 ") {
        return Err(io::Error::other(format!("not a 200: {head}")));
    }
    head.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .ok_or_else(|| io::Error::other(format!("no length: {head}")))
}

/// Closed loop: so many connections, each asking again as soon as it was answered. Answers in that time.
pub(crate) fn closed(
    runtime: &Runtime,
    target: &Target,
    connections: usize,
    how_long: Duration,
) -> u64 {
    until(runtime, target, connections, move |_, start| {
        start.elapsed() < how_long
    })
}

/// Closed loop until so many answers have come.
pub(crate) fn closed_count(
    runtime: &Runtime,
    target: &Target,
    connections: usize,
    answers: u64,
) -> u64 {
    until(runtime, target, connections, move |answered, _| {
        answered < answers
    })
}

fn until(
    runtime: &Runtime,
    target: &Target,
    connections: usize,
    goes_on: impl Fn(u64, Instant) -> bool + Copy + Send + 'static,
) -> u64 {
    let answered = Arc::new(AtomicU64::new(0));
    runtime.block_on(async {
        // all handshakes first: they are no part of the figure
        let mut opened = Vec::new();
        for _ in 0..connections {
            opened.push(target.connect().await.expect("the server accepts"));
        }
        let start = Instant::now();
        let mut tasks = JoinSet::new();
        for mut connection in opened {
            let (answered, request) = (Arc::clone(&answered), Arc::clone(&target.request));
            tasks.spawn(async move {
                while goes_on(answered.load(Ordering::Relaxed), start) {
                    connection
                        .ask(&request)
                        .await
                        .expect("every request is answered");
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.expect("no connection fails");
        }
    });
    answered.load(Ordering::Relaxed)
}

/// Open loop at `rate` requests a second: a request is due at its instant whatever became of the earlier ones, and its
/// latency counts from that instant. All latencies, sorted.
pub(crate) fn open(
    runtime: &Runtime,
    target: &Target,
    connections: usize,
    rate: f64,
    how_long: Duration,
) -> Vec<Duration> {
    let failed = Arc::new(AtomicBool::new(false));
    let mut latencies: Vec<Duration> = runtime.block_on(async {
        let mut queues = Vec::new();
        let mut tasks = JoinSet::new();
        for _ in 0..connections {
            let mut connection = target.connect().await.expect("the server accepts");
            let (queue, mut due) = mpsc::unbounded_channel::<Instant>();
            let request = Arc::clone(&target.request);
            queues.push(queue);
            tasks.spawn(async move {
                let mut latencies = Vec::new();
                while let Some(intended) = due.recv().await {
                    connection
                        .ask(&request)
                        .await
                        .expect("every request is answered");
                    latencies.push(intended.elapsed());
                }
                latencies
            });
        }
        // a thread of its own: tokio's timer knows whole milliseconds only
        let pace = Duration::from_secs_f64(1.0 / rate);
        let broken = Arc::clone(&failed);
        let pacer = thread::spawn(move || {
            let start = Instant::now();
            let mut intended = Duration::ZERO;
            let mut turn = queues.iter().cycle();
            while intended < how_long {
                if let Some(early) = intended.checked_sub(start.elapsed()) {
                    thread::sleep(early);
                }
                let queue = turn.next().expect("a cycle of some does not end");
                broken.fetch_or(queue.send(start + intended).is_err(), Ordering::Relaxed);
                intended += pace;
            }
        });
        let mut all = Vec::new();
        while let Some(latencies) = tasks.join_next().await {
            all.extend(latencies.expect("no connection fails"));
        }
        pacer.join().expect("the pacer paces");
        all
    });
    assert!(
        !failed.load(Ordering::Relaxed),
        "a connection was gone before its time"
    );
    latencies.sort_unstable();
    latencies
}
