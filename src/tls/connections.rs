//! The connections of one listener: what each one is waiting for, since when, and which of them goes first.
//!
//! A connection's own task notes its stage in one atomic word; the accept loop reads them all when it must choose. So a
//! request costs no lock and no timer, and a thousand idle connections cost one glance a quarter of a second.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::tls::Limits;

/// What a connection is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The peer owes its ClientHello.
    Hello,
    /// We owe the handshake's arithmetic.
    Handshake,
    /// The peer owes the rest of the handshake.
    Finished,
    /// The peer owes a request's head: the first one, or one that it has begun.
    Head,
    /// The peer owes a request's body.
    Body,
    /// We owe an answer.
    Serving,
    /// Streams of HTTP/2 are open; each is its service's to bound.
    Streaming,
    /// Nobody owes anything.
    Idle,
    /// Both sides have said goodbye; what is still under way is read and thrown away.
    Closing,
}

impl Stage {
    /// In the order of their numbers.
    const ALL: [Self; 9] = [
        Self::Hello,
        Self::Handshake,
        Self::Finished,
        Self::Head,
        Self::Body,
        Self::Serving,
        Self::Streaming,
        Self::Idle,
        Self::Closing,
    ];

    /// How long it may last.
    fn limit(self, limits: &Limits) -> Option<Duration> {
        match self {
            Self::Hello | Self::Handshake | Self::Finished => Some(limits.handshake),
            Self::Head => Some(limits.head),
            Self::Body | Self::Serving => Some(limits.request),
            Self::Idle => Some(limits.idle),
            Self::Closing => Some(limits.linger),
            Self::Streaming => None,
        }
    }

    /// What may be done about it when a newcomer finds no place.
    fn claim(self) -> Claim {
        match self {
            Self::Hello | Self::Finished | Self::Head | Self::Body | Self::Closing => Claim::Weak,
            Self::Idle => Claim::Proven,
            Self::Handshake | Self::Serving | Self::Streaming => Claim::Strong,
        }
    }
}

/// How well a connection holds its place.
///
/// Whoever opens connections without using them pushes out its own kind, and never those that carry requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    /// Its peer makes us wait.
    Weak,
    /// It has been served, and may be used again.
    Proven,
    /// Its peer waits for us.
    Strong,
}

/// One connection's stage, written by its task and read by the accept loop.
#[derive(Debug)]
pub(crate) struct Connection {
    epoch: Instant,
    /// Milliseconds since `epoch` at which the stage began, and in the lowest four bits its number. One word, so that
    /// both are read together.
    stage: AtomicU64,
    /// Requests being served; more than one only over HTTP/2.
    requests: AtomicU32,
}

const STAGE_BITS: u32 = 4;

impl Connection {
    fn new(epoch: Instant) -> Self {
        let connection = Self {
            epoch,
            stage: AtomicU64::new(0),
            requests: AtomicU32::new(0),
        };
        connection.enter(Stage::Hello);
        connection
    }

    /// Notes that `stage` begins now.
    pub(crate) fn enter(&self, stage: Stage) {
        let since = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        let word = (since << STAGE_BITS) | stage as u64;
        self.stage.store(word, Ordering::Relaxed);
    }

    /// The stage of now.
    pub(crate) fn stage(&self) -> Stage {
        self.read().0
    }

    /// A request's head is there, and this stage begins.
    pub(crate) fn begin(&self, stage: Stage) {
        if self.requests.fetch_add(1, Ordering::Relaxed) == 0 {
            self.enter(stage);
        }
    }

    /// A request's body is there.
    pub(crate) fn received(&self) {
        if self.stage() == Stage::Body {
            self.enter(Stage::Serving);
        }
    }

    /// A request is answered, or given up.
    pub(crate) fn end(&self) {
        if self.requests.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.enter(Stage::Idle);
        }
    }

    fn read(&self) -> (Stage, Duration) {
        let word = self.stage.load(Ordering::Relaxed);
        let number = (word & ((1 << STAGE_BITS) - 1)) as usize;
        let stage = Stage::ALL
            .get(number)
            .copied()
            .expect("only the numbers of stages are stored");
        (stage, Duration::from_millis(word >> STAGE_BITS))
    }

    fn age(&self, now: Duration) -> (Stage, Duration) {
        let (stage, since) = self.read();
        (stage, now.saturating_sub(since))
    }
}

/// Every open connection of a listener.
#[derive(Debug)]
pub(crate) struct Connections {
    epoch: Instant,
    limits: Limits,
    counts: Counts,
    seats: Mutex<Seats>,
}

#[derive(Debug, Default)]
struct Seats {
    next: u64,
    taken: HashMap<u64, (Arc<Connection>, AbortHandle)>,
}

/// Whether a newcomer finds a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// It does, perhaps because another connection was just closed.
    Free,
    /// Not yet: the others have had no time to show what they want, or it is we who keep them waiting.
    Full,
}

impl Connections {
    pub(crate) fn new(limits: Limits, counts: Counts) -> Arc<Self> {
        Arc::new(Self {
            epoch: Instant::now(),
            limits,
            counts,
            seats: Mutex::default(),
        })
    }

