//! A generator of requests in the network of a pod.
//!
//! Open loop: each request has an instant at which it is to be sent, and its latency counts from there, so that a proxy
//! that stalls is charged for every request it held up.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{containers, node::Namespace};

/// Threads that send, each over a connection of its own; enough that a slow answer holds nobody else up.
const SENDERS: usize = 32;
/// After this long a request has failed. A machine whose cores are all busy is slow, and loses nothing.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is sent, and how.
#[derive(Clone)]
pub(crate) struct Load {
    pub(crate) server: SocketAddr,
    pub(crate) host: String,
    pub(crate) path: &'static str,
    /// Requests a second.
    pub(crate) rate: u32,
    /// Whether a connection carries more than one request.
    pub(crate) keeps_connections: bool,
}

/// What became of the requests.
#[derive(Default)]
pub(crate) struct Told {
    /// Latencies of those that were answered with 200, sorted.
    pub(crate) micros: Vec<u64>,
    /// How the others ended, and how many seconds after the beginning.
    pub(crate) failures: Vec<(f64, String)>,
}

impl Told {
    pub(crate) fn add(&mut self, other: Self) {
        self.micros.extend(other.micros);
        self.micros.sort_unstable();
        self.failures.extend(other.failures);
    }

    /// The latency that this share of the answers kept to, in milliseconds.
    pub(crate) fn at(&self, share: f64) -> f64 {
        let index = (self.micros.len() as f64 * share) as usize;
        let index = index.min(self.micros.len().saturating_sub(1));
        self.micros.get(index).copied().unwrap_or_default() as f64 / 1000.0
    }
}

/// A load that goes on until it is stopped.
pub(crate) struct Running {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Told>,
}

impl Load {
    /// 200 requests a second for a Service's port 80, over connections that are kept.
    pub(crate) async fn to(namespace: &Namespace, service: &str) -> Self {
        let address = [
            "get",
            "service",
            service,
            "-o",
            "jsonpath={.spec.clusterIP}",
        ];
        let address = namespace.kubectl(&address).await;
        Self {
            server: format!("{address}:80").parse().expect("an address"),
            host: format!("{service}.{}.svc.cluster.local", namespace.name()),
            path: "/echo?msg=malha",
            rate: 200,
            keeps_connections: true,
        }
    }

    /// Sends for this long, from a pod's network.
    pub(crate) fn run(&self, from: &File, time: Duration) -> Told {
        let count = (f64::from(self.rate) * time.as_secs_f64()) as u64;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                containers::enter(from);
                self.send(count, &AtomicBool::new(false))
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Sends from a pod's network until it is stopped.
    pub(crate) fn start(self, from: File) -> Running {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            containers::enter(&from);
            self.send(u64::MAX, &stopped)
        });
        Running { stop, thread }
    }

    /// Sends each request at its instant.
    fn send(&self, count: u64, stop: &AtomicBool) -> Told {
        let interval = Duration::from_secs(1) / self.rate;
        let next = AtomicU64::new(0);
        let told = Mutex::new(Told::default());
        let began = Instant::now() + Duration::from_millis(20);
        let senders = SENDERS.min(usize::try_from(count).unwrap_or(usize::MAX));
        std::thread::scope(|scope| {
            for _ in 0..senders {
                scope.spawn(|| {
                    let mut connection = None;
                    let mut own = Told::default();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= count || stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let after = interval.mul_f64(number as f64);
                        let due = began + after;
                        std::thread::sleep(due.saturating_duration_since(Instant::now()));
                        match self.ask(&mut connection) {
                            Ok(()) => own.micros.push(due.elapsed().as_micros() as u64),
                            Err(why) => {
                                own.failures.push((after.as_secs_f64(), why));
                                connection = None;
                            }
                        }
                    }
                    told.lock().expect("no thread panics").add(own);
                });
            }
        });
        told.into_inner().expect("no thread panicked")
    }

    /// One request over a connection, which is opened where there is none.
    fn ask(&self, connection: &mut Option<BufReader<TcpStream>>) -> Result<(), String> {
        let text = |what: &str, error: std::io::Error| format!("{what}: {error}");
        if connection.is_none() {
            let stream = TcpStream::connect_timeout(&self.server, PATIENCE)
                .and_then(|stream| {
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(PATIENCE))?;
                    Ok(stream)
                })
                .map_err(|error| text("connect", error))?;
            *connection = Some(BufReader::new(stream));
        }
        let stream = connection.as_mut().ok_or("no connection")?;
        let asks = match self.keeps_connections {
            true => "keep-alive",
            false => "close",
        };
        let request = format!(
            "GET {} HTTP/1.1\r\nhost: {}\r\nconnection: {asks}\r\n\r\n",
            self.path, self.host
        );
        stream
            .get_mut()
            .write_all(request.as_bytes())
            .map_err(|error| text("write", error))?;
        let answer = Answer::read(stream).map_err(|error| text("read", error))?;
        if answer.closes || !self.keeps_connections {
            *connection = None;
        }
        match answer.status.split(' ').nth(1) {
            Some("200") => Ok(()),
            _ => Err(format!("{}: {}", answer.status, answer.body)),
        }
    }
}

struct Answer {
    status: String,
    body: String,
    closes: bool,
}

impl Answer {
    fn read(stream: &mut BufReader<TcpStream>) -> std::io::Result<Self> {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let status = line.trim_end().to_owned();
        let (mut length, mut closes) = (0, false);
        loop {
            line.clear();
            stream.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else {
                break;
            };
            let value = value.trim();
            if name.eq_ignore_ascii_case("content-length") {
                length = value.parse().unwrap_or_default();
            }
            closes |=
                name.eq_ignore_ascii_case("connection") && value.eq_ignore_ascii_case("close");
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body)?;
        let body = String::from_utf8_lossy(&body).into_owned();
        Ok(Self {
            status,
            body,
            closes,
        })
    }
}

impl Running {
    /// What became of it until now.
    pub(crate) fn stop(self) -> Told {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

#[test]
fn requests_are_sent_at_their_instants_and_what_became_of_each_is_told() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let server = socket.local_addr().expect("an address");
    let served = Arc::new(AtomicU64::new(0));
    std::thread::spawn(move || {
        for stream in socket.incoming().flatten() {
            let served = Arc::clone(&served);
            std::thread::spawn(move || {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                while stream.read_line(&mut line).is_ok_and(|count| count > 0) {
                    if line.ends_with("\r\n\r\n") {
                        let answer: &[u8] = match served.fetch_add(1, Ordering::Relaxed) {
                            4 => b"HTTP/1.1 503 Unavailable\r\nContent-Length: 2\r\n\r\nno",
                            _ => b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nmalha",
                        };
                        stream.get_mut().write_all(answer).expect("written");
                        line.clear();
                    }
                }
            });
        }
    });
    let load = Load {
        server,
        host: "web".to_owned(),
        path: "/",
        rate: 100,
        keeps_connections: true,
    };
    let began = Instant::now();
    let told = load.send(30, &AtomicBool::new(false));
    assert_eq!((told.micros.len(), told.failures.len()), (29, 1));
    assert_eq!(told.failures[0].1, "HTTP/1.1 503 Unavailable: no");
    assert!(
        began.elapsed() >= Duration::from_millis(290),
        "open loop keeps its pace"
    );
    assert!(told.at(0.5) <= told.at(0.99));
}
