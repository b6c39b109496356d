//! When to ask for the next certificate: a pure function of what is held, what failed, and two clocks.
//!
//! [`Plan`] + [`Moment`] -> [`step`] -> [`Step`]
//!
//! Certificates end by the wall clock, which somebody can set and which goes on while a laptop sleeps; pauses are
//! measured by the steady clock, which does neither. A plan is due when *either* says so: a machine that wakes up renews
//! at once, and a wall clock that is set back does not hold a renewal up.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::ca::Validity;

/// The present instant by both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// What certificates are compared with.
    pub wall: Timestamp,
    /// Time since some fixed point, never set by anybody.
    pub steady: Duration,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Ask for a certificate now.
    Renew,
    /// Nothing for so long. Ask again earlier if the wall clock may have moved.
    Wait(Duration),
}

/// What is known about the next renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    due: Option<Due>,
    /// Tries that failed in a row.
    failures: u32,
    /// Not before this, by the steady clock.
    rests_until: Duration,
}

/// Half of a certificate's life, by both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Due {
    wall: Timestamp,
    steady: Duration,
    validity: Validity,
}

impl Plan {
    /// Nothing is held: due at once.
    pub fn begin() -> Self {
        Self {
            due: None,
            failures: 0,
            rests_until: Duration::ZERO,
        }
    }

    /// A certificate was received.
    ///
    /// The next is asked for after half of what is left of its life, give or take a tenth of that half. Half: with 24 h
    /// leaves a dead control plane may stay dead for about 11 h before the first leaf ends. Spread: a node pool that
    /// started in one minute would otherwise renew in one minute for ever. What is *left*, not the whole life: leaves
    /// are dated back for slow clocks, and a short one would be past its half when it arrives. `dice` is from 0 to 1.
    ///
    /// Whoever wants keys to be younger than that gives a `longest` time between two certificates.
    pub fn renewed(validity: Validity, longest: Option<Duration>, now: Moment, dice: f64) -> Self {
        let left = validity.not_after.duration_since(now.wall);
        let half = Duration::try_from(left).unwrap_or_default() / 2;
        let span = half.mul_f64(0.9 + 0.2 * dice.clamp(0.0, 1.0));
        let span = longest.map_or(span, |longest| span.min(longest));
        Self {
            due: Some(Due {
                wall: now.wall.saturating_add(span).unwrap_or(Timestamp::MAX),
                steady: now.steady.saturating_add(span),
                validity,
            }),
            failures: 0,
            // Below an issuer that is about to end certificates come with seconds of life; they are not asked for in a
            // tight loop.
            rests_until: now.steady.saturating_add(SHORTEST_PAUSE),
        }
    }

    /// A try failed. What is held stays, and is asked for again after a pause that doubles from 1 s to 60 s, each
    /// between half and the whole of that, but not less than `asked`: what the server wants.
    pub fn failed(self, now: Moment, asked: Option<Duration>, dice: f64) -> Self {
        let whole = (SHORTEST_PAUSE * 2u32.pow(self.failures.min(6) + 1)).min(LONGEST_PAUSE);
        let pause = whole.mul_f64(0.5 + 0.5 * dice.clamp(0.0, 1.0));
        let pause = pause
            .max(asked.unwrap_or_default().min(LONGEST_PAUSE))
            .max(SHORTEST_PAUSE);
        Self {
            failures: self.failures.saturating_add(1),
            rests_until: now.steady.saturating_add(pause),
            ..self
        }
    }

    /// What is held is of no use any more, as when its root is not trusted now: due at once, unless a pause is on.
    pub fn overtaken(self) -> Self {
        Self { due: None, ..self }
    }

    /// Tries that failed since the last certificate.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// How long it rests yet.
    pub fn rest(&self, now: Moment) -> Duration {
        self.rests_until.saturating_sub(now.steady)
    }

    /// When the next certificate is asked for, by the wall clock; none where it is due.
    pub fn due(&self) -> Option<Timestamp> {
        self.due.map(|due| due.wall)
    }
}

/// What to do at `now`.
pub fn step(plan: &Plan, now: Moment) -> Step {
    let until_due = plan.due.map_or(Duration::ZERO, |due| due.in_how_long(now));
    match until_due.max(plan.rest(now)) {
        Duration::ZERO => Step::Renew,
        wait => Step::Wait(wait),
    }
}

impl Due {
    fn in_how_long(&self, now: Moment) -> Duration {
        // A clock that stands before the certificate's beginning was set back, or the one that signed it is wrong.
        // Whichever it is, peers will refuse it.
        if !self.validity.contains(now.wall) {
            return Duration::ZERO;
        }
        let by_wall = self.wall.duration_since(now.wall).max(SignedDuration::ZERO);
        let by_steady = self.steady.saturating_sub(now.steady);
        by_steady.min(by_wall.unsigned_abs())
    }
}

