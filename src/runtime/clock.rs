//! The real clock.

use jiff::Timestamp;

use crate::clock::Clock;

/// The system's clock. Everything below the shell is handed this one, and tests hand another.
#[allow(
    clippy::disallowed_methods,
    reason = "the one place where the process asks the system for the time"
)]
pub fn system() -> Clock {
    Clock::new(Timestamp::now)
}
