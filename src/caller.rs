//! Who is calling: service-account tokens checked offline against a key set, and the liveness of what they are bound to.
//!
//! token + [`KeySet`] + [`TokenPolicy`] -> [`verify`] -> [`TokenClaims`] + [`Liveness`] -> [`bind`] -> [`Caller`];
//! where that cannot be decided offline, the API server's answer -> [`review()`] -> [`Caller`];
//! a client certificate of ours -> [`Shown`] + [`Liveness`] -> [`alive`] -> [`Caller`]; for others: [`impersonate`]

mod impersonation;
mod keys;
mod liveness;
mod renewal;
mod review;
#[cfg(test)]
mod tests;
mod token;

use std::{future::Future, net::IpAddr};

use jiff::Timestamp;

pub use self::{
    impersonation::{NodeProxies, NotImpersonated, impersonate},
    keys::{KeySet, KeySetError},
    liveness::{DELETION_GRACE, Gone, Liveness, PodFact, bind},
    renewal::{RENEW_WITHOUT_TOKEN, Shown, alive},
    review::review,
    token::{LEEWAY, MAX_TOKEN, TokenClaims, TokenPolicy, verify},
};
use crate::identity::SpiffeId;

/// An authenticated caller. Its identity, never the CSR's, goes into the certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The identity.
    pub identity: SpiffeId,
    /// How it was authenticated.
    pub method: Method,
    /// The pod the token is bound to.
    pub pod: Option<BoundObject>,
    /// The node that pod runs on, as the token has it.
    pub node: Option<BoundObject>,
    /// `jti`, for the audit record.
    pub token_id: Option<String>,
    /// Whether the facts behind this were old because the API server could not be asked; for the audit record.
    pub stale: bool,
    /// When it last showed a token; `None` is just now.
    pub proved: Option<Timestamp>,
    /// The node's proxy that asks in its name; for the audit record.
    pub node_proxy: Option<SpiffeId>,
}

/// Name and UID of what a token is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundObject {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
}

/// How a caller was authenticated (metric label `method`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Offline, against the cached JWKS.
    Jwks,
    /// By the API server's TokenReview.
    TokenReview,
    /// By a client certificate of ours.
    Certificate,
}

impl Method {
    /// The metric label and the word of the audit record.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Jwks => "jwks",
            Self::TokenReview => "tokenreview",
            Self::Certificate => "certificate",
        }
    }
}

/// Decides who a bearer token belongs to. The cluster's implementation checks offline and falls back to TokenReview;
/// the standalone one knows the tokens of its own making. Both end in the same pure checks of this room.
pub trait Authenticate: Send + Sync + 'static {
    /// The caller, or why not.
    fn authenticate(
        &self,
        token: &str,
        now: Timestamp,
    ) -> impl Future<Output = Result<Caller, Denial>> + Send;

    /// The caller that a client certificate belongs to, where it may renew it so from `address`.
    fn renew(
        &self,
        shown: Shown,
        address: Option<IpAddr>,
        now: Timestamp,
    ) -> Result<Caller, CallerError>;

    /// Whether a caller is a node's proxy, which asks as often as all pods of its node.
    fn is_node_proxy(&self, _caller: &Caller) -> bool {
        false
    }

    /// Whom a caller may get a certificate for besides itself: nobody, unless somebody says so.
    fn impersonate(
        &self,
        _caller: &Caller,
        _target: &str,
        _now: Timestamp,
    ) -> Result<SpiffeId, NotImpersonated> {
        Err(NotImpersonated::NotAllowed)
    }
}

/// A refusal together with who refused, so that failing reviews and failing offline checks are counted apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// Who decided.
    pub method: Method,
    /// What it decided.
    pub error: CallerError,
}

impl Denial {
    /// What the API server's review came to.
    pub fn by_review(error: CallerError) -> Self {
        Self {
            method: Method::TokenReview,
            error,
        }
    }

    /// Why a client certificate is not renewed.
    pub fn of_certificate(error: CallerError) -> Self {
        Self {
            method: Method::Certificate,
            error,
        }
    }
}

/// The offline checks' refusals, so that `?` needs no words.
impl From<CallerError> for Denial {
    fn from(error: CallerError) -> Self {
        Self {
            method: Method::Jwks,
            error,
        }
    }
}