const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert, proptest};

    use super::*;

    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;

    #[test]
    fn half_of_what_is_left_of_a_life_passes_give_or_take_a_tenth() {
        for (dice, hours) in [(0.0, 10.8), (0.5, 12.0), (1.0, 13.2)] {
            let plan = Plan::renewed(life(24 * HOUR), None, at(0, 0), dice);
            assert_eq!(
                step(&plan, at(0, 0)),
                Step::Wait(Duration::from_secs_f64(hours * 3600.0))
            );
        }
    }

    #[test]
    fn a_leaf_of_five_minutes_that_is_dated_back_by_five_is_not_past_its_half() {
        let plan = Plan::renewed(life(5 * MINUTE), None, at(0, 0), 0.5);
        assert_eq!(step(&plan, at(149, 149)), wait(1));
        assert_eq!(step(&plan, at(150, 150)), Step::Renew);
    }

    #[test]
    fn whoever_wants_young_keys_gets_them() {
        let hourly = Some(Duration::from_secs(HOUR));
        let plan = Plan::renewed(life(24 * HOUR), hourly, at(0, 0), 0.5);
        assert_eq!(step(&plan, at(0, 0)), wait(HOUR));
        // but never later than half of a short life
        let plan = Plan::renewed(life(HOUR), hourly, at(0, 0), 0.5);
        assert_eq!(step(&plan, at(0, 0)), wait(HOUR / 2));
    }

    #[test]
    fn a_laptop_that_wakes_up_renews_at_once() {
        let plan = Plan::renewed(life(24 * HOUR), None, at(0, 0), 0.5);
        // 20 hours of sleep, of which the steady clock knows a second
        assert_eq!(step(&plan, at(20 * HOUR, 1)), Step::Renew);
        // and after the certificate's end too
        assert_eq!(step(&plan, at(100 * HOUR, 1)), Step::Renew);
    }

    #[test]
    fn a_clock_that_is_set_back_does_not_hold_a_renewal_up() {
        let plan = Plan::renewed(life(24 * HOUR), None, at(HOUR, 0), 0.5);
        assert_eq!(step(&plan, at(0, 12 * HOUR)), Step::Renew);
        // before the certificate's beginning it is of no use
        let long_ago = Moment {
            wall: at(0, 0).wall - SignedDuration::from_hours(2),
            steady: Duration::from_secs(1),
        };
        assert_eq!(step(&plan, long_ago), Step::Renew);
    }

    #[test]
    fn failures_wait_longer_each_time_and_never_over_a_minute() {
        let mut plan = Plan::begin();
        let mut now = 0;
        let mut waits = Vec::new();
        for _ in 0..8 {
            assert_eq!(step(&plan, at(now, now)), Step::Renew);
            plan = plan.failed(at(now, now), None, 1.0);
            let Step::Wait(wait) = step(&plan, at(now, now)) else {
                panic!("no pause after a failure");
            };
            waits.push(wait.as_secs());
            now += wait.as_secs();
        }
        assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(plan.failures(), 8);
        let renewed = Plan::renewed(life(24 * HOUR), None, at(now, now), 0.5);
        assert_eq!(renewed.failures(), 0);
    }

    #[test]
    fn a_failed_renewal_goes_on_failing_past_the_end_and_beyond_a_set_clock() {
        let plan = Plan::renewed(life(HOUR), None, at(0, 0), 0.5).failed(at(1800, 1800), None, 0.0);
        assert_eq!(step(&plan, at(1800, 1800)), wait(1));
        assert_eq!(step(&plan, at(1801, 1801)), Step::Renew);
        assert_eq!(step(&plan, at(9 * HOUR, 1801)), Step::Renew);
        // a wall clock that jumps does not shorten or lengthen a pause
        assert_eq!(step(&plan, at(9 * HOUR, 1800)), wait(1));
    }

    #[test]
    fn what_the_server_asks_for_is_waited_for_within_a_minute() {
        let plan = Plan::begin();
        let asked = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(
            step(&plan.failed(at(0, 0), asked(30), 0.0), at(0, 0)),
            wait(30)
        );
        assert_eq!(
            step(&plan.failed(at(0, 0), asked(3600), 0.0), at(0, 0)),
            wait(60)
        );
    }

    #[test]
    fn a_leaf_whose_root_is_gone_is_replaced_at_once_but_not_in_a_tight_loop() {
        let plan = Plan::renewed(life(24 * HOUR), None, at(0, 0), 0.5);
        assert_eq!(step(&plan.overtaken(), at(0, 0)), wait(1));
        assert_eq!(step(&plan.overtaken(), at(60, 60)), Step::Renew);
    }

    proptest! {
        #[test]
        fn a_plan_is_never_due_later_than_eleven_twentieths_of_what_was_left(
            life_seconds in 1_u64..7 * 24 * HOUR,
            dice in 0.0_f64..1.0,
            later in 0_u64..8 * 24 * HOUR,
        ) {
            let plan = Plan::renewed(life(life_seconds), None, at(0, 0), dice);
            if later >= (life_seconds * 11 / 20 + 1).max(1) {
                prop_assert!(step(&plan, at(later, later)) == Step::Renew);
            }
            let early = life_seconds * 9 / 20;
            if early > 0 && later < early {
                prop_assert!(step(&plan, at(later, later)) != Step::Renew);
            }
        }

        #[test]
        fn no_pause_is_over_a_minute(failures in 0_u32..200, dice in 0.0_f64..1.0) {
            let mut plan = Plan::begin();
            for _ in 0..failures {
                plan = plan.failed(at(0, 0), None, dice);
            }
            prop_assert!(plan.rest(at(0, 0)) <= Duration::from_secs(60));
        }
    }

    /// A leaf that was signed at second 0 and dated back by five minutes.
    fn life(seconds: u64) -> Validity {
        let signed = at(0, 0).wall;
        Validity {
            not_before: signed - SignedDuration::from_mins(5),
            not_after: signed + Duration::from_secs(seconds),
        }
    }

    fn at(wall: u64, steady: u64) -> Moment {
        Moment {
            wall: Timestamp::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + wall),
            steady: Duration::from_secs(steady),
        }
    }

    fn wait(seconds: u64) -> Step {
        Step::Wait(Duration::from_secs(seconds))
    }
}
