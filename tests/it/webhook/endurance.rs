//! Bytes that nobody meant as a request: whatever comes, before the handshake or after it, the next review is answered.

use std::sync::Arc;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{NAME, Served, ends, ordinary, request};
use crate::dice::Dice;
use crate::support::https::{Connection, trusting};

const STREAMS: u64 = 1_500;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_bytes_before_the_handshake_end_the_process() {
    let served = Arc::new(Served::start().await);
    let hello = client_hello().await;
    many(&served, STREAMS, async |served, seed| {
        let mut dice = Dice::new(seed);
        let bytes = match dice.below(4) {
            0 => noise(&mut dice, 2_000),
            1 => plain_http(&mut dice),
            // Records of any type, length and content.
            2 => {
                let body = noise(&mut dice, 300);
                let kind = *dice.pick(&[20, 21, 22, 23, 24, 255]);
                let length = match dice.chance(50) {
                    true => u16::try_from(body.len()).expect("short"),
                    false => u16::try_from(dice.below(1 << 16)).expect("16 bits"),
                };
                let [high, low] = length.to_be_bytes();
                [vec![kind, 3, 3, high, low], body].concat()
            }
            _ => mutated(&mut dice, &hello),
        };
        let mut stream = TcpStream::connect(served.addr).await.expect("accepted");
        let _ = stream.write_all(&bytes).await;
        leave(&mut dice, &mut stream).await;
    })
    .await;
    served.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_bytes_after_the_handshake_end_the_process() {
    let served = Arc::new(Served::start().await);
    many(&served, STREAMS, async |served, seed| {
        let mut dice = Dice::new(seed);
        let body = ordinary("u");
        let head = format!(
            "POST /inject/ns HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {}",
            body.len()
        );
        let good = request(&head, &body);
        let bytes = match dice.below(4) {
            0 => noise(&mut dice, 3_000),
            1 => plain_http(&mut dice),
            2 => [
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
                noise(&mut dice, 500),
            ]
            .concat(),
            _ => mutated(&mut dice, &good),
        };
        let tcp = TcpStream::connect(served.addr).await.expect("accepted");
        let mut stream = TlsConnector::from(trusting([served.root.as_slice()]))
            .connect(ServerName::try_from(NAME).expect("a name"), tcp)
            .await
            .expect("a handshake");
        let _ = stream.write_all(&bytes).await;
        let _ = stream.flush().await;
        leave(&mut dice, &mut stream).await;
    })
    .await;
    served.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_body_ends_the_process_and_each_gets_an_answer() {
    let served = Arc::new(Served::start().await);
    many(&served, STREAMS / 10, async |served, seed| {
        let mut dice = Dice::new(seed);
        let mut connection = served.connect().await;
        for _ in 0..20 {
            let body = match dice.below(3) {
                0 => noise(&mut dice, 3_000),
                _ => mutated(&mut dice, &ordinary("u")),
            };
            let answer = connection
                .post("/inject/ns", &body)
                .await
                .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert!(
                [200, 400].contains(&answer.status),
                "seed {seed}: {} for {}",
                answer.status,
                String::from_utf8_lossy(&body)
            );
        }
    })
    .await;
    assert_eq!(served.metrics.count(malha::inject::Reason::Internal), 0);
    served.is_well().await;
}

/// What 10 000 failed requests leave behind: no descriptor, no task, no request in flight.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_connections_leave_nothing_behind() {
    let served = Arc::new(Served::start().await);
    let fail = async |served: &Served, seed: u64| {
        let mut dice = Dice::new(seed);
        if dice.chance(30) {
            let mut stream = TcpStream::connect(served.addr).await.expect("accepted");
            let _ = stream.write_all(&noise(&mut dice, 500)).await;
        } else if let Ok(mut connection) = served.try_connect().await {
            let _ = connection.send(&noise(&mut dice, 500)).await;
        }
    };
    many(&served, 500, fail).await;
    served.is_well().await;
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let settled = |most: usize| async move {
        for _ in 0..1_000 {
            if tasks() <= most {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("{} tasks are left of {most}", tasks());
    };
    // The accept loop and nobody else.
    settled(1).await;
    many(&served, 2_000, fail).await;
    settled(1).await;
    served.is_well().await;
}

/// Runs `one` for each seed, sixteen at a time.
async fn many(served: &Arc<Served>, seeds: u64, one: impl AsyncFn(&Served, u64)) {
    use futures::StreamExt;
    futures::stream::iter(0..seeds)
        .for_each_concurrent(16, |seed| one(served, seed))
        .await;
}

/// Goes away: at once, after saying goodbye, or after hearing the peer out.
async fn leave(dice: &mut Dice, stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin)) {
    match dice.below(3) {
        0 => {}
        1 => {
            let _ = stream.shutdown().await;
        }
        _ => {
            let _ = stream.shutdown().await;
            ends(stream).await;
        }
    }
}

fn noise(dice: &mut Dice, most: usize) -> Vec<u8> {
    (0..dice.below(most)).map(|_| dice.next() as u8).collect()
}

/// Bits flipped, pieces doubled, cut or overwritten.
fn mutated(dice: &mut Dice, bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=dice.below(4) {
        if bytes.is_empty() {
            break;
        }
        let place = dice.below(bytes.len());
        match dice.below(5) {
            0 => bytes[place] ^= 1 << dice.below(8),
            1 => bytes.truncate(place),
            2 => bytes[place] = *dice.pick(b"\0\n\r\"{}[]:,\\0\xff"),
            3 => {
                let piece = bytes[place..(place + 40).min(bytes.len())].to_vec();
                bytes.splice(place..place, piece);
            }
            _ => {
                let end = (place + dice.below(30)).min(bytes.len());
                bytes.drain(place..end);
            }
        }
    }
    bytes
}

fn plain_http(dice: &mut Dice) -> Vec<u8> {
    let method = *dice.pick(&["GET", "POST", "OPTIONS", "CONNECT", "\0", "P\u{e4}ST", ""]);
    let path = *dice.pick(&[
        "/",
        "/inject/ns",
        "*",
        "http://x/inject/ns",
        "/%",
        "x:443",
        "/\u{0}",
    ]);
    let version = *dice.pick(&["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", ""]);
    let headers = [
        "Host: x",
        "Content-Length: 5",
        "Content-Length: -1",
        "Content-Length: 18446744073709551616",
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: gzip, chunked",
        "Expect: 100-continue",
        "Expect: the unexpected",
        "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk",
        "Connection: close",
        "Content-Type: application/json",
        ": no name",
        "no colon",
        "Folded: a\r\n b",
    ];
    let mut text = format!("{method} {path} {version}\r\n");
    for _ in 0..dice.below(5) {
        text.push_str(dice.pick::<&str>(&headers));
        text.push_str("\r\n");
    }
    text.push_str(dice.pick::<&str>(&["\r\n", "\n", ""]));
    text.push_str(dice.pick::<&str>(&[
        "",
        "{}",
        "5\r\nhello\r\n0\r\n\r\n",
        "ffffffffffffffff\r\n",
    ]));
    text.into_bytes()
}

/// A real ClientHello, recorded on a socket that does not answer.
async fn client_hello() -> Vec<u8> {
    let ear = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a free port");
    let addr = ear.local_addr().expect("an address");
    let root = super::self_signed(NAME).chain.remove(0);
    let client = tokio::spawn(async move {
        let _ = Connection::open(addr, NAME, trusting([root.as_slice()])).await;
    });
    let (mut stream, _) = ear.accept().await.expect("a connection");
    let mut hello = vec![0; 4096];
    let read = stream.read(&mut hello).await.expect("a hello");
    hello.truncate(read);
    client.abort();
    assert_eq!(hello.first(), Some(&22), "a handshake record");
    hello
}
