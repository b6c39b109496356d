//! The cluster: what is watched, what is written, who leads.
//!
//! ```text
//! API server -> world    -> Liveness, ClusterFacts     (what the CA and the webhook may know without asking)
//!            -> tokens   -> Authenticate               (whose bearer token is this)
//! custody    -> journal  -> Secret `malha-ca`          (compare-and-swap on resourceVersion)
//! authority  -> ca_bundle -> webhook configurations    (one field, by the leader)
//! world      -> pods     -> Events, gauge              (which pods run without a sidecar, and why)
//! API server -> mesh     -> Batch                      (what proxies are told of)
//! outcomes   -> conditions -> status of users' objects, Events
//! lease      -> Claim                                  (who acts)
//! ```
//!
//! Each room hands back futures and receivers; the shell owns the tasks. An API server that cannot be reached is waited
//! for with growing pauses and is never a reason to end the process.

pub mod ca_bundle;
pub mod conditions;
pub mod events;
mod follow;
pub mod journal;
pub mod lease;
pub mod mesh;
mod pace;
pub mod pods;
pub mod tokens;
pub mod trust_bundle;
pub mod world;

use std::{error::Error, fmt, future::Future, path::PathBuf, time::Duration};

use hyper::header::{HeaderValue, USER_AGENT};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

/// How long one question to the API server may take. Its own limit for a request is 60 s; whoever waits for an answer of
/// ours (a CSR, a lease) cannot wait that long.
const PATIENCE: Duration = Duration::from_secs(10);

/// The longest that an open watch may be silent. Bookmarks come about once a minute, and a watch is closed by the server
/// after [`WATCH_SECONDS`], so a connection silent for longer is dead although nobody closed it.
const READ_TIMEOUT: Duration = Duration::from_secs(75);

/// How long the API server is asked to keep one watch open. Short, so that a connection cut without a FIN is noticed
/// within about a minute; going on costs one request and no list.
const WATCH_SECONDS: u32 = 60;

/// Where the API server is found; by default where `kubectl` would find it, else by the pod's own service account.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// A kubeconfig file instead of `$KUBECONFIG`, `~/.kube/config` or the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// A context of it instead of the current one.
    pub context: Option<String>,
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing says where the API server is.
    #[error(
        "found neither a kubeconfig nor a pod's service account; set KUBECONFIG, or name a file with --kubeconfig"
    )]
    NotFound(#[source] Box<dyn Error + Send + Sync>),
    /// The named kubeconfig cannot be used.
    #[error("{kubeconfig} cannot be used to reach a cluster")]
    Kubeconfig {
        /// The file, with the context where one was named.
        kubeconfig: String,
        /// What is wrong with it.
        source: Box<dyn Error + Send + Sync>,
    },
    /// Found, but no client can be made of it (a bad certificate or key, an unsupported proxy).
    #[error("the cluster's address or credentials cannot be used")]
    Client(#[source] Box<dyn Error + Send + Sync>),
}

/// A client for the cluster that `access` names. Reads files and environment, never the network: an API server that is
/// away is waited for by those who ask it.
///
/// # Errors
/// The kubeconfig or the credentials cannot be used.
pub async fn connect(access: &Access) -> Result<Client, ConnectError> {
    let mut config = find(access).await?;
    config.connect_timeout = Some(Duration::from_secs(5));
    config.write_timeout = Some(PATIENCE);
    config.read_timeout = Some(READ_TIMEOUT);
    config.reset_reader_on_write = true;
    let agent = concat!("malha/", env!("CARGO_PKG_VERSION"));
    config
        .headers
        .push((USER_AGENT, HeaderValue::from_static(agent)));
    Client::try_from(config).map_err(|error| ConnectError::Client(error.into()))
}

async fn find(access: &Access) -> Result<Config, ConnectError> {
    if access.kubeconfig.is_none() && access.context.is_none() {
        let found = Config::infer().await;
        return found.map_err(|error| ConnectError::NotFound(error.into()));
    }
    let options = KubeConfigOptions {
        context: access.context.clone(),
        ..KubeConfigOptions::default()
    };
    let config = match &access.kubeconfig {
        None => Config::from_kubeconfig(&options).await,
        Some(path) => match Kubeconfig::read_from(path) {
            Ok(kubeconfig) => Config::from_custom_kubeconfig(kubeconfig, &options).await,
            Err(error) => Err(error),
        },
    };
    config.map_err(|error| ConnectError::Kubeconfig {
        kubeconfig: access.to_string(),
        source: error.into(),
    })
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kubeconfig {
            Some(path) => write!(f, "kubeconfig {}", path.display())?,
            None => f.write_str("the kubeconfig")?,
        }
        match &self.context {
            Some(context) => write!(f, " (context {context})"),
            None => Ok(()),
        }
    }
}

