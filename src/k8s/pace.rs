//! How soon a drift may be repaired: at once, but never in a fight.

use std::time::Duration;

use tokio::time::Instant;

/// Drifts are repaired at once as long as there are no more of them than one in this time, on average..
const APART: Duration = Duration::from_secs(1);

/// ..of which so many may come together.
const TOGETHER: u32 = 5;

/// Whoever undoes a write sooner than this reacts to it: another controller, not a person or a timer.
const AT_ONCE: Duration = Duration::from_millis(150);

/// So many writes may be undone at once before the pauses grow: a script that applies a file in a loop also hits us right
/// after a write now and then.
const PATIENCE: u32 = 3;

/// The longest pause.
const LONGEST: Duration = Duration::from_secs(60);

/// When the next write may be.
///
/// Drifts that come again, every second or every hour, are repaired at once, and the API server sees at most a write a
/// second: nobody who applies a file by a timer or by hand leaves the object wrong for longer than that. Only somebody who
/// undoes each write in the moment it is made, so that nothing is gained by it, makes the pauses grow: 1, 2, 4 .. 60 s.
#[derive(Debug, Default)]
pub(super) struct Pace {
    last: Option<Instant>,
    undone_at_once: u32,
    failures: u32,
    misses: u32,
    not_before: Option<Instant>,
    /// When all writes made so far would be paid for at one every [`APART`].
    paid: Option<Instant>,
}

impl Pace {
    /// A drift was noticed at `now`: when it may be repaired.
    pub(super) fn drifted(&mut self, now: Instant) -> Instant {
        let now = self
            .not_before
            .map_or(now, |not_before| now.max(not_before));
        let (Some(last), Some(paid)) = (self.last, self.paid) else {
            return now;
        };
        if now.saturating_duration_since(last) < AT_ONCE {
            self.undone_at_once = self.undone_at_once.saturating_add(1);
        } else {
            self.undone_at_once = 0;
        }
        if self.undone_at_once > PATIENCE {
            let doublings = (self.undone_at_once - PATIENCE - 1).min(6);
            return now.max(last + (APART * 2_u32.pow(doublings)).min(LONGEST));
        }
        let affordable = paid.checked_sub(APART * (TOGETHER - 1));
        now.max(affordable.unwrap_or(now))
    }

    /// The bundle was written.
    pub(super) fn wrote(&mut self, now: Instant) {
        self.last = Some(now);
        self.paid = Some(self.paid.map_or(now, |paid| paid.max(now)) + APART);
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
    fn drifts_by_the_second_are_repaired_at_once() {
        assert_eq!(fight(3.0, 200), vec![3.0; 200]);
        assert_eq!(fight(1.0, 200), vec![1.0; 200]);
    }

    #[test]
    fn a_loop_without_pauses_meets_a_write_a_second() {
        let pauses = fight(0.4, 200);
        let seconds: f64 = pauses.iter().sum();
        assert!(
            (195.0..=200.0).contains(&seconds),
            "{seconds} s for 200 writes"
        );
        assert!(pauses.iter().all(|pause| *pause <= 1.0), "{pauses:?}");
    }

    #[test]
    fn an_opponent_who_undoes_each_write_at_once_meets_growing_pauses() {
        assert_eq!(
            fight(0.01, 12),
            [
                0.01, 0.01, 0.01, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0
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
        assert_eq!(
            pace.drifted(later),
            later,
            "for whoever comes later, the fight is over"
        );
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
