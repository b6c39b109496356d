//! The keys that the API server signs service-account tokens with, fetched from itself and kept.
//!
//! `/.well-known/openid-configuration` -> issuer; `/openid/v1/jwks` -> [`KeySet`]
//!
//! One fetch at a time; the last good keys stay until others were read whole. A key that nobody has heard of is worth one
//! early fetch, at most every [`EARLY`], so that garbage cannot make us ask more often.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use hyper::Request;
use jiff::{SignedDuration, Timestamp};
use kube::Client;
use serde::Deserialize;
use tokio::{
    sync::Mutex,
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{
    super::{ApiError, Pauses, ask_within, dice},
    PATIENCE,
};
use crate::{
    caller::{CallerError, KeySet, KeySetError},
    clock::Clock,
};

/// The time between two fetches.
const REFETCH: Duration = Duration::from_secs(3600);

/// The time between two fetches that an unknown key caused.
const EARLY: Duration = Duration::from_secs(30);

/// The time between two tries of callers while there are no keys at all.
const FIRST: Duration = Duration::from_secs(1);

/// How long keys are good although no others could be fetched.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// What the API server publishes about its tokens.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) issuer: String,
    pub(super) keys: KeySet,
    fetched: Timestamp,
}

impl Published {
    fn usable(&self, now: Timestamp) -> bool {
        !over(KEPT, self.fetched, now)
    }
}

pub(super) struct Keys {
    client: Client,
    current: ArcSwapOption<Published>,
    tries: Mutex<Tries>,
    failing: AtomicBool,
}

/// When callers last caused a fetch.
#[derive(Debug, Default)]
struct Tries {
    first: Option<Timestamp>,
    early: Option<Timestamp>,
}

impl Tries {
    /// Whether a caller who finds no keys at all may fetch.
    fn may_try_first(&mut self, now: Timestamp) -> bool {
        may(&mut self.first, FIRST, now)
    }

    /// Whether a caller with an unknown key may fetch.
    fn may_try_early(&mut self, now: Timestamp) -> bool {
        may(&mut self.early, EARLY, now)
    }
}

fn may(last: &mut Option<Timestamp>, pause: Duration, now: Timestamp) -> bool {
    // either way: callers who came together know slightly different times, and a clock that was set back by more than the
    // pause must not stop the fetches until it has caught up
    let due = last.is_none_or(|last| over(pause, last, now) || over(pause, now, last));
    if due {
        *last = Some(now);
    }
    due
}

/// Whether at least `span` has passed from `since` to `now`.
fn over(span: Duration, since: Timestamp, now: Timestamp) -> bool {
    let span = SignedDuration::try_from(span).unwrap_or(SignedDuration::MAX);
    now.duration_since(since) >= span
}

/// Why keys could not be fetched.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("the API server's {path} could not be read: {fault}")]
    Api { path: &'static str, fault: ApiError },
    #[error("the API server's {DISCOVERY} is not what it should be: {0}")]
    Discovery(serde_json::Error),
    #[error("the API server's {JWKS} {0}")]
    Keys(KeySetError),
}

const DISCOVERY: &str = "/.well-known/openid-configuration";
const JWKS: &str = "/openid/v1/jwks";

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
}

impl Keys {
    pub(super) fn new(client: Client) -> Self {
        Self {
            client,
            current: ArcSwapOption::empty(),
            tries: Mutex::default(),
            failing: AtomicBool::new(false),
        }
    }

    /// The keys in force; the first caller may have to wait for them.
    ///
    /// # Errors
    /// There are none, or only ones too old.
    pub(super) async fn published(&self, now: Timestamp) -> Result<Arc<Published>, CallerError> {
        if let Some(published) = self.usable(now) {
            return Ok(published);
        }
        if let Ok(mut tries) = timeout(PATIENCE, self.tries.lock()).await {
            if let Some(published) = self.usable(now) {
                return Ok(published);
            }
            if tries.may_try_first(now)
                && let Some(published) = self.fetch_or_warn(now).await
            {
                return Ok(published);
            }
        }
        Err(CallerError::VerifierUnavailable(
            "the API server's token keys could not be fetched yet".to_owned(),
        ))
    }

