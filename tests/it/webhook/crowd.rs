//! Thousands of connections that want nothing, beside a few that carry reviews.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use malha::tls::Limits;
use malha::webhook;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio_rustls::TlsConnector;

use super::{NAME, Served, ordinary};
use crate::support::https::trusting;

const SLOW: usize = 5_000;

/// A third each hangs in the handshake, in a head and in a body, and each is opened anew when it is closed.
///
/// Everybody has threads of their own, as they would have machines: else the crowd's own handshakes would keep the honest
/// client from its turn.
#[test]
fn five_thousand_slow_connections_do_not_keep_reviews_out() {
    let (server, crowd, client) = (runtime(2), runtime(1), runtime(1));
    let served = server.block_on(Served::start());
    let config = trusting([served.root.as_slice()]);
    for number in 0..SLOW {
        crowd.spawn(linger(number, served.addr, config.clone()));
    }
    let (mut on_kept, mut on_new) = client.block_on(async {
        let mut kept = served.connect().await;
        let (mut on_kept, mut on_new) = (Vec::new(), Vec::new());
        for round in 0..300 {
            let start = Instant::now();
            let answer = kept
                .post("/inject/ns", &ordinary(&format!("kept-{round}")))
                .await
                .expect("the connection that carries reviews is never closed");
            assert_eq!(answer.status, 200);
            on_kept.push(start.elapsed());
            let start = Instant::now();
            let answer = served
                .connect()
                .await
                .post("/inject/ns", &ordinary(&format!("new-{round}")))
                .await
                .expect("a new connection finds its place");
            assert_eq!(answer.status, 200);
            on_new.push(start.elapsed());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        (on_kept, on_new)
    });
    assert_eq!(crowd.metrics().num_alive_tasks(), SLOW);
    println!(
        "beside {SLOW} slow connections: p99 {:?} on an open connection, {:?} on a new one",
        p99(&mut on_kept),
        p99(&mut on_new)
    );
    crowd.shutdown_background();
    client.block_on(served.is_well());
}

fn runtime(threads: usize) -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .expect("a runtime")
}

async fn linger(number: usize, addr: SocketAddr, config: Arc<ClientConfig>) {
    loop {
        let _ = linger_once(number, addr, config.clone()).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn linger_once(number: usize, addr: SocketAddr, config: Arc<ClientConfig>) -> io::Result<()> {
    let mut tcp = TcpStream::connect(addr).await?;
    let begun: &[u8] = match number % 3 {
        0 => {
            tcp.write_all(&[22, 3, 1]).await?;
            return until_closed(&mut tcp).await;
        }
        1 => b"POST /inject/ns HTTP/1.1\r\nHost",
        _ => b"POST /inject/ns HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    };
    let name = ServerName::try_from(NAME).map_err(io::Error::other)?;
    let mut tls = TlsConnector::from(config).connect(name, tcp).await?;
    tls.write_all(begun).await?;
    tls.flush().await?;
    until_closed(&mut tls).await
}

async fn until_closed(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<()> {
    while stream.read(&mut [0; 64]).await? > 0 {}
    Ok(())
}

#[tokio::test]
async fn a_full_house_sends_away_who_waits_longest_and_keeps_who_was_served() {
    let limits = Limits {
        connections: 4,
        grace: Duration::ZERO,
        ..Limits::default()
    };
    let served = Served::with(limits, webhook::Limits::default()).await;
    let mut regular = served.connect().await;
    regular
        .post("/inject/ns", &ordinary("u"))
        .await
        .expect("an answer");
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(served.addr).await.expect("accepted"));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    regular
        .post("/inject/ns", &ordinary("u"))
        .await
        .expect("still there");
    // The youngest three hold the other places.
    let mut byte = [0];
    for (number, stream) in silent.iter_mut().enumerate() {
        let read = tokio::time::timeout(Duration::from_millis(50), stream.read(&mut byte)).await;
        assert_eq!(read.is_ok(), number < 17, "connection {number}");
    }
}

#[tokio::test]
async fn among_idle_connections_the_oldest_makes_room() {
    let limits = Limits {
        connections: 3,
        ..Limits::default()
    };
    let served = Served::with(limits, webhook::Limits::default()).await;
    let mut served_ones = Vec::new();
    for number in 0..5 {
        let mut connection = served.connect().await;
        connection
            .post("/inject/ns", &ordinary(&format!("u-{number}")))
            .await
            .expect("an answer");
        served_ones.push(connection);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for (number, connection) in served_ones.iter_mut().enumerate() {
        let answer = connection.post("/inject/ns", &ordinary("again")).await;
        assert_eq!(answer.is_ok(), number >= 2, "connection {number}");
    }
}

fn p99(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() * 99 / 100]
}
