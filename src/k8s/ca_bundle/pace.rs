//! How soon a drift may be repaired: at once, but never in a fight.

use std::time::Duration;

use tokio::time::Instant;

/// Two writes are at least this far apart.
const APART: Duration = Duration::from_secs(1);

/// Whoever undoes a write sooner than this reacts to it: another controller, not a person or a timer.
const AT_ONCE: Duration = Duration::from_millis(300);

/// So many writes may be undone at once before the pauses grow: a script that applies a file in a loop also hits us right
/// after a write now and then.
const PATIENCE: u32 = 3;

/// The longest pause.
const LONGEST: Duration = Duration::from_secs(60);

/// When the next write may be.
///
/// A first drift is repaired at once. Drifts that come again, every second or every hour, are repaired within
/// [`APART`] of the last write each: the object is wrong for at most a second, and the API server sees at most a write a
/// second. Only somebody who undoes each write in the moment it is made, so that nothing is gained by it, makes the pauses
/// grow: 1, 1, 1, 2, 4 .. 60 s.
#[derive(Debug, Default)]
pub(super) struct Pace {
    last: Option<Instant>,
    undone_at_once: u32,
    failures: u32,
    misses: u32,
    not_before: Option<Instant>,
}

impl Pace {
    /// A drift was noticed at `now`: when it may be repaired.
    pub(super) fn drifted(&mut self, now: Instant) -> Instant {
        let now = self
            .not_before
            .map_or(now, |not_before| now.max(not_before));
        let Some(last) = self.last else {
            return now;
        };
        if now.saturating_duration_since(last) < AT_ONCE {
            self.undone_at_once = self.undone_at_once.saturating_add(1);
        } else {
            self.undone_at_once = 0;
        }
        let doublings = self.undone_at_once.saturating_sub(PATIENCE).min(6);
        let pause = (APART * 2_u32.pow(doublings)).min(LONGEST);
        now.max(last + pause)
    }

    /// The bundle was written.
    pub(super) fn wrote(&mut self, now: Instant) {
        self.last = Some(now);
        self.failures = 0;
        self.misses = 0;
        self.not_before = None;
    }

    /// The API server refused the write, or did not answer.
    pub(super) fn failed(&mut self, now: Instant) {
        let pause = APART * 2_u32.pow(self.failures.min(6));
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(now + pause.min(LONGEST));
    }

    /// The object was changed between our read and our write.
    pub(super) fn missed(&mut self, now: Instant) {
        let pause = Duration::from_millis(20) * 2_u32.pow(self.misses.min(6));
        self.misses = self.misses.saturating_add(1);
        self.not_before = Some(now + pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Plays an opponent who undoes each write `after` it was made; the pauses between our writes.
    fn fight(after: f64, writes: usize) -> Vec<f64> {
        let start = Instant::now();
        let mut pace = Pace::default();
        let mut now = pace.drifted(start);
        let mut pauses = Vec::new();
        for _ in 0..writes {
            pace.wrote(now);
            let next = pace.drifted(now + secs(after));
            pauses.push(((next - now).as_secs_f64() * 100.0).round() / 100.0);
            now = next;
        }
        pauses
    }

    #[test]
    fn the_first_drift_is_repaired_at_once() {
        let now = Instant::now();
        assert_eq!(Pace::default().drifted(now), now);
    }

    #[test]
    fn drifts_that_keep_coming_are_each_repaired_within_a_second() {
        assert_eq!(
            fight(3.0, 200),
            vec![3.0; 200],
            "every 3 s: no pause at all"
        );
        assert_eq!(
            fight(0.9, 200),
            vec![1.0; 200],
            "a hair under a second: a write a second"
        );
        assert_eq!(fight(0.4, 200), vec![1.0; 200]);
    }

    #[test]
    fn an_opponent_who_undoes_each_write_at_once_meets_growing_pauses() {
        assert_eq!(
            fight(0.01, 12),
            [
                1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0
            ]
        );
    }

    #[test]
    fn a_slow_drift_after_a_fight_is_repaired_at_once() {
        let mut pace = Pace::default();
        let mut now = Instant::now();
        for _ in 0..20 {
            pace.wrote(now);
            now = pace.drifted(now + secs(0.01));
        }
        pace.wrote(now);
        let later = now + secs(5.0);
        assert_eq!(pace.drifted(later), later);
    }

    #[test]
    fn refused_writes_are_tried_again_with_growing_pauses() {
        let now = Instant::now();
        let mut pace = Pace::default();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            pace.failed(now);
            pauses.push((pace.drifted(now) - now).as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        pace.wrote(now);
        pace.failed(now);
        assert_eq!((pace.drifted(now) - now).as_secs(), 1);
    }

    #[test]
    fn a_lost_race_is_run_again_soon() {
        let now = Instant::now();
        let mut pace = Pace::default();
        pace.missed(now);
        assert_eq!((pace.drifted(now) - now).as_millis(), 20);
        for _ in 0..20 {
            pace.missed(now);
        }
        assert_eq!((pace.drifted(now) - now).as_millis(), 1280);
    }
}
