//! A listener: the port is taken first, then it serves until it is told to stop and has drained.
//!
//! socket -> place among the [`Connections`] -> handshake -> HTTP/1.1 or HTTP/2 -> the `Router`

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::available_parallelism;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use futures::FutureExt;
use hyper::body::{Body as _, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ServerConfig;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::tls::connections::{Connection, Connections, Counts, Room, Seat, Stage};
use crate::tls::watched::{WatchedBody, WatchedStream};
use crate::tls::{
    Alpn, ClientTrust, Leaving, Metrics, PROVIDER, Peer, ServingCertificate, TlsError,
    server_config,
};

/// What a peer may take of a listener.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections open at once. When a further one comes, the one whose peer makes us wait longest is closed, else the
    /// one that has been idle longest.
    pub connections: usize,
    /// From the connection to the end of the TLS handshake.
    pub handshake: Duration,
    /// From the handshake to the end of the first request's head; later, from a head's first byte to its end.
    pub head: Duration,
    /// A request's head, in bytes.
    pub head_bytes: usize,
    /// From an HTTP/1.1 request's head to its answer, and at most this long for its body. A service may have closer
    /// limits of its own. Streams of HTTP/2 are bounded by their service alone.
    pub request: Duration,
    /// Between two requests.
    pub idle: Duration,
    /// How old a connection of HTTP/2 grows, give or take a tenth, before its client is told to open another one: so that
    /// clients spread again over replicas that came and went, and certificates are shown anew. Whatever is open then may
    /// still take [`finish`](Self::finish).
    pub age: Duration,
    /// What every connection is granted before it may be closed for a newcomer.
    pub grace: Duration,
    /// How long what a peer still sends is read after the last answer, so that it is not cut off.
    pub linger: Duration,
    /// After the stop: how long new connections are still accepted, because others learn of the stop later than we do.
    pub drain: Duration,
    /// After that: how long open requests may still take.
    pub finish: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1_000,
            handshake: Duration::from_secs(5),
            head: Duration::from_secs(10),
            head_bytes: 16 << 10,
            request: Duration::from_secs(30),
            idle: Duration::from_secs(90),
            age: Duration::from_secs(3600),
            grace: Duration::from_millis(100),
            linger: Duration::from_secs(2),
            drain: Duration::from_secs(10),
            finish: Duration::from_secs(8),
        }
    }
}

/// A port that is taken, and not served yet.
pub struct Bound {
    listener: TcpListener,
    addr: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
    limits: Limits,
    counts: Counts,
}

impl Bound {
    /// Takes the port of `addr` for TLS with whatever `certificate` holds at each handshake.
    ///
    /// # Errors
    /// [`TlsError::Listen`] where the port cannot be had.
    pub async fn new(
        addr: SocketAddr,
        certificate: Arc<ServingCertificate>,
        alpn: Alpn,
        limits: Limits,
    ) -> Result<Self, TlsError> {
        Self::take(addr, Some(server_config(certificate, None, alpn)), limits)
    }

    /// As [`Self::new`] for HTTP/2 and HTTP/1.1, and asks each client for a certificate that `clients` trusts at its
    /// handshake.
    ///
    /// # Errors
    /// [`TlsError::Listen`] where the port cannot be had.
    pub async fn asking(
        addr: SocketAddr,
        certificate: Arc<ServingCertificate>,
        clients: Arc<ClientTrust>,
        limits: Limits,
    ) -> Result<Self, TlsError> {
        let tls = server_config(certificate, Some(clients), Alpn::Http2);
        Self::take(addr, Some(tls), limits)
    }

    /// Takes the port of `addr` for plain HTTP/1.1: for what holds no secret, such as probes and metrics.
    ///
    /// # Errors
    /// [`TlsError::Listen`] where the port cannot be had.
    pub async fn plain(addr: SocketAddr, limits: Limits) -> Result<Self, TlsError> {
        Self::take(addr, None, limits)
    }

    fn take(
        addr: SocketAddr,
        tls: Option<Arc<ServerConfig>>,
        limits: Limits,
    ) -> Result<Self, TlsError> {
        let listen = || -> io::Result<(TcpListener, SocketAddr)> {
            let (socket, addr) = socket(addr)?;
            // A restart must not wait for the last connections of the process before it.
            socket.set_reuseaddr(true)?;
            socket.bind(addr)?;
            let listener = socket.listen(BACKLOG)?;
            let addr = listener.local_addr()?;
            Ok((listener, addr))
        };
        let (listener, addr) = listen().map_err(|source| TlsError::Listen { addr, source })?;
        Ok(Self {
            listener,
            addr,
            tls,
            limits,
            counts: Counts::default(),
        })
    }

