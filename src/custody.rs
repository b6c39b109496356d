//! Keeps the authority: loads its journal, rotates it, and publishes what may be signed with.
//!
//! ```text
//! journal's home -> open, refresh -> Authority -> watch -> whoever signs
//! tick           -> load -> ca::rotation::step -> compare-and-swap -> load again -> Authority -> watch
//! Authority      -> keep_serving -> KeyedChain -> whoever listens
//! ```
//!
//! One writer at a time is the home's promise (compare-and-swap), not ours: any number of processes may tick, each
//! recomputes from what it reads, and what a process wrote it uses only once it has read it back. So a write that failed
//! changed nothing here, and a write whose answer was lost is found by the next read. Within a process, reads and writes
//! take turns, so that an older read never replaces a newer one.

mod advance;
mod dice;
mod metrics;
mod plugging;
mod serving;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    sync::{Notify, watch},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

pub use self::{
    advance::{RotateRequest, Ticked, missing, rotate},
    metrics::Metrics,
    plugging::Plugging,
    serving::keep_serving,
};
use crate::{
    ca::{
        Authority, AuthorityError, KeyId,
        journal::{HomeError, Journal, JournalHome, Kind, Stored},
        plugged::{self, PlugError, Plugged},
        rotation::{self, PolicyError, Refusal, RotationPolicy, STALE_GRACE},
    },
    clock::Clock,
    custody::{
        advance::{Advance, Goal, load},
        metrics::Step,
    },
    identity::TrustDomain,
};

/// The keeper of one journal in one process.
pub struct Custody<H> {
    home: H,
    policy: RotationPolicy,
    clock: Clock,
    metrics: Metrics,
    pace: Pace,
    published: watch::Sender<Arc<Authority>>,
    held: Mutex<Held>,
    /// What came of the operator's issuer.
    plugging: watch::Sender<Plugging>,
    /// Something is due sooner than the next look.
    nudged: Notify,
    /// Reads and writes of this process take turns.
    turn: tokio::sync::Mutex<()>,
}

/// What was last read.
struct Held {
    version: String,
    /// The epoch in which this process leads, while it does.
    leads: Option<u64>,
    /// Whether what signs is an operator's.
    plugged: bool,
    /// When a plugged root begins to sign, or a drained one ends.
    next_elapsed: Option<Timestamp>,
}

impl Held {
    fn of(stored: &Stored) -> Self {
        Self {
            version: stored.version.clone(),
            leads: None,
            plugged: stored.journal.active().kind == Kind::Plugged,
            next_elapsed: rotation::next_elapsed(&stored.journal),
        }
    }
}

impl<H: JournalHome> Custody<H> {
    /// Loads the journal, or makes the first one, and replaces an intermediate that has ended before anybody signs with
    /// it. Any number of processes may open one home at the same moment: they all end with the same root.
    ///
    /// # Errors
    /// What keeps a process from signing. A home that cannot be reached is worth another try.
    pub async fn open(
        home: H,
        policy: RotationPolicy,
        trust_domain: TrustDomain,
        clock: Clock,
        metrics: Metrics,
    ) -> Result<Arc<Self>, CustodyError> {
        let pace = Pace::default();
        Self::open_at(pace, home, policy, trust_domain, clock, metrics).await
    }

    async fn open_at(
        pace: Pace,
        home: H,
        policy: RotationPolicy,
        trust_domain: TrustDomain,
        clock: Clock,
        metrics: Metrics,
    ) -> Result<Arc<Self>, CustodyError> {
        policy.check()?;
        let founded = load_or_found(&home, &policy, &trust_domain, &clock).await;
        let stored = founded.inspect_err(|error| metrics.failed(error.step()))?;
        let found = stored.journal.trust_domain();
        if *found != trust_domain {
            return Err(CustodyError::OtherTrustDomain {
                journal: found.clone(),
                settings: trust_domain,
            });
        }
        let now = clock.now();
        let authority = Authority::from_journal(&stored.journal, &policy.leaf)?;
        authority.rehearse(now)?;
        metrics.read(&stored.journal);
        metrics.leaves_live(policy.leaf.default);
        let custody = Arc::new(Self {
            published: watch::Sender::new(Arc::new(authority.fresh_until(stale_after(now)))),
            held: Mutex::new(Held::of(&stored)),
            turn: tokio::sync::Mutex::new(()),
            plugging: watch::Sender::new(Plugging::None),
            nudged: Notify::new(),
            home,
            policy,
            clock,
            metrics,
            pace,
        });
        if custody.authority().has_ended(now)
            && let Err(error) = custody.tick().await
        {
            // Nothing is signed with it meanwhile (`IssuerExpiring`), and the leader goes on trying.
            tracing::error!(%error, "the intermediate has ended and could not be replaced at start");
        }
        Ok(custody)
    }

