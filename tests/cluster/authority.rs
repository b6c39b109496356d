//! The authority of real `malha serve` processes: certificates for pods, one root whoever starts first, and a webhook
//! whose certificate the API server believes at every moment.

use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::rig::handshakes::{Handshakes, chain_of, trusting};
use crate::rig::outside::{ControlPlane, NAMESPACE, Replica};
use crate::rig::pods::{MESH, create, pod};
use crate::rig::{self, Cluster, Setup, TokenOf, eventually, outside};

const AUDIENCE: &str = "malha-ca";
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_token_buys_the_certificate_of_its_service_account_and_nothing_else_does() {
    let Some(plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let dir = tempfile::tempdir().expect("a directory");
    let bundle = dir.path().join("bundle.pem");
    std::fs::write(&bundle, ca_bundle(cluster).await).expect("a file");
    let namespace = cluster.namespace("caller", MESH).await;
    create(cluster, &namespace, &pod("caller"))
        .await
        .expect("a meshed pod");
    // CA:TRUE, foreign names and a subject are asked for; only the key is taken.
    let csr = csr(dir.path()).await;
    let ask =
        async |replica: &Replica, token: &str| certificate(replica, &bundle, token, &csr).await;

    let of_pod = TokenOf::Pod("caller");
    let token = cluster
        .token(&namespace, "default", &of_pod, &[AUDIENCE], 600)
        .await;
    for replica in plane.replicas() {
        let (status, answer) = ask(replica, &token).await;
        assert_eq!(status, 201, "{answer:#}");
        let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/default");
        assert_eq!(answer["spiffe_id"], identity);
        let chain = answer["certificate_chain"].as_str().expect("a chain");
        let text = verified_by_openssl(dir.path(), chain, &bundle).await;
        assert!(text.contains(&format!("URI:{identity}")), "{text}");
        for asked_for in ["evil", "CA:TRUE"] {
            assert!(
                !text.contains(asked_for),
                "the CSR's {asked_for} is in the certificate: {text}"
            );
        }
    }

    let replica = plane.replicas().first().expect("a replica");
    let api_token = cluster
        .token(&namespace, "default", &of_pod, &[], 600)
        .await;
    let unbound = cluster
        .token(&namespace, "default", &TokenOf::Account, &[AUDIENCE], 600)
        .await;
    let mut forged = token.clone();
    forged.replace_range(token.len() - 6.., "AAAAAA");
    for (what, token) in [
        ("for the API server", api_token.as_str()),
        ("bound to no pod", &unbound),
        ("with another signature", &forged),
        ("that is none", "x"),
    ] {
        let (status, answer) = ask(replica, token).await;
        assert_eq!(status, 401, "a token {what}: {answer:#}");
        assert!(answer.get("certificate_chain").is_none(), "{answer:#}");
    }

    let pods: Api<Pod> = Api::namespaced(cluster.client().await, &namespace);
    let now = DeleteParams::default().grace_period(0);
    pods.delete("caller", &now).await.expect("it is there");
    eventually(PATIENCE, "a deleted pod's token is refused", || async {
        match ask(replica, &token).await {
            (401, _) => Ok(()),
            (status, answer) => Err(format!("{status} {answer}")),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r11_a_lost_ca_bundle_is_repaired_within_two_seconds_and_no_handshake_fails_meanwhile() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let Some(plane) = ControlPlane::install(&cluster, 2).await else {
        return;
    };
    let right = ca_bundle(&cluster).await;
    let handshakes = handshakes(&plane, &right);

    let foreign = cluster.certificate_authority();
    for (how, bundle) in [
        ("garbage", &b"garbage"[..]),
        ("another's", &foreign),
        ("blanked", b""),
    ] {
        let configurations: Api<MutatingWebhookConfiguration> = Api::all(cluster.client().await);
        let patch: Vec<_> = (0..4)
            .map(|entry| {
                let value = k8s_openapi::ByteString(bundle.to_vec());
                json!({ "op": "replace", "path": format!("/webhooks/{entry}/clientConfig/caBundle"), "value": value })
            })
            .collect();
        let patch: json_patch::Patch = serde_json::from_value(json!(patch)).expect("a JSON Patch");
        match configurations
            .patch(
                "malha-injector",
                &PatchParams::default(),
                &Patch::<()>::Json(patch),
            )
            .await
        {
            Ok(_) => {}
            // The API server itself refuses what is no certificate.
            Err(kube::Error::Api(status)) if how == "garbage" && status.code == 422 => continue,
            Err(error) => panic!("{how}: {error}"),
        }
        repaired(&cluster, how, &right).await;
    }
    // Replaced as a whole by somebody who never heard of the field.
    let delete = ["delete", "mutatingwebhookconfiguration", "malha-injector"];
    assert!(cluster.kubectl(delete, None).await.status.success());
    outside::apply_base(&cluster).await;
    repaired(&cluster, "deleted and applied anew", &right).await;

    let writes = writes_of_the_ca_bundle(&cluster);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        writes_of_the_ca_bundle(&cluster),
        writes,
        "nobody fights: it is quiet once it is right"
    );
    handshakes.end_without_a_failure();
}

#[tokio::test(flavor = "multi_thread")]
async fn r01_the_intermediate_rotates_and_replicas_are_killed_and_no_handshake_fails() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let Some(plane) = ControlPlane::install(&cluster, 2).await else {
        return;
    };
    let bundle = ca_bundle(&cluster).await;
    let namespace = cluster.namespace("meshed", MESH).await;
    let rotate = cluster.service_account(NAMESPACE, "malha-ca-rotate").await;
    let handshakes = handshakes(&plane, &bundle);

    let mut seen = vec![intermediate(&plane, &bundle).await];
    for round in 0..3 {
        // What the CronJob's pod would run, with its rights; asked for, since nothing is due for two weeks.
        let output = rotate_intermediate(&rotate).await;
        assert!(output.status.success(), "round {round}: {output:?}");
        let new = eventually(
            PATIENCE,
            "every replica serves a leaf of the new intermediate",
            || async {
                let now = intermediate(&plane, &bundle).await;
                if seen.contains(&now) {
                    Err("the old one".to_owned())
                } else {
                    Ok(now)
                }
            },
        )
        .await;
        seen.push(new);
        create(&cluster, &namespace, &pod(&format!("round-{round}")))
            .await
            .expect("admissions go on");

        // SIGKILL at a moment of its own each round; the other replica goes on, this one finds its journal again.
        let victim = &plane.replicas()[round % 2];
        tokio::time::sleep(Duration::from_millis(37 * round as u64)).await;
        handshakes.leave_out(Some(victim.webhook)).await;
        victim.publish(&cluster, false).await;
        victim.process().kill();
        create(&cluster, &namespace, &pod(&format!("one-left-{round}")))
            .await
            .expect("one replica is enough");
        victim.process().start().expect("it starts again");
        victim.ready().await;
        victim.publish(&cluster, true).await;
        handshakes.leave_out(None).await;
    }
    assert_eq!(
        ca_bundle(&cluster).await,
        bundle,
        "the intermediate changes no trust"
    );
    assert!(
        handshakes.end_without_a_failure() > 100,
        "there were handshakes"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn r12_fifty_replicas_that_start_at_once_make_one_root_and_none_of_them_ends() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let Some(plane) = ControlPlane::install(&cluster, 50).await else {
        return;
    };
    for replica in plane.replicas() {
        replica.process().check().expect("none has ended");
    }
    let bundle = ca_bundle(&cluster).await;
    assert_eq!(
        bundle.matches("BEGIN CERTIFICATE").count(),
        1,
        "one root: {bundle}"
    );
    intermediate(&plane, &bundle).await;
    let secrets: Api<Secret> = Api::namespaced(cluster.client().await, NAMESPACE);
    secrets.get("malha-ca").await.expect("the journal");
    let created = cluster
        .audit()
        .into_iter()
        .filter(|event| {
            event["verb"] == "create"
                && event["objectRef"]["resource"] == "secrets"
                && event["objectRef"]["namespace"] == NAMESPACE
                && event["responseStatus"]["code"] == 201
        })
        .count();
    assert_eq!(created, 1, "one journal was made");
}

#[tokio::test(flavor = "multi_thread")]
async fn r17_known_pods_get_certificates_while_the_api_server_is_frozen_or_gone() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let Some(plane) = ControlPlane::install(&cluster, 1).await else {
        return;
    };
    let replica = plane.replicas().first().expect("one replica");
    let dir = tempfile::tempdir().expect("a directory");
    let bundle = dir.path().join("bundle.pem");
    std::fs::write(&bundle, ca_bundle(&cluster).await).expect("a file");
    let namespace = cluster.namespace("caller", MESH).await;
    create(&cluster, &namespace, &pod("caller"))
        .await
        .expect("a meshed pod");
    let token = cluster
        .token(
            &namespace,
            "default",
            &TokenOf::Pod("caller"),
            &[AUDIENCE],
            600,
        )
        .await;
    let csr = csr(dir.path()).await;
    let ask = async |when: &str| {
        let start = Instant::now();
        let (status, answer) = certificate(replica, &bundle, &token, &csr).await;
        assert_eq!(status, 201, "{when}: {answer:#}");
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{when}: after {:?}",
            start.elapsed()
        );
    };
    // Until the pod is known here: the first call may ask the API server instead.
    ask("with the API server").await;

    // Frozen is worse than gone: connections stay open and nobody answers on them.
    cluster.api_server().pause().expect("SIGSTOP");
    for _ in 0..3 {
        ask("with the API server frozen").await;
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    cluster.api_server().kill();
    ask("without an API server").await;
    replica.process().check().expect("it goes on");
}

/// Waits until all four entries hold this bundle again, and says how long it took when that is over 2 s.
async fn repaired(cluster: &Cluster, how: &str, right: &str) {
    let start = Instant::now();
    eventually(
        PATIENCE,
        &format!("the repair of a caBundle that was {how}"),
        || async {
            let now = ca_bundles(cluster).await;
            if now.len() == 4 && now.iter().all(|bundle| bundle == right) {
                Ok(())
            } else {
                Err(format!("{now:?}"))
            }
        },
    )
    .await;
    let took = start.elapsed();
    assert!(
        took <= Duration::from_secs(2),
        "{how}: repaired after {took:?}"
    );
}

/// The four entries' bundles, as PEM.
pub(crate) async fn ca_bundles(cluster: &Cluster) -> Vec<String> {
    let configurations: Api<MutatingWebhookConfiguration> = Api::all(cluster.client().await);
    let configuration = configurations
        .get("malha-injector")
        .await
        .expect("manifests/base has it");
    let webhooks = configuration.webhooks.unwrap_or_default();
    webhooks
        .into_iter()
        .map(|webhook| {
            webhook
                .client_config
                .ca_bundle
                .map_or_else(Vec::new, |bundle| bundle.0)
        })
        .map(|bundle| String::from_utf8_lossy(&bundle).into_owned())
        .collect()
}

pub(crate) async fn ca_bundle(cluster: &Cluster) -> String {
    let bundles = ca_bundles(cluster).await;
    let first = bundles.first().expect("four entries").clone();
    assert!(
        bundles.iter().all(|bundle| *bundle == first),
        "one bundle for all entries: {bundles:?}"
    );
    first
}

fn writes_of_the_ca_bundle(cluster: &Cluster) -> usize {
    let events = cluster.audit().into_iter();
    events
        .filter(|event| {
            event["verb"] == "patch"
                && event["objectRef"]["resource"] == "mutatingwebhookconfigurations"
                && event["user"]["username"] == "system:serviceaccount:malha-system:malha"
        })
        .count()
}

/// The intermediate under which every replica serves; fails while they differ, and when one does not verify.
async fn intermediate(plane: &ControlPlane, bundle: &str) -> Vec<u8> {
    eventually(PATIENCE, "all replicas under one intermediate", || async {
        let mut all = Vec::new();
        for replica in plane.replicas() {
            let chain = chain_of(replica.webhook, &trusting(bundle)).await?;
            all.push(
                chain
                    .get(1)
                    .cloned()
                    .ok_or("no intermediate in the chain")?,
            );
        }
        all.dedup();
        if all.len() == 1 {
            Ok(all.remove(0))
        } else {
            Err(format!("{} intermediates", all.len()))
        }
    })
    .await
}

fn handshakes(plane: &ControlPlane, bundle: &str) -> Handshakes {
    let servers = plane
        .replicas()
        .iter()
        .map(|replica| replica.webhook)
        .collect();
    Handshakes::begin(servers, bundle)
}

/// `malha ca rotate --intermediate`, with these rights.
async fn rotate_intermediate(kubeconfig: &Path) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_malha"));
    command
        .args(["ca", "rotate", "--intermediate"])
        .env("KUBECONFIG", kubeconfig);
    rig::run(command, None).await
}

/// A CSR by openssl, PEM, that asks for much more than its key.
pub(crate) async fn csr(dir: &Path) -> String {
    let output = openssl(
        dir,
        &[
            "req",
            "-new",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            "key.pem",
            "-subj",
            "/O=evil/CN=evil.example.com",
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-addext",
            "subjectAltName=DNS:evil.example.com,URI:spiffe://cluster.local/ns/kube-system/sa/evil",
        ],
    )
    .await;
    String::from_utf8(output.stdout).expect("PEM")
}

/// What a verifier that nobody here wrote says: the leaf in words, after the chain was verified.
pub(crate) async fn verified_by_openssl(dir: &Path, chain: &str, bundle: &Path) -> String {
    let leaf = dir.join("leaf.pem");
    let end = "-----END CERTIFICATE-----";
    let (first, rest) = chain.split_once(end).expect("a certificate");
    std::fs::write(&leaf, format!("{first}{end}\n")).expect("a file");
    let rest_file = dir.join("rest.pem");
    std::fs::write(&rest_file, rest).expect("a file");
    let path = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    openssl(
        dir,
        &[
            "verify",
            "-x509_strict",
            "-purpose",
            "sslclient",
            "-CAfile",
            &path(bundle),
            "-untrusted",
            &path(&rest_file),
            &path(&leaf),
        ],
    )
    .await;
    let output = openssl(dir, &["x509", "-in", &path(&leaf), "-noout", "-text"]).await;
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) async fn openssl(dir: &Path, args: &[&str]) -> Output {
    let mut command = tokio::process::Command::new("openssl");
    command.args(args).current_dir(dir);
    let output = rig::run(command, None).await;
    assert!(
        output.status.success(),
        "openssl {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// `POST /v1/certificates` by curl: status and answer.
pub(crate) async fn certificate(
    replica: &Replica,
    bundle: &Path,
    token: &str,
    csr: &str,
) -> (u16, Value) {
    let port = replica.ca.port();
    let url = format!("https://malha.malha-system.svc:{port}/v1/certificates");
    let to = format!("malha.malha-system.svc:{port}:127.0.0.1");
    let mut command = tokio::process::Command::new("curl");
    command
        .args([
            "--silent",
            "--show-error",
            "--max-time",
            "10",
            "--noproxy",
            "*",
            "--cacert",
        ])
        .arg(bundle)
        .args([
            "--resolve",
            &to,
            "--header",
            &format!("Authorization: Bearer {token}"),
        ])
        .args([
            "--header",
            "Content-Type: application/json",
            "--data-binary",
            "@-",
            "--write-out",
            "\n%{http_code}",
            &url,
        ]);
    let output = rig::run(command, Some(&json!({ "csr": csr }).to_string())).await;
    assert!(
        output.status.success(),
        "curl: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = said
        .rsplit_once('\n')
        .expect("the status on a line of its own");
    let answer = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {said}"));
    (status.parse().expect("a status"), answer)
}
