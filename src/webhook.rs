//! AdmissionReview over HTTP: decodes and bounds, asks [`inject`](crate::inject), answers.
//!
//! `POST /inject/...` -> bounded body -> review -> `Injector::inject` -> answer, one count, one log line
//!
//! A fault of ours or of the caller's is a status of HTTP, and then the `failurePolicy` of the webhook configuration
//! decides. `allowed: false` is kept for a pod whose author must change something.

mod answer;
mod body;
mod line;
mod metrics;
mod refusal;
mod review;

use std::num::NonZeroUsize;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Method, Response};
use axum::routing::post;
use futures::FutureExt;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use crate::inject::advice::{advise as advise_on, pod_security};
use crate::inject::{Call, ClusterFacts, Entry, Injector, PodError, Reason, SkipReason, Warning};
use crate::inject::{Verdict, WarningCode};

use body::Intake;
use line::{Line, Subject};
use refusal::Refusal;
use review::Review;

pub use metrics::Metrics;

/// What the webhook works with. It holds no client of the cluster and needs none: nothing is read on the way.
#[derive(Clone)]
pub struct Webhook {
    /// What decides; exchanged when the operator's settings change.
    pub injector: Arc<ArcSwap<Injector>>,
    /// What was learned of the cluster beforehand.
    pub cluster: Arc<dyn ClusterFacts>,
    /// What is counted.
    pub metrics: Metrics,
    /// What a request may take.
    pub limits: Limits,
}

/// What a request may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// One request's body, in bytes.
    pub body_bytes: usize,
    /// All bodies that are being read or answered, in bytes.
    pub in_flight_bytes: usize,
    /// From a request's head to the end of its body.
    pub body: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 6 << 20,
            in_flight_bytes: 64 << 20,
            body: Duration::from_secs(15),
        }
    }
}

/// The webhook's routes: `/inject/ns`, `/inject/pod`, `/inject/rev/<revision>/ns`, `/inject/rev/<revision>/pod` and
/// `/advise`, all of them `POST`.
pub fn router(webhook: Webhook) -> Router {
    let inject = || post(inject).fallback(wrong_method);
    Router::new()
        .route("/inject/ns", inject())
        .route("/inject/pod", inject())
        .route("/inject/rev/{revision}/ns", inject())
        .route("/inject/rev/{revision}/pod", inject())
        .route("/advise", post(advise).fallback(wrong_method))
        .fallback(wrong_path)
        .with_state(Arc::new(Desk {
            intake: Intake::new(&webhook.limits),
            large: Semaphore::new(available_parallelism().map_or(1, NonZeroUsize::get)),
            webhook,
        }))
}

/// What all requests share.
struct Desk {
    webhook: Webhook,
    intake: Intake,
    /// Turns for what takes milliseconds: one a core. It runs on threads of its own, and with hundreds of them those that
    /// read and answer would hardly run.
    large: Semaphore,
}

async fn inject(State(desk): State<Arc<Desk>>, request: Request) -> Response<Body> {
    let arrived = Instant::now();
    let _in_flight = desk.webhook.metrics.enter();
    let outcome = AssertUnwindSafe(desk.admit(request))
        .catch_unwind()
        .await
        .unwrap_or_else(|_| Outcome::refused(Refusal::panicked()));
    desk.close(&outcome, arrived.elapsed());
    respond(outcome)
}

async fn advise(State(desk): State<Arc<Desk>>, request: Request) -> Response<Body> {
    let advice = AssertUnwindSafe(desk.advise(request))
        .catch_unwind()
        .await
        .unwrap_or_else(|_| Err(Refusal::panicked()));
    match advice {
        Ok(answer) => json(answer),
        Err(refusal) => refusal.into(),
    }
}

async fn wrong_method(State(desk): State<Arc<Desk>>) -> Response<Body> {
    desk.turn_away(Refusal::wrong_method())
}

async fn wrong_path(State(desk): State<Arc<Desk>>, request: Request) -> Response<Body> {
    let refusal = Refusal::wrong_path();
    // Who asks for something else than an admission, such as a scanner or our own probe, is not counted as one.
    if request.method() == Method::POST {
        desk.turn_away(refusal)
    } else {
        refusal.into()
    }
}

/// What became of a request, and for whom.
struct Outcome {
    reason: Reason,
    subject: Subject,
    /// What was said to a pod's author, or to a caller that was refused.
    message: Option<String>,
    answer: Result<Vec<u8>, Refusal>,
}

impl Outcome {
    fn refused(refusal: Refusal) -> Self {
        Self {
            reason: refusal.reason(),
            subject: Subject::default(),
            message: Some(refusal.message().to_owned()),
            answer: Err(refusal),
        }
    }
}

impl Desk {
    async fn admit(self: &Arc<Self>, request: Request) -> Outcome {
        let entry = {
            let injector = self.webhook.injector.load();
            Entry::from_path(request.uri().path(), &injector.settings().revision)
        };
        let Some(entry) = entry else {
            return Outcome::refused(Refusal::wrong_path());
        };
        let body = match self.intake.receive(request).await {
            Ok(body) => body,
            Err(refusal) => return Outcome::refused(refusal),
        };
        self.webhook.metrics.received(body.bytes().len());
        if body.bytes().len() <= INLINE {
            return self.decide(entry, body.bytes());
        }
        let desk = Arc::clone(self);
        self.aside(move || desk.decide(entry, body.bytes()))
            .await
            .unwrap_or_else(|()| Outcome::refused(Refusal::panicked()))
    }

