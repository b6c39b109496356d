//! Certificates as others see them: OpenSSL's verifier and requests, rustls on both ends of a connection.

use std::{
    collections::HashSet,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use jiff::Timestamp;
use malha::{
    ca::{
        Authority, Issued, KeyedChain, LeafPolicy, Serial,
        bundle::Bundle,
        csr::{Csr, KeyPolicy},
        journal::{HomeError, Journal, JournalHome, Stored},
        key::{KeyError, SecretKey},
        peer::{self, Side},
        pem,
        profile::Profile,
        rotation::{RotationPolicy, first},
    },
    clock::Clock,
    custody::{Custody, Metrics, RotateRequest, rotate},
    identity::{SpiffeId, TrustDomain},
    runtime::clock::system,
};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, ServerConfig, ServerConnection,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use zeroize::Zeroizing;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn mesh() -> TrustDomain {
    "cluster.local".parse().expect("a trust domain")
}

fn new_key() -> SecretKey {
    let pair = rcgen::KeyPair::generate().expect("a key");
    SecretKey::from_pkcs8(Zeroizing::new(pair.serialize_der())).expect("a P-256 key")
}

fn roll<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    ::aws_lc_rs::rand::fill(&mut bytes).expect("dice");
    bytes
}

fn founded(now: Timestamp) -> Journal {
    let dice = [roll(), roll()];
    let policy = RotationPolicy::default();
    let (journal, _) = first(&mesh(), new_key(), new_key(), dice, now, &policy).expect("founded");
    journal
}

fn authority(journal: &Journal) -> Authority {
    Authority::from_journal(journal, &LeafPolicy::default()).expect("an authority")
}

fn id(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::new(&mesh(), namespace, account).expect("an id")
}

/// Runs `openssl`, answers what it said, and panics with all of it where it failed.
fn openssl(arguments: &[&str], input: &[u8]) -> String {
    let (ok, said) = try_openssl(arguments, input);
    assert!(ok, "openssl {}: {said}", arguments.join(" "));
    said
}

fn try_openssl(arguments: &[&str], input: &[u8]) -> (bool, String) {
    let mut child = Command::new("openssl")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("these tests need the program openssl (apt-get install openssl)");
    // It may end without reading.
    let _ = child.stdin.take().expect("piped").write_all(input);
    let output = child.wait_with_output().expect("it ends");
    let ok = output.status.success();
    // Where it succeeds, stderr holds the dots of a key that is being made.
    let said = if ok {
        output.stdout
    } else {
        [output.stdout, output.stderr].concat()
    };
    (ok, String::from_utf8_lossy(&said).into_owned())
}

/// `openssl verify -x509_strict` at `now`, for each purpose; answers what it says of each.
struct Verifier {
    directory: tempfile::TempDir,
}

impl Verifier {
    fn of(bundle: &Bundle) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("roots.pem"), bundle.to_pem()).expect("written");
        Self { directory }
    }

    fn verify(
        &self,
        chain: &[Vec<u8>],
        purpose: &str,
        now: Timestamp,
        more: &[&str],
    ) -> (bool, String) {
        let path = |name: &str| self.directory.path().join(name).display().to_string();
        let write = |name: &str, certificates: &[Vec<u8>]| {
            let text: String = certificates
                .iter()
                .map(|der| pem::encode("CERTIFICATE", der))
                .collect();
            std::fs::write(path(name), text).expect("written");
        };
        let (leaf, above) = chain.split_at(1);
        write("leaf.pem", leaf);
        write("above.pem", above);
        let (roots, above, leaf) = (path("roots.pem"), path("above.pem"), path("leaf.pem"));
        let at = now.as_second().to_string();
        let mut arguments = vec![
            "verify",
            "-x509_strict",
            "-purpose",
            purpose,
            "-attime",
            &at,
            "-CAfile",
            &roots,
            "-untrusted",
            &above,
        ];
        arguments.extend_from_slice(more);
        arguments.push(&leaf);
        try_openssl(&arguments, b"")
    }
}

fn issue(authority: &Authority, csr: &Csr, profile: &Profile, now: Timestamp) -> Issued {
    let serial = Serial::for_workload(now, roll());
    authority
        .issue(&csr.public_key, profile, DAY, serial, now)
        .expect("issued")
}

