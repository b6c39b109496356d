//! A certificate that is really issued: a token of a control-plane pod, a key that is forgotten at once, and the chain
//! looked at as a peer would.

use anyhow::{Context as _, anyhow, bail, ensure};
use bytes::Bytes;
use hyper::{
    Request,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::ApiResource;
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::{
    ca::{
        bundle::Bundle,
        key::SecretKey,
        peer::{self, Side},
        pem,
        svid::Svid,
    },
    cli::{
        cluster::{Cluster, PodName, is_ready},
        rendering::NAMESPACE,
        terminal::whole,
    },
    config::{Layers, Settings},
    identity::SpiffeId,
    runtime::clock,
    tls,
};

/// Where certificates are issued, on each control-plane pod.
const PORT: u16 = 15012;
/// The name that the control plane's certificate carries there.
const NAME: &str = "malha.malha-system.svc";

/// What became of the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Issuance {
    /// No replica is ready.
    NobodyAsked,
    /// A certificate that a peer takes.
    Issued(SpiffeId),
    /// None; why.
    Refused(String),
}

/// Asks a ready replica for a certificate for its own service account, and verifies it and its answer against `bundle`.
///
/// # Errors
/// It could not be asked: no token is to be had, or the API server opens no way.
pub(in crate::cli) async fn try_a_certificate(
    cluster: &Cluster,
    bundle: &Bundle,
) -> anyhow::Result<Issuance> {
    let replicas = cluster.replicas(NAMESPACE).await?;
    let Some(pod) = replicas.iter().find(|pod| is_ready(pod)) else {
        return Ok(Issuance::NobodyAsked);
    };
    let token = cluster.token_of(pod, &audience(cluster).await?).await?;
    let made = rcgen::KeyPair::generate().context("cannot make a key")?;
    let key = SecretKey::from_pkcs8(Zeroizing::new(made.serialize_der()))?;
    let request = Request::post("/v1/certificates")
        .header(AUTHORIZATION, format!("Bearer {token}"))
        .header(CONTENT_TYPE, "application/json")
        .body(Bytes::from(json!({ "csr": key.request()? }).to_string()))?;
    let server = (
        tls::client_config(bundle.certificates())?,
        ServerName::try_from(NAME)?,
    );
    let forward = cluster.forward(&PodName::of(pod), PORT).await?;
    let answer = forward.exchange(Some(server), request).await;
    let issued = answer.and_then(|(status, body)| verified(status, &body, &key, bundle));
    Ok(match issued {
        Ok(identity) => Issuance::Issued(identity),
        Err(why) => Issuance::Refused(whole(&why)),
    })
}

/// The first of the audiences that the control plane is configured to take.
async fn audience(cluster: &Cluster) -> anyhow::Result<String> {
    let config = ApiResource::erase::<ConfigMap>(&());
    let found = cluster.object(&config, Some(NAMESPACE), "malha-config");
    let found = found.await?.unwrap_or_default();
    let written = found["data"]["malha.yaml"].as_str().unwrap_or_default();
    let settings = Settings::parse(&Layers::default().with_file(written)?)?;
    let first = settings.audiences.into_iter().next();
    first.context("the control plane is configured to take no audience")
}

/// Whose the certificate is, if it is one that a peer takes.
fn verified(
    status: u16,
    body: &[u8],
    key: &SecretKey,
    bundle: &Bundle,
) -> anyhow::Result<SpiffeId> {
    let answer: Value = serde_json::from_slice(body)
        .with_context(|| format!("an answer with status {status} that is no JSON"))?;
    if status != 201 {
        let word = |field: &str| answer[field].as_str().unwrap_or_default();
        bail!("{status} {}: {}", word("code"), word("detail"));
    }
    let chain = answer["certificate_chain"].as_str().unwrap_or_default();
    let chain = pem::parse(chain.as_bytes()).map_err(|_| anyhow!("a chain that is no PEM"))?;
    let chain: Vec<Vec<u8>> = chain.blocks.into_iter().map(|block| block.der).collect();
    peer::verify(&chain, bundle, Side::Client, clock::system().now())?;
    let svid = Svid::parse(&chain[0])?;
    ensure!(
        svid.spki == key.public_key().spki(),
        "the certificate is not for the key that was sent"
    );
    Ok(svid.id)
}
