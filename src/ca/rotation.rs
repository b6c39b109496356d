//! Rotation as a function: journal + instant -> the one next write. Whoever has the key generator and the home does it.
//!
//! ```text
//! nothing yet  -> [`first`] -> journal
//! journal, now -> [`step`]  -> Wait(until) | MakeKey -> [`with_key`] -> Save | Save(journal) | Refuse(why)
//! ```
//!
//! The intermediate rotates by itself and changes no trust, since every chain carries it: at half of its life `next` is
//! written, and in a second write, once the first was read back, it becomes `active` and the old key is gone. A process
//! killed anywhere between leaves a journal from which the next step goes on; `next` is neither lost nor made twice.
//!
//! Below an operator's root nothing is made here; see `rotation/plug.rs`.

mod plug;

use std::{fmt, time::Duration};

use jiff::Timestamp;

pub use self::plug::{first_plugged, next_elapsed, plug};
use crate::{
    ca::{
        AuthorityError, KeyId, LeafPolicy, Serial, Validity,
        journal::{Intermediate, IntermediateState, Journal, Kind, Phase, RootAuthority},
        key::SecretKey,
        plugged::Plugged,
        profile::{self, CA_BACKDATE},
    },
    identity::TrustDomain,
};

/// The next act for a journal.
pub enum Step {
    /// Nothing to do before this instant.
    Wait(Timestamp),
    /// The caller makes a key and rolls the dice (neither is ours to make), and saves what [`with_key`] answers.
    MakeKey(KeyFor),
    /// Compare-and-swap this. It is used once it was read back, so that a kill right after the write loses nothing.
    Save(Box<Journal>, Done),
    /// What should be done cannot be.
    Refuse(Refusal),
}

/// What a new key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyFor {
    /// The intermediate that signs after the present one.
    NextIntermediate,
}

/// What one write did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Done {
    /// The first root and its intermediate were made.
    Founded {
        /// The root's key id.
        root: KeyId,
    },
    /// A new intermediate stands ready.
    IntermediatePrepared {
        /// Its key id.
        id: KeyId,
    },
    /// It signs from now on; the old key is gone.
    IntermediateActivated {
        /// Its key id.
        id: KeyId,
    },
    /// Leaves may live longer from now on.
    LongestLeafRaised {
        /// How long, in seconds.
        seconds: u64,
    },
    /// An operator's issuer signs below its root from now on, or will once the root does.
    PluggedIssuerActivated {
        /// Its key id.
        id: KeyId,
    },
    /// An operator's root is trusted.
    RootPublished {
        /// Its key id.
        id: KeyId,
    },
    /// An operator's root signs; the one before it drains.
    RootActivated {
        /// Its key id.
        id: KeyId,
    },
    /// A root is trusted no more.
    RootRetired {
        /// Its key id.
        id: KeyId,
    },
    /// An operator trusts other roots besides its own.
    TrustChanged,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Founded { root } => write!(f, "root {root} was made"),
            Self::IntermediatePrepared { id } => write!(f, "intermediate {id} stands ready"),
            Self::IntermediateActivated { id } => {
                write!(f, "intermediate {id} signs, the old key is gone")
            }
            Self::LongestLeafRaised { seconds } => {
                let life = Words(Duration::from_secs(*seconds));
                write!(f, "leaves may live {life}")
            }
            Self::PluggedIssuerActivated { id } => {
                write!(f, "the plugged-in issuer {id} took its predecessor's place")
            }
            Self::RootPublished { id } => {
                write!(f, "the plugged-in root {id} is trusted, and signs later")
            }
            Self::RootActivated { id } => {
                write!(
                    f,
                    "the plugged-in root {id} signs, the one before it drains"
                )
            }
            Self::RootRetired { id } => write!(f, "root {id} is trusted no more"),
            Self::TrustChanged => f.write_str("the roots trusted besides the issuer's changed"),
        }
    }
}

