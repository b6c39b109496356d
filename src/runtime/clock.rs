//! The real clock, and a watch on it.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use nix::time::{ClockId, clock_gettime};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;

/// The system's clock. Everything below the shell is handed this one, and tests hand another.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place where the process asks the system for the time"
)]
pub fn system() -> Clock {
    Clock::new(Timestamp::now)
}

/// Watches `clock` for jumps: a second, more or less, must pass for it in every second of the machine.
pub fn jumps(clock: Clock, tolerance: Duration) -> Jumps {
    let (tell, told) = watch::channel(None);
    let (rebase, rebased) = mpsc::channel(1);
    Jumps {
        clock,
        tolerance,
        tell,
        told,
        rebase,
        rebased,
    }
}

/// A watch on a clock, not begun yet.
pub struct Jumps {
    clock: Clock,
    tolerance: Duration,
    tell: watch::Sender<Option<SignedDuration>>,
    told: watch::Receiver<Option<SignedDuration>>,
    rebase: mpsc::Sender<()>,
    rebased: mpsc::Receiver<()>,
}

/// Says that the clock is right as it is now.
#[derive(Clone, Debug)]
pub struct Rebase(mpsc::Sender<()>);

impl Jumps {
    /// How far the clock is from where it should be, while that is more than the tolerance; positive when it is ahead.
    pub fn told(&self) -> watch::Receiver<Option<SignedDuration>> {
        self.told.clone()
    }

    /// For whoever learns from elsewhere, as from the date of an API server's answer, that the new time is right.
    pub fn rebase(&self) -> Rebase {
        Rebase(self.rebase.clone())
    }

    /// Looks each second until `stop`.
    pub async fn watch(mut self, stop: CancellationToken) {
        let Ok(start) = since_boot() else {
            tracing::warn!(
                "this system has no clock that never jumps; jumps of the wall clock go unnoticed"
            );
            return stop.cancelled().await;
        };
        let mut pace = Pace::new(self.clock.now(), start, self.tolerance);
        let mut look = interval(Duration::from_secs(1));
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(()) = self.rebased.recv() => if let Ok(steady) = since_boot() {
                    pace = Pace::new(self.clock.now(), steady, self.tolerance);
                },
                _ = look.tick() => {}
            }
            if let Ok(steady) = since_boot() {
                let jump = pace.jump(self.clock.now(), steady);
                self.tell.send_if_modified(|told| note(told, jump));
            }
        }
    }
}

impl Rebase {
    /// From here on, what the clock says now is right.
    pub fn accept(&self) {
        // One that waits already will do the same.
        let _ = self.0.try_send(());
    }
}

/// Publishes a jump where it begins or ends; in between only its size differs, by milliseconds.
fn note(told: &mut Option<SignedDuration>, jump: Option<SignedDuration>) -> bool {
    let changed = told.is_some() != jump.is_some();
    match jump {
        Some(by) if changed => tracing::error!(
            seconds = by.as_secs(),
            "the clock jumped; nothing is signed until it is right again"
        ),
        None if changed => tracing::info!("the clock is right again"),
        _ => {}
    }
    *told = jump;
    changed
}

/// Time since the machine started, sleep included: nothing can set it.
fn since_boot() -> nix::Result<Duration> {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from)
}

/// Where a wall clock belongs, told by one that cannot be set.
#[derive(Clone, Copy, Debug)]
struct Pace {
    wall: Timestamp,
    steady: Duration,
    tolerance: Duration,
}

impl Pace {
    fn new(wall: Timestamp, steady: Duration, tolerance: Duration) -> Self {
        Self {
            wall,
            steady,
            tolerance,
        }
    }

    /// How far `wall` is ahead of where it belongs at `steady`, or behind it, if that is more than the tolerance.
    fn jump(&self, wall: Timestamp, steady: Duration) -> Option<SignedDuration> {
        let passed = SignedDuration::try_from(steady.saturating_sub(self.steady)).ok()?;
        let by = wall.duration_since(self.wall) - passed;
        (by.unsigned_abs() > self.tolerance).then_some(by)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_keeps_pace_has_not_jumped() {
        let pace = pace();
        for (wall, steady) in [
            (0, 0),
            (3_600, 3_600),
            (3_600 + 299, 3_600),
            (86_400, 86_400 + 300),
        ] {
            assert_eq!(pace.jump(at(wall), Duration::from_secs(steady)), None);
        }
    }

    #[test]
    fn a_jump_is_told_with_its_direction() {
        let pace = pace();
        for (wall, steady, by) in [
            (3_600 + 301, 3_600, 301),
            (0, 301, -301),
            (-86_400, 10, -86_410),
        ] {
            assert_eq!(
                pace.jump(at(wall), Duration::from_secs(steady)),
                Some(SignedDuration::from_secs(by))
            );
        }
    }

    fn pace() -> Pace {
        Pace::new(at(0), Duration::ZERO, Duration::from_secs(300))
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).expect("in range")
    }
}
