//! Envoys that talk while their certificates change, and what happens when nothing goes as it should.

use std::{path::Path, sync::Arc, time::Duration};

use malha::{
    agent::identity::{Board, Identity, Metrics, Sds as SdsServer, SecretName},
    ca::KeyedChain,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    control_plane::ControlPlane,
    envoy::{Envoy, Sds, get},
    pod::{Pod, mount},
    until,
};
use crate::envoy::find_or_skip;

const API: &str = "spiffe://cluster.local/ns/shop/sa/api";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// Two Envoys: `web` calls `api`.
struct Shop {
    _server: Envoy,
    client: Envoy,
    port: u16,
}

impl Shop {
    async fn open(program: &Path, place: &Path, api: &Path, web: &Path) -> Self {
        let server = Envoy::server(program, &place.join("server"), api, Sds::StateOfTheWorld);
        let port = server.port().await;
        let place = place.join("client");
        let client = Envoy::client(program, &place, web, Sds::Delta, port, API);
        let port = client.port().await;
        Self {
            _server: server,
            client,
            port,
        }
    }

    /// One request on a new connection and one on a kept one; what was wrong with them.
    async fn call(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for path in ["/new", "/kept"] {
            match get(self.port, path).await {
                Ok(answer) if answer.starts_with("HTTP/1.1 200") && answer.contains(WEB) => {}
                answer => wrong.push(format!("{path}: {answer:?}")),
            }
        }
        wrong
    }
}

#[tokio::test]
async fn leaves_change_every_second_on_both_sides_and_no_request_fails() {
    let Some(program) = find_or_skip() else {
        return;
    };
    let place = tempfile::tempdir().unwrap();
    let plane = ControlPlane::start(place.path());
    let api = Pod::start(place.path(), &plane, "api");
    let web = Pod::start(place.path(), &plane, "web");
    let sockets = [api.path("sds.sock"), web.path("sds.sock")];
    let shop = Shop::open(&program, place.path(), &sockets[0], &sockets[1]).await;
    // Between a new leaf and Envoy's word for it an agent's holding is not complete; it must come, again and again.
    until("both Envoys hold their secrets", async || {
        [&api, &web]
            .iter()
            .all(|pod| pod.holding.borrow().is_complete())
    })
    .await;

    let (mut calls, mut wrong) = (0_u32, Vec::new());
    let enough = |pod: &Pod| pod.metrics.certificates() > 8;
    until("nine certificates for each", async || {
        wrong.extend(shop.call().await);
        calls += 2;
        enough(&api) && enough(&web)
    })
    .await;
    assert_eq!(wrong, Vec::<String>::new(), "of {calls} requests");
    assert!(calls > 50, "only {calls} requests");
    assert_eq!(api.metrics.refusals() + web.metrics.refusals(), 0);
    let handshakes = shop.client.counter("ssl.handshake").await;
    assert!(handshakes > u64::from(calls) / 2, "{handshakes} handshakes");
    assert_eq!(shop.client.counter("ssl.fail_verify_error").await, 0);
    api.end().await;
    web.end().await;
}

#[tokio::test]
async fn an_agent_that_starts_again_finds_its_envoy_and_no_request_fails() {
    let Some(program) = find_or_skip() else {
        return;
    };
    let place = tempfile::tempdir().unwrap();
    let plane = ControlPlane::start(place.path());
    let api = Pod::start_with(place.path(), &plane, "api", None);
    let web = Pod::start_with(place.path(), &plane, "web", None);
    let sockets = [api.path("sds.sock"), web.path("sds.sock")];
    let shop = Shop::open(&program, place.path(), &sockets[0], &sockets[1]).await;

    let mut wrong = shop.call().await;
    let api = api.start_again().await;
    wrong.extend(shop.call().await);
    let web = web.start_again().await;
    until("Envoy holds what the new agents give it", async || {
        wrong.extend(shop.call().await);
        let holds = |pod: &Pod| {
            let identity = pod.identities.borrow().clone();
            let holding = pod.holding.borrow();
            identity.is_some_and(|identity| {
                identity
                    .versions()
                    .iter()
                    .all(|(name, version)| holding.version(*name) == Some(*version))
            })
        };
        holds(&api) && holds(&web)
    })
    .await;
    wrong.extend(shop.call().await);
    assert_eq!(wrong, Vec::<String>::new());
    api.end().await;
    web.end().await;
}