fn request(arguments: &[&str]) -> Vec<u8> {
    let mut all = vec![
        "req",
        "-new",
        "-nodes",
        "-subj",
        "/O=whoever",
        "-keyout",
        "/dev/null",
    ];
    all.extend_from_slice(arguments);
    openssl(&all, b"").into_bytes()
}

#[test]
fn openssl_accepts_what_is_issued_for_its_requests() {
    let now = system().now();
    let journal = founded(now);
    let authority = authority(&journal);
    let verifier = Verifier::of(authority.bundle());
    let kinds: [&[&str]; 6] = [
        &[
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-sha256",
        ],
        &[
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-sha384",
        ],
        &[
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-384",
            "-sha512",
        ],
        &["-newkey", "rsa:2048"],
        &["-newkey", "rsa:3072", "-sha512"],
        &["-newkey", "ed25519"],
    ];
    let profile = Profile::Workload(id("shop", "web"));
    for kind in kinds {
        let request = request(kind);
        let csr = Csr::parse_pem(&request, KeyPolicy { ed25519: true }).expect("a good request");
        let issued = issue(&authority, &csr, &profile, now);
        for purpose in ["sslserver", "sslclient"] {
            for at in [
                now,
                now - Duration::from_secs(290),
                now + DAY - Duration::from_secs(1),
            ] {
                let (ok, said) = verifier.verify(&issued.chain, purpose, at, &[]);
                assert!(ok, "{kind:?} as {purpose} at {at}: {said}");
            }
            let (ok, _) = verifier.verify(&issued.chain, purpose, now + 2 * DAY, &[]);
            assert!(!ok, "{kind:?}: it has ended");
        }
        let leaf = pem::encode("CERTIFICATE", &issued.chain[0]);
        let certified = openssl(&["x509", "-noout", "-pubkey"], leaf.as_bytes());
        let asked = openssl(&["req", "-noout", "-pubkey"], &request);
        assert_eq!(
            certified, asked,
            "{kind:?}: the key of the request, and no other"
        );
        let serial = openssl(&["x509", "-noout", "-serial"], leaf.as_bytes());
        assert_eq!(
            serial.trim().to_lowercase(),
            format!("serial={}", issued.serial)
        );
    }
}

#[test]
fn s08_a_greedy_request_gets_nothing_but_its_callers_identity() {
    let now = system().now();
    let authority = authority(&founded(now));
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/csr/p256-greedy.pem");
    let request = std::fs::read(golden).expect("the golden request");
    let csr = Csr::parse_pem(&request, KeyPolicy::default()).expect("its key is good");
    let caller = id("shop", "web");
    assert!(csr.asks_beyond(&caller));
    let issued = issue(&authority, &csr, &Profile::Workload(caller), now);
    let leaf = pem::encode("CERTIFICATE", &issued.chain[0]);
    let text = openssl(&["x509", "-noout", "-text"], leaf.as_bytes());
    for wanted in [
        "CA:FALSE",
        "X509v3 Subject Alternative Name: critical",
        "URI:spiffe://cluster.local/ns/shop/sa/web\n",
        "TLS Web Server Authentication, TLS Web Client Authentication\n",
        "Digital Signature\n",
    ] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    for asked in [
        "CA:TRUE",
        "admin",
        "DNS:",
        "IP Address",
        "email",
        "Certificate Sign",
        "Code Signing",
        "1.2.3.4",
        "Name Constraints",
    ] {
        assert!(!text.contains(asked), "{asked}: {text}");
    }
    let names = openssl(
        &["x509", "-noout", "-subject", "-ext", "subjectAltName"],
        leaf.as_bytes(),
    );
    assert!(names.starts_with("subject=\n"), "{names}");
}

