//! A listener that offers HTTP/2: frames by hand, since no client would send what must be endured.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use malha::tls::{Alpn, Bound, Limits, ServingCertificate};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

use super::{NAME, ends, self_signed};
use crate::support::https::trusting;

const PATIENCE: Duration = Duration::from_secs(60);

/// GET / with a name, in HPACK: three fields of the static table and one literal.
const FIELDS: &[u8] = &[0x82, 0x87, 0x84, 0x41, 1, b'x'];

#[tokio::test]
async fn both_protocols_are_answered() {
    let (addr, root, _stop) = serve().await;
    let mut stream = connect(addr, &root, b"h2").await;
    stream.write_all(&opening()).await.expect("sent");
    stream
        .write_all(&frame(1, 0x5, 1, FIELDS))
        .await
        .expect("sent");
    let answered = async {
        loop {
            let (kind, stream_id, _) = read_frame(&mut stream).await.expect("a frame");
            if (kind, stream_id) == (1, 1) {
                return;
            }
        }
    };
    timeout(PATIENCE, answered).await.expect("headers");

    let mut stream = connect(addr, &root, b"http/1.1").await;
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .await
        .expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer");
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"));
}

/// CVE-2023-44487: streams that are reset as soon as they are opened.
#[tokio::test]
async fn a_flood_of_resets_ends_its_own_connection_and_no_other() {
    flood(|stream_id| {
        [
            frame(1, 0x5, stream_id, FIELDS),
            frame(3, 0, stream_id, &8_u32.to_be_bytes()),
        ]
        .concat()
    })
    .await;
}

/// CVE-2024-27316 and its kin: a head that never ends.
#[tokio::test]
async fn a_head_that_never_ends_ends_its_own_connection_and_no_other() {
    let literal = [&[0x40, 1, b'y', 100][..], &[b'z'; 100]].concat();
    flood(|stream_id| match stream_id {
        1 => frame(1, 0x1, 1, FIELDS),
        _ => frame(9, 0, 1, &literal.repeat(100)),
    })
    .await;
}

/// CVE-2019-9512, 9515: each of them asks for an answer.
#[tokio::test]
async fn pings_and_settings_that_nobody_waits_for_end_nothing_else() {
    for flooding in [frame(6, 0, 0, &[0; 8]), frame(4, 0, 0, &[])] {
        let (addr, root, stop) = serve().await;
        let mut stream = connect(addr, &root, b"h2").await;
        stream.write_all(&opening()).await.expect("sent");
        for _ in 0..200 {
            // The answers are not read, so in the end nothing more can be sent.
            let more = stream.write_all(&flooding);
            if timeout(Duration::from_millis(200), more).await.is_err() {
                break;
            }
        }
        is_well(addr, &root).await;
        stop.cancel();
    }
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed() {
    let (addr, root, _stop) = serve_with(Limits {
        head: Duration::from_millis(300),
        idle: Duration::from_millis(300),
        ..Limits::default()
    })
    .await;
    for begun in [Vec::new(), opening()] {
        let mut stream = connect(addr, &root, b"h2").await;
        stream.write_all(&begun).await.expect("sent");
        assert!(timeout(PATIENCE, ends(&mut stream)).await.expect("closed"));
    }
}

/// Sends `piece` for stream after stream until the listener has had enough, and asks somebody else how it is.
async fn flood(piece: impl Fn(u32) -> Vec<u8>) {
    let (addr, root, _stop) = serve().await;
    let mut stream = connect(addr, &root, b"h2").await;
    stream.write_all(&opening()).await.expect("sent");
    let flooding = async {
        let (mut read, mut write) = tokio::io::split(&mut stream);
        let sending = async {
            for number in 0.. {
                if write.write_all(&piece(2 * number + 1)).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = sending => {}
            ended = ends(&mut read) => assert!(ended),
        }
    };
    timeout(PATIENCE, flooding)
        .await
        .expect("the connection is ended");
    is_well(addr, &root).await;
}

async fn is_well(addr: std::net::SocketAddr, root: &[u8]) {
    malha::tls::probe(addr, NAME, [root])
        .await
        .expect("others are answered");
}

async fn serve() -> (std::net::SocketAddr, Vec<u8>, CancellationToken) {
    serve_with(Limits::default()).await
}

async fn serve_with(limits: Limits) -> (std::net::SocketAddr, Vec<u8>, CancellationToken) {
    let certificate = ServingCertificate::new();
    let keyed = self_signed(NAME);
    certificate.publish(&keyed).expect("a good certificate");
    let addr = ([127, 0, 0, 1], 0).into();
    let bound = Bound::new(addr, Arc::clone(&certificate), Alpn::Http2, limits)
        .await
        .expect("a free port");
    let addr = bound.local_addr();
    let stop = CancellationToken::new();
    let app = Router::new().route("/", get(async || "here"));
    tokio::spawn(bound.serve(app, stop.clone()));
    (addr, keyed.chain[0].clone(), stop)
}

async fn connect(addr: std::net::SocketAddr, root: &[u8], protocol: &[u8]) -> TlsStream<TcpStream> {
    let mut config = (*trusting([root])).clone();
    config.alpn_protocols = vec![protocol.to_vec()];
    let tcp = TcpStream::connect(addr).await.expect("accepted");
    let stream = TlsConnector::from(Arc::new(config))
        .connect(ServerName::try_from(NAME).expect("a name"), tcp)
        .await
        .expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol));
    stream
}

/// The preface and empty settings.
fn opening() -> Vec<u8> {
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
    ]
    .concat()
}

/// RFC 9113 4.1.
fn frame(kind: u8, flags: u8, stream_id: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream_id.to_be_bytes());
    frame.extend(payload);
    frame
}

async fn read_frame(
    stream: &mut (impl AsyncReadExt + Unpin),
) -> std::io::Result<(u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await?;
    let [a, b, c, kind, _, id @ ..] = head;
    let length = u32::from_be_bytes([0, a, b, c]);
    let mut payload = vec![0; usize::try_from(length).expect("24 bits")];
    stream.read_exact(&mut payload).await?;
    Ok((kind, u32::from_be_bytes(id), payload))
}
