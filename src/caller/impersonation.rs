//! A proxy that serves a whole node asks for the certificates of the pods on it.
//!
//! caller + whom it asks for + [`NodeProxies`] + [`Liveness`] -> identity, or the one condition that does not hold

use std::str::FromStr;

use jiff::Timestamp;

use super::{Caller, Liveness};
use crate::identity::{SpiffeId, TrustDomain};

/// The service accounts that may ask for the pods on their own node; nobody by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeProxies(Vec<(String, String)>);

impl NodeProxies {
    /// Whether a caller is one of them.
    pub fn list(&self, caller: &SpiffeId) -> bool {
        let named = |(namespace, account): &(String, String)| {
            namespace == caller.namespace() && account == caller.service_account()
        };
        self.0.iter().any(named)
    }
}

/// `istio-system/ztunnel`, several separated by commas; empty is nobody.
impl FromStr for NodeProxies {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = text
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty());
        let parsed = names.map(|name| match name.split_once('/') {
            Some((namespace, account)) if !namespace.is_empty() && !account.is_empty() => {
                Ok((namespace.to_owned(), account.to_owned()))
            }
            _ => Err(format!("{name:?} is not NAMESPACE/SERVICEACCOUNT")),
        });
        parsed.collect::<Result<_, _>>().map(Self)
    }
}

/// Whom the caller may get a certificate for.
///
/// # Errors
/// The first condition that does not hold.
pub fn impersonate(
    caller: &Caller,
    target: &str,
    allowed: &NodeProxies,
    own_namespace: &str,
    live: &dyn Liveness,
    now: Timestamp,
) -> Result<SpiffeId, NotImpersonated> {
    use NotImpersonated as N;
    if !allowed.list(&caller.identity) {
        return Err(N::NotAllowed);
    }
    let (Some(_), Some(node)) = (&caller.pod, &caller.node) else {
        return Err(N::NotBound);
    };
    let target: SpiffeId = target.parse().map_err(|_| N::NoIdentity)?;
    let trust_domain: &TrustDomain = caller.identity.trust_domain();
    if target.trust_domain() != trust_domain {
        return Err(N::OtherTrustDomain);
    }
    if target.namespace() == own_namespace {
        return Err(N::ControlPlane);
    }
    let pods = live.pods_of(target.namespace(), target.service_account());
    let here = |node_of: &Option<String>| node_of.as_deref() == Some(node.name.as_str());
    if !pods.iter().any(|pod| here(&pod.node) && pod.runs(now)) {
        return Err(N::NotOnNode);
    }
    Ok(target)
}

/// Why a certificate is not handed out for somebody else.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotImpersonated {
    /// Not on the list, which is empty unless somebody fills it.
    #[error(
        "certificates for somebody else than the caller are not handed out; a node's proxy must stand in the setting node-proxies"
    )]
    NotAllowed,
    /// Its token does not say on which node it runs.
    #[error(
        "the caller's token is not bound to a pod on a node, so it is not known for which pods it may ask"
    )]
    NotBound,
    /// Not a name of a workload.
    #[error("ImpersonatedIdentity is not spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT")]
    NoIdentity,
    /// Somebody else's mesh.
    #[error("ImpersonatedIdentity is of another trust domain")]
    OtherTrustDomain,
    /// The control plane's own namespace.
    #[error("identities of the control plane are not handed out")]
    ControlPlane,
    /// Not there, or ended.
    #[error("no pod runs as that identity on the caller's node")]
    NotOnNode,
}
