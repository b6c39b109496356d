//! A listener that asks for client certificates, and connections that live long.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{Extension, Router, body::Body, routing::get};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, Version, client::conn::http2::SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use jiff::{SignedDuration, Timestamp};
use malha::{
    ca::{
        Authority, KeyedChain, LeafPolicy, Serial,
        bundle::Bundle,
        key::SecretKey,
        profile::Profile,
        rotation::{RotationPolicy, first},
    },
    identity::SpiffeId,
    runtime::clock,
    tls::{
        Alpn, Bound, ClientTrust, Leaving, Limits, Peer, ServingCertificate, http2_client_config,
    },
};
use rustls::pki_types::ServerName;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::NAME;

const PATIENCE: Duration = Duration::from_secs(30);

/// An authority of its own, founded long enough ago for a certificate of it to have expired.
fn authority() -> Authority {
    let (root, intermediate) = (key(), key());
    let domain = "cluster.local".parse().expect("a trust domain");
    let policy = RotationPolicy::default();
    let now = clock::system().now() - SignedDuration::from_hours(3);
    let (journal, _) = first(
        &domain,
        root,
        intermediate,
        [[7; 16], [8; 16]],
        now,
        &policy,
    )
    .expect("a first journal");
    Authority::from_journal(&journal, &LeafPolicy::default()).expect("an authority")
}

fn key() -> SecretKey {
    let pair = rcgen::KeyPair::generate().expect("a key");
    SecretKey::from_pkcs8(pair.serialize_der().into()).expect("a key")
}

fn issue(authority: &Authority, profile: &Profile, life: Duration, now: Timestamp) -> KeyedChain {
    let key = key();
    let issued = authority
        .issue(
            &key.public_key(),
            profile,
            life,
            Serial::random([3; 16]),
            now,
        )
        .expect("a certificate");
    KeyedChain::new(issued, &key)
}

fn web() -> Profile {
    let domain = "cluster.local".parse().expect("a trust domain");
    Profile::Workload(SpiffeId::new(&domain, "shop", "web").expect("an identity"))
}

const HOUR: Duration = Duration::from_secs(3600);

struct Served {
    addr: SocketAddr,
    authority: Authority,
    clients: Arc<ClientTrust>,
    stop: CancellationToken,
}

impl Served {
    async fn with(limits: Limits, app: Router) -> Self {
        let authority = authority();
        let certificate = ServingCertificate::new();
        let serving = Profile::Webhook {
            dns_names: vec![NAME.to_owned()],
        };
        let keyed = issue(&authority, &serving, HOUR, clock::system().now());
        certificate.publish(&keyed).expect("a good certificate");
        let clients = ClientTrust::new();
        clients.publish(authority.bundle()).expect("a good bundle");
        let addr = ([127, 0, 0, 1], 0).into();
        let bound = Bound::asking(addr, certificate, Arc::clone(&clients), limits)
            .await
            .expect("a free port");
        let (addr, stop) = (bound.local_addr(), CancellationToken::new());
        tokio::spawn(bound.serve(app, stop.clone()));
        Self {
            addr,
            authority,
            clients,
            stop,
        }
    }

    async fn start() -> Self {
        Self::with(Limits::default(), app()).await
    }

