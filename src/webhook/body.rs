//! A request's body, bounded before it is held: by its type, its size, its time, and by what all of them hold together.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue};
use bytes::BytesMut;
use http_body_util::BodyExt;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::webhook::Limits;
use crate::webhook::refusal::Refusal;

/// Reads bodies within the limits.
#[derive(Debug)]
pub(super) struct Intake {
    limits: Limits,
    /// One permit a byte.
    budget: Arc<Semaphore>,
    pending: Arc<Pending>,
}

/// A body, and its share of the budget until it is answered.
#[derive(Debug)]
pub(super) struct Received {
    bytes: Bytes,
    _share: Option<OwnedSemaphorePermit>,
}

impl Received {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Intake {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            limits: limits.clone(),
            budget: Arc::new(Semaphore::new(
                limits.in_flight_bytes.min(Semaphore::MAX_PERMITS),
            )),
            pending: Arc::default(),
        }
    }

    /// Reads the body of `request`, or says why not.
    pub(super) async fn receive(&self, request: Request) -> Result<Received, Refusal> {
        check_headers(request.headers())?;
        let body = request.into_body();
        let declared = body.size_hint().lower();
        if declared > self.limits.body_bytes as u64 {
            return Err(Refusal::too_large(self.limits.body_bytes));
        }
        match timeout(self.limits.body, self.read(body)).await {
            Ok(received) => received,
            Err(_) => Err(Refusal::too_slow()),
        }
    }

    async fn read(&self, mut body: Body) -> Result<Received, Refusal> {
        let Some(first) = next(&mut body).await? else {
            return Ok(Received {
                bytes: Bytes::new(),
                _share: None,
            });
        };
        let mut share = self.hold(first.len(), None).await?;
        if body.is_end_stream() {
            // An ordinary review is one piece, and is read where it lies.
            return Ok(Received {
                bytes: first,
                _share: Some(share),
            });
        }
        let place = self.pending.join(first.len());
        let mut bytes = BytesMut::from(first);
        loop {
            let piece = tokio::select! {
                biased;
                piece = next(&mut body) => piece?,
                () = place.body.give_up.notified() => return Err(Refusal::overloaded()),
            };
            let Some(piece) = piece else {
                return Ok(Received {
                    bytes: bytes.freeze(),
                    _share: Some(share),
                });
            };
            if bytes.len() + piece.len() > self.limits.body_bytes {
                return Err(Refusal::too_large(self.limits.body_bytes));
            }
            share.merge(self.hold(piece.len(), Some(&place)).await?);
            bytes.extend_from_slice(&piece);
            place.body.held.store(bytes.len(), Ordering::Relaxed);
        }
    }

    /// Takes `bytes` from the budget.
    ///
    /// When there are none left, the body that holds most of them and has had its time gives them up. Else a dozen peers
    /// that send almost all of a large body, and then wait, would keep everybody else out.
    async fn hold(
        &self,
        bytes: usize,
        place: Option<&Place>,
    ) -> Result<OwnedSemaphorePermit, Refusal> {
        let permits = u32::try_from(bytes).map_err(|_| Refusal::overloaded())?;
        if let Ok(share) = Arc::clone(&self.budget).try_acquire_many_owned(permits) {
            return Ok(share);
        }
        if !self.pending.ask_for(bytes, place) {
            return Err(Refusal::overloaded());
        }
        timeout(
            HANDOVER,
            Arc::clone(&self.budget).acquire_many_owned(permits),
        )
        .await
        .map_err(|_| Refusal::overloaded())?
        .map_err(|_| Refusal::overloaded())
    }
}

/// How long it may take until the bytes that a slow body gives up are there.
const HANDOVER: Duration = Duration::from_millis(250);

/// What an honest peer needs for a body of 6 MiB on a slow link, and then some.
const FAIR_TIME: Duration = Duration::from_secs(1);

/// The next piece of data; trailers are skipped, they mean nothing here.
async fn next(body: &mut Body) -> Result<Option<Bytes>, Refusal> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Refusal::bad_request(&error))?;
        if let Ok(data) = frame.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

fn check_headers(headers: &HeaderMap) -> Result<(), Refusal> {
    if !headers.get(CONTENT_TYPE).is_some_and(is_json) {
        return Err(Refusal::wrong_type("Content-Type must be application/json"));
    }
    let plain = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"identity");
    if !headers.get_all(CONTENT_ENCODING).iter().all(plain) {
        return Err(Refusal::wrong_type(
            "the body must not be compressed or encoded",
        ));
    }
    Ok(())
}

/// `application/json`, with parameters or without.
fn is_json(value: &HeaderValue) -> bool {
    let essence = value.as_bytes().split(|byte| *byte == b';').next();
    essence.is_some_and(|essence| {
        essence
            .trim_ascii()
            .eq_ignore_ascii_case(b"application/json")
    })
}

/// Bodies that came in more than one piece and are not complete.
#[derive(Debug, Default)]
struct Pending {
    bodies: Mutex<(u64, BTreeMap<u64, Arc<Incomplete>>)>,
}

#[derive(Debug)]
struct Incomplete {
    since: Instant,
    held: AtomicUsize,
    give_up: Notify,
}

/// A body's place among those that are incomplete.
#[derive(Debug)]
struct Place {
    number: u64,
    body: Arc<Incomplete>,
    pending: Arc<Pending>,
}

impl Pending {
    fn join(self: &Arc<Self>, held: usize) -> Place {
        let body = Arc::new(Incomplete {
            since: Instant::now(),
            held: AtomicUsize::new(held),
            give_up: Notify::new(),
        });
        let mut bodies = self.lock();
        let number = bodies.0;
        bodies.0 += 1;
        bodies.1.insert(number, Arc::clone(&body));
        Place {
            number,
            body,
            pending: Arc::clone(self),
        }
    }

    /// Has the largest of those that had their time give way, if that frees `bytes`. `false` where there is none.
    fn ask_for(&self, bytes: usize, asking: Option<&Place>) -> bool {
        let mut bodies = self.lock();
        let largest = bodies
            .1
            .iter()
            .filter(|(number, body)| {
                asking.is_none_or(|place| place.number != **number)
                    && body.since.elapsed() >= FAIR_TIME
            })
            .map(|(number, body)| (body.held.load(Ordering::Relaxed), *number))
            .max();
        let Some((held, number)) = largest else {
            return false;
        };
        if held < bytes {
            return false;
        }
        if let Some(body) = bodies.1.remove(&number) {
            body.give_up.notify_one();
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, Arc<Incomplete>>)> {
        // Nothing in here panics halfway through a change, so what a poisoned lock guards is whole.
        self.bodies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.pending.lock().1.remove(&self.number);
    }
}