    /// Where it listens; the port is known even where port 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Counts connections in `metrics`, under the name `listener`.
    #[must_use]
    pub fn counted(mut self, metrics: &Metrics, listener: &'static str) -> Self {
        self.counts = metrics.listener(listener);
        self
    }

    /// Answers with `app` until `stop`, and then drains: answers carry `Connection: close`, new connections are still
    /// accepted for [`Limits::drain`], and open requests may end within [`Limits::finish`]. Then the port is free.
    ///
    /// In each request `app` finds the [`Peer`], its address also as [`ConnectInfo`], and over HTTP/2 [`Leaving`].
    pub async fn serve(self, app: Router, stop: CancellationToken) {
        let Self {
            listener,
            addr,
            tls,
            limits,
            counts,
        } = self;
        let connections = Connections::new(limits.clone(), counts.clone());
        let server = Arc::new(Server {
            app,
            tls,
            handshakes: Semaphore::new(handshakes_at_once()),
            http1: http1(&limits),
            http2: http2(&limits),
            age: limits.age,
            grace: limits.finish,
            draining: stop,
            finish: CancellationToken::new(),
            counts,
        });
        Accepting {
            listener,
            addr,
            limits,
            connections,
            server,
            tasks: TaskTracker::new(),
        }
        .run()
        .await;
    }
}

/// Connections that the kernel holds for us before they are accepted; it caps this at `net.core.somaxconn`.
const BACKLOG: u32 = 4_096;

/// A socket for an address. `[::]` is every address, those of IPv4 too; where the kernel has no IPv6 these are all.
fn socket(addr: SocketAddr) -> io::Result<(TcpSocket, SocketAddr)> {
    match addr {
        SocketAddr::V4(_) => Ok((TcpSocket::new_v4()?, addr)),
        SocketAddr::V6(_) => match TcpSocket::new_v6() {
            Err(error) if addr.ip().is_unspecified() && has_no_family(&error) => {
                let every = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), addr.port());
                Ok((TcpSocket::new_v4()?, every))
            }
            socket => Ok((socket?, addr)),
        },
    }
}

fn has_no_family(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::errno::Errno::EAFNOSUPPORT as i32)
}

/// Handshakes whose arithmetic may be queued on the runtime at once.
///
/// A handshake costs some hundred microseconds, a request less. With a thousand handshakes in the run queue a request on
/// an open connection would wait behind all of them; so they wait in a queue of their own, and only a few are in the
/// runtime's: enough to keep every core busy.
fn handshakes_at_once() -> usize {
    2 * available_parallelism().map_or(1, NonZeroUsize::get)
}

fn http1(limits: &Limits) -> http1::Builder {
    let mut http1 = http1::Builder::new();
    http1
        // The listener has its own clock for heads; see `Connections::reap`.
        .header_read_timeout(None)
        .max_header_size(limits.head_bytes)
        // Room for one head beside a first piece of a body; a longer head is refused at this size at the latest.
        .max_buf_size(limits.head_bytes.max(16 << 10))
        // A client that sends its request and closes its half still gets the answer.
        .half_close(true);
    http1
}

fn http2(limits: &Limits) -> http2::Builder<TokioExecutor> {
    let mut http2 = http2::Builder::new(TokioExecutor::new());
    http2
        .timer(TokioTimer::new())
        .max_concurrent_streams(100)
        .max_header_list_size(u32::try_from(limits.head_bytes).unwrap_or(u32::MAX))
        // Rapid reset (CVE-2023-44487): streams reset by the peer before we saw them, and by us for its errors.
        .max_pending_accept_reset_streams(20)
        .max_local_error_reset_streams(100)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    http2
}

/// The accept loop and what it owns.
struct Accepting {
    listener: TcpListener,
    addr: SocketAddr,
    limits: Limits,
    connections: Arc<Connections>,
    server: Arc<Server>,
    tasks: TaskTracker,
}

impl Accepting {
    async fn run(self) {
        let stop = self.server.draining.clone();
        self.accept_until(async { stop.cancelled().await }).await;
        let last = Instant::now() + self.limits.drain;
        tracing::debug!(addr = %self.addr, "draining: still accepting, every answer closes its connection");
        self.accept_until(sleep_until(last)).await;
        self.close().await;
    }

