//! The API server's word on a token that cannot be judged offline.

use std::collections::BTreeMap;

use k8s_openapi::api::authentication::v1::TokenReviewStatus;

use super::{BoundObject, Caller, CallerError, Method, TokenPolicy, token::service_account};
use crate::identity::{SpiffeId, TrustDomain};

/// Reads a TokenReview's status. The review must have been asked with our audiences: an API server that knows of
/// audiences answers with those that both sides share, and one that does not answers with none.
///
/// A failed *call* is no status: whoever made it answers `VerifierUnavailable`.
///
/// # Errors
/// One variant per reason.
pub fn review(
    status: &TokenReviewStatus,
    policy: &TokenPolicy,
    trust_domain: &TrustDomain,
) -> Result<Caller, CallerError> {
    if status.authenticated != Some(true) {
        let fault = status.error.as_deref().unwrap_or("no reason given");
        return Err(CallerError::TokenInvalid(format!(
            "the API server refuses it: {fault}"
        )));
    }
    let shared = status.audiences.as_deref().unwrap_or_default();
    if !shared
        .iter()
        .any(|audience| policy.audiences.contains(audience))
    {
        return Err(CallerError::AudienceMismatch {
            sent: shared.to_vec(),
            accepted: policy.audiences.clone(),
        });
    }
    let user = status.user.clone().unwrap_or_default();
    let groups = user.groups.unwrap_or_default();
    if !groups.iter().any(|group| group == "system:serviceaccounts") {
        return Err(not_an_account());
    }
    let name = user.username.unwrap_or_default();
    let (namespace, account) = service_account(&name).ok_or_else(not_an_account)?;
    let extra = user.extra.unwrap_or_default();
    let pod = bound(&extra, "pod");
    if policy.require_bound_pod && pod.is_none() {
        return Err(CallerError::NotBound);
    }
    let identity = SpiffeId::new(trust_domain, namespace, account)
        .map_err(|e| CallerError::TokenInvalid(e.to_string()))?;
    Ok(Caller {
        identity,
        method: Method::TokenReview,
        pod,
        node: bound(&extra, "node"),
        token_id: single(&extra, "credential-id").map(without_kind),
        stale: false,
        proved: None,
        node_proxy: None,
    })
}

fn not_an_account() -> CallerError {
    CallerError::TokenInvalid("its user is not a service account".to_owned())
}

fn bound(extra: &BTreeMap<String, Vec<String>>, kind: &str) -> Option<BoundObject> {
    Some(BoundObject {
        name: single(extra, &format!("{kind}-name"))?,
        uid: single(extra, &format!("{kind}-uid"))?,
    })
}

/// `JTI=<jti>`, where the token itself has the bare id.
fn without_kind(credential: String) -> String {
    credential
        .strip_prefix("JTI=")
        .map(str::to_owned)
        .unwrap_or(credential)
}

/// The value of `authentication.kubernetes.io/<key>`, if there is exactly one.
fn single(extra: &BTreeMap<String, Vec<String>>, key: &str) -> Option<String> {
    match extra
        .get(&format!("authentication.kubernetes.io/{key}"))?
        .as_slice()
    {
        [one] => Some(one.clone()),
        _ => None,
    }
}