#[test]
fn openssl_accepts_our_own_serving_certificates_for_their_names_only() {
    let now = system().now();
    let journal = founded(now);
    let authority = authority(&journal);
    let verifier = Verifier::of(authority.bundle());
    let key = new_key().public_key();
    let serve = |profile| {
        let serial = Serial::random(roll());
        authority
            .issue(&key, &profile, DAY, serial, now)
            .expect("issued")
            .chain
    };
    let webhook = serve(Profile::Webhook {
        dns_names: vec!["malha.malha-system.svc".to_owned(), "127.0.0.1".to_owned()],
    });
    let xds = serve(Profile::ControlPlane {
        id: id("malha-system", "malha"),
        dns_names: vec!["malha.malha-system.svc".to_owned()],
    });
    let workload = serve(Profile::Workload(id("malha-system", "malha")));
    let host = ["-verify_hostname", "malha.malha-system.svc"];
    for (chain, purpose, more, want) in [
        (&webhook, "sslserver", &host[..], true),
        (&webhook, "sslserver", &["-verify_ip", "127.0.0.1"], true),
        (
            &webhook,
            "sslserver",
            &["-verify_hostname", "kubernetes.default.svc"],
            false,
        ),
        (&webhook, "sslclient", &[], false),
        (&xds, "sslserver", &host, true),
        (&xds, "sslclient", &[], true),
        (&workload, "sslserver", &[], true),
        (&workload, "sslserver", &host, false),
    ] {
        let (ok, said) = verifier.verify(chain, purpose, now, more);
        assert_eq!(ok, want, "{purpose} {more:?}: {said}");
    }
    let root = vec![journal.active().certificate.der().to_owned()];
    let signing = [&webhook[1..], &root];
    for certificate in signing {
        let (ok, said) = verifier.verify(certificate, "sslserver", now, &[]);
        assert!(!ok, "a signing certificate is no TLS peer: {said}");
    }
}

#[test]
fn openssl_accepts_dates_beyond_2050_and_a_long_trust_domain() {
    let now: Timestamp = "2049-12-25T00:00:00Z".parse().expect("an instant");
    let domain: TrustDomain = "d".repeat(200).parse().expect("a trust domain");
    let policy = RotationPolicy::default();
    let (journal, _) = first(
        &domain,
        new_key(),
        new_key(),
        [roll(), roll()],
        now,
        &policy,
    )
    .expect("founded");
    let authority = authority(&journal);
    let profile = Profile::Workload(SpiffeId::new(&domain, "a", "b").expect("an id"));
    let key = new_key().public_key();
    let issued = authority
        .issue(
            &key,
            &profile,
            7 * DAY,
            Serial::random(roll()),
            now + 3 * DAY,
        )
        .expect("issued");
    let verifier = Verifier::of(authority.bundle());
    for days in [3, 9] {
        let (ok, said) = verifier.verify(&issued.chain, "sslserver", now + DAY * days, &[]);
        assert!(ok, "{said}");
    }
}

#[test]
fn openssl_accepts_leaves_below_p384_authorities() {
    let now = system().now();
    let key = || {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).expect("a key");
        SecretKey::from_pkcs8(Zeroizing::new(pair.serialize_der())).expect("a P-384 key")
    };
    let policy = RotationPolicy::default();
    let (journal, _) =
        first(&mesh(), key(), key(), [roll(), roll()], now, &policy).expect("founded");
    let journal = Journal::from_json(&journal.to_json()).expect("our own text");
    let authority = authority(&journal);
    authority.rehearse(now).expect("rustls accepts them");
    let profile = Profile::Workload(id("a", "b"));
    let leaf_key = new_key().public_key();
    let issued = authority
        .issue(&leaf_key, &profile, DAY, Serial::random(roll()), now)
        .expect("issued");
    let (ok, said) = Verifier::of(authority.bundle()).verify(&issued.chain, "sslclient", now, &[]);
    assert!(ok, "{said}");
}

#[test]
fn g05_serials_are_unique_over_100_000_issuances_of_two_replicas() {
    let now = system().now();
    let journal = founded(now);
    let key = new_key().public_key();
    let profile = Profile::Workload(id("a", "b"));
    let replica = || {
        let authority = authority(&journal);
        let mut seen = Vec::with_capacity(50_000);
        for _ in 0..50_000 {
            let serial = Serial::for_workload(now, roll());
            let issued = authority
                .issue(&key, &profile, DAY, serial, now)
                .expect("issued");
            let leaf = &issued.chain[0];
            // SEQUENCE, SEQUENCE (4 bytes each), [0] version (5), INTEGER of 16 bytes.
            assert_eq!(&leaf[13..15], [0x02, 16]);
            assert_eq!(&leaf[15..31], serial.as_bytes());
            seen.push(serial);
        }
        seen
    };
    let seen = std::thread::scope(|scope| {
        let other = scope.spawn(replica);
        let mut seen = replica();
        seen.extend(other.join().expect("no panic"));
        seen
    });
    assert_eq!(seen.len(), 100_000);
    assert_eq!(seen.into_iter().collect::<HashSet<_>>().len(), 100_000);
}

/// A workload as TLS sees it: its chain, its key, and what it trusts. Names are checked by what trusts the chain.
struct Workload {
    keyed: KeyedChain,
    bundle: Bundle,
}

