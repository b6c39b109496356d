//! The admin port: `/livez`, `/readyz` and `/metrics` over plain HTTP, and nothing else.
//!
//! Nothing secret is here and nothing can be changed, so there is nothing to authenticate: no profiles, no log level, no
//! way to end the process.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{ALLOW, CONTENT_TYPE};
use axum::http::{HeaderValue, Method, Response, StatusCode};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use crate::runtime::readiness::{self, Readiness};

/// What the admin port answers. Serve it to the very end: while the process drains, probes still want to know.
pub fn router(readiness: Readiness, registry: Arc<Registry>) -> Router {
    Router::new().fallback(answer).with_state(Told {
        readiness,
        registry,
    })
}

#[derive(Clone)]
struct Told {
    readiness: Readiness,
    registry: Arc<Registry>,
}

async fn answer(State(told): State<Told>, request: Request) -> Response<Body> {
    let tell = match request.uri().path() {
        "/livez" => live,
        "/readyz" => ready,
        "/metrics" => metrics,
        _ => {
            return plain(
                StatusCode::NOT_FOUND,
                "not found: try /livez, /readyz or /metrics".to_owned(),
            );
        }
    };
    if request.method() != Method::GET {
        let mut refused = plain(
            StatusCode::METHOD_NOT_ALLOWED,
            "only GET is answered here".to_owned(),
        );
        refused
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET"));
        return refused;
    }
    tell(&told)
}

/// The runtime that answers this is alive; what does not work is `/readyz`'s and the metrics' to tell. A restart would
/// mend neither a missing API server nor a missing certificate.
fn live(_: &Told) -> Response<Body> {
    plain(StatusCode::OK, "alive".to_owned())
}

fn ready(told: &Told) -> Response<Body> {
    let state = told.readiness.state();
    let status = match state {
        readiness::State::Ready => StatusCode::OK,
        readiness::State::Waiting(_) | readiness::State::Stopping => {
            StatusCode::SERVICE_UNAVAILABLE
        }
    };
    plain(status, state.to_string())
}

fn metrics(told: &Told) -> Response<Body> {
    let mut text = String::with_capacity(32 << 10);
    encode(&mut text, &told.registry).expect("writing to a string does not fail");
    respond(
        StatusCode::OK,
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
        text,
    )
}

fn plain(status: StatusCode, mut text: String) -> Response<Body> {
    text.push('\n');
    respond(status, "text/plain; charset=utf-8", text)
}

fn respond(status: StatusCode, content_type: &'static str, text: String) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
