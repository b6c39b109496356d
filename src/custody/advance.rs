//! One way to move a journal on, for the leader's tick, the verbs and the cron job alike.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::timeout;

use crate::{
    ca::{
        journal::{HomeError, Journal, JournalHome, Stored},
        plugged::Plugged,
        rotation::{self, Done, RotationPolicy, Step},
    },
    clock::Clock,
    custody::{CustodyError, dice},
};

/// What a tick or a verb did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticked {
    /// What was written (by a dry run: would be), in order; empty where nothing was due.
    pub done: Vec<Done>,
    /// When something is due again.
    pub next: Timestamp,
    /// The journal's epoch.
    pub epoch: u64,
}

/// What `malha ca rotate` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RotateRequest {
    /// Only the intermediate. Without it the whole schedule, or by force the root.
    pub intermediate: bool,
    /// Only what is due.
    pub if_due: bool,
    /// Say what would be done, write nothing. The keys it names are thrown away.
    pub dry_run: bool,
}

/// One rotation by hand or by the cron job: the same step as the leader's tick, and safe beside it, since it holds no
/// lease and needs none.
///
/// # Errors
/// [`CustodyError::Refused`] and [`CustodyError::RootByHand`] where it must not be done, [`CustodyError::LostRaces`]
/// after 5 lost races, [`CustodyError::Home`] where the journal cannot be had.
pub async fn rotate<H: JournalHome>(
    home: &H,
    policy: &RotationPolicy,
    request: RotateRequest,
    clock: &Clock,
) -> Result<Ticked, CustodyError> {
    policy.check()?;
    let goal = match request {
        RotateRequest { if_due: true, .. } => Goal::WhatIsDue,
        RotateRequest {
            intermediate: true, ..
        } => Goal::NewIntermediate,
        RotateRequest { .. } => return Err(CustodyError::RootByHand),
    };
    if request.dry_run {
        return rehearse(home, policy, goal, clock.now()).await;
    }
    let advance = Advance {
        home,
        policy,
        clock,
        goal,
        plugged: None,
        leads: None,
    };
    match advance.run(|_| Ok(())).await {
        Err(CustodyError::JournalLost) => Err(missing(home).await),
        advanced => advanced,
    }
}

/// What a verb says of a journal that is not there: lost, where an earlier life left traces that may be looked at.
pub async fn missing<H: JournalHome>(home: &H) -> CustodyError {
    match in_time(home.has_earlier_life()).await {
        Ok(true) => CustodyError::JournalLost,
        Ok(false) | Err(_) => CustodyError::NoJournal,
    }
}

/// How often a lost race is run again.
pub(super) const TRIES: u32 = 5;

/// A home that has not answered for this long will not.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    /// The schedule.
    WhatIsDue,
    /// A new intermediate, due or not.
    NewIntermediate,
    /// A higher epoch, and nothing else.
    Lead,
    /// Nothing more.
    Done,
}

pub(super) struct Advance<'a, H> {
    pub(super) home: &'a H,
    pub(super) policy: &'a RotationPolicy,
    pub(super) clock: &'a Clock,
    pub(super) goal: Goal,
    /// The operator's issuer, for whoever reads it. Verbs do not: they have no right to.
    pub(super) plugged: Option<&'a Plugged>,
    /// The epoch in which the caller leads, where it does.
    pub(super) leads: Option<u64>,
}

