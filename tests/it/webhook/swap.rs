//! A certificate is replaced, and a process stops, while requests go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use malha::ca::KeyedChain;
use malha::tls::{self, Alpn, Bound, Limits, ServingCertificate, TlsError};
use malha::webhook;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{NAME, Served, ordinary, self_signed};
use crate::support::https::{Connection, trusting};

#[tokio::test]
async fn a_new_certificate_is_shown_to_new_connections_and_open_ones_go_on() {
    let served = Served::start().await;
    let mut open = served.connect().await;
    open.post("/inject/ns", &ordinary("before"))
        .await
        .expect("an answer");

    let next = self_signed(NAME);
    served.certificate.publish(&next).expect("a good one");
    open.post("/inject/ns", &ordinary("after"))
        .await
        .expect("the open connection goes on");
    assert!(
        served.try_connect().await.is_err(),
        "who trusts the old one alone is shown the new one"
    );
    let trusting_next = trusting([next.chain[0].as_slice()]);
    Connection::open(served.addr, NAME, trusting_next)
        .await
        .expect("a handshake with the new one")
        .post("/inject/ns", &ordinary("new"))
        .await
        .expect("an answer");
}

#[tokio::test]
async fn no_request_fails_while_certificates_change() {
    let served = Served::start().await;
    let certificates: Vec<KeyedChain> = (0..4).map(|_| self_signed(NAME)).collect();
    let mut roots: Vec<&[u8]> = certificates
        .iter()
        .map(|one| one.chain[0].as_slice())
        .collect();
    roots.push(&served.root);
    let config = trusting(roots);
    let answered = Arc::new(AtomicUsize::new(0));
    let stop = CancellationToken::new();
    let clients: Vec<_> = (0..4)
        .map(|client| {
            let (config, stop, answered) = (config.clone(), stop.clone(), Arc::clone(&answered));
            let addr = served.addr;
            tokio::spawn(async move {
                let mut connection = Connection::open(addr, NAME, config.clone()).await?;
                while !stop.is_cancelled() {
                    if client % 2 == 0 {
                        connection = Connection::open(addr, NAME, config.clone()).await?;
                    }
                    let answer = connection.post("/inject/ns", &ordinary("u")).await?;
                    assert_eq!(answer.status, 200);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
                std::io::Result::Ok(())
            })
        })
        .collect();
    for certificate in certificates.iter().cycle().take(40) {
        served.certificate.publish(certificate).expect("a good one");
        let before = answered.load(Ordering::Relaxed);
        while answered.load(Ordering::Relaxed) < before + 8 {
            assert!(
                clients.iter().all(|client| !client.is_finished()),
                "a client gave up"
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    stop.cancel();
    for client in clients {
        client.await.expect("no panic").expect("no failure");
    }
}

#[tokio::test]
async fn a_certificate_that_does_not_fit_its_key_leaves_the_last_good_one() {
    let served = Served::start().await;
    let (one, another) = (self_signed(NAME), self_signed(NAME));
    let validity = one.validity;
    let with = |chain: Vec<Vec<u8>>, key: &[u8]| KeyedChain {
        chain,
        key: key.to_vec().into(),
        validity,
    };
    let bad = [
        with(one.chain.clone(), &another.key),
        with(Vec::new(), &one.key),
        with(vec![b"no certificate".to_vec()], &one.key),
        with(one.chain.clone(), b"no key"),
    ];
    for keyed in bad {
        served.certificate.publish(&keyed).expect_err("refused");
        served.is_well().await;
    }
}

#[tokio::test]
async fn before_a_certificate_is_published_nobody_is_served_and_after_it_everybody() {
    let certificate = ServingCertificate::new();
    let bound = Bound::new(
        ([127, 0, 0, 1], 0).into(),
        Arc::clone(&certificate),
        Alpn::Http1,
        Limits::default(),
    )
    .await
    .expect("a free port");
    let addr = bound.local_addr();
    let stop = CancellationToken::new();
    let app = axum::Router::new();
    tokio::spawn(bound.serve(app, stop.clone()));
    let (send, receive) = watch::channel(None);
    tokio::spawn(Arc::clone(&certificate).follow(receive, stop.clone()));

    let keyed = self_signed(NAME);
    let root = keyed.chain[0].clone();
    let error = tls::probe(addr, NAME, [&root]).await.expect_err("not yet");
    assert!(matches!(error, TlsError::Probe { .. }), "{error:?}");

    send.send_replace(Some(Arc::new(keyed)));
    let patience = Instant::now() + Duration::from_secs(30);
    while let Err(error) = tls::probe(addr, NAME, [&root]).await {
        assert!(Instant::now() < patience, "{error:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    // What a client does not trust, or dials by another name, is not an answer to it.
    let stranger = self_signed(NAME);
    tls::probe(addr, NAME, [&stranger.chain[0]])
        .await
        .expect_err("another root");
    tls::probe(addr, "malha.elsewhere.svc", [&root])
        .await
        .expect_err("another name");
    stop.cancel();
}

#[tokio::test]
async fn a_port_that_is_taken_is_told_with_what_to_look_at() {
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = taken.local_addr().expect("an address");
    let error = Bound::new(
        addr,
        ServingCertificate::new(),
        Alpn::Http1,
        Limits::default(),
    )
    .await
    .err()
    .expect("taken");
    assert_eq!(
        error.to_string(),
        format!("cannot listen on {addr}; is another program using the port?")
    );
}

/// Clients behave as Go's: they keep a connection until an answer says `close`, and then dial anew.
#[tokio::test]
async fn a_stop_loses_no_request() {
    let limits = Limits {
        drain: Duration::from_millis(1500),
        ..Limits::default()
    };
    let served = Served::with(limits, webhook::Limits::default()).await;
    let config = trusting([served.root.as_slice()]);
    let enough = CancellationToken::new();
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (config, enough, addr) = (config.clone(), enough.clone(), served.addr);
            tokio::spawn(async move {
                let (mut answered, mut closed) = (0, 0);
                let mut connection = Connection::open(addr, NAME, config.clone()).await?;
                while !enough.is_cancelled() {
                    let answer = connection.post("/inject/ns", &ordinary("u")).await?;
                    assert_eq!(answer.status, 200);
                    answered += 1;
                    if answer.header("connection") == Some("close") {
                        closed += 1;
                        connection = Connection::open(addr, NAME, config.clone()).await?;
                    }
                }
                std::io::Result::Ok((answered, closed))
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    served.stop.cancel();
    tokio::time::sleep(Duration::from_millis(700)).await;
    enough.cancel();
    for client in clients {
        let (answered, closed) = client.await.expect("no panic").expect("no request lost");
        assert!(closed > 0, "answers close their connection while draining");
        assert!(answered > closed);
    }
    served.serving.await.expect("drained");
    assert!(
        tokio::net::TcpStream::connect(served.addr).await.is_err(),
        "the port is free"
    );
}

#[tokio::test]
async fn a_request_that_is_under_way_at_the_stop_is_answered_and_an_idle_connection_closed() {
    let limits = Limits {
        drain: Duration::ZERO,
        ..Limits::default()
    };
    let served = Served::with(limits, webhook::Limits::default()).await;
    let body = ordinary("u");
    let mut idle = served.connect().await;
    idle.post("/inject/ns", &body).await.expect("an answer");
    let mut busy = served.connect().await;
    let head = format!(
        "POST /inject/ns HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    busy.send(head.as_bytes()).await.expect("sent");
    busy.send(&body[..10]).await.expect("sent");
    tokio::time::sleep(Duration::from_millis(100)).await;
    served.stop.cancel();
    assert!(idle.receive().await.is_err(), "closed");
    busy.send(&body[10..]).await.expect("sent");
    let answer = busy.receive().await.expect("an answer");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("connection"), Some("close"));
    drop((idle, busy));
    served.serving.await.expect("drained");
}

#[tokio::test]
async fn who_does_not_finish_is_cut_at_the_deadline() {
    let limits = Limits {
        drain: Duration::ZERO,
        finish: Duration::from_millis(300),
        ..Limits::default()
    };
    let served = Served::with(limits, webhook::Limits::default()).await;
    let mut busy = served.connect().await;
    let head = "POST /inject/ns HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n";
    busy.send(head.as_bytes()).await.expect("sent");
    tokio::time::sleep(Duration::from_millis(100)).await;
    served.stop.cancel();
    served.serving.await.expect("ended all the same");
    assert!(busy.receive().await.is_err());
}