/// Why nothing can be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Nothing is signed or rotated by a clock that is behind what was already seen.
    #[error(
        "this clock says {now}, but the CA journal was written at {newest}: set the clock, nothing is rotated until they agree"
    )]
    ClockJump {
        /// Our clock.
        now: Timestamp,
        /// The newest instant in the journal.
        newest: Timestamp,
    },
    /// An intermediate cannot outlive its root.
    #[error("the root ended at {0}, so no intermediate can be signed; a new root is needed")]
    RootEnded(Timestamp),
    /// By hand, below a root that is about to end.
    #[error(
        "an intermediate made now would not outlive the present one, since the root ends at {0}"
    )]
    NothingGained(Timestamp),
    /// By hand, below an operator's root.
    #[error(
        "the issuer is plugged in: put the next one into the Secret `cacerts`, it is taken over at once"
    )]
    PluggedIn,
}

/// How long the authority's own certificates live, and how long the leaves below them may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RotationPolicy {
    /// A root's life: 5 years.
    pub root_life: Duration,
    /// An intermediate's life: 30 days.
    pub intermediate_life: Duration,
    /// Bounds on a leaf's life.
    pub leaf: LeafPolicy,
}

impl Default for RotationPolicy {
    fn default() -> Self {
        Self {
            root_life: 5 * 365 * DAY,
            intermediate_life: 30 * DAY,
            leaf: LeafPolicy::default(),
        }
    }
}

impl RotationPolicy {
    /// Whether the lifetimes fit into each other.
    ///
    /// # Errors
    /// The first that does not. Settings like these are refused at start, before they cut a leaf short at run time.
    pub fn check(&self) -> Result<(), PolicyError> {
        let LeafPolicy { default, min, max } = self.leaf;
        if min < Duration::from_secs(60) {
            return Err(PolicyError::LeafMin(min));
        }
        if default < min || max < default {
            return Err(PolicyError::LeafOrder { min, default, max });
        }
        // A leaf signed just before the half, where the next intermediate takes over, ends inside the other half; the
        // hour is for a takeover that comes late.
        let longest = (self.intermediate_life / 2).saturating_sub(HOUR);
        if max > longest {
            return Err(PolicyError::LeafMax { max, longest });
        }
        if self.intermediate_life > self.root_life / 2 {
            return Err(PolicyError::Intermediate {
                life: self.intermediate_life,
                longest: self.root_life / 2,
            });
        }
        if self.root_life > 50 * 365 * DAY {
            return Err(PolicyError::Root(self.root_life));
        }
        Ok(())
    }
}

/// Why lifetimes do not fit into each other.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PolicyError {
    /// Shorter than a clock's tolerance.
    #[error("the shortest leaf lives {}; at least 1 minute is needed", Words(*.0))]
    LeafMin(Duration),
    /// Not min <= default <= max.
    #[error(
        "leaf lifetimes must be in order: shortest {}, default {}, longest {}",
        Words(*.min), Words(*.default), Words(*.max)
    )]
    LeafOrder {
        /// The shortest.
        min: Duration,
        /// What is granted unasked.
        default: Duration,
        /// The longest.
        max: Duration,
    },
    /// Leaves would outlive their issuer.
    #[error(
        "the longest leaf lives {}, but may live up to {}: half of the intermediate's life less an hour",
        Words(*.max), Words(*.longest)
    )]
    LeafMax {
        /// As set.
        max: Duration,
        /// As allowed.
        longest: Duration,
    },
    /// The intermediate would outlive its root.
    #[error(
        "an intermediate lives {}, but may live up to {}: half of the root's life",
        Words(*.life), Words(*.longest)
    )]
    Intermediate {
        /// As set.
        life: Duration,
        /// As allowed.
        longest: Duration,
    },
    /// Beyond what anybody can mean.
    #[error("the root lives {}; 50 years is the most", Words(*.0))]
    Root(Duration),
}

/// A duration as people write it.
struct Words(Duration);

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match seconds {
            0 => f.write_str("0 s"),
            s if s % 86_400 == 0 => write!(f, "{} d", s / 86_400),
            s if s % 3_600 == 0 => write!(f, "{} h", s / 3_600),
            s if s % 60 == 0 => write!(f, "{} min", s / 60),
            s => write!(f, "{s} s"),
        }
    }
}

/// How long a process signs without having read the journal. A root that stopped signing stays trusted for longer than
/// this plus the longest leaf, so nothing that is signed in this time is refused by anybody.
pub const STALE_GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// How far a clock may be behind the newest instant in the journal: as far as leaves are backdated.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(5 * 60);

