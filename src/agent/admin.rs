//! Envoy's admin interface on its Unix socket: nobody else in the pod can reach it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{Method, Request, header::HOST};
use tokio::net::UnixStream;

use super::client::{self, BodyError, Exchange};

/// Envoy's admin interface.
#[derive(Clone, Debug)]
pub struct Admin {
    socket: PathBuf,
}

/// Why Envoy was not heard.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Nobody is behind the socket.
    #[error("Envoy's admin socket {} does not answer; is Envoy running?", .socket.display())]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The connection ended before the answer did.
    #[error("Envoy broke off while answering {path}")]
    Broken {
        /// What was asked for.
        path: String,
        /// Why.
        source: BodyError,
    },
    /// Envoy refuses.
    #[error("Envoy answered {path} with {status}")]
    Refused {
        /// What was asked for.
        path: String,
        /// Its answer.
        status: u16,
    },
    /// Envoy hangs.
    #[error("Envoy did not answer {path} within {} s", .after.as_secs())]
    Late {
        /// What was asked for.
        path: String,
        /// How long it had.
        after: Duration,
    },
}

/// Envoy answers from its main thread, which a large configuration keeps busy for a while.
const PATIENCE: Duration = Duration::from_secs(5);
/// More than Envoy says about any proxy that fits into its memory.
const LARGEST: usize = 256 << 20;

impl Admin {
    /// The interface behind a socket.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Whether Envoy has everything that it was started to wait for: certificate, clusters and listeners.
    ///
    /// # Errors
    /// Where Envoy does not answer.
    pub async fn is_ready(&self) -> Result<bool, AdminError> {
        let answer = self.ask(Method::GET, "/ready").await?;
        Ok(answer.response.status().is_success())
    }

    /// The answer to a question, whole.
    ///
    /// # Errors
    /// Where Envoy does not answer, or not with a success.
    pub async fn read(&self, path: &str) -> Result<Bytes, AdminError> {
        let answer = self.succeed(Method::GET, path).await?;
        answer
            .body(LARGEST)
            .await
            .map_err(|source| AdminError::Broken {
                path: path.to_owned(),
                source,
            })
    }

    /// Has Envoy do something.
    ///
    /// # Errors
    /// Where Envoy does not answer, or not with a success.
    pub async fn act(&self, path: &str) -> Result<(), AdminError> {
        self.succeed(Method::POST, path).await.map(drop)
    }

    /// The answer to a question, as it comes.
    pub(super) async fn stream(&self, path: &str) -> Result<Exchange, AdminError> {
        self.succeed(Method::GET, path).await
    }

    async fn succeed(&self, method: Method, path: &str) -> Result<Exchange, AdminError> {
        let answer = self.ask(method, path).await?;
        match answer.response.status() {
            status if status.is_success() => Ok(answer),
            status => Err(AdminError::Refused {
                path: path.to_owned(),
                status: status.as_u16(),
            }),
        }
    }

    async fn ask(&self, method: Method, path: &str) -> Result<Exchange, AdminError> {
        let asked = async {
            let stream = UnixStream::connect(&self.socket).await.map_err(|source| {
                AdminError::Unreachable {
                    socket: self.socket.clone(),
                    source,
                }
            })?;
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header(HOST, "envoy")
                .body(Empty::new())
                .expect("paths of ours are paths");
            client::send(stream, request)
                .await
                .map_err(|source| AdminError::Broken {
                    path: path.to_owned(),
                    source: source.into(),
                })
        };
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(answer) => answer,
            Err(_) => Err(AdminError::Late {
                path: path.to_owned(),
                after: PATIENCE,
            }),
        }
    }
}