    async fn accept_until(&self, end: impl Future<Output = ()>) {
        let mut end = pin!(end);
        let mut watch = interval(WATCH);
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = &mut end => return,
                _ = watch.tick(), if !self.connections.is_empty() => self.connections.reap(),
                accepted = self.listener.accept() => match accepted {
                    Ok((socket, peer)) => self.admit(socket, peer).await,
                    Err(error) => self.endure(error).await,
                },
            }
        }
    }

    /// Gives a new connection its place, or waits a moment until there is one: meanwhile others wait in the kernel.
    async fn admit(&self, socket: TcpStream, peer: SocketAddr) {
        let patience = Instant::now() + PATIENCE;
        while self.connections.make_room() == Room::Full {
            if Instant::now() > patience {
                self.server.counts.refused.inc();
                return;
            }
            sleep(Duration::from_millis(5)).await;
            self.connections.reap();
        }
        // Who comes by IPv4 to a socket of both families has an address of IPv6 there.
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        self.connections.seat(|seat| {
            let task = self
                .tasks
                .spawn(Arc::clone(&self.server).serve(socket, peer, seat));
            task.abort_handle()
        });
    }

    /// An error of `accept` is a connection's own, or want of descriptors or memory: nothing that another try at once
    /// would mend. One place is freed, and the loop takes a breath.
    async fn endure(&self, error: io::Error) {
        if is_the_connections_own(&error) {
            return;
        }
        tracing::warn!(addr = %self.addr, %error, "cannot accept a connection; trying again");
        self.connections.make_way();
        sleep(Duration::from_millis(100)).await;
    }

    async fn close(self) {
        // Whoever is in the kernel's queue was accepted by the kernel in our name; a closed listener would reset them.
        while let Some(Ok((socket, peer))) = self.listener.accept().now_or_never() {
            self.admit(socket, peer).await;
        }
        drop(self.listener);
        self.server.finish.cancel();
        self.tasks.close();
        let finished = async {
            let mut watch = interval(WATCH);
            loop {
                tokio::select! {
                    () = self.tasks.wait() => return,
                    _ = watch.tick() => self.connections.reap(),
                }
            }
        };
        if timeout(self.limits.finish, finished).await.is_err() {
            let cut = self.connections.close_all();
            tracing::warn!(addr = %self.addr, connections = cut, "not drained in time; connections are cut");
            self.tasks.wait().await;
        }
        tracing::debug!(addr = %self.addr, "drained");
    }
}

/// How often the connections are looked at: what a limit may be overrun by.
const WATCH: Duration = Duration::from_millis(250);

/// How long a newcomer waits for a place while none may be taken away.
const PATIENCE: Duration = Duration::from_secs(1);