    /// What signs now.
    pub fn authority(&self) -> Arc<Authority> {
        self.published.borrow().clone()
    }

    /// Every change of what signs or what is trusted.
    pub fn watch(&self) -> watch::Receiver<Arc<Authority>> {
        self.published.subscribe()
    }

    /// The journal's home.
    pub fn home(&self) -> &H {
        &self.home
    }

    /// Reads the home again and publishes what changed. Whatever goes wrong, the last good authority stays.
    ///
    /// # Errors
    /// What went wrong; it is logged and counted already.
    pub async fn refresh(&self) -> Result<(), CustodyError> {
        let _turn = self.turn.lock().await;
        let read = match load(&self.home).await {
            Ok(Some(stored)) => self.adopt(&stored),
            Ok(None) => Err(CustodyError::JournalLost),
            Err(error) => Err(error.into()),
        };
        read.inspect_err(|error| self.report(error))
    }

    /// Does what is due: load, step, save, load again, publish; until nothing is due.
    ///
    /// # Errors
    /// What went wrong; it is logged and counted already. Whatever it was, nothing changed here that was not read back.
    pub async fn tick(&self) -> Result<Ticked, CustodyError> {
        let _turn = self.turn.lock().await;
        let plugged = self.look_at_plugged().await;
        let advanced = self.advance(Goal::WhatIsDue, plugged.as_ref()).await;
        self.compare_with_plugged(plugged.as_ref());
        match &advanced {
            Ok(_) => self.metrics.ticked(self.clock.now()),
            Err(error) => self.report(error),
        }
        advanced
    }