impl<H: JournalHome> Advance<'_, H> {
    /// Reads, decides, writes, and begins again with reading, until nothing is to do. `read` sees every journal before
    /// anything is decided from it; what was written is read back before it counts.
    pub(super) async fn run(
        self,
        mut read: impl FnMut(&Stored) -> Result<(), CustodyError>,
    ) -> Result<Ticked, CustodyError> {
        let mut goal = self.goal;
        let mut done = Vec::new();
        let mut lost = 0;
        loop {
            let stored = load(self.home).await?.ok_or(CustodyError::JournalLost)?;
            read(&stored)?;
            let journal = &stored.journal;
            if let Some(own) = self.leads
                && own < journal.epoch()
            {
                let seen = journal.epoch();
                return Err(CustodyError::Superseded { own, seen });
            }
            let now = self.clock.now();
            let (next, change) = match decide(journal, goal, self.plugged, now, self.policy)? {
                Decision::Wait(next) => {
                    let epoch = journal.epoch();
                    return Ok(Ticked { done, next, epoch });
                }
                Decision::Save(next, change) => (next, change),
            };
            match save(self.home, &stored.version, &next).await {
                Ok(()) => {
                    goal = goal.after(change.as_ref());
                    if let Some(change) = change {
                        tracing::info!(%change, "the CA journal moved on");
                        done.push(change);
                    }
                }
                Err(HomeError::Conflict { .. }) => {
                    lost += 1;
                    if lost == TRIES {
                        return Err(CustodyError::LostRaces(TRIES));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Goal {
    /// What was forced is begun; what is left of it (and only that) the schedule sees by itself.
    fn after(self, written: Option<&Done>) -> Self {
        match (self, written) {
            (Self::NewIntermediate, Some(Done::LongestLeafRaised { .. })) => Self::NewIntermediate,
            (Self::WhatIsDue | Self::NewIntermediate, _) => Self::WhatIsDue,
            (Self::Lead | Self::Done, _) => Self::Done,
        }
    }
}

/// The schedule, on a journal that stays in memory.
async fn rehearse<H: JournalHome>(
    home: &H,
    policy: &RotationPolicy,
    mut goal: Goal,
    now: Timestamp,
) -> Result<Ticked, CustodyError> {
    let Some(stored) = load(home).await? else {
        return Err(missing(home).await);
    };
    let mut journal = stored.journal;
    let mut done = Vec::new();
    loop {
        match decide(&journal, goal, None, now, policy)? {
            Decision::Wait(next) => {
                let epoch = journal.epoch();
                return Ok(Ticked { done, next, epoch });
            }
            Decision::Save(next, change) => {
                goal = goal.after(change.as_ref());
                done.extend(change);
                journal = *next;
            }
        }
    }
}

enum Decision {
    Wait(Timestamp),
    Save(Box<Journal>, Option<Done>),
}

fn decide(
    journal: &Journal,
    goal: Goal,
    plugged: Option<&Plugged>,
    now: Timestamp,
    policy: &RotationPolicy,
) -> Result<Decision, CustodyError> {
    let step = match goal {
        Goal::WhatIsDue => rotation::step_with(journal, plugged, now, policy),
        Goal::NewIntermediate => rotation::step_now(journal, now, policy),
        Goal::Lead => return Ok(Decision::Save(Box::new(journal.led_anew()), None)),
        Goal::Done => return Ok(Decision::Wait(now)),
    };
    Ok(match step {
        Step::Wait(until) => Decision::Wait(until),
        Step::Save(journal, done) => Decision::Save(journal, Some(done)),
        Step::Refuse(refusal) => return Err(refusal.into()),
        Step::MakeKey(purpose) => {
            let (key, rolled) = (dice::key()?, dice::roll()?);
            let (journal, done) = rotation::with_key(journal, purpose, key, rolled, now, policy)?;
            Decision::Save(Box::new(journal), Some(done))
        }
    })
}

pub(super) async fn load<H: JournalHome>(home: &H) -> Result<Option<Stored>, HomeError> {
    in_time(home.load()).await
}

async fn save<H: JournalHome>(home: &H, seen: &str, journal: &Journal) -> Result<(), HomeError> {
    in_time(home.replace(seen, journal)).await.map(|_| ())
}

/// What a home answers, unless it takes too long.
pub(super) async fn in_time<T>(
    answer: impl Future<Output = Result<T, HomeError>>,
) -> Result<T, HomeError> {
    match timeout(PATIENCE, answer).await {
        Ok(answer) => answer,
        Err(late) => Err(HomeError::Unreachable {
            home: "the CA journal's home".to_owned(),
            source: Box::new(late),
        }),
    }
}