    /// Runs what takes milliseconds where nobody else waits for the thread. `Err` where it panicked.
    async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ()> {
        let _turn = self
            .large
            .acquire()
            .await
            .expect("a semaphore that we own is never closed");
        spawn_blocking(work).await.map_err(|_| ())
    }

    fn decide(&self, entry: Entry, body: &[u8]) -> Outcome {
        let review = match Review::parse(body) {
            Ok(review) => review,
            Err(refusal) => return Outcome::refused(refusal),
        };
        self.judge(entry, &review).unwrap_or_else(|error| {
            let mut outcome = Outcome::refused(Refusal::bad_request(&error));
            outcome.subject = Subject::of(&review);
            outcome
        })
    }

    fn judge(&self, entry: Entry, review: &Review<'_>) -> Result<Outcome, PodError> {
        let subject = Subject::of(review);
        if !review.creates_a_pod() {
            return Ok(skip(review, subject, SkipReason::NotAPodCreate));
        }
        let Some(pod) = review.object else {
            return Ok(skip(review, subject, SkipReason::InvalidPod));
        };
        let call = Call {
            entry,
            namespace: &review.namespace,
            oldest_kubelet: self.webhook.cluster.oldest_kubelet(),
        };
        let injector = self.webhook.injector.load();
        let mut decision = injector.inject(pod.as_bytes(), &call)?;
        if let Verdict::Patch(patch) = &decision.verdict {
            let bytes = pod.len() + patch.json.len();
            decision.warnings.extend(
                self.warn_of_pod_security(&injector, &review.namespace)
                    .into_iter()
                    .chain((bytes > LARGE_POD).then(|| large_pod(bytes))),
            );
        }
        Ok(Outcome {
            reason: decision.verdict.reason(),
            subject,
            answer: Ok(answer::admission(&review.uid, &decision)),
            message: match decision.verdict {
                Verdict::Deny(denial) => Some(denial.message),
                Verdict::Patch(_) | Verdict::Skip(_) => None,
            },
        })
    }

    /// The namespace's level is known from elsewhere and may be stale, so it is for words only: the API server's own
    /// refusal is exact.
    fn warn_of_pod_security(&self, injector: &Injector, namespace: &str) -> Option<Warning> {
        let facts = self.webhook.cluster.namespace(namespace)?;
        pod_security(injector, &facts)
    }

    /// Warnings for the author of a workload. Whatever goes wrong, the workload goes in.
    async fn advise(self: &Arc<Self>, request: Request) -> Result<Vec<u8>, Refusal> {
        let body = self.intake.receive(request).await?;
        let desk = Arc::clone(self);
        let weigh = move || {
            let review = Review::parse(body.bytes())?;
            Ok(answer::advice(&review.uid, &desk.words(&review)))
        };
        self.aside(weigh)
            .await
            .unwrap_or_else(|()| Err(Refusal::panicked()))
    }

    /// What its author should know. Nothing where the namespace is not known: a guess would be worse.
    fn words(&self, review: &Review<'_>) -> Vec<String> {
        let Webhook {
            injector, cluster, ..
        } = &self.webhook;
        let advised =
            cluster
                .namespace(&review.namespace)
                .zip(review.object)
                .map(|(namespace, workload)| {
                    let kubelet = cluster.oldest_kubelet();
                    advise_on(&injector.load(), workload.as_bytes(), &namespace, kubelet)
                });
        match advised {
            None => Vec::new(),
            Some(Ok(advice)) => advice.warnings,
            Some(Err(error)) => {
                tracing::debug!(%error, "a workload could not be read, so nothing is advised");
                Vec::new()
            }
        }
    }

    /// Refuses what never became a review.
    fn turn_away(&self, refusal: Refusal) -> Response<Body> {
        let outcome = Outcome::refused(refusal);
        self.close(&outcome, Duration::ZERO);
        respond(outcome)
    }

    /// Counts a request and writes its line: once, and the same word in both.
    fn close(&self, outcome: &Outcome, took: Duration) {
        let Subject { dry_run, .. } = outcome.subject;
        self.webhook.metrics.decided(outcome.reason, dry_run, took);
        Line {
            reason: outcome.reason,
            subject: &outcome.subject,
            message: outcome.message.as_deref(),
            took,
        }
        .write();
    }
}

/// Up to this size a review is decided where it was read. A larger one takes milliseconds, in which others on the same
/// thread would wait.
const INLINE: usize = 256 << 10;

/// etcd refuses objects over about 1.5 MiB; the words come early enough to do something about it.
const LARGE_POD: usize = 1 << 20;

fn large_pod(bytes: usize) -> Warning {
    Warning {
        code: WarningCode::LargePod,
        text: format!(
            "{}: the pod and its sidecar are {} KiB of JSON; etcd stores at most about 1.5 MiB",
            WarningCode::LargePod,
            bytes >> 10
        ),
    }
}

fn skip(review: &Review<'_>, subject: Subject, reason: SkipReason) -> Outcome {
    Outcome {
        reason: Reason::from(reason),
        subject,
        message: None,
        answer: Ok(answer::skip(&review.uid, reason)),
    }
}

fn respond(outcome: Outcome) -> Response<Body> {
    match outcome.answer {
        Ok(answer) => json(answer),
        Err(refusal) => refusal.into(),
    }
}

fn json(answer: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(Bytes::from(answer)));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
