//! One HTTP/1.1 request over a connection of its own.

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::task::AbortOnDropHandle;

/// An answer whose body still comes; dropped, the connection closes.
pub(super) struct Exchange {
    pub(super) response: Response<Incoming>,
    _connection: AbortOnDropHandle<()>,
}

/// Sends a request without a body and waits for the head of the answer.
pub(super) async fn send(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Empty<Bytes>>,
) -> Result<Exchange, hyper::Error> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(async move {
        // What went wrong is told to whoever waits for the answer or its body.
        let _ = connection.await;
    });
    let connection = AbortOnDropHandle::new(connection);
    let response = sender.send_request(request).await?;
    Ok(Exchange {
        response,
        _connection: connection,
    })
}

impl Exchange {
    /// The whole body.
    ///
    /// # Errors
    /// Where it breaks off, or is longer than `limit` bytes.
    pub(super) async fn body(self, limit: usize) -> Result<Bytes, BodyError> {
        let body = Limited::new(self.response.into_body(), limit);
        Ok(body.collect().await?.to_bytes())
    }

    /// The beginning of the body: what comes within `limit` bytes, or before it breaks off.
    pub(super) async fn beginning(self, limit: usize) -> Bytes {
        let mut body = self.response.into_body();
        let mut read = Vec::new();
        while let Some(Ok(frame)) = body.frame().await {
            let Ok(data) = frame.into_data() else {
                break;
            };
            let room = limit.saturating_sub(read.len());
            read.extend_from_slice(data.get(..room.min(data.len())).unwrap_or_default());
            if read.len() >= limit {
                break;
            }
        }
        read.into()
    }
}

/// Why there is no whole body.
pub(super) type BodyError = Box<dyn std::error::Error + Send + Sync>;
