//! Who is calling: service-account tokens checked offline against a key set, and the liveness of what they are bound to.

use std::future::Future;

use jiff::Timestamp;

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
    /// The node of the claim.
    pub node: Option<String>,
    /// `jti`, for the audit record.
    pub token_id: Option<String>,
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
}

/// Decides who a bearer token belongs to. The cluster's implementation checks offline and falls back to TokenReview;
/// the standalone one knows the tokens of its own making. Both end in the same pure checks of this room.
pub trait Authenticate: Send + Sync + 'static {
    /// The caller, or why not.
    fn authenticate(
        &self,
        token: &str,
        now: Timestamp,
    ) -> impl Future<Output = Result<Caller, CallerError>> + Send;
}

/// Why a caller is not authenticated; one variant per code of the table.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CallerError {
    /// No token was sent.
    #[error("caller could not be authenticated")]
    NoCredential,
}
