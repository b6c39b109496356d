//! A control plane whose state is a directory: for a laptop, a virtual machine, a first try.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use super::plane::{Addresses, Home, Plane};
use crate::{
    cli::{Exit, Failure, Terminal, exit::OrExit as _},
    config::{Settings, Validation},
    custody::CustodyError,
    inject::{ClusterFacts, NamespaceFacts},
    runtime::readiness::{Readiness, State},
    standalone::{AUDIENCE, Directory, FileHome, LocalTokens, mesh},
};

/// Loopback only, no load balancer to drain for, and no pods that a token could be bound to.
pub(super) const DEFAULTS: [(&str, &str); 5] = [
    ("webhook-addr", "127.0.0.1:15017"),
    ("ca-addr", "127.0.0.1:15012"),
    ("admin-addr", "127.0.0.1:15014"),
    ("drain", "50ms"),
    ("require-bound-pod", "false"),
];

/// How often the process is asked whether it is ready yet.
const READY_PAUSE: Duration = Duration::from_millis(10);

pub(super) async fn serve(
    path: &Path,
    settings: Settings,
    stop: CancellationToken,
    hints: bool,
    terminal: &mut Terminal,
) -> Result<(), Failure> {
    honourable(&settings).or_exit(Exit::Usage)?;
    let directory = Directory::open(path).or_exit(Exit::BadInput)?;
    let _alone = directory.serve().or_exit(Exit::Refused)?;
    let authenticate =
        LocalTokens::open(&directory, settings.trust_domain.clone()).or_exit(Exit::BadInput)?;
    let mut plane = Plane::begin(settings, stop.clone(), |_| {}).await?;
    let home = FileHome::new(directory.clone());
    let Some(custody) = plane.open(&home, CustodyError::is_passing).await? else {
        return Ok(());
    };
    directory
        .write_bundle(custody.authority().bundle())
        .or_exit(Exit::Internal)?;
    plane.tasks.own(
        "trust bundle",
        directory.clone().keep_bundle(custody.watch(), stop.clone()),
    );
    plane
        .tasks
        .own("mesh", mesh::follow(directory, plane.feed.clone(), stop));
    let (addresses, readiness) = (plane.addresses(), plane.readiness.clone());
    let names = ["localhost", "malha.malha-system.svc"].map(str::to_owned);
    let (_leads_alone, leads) = watch::channel(true);
    let running = plane.run(Home {
        custody,
        authenticate,
        cluster: Arc::new(NoCluster),
        leads,
        skew: Box::new(|| None),
        webhook_names: names.to_vec(),
        ca_names: names.to_vec(),
        replica: format!("standalone-{}", std::process::id()),
    });
    let announcing = async {
        let ready = until_ready(&readiness).await;
        if ready {
            Some(Announced::new(path, &addresses)?.tell(hints, terminal))
        } else {
            None
        }
        .transpose()
    };
    let (ran, announced) = tokio::join!(running, announcing);
    drop(announced?);
    ran
}

/// What a directory cannot do is refused: who asks for a check must not believe that it is made.
fn honourable(settings: &Settings) -> anyhow::Result<()> {
    anyhow::ensure!(
        matches!(settings.validation, Validation::Auto | Validation::Jwks),
        "validation is {}, but with --standalone there is no API server to ask; leave it out, or set it to auto or jwks",
        settings.validation,
    );
    anyhow::ensure!(
        !settings.require_bound_pod,
        "require-bound-pod is true, but with --standalone there are no pods that a token could be bound to; leave it out, or set it to false",
    );
    anyhow::ensure!(
        settings.audiences == [AUDIENCE],
        "audiences is {}, but with --standalone every token is for {AUDIENCE}; leave it out, or set it to {AUDIENCE}",
        settings.audiences.join(","),
    );
    Ok(())
}

/// There is no cluster of which anything could be known.
struct NoCluster;

impl ClusterFacts for NoCluster {
    fn oldest_kubelet(&self) -> Option<u32> {
        None
    }

    fn namespace(&self, _name: &str) -> Option<NamespaceFacts> {
        None
    }
}

/// Whether it became ready, and not the stop first.
async fn until_ready(readiness: &Readiness) -> bool {
    loop {
        match readiness.state() {
            State::Ready => return true,
            State::Stopping => return false,
            State::Waiting(_) => sleep(READY_PAUSE).await,
        }
    }
}

/// `addresses.json` in the directory: there while the listeners answer. Who asked for port 0 finds the real ones there.
struct Announced<'a> {
    directory: &'a Path,
    file: PathBuf,
    addresses: &'a Addresses,
}

impl<'a> Announced<'a> {
    fn new(directory: &'a Path, addresses: &'a Addresses) -> Result<Self, Failure> {
        let file = directory.join("addresses.json");
        let half = directory.join("addresses.json.half");
        let text = serde_json::to_vec(addresses).or_exit(Exit::Internal)?;
        fs::write(&half, text)
            .and_then(|()| fs::rename(&half, &file))
            .with_context(|| format!("cannot write {}", file.display()))
            .or_exit(Exit::Internal)?;
        Ok(Self {
            directory,
            file,
            addresses,
        })
    }

    /// Says where it answers, and with `hints` what to try.
    fn tell(self, hints: bool, terminal: &mut Terminal) -> Result<Self, Failure> {
        let malha = std::env::args()
            .next()
            .unwrap_or_else(|| "malha".to_owned());
        let (directory, addresses) = (self.directory.display(), self.addresses);
        let Addresses {
            webhook, ca, admin, ..
        } = addresses;
        let mut text = format!(
            "malha serves from {directory}; Ctrl-C ends it
  webhook       https://localhost:{}
  certificates  https://localhost:{}
  health        http://{admin}
  trust bundle  {directory}/bundle.pem
  manifests     {directory}/mesh/*.yaml, for proxies",
            webhook.port(),
            ca.port(),
        );
        if hints {
            text.push_str(&format!(
                "
try:
  curl --cacert {directory}/bundle.pem https://localhost:{}/v1/bundle
  {malha} token --standalone {directory} --namespace shop --service-account cart
  {malha} ca status --standalone {directory}",
                ca.port(),
            ));
        }
        terminal.note(&text);
        Ok(self)
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        // A file that stays behind names ports that refuse: no harm.
        let _ = fs::remove_file(&self.file);
    }
}
