//! What follows from a clock that cannot be believed: nothing is signed, nothing is rotated.
//!
//! jump of the clock, skew against the API server, leadership -> signer's gate, "this process acts"

use std::time::Duration;

use jiff::SignedDuration;
use tokio::{
    sync::watch,
    time::{Instant, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    ca::rotation::CLOCK_TOLERANCE,
    k8s::world::Skew,
    runtime::clock::Rebase,
    signing::{Fault, Gate},
};

/// Tells how far this clock is ahead of the API server's; `None` where there is none or it was not heard of yet.
pub(super) type Skewed = Box<dyn Fn() -> Option<Skew> + Send + Sync>;

/// Whether this process may sign, and whether it acts for all replicas.
pub(super) struct Sanity {
    pub(super) jump: watch::Receiver<Option<SignedDuration>>,
    pub(super) rebase: Rebase,
    pub(super) skew: Skewed,
    pub(super) leads: watch::Receiver<bool>,
    pub(super) gate: Gate,
}

impl Sanity {
    /// Looks each second, and when leadership or the clock changes; tells `acts`, until `stop`.
    pub(super) async fn keep(mut self, acts: watch::Sender<bool>, stop: CancellationToken) {
        let mut look = interval(Duration::from_secs(1));
        let mut jumped = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = look.tick() => {}
                Ok(()) = self.leads.changed() => {}
                Ok(()) = self.jump.changed() => {}
            }
            let by = *self.jump.borrow_and_update();
            jumped = by.map(|by| Jump {
                by,
                noticed: jumped.map_or_else(Instant::now, |jump: Jump| jump.noticed),
            });
            let fault = fault(jumped, (self.skew)());
            if jumped.is_some() && fault.is_none() {
                self.rebase.accept();
            }
            let leads = *self.leads.borrow_and_update() && fault.is_none();
            acts.send_if_modified(|acts| std::mem::replace(acts, leads) != leads);
            self.gate.set(fault);
        }
    }
}

/// A jump that is not over.
#[derive(Clone, Copy)]
struct Jump {
    by: SignedDuration,
    noticed: Instant,
}

/// Whether a clock that is so far ahead may be believed.
pub(super) fn is_sane(ahead: SignedDuration) -> bool {
    ahead.unsigned_abs() <= CLOCK_TOLERANCE
}

/// The API server's clock has the last word: what it confirms, after the jump, is no jump but a correction. Until it has,
/// and where there is none, a jump is one until the clock is back.
fn fault(jump: Option<Jump>, skew: Option<Skew>) -> Option<Fault> {
    let (by, than) = match (jump, skew) {
        (_, Some(skew)) if !is_sane(skew.ahead) => (skew.ahead, "the API server's clock"),
        (Some(jump), Some(skew)) if skew.measured > jump.noticed => return None,
        (Some(jump), _) => (jump.by, "the time that has passed since the start"),
        (None, _) => return None,
    };
    let side = if by.is_positive() {
        "ahead of"
    } else {
        "behind"
    };
    let seconds = by.unsigned_abs().as_secs();
    Some(Fault::ClockJump(format!(
        "this replica's clock is {seconds} s {side} {than}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_servers_clock_has_the_last_word_when_it_spoke_after_the_jump() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let jump = |minutes| {
            Some(Jump {
                by: SignedDuration::from_mins(minutes),
                noticed: at(10),
            })
        };
        let skew = |minutes, seconds| {
            Some(Skew {
                ahead: SignedDuration::from_mins(minutes),
                measured: at(seconds),
            })
        };
        for (jump, skew, sane) in [
            (None, None, true),
            (None, skew(-4, 1), true),
            (None, skew(6, 1), false),
            (None, skew(-6, 1), false),
            (jump(60), None, false),
            (jump(60), skew(0, 9), false),
            (jump(60), skew(0, 11), true),
            (jump(60), skew(60, 11), false),
        ] {
            assert_eq!(fault(jump, skew).is_none(), sane);
        }
    }
}
