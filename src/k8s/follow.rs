//! One object, followed: its content now, and again whenever it may have changed.
//!
//! A list-watch of a single name would need the verb `list`; this one reads the object and watches it by name, so `get`
//! and `watch` on that name are enough. The content is read again each time a watch ends, about once a minute, so that a
//! lost event is a delay and never a loss.

use std::{fmt::Debug, time::Duration};

use futures::{StreamExt, stream::BoxStream};
use kube::{
    Api, Resource, ResourceExt,
    api::{WatchEvent, WatchParams},
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::{ApiError, Pauses, WATCH_SECONDS, ask, dice};

/// Follows the object `name`. `next` may be dropped at any await without losing anything.
pub(super) struct Follow<K> {
    api: Api<K>,
    name: String,
    state: State<K>,
    not_before: Instant,
    pauses: Pauses,
    failing: bool,
}

enum State<K> {
    /// Read it.
    Read,
    /// It was read at this version (empty: it was not there, or the version is forgotten); watch from here.
    Seen(String),
    Watching {
        stream: BoxStream<'static, kube::Result<WatchEvent<K>>>,
        since: Instant,
    },
}

impl<K> Follow<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    pub(super) fn new(api: Api<K>, name: &str) -> Self {
        Self {
            api,
            name: name.to_owned(),
            state: State::Read,
            not_before: Instant::now(),
            // short: a webhook's lost caBundle is repaired within 2 s, also right after an outage
            pauses: Pauses::new(Duration::from_millis(200), Duration::from_millis(1500)),
            failing: false,
        }
    }

    /// The object's content each time it was read or changed; `None` where there is none. An API server that cannot be
    /// asked is waited for: what was told last stays the last word.
    pub(super) async fn next(&mut self) -> Option<K> {
        loop {
            sleep_until(self.not_before).await;
            let result = match &mut self.state {
                State::Read => self.read().await,
                State::Seen(version) => {
                    let version = version.clone();
                    self.watch(&version).await
                }
                State::Watching { .. } => self.listen().await,
            };
            match result {
                Ok(None) => {}
                Ok(Some(content)) => {
                    self.recovered();
                    return content;
                }
                Err(error) if error.is_expired() => self.forgotten(),
                Err(error) => self.failed(&error),
            }
        }
    }

    /// Reads the object again before listening on: somebody knows better than the watch.
    pub(super) fn read_again(&mut self) {
        self.state = State::Read;
    }

    async fn read(&mut self) -> Result<Option<Option<K>>, ApiError> {
        let content = ask(self.api.get_opt(&self.name)).await?;
        let version = content.as_ref().and_then(K::resource_version);
        self.state = State::Seen(version.unwrap_or_default());
        Ok(Some(content))
    }

    async fn watch(&mut self, version: &str) -> Result<Option<Option<K>>, ApiError> {
        let params = WatchParams::default()
            .fields(&format!("metadata.name={}", self.name))
            .timeout(WATCH_SECONDS);
        let stream = ask(self.api.watch(&params, version)).await?;
        self.state = State::Watching {
            stream: stream.boxed(),
            since: Instant::now(),
        };
        Ok(None)
    }

    async fn listen(&mut self) -> Result<Option<Option<K>>, ApiError> {
        let State::Watching { stream, since } = &mut self.state else {
            return Ok(None);
        };
        let silence = Duration::from_secs(u64::from(WATCH_SECONDS) + 5);
        match timeout(silence, stream.next()).await {
            Ok(Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)))) => {
                Ok(Some(Some(object)))
            }
            Ok(Some(Ok(WatchEvent::Deleted(_)))) => Ok(Some(None)),
            Ok(Some(Ok(WatchEvent::Bookmark(_)))) => Ok(None),
            Ok(Some(Ok(WatchEvent::Error(status)))) => {
                Err(ApiError::Refused(kube::Error::Api(status)))
            }
            Ok(Some(Err(error))) => Err(ApiError::Refused(error)),
            // the server's time for this watch is over, or nothing was heard for longer than that
            Ok(None) | Err(_) => {
                // a server that closes each watch at once is not asked more than once a second
                self.not_before = *since + Duration::from_secs(1);
                self.state = State::Read;
                Ok(None)
            }
        }
    }

    /// An API server that has just started remembers nothing from before: the version of an object that has not changed
    /// since is too old to watch from, and reading it again gives the same one. A watch without a version begins with the
    /// object as it is.
    fn forgotten(&mut self) {
        self.state = State::Seen(String::new());
        self.not_before = Instant::now() + self.pauses.after_failure(dice());
    }

    /// One line for an outage, however long it lasts.
    fn failed(&mut self, error: &ApiError) {
        self.state = State::Read;
        let pause = self.pauses.after_failure(dice());
        self.not_before = Instant::now() + pause;
        let (kind, name) = (K::kind(&()), &self.name);
        if std::mem::replace(&mut self.failing, true) {
            debug!(%kind, name, %error, ?pause, "still cannot be followed");
        } else {
            warn!(%kind, name, %error, "cannot be followed now; what was last seen stays in force");
        }
    }

    fn recovered(&mut self) {
        self.pauses.reset();
        if std::mem::take(&mut self.failing) {
            info!(kind = %K::kind(&()), name = self.name, "is followed again");
        }
    }
}
