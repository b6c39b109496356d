//! One HTTP/1.1 question over a stream that somebody else opened.

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Request,
    client::conn::http1,
    header::{ACCEPT, HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::ANSWER_LIMIT;

/// `GET path`.
pub(super) fn request(path: &str) -> anyhow::Result<Request<Bytes>> {
    Request::get(path)
        .header(ACCEPT, "application/json")
        .body(Bytes::new())
        .with_context(|| format!("{path} is not the path of a URL"))
}

/// What is answered to a request: the status and the body.
pub(super) async fn exchange<S>(
    stream: S,
    mut request: Request<Bytes>,
) -> anyhow::Result<(u16, Vec<u8>)>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .context("no HTTP connection")?;
    // Aborted below; what it fails with, the answer fails with, too.
    let driver = tokio::spawn(connection);
    let host = HeaderValue::from_static("localhost");
    request.headers_mut().insert(HOST, host);
    let answer = async {
        let response = sender.send_request(request.map(Full::new)).await;
        let response = response.context("no answer")?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_LIMIT)
            .collect()
            .await
            .map_err(|error| anyhow!("the answer broke off: {error}"))?;
        Ok((status, body.to_bytes().to_vec()))
    };
    let answer = answer.await;
    driver.abort();
    answer
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::{exchange, request};

    #[tokio::test]
    async fn the_status_and_the_whole_body_come_back() {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let server = async {
            let mut asked = [0; 1024];
            let count = theirs.read(&mut asked).await.expect("a request");
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
            theirs.write_all(answer).await.expect("written");
            String::from_utf8_lossy(&asked[..count]).into_owned()
        };
        let (answer, asked) = tokio::join!(
            exchange(ours, request("/v1/proxies").expect("a path")),
            server
        );
        assert_eq!(answer.expect("an answer"), (200, b"{}".to_vec()));
        assert!(asked.starts_with("GET /v1/proxies HTTP/1.1\r\n"), "{asked}");
        assert!(
            asked.to_ascii_lowercase().contains("host: localhost\r\n"),
            "{asked}"
        );
    }

    #[tokio::test]
    async fn a_server_that_hangs_up_is_an_error() {
        let (ours, theirs) = tokio::io::duplex(4096);
        drop(theirs);
        assert!(
            exchange(ours, request("/v1/proxies").expect("a path"))
                .await
                .is_err()
        );
    }
}
