//! One try to get a certificate: `istio.v1.auth.IstioCertificateService/CreateCertificate` with the pod's token, or with
//! the certificate that the token bought while there is no better one.
//!
//! token file or certificate -> new key, CSR -> control plane -> chain -> [`accept`](super::answer::accept)

use std::{fs, io, path::Path, path::PathBuf, time::Duration};

use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
};
use zeroize::Zeroizing;

use super::{
    Settings,
    answer::{self, Accepted, AnswerError},
    dial::{DialError, dial},
    dice,
    trust::{RootsError, Trust},
};
use crate::{
    ca::{KeyedChain, key::KeyError},
    clock::Clock,
    proto::istio_ca::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
    tls,
};

/// Asks once, by the token; where that is of no use, by the certificate that is `held`.
///
/// # Errors
/// How far it came. Where both were refused, what is wrong with the token, for that is what somebody can mend.
pub(super) async fn certificate(
    settings: &Settings,
    trust: &Trust,
    held: Option<&KeyedChain>,
    clock: &Clock,
) -> Result<Accepted, RequestError> {
    match tokio::time::timeout(DEADLINE, renew(settings, trust, held, clock)).await {
        Ok(answered) => answered,
        Err(_) => Err(RequestError::Deadline),
    }
}

/// The server answers in milliseconds; in the burst after a node's reboot its queue may be long.
const DEADLINE: Duration = Duration::from_secs(10);

/// Without an API server the kubelet gets no new token, and the old one ends within the hour.
async fn renew(
    settings: &Settings,
    trust: &Trust,
    held: Option<&KeyedChain>,
    clock: &Clock,
) -> Result<Accepted, RequestError> {
    let by_token = match token(&settings.token) {
        Ok(token) => ask(settings, trust, Proof::Token(token), clock).await,
        Err(error) => Err(error),
    };
    let live = held.filter(|held| held.validity.not_after > clock.now());
    match (by_token, live) {
        (Err(fault), Some(held)) if fault.is_the_tokens() => {
            let renewed = ask(settings, trust, Proof::Certificate(held), clock).await;
            if renewed.is_ok() {
                tracing::warn!(
                    error = &fault as &dyn std::error::Error,
                    "the certificate was renewed with itself, which lasts for some days only"
                );
            }
            renewed.map_err(|_| fault)
        }
        (by_token, _) => by_token,
    }
}

/// Who the pod is.
enum Proof<'a> {
    Token(MetadataValue<Ascii>),
    Certificate(&'a KeyedChain),
}

/// With a key that nobody has seen yet.
async fn ask(
    settings: &Settings,
    trust: &Trust,
    proof: Proof<'_>,
    clock: &Clock,
) -> Result<Accepted, RequestError> {
    let key = dice::key().ok_or(RequestError::Dice)?;
    let message = IstioCertificateRequest {
        csr: key.request()?,
        validity_duration: settings
            .life
            .map_or(0, |life| i64::try_from(life.as_secs()).unwrap_or(i64::MAX)),
        metadata: None,
    };
    let mut request = Request::new(message);
    let shown = match proof {
        Proof::Token(token) => {
            request.metadata_mut().insert("authorization", token);
            None
        }
        Proof::Certificate(held) => Some(held),
    };
    if let Ok(cluster) = settings.cluster.parse::<MetadataValue<Ascii>>() {
        request.metadata_mut().insert("clusterid", cluster);
    }
    let config = tls::http2_client_config(trust.bundle(), shown).map_err(DialError::Tls)?;
    let channel = dial(&settings.control_plane, config).await?;
    let answer = IstioCertificateServiceClient::new(channel)
        .max_decoding_message_size(LARGEST_ANSWER)
        .create_certificate(request)
        .await?
        .into_inner();
    Ok(answer::accept(
        &answer.cert_chain,
        &key,
        &settings.id,
        trust,
        clock.now(),
    )?)
}

/// A chain has 2 KiB; a bundle of many roots may have some more.
const LARGEST_ANSWER: usize = 256 * 1024;

/// The token as it is now: the kubelet replaces it long before it ends.
fn token(path: &Path) -> Result<MetadataValue<Ascii>, RequestError> {
    let text = fs::read_to_string(path).map(Zeroizing::new);
    let text = text.map_err(|source| RequestError::Token {
        path: path.to_owned(),
        source,
    })?;
    let unusable = || RequestError::EmptyToken(path.to_owned());
    if text.trim().is_empty() {
        return Err(unusable());
    }
    let bearer = Zeroizing::new(format!("Bearer {}", text.trim()));
    let mut value = MetadataValue::try_from(bearer.as_str()).map_err(|_| unusable())?;
    value.set_sensitive(true);
    Ok(value)
}