    /// A connection that shows `identity`. In TLS 1.3 a client learns only afterwards whether its certificate was taken.
    async fn connect(&self, identity: Option<&KeyedChain>) -> SendRequest<Empty<bytes::Bytes>> {
        let config = http2_client_config(self.authority.bundle(), identity).expect("a client");
        let tcp = TcpStream::connect(self.addr).await.expect("accepted");
        let name = ServerName::try_from(NAME).expect("a name");
        let tls = TlsConnector::from(config).connect(name, tcp).await;
        let io = TokioIo::new(tls.expect("a handshake, as far as a client sees"));
        let (send, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
            .await
            .expect("HTTP/2");
        tokio::spawn(connection);
        send
    }

    /// Whom the server sees; an error where it does not speak with us.
    async fn seen(&self, identity: Option<&KeyedChain>) -> Result<String, String> {
        let mut send = self.connect(identity).await;
        ask(&mut send, "/peer").await
    }
}

async fn ask(send: &mut SendRequest<Empty<bytes::Bytes>>, path: &str) -> Result<String, String> {
    let asking = async {
        send.ready().await.map_err(|error| error.to_string())?;
        let request = Request::get(format!("https://{NAME}{path}"))
            .version(Version::HTTP_2)
            .body(Empty::new())
            .expect("a request");
        let answer = send.send_request(request).await;
        let answer = answer.map_err(|error| error.to_string())?;
        let body = answer.into_body().collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        Ok(String::from_utf8_lossy(&body).into_owned())
    };
    timeout(PATIENCE, asking)
        .await
        .expect("an answer or an end")
}

/// Says how many certificates it saw, and the length of the first.
fn app() -> Router {
    let peer = async |Extension(peer): Extension<Peer>| {
        assert!(peer.address.ip().is_loopback());
        let first = peer.certificates.first().map_or(0, |leaf| leaf.len());
        format!("{} {first}", peer.certificates.len())
    };
    Router::new().route("/peer", get(peer))
}

#[tokio::test]
async fn a_request_carries_what_its_client_showed() {
    let served = Served::start().await;
    assert_eq!(served.seen(None).await.as_deref(), Ok("0 0"));
    let keyed = issue(&served.authority, &web(), HOUR, clock::system().now());
    let want = format!("{} {}", keyed.chain.len(), keyed.chain[0].len());
    assert_eq!(served.seen(Some(&keyed)).await, Ok(want));
}

#[tokio::test]
async fn an_expired_a_foreign_and_a_servers_certificate_end_the_handshake() {
    let served = Served::start().await;
    let now = clock::system().now();
    let long_ago = now - SignedDuration::from_hours(2);
    let server = Profile::Webhook {
        dns_names: vec![NAME.to_owned()],
    };
    for (case, keyed) in [
        ("foreign", issue(&authority(), &web(), HOUR, now)),
        ("expired", issue(&served.authority, &web(), HOUR, long_ago)),
        ("a server's", issue(&served.authority, &server, HOUR, now)),
        ("nobody's", super::self_signed("shop")),
    ] {
        let seen = served.seen(Some(&keyed)).await;
        assert!(seen.is_err(), "{case}: {seen:?}");
    }
    assert_eq!(
        served.seen(None).await.as_deref(),
        Ok("0 0"),
        "the client comes back without it"
    );
}

#[tokio::test]
async fn who_is_trusted_is_asked_at_each_handshake() {
    let served = Served::start().await;
    let now = clock::system().now();
    let next = authority();
    let (old, new) = (
        issue(&served.authority, &web(), HOUR, now),
        issue(&next, &web(), HOUR, now),
    );
    let mut open = served.connect(Some(&old)).await;
    assert!(ask(&mut open, "/peer").await.is_ok());
    assert!(served.seen(Some(&new)).await.is_err());

    let both = format!(
        "{}{}",
        served.authority.bundle().to_pem(),
        next.bundle().to_pem()
    );
    let both = Bundle::parse_pem(both.as_bytes()).expect("a bundle");
    served.clients.publish(&both).expect("a good bundle");
    assert!(served.seen(Some(&old)).await.is_ok());
    assert!(served.seen(Some(&new)).await.is_ok());

    served
        .clients
        .publish(next.bundle())
        .expect("a good bundle");
    assert!(served.seen(Some(&old)).await.is_err(), "its root is gone");
    assert!(served.seen(Some(&new)).await.is_ok());
    assert!(
        ask(&mut open, "/peer").await.is_ok(),
        "what is open goes on"
    );

    assert!(served.clients.publish(&Bundle::default()).is_err());
    assert!(
        served.seen(Some(&new)).await.is_ok(),
        "the last good one stays"
    );
}

#[tokio::test]
async fn before_the_first_bundle_no_certificate_is_taken_and_nobody_needs_one() {
    let authority = authority();
    let certificate = ServingCertificate::new();
    let server = Profile::Webhook {
        dns_names: vec![NAME.to_owned()],
    };
    let now = clock::system().now();
    certificate
        .publish(&issue(&authority, &server, HOUR, now))
        .expect("a good certificate");
    let clients = ClientTrust::new();
    let addr = ([127, 0, 0, 1], 0).into();
    let bound = Bound::asking(addr, certificate, Arc::clone(&clients), Limits::default())
        .await
        .expect("a free port");
    let (addr, stop) = (bound.local_addr(), CancellationToken::new());
    tokio::spawn(bound.serve(app(), stop.clone()));
    let keyed = issue(&authority, &web(), HOUR, now);
    let served = Served {
        addr,
        authority,
        clients,
        stop,
    };
    assert!(served.seen(Some(&keyed)).await.is_err());
    assert!(served.seen(None).await.is_ok());
}

/// An answer that says a word at once, another when it is told to leave, and nothing in between.
fn subscription() -> Router {
    let stream = async |Extension(Leaving(leaving)): Extension<Leaving>| {
        let first = futures::stream::once(async { Ok::<_, std::io::Error>("hello ") });
        let last = futures::stream::once(async move {
            leaving.cancelled().await;
            Ok("goodbye")
        });
        Body::from_stream(futures::StreamExt::chain(first, last))
    };
    app().route("/subscribe", get(stream))
}

#[tokio::test]
async fn an_idle_subscription_is_not_cut() {
    let limits = Limits {
        idle: Duration::from_millis(300),
        request: Duration::from_millis(300),
        ..Limits::default()
    };
    let served = Served::with(limits, subscription()).await;
    let mut subscribed = served.connect(None).await;
    let stop = served.stop.clone();
    let stopping = async {
        sleep(Duration::from_secs(2)).await;
        stop.cancel();
    };
    let (said, ()) = tokio::join!(ask(&mut subscribed, "/subscribe"), stopping);
    assert_eq!(said.as_deref(), Ok("hello goodbye"));
}

#[tokio::test]
async fn an_old_connection_is_told_to_leave_and_cut_where_it_stays() {
    let limits = Limits {
        age: Duration::from_secs(1),
        finish: Duration::from_secs(1),
        ..Limits::default()
    };
    let stubborn =
        async || Body::from_stream(futures::stream::pending::<Result<&str, std::io::Error>>());
    let app = subscription().route("/stay", get(stubborn));
    let served = Served::with(limits, app).await;
    let begun = Instant::now();
    let mut polite = served.connect(None).await;
    let said = ask(&mut polite, "/subscribe").await;
    assert_eq!(said.as_deref(), Ok("hello goodbye"));
    assert!(
        begun.elapsed() >= Duration::from_millis(900),
        "{:?}",
        begun.elapsed()
    );
    assert!(ask(&mut polite, "/peer").await.is_err(), "GOAWAY");

    let mut stays = served.connect(None).await;
    assert!(ask(&mut stays, "/stay").await.is_err(), "cut");
}

#[tokio::test]
async fn the_webhooks_listener_asks_for_nothing() {
    let authority = authority();
    let certificate = ServingCertificate::new();
    let server = Profile::Webhook {
        dns_names: vec![NAME.to_owned()],
    };
    let now = clock::system().now();
    certificate
        .publish(&issue(&authority, &server, HOUR, now))
        .expect("a good certificate");
    let addr = ([127, 0, 0, 1], 0).into();
    let bound = Bound::new(addr, certificate, Alpn::Http2, Limits::default())
        .await
        .expect("a free port");
    let (addr, stop) = (bound.local_addr(), CancellationToken::new());
    tokio::spawn(bound.serve(app(), stop.clone()));
    let keyed = issue(&authority, &web(), HOUR, now);
    let served = Served {
        addr,
        authority,
        clients: ClientTrust::new(),
        stop,
    };
    assert_eq!(served.seen(Some(&keyed)).await.as_deref(), Ok("0 0"));
}
