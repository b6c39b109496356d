//! `malha-agent wait`: returns when the sidecar is ready, so that the application's containers start after it.

use std::{net::SocketAddr, time::Duration};

use http_body_util::Empty;
use hyper::{Request, header::HOST};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use super::client;

/// The sidecar was not ready in time.
#[derive(Debug, thiserror::Error)]
#[error("the sidecar is not ready after {} s: {last}", .after.as_secs_f32())]
pub struct NotReady {
    after: Duration,
    last: String,
}

/// Asks the agent on loopback until it is ready.
///
/// # Errors
/// What was heard last when the time is over.
pub async fn wait(port: u16, patience: Duration) -> Result<(), NotReady> {
    let deadline = Instant::now() + patience;
    loop {
        let asked = timeout(ONE_TRY, ask(port)).await;
        let last = match asked {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(reason)) => reason,
            Err(_) => "no answer".to_owned(),
        };
        if Instant::now() + PAUSE >= deadline {
            return Err(NotReady {
                after: patience,
                last,
            });
        }
        sleep(PAUSE).await;
    }
}

const ONE_TRY: Duration = Duration::from_secs(1);
/// An application's start waits for us.
const PAUSE: Duration = Duration::from_millis(100);

async fn ask(port: u16) -> Result<(), String> {
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let stream = TcpStream::connect(at)
        .await
        .map_err(|error| format!("nobody answers at {at} ({error}); does malha-agent run?"))?;
    let request = Request::get("/healthz/ready")
        .header(HOST, "malha-agent")
        .body(Empty::new())
        .map_err(|error| error.to_string())?;
    let exchange = client::send(stream, request)
        .await
        .map_err(|error| error.to_string())?;
    if exchange.response.status().is_success() {
        return Ok(());
    }
    let reason = exchange.beginning(1 << 10).await;
    Err(String::from_utf8_lossy(&reason).trim().to_owned())
}