/// Why a try gave nothing. The next comes by itself; what is held stays.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The file cannot be read.
    #[error("cannot read the pod's token {path}; is the volume malha-token mounted there?")]
    Token {
        /// Where it should be.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Nothing in it.
    #[error("{0} holds no token; the kubelet writes one when the pod starts")]
    EmptyToken(PathBuf),
    /// The mounted roots cannot be read, and nobody else has told any.
    #[error("cannot read the trust bundle {path}; is ConfigMap malha-ca-root-cert mounted there?")]
    Roots {
        /// Where it should be.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The mounted roots are none.
    #[error("{path} cannot be used; the control plane keeps its ConfigMap right, so look there")]
    BadRoots {
        /// Where they are.
        path: PathBuf,
        /// What is wrong.
        source: RootsError,
    },
    /// The system's dice.
    #[error("no private key can be made on this system")]
    Dice,
    /// The crypto library's fault.
    #[error("no CSR can be made")]
    Csr(#[from] KeyError),
    /// The control plane was not reached.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The control plane said no.
    #[error("{}", refusal(.0))]
    Refused(#[from] Status),
    /// What it sent is no use.
    #[error("the control plane's answer cannot be used: {0}")]
    Answer(#[from] AnswerError),
    /// No answer in time.
    #[error(
        "no certificate from the control plane within {} s; it may be overloaded, or the way to it is slow",
        DEADLINE.as_secs()
    )]
    Deadline,
}

impl RequestError {
    /// Whether it is likely to pass by itself. Both kinds are tried again; this one is no alarm.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Dial(DialError::Unreachable { .. } | DialError::Transport(_))
            | Self::Deadline => true,
            Self::Refused(status) => is_passing(status.code()),
            Self::Token { .. }
            | Self::EmptyToken(_)
            | Self::Roots { .. }
            | Self::BadRoots { .. }
            | Self::Dice
            | Self::Csr(_)
            | Self::Dial(_)
            | Self::Answer(_) => false,
        }
    }

    /// Whether there was no token, or none that the control plane takes.
    fn is_the_tokens(&self) -> bool {
        match self {
            Self::Token { .. } | Self::EmptyToken(_) => true,
            Self::Refused(status) => status.code() == Code::Unauthenticated,
            Self::Roots { .. }
            | Self::BadRoots { .. }
            | Self::Dice
            | Self::Csr(_)
            | Self::Dial(_)
            | Self::Answer(_)
            | Self::Deadline => false,
        }
    }

    /// How long the control plane asks to be left alone (gRPC A6, server push-back).
    pub fn push_back(&self) -> Option<Duration> {
        let Self::Refused(status) = self else {
            return None;
        };
        let asked = status.metadata().get("grpc-retry-pushback-ms")?;
        asked.to_str().ok()?.parse().ok().map(Duration::from_millis)
    }

    /// The label of the metric: a closed set.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Token { .. } | Self::EmptyToken(_) => "token",
            Self::Roots { .. } | Self::BadRoots { .. } => "roots",
            Self::Dice | Self::Csr(_) => "key",
            Self::Dial(DialError::Handshake { .. } | DialError::Tls(_)) => "tls",
            Self::Dial(_) => "unreachable",
            Self::Refused(_) => "refused",
            Self::Answer(_) => "answer",
            Self::Deadline => "deadline",
        }
    }
}

fn is_passing(code: Code) -> bool {
    match code {
        Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable => true,
        Code::Ok
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::DataLoss
        | Code::Unauthenticated => false,
    }
}

fn refusal(status: &Status) -> String {
    let advice = match status.code() {
        Code::Unauthenticated | Code::PermissionDenied => {
            "; the control plane's audit log has the reason, by this pod's address"
        }
        Code::Unimplemented => "; is another program listening there?",
        _ => "",
    };
    format!(
        "the control plane refused a certificate ({:?}): {}{advice}",
        status.code(),
        status.message()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_is_now_and_never_printed() {
        let place = tempfile::tempdir().expect("a directory");
        let path = place.path().join("token");
        let missing = token(&path).expect_err("no file");
        assert!(missing.to_string().contains("malha-token"), "{missing}");
        for text in ["", " \n", "a\nb"] {
            fs::write(&path, text).expect("writable");
            assert!(matches!(token(&path), Err(RequestError::EmptyToken(_))));
        }
        fs::write(&path, "eyJ.first\n").expect("writable");
        let value = token(&path).expect("a token");
        assert_eq!(value.to_str().ok(), Some("Bearer eyJ.first"));
        assert!(!format!("{value:?}").contains("first"), "{value:?}");
        fs::write(&path, "eyJ.second").expect("writable");
        let value = token(&path).expect("a token");
        assert_eq!(value.to_str().ok(), Some("Bearer eyJ.second"));
    }

    #[test]
    fn what_may_pass_is_told_from_what_somebody_must_set_right() {
        let refused = |code| RequestError::Refused(Status::new(code, "no"));
        assert!(refused(Code::Unavailable).is_passing());
        assert!(!refused(Code::Unauthenticated).is_passing());
        assert!(RequestError::Deadline.is_passing());
        let text = refused(Code::Unauthenticated).to_string();
        assert!(text.contains("audit log"), "{text}");
    }

    #[test]
    fn the_servers_wish_to_be_left_alone_is_heard() {
        let mut status = Status::new(Code::ResourceExhausted, "busy");
        assert_eq!(RequestError::Refused(status.clone()).push_back(), None);
        let value = "2500".parse().expect("ASCII");
        status
            .metadata_mut()
            .insert("grpc-retry-pushback-ms", value);
        assert_eq!(
            RequestError::Refused(status).push_back(),
            Some(Duration::from_millis(2500))
        );
    }
}
