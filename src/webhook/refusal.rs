//! What is no admission review, or cannot be answered: a status of HTTP with one line of text.
//!
//! The API server shows that line to whoever created the pod, so it says what to look at.

use std::borrow::Cow;
use std::error::Error;

use axum::body::Body;
use axum::http::header::{ALLOW, CONNECTION, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, Response, StatusCode};

use crate::inject::Reason;
use crate::webhook::line::excerpt;

/// Why a request gets a status other than 200.
#[derive(Debug)]
pub(super) struct Refusal {
    kind: Kind,
    message: Cow<'static, str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    WrongPath,
    WrongMethod,
    WrongType,
    TooLarge,
    TooSlow,
    Unreadable,
    Overloaded,
    Panicked,
}

impl Refusal {
    pub(super) fn wrong_path() -> Self {
        Self::new(
            Kind::WrongPath,
            "no such path; is this revision's webhook configuration registered?",
        )
    }

    pub(super) fn wrong_method() -> Self {
        Self::new(Kind::WrongMethod, "only POST is answered here")
    }

    pub(super) fn wrong_type(message: &'static str) -> Self {
        Self::new(Kind::WrongType, message)
    }

    pub(super) fn too_large(limit: usize) -> Self {
        Self::new(
            Kind::TooLarge,
            format!("the body is larger than {limit} bytes"),
        )
    }

    pub(super) fn too_slow() -> Self {
        Self::new(Kind::TooSlow, "the body did not arrive in time")
    }

    pub(super) fn unreadable(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Kind::Unreadable, message)
    }

    /// As [`unreadable`](Self::unreadable), with the error and its causes as the text.
    pub(super) fn bad_request(error: &dyn Error) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message.push_str(": ");
            message.push_str(&error.to_string());
            cause = error.source();
        }
        // It may quote the body, which may be one string of six mebibytes.
        Self::unreadable(excerpt(&message))
    }

    pub(super) fn overloaded() -> Self {
        Self::new(
            Kind::Overloaded,
            "too much is being admitted at this moment; try again",
        )
    }

    pub(super) fn panicked() -> Self {
        Self::new(
            Kind::Panicked,
            "a fault in malha; its log says where, please report it",
        )
    }

    pub(super) fn reason(&self) -> Reason {
        match self.kind {
            Kind::WrongPath
            | Kind::WrongMethod
            | Kind::WrongType
            | Kind::TooLarge
            | Kind::TooSlow
            | Kind::Unreadable => Reason::BadRequest,
            Kind::Overloaded => Reason::Overloaded,
            Kind::Panicked => Reason::Internal,
        }
    }

    pub(super) fn message(&self) -> &str {
        &self.message
    }

    fn new(kind: Kind, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    fn status(&self) -> StatusCode {
        match self.kind {
            Kind::WrongPath => StatusCode::NOT_FOUND,
            Kind::WrongMethod => StatusCode::METHOD_NOT_ALLOWED,
            Kind::WrongType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Kind::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Kind::Unreadable => StatusCode::BAD_REQUEST,
            Kind::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Panicked => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// Whether there may be a body that nobody reads; then the connection cannot carry another request.
    fn leaves_the_body(&self) -> bool {
        match self.kind {
            Kind::WrongPath
            | Kind::WrongMethod
            | Kind::WrongType
            | Kind::TooLarge
            | Kind::TooSlow
            | Kind::Overloaded => true,
            Kind::Unreadable | Kind::Panicked => false,
        }
    }
}

impl From<Refusal> for Response<Body> {
    fn from(refusal: Refusal) -> Self {
        let text = format!("{}: {}\n", refusal.reason(), refusal.message);
        let mut response = Self::new(Body::from(text));
        *response.status_mut() = refusal.status();
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        if refusal.leaves_the_body() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        match refusal.kind {
            Kind::WrongMethod => {
                headers.insert(ALLOW, HeaderValue::from_static("POST"));
            }
            Kind::Overloaded => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            Kind::WrongPath
            | Kind::WrongType
            | Kind::TooLarge
            | Kind::TooSlow
            | Kind::Unreadable
            | Kind::Panicked => {}
        }
        response
    }
}
