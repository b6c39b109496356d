//! TLS handshakes as the API server makes them, counted.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

/// The name by which the API server calls the control plane.
const SERVER: &str = "malha.malha-system.svc";

/// Handshakes against every server in turn, each from scratch, until they are ended.
pub(crate) struct Handshakes {
    task: JoinHandle<()>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    done: AtomicU64,
    failures: std::sync::Mutex<Vec<String>>,
    /// Held during each handshake: who takes it knows that none is on its way.
    left_out: Mutex<Option<SocketAddr>>,
}

impl Handshakes {
    /// Begins; the servers must be verified by these roots (PEM) all the time.
    pub(crate) fn begin(servers: Vec<SocketAddr>, roots: &str) -> Self {
        let shared = Arc::new(Shared::default());
        let task = tokio::spawn(go_on(servers, trusting(roots), Arc::clone(&shared)));
        Self { task, shared }
    }

    /// Leaves one server out from now on, or none. A server that is about to be killed fails for another reason.
    pub(crate) async fn leave_out(&self, server: Option<SocketAddr>) {
        *self.shared.left_out.lock().await = server;
    }

    /// Ends, and gives the number of handshakes; panics when one has failed.
    pub(crate) fn end_without_a_failure(self) -> u64 {
        self.task.abort();
        let failures = self.shared.failures.lock().expect("nobody panics with it");
        let done = self.shared.done.load(Ordering::Relaxed);
        assert!(
            failures.is_empty(),
            "{} of {done} handshakes failed, the first: {}",
            failures.len(),
            failures[0]
        );
        done
    }
}

async fn go_on(servers: Vec<SocketAddr>, config: Arc<ClientConfig>, shared: Arc<Shared>) {
    loop {
        for server in &servers {
            let left_out = shared.left_out.lock().await;
            if *left_out == Some(*server) {
                continue;
            }
            if let Err(failure) = chain_of(*server, &config).await {
                let mut failures = shared.failures.lock().expect("nobody panics with it");
                failures.push(format!("{server}: {failure}"));
            }
            shared.done.fetch_add(1, Ordering::Relaxed);
        }
        // Some hundred a second find every gap and leave the cores to those who are tested.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// One handshake: the chain that the server showed, leaf first, DER.
pub(crate) async fn chain_of(
    server: SocketAddr,
    config: &Arc<ClientConfig>,
) -> Result<Vec<Vec<u8>>, String> {
    let shake = async {
        // On loopback, whatever address the API server uses: the listener is on all of them.
        let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), server.port());
        let tcp = TcpStream::connect(address).await?;
        let name = ServerName::try_from(SERVER).expect("a DNS name");
        let tls = TlsConnector::from(Arc::clone(config))
            .connect(name, tcp)
            .await?;
        let chain = tls.get_ref().1.peer_certificates().unwrap_or_default();
        Ok::<_, std::io::Error>(
            chain
                .iter()
                .map(|certificate| certificate.to_vec())
                .collect(),
        )
    };
    match tokio::time::timeout(Duration::from_secs(5), shake).await {
        Ok(Ok(chain)) => Ok(chain),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no handshake in 5 s".to_owned()),
    }
}

/// A client that believes these roots (PEM) and nothing else, and begins each handshake from scratch.
pub(crate) fn trusting(roots: &str) -> Arc<ClientConfig> {
    let mut store = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        store.add(root.expect("PEM")).expect("a root");
    }
    assert!(!store.is_empty(), "no root in {roots:?}");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .expect("the provider speaks TLS 1.3")
        .with_root_certificates(store)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}
