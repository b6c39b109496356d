//! Whether what a token is bound to is still there.

use std::{fmt, net::IpAddr, time::Duration};

use jiff::{SignedDuration, Timestamp};

use super::{Caller, CallerError, TokenClaims};
use crate::identity::TrustDomain;

/// How long after its deletion time a pod's token is still good: the pod drains, and its sidecar may need one more
/// certificate to do so. The API server's own token check grants the same 60 seconds.
pub const DELETION_GRACE: Duration = Duration::from_secs(60);

/// What the cluster knows about pods and service accounts right now.
pub trait Liveness: Send + Sync {
    /// Whether the first lists have arrived. Before that nothing is accepted on the word of this source.
    fn synced(&self) -> bool;
    /// The pod of that name; `None` where there is none.
    fn pod(&self, namespace: &str, name: &str) -> Option<PodFact>;
    /// The pods that run as a service account, ended ones included.
    fn pods_of(&self, namespace: &str, account: &str) -> Vec<PodFact>;
    /// Namespace and service account of the pod that has this address for itself alone.
    fn pod_at(&self, address: IpAddr) -> Option<(String, String)>;
    /// The UID of the service account of that name; `None` where there is none.
    fn service_account(&self, namespace: &str, name: &str) -> Option<String>;
    /// Whether the namespace is being deleted, or is gone.
    fn namespace_terminating(&self, namespace: &str) -> bool;
}

/// What is kept of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFact {
    /// `metadata.uid`.
    pub uid: String,
    /// `spec.serviceAccountName`, `default` where absent.
    pub service_account: String,
    /// `spec.nodeName`.
    pub node: Option<String>,
    /// `metadata.deletionTimestamp`: when the grace period of its deletion ends or ended.
    pub deletion: Option<Timestamp>,
    /// Succeeded or Failed.
    pub finished: bool,
}

/// What is no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gone {
    /// No pod of that name is known on its node: deleted, or too young for the watch to have seen it.
    PodUnknown(String),
    /// The name belongs to another pod now.
    PodReplaced(String),
    /// Deleted, and past its grace.
    PodDeleted(String),
    /// The pod runs on another node than the token's.
    OtherNode(String),
    /// No service account of that name is known.
    ServiceAccountUnknown(String),
    /// Deleted and made anew under its old name.
    ServiceAccountReplaced(String),
    /// Its namespace is being deleted.
    NamespaceTerminating(String),
    /// Nothing runs as the service account.
    NoPodOf(String),
}

impl Gone {
    /// Whether the watch may merely be behind, so that asking the API server can settle it.
    pub fn may_be_lag(&self) -> bool {
        match self {
            Self::PodUnknown(_) | Self::ServiceAccountUnknown(_) => true,
            Self::PodReplaced(_)
            | Self::PodDeleted(_)
            | Self::OtherNode(_)
            | Self::ServiceAccountReplaced(_)
            | Self::NamespaceTerminating(_)
            | Self::NoPodOf(_) => false,
        }
    }
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PodUnknown(pod) => write!(f, "the token's pod {pod} is not known on its node"),
            Self::PodReplaced(pod) => {
                write!(f, "the token belongs to an earlier pod of the name {pod}")
            }
            Self::PodDeleted(pod) => write!(f, "the token's pod {pod} was deleted"),
            Self::OtherNode(pod) => {
                write!(
                    f,
                    "the token's pod {pod} runs on another node than the token says"
                )
            }
            Self::ServiceAccountUnknown(account) => {
                write!(f, "the caller's service account {account} does not exist")
            }
            Self::ServiceAccountReplaced(account) => {
                write!(
                    f,
                    "the token belongs to an earlier service account of the name {account}"
                )
            }
            Self::NamespaceTerminating(namespace) => {
                write!(f, "the caller's namespace {namespace} is being deleted")
            }
            Self::NoPodOf(account) => {
                write!(f, "no pod runs as the service account {account}")
            }
        }
    }
}

/// The caller of verified claims, if everything they are bound to is alive.
///
/// # Errors
/// `CallerGone`, `IdentityConflict` where the pod runs as somebody else, `VerifierUnavailable` before the first lists.
pub fn bind(
    claims: TokenClaims,
    live: &dyn Liveness,
    trust_domain: &TrustDomain,
    now: Timestamp,
) -> Result<Caller, CallerError> {
    if !live.synced() {
        return Err(CallerError::VerifierUnavailable(
            "the lists of pods and service accounts have not arrived yet".to_owned(),
        ));
    }
    if live.namespace_terminating(&claims.namespace) {
        return Err(CallerError::CallerGone(Gone::NamespaceTerminating(
            claims.namespace,
        )));
    }
    account_alive(&claims, live)?;
    pod_alive(&claims, live, now)?;
    claims.into_caller(trust_domain)
}

fn account_alive(claims: &TokenClaims, live: &dyn Liveness) -> Result<(), CallerError> {
    let account = &claims.service_account;
    let name = || format!("{}/{}", claims.namespace, account.name);
    match live.service_account(&claims.namespace, &account.name) {
        None => Err(CallerError::CallerGone(Gone::ServiceAccountUnknown(name()))),
        Some(uid) if uid != account.uid => Err(CallerError::CallerGone(
            Gone::ServiceAccountReplaced(name()),
        )),
        Some(_) => Ok(()),
    }
}

fn pod_alive(claims: &TokenClaims, live: &dyn Liveness, now: Timestamp) -> Result<(), CallerError> {
    let Some(pod) = &claims.pod else {
        return Ok(());
    };
    let name = || format!("{}/{}", claims.namespace, pod.name);
    let gone = |why: fn(String) -> Gone| Err(CallerError::CallerGone(why(name())));
    let Some(fact) = live.pod(&claims.namespace, &pod.name) else {
        return gone(Gone::PodUnknown);
    };
    if fact.uid != pod.uid {
        return gone(Gone::PodReplaced);
    }
    if fact.service_account != claims.service_account.name {
        return Err(CallerError::IdentityConflict(format!(
            "its pod {} runs as the service account {:?}, not {:?}",
            name(),
            fact.service_account,
            claims.service_account.name
        )));
    }
    let grace = SignedDuration::from_secs(DELETION_GRACE.as_secs().cast_signed());
    if fact
        .deletion
        .is_some_and(|deleted| now.duration_since(deleted) > grace)
    {
        return gone(Gone::PodDeleted);
    }
    match (&claims.node, &fact.node) {
        (None, _) => Ok(()),
        (Some(claimed), Some(actual)) if claimed.name == *actual => Ok(()),
        (Some(_), Some(_)) => gone(Gone::OtherNode),
        // a token that names a node was made after the pod was put there: the watch is behind
        (Some(_), None) => gone(Gone::PodUnknown),
    }
}