    /// The leader's tick and everyone's refresh, until `stop`.
    ///
    /// Each time `leader` turns true, this process raises the journal's epoch before anything else. From then on a write
    /// of an earlier leader that was only paused is refused twice: by its own look at the epoch, and by the home.
    pub async fn keep(self: Arc<Self>, mut leader: watch::Receiver<bool>, stop: CancellationToken) {
        let mut duty = Duty::Follow;
        let mut watching = true;
        if *leader.borrow_and_update() {
            duty = Duty::Claim;
        }
        loop {
            let pause = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                pause = self.do_duty(&mut duty) => pause,
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                changed = leader.changed(), if watching => match changed {
                    Ok(()) if *leader.borrow_and_update() => duty = Duty::Claim,
                    Ok(()) => duty = Duty::Follow,
                    // The last word stands. If another process leads, its epoch says so.
                    Err(_) => watching = false,
                },
                () = self.nudged.notified() => {}
                () = sleep(pause) => {}
            }
            if duty == Duty::Follow {
                self.held().leads = None;
            }
        }
    }

    /// Lets [`Custody::keep`] look at once: something beside the journal has changed.
    pub fn nudge(&self) {
        self.nudged.notify_one();
    }

    /// What came of the operator's issuer, as whoever leads finds it.
    pub fn plugging(&self) -> watch::Receiver<Plugging> {
        self.plugging.subscribe()
    }

    /// One turn of [`Custody::keep`]; answers how long to pause after it.
    async fn do_duty(&self, duty: &mut Duty) -> Duration {
        if *duty == Duty::Claim {
            match self.claim().await {
                Ok(()) => *duty = Duty::Lead,
                Err(_) => return dice::jitter(self.pace.retry),
            }
        }
        let done = match *duty {
            Duty::Lead => self.tick().await.map(|ticked| Some(ticked.next)),
            Duty::Claim | Duty::Follow => self.refresh().await.map(|()| None),
        };
        match done {
            Ok(next) => {
                let due = next.map(|next| self.clock.now().duration_until(next));
                let due = due.and_then(|due| Duration::try_from(due).ok());
                let due = due.unwrap_or(self.pace.period).max(self.pace.retry);
                dice::jitter(self.pace.period).min(due)
            }
            Err(CustodyError::Superseded { .. }) => {
                *duty = Duty::Follow;
                dice::jitter(self.pace.period)
            }
            Err(_) => dice::jitter(self.pace.retry),
        }
    }

    /// Raises the epoch in this process's name.
    async fn claim(&self) -> Result<(), CustodyError> {
        let _turn = self.turn.lock().await;
        let claimed = self.advance(Goal::Lead, None).await;
        match &claimed {
            Ok(ticked) => {
                self.held().leads = Some(ticked.epoch);
                tracing::info!(epoch = ticked.epoch, "leads the CA's rotation");
            }
            Err(error) => self.report(error),
        }
        claimed.map(|_| ())
    }

    async fn advance(&self, goal: Goal, plugged: Option<&Plugged>) -> Result<Ticked, CustodyError> {
        let leads = self.held().leads.filter(|_| goal == Goal::WhatIsDue);
        Advance {
            home: &self.home,
            policy: &self.policy,
            clock: &self.clock,
            goal,
            plugged,
            leads,
        }
        .run(|stored| self.adopt(stored))
        .await
    }

    /// Publishes what was read, after the checks that its users would make.
    fn adopt(&self, stored: &Stored) -> Result<(), CustodyError> {
        let now = self.clock.now();
        let fresh_until = stale_after(now);
        let present = self.authority();
        if self.held().version == stored.version {
            self.replace_silently(present.fresh_until(fresh_until));
            self.metrics.matches(true);
            return Ok(());
        }
        let journal = &stored.journal;
        let knows_ours = |id: &KeyId| journal.authorities().iter().any(|a| a.id() == id);
        if journal.trust_domain() != present.trust_domain() || !knows_ours(present.root_key_id()) {
            return Err(CustodyError::Foreign {
                loaded: present.root_key_id().clone(),
                found: journal.active().id().clone(),
            });
        }
        let authority = Authority::from_journal(journal, &self.policy.leaf)?;
        authority.rehearse(now)?;
        let authority = authority.fresh_until(fresh_until);
        {
            let mut held = self.held();
            let leads = held.leads;
            *held = Held {
                leads,
                ..Held::of(stored)
            };
        }
        self.metrics.read(journal);
        if authority.says_the_same(&present) {
            self.replace_silently(authority);
        } else {
            tracing::info!(
                root = %authority.root_key_id(),
                issuer = %authority.issuer_key_id(),
                until = %authority.issuer_validity().not_after,
                generation = authority.generation(),
                "signs with a new authority"
            );
            self.published.send_replace(Arc::new(authority));
        }
        Ok(())
    }

    /// Those who watch have nothing to do.
    fn replace_silently(&self, authority: Authority) {
        self.published.send_if_modified(|present| {
            *present = Arc::new(authority);
            false
        });
    }

    fn report(&self, error: &CustodyError) {
        let step = error.step();
        self.metrics.failed(step);
        if error.is_about_the_journal() {
            self.metrics.matches(false);
        }
        let cause = std::error::Error::source(error).map(ToString::to_string);
        match error {
            CustodyError::Superseded { .. } => tracing::warn!(%error, "leads no more"),
            _ => {
                tracing::error!(%error, cause, step = step.name(), "the CA journal is not as it should be; what was last read stays in use")
            }
        }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a process does about its journal.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Duty {
    /// Reads.
    Follow,
    /// Shall lead, and has not said so in the journal yet.
    Claim,
    /// Rotates.
    Lead,
}

/// How often things are looked at. A field, so that a test need not wait for them.
#[derive(Clone, Copy)]
struct Pace {
    /// How often the journal is read where no watch speaks first.
    period: Duration,
    /// How soon it is tried again after a fault, and the shortest pause between two looks.
    retry: Duration,
    /// How often a clock is looked at while something waits for it: it may be set, and a laptop may sleep.
    glance: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            period: Duration::from_secs(30),
            retry: Duration::from_secs(5),
            glance: Duration::from_secs(60),
        }
    }
}

fn stale_after(now: Timestamp) -> Timestamp {
    now.saturating_add(STALE_GRACE).unwrap_or(Timestamp::MAX)
}

