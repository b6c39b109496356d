//! Peers whose certificate is good, and names somebody else than it should.

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::Api;
use malha::{
    ca::{
        journal::{IntermediateState, Journal},
        pem,
    },
    k8s::journal::JOURNAL_KEY,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, SanType,
};

use super::{STRICT, Shop, counter, curl, until};
use crate::node::{Namespace, Node};

#[tokio::test(flavor = "multi_thread")]
async fn who_proves_another_name_than_the_mesh_expects_is_refused_and_counted() {
    let Some(shop) = Shop::open("names").await else {
        return;
    };
    shop.mesh.apply(STRICT).await;
    clients_of_another_trust_domain(&shop).await;
    a_server_of_another_account(&shop).await;
}

/// Two meshes may share a root, so the name has to be looked at as well as the chain.
async fn clients_of_another_trust_domain(shop: &Shop) {
    let outside = shop.outsider().await;
    let (ours, theirs) = (
        Signer::of_the_mesh(shop.node).await,
        Signer::of_another_root(),
    );
    let namespace = shop.mesh.name();
    let client = |domain: &str| format!("spiffe://{domain}/ns/{namespace}/sa/client");

    let control = ours.client(&client("cluster.local"));
    until(
        "a certificate that the mesh could have signed is taken",
        |answer: &Result<String, String>| answer.as_deref() == Ok("web"),
        async || shop.called_with(&outside, &control).await,
    )
    .await;
    for (signer, domain, counted) in [
        (&ours, "other.example", "envoy_listener_ssl_fail_verify_san"),
        // A name that only begins like ours.
        (
            &ours,
            "cluster.local.other.example",
            "envoy_listener_ssl_fail_verify_san",
        ),
        (
            &theirs,
            "other.example",
            "envoy_listener_ssl_fail_verify_error",
        ),
    ] {
        let before = shop.counter(counted).await;
        let client = signer.client(&client(domain));
        // Again until it is counted: on a busy machine a call may also fail before its certificate was looked at.
        until(
            &format!("{domain} is counted as {counted}"),
            |count| *count > before,
            async || {
                let answer = shop.called_with(&outside, &client).await;
                assert!(answer.is_err(), "{domain}, {counted}: {answer:?}");
                shop.counter(counted).await
            },
        )
        .await;
    }
}

impl Shop {
    /// What a pod outside the mesh gets from the server with this certificate.
    async fn called_with(&self, outside: &Namespace, client: &Client) -> Result<String, String> {
        for (path, text) in [("/tmp/chain", &client.chain), ("/tmp/key", &client.key)] {
            outside.put("pod/outsider", "client", path, text).await;
        }
        let server = self.field("pod/web", ".status.podIP").await;
        let url = format!("https://{server}:8080/hostname");
        // What is spoken to the proxy is spoken to the application, which knows HTTP/1.1.
        let call = [
            "-k",
            "--http1.1",
            "--cert",
            "/tmp/chain",
            "--key",
            "/tmp/key",
            &url,
        ];
        curl(outside, "pod/outsider", "client", &call).await
    }
}

/// A certificate with the chain above it, and its key: PEM.
struct Client {
    chain: String,
    key: String,
}

/// Signs what no authority of a mesh would.
struct Signer {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Signer {
    /// With the key that the control plane keeps.
    async fn of_the_mesh(node: &Node) -> Self {
        let secrets: Api<Secret> = Api::namespaced(node.client().await, "malha-system");
        let secret = secrets
            .get("malha-ca")
            .await
            .expect("the authority's Secret");
        let data = secret.data.unwrap_or_default();
        let ByteString(journal) = data.get(JOURNAL_KEY).expect("its journal");
        let journal = Journal::from_json(journal).expect("a journal");
        let signing = journal.active().intermediate(IntermediateState::Active);
        let signing = signing.expect("an intermediate that signs");
        let key = signing.key.as_ref().expect("its key").pkcs8();
        let key = KeyPair::try_from(key).expect("a key");
        let der = signing.certificate.der();
        Self {
            issuer: Issuer::from_ca_cert_der(&der.into(), key).expect("an issuer"),
            certificate: pem::encode("CERTIFICATE", der),
        }
    }

    fn of_another_root() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, "another root");
        let certificate = params.self_signed(&key).expect("a root").pem();
        Self {
            issuer: Issuer::new(params, key),
            certificate,
        }
    }

    fn client(&self, id: &str) -> Client {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.try_into().expect("ASCII"))];
        let leaf = params.signed_by(&key, &self.issuer).expect("a certificate");
        Client {
            chain: leaf.pem() + &self.certificate,
            key: key.serialize_pem(),
        }
    }
}

/// The Service's endpoint is the client's pod, as the world says; at its address is the server's.
async fn a_server_of_another_account(shop: &Shop) {
    let address = shop.field("pod/web", ".status.podIP").await;
    shop.mesh
        .apply(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: bank}}\nspec: {{ports: [{{name: http, port: 80, \
             targetPort: 8080}}]}}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: bank, \
             labels: {{kubernetes.io/service-name: bank}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\n\
             endpoints: [{{addresses: [{address}], targetRef: {{kind: Pod, name: client, namespace: {}}}}}]\n",
            shop.mesh.name()
        ))
        .await;
    let refused = async || {
        let name = "envoy_cluster_ssl_fail_verify_san";
        counter(&shop.mesh, ("pod/client", "client"), name).await
    };
    assert_eq!(refused().await, 0.0);
    until(
        "the caller's proxy does not take it",
        |(answer, refused): &(Result<String, String>, f64)| {
            answer.as_ref().is_err_and(|said| said.contains("503")) && *refused > 0.0
        },
        async || {
            let answer = curl(
                &shop.mesh,
                "pod/client",
                "client",
                &["http://bank/hostname"],
            )
            .await;
            (answer, refused().await)
        },
    )
    .await;
    let known = curl(&shop.mesh, "pod/client", "client", &["http://web/hostname"]).await;
    assert_eq!(
        known.as_deref(),
        Ok("web"),
        "the same pod by its own Service"
    );
}