    /// Keys fetched later than these, where there are any or may be fetched now.
    pub(super) async fn newer_than(
        &self,
        known: &Arc<Published>,
        now: Timestamp,
    ) -> Option<Arc<Published>> {
        let mut tries = timeout(PATIENCE, self.tries.lock()).await.ok()?;
        let current = self.current.load_full();
        if let Some(current) = current.filter(|current| !Arc::ptr_eq(current, known)) {
            return Some(current);
        }
        if !tries.may_try_early(now) {
            return None;
        }
        self.fetch_or_warn(now).await
    }

    /// Fetches the keys now, and again every hour; sooner while it fails.
    pub(super) async fn follow(&self, clock: Clock) {
        let mut pauses = Pauses::new(Duration::from_secs(1), Duration::from_secs(60));
        loop {
            let fetched = {
                let _one_at_a_time = self.tries.lock().await;
                self.fetch_or_warn(clock.now()).await
            };
            if fetched.is_some() {
                pauses.reset();
                sleep(REFETCH.mul_f64(0.9 + 0.2 * dice())).await;
            } else {
                sleep(pauses.after_failure(dice())).await;
            }
        }
    }

    fn usable(&self, now: Timestamp) -> Option<Arc<Published>> {
        self.current
            .load_full()
            .filter(|published| published.usable(now))
    }

    async fn fetch_or_warn(&self, now: Timestamp) -> Option<Arc<Published>> {
        match self.fetch(now).await {
            Ok(published) => {
                let published = Arc::new(published);
                self.failing.store(false, Ordering::Relaxed);
                let before = self.current.swap(Some(published.clone()));
                if before.is_none() {
                    let keys = published.keys.len();
                    info!(
                        issuer = published.issuer,
                        keys, "fetched the API server's token keys"
                    );
                }
                Some(published)
            }
            Err(error) => {
                if self.failing.swap(true, Ordering::Relaxed) {
                    debug!(%error, "token keys still cannot be fetched");
                } else {
                    warn!(%error, "token keys were not fetched; the last good ones stay in force");
                }
                None
            }
        }
    }

    async fn fetch(&self, now: Timestamp) -> Result<Published, FetchError> {
        let discovery = self.read(DISCOVERY).await?;
        let discovery: Discovery =
            serde_json::from_str(&discovery).map_err(FetchError::Discovery)?;
        let keys = self.read(JWKS).await?;
        let keys = KeySet::parse(keys.as_bytes()).map_err(FetchError::Keys)?;
        Ok(Published {
            issuer: discovery.issuer,
            keys,
            fetched: now,
        })
    }

