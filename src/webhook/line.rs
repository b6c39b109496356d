//! One log line for each decision.

use std::fmt::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::display;

use crate::inject::Reason;
use crate::webhook::review::Review;

/// Whom a request was about, fit for a log. Empty where it could not be read.
#[derive(Debug, Default)]
pub(super) struct Subject {
    uid: String,
    namespace: String,
    /// The pod's name, or the beginning of one.
    name: String,
    pub(super) dry_run: bool,
}

impl Subject {
    pub(super) fn of(review: &Review<'_>) -> Self {
        Self {
            uid: excerpt(&review.uid),
            namespace: excerpt(&review.namespace),
            name: excerpt(&review.object_name().unwrap_or_default()),
            dry_run: review.dry_run,
        }
    }
}

/// What is logged of one request.
pub(super) struct Line<'a> {
    pub(super) reason: Reason,
    pub(super) subject: &'a Subject,
    pub(super) message: Option<&'a str>,
    pub(super) took: Duration,
}

/// Lines a second about requests that are no reviews: whoever sends garbage must not fill the disk with it.
const REFUSALS_A_SECOND: u32 = 10;

/// The room, not the file, is what a filter names.
const LOG: &str = "malha::webhook";

static REFUSALS: Throttle = Throttle::new(REFUSALS_A_SECOND);

impl Line<'_> {
    /// Writes it: a decision as information, a caller's fault as a warning, and ours as an error.
    pub(super) fn write(&self) {
        let Subject {
            uid,
            namespace,
            name,
            dry_run,
        } = self.subject;
        let reason = self.reason;
        let took_us = u64::try_from(self.took.as_micros()).unwrap_or(u64::MAX);
        let detail = self.message.map(excerpt).map(display);
        match reason {
            Reason::Internal => {
                tracing::error!(target: LOG, %reason, detail, %namespace, %name, %uid, dry_run, took_us, "admission failed");
            }
            Reason::BadRequest | Reason::Overloaded => {
                if let Some(silenced) = REFUSALS.grant(Instant::now()) {
                    tracing::warn!(target: LOG, %reason, detail, %namespace, %name, %uid, took_us, silenced, "request refused");
                }
            }
            _ => {
                tracing::info!(target: LOG, %reason, detail, %namespace, %name, %uid, dry_run, took_us, "admission");
            }
        }
    }
}

/// Longer than any name of Kubernetes, and than most messages of ours.
const EXCERPT_CHARS: usize = 512;

/// Text from outside, on one line and not endless.
pub(super) fn excerpt(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(EXCERPT_CHARS));
    for (place, char) in text.chars().enumerate() {
        if place == EXCERPT_CHARS {
            line.push('…');
            break;
        }
        // Controls, and what some viewers take for the end of a line.
        if char.is_control() || matches!(char, '\u{2028}' | '\u{2029}') {
            let _ = write!(line, "{}", char.escape_default());
        } else {
            line.push(char);
        }
    }
    line
}

/// So many a second, and a count of the others.
#[derive(Debug)]
struct Throttle {
    a_second: u32,
    state: Mutex<Second>,
}

#[derive(Debug)]
struct Second {
    began: Option<Instant>,
    granted: u32,
    silenced: u64,
}

impl Throttle {
    const fn new(a_second: u32) -> Self {
        Self {
            a_second,
            state: Mutex::new(Second {
                began: None,
                granted: 0,
                silenced: 0,
            }),
        }
    }

    /// How many were silenced since the last one that was not, or `None` for one more.
    fn grant(&self, now: Instant) -> Option<u64> {
        let mut second = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let over = |began: Instant| now.duration_since(began) >= Duration::from_secs(1);
        if second.began.is_none_or(over) {
            second.began = Some(now);
            second.granted = 0;
        }
        if second.granted == self.a_second {
            second.silenced += 1;
            return None;
        }
        second.granted += 1;
        Some(std::mem::take(&mut second.silenced))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_outside_stays_on_one_line() {
        assert_eq!(excerpt("web-1"), "web-1");
        assert_eq!(excerpt("a\nb\r\u{1b}[31m\0é"), "a\\nb\\r\\u{1b}[31m\\u{0}é");
        assert_eq!(
            excerpt(&"x".repeat(9_999)).chars().count(),
            EXCERPT_CHARS + 1
        );
    }

    #[test]
    fn a_flood_of_refusals_is_counted_and_not_told() {
        let throttle = Throttle::new(2);
        let start = Instant::now();
        let granted: Vec<_> = (0..5).map(|_| throttle.grant(start)).collect();
        assert_eq!(granted, [Some(0), Some(0), None, None, None]);
        assert_eq!(throttle.grant(start + Duration::from_secs(1)), Some(3));
    }
}
