//! What integration tests share: the real program as a child, an HTTPS client that sends exactly the bytes it is told
//! to, and AdmissionReviews.
#![allow(dead_code, reason = "a harness serves tests that come and go")]

pub(crate) mod https;
pub(crate) mod program;
pub(crate) mod review;
