//! A pod's identity with everything around it real: `malha serve --standalone`, Envoy, and a SPIFFE client that nobody
//! here wrote.

mod control_plane;
mod envoy;
mod pod;
mod push;
mod rotation;
mod workload_api;

use std::{fmt, future::Future, time::Duration};

use tokio::time::{Instant, timeout};

/// Nothing here takes this long unless it is broken; the machine may be busy.
const LONG: Duration = Duration::from_secs(60);

/// Waits for the end of a future that must come.
async fn soon<T>(what: impl fmt::Display, future: impl Future<Output = T>) -> T {
    match timeout(LONG, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not come within {LONG:?}"),
    }
}

/// Asks again and again until it is so.
async fn until(what: impl fmt::Display, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !is_so().await {
        assert!(Instant::now() < deadline, "{what}: not within {LONG:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
