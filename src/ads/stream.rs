//! One stream, from its first request to its end.
//!
//! It writes only when its reader has room: until then what changed waits in its session as names. Requests are read in
//! between, by the same future; there is no task to own.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::Response,
};
use futures::{StreamExt as _, future::BoxFuture, stream::BoxStream};
use prost::Message as _;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status, Streaming,
    server::{Grpc, StreamingService},
};
use tonic_prost::ProstCodec;

use super::{
    Book, Flight, Hub, Seat,
    caller::{Caller, Stranger},
    lock,
    metrics::Entered,
    number,
    wire::{self, Program},
};
use crate::{
    tls::{Leaving, Peer},
    xds::{
        Kind,
        delta::{self, Answer, Heard, Pace, Push},
    },
};

pub(super) async fn serve(State(hub): State<Arc<Hub>>, request: Request) -> Response<Body> {
    let mut grpc = Grpc::new(ProstCodec::<wire::Response, wire::Request>::default())
        .max_decoding_message_size(hub.limits.request_bytes);
    grpc.streaming(Opening(hub), request).await.map(Body::new)
}

/// State-of-the-world sends everything for each change of one thing.
pub(super) async fn not_served() -> Response<Body> {
    let why = "state-of-the-world discovery is not served; set api_type: DELTA_GRPC in the proxy's ads_config";
    Status::unimplemented(why).into_http()
}

struct Opening(Arc<Hub>);

type Responses = BoxStream<'static, Result<wire::Response, Status>>;

impl StreamingService<wire::Request> for Opening {
    type Response = wire::Response;
    type ResponseStream = Responses;
    type Future = BoxFuture<'static, Result<tonic::Response<Responses>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<wire::Request>>) -> Self::Future {
        let hub = self.0.clone();
        Box::pin(async move {
            let metrics = hub.metrics.clone();
            match open(hub, request).await {
                Ok(stream) => Ok(tonic::Response::new(stream.responses())),
                Err(Refused(reason, status)) => {
                    metrics.refused(reason);
                    Err(status)
                }
            }
        })
    }
}

