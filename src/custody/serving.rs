//! Our own serving certificates: a new key each time, in memory only.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    ca::{
        Authority, AuthorityError, KeyedChain, Serial,
        journal::JournalHome,
        peer::{self, PeerError, Side},
        profile::Profile,
    },
    clock::Clock,
    custody::{Custody, CustodyError, dice, metrics::Step},
};

/// Keeps one serving certificate fresh: from the current authority, at start, on every change of the authority, and at
/// half of its life. It is checked as its client will check it before it is handed out; until then, and whenever that
/// fails, the last good one stays.
pub async fn keep_serving<H: JournalHome>(
    custody: Arc<Custody<H>>,
    profile: Profile,
    clock: Clock,
    out: watch::Sender<Option<Arc<KeyedChain>>>,
    stop: CancellationToken,
) {
    let glance = custody.pace.glance;
    let mut authorities = custody.watch();
    let mut failures = 0;
    loop {
        let authority = authorities.borrow_and_update().clone();
        let now = clock.now();
        let renew_at = match certify(&authority, &profile, now) {
            Ok(keyed) => {
                failures = 0;
                custody.metrics.serves(kind(&profile), keyed.validity);
                // Below an issuer near its end halves get short; a pause there must be.
                let soonest = after(now, custody.pace.retry);
                let renew_at = early(keyed.validity.half(), now).max(soonest);
                out.send_replace(Some(Arc::new(keyed)));
                renew_at
            }
            Err(error) => {
                custody.metrics.failed(Step::Serve);
                tracing::error!(%error, kind = kind(&profile), "no new serving certificate; the present one stays");
                failures += 1;
                after(now, dice::jitter(pause_after(failures)))
            }
        };
        while clock.now() < renew_at {
            let rest = Duration::try_from(clock.now().duration_until(renew_at));
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Ok(()) = authorities.changed() => break,
                () = sleep(rest.unwrap_or(glance).min(glance)) => {}
            }
        }
        if stop.is_cancelled() {
            return;
        }
    }
}

/// 24 h, as workloads have by default.
const LIFE: Duration = Duration::from_secs(24 * 60 * 60);

const LONGEST_PAUSE: Duration = Duration::from_secs(60);

fn pause_after(failures: u32) -> Duration {
    let seconds = 1_u64 << failures.clamp(1, 7).saturating_sub(1);
    Duration::from_secs(seconds).min(LONGEST_PAUSE)
}

/// Up to a tenth earlier, so that replicas and listeners do not renew in one moment.
fn early(half: Timestamp, now: Timestamp) -> Timestamp {
    let rest = Duration::try_from(now.duration_until(half)).unwrap_or_default();
    after(now, dice::jitter(rest).min(rest))
}

fn after(now: Timestamp, span: Duration) -> Timestamp {
    now.saturating_add(span).unwrap_or(Timestamp::MAX)
}

fn certify(
    authority: &Authority,
    profile: &Profile,
    now: Timestamp,
) -> Result<KeyedChain, ServingError> {
    let key = dice::key()?;
    let serial = Serial::random(dice::roll()?);
    let issued = authority.issue(&key.public_key(), profile, LIFE, serial, now)?;
    peer::verify(&issued.chain, authority.bundle(), Side::Server, now)?;
    for name in profile.dns_names() {
        peer::verify_name(&issued.chain, name)?;
    }
    Ok(KeyedChain::new(issued, &key))
}

/// As the label of the metrics.
fn kind(profile: &Profile) -> &'static str {
    match profile {
        Profile::Workload(_) => "workload",
        Profile::ControlPlane { .. } => "xds",
        Profile::Webhook { .. } => "webhook",
    }
}

#[derive(Debug, thiserror::Error)]
enum ServingError {
    #[error(transparent)]
    Key(#[from] CustodyError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Peer(#[from] PeerError),
}
