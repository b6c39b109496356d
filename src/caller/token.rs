//! A service-account token, checked without asking anybody (RFC 7515, RFC 7519, the claims of Kubernetes' projected
//! tokens).

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use jsonwebtoken::Algorithm;
use serde::Deserialize;

use super::{
    BoundObject, Caller, CallerError, Method,
    keys::{KeySet, KeyType},
};
use crate::identity::{SpiffeId, TrustDomain};

/// Tokens longer than this are not looked at. Kubernetes' own are about 1 KiB.
pub const MAX_TOKEN: usize = 16 * 1024;

/// How far two clocks may be apart before a token counts as expired or not yet valid.
pub const LEEWAY: Duration = Duration::from_secs(60);

/// Whose tokens are accepted, and for whom they must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenPolicy {
    /// `iss`, compared byte for byte.
    pub issuer: String,
    /// A token must name one of these in `aud`, byte for byte.
    pub audiences: Vec<String>,
    /// Whether a token that is bound to no pod is refused. On in a cluster; a standalone mesh has no pods.
    pub require_bound_pod: bool,
}

/// What a verified token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenClaims {
    /// The namespace.
    pub namespace: String,
    /// The service account.
    pub service_account: BoundObject,
    /// The pod it is bound to.
    pub pod: Option<BoundObject>,
    /// The node of that pod (Kubernetes 1.30 and later).
    pub node: Option<BoundObject>,
    /// `jti`.
    pub token_id: Option<String>,
    /// `exp`.
    pub expires: Timestamp,
}

impl TokenClaims {
    /// The caller these claims name, without asking whether its pod is alive: [`super::bind`] does that where there are
    /// pods.
    ///
    /// # Errors
    /// `TokenInvalid` where the names are not Kubernetes names.
    pub fn into_caller(self, trust_domain: &TrustDomain) -> Result<Caller, CallerError> {
        let identity = SpiffeId::new(trust_domain, &self.namespace, &self.service_account.name)
            .map_err(|e| CallerError::TokenInvalid(e.to_string()))?;
        Ok(Caller {
            identity,
            method: Method::Jwks,
            pod: self.pod,
            node: self.node,
            token_id: self.token_id,
            stale: false,
            proved: None,
            node_proxy: None,
        })
    }
}

/// Checks a token's form, algorithm, signature, issuer, audience, times and subject, in this order.
///
/// The algorithm is looked at before anything else of the token, so that `none` and the symmetric ones (with which a
/// public key becomes everybody's signing key) get no further. The claims are parsed once, after the signature over
/// those very bytes was found good.
///
/// # Errors
/// One variant per reason; [`CallerError::UnknownKey`] where fetching the key set anew may help.
pub fn verify(
    token: &str,
    keys: &KeySet,
    policy: &TokenPolicy,
    now: Timestamp,
) -> Result<TokenClaims, CallerError> {
    let parts = Parts::split(token)?;
    let header: Header = parse_part(parts.header, "header")?;
    let algorithm = allowed(&header.alg)?;
    if header.crit.is_some() {
        // RFC 7515 4.1.11: an extension that is not understood makes the token invalid, and we know none
        return Err(invalid("its header lists critical extensions"));
    }
    let Some(id) = header.kid else {
        return Err(invalid("its header names no key"));
    };
    let Some(key) = KeyType::of(algorithm).and_then(|kind| keys.find(&id, kind)) else {
        return Err(stranger(&parts, policy, id));
    };
    match jsonwebtoken::crypto::verify(parts.signature, parts.signed, key, algorithm) {
        Ok(true) => {}
        Ok(false) | Err(_) => return Err(invalid("its signature does not verify")),
    }
    let claims: Claims = parse_part(parts.payload, "payload")?;
    claims.check(policy, now)
}

/// The pieces of a JWS in compact form.
struct Parts<'a> {
    header: &'a str,
    payload: &'a str,
    signature: &'a str,
    /// What the signature is over: header, dot, payload.
    signed: &'a [u8],
}

impl<'a> Parts<'a> {
    fn split(token: &'a str) -> Result<Self, CallerError> {
        if token.len() > MAX_TOKEN {
            return Err(invalid("it is longer than 16 KiB"));
        }
        let malformed = || invalid("it is not three parts with dots between them");
        let (signed, signature) = token.rsplit_once('.').ok_or_else(malformed)?;
        let (header, payload) = signed.split_once('.').ok_or_else(malformed)?;
        if payload.contains('.') {
            return Err(malformed());
        }
        Ok(Self {
            header,
            payload,
            signature,
            signed: signed.as_bytes(),
        })
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<serde::de::IgnoredAny>,
}

fn allowed(name: &str) -> Result<Algorithm, CallerError> {
    match name {
        "RS256" => Ok(Algorithm::RS256),
        "RS384" => Ok(Algorithm::RS384),
        "RS512" => Ok(Algorithm::RS512),
        "ES256" => Ok(Algorithm::ES256),
        "ES384" => Ok(Algorithm::ES384),
        _ => Err(invalid(
            "its algorithm is not one of RS256, RS384, RS512, ES256, ES384",
        )),
    }
}

/// Names the fault of a token whose key we do not have. The issuer it claims is unverified here: it only picks the word
/// in our log, and a refusal it is either way.
fn stranger(parts: &Parts<'_>, policy: &TokenPolicy, id: String) -> CallerError {
    #[derive(Deserialize)]
    struct Claimed {
        iss: String,
    }
    match parse_part::<Claimed>(parts.payload, "payload") {
        Ok(claimed) if claimed.iss != policy.issuer => CallerError::UnknownIssuer(claimed.iss),
        _ => CallerError::UnknownKey(id),
    }
}

#[derive(Deserialize)]
struct Claims {
    iss: Option<String>,
    aud: Option<Audience>,
    sub: Option<String>,
    exp: Option<NumericDate>,
    nbf: Option<NumericDate>,
    iat: Option<NumericDate>,
    jti: Option<String>,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<KubernetesClaim>,
}

/// RFC 7519 4.1.3: one text or a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct KubernetesClaim {
    namespace: String,
    serviceaccount: ObjectClaim,
    pod: Option<ObjectClaim>,
    node: Option<ObjectClaim>,
}