async fn load_or_found<H: JournalHome>(
    home: &H,
    policy: &RotationPolicy,
    trust_domain: &TrustDomain,
    clock: &Clock,
) -> Result<Stored, CustodyError> {
    for _ in 0..advance::TRIES {
        if let Some(stored) = load(home).await? {
            return Ok(stored);
        }
        // Another process may have founded it after our look, and left its traces before this one: look again.
        if advance::in_time(home.has_earlier_life()).await? {
            return load(home).await?.ok_or(CustodyError::JournalLost);
        }
        let journal = first_journal(home, policy, trust_domain, clock.now()).await?;
        match advance::in_time(home.create(&journal)).await {
            Ok(_) => {
                tracing::info!(root = %journal.active().id(), "{trust_domain} has its first root")
            }
            Err(HomeError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(CustodyError::LostRaces(advance::TRIES))
}

/// With the operator's issuer where there is one. One that cannot be used is never replaced by a root of our own: the
/// operator has said whom the mesh is to trust.
async fn first_journal<H: JournalHome>(
    home: &H,
    policy: &RotationPolicy,
    trust_domain: &TrustDomain,
    now: Timestamp,
) -> Result<Journal, CustodyError> {
    if let Some(files) = advance::in_time(home.plugged()).await? {
        let plugged = plugged::read(&files, trust_domain, &policy.leaf, now)?;
        let (journal, _) = rotation::first_plugged(trust_domain, &plugged, now, &policy.leaf);
        return Ok(journal);
    }
    let (root_key, intermediate_key) = (dice::key()?, dice::key()?);
    let rolled = [dice::roll()?, dice::roll()?];
    let first = rotation::first(
        trust_domain,
        root_key,
        intermediate_key,
        rolled,
        now,
        policy,
    )?;
    Ok(first.0)
}

/// Why the journal cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum CustodyError {
    /// The home refused or could not be reached.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// No journal, but traces of one.
    #[error(
        "the CA journal is gone, but an earlier life has left its traces; restore it from a backup (a new root would lock out every running pod), and do not restart a control plane that still signs from memory"
    )]
    JournalLost,
    /// A verb, before the control plane ever ran.
    #[error(
        "there is no CA journal; the control plane makes it when it starts for the first time (if there was one, restore it from a backup)"
    )]
    NoJournal,
    /// The settings name another trust domain than the journal.
    #[error(
        "the CA journal is of trust domain {journal}, the settings say {settings}; set it back, or start a new mesh in another place"
    )]
    OtherTrustDomain {
        /// In the journal.
        journal: TrustDomain,
        /// In the settings.
        settings: TrustDomain,
    },
    /// Somebody replaced the journal by one that does not know our root.
    #[error(
        "the CA journal now holds root {found} and knows nothing of {loaded}, which every running pod trusts; restore it from a backup"
    )]
    Foreign {
        /// The root that we sign below.
        loaded: KeyId,
        /// The root in the journal.
        found: KeyId,
    },
    /// What the journal holds cannot be used.
    #[error("the CA journal holds nothing to sign with: {0}")]
    Unusable(#[from] AuthorityError),
    /// Somebody else leads now.
    #[error(
        "another leader has raised the epoch to {seen}, ours is {own}; this one writes no more"
    )]
    Superseded {
        /// In which this process led.
        own: u64,
        /// In the journal.
        seen: u64,
    },
    /// Lost every race for a write.
    #[error("another writer changed the CA journal {0} times in a row; try again")]
    LostRaces(u32),
    /// It cannot be done, and trying again will not help.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The operator's issuer cannot be used, and there is no other.
    #[error(
        "the issuer that is plugged in (Secret `cacerts`) cannot be used: {0}; nothing is signed until it is mended, and no root is made in its place"
    )]
    Plugged(#[from] PlugError),
    /// Roots are not rotated by hand yet.
    #[error(
        "rotating the root by hand is not in this version; --intermediate rotates the intermediate, --if-due does what the schedule asks for"
    )]
    RootByHand,
    /// The settings do not fit together.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The generator of keys failed.
    #[error("no new key could be made")]
    Dice,
}

impl CustodyError {
    /// Whether the same call may succeed later without anybody doing anything.
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Home(HomeError::Conflict { .. } | HomeError::Unreachable { .. })
                | Self::LostRaces(_)
        )
    }

    fn is_about_the_journal(&self) -> bool {
        matches!(
            self,
            Self::JournalLost
                | Self::Foreign { .. }
                | Self::OtherTrustDomain { .. }
                | Self::Unusable(_)
                | Self::Home(HomeError::Unreadable { .. })
        )
    }

    fn step(&self) -> Step {
        match self {
            Self::Home(HomeError::Conflict { .. }) | Self::LostRaces(_) => Step::Save,
            Self::Home(_) | Self::JournalLost | Self::NoJournal => Step::Load,
            Self::OtherTrustDomain { .. } | Self::Foreign { .. } | Self::Unusable(_) => {
                Step::Verify
            }
            Self::Superseded { .. } | Self::Refused(_) | Self::RootByHand | Self::Policy(_) => {
                Step::Decide
            }
            Self::Dice => Step::MakeKey,
            Self::Plugged(_) => Step::Plug,
        }
    }
}