const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The first journal: one root, one intermediate, both active, since there is nobody yet who could lag behind.
///
/// # Errors
/// A key or a name that cannot be signed with: a fault of ours.
pub fn first(
    trust_domain: &TrustDomain,
    root_key: SecretKey,
    intermediate_key: SecretKey,
    dice: [[u8; 16]; 2],
    now: Timestamp,
    policy: &RotationPolicy,
) -> Result<(Journal, Done), AuthorityError> {
    let now = whole_seconds(now);
    let [root_dice, intermediate_dice] = dice.map(Serial::random);
    let validity = Validity {
        not_before: back(now, CA_BACKDATE),
        not_after: on(now, policy.root_life),
    };
    let certificate = profile::root(trust_domain, &root_key, validity, root_dice)?;
    let done = Done::Founded {
        root: certificate.id().clone(),
    };
    let mut root = RootAuthority {
        kind: Kind::Root,
        certificate,
        key: Some(root_key),
        cross_certificates: Vec::new(),
        phase: Phase::Active,
        prepared_at: now,
        published_at: Some(now),
        activated_at: Some(now),
        drain_until: None,
        retired_at: None,
        tainted: None,
        intermediates: Vec::new(),
    };
    let state = IntermediateState::Active;
    let intermediate = sign_intermediate(
        trust_domain,
        &root,
        intermediate_key,
        state,
        intermediate_dice,
        now,
        policy,
    )?;
    root.intermediates.push(intermediate);
    let journal = Journal {
        generation: 1,
        epoch: 0,
        trust_domain: trust_domain.clone(),
        longest_leaf: policy.leaf.max,
        authorities: vec![root],
        denied: Vec::new(),
    };
    Ok((journal, done))
}

/// What is due.
pub fn step(journal: &Journal, now: Timestamp, policy: &RotationPolicy) -> Step {
    let due = journal
        .active()
        .intermediate(IntermediateState::Active)
        .map_or(now, |active| active.certificate.validity().half());
    plan(journal, now, policy, due)
}

/// What is due, where an operator may have plugged in an issuer. A clock that is not believed takes nothing over either.
pub fn step_with(
    journal: &Journal,
    plugged: Option<&Plugged>,
    now: Timestamp,
    policy: &RotationPolicy,
) -> Step {
    let scheduled = step(journal, now, policy);
    match (&scheduled, plugged) {
        (Step::Refuse(Refusal::ClockJump { .. }), _) | (_, None) => scheduled,
        (_, Some(plugged)) => plug(journal, plugged, now).unwrap_or(scheduled),
    }
}

/// What is due when the operator asks for a new intermediate now.
pub fn step_now(journal: &Journal, now: Timestamp, policy: &RotationPolicy) -> Step {
    match plan(journal, now, policy, now) {
        Step::Wait(_) if journal.active().kind == Kind::Plugged => Step::Refuse(Refusal::PluggedIn),
        Step::Wait(end) => Step::Refuse(Refusal::NothingGained(end)),
        act => act,
    }
}

/// The answer to [`Step::MakeKey`]: the journal with what the key is for.
///
/// # Errors
/// A key or a name that cannot be signed with: a fault of ours.
pub fn with_key(
    journal: &Journal,
    purpose: KeyFor,
    key: SecretKey,
    dice: [u8; 16],
    now: Timestamp,
    policy: &RotationPolicy,
) -> Result<(Journal, Done), AuthorityError> {
    let KeyFor::NextIntermediate = purpose;
    let mut journal = journal.clone();
    let trust_domain = journal.trust_domain.clone();
    let root = journal.active_mut();
    let next = sign_intermediate(
        &trust_domain,
        root,
        key,
        IntermediateState::Next,
        Serial::random(dice),
        whole_seconds(now),
        policy,
    )?;
    let done = Done::IntermediatePrepared {
        id: next.certificate.id().clone(),
    };
    // A `next` that ended before anybody came to use it.
    root.intermediates
        .retain(|i| i.state != IntermediateState::Next);
    root.intermediates.push(next);
    Ok((journal, done))
}

fn plan(journal: &Journal, now: Timestamp, policy: &RotationPolicy, due: Timestamp) -> Step {
    let newest = journal.newest();
    if on(now, CLOCK_TOLERANCE) < newest {
        return Step::Refuse(Refusal::ClockJump { now, newest });
    }
    if journal.longest_leaf < policy.leaf.max {
        return raise_longest_leaf(journal, policy.leaf.max);
    }
    if let Some(step) = plug::elapsed(journal, now) {
        return step;
    }
    match (plan_below_root(journal, now, due), next_elapsed(journal)) {
        (Step::Wait(until), Some(other)) => Step::Wait(until.min(other)),
        (step, _) => step,
    }
}