#[tokio::test]
async fn a_key_that_does_not_match_is_refused_once_and_the_old_one_serves_on() {
    let Some(program) = find_or_skip() else {
        return;
    };
    let place = tempfile::tempdir().unwrap();
    let plane = ControlPlane::start(place.path());
    let api = Pod::start_with(place.path(), &plane, "api", None);
    let web = Pod::start(place.path(), &plane, "web");
    let first = web.identity().await;
    let second = web.renewed_after(&first).await;

    let (tell, identities) = watch::channel(Some(Arc::clone(&first)));
    let (board, metrics) = (Board::default(), Metrics::default());
    let socket = place.path().join("spoilt.sock");
    let sds = SdsServer::bind(&socket, identities, board.clone(), metrics.clone()).unwrap();
    let stop = CancellationToken::new();
    let serving = tokio::spawn(sds.serve(stop.clone()));
    let shop = Shop::open(&program, place.path(), &api.path("sds.sock"), &socket).await;
    let holding = board.watch();
    let held = || holding.borrow().version(SecretName::Default);
    let version = |identity: &Identity| Some(identity.versions()[0].1);
    assert_eq!(held(), version(&first));

    let chain = second.keyed.chain.clone();
    let keyed = KeyedChain {
        chain,
        key: first.keyed.key.clone(),
        validity: second.keyed.validity,
    };
    let spoilt = Identity::new(first.id.clone(), Arc::new(keyed), first.bundle.clone());
    tell.send_replace(Some(Arc::new(spoilt)));
    // both clusters of this Envoy use one subscription
    until("a refusal", async || metrics.refusals() > 0).await;
    assert_eq!(held(), version(&first));
    assert_eq!(shop.call().await, Vec::<String>::new());

    // New roots do not bring the refused certificate back, and the next certificate is taken.
    let refused = metrics.refusals();
    tell.send_modify(|_| {});
    let third = web.renewed_after(&second).await;
    tell.send_replace(Some(Arc::clone(&third)));
    until("the next certificate", async || held() == version(&third)).await;
    assert_eq!(metrics.refusals(), refused);
    assert_eq!(shop.call().await, Vec::<String>::new());
    stop.cancel();
    drop(tell);
    serving.await.unwrap().unwrap();
    api.end().await;
    web.end().await;
}

#[tokio::test]
async fn a_refused_token_gets_nothing_and_a_certificate_once_got_renews_itself() {
    let place = tempfile::tempdir().unwrap();
    let plane = ControlPlane::start(place.path());
    let every = Some(Duration::from_secs(1));
    let web = Pod::start_at(place.path(), &plane.address(), "web", every, |place| {
        std::fs::write(place.join("token"), "eyJ.not.ours").unwrap();
        mount(place, &plane.bundle());
    });
    web.fails("refused", 2).await;
    assert!(web.identities.borrow().is_none());
    web.write_token(&plane.token("shop", "web"));
    let mut held = web.identity().await;
    // the kubelet empties and then writes it: neither is the agent's end
    for spoilt in ["eyJ.not.ours", ""] {
        web.write_token(spoilt);
        // the first may still be the good token's
        for _ in 0..2 {
            held = web.renewed_after(&held).await;
        }
        assert_eq!(held.id.to_string(), WEB);
    }
    web.end().await;
}

#[tokio::test]
async fn a_token_of_another_account_gets_a_certificate_that_is_not_used() {
    let place = tempfile::tempdir().unwrap();
    let plane = ControlPlane::start(place.path());
    let web = Pod::start(place.path(), &plane, "web");
    let kept = web.identity().await;
    web.write_token(&plane.token("shop", "billing"));
    web.fails("answer", 1).await;
    assert_eq!(web.identity().await.id, kept.id);
    assert_eq!(web.identity().await.id.to_string(), WEB);
    web.end().await;
}

#[tokio::test]
async fn a_control_plane_that_is_away_leaves_the_certificate_in_use_until_it_is_back() {
    let place = tempfile::tempdir().unwrap();
    let mut plane = ControlPlane::start(place.path());
    let web = Pod::start(place.path(), &plane, "web");
    web.identity().await;
    plane.kill();
    web.fails("unreachable", 1).await;
    let kept = web.identity().await;
    web.fails("unreachable", 1).await;
    assert_eq!(web.identity().await.versions(), kept.versions());
    plane.start_again();
    web.renewed_after(&kept).await;
    web.end().await;
}

#[tokio::test]
async fn a_pod_that_starts_before_the_control_plane_waits_for_it() {
    let place = tempfile::tempdir().unwrap();
    let mut plane = ControlPlane::start(place.path());
    plane.kill();
    let web = Pod::start(place.path(), &plane, "web");
    web.fails("unreachable", 1).await;
    assert!(web.identities.borrow().is_none());
    plane.start_again();
    web.identity().await;
    web.end().await;
}

#[tokio::test]
async fn somebody_elses_control_plane_is_shown_no_token() {
    let place = tempfile::tempdir().unwrap();
    let ours = ControlPlane::start(&place.path().join("ours"));
    let theirs = ControlPlane::start(&place.path().join("theirs"));
    let web = Pod::start_at(place.path(), &theirs.address(), "web", None, |place| {
        std::fs::write(place.join("token"), ours.token("shop", "web")).unwrap();
        mount(place, &ours.bundle());
    });
    web.fails("tls", 1).await;
    assert!(web.identities.borrow().is_none());
    web.end().await;
}

#[tokio::test]
async fn a_swapped_bundle_is_seen_and_a_bad_one_is_not() {
    let place = tempfile::tempdir().unwrap();
    let plane = ControlPlane::start(&place.path().join("ours"));
    let other = ControlPlane::start(&place.path().join("other"));
    let web = Pod::start_with(place.path(), &plane, "web", None);
    let first = web.identity().await;
    let at = web.path("");
    mount(&at, &(plane.bundle() + &other.bundle()));
    let two = async || web.identity().await.bundle.len() == 2;
    until("two roots", two).await;
    assert_eq!(web.identity().await.keyed.chain, first.keyed.chain);
    mount(&at, "-----BEGIN CERTIFICATE-----\nbroken\n");
    let refused = r#"malha_agent_trust_bundles_total{source="file",result="refused"} 1"#;
    until("a word about the bad one", async || web.tells(refused)).await;
    assert!(two().await);
    mount(&at, &plane.bundle());
    until("one root", async || !two().await).await;
    web.end().await;
}
