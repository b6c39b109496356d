//! The identity side of one agent, with the files that a kubelet would mount.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use malha::agent::identity::{Holding, Identity, Keeper, Metrics, Settings};
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{control_plane::ControlPlane, soon, until};

pub(super) struct Pod {
    account: String,
    place: PathBuf,
    settings: Settings,
    pub(super) metrics: Metrics,
    pub(super) identities: watch::Receiver<Option<Arc<Identity>>>,
    pub(super) holding: watch::Receiver<Holding>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Pod {
    /// One that renews every second.
    pub(super) fn start(place: &Path, plane: &ControlPlane, account: &str) -> Self {
        Self::start_with(place, plane, account, Some(Duration::from_secs(1)))
    }

    pub(super) fn start_with(
        place: &Path,
        plane: &ControlPlane,
        account: &str,
        renew_every: Option<Duration>,
    ) -> Self {
        Self::start_at(place, &plane.address(), account, renew_every, |place| {
            fs::write(place.join("token"), plane.token("shop", account)).expect("writable");
            mount(place, &plane.bundle());
        })
    }

    pub(super) fn start_at(
        place: &Path,
        address: &str,
        account: &str,
        renew_every: Option<Duration>,
        kubelet: impl FnOnce(&Path),
    ) -> Self {
        let place = place.join(account);
        fs::create_dir_all(&place).expect("a directory");
        kubelet(&place);
        let id = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        let settings = Settings {
            id: id.parse().expect("an id"),
            control_plane: address.parse().expect("an address"),
            cluster: String::new(),
            pod: format!("{account}-0.shop"),
            token: place.join("token"),
            roots: place.join("ca/root-cert.pem"),
            life: None,
            renew_every,
        };
        Self::run(account, place, settings)
    }

    fn run(account: &str, place: PathBuf, settings: Settings) -> Self {
        let metrics = Metrics::default();
        let clock = malha::runtime::clock::system();
        let keeper = Keeper::new(settings.clone(), clock, metrics.clone());
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let sds = keeper.sds(&place.join("sds.sock")).expect("a socket");
        let api = keeper.workload_api(&place.join("workload/socket"));
        let api = api.expect("a socket");
        let (identities, holding) = (keeper.identities(), keeper.holding());
        let (for_sds, for_api) = (stop.clone(), stop.clone());
        tasks.spawn(async move { sds.serve(for_sds).await.expect("served") });
        tasks.spawn(async move { api.serve(for_api).await.expect("served") });
        tasks.spawn(keeper.keep(stop.clone()));
        Self {
            account: account.to_owned(),
            place,
            settings,
            metrics,
            identities,
            holding,
            stop,
            tasks,
        }
    }

    /// As a container that the kubelet starts again: another process, the same files.
    pub(super) async fn start_again(self) -> Self {
        let (account, place, settings) = (
            self.account.clone(),
            self.place.clone(),
            self.settings.clone(),
        );
        self.end().await;
        Self::run(&account, place, settings)
    }

    pub(super) async fn end(mut self) {
        self.stop.cancel();
        while soon("the end of the agent's tasks", self.tasks.join_next())
            .await
            .is_some()
        {}
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    pub(super) async fn identity(&self) -> Arc<Identity> {
        let mut identities = self.identities.clone();
        let there = identities.wait_for(Option::is_some);
        let there = soon("an identity", there).await.expect("the keeper lives");
        there.clone().expect("just seen")
    }

    /// The next certificate after this one.
    pub(super) async fn renewed_after(&self, old: &Identity) -> Arc<Identity> {
        let mut identities = self.identities.clone();
        let renewed = identities.wait_for(|identity| {
            let identity = identity.as_deref();
            identity.is_some_and(|new| new.keyed.chain != old.keyed.chain)
        });
        let renewed = soon("a new certificate", renewed).await;
        renewed
            .expect("the keeper lives")
            .clone()
            .expect("just seen")
    }

    pub(super) fn write_token(&self, token: &str) {
        fs::write(self.path("token"), token).expect("writable");
    }

    /// Whether its metrics hold this line.
    pub(super) fn tells(&self, line: &str) -> bool {
        let (mut registry, mut text) = (Registry::default(), String::new());
        self.metrics.register(&mut registry);
        encode(&mut text, &registry).expect("text");
        text.lines().any(|told| told == line)
    }

    pub(super) async fn fails(&self, with: &'static str, times: u64) {
        let before = self.metrics.failures(with);
        let what = format!("{times} failures for {with}");
        until(what, async || self.metrics.failures(with) >= before + times).await;
    }
}

/// As the kubelet does it: a directory of its own for each version, and a symlink that is swapped.
pub(super) fn mount(place: &Path, bundle: &str) {
    let volume = place.join("ca");
    fs::create_dir_all(&volume).expect("a directory");
    let version = (0..).find(|n| !volume.join(format!("..{n}")).exists());
    let name = format!("..{}", version.expect("endless"));
    let version = volume.join(&name);
    fs::create_dir(&version).expect("a directory");
    fs::write(version.join("root-cert.pem"), bundle).expect("writable");
    symlink(&name, volume.join("..new")).expect("a link");
    fs::rename(volume.join("..new"), volume.join("..data")).expect("swapped");
    let _ = symlink("..data/root-cert.pem", volume.join("root-cert.pem"));
}
