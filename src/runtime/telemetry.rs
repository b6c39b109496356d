//! Logs: text on a terminal, JSON everywhere else, one record a line, always on stderr.
//!
//! event -> filter -> line -> queue -> one thread that writes
//!
//! Whoever reads our stderr may stop reading, and then a write blocks. So requests do not write: they queue lines, and
//! when the queue is full, lines are lost and counted instead of admissions delayed. Audit records are never lost: they
//! wait for their place.

use std::any::Any;
use std::fmt::Debug;
use std::io::{self, IsTerminal, Write};
use std::panic;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{FilterExt, ParseError, filter_fn};
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer};

/// Events of this target are audit records: written whatever the filter says, and nothing but their message, so that
/// what is hashed and what is written are the same bytes.
pub const AUDIT: &str = "audit";

/// Why logging cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter makes no sense.
    #[error("`{filter}` is no log filter; try `info`, or `malha=debug,warn`")]
    Filter {
        /// What was asked for.
        filter: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// The thread that writes cannot be had.
    #[error("cannot start the thread that writes the log")]
    Thread(#[source] io::Error),
    /// Somebody else logs already.
    #[error("logging was set up twice in one process")]
    Twice(#[source] TryInitError),
}

/// Starts to log what `filter` lets through (`RUST_LOG`'s syntax; `info` if there is none), panics included.
///
/// # Errors
/// Where the filter cannot be read, or this is the second call.
pub fn init(filter: Option<&str>) -> Result<(), TelemetryError> {
    let filter = filter.unwrap_or("info");
    let filter = EnvFilter::try_new(filter).map_err(|source| TelemetryError::Filter {
        filter: filter.to_owned(),
        source,
    })?;
    let queue = queue()?;
    let lines = if io::stderr().is_terminal() {
        fmt::layer().with_target(false).with_writer(queue).boxed()
    } else {
        fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_writer(queue)
            .boxed()
    };
    let not_audit = filter_fn(|metadata| metadata.target() != AUDIT);
    tracing_subscriber::registry()
        .with(lines.with_filter(filter.and(not_audit)))
        .with(Audit(queue).with_filter(filter_fn(|metadata| metadata.target() == AUDIT)))
        .try_init()
        .map_err(TelemetryError::Twice)?;
    panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        tracing::error!(
            panic = message(panic.payload()),
            place,
            "panicked; this is a bug in malha"
        );
    }));
    Ok(())
}

/// Waits until what was logged so far is written, at most a second: for the end of the process.
pub fn flush() {
    let Some(queue) = QUEUE.get() else { return };
    let (done, written) = sync_channel(1);
    // Written or not, a second later we go.
    let _ = queue.lines.try_send(Item::Flush(done));
    let _ = written.recv_timeout(Duration::from_secs(1));
}

/// `panic!` carries a literal or a formatted text.
fn message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

static QUEUE: OnceLock<Queue> = OnceLock::new();

/// Lines that wait to be written: some seconds of a busy webhook, and at most a few MiB.
const QUEUED: usize = 8_192;

fn queue() -> Result<&'static Queue, TelemetryError> {
    if let Some(queue) = QUEUE.get() {
        return Ok(queue);
    }
    let (lines, queued) = sync_channel(QUEUED);
    thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write(&queued, &mut io::stderr()))
        .map_err(TelemetryError::Thread)?;
    Ok(QUEUE.get_or_init(|| Queue {
        lines,
        lost: AtomicU64::new(0),
    }))
}

/// Where lines wait.
#[derive(Debug)]
struct Queue {
    lines: SyncSender<Item>,
    lost: AtomicU64,
}

#[derive(Debug)]
enum Item {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

/// Writes what is queued, as many lines at once as there are. What cannot be written is gone: there is nobody to tell.
fn write(queued: &Receiver<Item>, out: &mut impl Write) {
    let mut batch = Vec::new();
    while let Ok(first) = queued.recv() {
        let mut flushed = Vec::new();
        let mut next = Some(first);
        while let Some(item) = next {
            match item {
                Item::Line(line) => batch.extend_from_slice(&line),
                Item::Flush(done) => flushed.push(done),
            }
            next = (batch.len() < BATCH_BYTES)
                .then(|| queued.try_recv().ok())
                .flatten();
        }
        let _ = out.write_all(&batch).and_then(|()| out.flush());
        batch.clear();
        for done in flushed {
            let _ = done.send(());
        }
    }
}

const BATCH_BYTES: usize = 64 << 10;

impl Queue {
    /// Queues a line, or counts it as lost. The next one that finds a place says how many were.
    fn offer(&self, line: &[u8]) {
        match self.lines.try_send(Item::Line(line.to_vec())) {
            Ok(()) => {
                if self.lost.load(Ordering::Relaxed) > 0 {
                    let lost = self.lost.swap(0, Ordering::Relaxed);
                    let note = format!(
                        "{{\"level\":\"WARN\",\"message\":\"log lines lost\",\"lost\":{lost}}}\n"
                    );
                    let _ = self.lines.try_send(Item::Line(note.into_bytes()));
                }
            }
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Queues a line, however long that takes.
    fn insist(&self, line: Vec<u8>) {
        let _ = self.lines.send(Item::Line(line));
    }
}

impl MakeWriter<'_> for &'static Queue {
    type Writer = Offer;

    fn make_writer(&self) -> Offer {
        Offer(self)
    }
}

/// What the formatter writes into: each record in one piece.
struct Offer(&'static Queue);

impl Write for Offer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.offer(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes the message of each event, and nothing else.
struct Audit(&'static Queue);

impl<S: Subscriber> Layer<S> for Audit {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut record = Message(String::new());
        event.record(&mut record);
        record.0.push('\n');
        self.0.insist(record.0.into_bytes());
    }
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[test]
    fn lines_are_written_in_their_order_and_a_flush_waits_for_them() {
        let (lines, queued) = sync_channel(10);
        let (done, written) = sync_channel(1);
        for line in ["one\n", "two\n"] {
            lines.send(Item::Line(line.into())).expect("queued");
        }
        lines.send(Item::Flush(done)).expect("queued");
        drop(lines);
        let mut out = Vec::new();
        write(&queued, &mut out);
        assert_eq!(out, b"one\ntwo\n");
        written.recv().expect("told");
    }

    #[test]
    fn a_full_queue_loses_lines_and_says_so_later() {
        let (lines, queued) = sync_channel(2);
        let queue = Queue {
            lines,
            lost: AtomicU64::new(0),
        };
        for _ in 0..5 {
            queue.offer(b"line\n");
        }
        let mut out = Vec::new();
        out.extend(queued.try_iter());
        assert_eq!(out.len(), 2);
        queue.offer(b"line\n");
        let told: Vec<_> = queued.try_iter().collect();
        let [Item::Line(_), Item::Line(note)] = told.as_slice() else {
            panic!("{told:?}");
        };
        let note: serde_json::Value = serde_json::from_slice(note).expect("JSON");
        assert_eq!(note["lost"], 3);
    }

    #[test]
    fn a_filter_that_makes_no_sense_is_told_with_one_that_does() {
        let error = init(Some("malha=loud=very")).expect_err("no filter");
        assert!(
            error
                .to_string()
                .starts_with("`malha=loud=very` is no log filter; try `info`"),
            "{error}"
        );
    }
}
