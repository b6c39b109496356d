//! What follows from a clock that cannot be believed: nothing is signed, nothing is rotated.
//!
//! jump of the clock, skew against the API server, leadership -> signer's gate, "this process acts"

use std::time::Duration;

use jiff::SignedDuration;
use tokio::{sync::watch, time::interval};
use tokio_util::sync::CancellationToken;

use crate::{
    runtime::clock::Rebase,
    signing::{Fault, Gate},
};

/// How far a clock may be off before what it says is not signed any more.
pub(super) const TOLERANCE: Duration = Duration::from_secs(5 * 60);

/// Tells how far this clock is ahead of one that others go by; `None` where there is none or it was not heard of yet.
pub(super) type Skew = Box<dyn Fn() -> Option<SignedDuration> + Send + Sync>;

/// Whether this process may sign, and whether it acts for all replicas.
pub(super) struct Sanity {
    pub(super) jump: watch::Receiver<Option<SignedDuration>>,
    pub(super) rebase: Rebase,
    pub(super) skew: Skew,
    pub(super) leads: watch::Receiver<bool>,
    pub(super) gate: Gate,
}

impl Sanity {
    /// Looks each second, and when leadership or the clock changes; tells `acts`, until `stop`.
    pub(super) async fn keep(mut self, acts: watch::Sender<bool>, stop: CancellationToken) {
        let mut look = interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = look.tick() => {}
                Ok(()) = self.leads.changed() => {}
                Ok(()) = self.jump.changed() => {}
            }
            let (jump, skew) = (*self.jump.borrow_and_update(), (self.skew)());
            let fault = fault(jump, skew);
            if jump.is_some() && fault.is_none() {
                self.rebase.accept();
            }
            let leads = *self.leads.borrow_and_update() && fault.is_none();
            acts.send_if_modified(|acts| std::mem::replace(acts, leads) != leads);
            self.gate.set(fault);
        }
    }
}

/// The API server's clock has the last word: what it confirms is no jump but a correction. Where there is none, a jump is
/// one until the clock is back.
fn fault(jump: Option<SignedDuration>, skew: Option<SignedDuration>) -> Option<Fault> {
    let (by, than) = match (jump, skew) {
        (_, Some(skew)) if skew.unsigned_abs() > TOLERANCE => (skew, "the API server's clock"),
        (Some(jump), None) => (jump, "the time that has passed since the start"),
        (Some(_) | None, Some(_)) | (None, None) => return None,
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
    fn the_api_servers_clock_has_the_last_word() {
        let minutes = |minutes| Some(SignedDuration::from_mins(minutes));
        for (jump, skew, sane) in [
            (None, None, true),
            (None, minutes(-4), true),
            (None, minutes(6), false),
            (None, minutes(-6), false),
            (minutes(60), None, false),
            (minutes(60), minutes(0), true),
            (minutes(60), minutes(60), false),
        ] {
            assert_eq!(
                fault(jump, skew).is_none(),
                sane,
                "jump {jump:?}, skew {skew:?}"
            );
        }
    }
}
