//! The real control plane, with its state in a directory.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use malha::{
    identity::TrustDomain,
    standalone::{Directory, TokenMaker},
};

use crate::support::program::Program;

const START: Duration = Duration::from_secs(60);

/// A running control plane. Dropped: killed.
pub(super) struct ControlPlane {
    directory: PathBuf,
    port: u16,
    program: Option<Program>,
}

impl ControlPlane {
    pub(super) fn start(directory: &Path) -> Self {
        let mut plane = Self {
            directory: directory.join("mesh"),
            port: 0,
            program: None,
        };
        plane.start_again();
        plane
    }

    /// At the port that it had.
    pub(super) fn start_again(&mut self) {
        let _ = fs::remove_file(self.directory.join("addresses.json"));
        let ca = format!("--ca-addr=127.0.0.1:{}", self.port);
        let program = Program::malha(&[
            "serve",
            "--standalone",
            self.directory.to_str().expect("UTF-8"),
            "--webhook-addr=127.0.0.1:0",
            "--admin-addr=127.0.0.1:0",
            "--query-addr=127.0.0.1:0",
            &ca,
        ]);
        program.wait_for("mesh", START);
        let addresses = self.directory.join("addresses.json");
        let deadline = std::time::Instant::now() + START;
        let text = loop {
            if let Ok(text) = fs::read_to_string(&addresses) {
                break text;
            }
            assert!(std::time::Instant::now() < deadline, "{}", program.said());
            std::thread::sleep(Duration::from_millis(10));
        };
        let addresses: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let ca = addresses["ca"].as_str().expect("an address");
        self.port = ca
            .rsplit_once(':')
            .expect("a port")
            .1
            .parse()
            .expect("a number");
        self.program = Some(program);
    }

    pub(super) fn kill(&mut self) {
        self.program = None;
    }

    pub(super) fn address(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// What a kubelet would mount as the trust bundle.
    pub(super) fn bundle(&self) -> String {
        let path = self.directory.join("bundle.pem");
        fs::read_to_string(path).expect("the bundle is published")
    }

    /// What a kubelet would mount as the token of a service account.
    pub(super) fn token(&self, namespace: &str, account: &str) -> String {
        let directory = Directory::open_existing(&self.directory).expect("the directory");
        let mesh: TrustDomain = "cluster.local".parse().expect("a trust domain");
        let maker = TokenMaker::open(&directory, mesh).expect("the key");
        let life = Duration::from_secs(3600);
        let now = malha::runtime::clock::system().now();
        maker.mint(namespace, account, life, now).expect("a token")
    }
}
