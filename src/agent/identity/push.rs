//! The trust bundle as the control plane pushes it: a delta-ADS subscription to `ROOTCA` over mutual TLS.
//!
//! A push becomes the trust set at once, goes to Envoy, and is acknowledged when Envoy has acknowledged it: the control
//! plane takes an old root out only when everybody is known to hold the new one. That the control plane cannot be
//! reached is normal, and changes nothing.

use std::time::Duration;

use envoy_types::pb::{
    envoy::{
        config::core::v3::{Node, data_source::Specifier},
        extensions::transport_sockets::tls::v3::{Secret, secret},
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
    },
    google::{
        protobuf::{Struct, Value, value::Kind},
        rpc::Status as Detail,
    },
};
use prost::Message;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::{
    Identity, Settings, Store,
    dial::{DialError, dial},
    dice,
    sds::{Holding, SECRET_TYPE, SecretName, Version},
    trust::{RootsError, Voice, read_roots},
};
use crate::{ca::bundle::Bundle, tls};

/// Subscribes, and again whenever the stream ends, until `stop`.
pub(super) async fn subscribe(
    settings: &Settings,
    store: &Store,
    holding: watch::Receiver<Holding>,
    stop: &CancellationToken,
) {
    let mut identities = store.watch();
    let mut last: Option<Pushed> = None;
    let mut failures = 0;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            there = identities.wait_for(Option::is_some) => if there.is_err() {
                return;
            },
        }
        let began = Instant::now();
        let ended = tokio::select! {
            () = stop.cancelled() => None,
            ended = converse(settings, store, holding.clone(), &mut last) => Some(ended),
        };
        store.attend(false);
        let Some(error) = ended else { return };
        // A stream that has lasted is ended by the control plane's own end, or by the bound on a connection's age.
        failures = match began.elapsed() > LASTING {
            true => 0,
            false => failures + 1,
        };
        let pause = pause(failures, dice::roll());
        tracing::info!(
            error = &error as &dyn std::error::Error,
            again_in_seconds = pause.as_secs_f32(),
            "no trust bundle is pushed to this pod now; the one it has stays, and the mounted one is read"
        );
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(pause) => {}
        }
    }
}

const LASTING: Duration = Duration::from_secs(30);

/// Anywhere below two seconds after a first loss, so that a thousand proxies do not come back in one moment; below a
/// minute in the end.
fn pause(failures: u32, dice: f64) -> Duration {
    let longest = FIRST_PAUSE * 2u32.pow(failures.saturating_sub(1).min(5));
    longest.min(LONGEST_PAUSE).mul_f64(dice.clamp(0.0, 1.0))
}

const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What was pushed last, and the control plane's name for it.
struct Pushed {
    version: String,
    bundle: Bundle,
}

/// An answer that was not spoken about yet.
struct Open {
    nonce: String,
    version: Version,
}

/// One stream, from its beginning to its end.
async fn converse(
    settings: &Settings,
    store: &Store,
    mut holding: watch::Receiver<Holding>,
    last: &mut Option<Pushed>,
) -> PushError {
    // The channel must outlive this function's awaits, and the sender ends the stream when it goes.
    let (say, requests) = mpsc::channel(4);
    let first = first_request(settings, store, last.as_ref());
    let resumes = !first.initial_resource_versions.is_empty();
    if say.try_send(first).is_err() {
        return PushError::Ended;
    }
    let Ok(opened) = timeout(DEADLINE, open(settings, store, requests)).await else {
        return PushError::Deadline;
    };
    let mut answers = match opened {
        Ok(answers) => answers,
        Err(error) => return error,
    };
    // Where the version that this pod named is the present one, nothing comes: then what it has is right.
    store.attend(resumes);
    let mut open: Option<Open> = None;
    loop {
        let verdict = open.as_ref().and_then(|open| {
            let holding = holding.borrow_and_update();
            verdict(open, &holding)
        });
        if let Some(request) = verdict {
            open = None;
            if say.send(request).await.is_err() {
                return PushError::Ended;
            }
        }
        tokio::select! {
            answer = answers.message() => match answer {
                Ok(Some(answer)) => match take(store, &answer, last) {
                    Ok(version) => open = version.map(|version| Open { nonce: answer.nonce, version }),
                    Err(fault) => {
                        tracing::error!(error = &fault as &dyn std::error::Error, "a pushed trust bundle is refused; the one in use stays");
                        if say.send(refusal(answer.nonce, fault.to_string())).await.is_err() {
                            return PushError::Ended;
                        }
                    }
                },
                Ok(None) => return PushError::Ended,
                Err(status) => return PushError::Refused(status),
            },
            changed = holding.changed() => if changed.is_err() {
                return PushError::Ended;
            },
        }
    }
}

const DEADLINE: Duration = Duration::from_secs(10);

