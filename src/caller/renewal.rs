//! A client certificate of ours in the place of a token: whoever holds a leaf that is still good gets the next one.
//!
//! leaf, verified at the handshake -> [`Shown::read`] -> [`alive`] -> [`Caller`]
//!
//! How long this may go on is bounded without a state being kept: the leaf's serial number says when its holder last showed
//! a token, and each renewal carries that on.

use std::{net::IpAddr, time::Duration};

use jiff::{SignedDuration, Timestamp};

use super::{Caller, CallerError, DELETION_GRACE, Gone, Liveness, Method, PodFact};
use crate::{
    ca::{Serial, svid::Svid},
    identity::{SpiffeId, TrustDomain},
};

/// How long a holder may renew its certificate without a token.
pub const RENEW_WITHOUT_TOKEN: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a leaf of ours says about who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    id: SpiffeId,
    proved: Timestamp,
}

impl Shown {
    /// Reads a leaf whose chain was verified at the handshake. `denied` knows the serial numbers that must
    /// not be renewed.
    ///
    /// # Errors
    /// `CertificateInvalid` where it is no workload's of this mesh, `Denied`, `RenewalNeedsToken`.
    pub fn read(
        leaf: &[u8],
        trust_domain: &TrustDomain,
        denied: impl FnOnce(&Serial) -> bool,
        now: Timestamp,
    ) -> Result<Self, CallerError> {
        let invalid = |fault: String| CallerError::CertificateInvalid(fault);
        let svid = Svid::parse(leaf).map_err(|fault| invalid(fault.to_string()))?;
        // Its connection may be older than its end.
        let end = svid.validity.not_after;
        if end < now {
            return Err(invalid(format!(
                "it ended at {end}; the clock here says {now}"
            )));
        }
        if svid.id.trust_domain() != trust_domain {
            return Err(invalid(format!("{} is of another trust domain", svid.id)));
        }
        let Some(serial) = svid.serial else {
            return Err(invalid("its serial number is not one of ours".to_owned()));
        };
        if denied(&serial) {
            return Err(CallerError::Denied(serial.to_string()));
        }
        // The control plane's own certificates, and those of other issuers below the same root, tell of no token.
        let Some(proved) = serial.token_proof() else {
            return Err(CallerError::RenewalNeedsToken { proved: None, now });
        };
        let longest = SignedDuration::from_secs(RENEW_WITHOUT_TOKEN.as_secs().cast_signed());
        if now.duration_since(proved) > longest {
            let proved = Some(proved);
            return Err(CallerError::RenewalNeedsToken { proved, now });
        }
        Ok(Self {
            id: svid.id,
            proved,
        })
    }

    /// Whose it is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The caller, where nothing is known of what is alive: a mesh without a cluster.
    pub fn into_caller(self) -> Caller {
        Caller {
            identity: self.id,
            method: Method::Certificate,
            pod: None,
            node: None,
            token_id: None,
            stale: false,
            proved: Some(self.proved),
            node_proxy: None,
        }
    }
}

/// The caller, if its service account is there, a pod runs as it, and whoever calls is not a pod that runs as another.
///
/// # Errors
/// `CallerGone`, `IdentityConflict`, `VerifierUnavailable` before the first lists.
pub fn alive(
    shown: Shown,
    address: Option<IpAddr>,
    live: &dyn Liveness,
    now: Timestamp,
) -> Result<Caller, CallerError> {
    if !live.synced() {
        return Err(CallerError::VerifierUnavailable(
            "the lists of pods and service accounts have not arrived yet".to_owned(),
        ));
    }
    let (namespace, account) = (shown.id.namespace(), shown.id.service_account());
    let name = || format!("{namespace}/{account}");
    if live.namespace_terminating(namespace) {
        let gone = Gone::NamespaceTerminating(namespace.to_owned());
        return Err(CallerError::CallerGone(gone));
    }
    if live.service_account(namespace, account).is_none() {
        return Err(CallerError::CallerGone(Gone::ServiceAccountUnknown(name())));
    }
    let runs = |pod: &PodFact| pod.runs(now);
    if !live.pods_of(namespace, account).iter().any(runs) {
        return Err(CallerError::CallerGone(Gone::NoPodOf(name())));
    }
    if let Some((other_namespace, other)) = address.and_then(|address| live.pod_at(address))
        && (other_namespace.as_str(), other.as_str()) != (namespace, account)
    {
        return Err(CallerError::IdentityConflict(format!(
            "the certificate is of {}, but the pod at its address runs as the service account {other_namespace}/{other}",
            name()
        )));
    }
    Ok(shown.into_caller())
}

impl PodFact {
    /// Whether its containers may still need a certificate.
    pub fn runs(&self, now: Timestamp) -> bool {
        let grace = SignedDuration::from_secs(DELETION_GRACE.as_secs().cast_signed());
        let over = |deleted| now.duration_since(deleted) > grace;
        !self.finished && !self.deletion.is_some_and(over)
    }
}