    async fn read(&self, path: &'static str) -> Result<String, FetchError> {
        let request = Request::get(path)
            .body(Vec::new())
            .map_err(|error| ApiError::Refused(kube::Error::HttpError(error)));
        let answer = match request {
            Ok(request) => ask_within(PATIENCE / 2, self.client.request_text(request)).await,
            Err(error) => Err(error),
        };
        answer.map_err(|fault| FetchError::Api { path, fault })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).expect("in range")
    }

    #[test]
    fn an_unknown_key_is_worth_one_fetch_in_thirty_seconds() {
        let mut tries = Tries::default();
        let asked: Vec<i64> = (0..100).filter(|s| tries.may_try_early(at(*s))).collect();
        assert_eq!(asked, [0, 30, 60, 90]);
    }

    #[test]
    fn callers_who_come_together_cause_one_fetch() {
        let mut tries = Tries::default();
        let asked = [5, 4, 6, 3, 5].map(|second| tries.may_try_early(at(second)));
        assert_eq!(asked, [true, false, false, false, false]);
    }

    #[test]
    fn a_clock_that_is_set_back_does_not_stop_the_fetches() {
        let mut tries = Tries::default();
        assert!(tries.may_try_early(at(86_400)));
        assert!(tries.may_try_early(at(0)));
        assert!(!tries.may_try_early(at(29)));
    }

    /// An API server that publishes what it is told to, which a real one does only after a restart with other keys.
    #[derive(Clone, Default)]
    struct Publisher {
        jwks: Arc<std::sync::Mutex<Option<String>>>,
        fetches: Arc<std::sync::atomic::AtomicUsize>,
    }

    impl Publisher {
        fn publish(&self, jwks: Option<String>) {
            *self.jwks.lock().expect("not poisoned") = jwks;
        }

        fn fetches(&self) -> usize {
            self.fetches.load(Ordering::Relaxed)
        }

        fn client(&self) -> Client {
            let publisher = self.clone();
            let answer = move |request: Request<kube::client::Body>| {
                let answer = publisher.answer(request.uri().path());
                std::future::ready(Ok::<_, std::convert::Infallible>(answer))
            };
            Client::new(tower::service_fn(answer), "default")
        }

        fn answer(&self, path: &str) -> hyper::Response<kube::client::Body> {
            let discovery = || Some(r#"{"issuer":"https://kubernetes.default.svc"}"#.to_owned());
            let text = match path {
                DISCOVERY => discovery(),
                JWKS => {
                    self.fetches.fetch_add(1, Ordering::Relaxed);
                    self.jwks.lock().expect("not poisoned").clone()
                }
                _ => None,
            };
            let status = if text.is_some() { 200 } else { 503 };
            let body = kube::client::Body::from(text.unwrap_or_default().into_bytes());
            hyper::Response::builder()
                .status(status)
                .body(body)
                .expect("an answer")
        }
    }

    fn jwks(ids: &[&str]) -> Option<String> {
        let coordinate = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE";
        let keys: Vec<_> = ids
            .iter()
            .map(|id| serde_json::json!({"kty": "EC", "crv": "P-256", "kid": id, "x": coordinate, "y": coordinate}))
            .collect();
        Some(serde_json::json!({ "keys": keys }).to_string())
    }

    #[tokio::test]
    async fn a_new_key_is_fetched_once_and_a_failed_fetch_keeps_the_last_good_ones() {
        let publisher = Publisher::default();
        let keys = Keys::new(publisher.client());
        assert!(keys.published(at(0)).await.is_err());
        assert!(keys.published(at(0)).await.is_err());
        assert_eq!(publisher.fetches(), 1, "a second between two tries");

        publisher.publish(jwks(&["a"]));
        let first = keys.published(at(2)).await.expect("published");
        assert_eq!(first.keys.len(), 1);
        assert_eq!(publisher.fetches(), 2);

        publisher.publish(jwks(&["a", "b"]));
        let second = keys
            .newer_than(&first, at(3))
            .await
            .expect("an early fetch");
        assert_eq!((second.keys.len(), publisher.fetches()), (2, 3));
        let same = keys
            .newer_than(&first, at(3))
            .await
            .expect("fetched by another caller");
        assert!(Arc::ptr_eq(&same, &second));
        for second_of_pause in 4..33 {
            assert!(
                keys.newer_than(&second, at(second_of_pause))
                    .await
                    .is_none()
            );
        }
        assert_eq!(publisher.fetches(), 3, "one for an unknown key in 30 s");

        for (time, bad) in [
            (33, None),
            (63, Some("not a key set".to_owned())),
            (93, Some(r#"{"keys":[]}"#.to_owned())),
        ] {
            publisher.publish(bad);
            assert!(keys.newer_than(&second, at(time)).await.is_none());
            let kept = keys.published(at(time)).await.expect("the last good ones");
            assert!(Arc::ptr_eq(&kept, &second));
        }
        assert_eq!(publisher.fetches(), 6);
        assert!(
            keys.published(at(86_400 + 4)).await.is_err(),
            "a day without news"
        );
    }

    #[test]
    fn keys_are_kept_for_a_day_without_news() {
        let published = Published {
            issuer: "https://kubernetes.default.svc".to_owned(),
            keys: KeySet::default(),
            fetched: at(0),
        };
        assert!(published.usable(at(86_399)));
        assert!(!published.usable(at(86_400)));
        assert!(
            published.usable(at(-3600)),
            "a clock set back makes no key old"
        );
    }
}