/// Why a caller is not authenticated. The text is for our own log; what a client may read is [`Self::client_text`].
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum CallerError {
    /// No token was sent.
    #[error(
        "no credential was sent; send a service-account token as \"Authorization: Bearer ...\""
    )]
    NoCredential,
    /// Not a token, not of an allowed algorithm, or not signed by the key it names.
    #[error("the token is not acceptable: {0}")]
    TokenInvalid(String),
    /// The key it names is not in the key set; whoever holds the set may fetch it anew, once.
    #[error("the token names the key {0:?}, which the issuer does not publish")]
    UnknownKey(String),
    /// Somebody else's token.
    #[error("the token was issued by {0:?}, which is not our issuer")]
    UnknownIssuer(String),
    /// A caller of another cluster.
    #[error("the caller says that it is of the cluster {0:?}, which is not ours")]
    UnknownCluster(String),
    /// Meant for somebody else.
    #[error("the token is for the audiences {sent:?}; this endpoint accepts {accepted:?}")]
    AudienceMismatch {
        /// What the token says.
        sent: Vec<String>,
        /// What would be accepted.
        accepted: Vec<String>,
    },
    /// Its time is over.
    #[error("the token expired at {expired}; the clock here says {now}")]
    TokenExpired {
        /// `exp`.
        expired: Timestamp,
        /// Our clock.
        now: Timestamp,
    },
    /// Its time has not come (`nbf` or `iat`).
    #[error("the token is valid from {from}; the clock here says {now}")]
    TokenNotYetValid {
        /// The later of `nbf` and `iat`.
        from: Timestamp,
        /// Our clock.
        now: Timestamp,
    },
    /// Bound to no pod.
    #[error(
        "the token is not bound to a pod; use a projected service-account token of a running pod"
    )]
    NotBound,
    /// Two places name two identities.
    #[error("the token contradicts itself or the cluster: {0}")]
    IdentityConflict(String),
    /// What it is bound to is no more.
    #[error("{0}")]
    CallerGone(Gone),
    /// A client certificate of the mesh's roots, but not a workload's of this mesh.
    #[error("the client certificate is not acceptable: {0}")]
    CertificateInvalid(String),
    /// Its serial number is on the list of those that are not renewed.
    #[error("the certificate {0} is denied; show a token")]
    Denied(String),
    /// Renewed without a token for too long, or never got by one.
    #[error(
        "a certificate is renewed for 7 days without a token; {}; the clock here says {now}; show a token",
        .proved.map_or("this one was never got by one".to_owned(), |proved| format!("this one's holder last showed one at {proved}"))
    )]
    RenewalNeedsToken {
        /// When it last showed one, to the hour.
        proved: Option<Timestamp>,
        /// Our clock.
        now: Timestamp,
    },
    /// It could not be checked at all.
    #[error("tokens cannot be checked now: {0}")]
    VerifierUnavailable(String),
}

/// What a refusal means to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// This token will not do: get another one.
    Unauthenticated,
    /// The token may be good: try again later. Never confused with the former, because Istio's agents give up on it.
    Unavailable,
}

impl CallerError {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoCredential => "NoCredential",
            Self::TokenInvalid(_) | Self::UnknownKey(_) => "TokenInvalid",
            Self::UnknownIssuer(_) | Self::UnknownCluster(_) => "UnknownIssuer",
            Self::AudienceMismatch { .. } => "AudienceMismatch",
            Self::TokenExpired { .. } => "TokenExpired",
            Self::TokenNotYetValid { .. } => "TokenNotYetValid",
            Self::NotBound => "NotBound",
            Self::IdentityConflict(_) => "IdentityConflict",
            Self::CallerGone(_) => "CallerGone",
            Self::CertificateInvalid(_) => "CertificateInvalid",
            Self::Denied(_) => "Denied",
            Self::RenewalNeedsToken { .. } => "RenewalNeedsToken",
            Self::VerifierUnavailable(_) => "VerifierUnavailable",
        }
    }

    /// Whether another token or another time would help.
    pub fn class(&self) -> Class {
        match self {
            Self::VerifierUnavailable(_) => Class::Unavailable,
            Self::NoCredential
            | Self::TokenInvalid(_)
            | Self::UnknownKey(_)
            | Self::UnknownIssuer(_)
            | Self::UnknownCluster(_)
            | Self::AudienceMismatch { .. }
            | Self::TokenExpired { .. }
            | Self::TokenNotYetValid { .. }
            | Self::NotBound
            | Self::IdentityConflict(_)
            | Self::CallerGone(_)
            | Self::CertificateInvalid(_)
            | Self::Denied(_)
            | Self::RenewalNeedsToken { .. } => Class::Unauthenticated,
        }
    }

    /// What the client may read: details only where a signature of the issuer was verified first, so that nobody who
    /// cannot sign learns which of their guesses was closest.
    pub fn client_text(&self) -> String {
        match self {
            Self::NoCredential
            | Self::TokenInvalid(_)
            | Self::UnknownKey(_)
            | Self::UnknownIssuer(_)
            | Self::UnknownCluster(_) => "caller could not be authenticated".to_owned(),
            Self::VerifierUnavailable(_) => "tokens cannot be checked now; try again".to_owned(),
            Self::AudienceMismatch { .. }
            | Self::TokenExpired { .. }
            | Self::TokenNotYetValid { .. }
            | Self::NotBound
            | Self::IdentityConflict(_)
            | Self::CallerGone(_)
            | Self::CertificateInvalid(_)
            | Self::Denied(_)
            | Self::RenewalNeedsToken { .. } => self.to_string(),
        }
    }
}