#[derive(Deserialize)]
struct ObjectClaim {
    name: String,
    uid: String,
}

impl From<ObjectClaim> for BoundObject {
    fn from(claim: ObjectClaim) -> Self {
        Self {
            name: claim.name,
            uid: claim.uid,
        }
    }
}

impl Claims {
    fn check(self, policy: &TokenPolicy, now: Timestamp) -> Result<TokenClaims, CallerError> {
        match self.iss {
            Some(issuer) if issuer == policy.issuer => {}
            other => return Err(CallerError::UnknownIssuer(other.unwrap_or_default())),
        }
        let sent = match self.aud {
            None => Vec::new(),
            Some(Audience::One(one)) => vec![one],
            Some(Audience::Many(many)) => many,
        };
        if !sent
            .iter()
            .any(|audience| policy.audiences.contains(audience))
        {
            let accepted = policy.audiences.clone();
            return Err(CallerError::AudienceMismatch { sent, accepted });
        }
        let Some(NumericDate(expires)) = self.exp else {
            return Err(invalid("it never expires"));
        };
        let leeway = SignedDuration::from_secs(LEEWAY.as_secs().cast_signed());
        if now.duration_since(expires) >= leeway {
            return Err(CallerError::TokenExpired {
                expired: expires,
                now,
            });
        }
        let from = [self.nbf, self.iat]
            .into_iter()
            .flatten()
            .map(|date| date.0)
            .max();
        if let Some(from) = from.filter(|from| from.duration_since(now) > leeway) {
            return Err(CallerError::TokenNotYetValid { from, now });
        }
        let subject = self.sub.unwrap_or_default();
        let Some((namespace, name)) = service_account(&subject) else {
            return Err(invalid("its subject is not a service account"));
        };
        let Some(claim) = self.kubernetes else {
            return Err(CallerError::NotBound);
        };
        if claim.namespace != namespace || claim.serviceaccount.name != name {
            return Err(CallerError::IdentityConflict(format!(
                "its subject is {subject:?}, but its kubernetes.io claim names the service account {:?} in {:?}",
                claim.serviceaccount.name, claim.namespace
            )));
        }
        if policy.require_bound_pod && claim.pod.is_none() {
            return Err(CallerError::NotBound);
        }
        Ok(TokenClaims {
            namespace: claim.namespace,
            service_account: claim.serviceaccount.into(),
            pod: claim.pod.map(BoundObject::from),
            node: claim.node.map(BoundObject::from),
            token_id: self.jti,
            expires,
        })
    }
}

/// Namespace and name of `system:serviceaccount:<namespace>:<name>`; nothing that has more parts or fewer.
pub(super) fn service_account(user: &str) -> Option<(&str, &str)> {
    let (namespace, name) = user
        .strip_prefix("system:serviceaccount:")?
        .split_once(':')?;
    (!namespace.is_empty() && !name.is_empty() && !name.contains(':')).then_some((namespace, name))
}

/// RFC 7519 2: seconds since 1970, possibly with a fraction, which is dropped.
struct NumericDate(Timestamp);

impl<'de> Deserialize<'de> for NumericDate {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = serde_json::Number::deserialize(deserializer)?;
        number
            .as_i64()
            .or_else(|| {
                number
                    .as_f64()
                    .filter(|seconds| seconds.abs() < 1e12)
                    .map(|s| s as i64)
            })
            .and_then(|seconds| Timestamp::from_second(seconds).ok())
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("a date is out of range"))
    }
}

fn parse_part<T: serde::de::DeserializeOwned>(part: &str, what: &str) -> Result<T, CallerError> {
    let bytes = URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_| CallerError::TokenInvalid(format!("its {what} is not base64url")))?;
    // serde's own text may quote the token; its line and column say enough
    serde_json::from_slice(&bytes).map_err(|e| {
        CallerError::TokenInvalid(format!(
            "its {what} is not what it should be, at byte {}",
            e.column()
        ))
    })
}

fn invalid(fault: &str) -> CallerError {
    CallerError::TokenInvalid(fault.to_owned())
}
