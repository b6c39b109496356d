//! Logs: text on a terminal, JSON everywhere else, one record a line, on stderr.

use std::io::{self, IsTerminal};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    Layer, filter::Targets, fmt, layer::SubscriberExt, util::SubscriberInitExt,
};

use super::settings::Level;

/// Begins to log; crates of others only what goes wrong, unless everything is wanted.
pub fn init(level: Level) {
    let own = filter(level);
    let others = match level {
        Level::Trace => own,
        _ => own.min(LevelFilter::WARN),
    };
    let targets = Targets::new()
        .with_default(others)
        .with_target("malha", own);
    let targets = targets.with_target("malha_agent", own);
    let layer = match io::stderr().is_terminal() {
        true => fmt::layer()
            .with_writer(io::stderr)
            .with_target(false)
            .boxed(),
        false => fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_writer(io::stderr)
            .boxed(),
    };
    // A second call, in a test, finds the first one's.
    let _ = tracing_subscriber::registry()
        .with(layer.with_filter(targets))
        .try_init();
}

fn filter(level: Level) -> LevelFilter {
    match level {
        Level::Trace => LevelFilter::TRACE,
        Level::Debug => LevelFilter::DEBUG,
        Level::Info => LevelFilter::INFO,
        Level::Warning => LevelFilter::WARN,
        Level::Error | Level::Critical => LevelFilter::ERROR,
        Level::Off => LevelFilter::OFF,
    }
}