fn is_the_connections_own(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

/// What all connections of a listener share.
struct Server {
    app: Router,
    tls: Option<Arc<ServerConfig>>,
    handshakes: Semaphore,
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
    age: Duration,
    /// What open streams may take once their connection is too old.
    grace: Duration,
    /// Answers close their connection from here on.
    draining: CancellationToken,
    /// Connections between two requests close from here on.
    finish: CancellationToken,
    counts: Counts,
}

impl Server {
    async fn serve(self: Arc<Self>, socket: TcpStream, address: SocketAddr, seat: Seat) {
        let connection = seat.connection();
        // Answers are small and awaited: Nagle's algorithm would hold them back for the peer's acknowledgement.
        let _ = socket.set_nodelay(true);
        let Some(tls) = &self.tls else {
            connection.enter(Stage::Head);
            let certificates = Arc::new([]);
            let peer = Peer {
                address,
                certificates,
            };
            return self.http1(socket, &peer, connection).await;
        };
        match self.handshake(socket, Arc::clone(tls), connection).await {
            Ok(stream) => {
                let session = stream.get_ref().1;
                let certificates = session.peer_certificates().unwrap_or_default().into();
                let peer = Peer {
                    address,
                    certificates,
                };
                let over_http2 = session.alpn_protocol() == Some(b"h2");
                connection.enter(Stage::Head);
                match over_http2 {
                    true => self.http2(stream, peer, connection).await,
                    false => self.http1(stream, &peer, connection).await,
                }
            }
            Err(error) => {
                self.counts.handshakes_failed.inc();
                tracing::debug!(%error, "TLS handshake failed");
            }
        }
    }

    async fn handshake(
        &self,
        socket: TcpStream,
        tls: Arc<ServerConfig>,
        connection: &Connection,
    ) -> io::Result<TlsStream<TcpStream>> {
        let hello = LazyConfigAcceptor::new(Acceptor::default(), socket).await?;
        connection.enter(Stage::Handshake);
        let turn = self
            .handshakes
            .acquire()
            .await
            .expect("a semaphore that we own is never closed");
        // Key exchange and signature are made in here.
        let handshake = hello.into_stream(tls);
        drop(turn);
        connection.enter(Stage::Finished);
        handshake.await
    }

    async fn http1<S>(&self, stream: S, peer: &Peer, connection: &Arc<Connection>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let io = TokioIo::new(WatchedStream::new(stream, Arc::clone(connection)));
        let service = service_fn(|request| self.answer_once(request, peer, connection));
        let mut http = pin!(self.http1.serve_connection(io, service));
        let served = tokio::select! {
            served = &mut http => served,
            () = self.finish.cancelled() => {
                http.as_mut().graceful_shutdown();
                http.await
            }
        };
        note(served);
    }

    async fn http2<S>(self: &Arc<Self>, stream: S, peer: Peer, connection: &Arc<Connection>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let io = TokioIo::new(WatchedStream::of_streams(stream, Arc::clone(connection)));
        let (address, leaving) = (peer.address, self.draining.child_token());
        let service = {
            let (server, connection) = (Arc::clone(self), Arc::clone(connection));
            let leaving = Leaving(leaving.clone());
            service_fn(move |mut request| {
                request.extensions_mut().insert(leaving.clone());
                let (server, connection) = (Arc::clone(&server), Arc::clone(&connection));
                let peer = peer.clone();
                async move { server.answer_stream(request, &peer, &connection).await }
            })
        };
        let mut http = pin!(self.http2.serve_connection(io, service));
        let mut old = pin!(sleep(spread(self.age)));
        // HTTP/2 says goodbye with a frame of its own, and open streams go on.
        let served = tokio::select! {
            served = &mut http => Some(served),
            () = self.draining.cancelled() => {
                http.as_mut().graceful_shutdown();
                Some(http.await)
            }
            () = &mut old => {
                http.as_mut().graceful_shutdown();
                leaving.cancel();
                timeout(self.grace, http).await.ok()
            }
        };
        match served {
            Some(served) => note(served),
            None => tracing::debug!(%address, "too old, and its streams did not end: cut"),
        }
    }

    /// Over HTTP/1.1 a request is over when its answer begins: the connection's own limits go on from there.
    async fn answer_once(
        &self,
        request: Request<Incoming>,
        peer: &Peer,
        connection: &Arc<Connection>,
    ) -> hyper::Result<Response<Body>> {
        let _request = Open::new(
            connection,
            match request.body().is_end_stream() {
                true => Stage::Serving,
                false => Stage::Body,
            },
        );
        let mut response = self.answer(request, peer, connection).await;
        if self.draining.is_cancelled() {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }

    /// Over HTTP/2 a request is over when its answer ends, which for a subscription may be in an hour: until then the
    /// connection is in use, however long nothing is said.
    async fn answer_stream(
        &self,
        request: Request<Incoming>,
        peer: &Peer,
        connection: &Arc<Connection>,
    ) -> hyper::Result<Response<Body>> {
        let open = Open::new(connection, Stage::Streaming);
        let response = self.answer(request, peer, connection).await;
        Ok(response.map(|body| Body::new(Held { body, _open: open })))
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        peer: &Peer,
        connection: &Arc<Connection>,
    ) -> Response<Body> {
        let mut request =
            request.map(|body| Body::new(WatchedBody::new(body, Arc::clone(connection))));
        let extensions = request.extensions_mut();
        extensions.insert(ConnectInfo(peer.address));
        extensions.insert(peer.clone());
        let Ok(response) = self.app.clone().oneshot(request).await;
        response
    }
}

/// Nine to eleven tenths of a time, so that what began together does not end together.
fn spread(time: Duration) -> Duration {
    let mut dice = [0; 2];
    // Without randomness all of them are as old as each other: no harm.
    let _ = PROVIDER.secure_random.fill(&mut dice);
    let dice = f64::from(u16::from_ne_bytes(dice)) / f64::from(u16::MAX);
    time.mul_f64(0.9 + 0.2 * dice)
}

/// A request between its head and the end of its answer.
struct Open(Arc<Connection>);

impl Open {
    fn new(connection: &Arc<Connection>, stage: Stage) -> Self {
        connection.begin(stage);
        Self(Arc::clone(connection))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// An answer that keeps its request open until it was sent.
struct Held {
    body: Body,
    _open: Open,
}

impl hyper::body::Body for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection that ends badly is its peer's affair: it is worth a line only to somebody who looks for it.
fn note(served: hyper::Result<()>) {
    if let Err(error) = served {
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            "connection ended early"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn one_socket_is_for_both_families_and_knows_callers_by_their_own() {
        let every = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0);
        let bound = Bound::plain(every, Limits::default()).await;
        let bound = bound.expect("a free port");
        let port = bound.local_addr().port();
        let who = |ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { peer.ip().to_string() };
        let stop = CancellationToken::new();
        let app = Router::new().route("/", get(who));
        let serving = tokio::spawn(bound.serve(app, stop.clone()));
        let callers: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        for ip in callers {
            let Ok(mut stream) = TcpStream::connect((ip, port)).await else {
                assert!(ip.is_ipv6(), "not every machine has IPv6, but this");
                continue;
            };
            let ask = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
            stream.write_all(ask).await.expect("written");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("an answer");
            assert!(answer.ends_with(&format!("\r\n\r\n{ip}")), "{answer}");
        }
        stop.cancel();
        serving.await.expect("it ends");
    }
}
