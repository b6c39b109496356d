//! An operator's own issuer in the Secret `cacerts`, made by openssl as Istio's users make it, on the real API server.

use std::path::Path;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::authority::{certificate, csr, openssl, verified_by_openssl};
use crate::rig::outside::{self, ControlPlane, NAMESPACE, Replica};
use crate::rig::pods::{MESH, create, pod};
use crate::rig::{self, Cluster, Setup, TokenOf, eventually};

const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread")]
async fn the_operators_issuer_signs_and_nothing_wrong_ever_takes_its_place() {
    let Some(address) = outside::host_address() else {
        return rig::skip(&"this machine has no address besides loopback");
    };
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let dir = tempfile::tempdir().expect("a directory");
    let operator = Operator::new(&cluster, NAMESPACE, dir.path()).await;
    outside::apply_base(&cluster).await;

    // At the first start, without its key: nothing is signed, no root is made, and it is told why.
    let first = operator.issuer("first").await;
    operator.put(&first, &["ca-key.pem"]).await;
    let lone = Replica::new(&cluster, address).await.expect("a replica");
    lone.process().start().expect("it starts");
    operator.told("ca-key.pem is missing").await;
    let not_ready = lone.readyz().await.expect_err("nothing to sign with");
    assert!(not_ready.contains("CA journal"), "{not_ready}");
    let secrets = &operator.secrets;
    let journal = secrets.get_opt("malha-ca").await.expect("an answer");
    assert!(journal.is_none(), "a root was made in its place");
    operator.put(&first, &[]).await;
    lone.ready().await;

    let plane = ControlPlane::install(&cluster, 1)
        .await
        .expect("an address");
    let namespace = cluster.namespace("plugged", MESH).await;
    create(&cluster, &namespace, &pod("caller"))
        .await
        .expect("a meshed pod");
    let signed = Signed {
        cluster: &cluster,
        operator: &operator,
        replicas: [&lone, plane.replicas().first().expect("one")],
        namespace: &namespace,
    };
    signed.by(&first).await;

    let second = operator.issuer("second").await;
    operator.put(&second, &[]).await;
    signed.by(&second).await;

    // Half of a replacement: the certificate of the third beside the key of the second.
    let third = operator.issuer("third").await;
    let half = json!({ "data": { "ca-cert.pem": ByteString(third.cert.clone()) } });
    secrets
        .patch("cacerts", &PatchParams::default(), &Patch::Merge(half))
        .await
        .expect("patched");
    operator.told("ca-key.pem is not the key").await;
    signed.by(&second).await;

    secrets
        .delete("cacerts", &DeleteParams::default())
        .await
        .expect("deleted");
    operator.told("no issuer is plugged in any more").await;
    signed.by(&second).await;

    operator.put(&third, &[]).await;
    signed.by(&third).await;
    let text = operator.journal().await;
    let authorities = text["authorities"].as_array().expect("a list");
    assert!(
        authorities.iter().all(|one| one["kind"] == "plugged"),
        "no root was ever made here"
    );
}

/// Who has a root of its own, and the right to write the Secret.
pub(crate) struct Operator<'a> {
    dir: &'a Path,
    secrets: Api<Secret>,
    events: Api<Event>,
}

pub(crate) struct Issuer {
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl<'a> Operator<'a> {
    pub(crate) async fn new(cluster: &Cluster, namespace: &str, dir: &'a Path) -> Self {
        let words = "req -x509 -newkey rsa:2048 -nodes -keyout root-key.pem -out root-cert.pem -days 30 \
             -subj /O=Corp/CN=root -addext keyUsage=critical,keyCertSign,cRLSign";
        openssl(dir, &words.split_whitespace().collect::<Vec<_>>()).await;
        let client = cluster.client().await;
        Self {
            dir,
            secrets: Api::namespaced(client.clone(), namespace),
            events: Api::namespaced(client, namespace),
        }
    }

    /// An intermediate of a day's life, with an RSA key in the form that openssl writes.
    pub(crate) async fn issuer(&self, name: &str) -> Issuer {
        let extensions = "basicConstraints=critical,CA:true,pathlen:0\n\
             keyUsage=critical,digitalSignature,keyCertSign,cRLSign\n\
             subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n";
        std::fs::write(self.dir.join("extensions"), extensions).expect("a file");
        for words in [
            format!(
                "req -new -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /O=Corp/CN={name}"
            ),
            format!(
                "x509 -req -in {name}.csr -CA root-cert.pem -CAkey root-key.pem -CAcreateserial -days 1 \
                 -extfile extensions -out {name}.pem"
            ),
        ] {
            openssl(self.dir, &words.split_whitespace().collect::<Vec<_>>()).await;
        }
        Issuer {
            cert: self.read(&format!("{name}.pem")),
            key: self.read(&format!("{name}.key")),
        }
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.join(name)).expect("openssl wrote it")
    }