async fn open(
    settings: &Settings,
    store: &Store,
    requests: mpsc::Receiver<DeltaDiscoveryRequest>,
) -> Result<tonic::Streaming<DeltaDiscoveryResponse>, PushError> {
    let (bundle, identity) = (store.bundle(), store.identity());
    let keyed = identity
        .as_deref()
        .map(|identity: &Identity| &*identity.keyed);
    let config = tls::http2_client_config(&bundle, keyed).map_err(DialError::Tls)?;
    let channel = dial(&settings.control_plane, config).await?;
    let answers = AggregatedDiscoveryServiceClient::new(channel)
        .max_decoding_message_size(LARGEST_PUSH)
        .delta_aggregated_resources(ReceiverStream::new(requests))
        .await?;
    Ok(answers.into_inner())
}

/// Hundreds of roots.
const LARGEST_PUSH: usize = 1024 * 1024;

/// Who asks, for what, and what is there already: so that a control plane that started again sends nothing.
fn first_request(
    settings: &Settings,
    store: &Store,
    last: Option<&Pushed>,
) -> DeltaDiscoveryRequest {
    let held = last.filter(|last| last.bundle == store.bundle());
    let agent = Value {
        kind: Some(Kind::StringValue(env!("CARGO_PKG_VERSION").to_owned())),
    };
    DeltaDiscoveryRequest {
        node: Some(Node {
            id: settings.pod.clone(),
            metadata: Some(Struct {
                fields: [("malha.io/agent".to_owned(), agent)].into(),
            }),
            ..Node::default()
        }),
        resource_names_subscribe: vec![SecretName::RootCa.to_string()],
        initial_resource_versions: held
            .map(|held| (SecretName::RootCa.to_string(), held.version.clone()))
            .into_iter()
            .collect(),
        ..blank()
    }
}

/// Hears a push: the version that Envoy must acknowledge, where there is one.
fn take(
    store: &Store,
    answer: &DeltaDiscoveryResponse,
    last: &mut Option<Pushed>,
) -> Result<Option<Version>, PushError> {
    let named = answer
        .resources
        .iter()
        .find(|resource| resource.name == SecretName::RootCa.as_str());
    let Some(resource) = named else {
        // A bundle that is taken back leaves the pod with the one it has: no trust at all is never right.
        return Err(PushError::Empty);
    };
    let roots = roots(resource.resource.as_ref().map_or(&[], |any| &any.value));
    let bundle = roots.inspect_err(|_| store.refuse(Voice::Push))?;
    *last = Some(Pushed {
        version: resource.version.clone(),
        bundle: bundle.clone(),
    });
    store.attend(true);
    Ok(store.hear(Voice::Push, bundle))
}

fn roots(secret: &[u8]) -> Result<Bundle, PushError> {
    let secret = Secret::decode(secret).map_err(|_| PushError::Message)?;
    let Some(secret::Type::ValidationContext(context)) = secret.r#type else {
        return Err(PushError::Message);
    };
    match context.trusted_ca.and_then(|source| source.specifier) {
        Some(Specifier::InlineBytes(pem)) => Ok(read_roots(&pem)?),
        Some(Specifier::InlineString(pem)) => Ok(read_roots(pem.as_bytes())?),
        _ => Err(PushError::Message),
    }
}

/// What to say to the control plane once Envoy has spoken.
fn verdict(open: &Open, holding: &Holding) -> Option<DeltaDiscoveryRequest> {
    if holding.version(SecretName::RootCa) == Some(open.version) {
        return Some(DeltaDiscoveryRequest {
            response_nonce: open.nonce.clone(),
            ..blank()
        });
    }
    let why = holding.refusal(SecretName::RootCa, open.version)?;
    Some(refusal(
        open.nonce.clone(),
        format!("Envoy refused it: {why}"),
    ))
}

fn refusal(nonce: String, message: String) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        response_nonce: nonce,
        error_detail: Some(Detail {
            code: Code::InvalidArgument as i32,
            message,
            details: Vec::new(),
        }),
        ..blank()
    }
}

fn blank() -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: SECRET_TYPE.to_owned(),
        ..DeltaDiscoveryRequest::default()
    }
}

/// Why nothing is pushed.
#[derive(Debug, thiserror::Error)]
enum PushError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the control plane refused the subscription ({:?}): {}", .0.code(), .0.message())]
    Refused(#[from] Status),
    #[error("the control plane ended the subscription")]
    Ended,
    #[error("the control plane did not open the subscription in time")]
    Deadline,
    #[error("a push holds no ROOTCA")]
    Empty,
    #[error("a pushed ROOTCA is no validation context with inline roots")]
    Message,
    #[error(transparent)]
    Roots(#[from] RootsError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_begin_anywhere_below_two_seconds_and_end_below_a_minute() {
        let longest = |failures| pause(failures, 1.0).as_secs();
        assert_eq!([0, 1, 2, 3, 6, 60].map(longest), [2, 2, 4, 8, 60, 60]);
        assert_eq!(pause(60, 0.0), Duration::ZERO);
        assert_eq!(pause(1, 0.5), Duration::from_secs(1));
    }
}