impl Workload {
    fn new(authority: &Authority, account: &str, now: Timestamp) -> Self {
        let key = new_key();
        let profile = Profile::Workload(id("shop", account));
        let serial = Serial::for_workload(now, roll());
        let issued = authority
            .issue(&key.public_key(), &profile, DAY, serial, now)
            .expect("issued");
        Self {
            keyed: KeyedChain::new(issued, &key),
            bundle: authority.bundle().clone(),
        }
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.keyed
            .chain
            .iter()
            .map(|der| CertificateDer::from(der.clone()))
            .collect()
    }

    fn key(&self) -> rustls_pki_types::PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.keyed.key.to_vec()).into()
    }

    fn server(&self) -> ServerConfig {
        let mut roots = rustls::RootCertStore::empty();
        for root in self.bundle.certificates() {
            roots
                .add(CertificateDer::from(root.to_vec()))
                .expect("a root");
        }
        let verifier: Arc<dyn ClientCertVerifier> =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                .build()
                .expect("a verifier");
        ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain(), self.key())
            .expect("key and chain fit")
    }

    fn client(&self, now: Timestamp) -> ClientConfig {
        let verifier = Arc::new(Peers {
            bundle: self.bundle.clone(),
            now,
        });
        ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(self.chain(), self.key())
            .expect("key and chain fit")
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// Workloads have no DNS names; everything else is verified as usual.
#[derive(Debug)]
struct Peers {
    bundle: Bundle,
    now: Timestamp,
}

impl ServerCertVerifier for Peers {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain: Vec<Vec<u8>> = std::iter::once(leaf)
            .chain(above)
            .map(|der| der.to_vec())
            .collect();
        peer::verify(&chain, &self.bundle, Side::Server, self.now)
            .map(|()| ServerCertVerified::assertion())
            .map_err(|error| rustls::Error::General(error.to_string()))
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// A whole mutual handshake in memory, and one byte each way.
fn handshake(client: &Workload, server: &Workload, now: Timestamp) -> Result<(), String> {
    let name = ServerName::try_from("web.shop").expect("a name");
    let mut client = ClientConnection::new(Arc::new(client.client(now)), name).expect("a client");
    let mut server = ServerConnection::new(Arc::new(server.server())).expect("a server");
    client.writer().write_all(b"c").expect("buffered");
    server.writer().write_all(b"s").expect("buffered");
    for _ in 0..10 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).expect("in memory");
        }
        let mut rest = &wire[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).expect("in memory");
            server
                .process_new_packets()
                .map_err(|error| format!("server: {error}"))?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).expect("in memory");
        }
        let mut rest = &wire[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).expect("in memory");
            client
                .process_new_packets()
                .map_err(|error| format!("client: {error}"))?;
        }
    }
    let byte = |reader: &mut dyn std::io::Read| {
        let mut byte = [0];
        reader
            .read_exact(&mut byte)
            .map(|()| byte[0])
            .map_err(|error| error.to_string())
    };
    assert_eq!(byte(&mut server.reader())?, b'c');
    assert_eq!(byte(&mut client.reader())?, b's');
    assert_eq!(
        client.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_3)
    );
    assert!(
        server
            .peer_certificates()
            .is_some_and(|chain| chain.len() == 2)
    );
    Ok(())
}

#[test]
fn two_workloads_shake_hands_over_tls_1_3_and_strangers_do_not() {
    let now = system().now();
    let mesh = authority(&founded(now));
    let web = Workload::new(&mesh, "web", now);
    let database = Workload::new(&mesh, "database", now);
    handshake(&web, &database, now).expect("both are of the mesh");
    handshake(&database, &web, now).expect("and the other way round");
    let stranger = Workload::new(&authority(&founded(now)), "web", now);
    handshake(&stranger, &database, now).expect_err("a client of another mesh");
    handshake(&web, &stranger, now).expect_err("a server of another mesh");
    let borrowed = Workload {
        keyed: stranger.keyed,
        bundle: mesh.bundle().clone(),
    };
    handshake(&borrowed, &database, now).expect_err("trusting the mesh does not make one of it");
}

/// A journal in memory.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<(u64, Option<Journal>)>>);