/// Why there is no stream: for the metric, and for the client.
struct Refused(&'static str, Status);

impl From<Stranger> for Refused {
    fn from(stranger: Stranger) -> Self {
        Self(stranger.code(), stranger.into())
    }
}

async fn open(
    hub: Arc<Hub>,
    request: tonic::Request<Streaming<wire::Request>>,
) -> Result<Stream, Refused> {
    let peer = request.extensions().get::<Peer>().cloned();
    let leaving = request.extensions().get::<Leaving>();
    let leaving = leaving.map_or_else(|| hub.stop.clone(), |leaving| leaving.0.clone());
    let mut requests = request.into_inner();
    let first = match timeout(hub.limits.first_request, requests.message()).await {
        Ok(Ok(Some(first))) => first,
        Ok(Ok(None)) => return Err(Refused("NoRequest", Status::cancelled("no request came"))),
        Ok(Err(status)) => return Err(Refused("BadRequest", status)),
        Err(_) => {
            let status = Status::deadline_exceeded("the first request took too long to arrive");
            return Err(Refused("NoRequest", status));
        }
    };
    let node = first.node.as_ref();
    let caller = hub.recognise(peer.as_ref(), node).await;
    let caller = caller.inspect_err(|error| {
        let node = node.map(|node| node.id.as_str());
        tracing::info!(node, reason = error.code(), %error, "a client is told no configuration");
    })?;
    let seat = hub.seat(caller, node)?;
    let stream = Stream {
        _counted: hub.metrics.enter(),
        seat,
        hub,
        requests,
        leaving,
        late: None,
        over: false,
    };
    stream
        .hear(&first)
        .map_err(|status| Refused("BadRequest", status))?;
    Ok(stream)
}

impl Hub {
    fn seat(&self, caller: Caller, node: Option<&wire::Node>) -> Result<Arc<Seat>, Stranger> {
        let mut streams = lock(&self.streams);
        let open = streams.by_proxy.get(&caller.proxy).map_or(0, |it| it.len());
        if open >= self.limits.streams_of_a_proxy {
            return Err(Stranger::TooManyStreams(caller.proxy));
        }
        let seat = Arc::new(Seat {
            number: number(&self.next),
            proxy: caller.proxy,
            identity: caller.identity,
            certificate_ends: caller.certificate_ends,
            since: self.clock.now(),
            program: node.map_or_else(|| Program::Other(String::new()), wire::Node::program),
            wake: tokio::sync::Notify::new(),
            book: std::sync::Mutex::new(Book::default()),
        });
        streams.enter(seat.clone());
        drop(streams);
        tracing::debug!(proxy = %seat.proxy, program = ?seat.program, "connected");
        self.progressed.send_replace(());
        Ok(seat)
    }
}

struct Stream {
    hub: Arc<Hub>,
    seat: Arc<Seat>,
    requests: Streaming<wire::Request>,
    leaving: CancellationToken,
    /// Counted while an answer is late.
    late: Option<Entered>,
    over: bool,
    _counted: Entered,
}

/// What to do next.
enum Turn {
    Request(Box<wire::Request>),
    Look,
    End(Option<Refused>),
}

impl Stream {
    fn responses(self) -> Responses {
        let next = |mut stream: Self| async move {
            let next = stream.next().await?;
            stream.over = next.is_err();
            Some((next, stream))
        };
        futures::stream::unfold(self, next).boxed()
    }

    async fn next(&mut self) -> Option<Result<wire::Response, Status>> {
        if self.over {
            return None;
        }
        loop {
            if let Some(response) = self.say() {
                return Some(Ok(response));
            }
            let heard = match self.turn().await {
                Turn::Request(request) => {
                    self.hear(&request).map_err(|it| Refused("BadRequest", it))
                }
                Turn::Look => self.still_itself(),
                Turn::End(None) => return None,
                Turn::End(Some(refused)) => Err(refused),
            };
            if let Err(Refused(reason, status)) = heard {
                tracing::info!(proxy = %self.seat.proxy, reason, error = status.message(), "a stream is ended");
                self.hub.metrics.refused(reason);
                return Some(Err(status));
            }
        }
    }

    async fn turn(&mut self) -> Turn {
        let oldest = lock(&self.seat.book)
            .flights
            .values()
            .map(|it| it.sent)
            .min();
        let limits = &self.hub.limits;
        if let Some(sent) = oldest
            && sent.elapsed() >= limits.lost
        {
            let text = "a response has gone without an answer for too long; connect again";
            return Turn::End(Some(Refused("NoAnswer", Status::deadline_exceeded(text))));
        }
        let is_late = oldest.is_some_and(|sent| sent.elapsed() >= limits.late);
        if is_late && self.late.is_none() {
            tracing::warn!(proxy = %self.seat.proxy, "a response has no answer yet; is the proxy overloaded, or does a cluster not get warm?");
        }
        self.late = is_late.then(|| self.late.take().unwrap_or_else(|| self.hub.metrics.late()));
        let next = oldest.map(|sent| {
            let looks = [limits.warming, limits.late, limits.lost].map(|after| sent + after);
            let next = looks.into_iter().find(|look| *look > Instant::now());
            next.unwrap_or_else(Instant::now)
        });
        let look = async {
            match next {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.leaving.cancelled() => Turn::End(None),
            () = self.hub.stop.cancelled() => Turn::End(None),
            request = self.requests.message() => match request {
                Ok(Some(request)) => Turn::Request(Box::new(request)),
                // a connection that broke has nobody to tell
                Ok(None) | Err(_) => Turn::End(None),
            },
            () = self.seat.wake.notified() => Turn::Look,
            () = look => Turn::Look,
        }
    }

    /// A pod's name may be used again by another account while its old stream is open.
    fn still_itself(&self) -> Result<(), Refused> {
        Ok(self.hub.check(&self.seat.proxy, &self.seat.identity)?)
    }

    /// The next response, if there is anything to say.
    fn say(&self) -> Option<wire::Response> {
        let mut book = lock(&self.seat.book);
        let warming = book.flights.values().any(|flight| {
            flight.kind == Kind::Cluster && flight.sent.elapsed() < self.hub.limits.warming
        });
        let pace = Pace {
            bytes: self.hub.limits.response_bytes,
            wait_for_clusters: warming,
        };
        let push = book.session.next(&self.hub.own(&self.seat.proxy), pace);
        let Some(push) = push else {
            // what was touched turned out to be no news
            book.settle();
            return None;
        };
        let touched = book.touched.remove(&push.kind);
        let flight = Flight {
            kind: push.kind,
            sent: Instant::now(),
            touched,
        };
        book.flights.insert(push.nonce, flight);
        drop(book);
        Some(self.written(&push, touched))
    }

    fn written(&self, push: &Push, touched: Option<Instant>) -> wire::Response {
        let response = wire::Response::of(push);
        let bytes = response.encoded_len();
        let told = push.resources.len() + push.removed.len();
        let took = touched.map(|touched| touched.elapsed());
        self.hub.metrics.pushed(push.kind, took, bytes, told);
        tracing::debug!(
            proxy = %self.seat.proxy,
            kind = push.kind.label(),
            resources = push.resources.len(),
            removed = push.removed.len(),
            bytes,
            "pushed"
        );
        response
    }

    fn hear(&self, request: &wire::Request) -> Result<(), Status> {
        let Some(kind) = Kind::of_type_url(&request.type_url) else {
            // Envoy may ask for more than we serve, such as SRDS; it goes on without, and so do we
            tracing::debug!(proxy = %self.seat.proxy, r#type = request.type_url, "asked for a type that is not served");
            return Ok(());
        };
        let borrowed = delta::Request {
            subscribe: request.subscribe.iter().map(String::as_str).collect(),
            unsubscribe: request.unsubscribe.iter().map(String::as_str).collect(),
            held: request
                .held
                .iter()
                .map(|(name, version)| (name.as_str(), version.as_str()))
                .collect(),
            nonce: &request.nonce,
            error: request.error.as_ref().map(|error| error.message.as_str()),
        };
        let mut book = lock(&self.seat.book);
        let heard = book
            .session
            .hear(kind, &borrowed, &self.hub.own(&self.seat.proxy));
        if let Some((nonce, answer)) = &heard.answer {
            let text = borrowed.error.unwrap_or_default();
            self.note(&mut book, kind, *nonce, answer, text);
        }
        drop(book);
        self.index(kind, &heard);
        Ok(())
    }

    fn note(&self, book: &mut Book, kind: Kind, nonce: u64, answer: &Answer, text: &str) {
        let flight = book.flights.remove(&nonce);
        match answer {
            Answer::Acked => {
                book.acked.insert(kind, self.hub.clock.now());
                if let Some(touched) = flight.and_then(|flight| flight.touched) {
                    self.hub.metrics.converged(kind, touched.elapsed());
                }
            }
            Answer::Refused(_) | Answer::Suspected(_) => {
                self.hub.metrics.nacked(kind);
                let blamed: &[_] = match answer {
                    Answer::Refused(blamed) => blamed,
                    Answer::Acked | Answer::Suspected(_) => &[],
                };
                let text: String = text.chars().take(1024).collect();
                let resources = blamed.iter().map(|(name, _)| &**name).collect::<Vec<_>>();
                tracing::warn!(proxy = %self.seat.proxy, kind = kind.label(), ?resources, text, "a proxy refused configuration; it keeps what it had");
            }
        }
        self.hub.progressed.send_replace(());
    }

    /// Before anything is looked up for these names: a change that comes later finds them in the index.
    fn index(&self, kind: Kind, heard: &Heard) {
        if heard.subscribed.is_empty() && heard.unsubscribed.is_empty() {
            return;
        }
        let mut streams = lock(&self.hub.streams);
        for name in &heard.unsubscribed {
            streams.unsubscribe(kind, name, self.seat.number);
        }
        for name in &heard.subscribed {
            streams.subscribe(kind, name, self.seat.number);
        }
    }
}

impl Book {
    fn settle(&mut self) {
        let session = &self.session;
        self.touched
            .retain(|kind, _| session.in_flight(*kind) || session.in_flight(Kind::Cluster));
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        lock(&self.hub.streams).leave(&self.seat);
        tracing::debug!(proxy = %self.seat.proxy, program = ?self.seat.program, "disconnected");
        self.hub.progressed.send_replace(());
    }
}