/// Why the API server gave no answer that can be used.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// It said no, or could not be asked. The text holds the whole story, so there is no further source.
    #[error("{}", brief(.0))]
    Refused(kube::Error),
    /// No answer in time.
    #[error("the API server did not answer within {} s", .0.as_secs())]
    Silent(Duration),
}

impl ApiError {
    /// The HTTP status of a refusal.
    fn code(&self) -> Option<u16> {
        match self {
            Self::Refused(kube::Error::Api(status)) => Some(status.code),
            Self::Refused(_) | Self::Silent(_) => None,
        }
    }

    /// What happened since the version that was named is not remembered any more.
    fn is_expired(&self) -> bool {
        self.code() == Some(410)
    }
}

/// One question to the API server, with a bound on the wait: the client itself has none.
async fn ask<T>(question: impl Future<Output = kube::Result<T>>) -> Result<T, ApiError> {
    ask_within(PATIENCE, question).await
}

async fn ask_within<T>(
    patience: Duration,
    question: impl Future<Output = kube::Result<T>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(patience, question).await {
        Ok(answer) => answer.map_err(ApiError::Refused),
        Err(_) => Err(ApiError::Silent(patience)),
    }
}

/// One line for a log: the client's own text repeats the whole status in debug form.
fn brief(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return format!(
            "the API server answered {} {}: {}",
            status.code, status.reason, status.message
        );
    }
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}

/// Growing pauses between tries, each at most 20 % off so that replicas do not knock together.
#[derive(Debug)]
struct Pauses {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Pauses {
    fn new(first: Duration, longest: Duration) -> Self {
        let next = first;
        Self {
            first,
            longest,
            next,
        }
    }

    /// The pause after one more failure; `dice` is in 0..1.
    fn after_failure(&mut self, dice: f64) -> Duration {
        let pause = self.next.mul_f64(0.8 + 0.4 * dice.clamp(0.0, 1.0));
        self.next = self.next.saturating_mul(2).min(self.longest);
        pause
    }

    fn reset(&mut self) {
        self.next = self.first;
    }
}

/// A number in 0..1 that differs between replicas: spread, not security.
fn dice() -> f64 {
    use std::hash::{BuildHasher, RandomState};
    // RandomState is seeded afresh each time it is made
    let bits = RandomState::new().hash_one(0_u8);
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_longest_and_begin_again_after_a_success() {
        let mut pauses = Pauses::new(Duration::from_millis(250), Duration::from_secs(2));
        let millis: Vec<_> = (0..5)
            .map(|_| pauses.after_failure(0.5).as_millis())
            .collect();
        assert_eq!(millis, [250, 500, 1000, 2000, 2000]);
        pauses.reset();
        assert_eq!(pauses.after_failure(0.5).as_millis(), 250);
    }

    #[test]
    fn dice_stay_in_their_range_and_differ() {
        let throws: Vec<_> = (0..100).map(|_| dice()).collect();
        assert!(throws.iter().all(|throw| (0.0..1.0).contains(throw)));
        assert!(throws.iter().any(|throw| *throw != throws[0]));
    }

    #[tokio::test]
    async fn a_missing_kubeconfig_is_named_in_the_error() {
        let access = Access {
            kubeconfig: Some("/nowhere/kubeconfig".into()),
            context: Some("prod".to_owned()),
        };
        let error = connect(&access).await.err().expect("no such file");
        assert_eq!(
            error.to_string(),
            "kubeconfig /nowhere/kubeconfig (context prod) cannot be used to reach a cluster"
        );
    }
}