impl Memory {
    fn write(&self, seen: Option<&str>, journal: &Journal) -> Result<Stored, HomeError> {
        let mut kept = self.0.lock().expect("no panic while locked");
        let present = kept.1.as_ref().map(|_| kept.0.to_string());
        if present.as_deref() != seen {
            let home = "memory".to_owned();
            return Err(HomeError::Conflict { home });
        }
        *kept = (kept.0 + 1, Some(journal.clone()));
        Ok(Stored {
            journal: journal.clone(),
            version: kept.0.to_string(),
        })
    }
}

impl JournalHome for Memory {
    async fn load(&self) -> Result<Option<Stored>, HomeError> {
        let kept = self.0.lock().expect("no panic while locked");
        let version = kept.0.to_string();
        Ok(kept.1.clone().map(|journal| Stored { journal, version }))
    }
    async fn create(&self, journal: &Journal) -> Result<Stored, HomeError> {
        self.write(None, journal)
    }
    async fn replace(&self, seen: &str, journal: &Journal) -> Result<Stored, HomeError> {
        self.write(Some(seen), journal)
    }
    async fn has_earlier_life(&self) -> Result<bool, HomeError> {
        Ok(false)
    }
}

/// Replicas learn of a rotation one after the other, and workloads renew whenever they like: every pair of an old and a
/// new certificate, from an old and a new replica, must still shake hands.
#[tokio::test]
async fn r07_no_handshake_fails_while_the_intermediate_rotates() {
    let clock: Clock = system();
    let (home, policy) = (Memory::default(), RotationPolicy::default());
    let open = || {
        Custody::open(
            home.clone(),
            policy.clone(),
            mesh(),
            clock.clone(),
            Metrics::default(),
        )
    };
    let replicas = [open().await.expect("opens"), open().await.expect("opens")];
    let mut workloads: Vec<Workload> = Vec::new();
    let mut issuers = HashSet::new();
    let mut handshakes = 0;
    for round in 0..60_usize {
        let now = clock.now();
        if round % 3 == 1 {
            let request = RotateRequest {
                intermediate: true,
                ..Default::default()
            };
            let done = rotate(&home, &policy, request, &clock)
                .await
                .expect("rotated");
            assert_eq!(done.done.len(), 2);
        }
        if round % 3 == 2 {
            replicas[round % 2].refresh().await.expect("reads");
        }
        let authority = replicas[round / 3 % 2].authority();
        issuers.insert(authority.issuer_key_id().clone());
        workloads.push(Workload::new(&authority, "web", now));
        if workloads.len() > 6 {
            workloads.remove(0);
        }
        let newest = workloads.last().expect("just made");
        for other in &workloads {
            handshake(newest, other, now).expect("accepted");
            handshake(other, newest, now).expect("accepted");
            handshakes += 2;
        }
    }
    assert!(
        issuers.len() >= 10 && handshakes > 600,
        "{} {handshakes}",
        issuers.len()
    );
}

#[test]
fn a_key_is_read_in_every_form_that_openssl_writes() {
    let openssl = |words: &str, input: &[u8]| {
        let mut child = Command::new("openssl")
            .args(words.split_whitespace())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl runs");
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(input).expect("written");
        drop(stdin);
        child.wait_with_output().expect("it ends").stdout
    };
    for made_by in [
        "genrsa -traditional 2048",
        "genrsa 3072",
        "ecparam -name prime256v1 -genkey",
        "ecparam -name secp384r1 -genkey -noout",
        "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256",
    ] {
        let text = openssl(made_by, b"");
        let key = SecretKey::from_pem(&text).unwrap_or_else(|error| panic!("{made_by}: {error}"));
        let public = openssl("pkey -pubout -outform DER", &text);
        assert_eq!(key.public_key().spki(), public, "{made_by}");
    }
    let two = [openssl("genrsa 2048", b""), openssl("genrsa 2048", b"")].concat();
    assert_eq!(SecretKey::from_pem(&two).err(), Some(KeyError::NotPem));
    for (made_by, want) in [
        ("genpkey -algorithm ed25519", KeyError::Unsupported),
        ("genrsa 1024", KeyError::Unsupported),
        (
            "ecparam -name secp521r1 -genkey -noout",
            KeyError::Unsupported,
        ),
        (
            "genrsa -aes128 -passout pass:word 2048",
            KeyError::Encrypted,
        ),
        ("version", KeyError::NotPem),
    ] {
        let refused = SecretKey::from_pem(&openssl(made_by, b"")).err();
        assert_eq!(refused, Some(want), "{made_by}");
    }
}
