//! Why no certificate was handed out.

use std::time::Duration;

use super::gate::Fault;
use crate::{
    ca::{AuthorityError, csr::CsrError},
    caller::{CallerError, NotImpersonated},
};

/// Every reason there is. The text is for our own log; what the client may read is [`Self::client_text`].
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Who is calling is not known.
    #[error(transparent)]
    Caller(#[from] CallerError),
    /// Somebody asks for somebody else, and may not.
    #[error(transparent)]
    Impersonation(#[from] NotImpersonated),
    /// What is asked is not a CSR that is signed here.
    #[error(transparent)]
    Csr(CsrError),
    /// A lifetime outside of the bounds.
    #[error("a certificate may live from {} to {} seconds", min.as_secs(), max.as_secs())]
    TtlOutOfRange {
        /// The shortest.
        min: Duration,
        /// The longest.
        max: Duration,
    },
    /// Not a request of this endpoint.
    #[error("{0}")]
    BadRequest(String),
    /// A body of another kind.
    #[error(
        "send the CSR as application/json ({{\"csr\": PEM, \"ttl_seconds\": 3600}}) or as application/pkcs10 (PEM or DER)"
    )]
    UnsupportedMediaType,
    /// A body over the limit.
    #[error("the request's body is longer than {0} bytes")]
    BodyTooLarge(usize),
    /// One caller asks too often.
    #[error("this {subject} asks for certificates too often; try again in {} s", seconds(*wait))]
    RateLimited {
        /// `pod`, `service account` or `node's proxy`.
        subject: &'static str,
        /// When it may ask again.
        wait: Duration,
    },
    /// All of them together ask too often.
    #[error("too many requests are under way; try again")]
    QueueFull,
    /// This process signs nothing now.
    #[error(transparent)]
    Closed(#[from] Fault),
    /// The authority cannot sign.
    #[error(transparent)]
    Authority(AuthorityError),
    /// The system has no randomness for a serial number.
    #[error("the system's random generator failed")]
    NoRandomness,
}

/// What became of a request (metric label `result`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A certificate was handed out.
    Issued,
    /// What was asked is wrong.
    Invalid,
    /// Who asked is wrong.
    Denied,
    /// Too much was asked.
    Throttled,
    /// We cannot sign now.
    Error,
}

impl Outcome {
    /// The metric label and the word of the audit record.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Issued => "issued",
            Self::Invalid => "invalid",
            Self::Denied => "denied",
            Self::Throttled => "throttled",
            Self::Error => "error",
        }
    }
}

impl Refusal {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Caller(error) => error.code(),
            Self::Impersonation(_) => "ImpersonationRefused",
            Self::Csr(error) => error.code(),
            Self::TtlOutOfRange { .. } => "TtlOutOfRange",
            Self::BadRequest(_) => "BadRequest",
            Self::UnsupportedMediaType => "UnsupportedMediaType",
            Self::BodyTooLarge(_) => "CsrTooLarge",
            Self::RateLimited { .. } => "RateLimited",
            Self::QueueFull => "QueueFull",
            Self::Closed(fault) => fault.code(),
            Self::Authority(error) => error.code(),
            Self::NoRandomness => "SignFailed",
        }
    }

    /// What became of the request.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Caller(CallerError::VerifierUnavailable(_)) => Outcome::Error,
            Self::Caller(_) | Self::Impersonation(_) => Outcome::Denied,
            Self::Csr(_)
            | Self::TtlOutOfRange { .. }
            | Self::BadRequest(_)
            | Self::UnsupportedMediaType
            | Self::BodyTooLarge(_) => Outcome::Invalid,
            Self::RateLimited { .. } | Self::QueueFull => Outcome::Throttled,
            Self::Closed(_) | Self::Authority(_) | Self::NoRandomness => Outcome::Error,
        }
    }

    /// When it is worth asking again; `None` where the same request will be refused again.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { wait, .. } => Some(Duration::from_secs(seconds(*wait))),
            // the queue turns over within a second; another replica answers at once
            Self::QueueFull | Self::Closed(Fault::Draining) => Some(Duration::from_secs(1)),
            Self::Caller(CallerError::VerifierUnavailable(_)) => Some(Duration::from_secs(5)),
            // waits for somebody: a clock, an API server, the leader's next rotation tick
            Self::Closed(Fault::ClockJump(_) | Fault::JournalStale(_))
            | Self::Authority(
                AuthorityError::IssuerExpiring(_)
                | AuthorityError::ClockJump { .. }
                | AuthorityError::JournalStale(_),
            ) => Some(Duration::from_secs(30)),
            Self::Caller(_)
            | Self::Impersonation(_)
            | Self::Csr(_)
            | Self::TtlOutOfRange { .. }
            | Self::BadRequest(_)
            | Self::UnsupportedMediaType
            | Self::BodyTooLarge(_)
            | Self::Authority(AuthorityError::SignFailed(_))
            | Self::NoRandomness => None,
        }
    }

    /// What the client may read.
    pub fn client_text(&self) -> String {
        match self {
            Self::Caller(error) => error.client_text(),
            Self::Authority(AuthorityError::SignFailed(_)) | Self::NoRandomness => {
                "the certificate could not be signed; the reason is in the control plane's log"
                    .to_owned()
            }
            Self::Impersonation(_)
            | Self::Csr(_)
            | Self::TtlOutOfRange { .. }
            | Self::BadRequest(_)
            | Self::UnsupportedMediaType
            | Self::BodyTooLarge(_)
            | Self::RateLimited { .. }
            | Self::QueueFull
            | Self::Closed(_)
            | Self::Authority(_) => self.to_string(),
        }
    }
}

/// Whole seconds, rounded up: a client that waits them finds the door open.
fn seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}
