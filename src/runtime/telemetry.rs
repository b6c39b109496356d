//! Logs: text on a terminal, JSON everywhere else, one record a line, on stderr.
//!
//! event -> filter -> line -> queue -> one thread that writes
//!
//! Whoever reads our stderr may stop reading, and then a write blocks. So a request does not write its line but queues
//! it, and when the queue is full, lines are lost and counted instead of admissions delayed. An audit record is written
//! before the call returns: what it tells of has not happened yet.

use std::any::Any;
use std::fmt::Debug;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::panic;
use std::sync::{Mutex, OnceLock, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{FilterExt, ParseError, filter_fn};
use tracing_subscriber::fmt;
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
    /// Somebody else logs already.
    #[error("logging was set up twice in one process")]
    Twice(#[source] TryInitError),
}

/// kube's client logs each failed call as an error of its own, beside ours that say what it was for.
const ALWAYS_QUIET: &str = "kube_client::client::builder=off";

/// Starts to log what `filter` lets through (`RUST_LOG`'s syntax; `info` if there is none), panics included. Audit records
/// go to `audit`: standard error, where collectors look, unless somebody reads a story there.
///
/// # Errors
/// Where the filter cannot be read, or this is the second call.
pub fn init(
    filter: Option<&str>,
    audit: impl Write + Send + 'static,
) -> Result<(), TelemetryError> {
    let filter = filter.unwrap_or("info");
    let filter = EnvFilter::try_new(filter).map_err(|source| TelemetryError::Filter {
        filter: filter.to_owned(),
        source,
    })?;
    let quiet = ALWAYS_QUIET.parse().expect("a directive of ours");
    let filter = filter.add_directive(quiet);
    let (queue, writing) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(QUEUED)
        .thread_name("log")
        .finish(BufWriter::new(io::stderr()));
    let lost = queue.error_counter();
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
    let is_audit = || filter_fn(|metadata| metadata.target() == AUDIT);
    tracing_subscriber::registry()
        .with(lines.with_filter(filter.and(is_audit().not())))
        .with(Audit(Mutex::new(audit)).with_filter(is_audit()))
        .try_init()
        .map_err(TelemetryError::Twice)?;
    let _ = LOST.set(lost);
    *WRITING.lock().unwrap_or_else(PoisonError::into_inner) = Some(writing);
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

/// Waits until what was logged so far is written, at most a second: for the end of the process. What is logged after it
/// is lost.
pub fn flush() {
    drop(
        WRITING
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(),
    );
}

/// Lines that were lost so far because nobody read those before them.
pub fn lines_lost() -> usize {
    LOST.get().map_or(0, ErrorCounter::dropped_lines)
}

/// Lines that may wait to be written: some seconds of a busy webhook, and at most a few MiB.
const QUEUED: usize = 8_192;

/// Held while the thread that writes is to go on.
static WRITING: Mutex<Option<WorkerGuard>> = Mutex::new(None);

static LOST: OnceLock<ErrorCounter> = OnceLock::new();

/// `panic!` carries a literal or a formatted text.
fn message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Writes the message of each event, and nothing else.
struct Audit<W>(Mutex<W>);

impl<S: Subscriber, W: Write + Send + 'static> Layer<S> for Audit<W> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut record = Message(String::new());
        event.record(&mut record);
        record.0.push('\n');
        // There is no other place to say that it cannot be written.
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = out.write_all(record.0.as_bytes());
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
    use super::*;

    #[test]
    fn a_filter_that_makes_no_sense_is_told_with_one_that_does() {
        let error = init(Some("malha=loud=very"), io::sink()).expect_err("no filter");
        assert!(
            error
                .to_string()
                .starts_with("`malha=loud=very` is no log filter; try `info`"),
            "{error}"
        );
    }
}