    /// Gives the task that `spawn` starts a seat, which it holds until it ends.
    pub(crate) fn seat(self: &Arc<Self>, spawn: impl FnOnce(Seat) -> AbortHandle) {
        let connection = Arc::new(Connection::new(self.epoch));
        // The lock is held over `spawn`, so that a task which ends at once finds its seat to give back.
        let mut seats = self.lock();
        let number = seats.next;
        seats.next += 1;
        self.counts.accepted.inc();
        self.counts.open.inc();
        let task = spawn(Seat {
            number,
            connection: Arc::clone(&connection),
            connections: Arc::clone(self),
        });
        seats.taken.insert(number, (connection, task));
    }

    /// Looks for a place, and closes another connection for it if need be: the one whose peer makes us wait longest,
    /// else the one that has been idle longest.
    pub(crate) fn make_room(&self) -> Room {
        let mut seats = self.lock();
        if seats.taken.len() < self.limits.connections {
            return Room::Free;
        }
        match self.first_to_go(&seats) {
            Some(number) => {
                self.close(&mut seats, number);
                self.counts.evicted.inc();
                Room::Free
            }
            None => Room::Full,
        }
    }

    fn first_to_go(&self, seats: &Seats) -> Option<u64> {
        let now = self.epoch.elapsed();
        let oldest = |claim: Claim| {
            seats
                .taken
                .iter()
                .filter_map(move |(number, (connection, _))| {
                    let (stage, age) = connection.age(now);
                    (stage.claim() == claim).then_some((age, *number))
                })
                .max()
        };
        match oldest(Claim::Weak) {
            Some((age, number)) => (age >= self.limits.grace).then_some(number),
            None => oldest(Claim::Proven).map(|(_, number)| number),
        }
    }

    /// Closes one connection where one may be closed, although there are places: descriptors or memory are short.
    pub(crate) fn make_way(&self) {
        let mut seats = self.lock();
        if let Some(number) = self.first_to_go(&seats) {
            self.close(&mut seats, number);
            self.counts.evicted.inc();
        }
    }

    /// Closes every connection whose stage has lasted too long.
    pub(crate) fn reap(&self) {
        let mut seats = self.lock();
        let now = self.epoch.elapsed();
        let late: Vec<_> = seats
            .taken
            .iter()
            .filter(|(_, (connection, _))| {
                let (stage, age) = connection.age(now);
                stage.limit(&self.limits).is_some_and(|limit| age > limit)
            })
            .map(|(number, _)| *number)
            .collect();
        for number in late {
            self.close(&mut seats, number);
            self.counts.timed_out.inc();
        }
    }

    /// Closes all of them, and says how many there were.
    pub(crate) fn close_all(&self) -> usize {
        let mut seats = self.lock();
        let all: Vec<_> = seats.taken.keys().copied().collect();
        for number in &all {
            self.close(&mut seats, *number);
        }
        all.len()
    }

    /// Whether none is open.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().taken.is_empty()
    }

    fn close(&self, seats: &mut Seats, number: u64) {
        if let Some((_, task)) = seats.taken.remove(&number) {
            task.abort();
            self.counts.open.dec();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seats> {
        // Nothing in here panics halfway through a change, so what a poisoned lock guards is whole.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place; given back when its task ends, however it ends.
#[derive(Debug)]
pub(crate) struct Seat {
    number: u64,
    connection: Arc<Connection>,
    connections: Arc<Connections>,
}

impl Seat {
    /// Where the task notes its stages.
    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = self.connections.lock();
        if seats.taken.remove(&self.number).is_some() {
            self.connections.counts.open.dec();
        }
    }
}

/// What listeners count, each under its name.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    open: Family<Listener, Gauge>,
    accepted: Family<Listener, Counter>,
    closed: Family<Closed, Counter>,
    handshakes_failed: Family<Listener, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Listener {
    listener: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Closed {
    listener: &'static str,
    cause: &'static str,
}

impl Metrics {
    /// Adds them to `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "malha_listener_connections",
            "Connections that are open",
            self.open.clone(),
        );
        registry.register(
            "malha_listener_accepted",
            "Connections that were accepted",
            self.accepted.clone(),
        );
        registry.register(
            "malha_listener_closed",
            "Connections that were closed by us: timeout, evicted for another one, or no room",
            self.closed.clone(),
        );
        registry.register(
            "malha_listener_handshakes_failed",
            "TLS handshakes that did not succeed",
            self.handshakes_failed.clone(),
        );
    }

    /// Those of one listener.
    pub(crate) fn listener(&self, listener: &'static str) -> Counts {
        let name = Listener { listener };
        let closed = |cause| {
            let label = Closed { listener, cause };
            self.closed.get_or_create_owned(&label)
        };
        Counts {
            open: self.open.get_or_create_owned(&name),
            accepted: self.accepted.get_or_create_owned(&name),
            timed_out: closed("timeout"),
            evicted: closed("evicted"),
            refused: closed("no_room"),
            handshakes_failed: self.handshakes_failed.get_or_create_owned(&name),
        }
    }
}

/// What one listener counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    open: Gauge,
    accepted: Counter,
    timed_out: Counter,
    evicted: Counter,
    pub(crate) refused: Counter,
    pub(crate) handshakes_failed: Counter,
}