    /// Makes or replaces the Secret.
    pub(crate) async fn put(&self, issuer: &Issuer, without: &[&str]) {
        let root = self.read("root-cert.pem");
        let chain = [issuer.cert.clone(), root.clone()].concat();
        let files = [
            ("ca-cert.pem", issuer.cert.clone()),
            ("ca-key.pem", issuer.key.clone()),
            ("cert-chain.pem", chain),
            ("root-cert.pem", root),
        ];
        let files = files
            .into_iter()
            .filter(|(name, _)| !without.contains(name));
        let data = files.map(|(name, text)| (name.to_owned(), ByteString(text)));
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some("cacerts".to_owned()),
                ..ObjectMeta::default()
            },
            data: Some(data.collect()),
            ..Secret::default()
        };
        let params = PostParams::default();
        let written = match self.secrets.get_opt("cacerts").await.expect("an answer") {
            None => self.secrets.create(&params, &secret).await,
            Some(_) => self.secrets.replace("cacerts", &params, &secret).await,
        };
        drop(written.expect("written"));
    }

    /// Waits for the Event that says so.
    async fn told(&self, words: &str) {
        eventually(PATIENCE, words, || async {
            let list = self.events.list(&ListParams::default()).await;
            let notes: Vec<_> = list
                .expect("an answer")
                .into_iter()
                .filter(|event| event.reason.as_deref() == Some("PluggedIssuerRefused"))
                .filter_map(|event| event.note)
                .collect();
            match notes.iter().any(|note| note.contains(words)) {
                true => Ok(()),
                false => Err(format!("told so far: {notes:?}")),
            }
        })
        .await;
    }

    async fn journal(&self) -> Value {
        let secret = self.secrets.get("malha-ca").await.expect("it is there");
        let data = secret.data.expect("data");
        serde_json::from_slice(&data["journal.json"].0).expect("JSON")
    }
}

/// Certificates for a pod, from every replica.
struct Signed<'a> {
    cluster: &'a Cluster,
    operator: &'a Operator<'a>,
    replicas: [&'a Replica; 2],
    namespace: &'a str,
}

impl Signed<'_> {
    /// Every replica signs with this issuer, and openssl and Go accept what it signs.
    async fn by(&self, issuer: &Issuer) {
        let dir = self.operator.dir;
        let bundle = dir.join("root-cert.pem");
        let identity = format!("spiffe://cluster.local/ns/{}/sa/default", self.namespace);
        let of_pod = TokenOf::Pod("caller");
        for replica in self.replicas {
            let chain = eventually(PATIENCE, "signed by the issuer", || async {
                // A token and a key of its own each time: an answer is repeated to who repeats its question.
                let token =
                    self.cluster
                        .token(self.namespace, "default", &of_pod, &["malha-ca"], 600);
                let (token, csr) = (token.await, csr(dir).await);
                let (status, answer) = certificate(replica, &bundle, &token, &csr).await;
                let chain = answer["certificate_chain"].as_str().unwrap_or_default();
                let issuer = String::from_utf8_lossy(&issuer.cert).trim().to_owned();
                match chain.contains(&issuer) {
                    true => Ok(chain.to_owned()),
                    false => Err(format!("{status} {answer:#}")),
                }
            })
            .await;
            verified_by_openssl(dir, &chain, &bundle).await;
            verified_by_go(dir, &chain, &bundle, &identity).await;
        }
    }
}

async fn verified_by_go(dir: &Path, chain: &str, bundle: &Path, identity: &str) {
    let file = dir.join("chain.pem");
    std::fs::write(&file, chain).expect("a file");
    let source = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/cluster/programs/verify/main.go"
    );
    let program = dir.join("verify");
    if !program.exists() {
        let mut build = tokio::process::Command::new("go");
        build.args(["build", "-o"]).arg(&program).arg(source);
        build.current_dir(dir);
        let built = rig::run(build, None).await;
        let said = String::from_utf8_lossy(&built.stderr);
        assert!(built.status.success(), "go build: {said}");
    }
    let mut verify = tokio::process::Command::new(program);
    verify.arg(bundle).arg(&file).arg(identity);
    let verified = rig::run(verify, None).await;
    let said = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success(), "Go: {said}");
}