fn plan_below_root(journal: &Journal, now: Timestamp, due: Timestamp) -> Step {
    let root = journal.active();
    let root_end = root.certificate.validity().not_after;
    if root.kind == Kind::Plugged {
        // Its issuer is replaced by whoever plugged it in.
        return Step::Wait(root_end);
    }
    if now >= root_end {
        return Step::Refuse(Refusal::RootEnded(root_end));
    }
    let end_of = |state| {
        let found = root.intermediate(state)?;
        Some(found.certificate.validity().not_after)
    };
    if end_of(IntermediateState::Next).is_some_and(|end| now < end) {
        return activate_next(journal, now);
    }
    let end = end_of(IntermediateState::Active).unwrap_or(now);
    if end >= root_end {
        // As long as the root itself: another would not live longer.
        return Step::Wait(root_end);
    }
    if now < due {
        return Step::Wait(due);
    }
    Step::MakeKey(KeyFor::NextIntermediate)
}

fn raise_longest_leaf(journal: &Journal, longest: Duration) -> Step {
    let mut journal = journal.clone();
    journal.longest_leaf = longest;
    let seconds = longest.as_secs();
    Step::Save(Box::new(journal), Done::LongestLeafRaised { seconds })
}

/// The old key goes in the same write; the certificate stays as a record until it ends.
fn activate_next(journal: &Journal, now: Timestamp) -> Step {
    let mut journal = journal.clone();
    journal.denied.retain(|denied| now < denied.until);
    let root = journal.active_mut();
    let mut done = None;
    for intermediate in &mut root.intermediates {
        match intermediate.state {
            IntermediateState::Active => {
                intermediate.state = IntermediateState::Past;
                intermediate.key = None;
            }
            IntermediateState::Next => {
                intermediate.state = IntermediateState::Active;
                done = Some(intermediate.certificate.id().clone());
            }
            IntermediateState::Past => {}
        }
    }
    root.intermediates
        .retain(|i| i.state != IntermediateState::Past || now < i.certificate.validity().not_after);
    let surplus = root.intermediates.len().saturating_sub(KEPT_INTERMEDIATES);
    root.intermediates.drain(..surplus);
    let id = done.expect("the caller saw a next intermediate");
    Step::Save(Box::new(journal), Done::IntermediateActivated { id })
}

/// By schedule three are kept at most; the bound is for a verb in a loop, so that the Secret never fills up.
const KEPT_INTERMEDIATES: usize = 16;

fn sign_intermediate(
    trust_domain: &TrustDomain,
    root: &RootAuthority,
    key: SecretKey,
    state: IntermediateState,
    serial: Serial,
    now: Timestamp,
    policy: &RotationPolicy,
) -> Result<Intermediate, AuthorityError> {
    let bounds = root.certificate.validity();
    let validity = Validity {
        not_before: back(now, CA_BACKDATE).max(bounds.not_before),
        not_after: on(now, policy.intermediate_life).min(bounds.not_after),
    };
    let Some(root_key) = &root.key else {
        return Err(AuthorityError::SignFailed(
            "the root's key is not in this journal".to_owned(),
        ));
    };
    let certificate = profile::intermediate(
        trust_domain,
        &root.certificate,
        root_key,
        &key.public_key(),
        validity,
        serial,
    )?;
    Ok(Intermediate {
        certificate,
        above: Vec::new(),
        key: Some(key),
        state,
    })
}

/// Certificates count in whole seconds, and the journal keeps what they say.
pub(super) fn whole_seconds(instant: Timestamp) -> Timestamp {
    Timestamp::from_second(instant.as_second()).unwrap_or(instant)
}

/// Far ends are held, not wrapped: the year 9999 is nobody's plan.
pub(super) fn on(instant: Timestamp, span: Duration) -> Timestamp {
    instant.saturating_add(span).unwrap_or(Timestamp::MAX)
}

pub(super) fn back(instant: Timestamp, span: Duration) -> Timestamp {
    instant.saturating_sub(span).unwrap_or(Timestamp::MIN)
}

#[cfg(test)]
mod tests;
