//! An operator's issuer takes over, as a function: journal + what is plugged in + instant -> the one next write.
//!
//! An issuer below a root that signs already takes over at once, since every chain carries it. Another root is trusted at
//! once and signs once everybody has had the time to learn of it; the old one stays trusted until what it signed has
//! ended. What was taken over stays in the journal, so that a Secret that is lost or spoilt later takes nothing away.

use std::time::Duration;

use jiff::Timestamp;

use super::{Done, HOUR, KEPT_INTERMEDIATES, STALE_GRACE, Step, on, whole_seconds};
use crate::{
    ca::{
        KeyId, LeafPolicy,
        certificate::CaCertificate,
        journal::{Intermediate, IntermediateState, Journal, Kind, Phase, RootAuthority},
        plugged::Plugged,
    },
    identity::TrustDomain,
};

/// The first journal of an authority that begins with an operator's issuer.
pub fn first_plugged(
    trust_domain: &TrustDomain,
    plugged: &Plugged,
    now: Timestamp,
    leaf: &LeafPolicy,
) -> (Journal, Done) {
    let now = whole_seconds(now);
    let mut root = plugged_root(plugged, now);
    root.phase = Phase::Active;
    root.activated_at = Some(now);
    let mut journal = Journal {
        generation: 1,
        epoch: 0,
        trust_domain: trust_domain.clone(),
        longest_leaf: leaf.max,
        authorities: vec![root],
        denied: Vec::new(),
    };
    journal.list_others(plugged, now);
    let done = Done::PluggedIssuerActivated {
        id: plugged.issuer.id().clone(),
    };
    (journal, done)
}

/// What is due for what is plugged in; `None` where the journal has it all.
pub fn plug(journal: &Journal, plugged: &Plugged, now: Timestamp) -> Option<Step> {
    let now = whole_seconds(now);
    let mut next = journal.clone();
    let mut done = next.take_over(plugged, now);
    if next.list_others(plugged, now) {
        done = done.or(Some(Done::TrustChanged));
    }
    if next.bundle() != journal.bundle() {
        next.generation = next.generation.saturating_add(1);
    }
    done.map(|done| Step::Save(Box::new(next), done))
}

/// What time alone brings: a plugged root that everybody knows begins to sign, a drained one is trusted no more.
pub(super) fn elapsed(journal: &Journal, now: Timestamp) -> Option<Step> {
    let due = |authority: &&RootAuthority| match authority.phase {
        Phase::Published => authority.is_next() && now >= activation(journal, authority),
        Phase::Draining => authority.drain_until.is_some_and(|until| now >= until),
        Phase::Prepared | Phase::Active | Phase::Retired => false,
    };
    let found = journal.authorities.iter().find(due)?;
    let (id, phase) = (found.id().clone(), found.phase);
    let now = whole_seconds(now);
    let mut next = journal.clone();
    let done = if phase == Phase::Published {
        next.activate(&id, now);
        Done::RootActivated { id }
    } else {
        for authority in next.authorities.iter_mut().filter(|a| *a.id() == id) {
            authority.retire(now);
        }
        next.generation = next.generation.saturating_add(1);
        Done::RootRetired { id }
    };
    next.authorities.retain(|authority| {
        let ended = authority.retired_at.map(|since| on(since, KEPT_RETIRED));
        authority.phase != Phase::Retired || ended.is_some_and(|end| now < end)
    });
    Some(Step::Save(Box::new(next), done))
}

/// When `elapsed` has something to do.
pub fn next_elapsed(journal: &Journal) -> Option<Timestamp> {
    let due = |authority: &RootAuthority| match authority.phase {
        Phase::Published if authority.is_next() => Some(activation(journal, authority)),
        Phase::Draining => authority.drain_until,
        _ => None,
    };
    journal.authorities.iter().filter_map(due).min()
}

/// When everybody knows a root that was published: who learns of roots with its certificates alone asks for one at half of
/// a leaf's life. An hour before the present issuer ends at the latest: some may refuse the new one then, but all would
/// refuse an ended one.
fn activation(journal: &Journal, authority: &RootAuthority) -> Timestamp {
    let since = authority.published_at.unwrap_or(authority.prepared_at);
    let known = on(
        since,
        journal.longest_leaf / 2 + Duration::from_secs(5 * 60),
    );
    let signing = journal.active().intermediate(IntermediateState::Active);
    let ends = signing.map(|signing| super::back(end_of(signing, journal.active()), HOUR));
    known.min(ends.unwrap_or(known))
}

fn end_of(intermediate: &Intermediate, root: &RootAuthority) -> Timestamp {
    let above = intermediate.above.iter().chain([&root.certificate]);
    above.fold(intermediate.certificate.validity().not_after, |end, c| {
        end.min(c.validity().not_after)
    })
}

/// How long the record of a root stays that is trusted no more.
const KEPT_RETIRED: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// After a root stopped signing: a replica that is cut off may sign with it for [`STALE_GRACE`] more, what it signs lives
/// as long as any leaf, and clocks differ.
fn drained(longest_leaf: Duration, now: Timestamp) -> Timestamp {
    on(now, STALE_GRACE + longest_leaf + Duration::from_secs(600))
}

impl Journal {
    /// Makes the plugged issuer the one that signs, or that is to sign next.
    fn take_over(&mut self, plugged: &Plugged, now: Timestamp) -> Option<Done> {
        let id = plugged.root.id();
        let withdrawn = self.withdraw_others(plugged, now);
        let Some(known) = self.authorities.iter_mut().find(|known| {
            known.id() == id && known.phase != Phase::Retired && known.phase != Phase::Prepared
        }) else {
            self.authorities.retain(|record| record.id() != id);
            self.authorities.push(plugged_root(plugged, now));
            return Some(Done::RootPublished { id: id.clone() });
        };
        let renewed = known.certificate != plugged.root;
        known.certificate = plugged.root.clone();
        // A root that was made here and whose key the operator has now: from here on it is the operator's.
        (known.kind, known.key) = (Kind::Plugged, None);
        let changed = known.sign_with(plugged, now);
        match known.phase {
            // Everybody trusts it still.
            Phase::Draining => {
                self.activate(id, now);
                Some(Done::RootActivated { id: id.clone() })
            }
            _ if changed => Some(Done::PluggedIssuerActivated {
                id: plugged.issuer.id().clone(),
            }),
            _ if renewed || withdrawn => Some(Done::TrustChanged),
            _ => None,
        }
    }

    /// A root that was to sign next is not to any more. It signed nothing, so nobody needs it.
    fn withdraw_others(&mut self, plugged: &Plugged, now: Timestamp) -> bool {
        let mut withdrawn = false;
        for other in &mut self.authorities {
            if other.is_next() && other.kind == Kind::Plugged && other.id() != plugged.root.id() {
                other.retire(now);
                withdrawn = true;
            }
        }
        withdrawn
    }

    fn activate(&mut self, id: &KeyId, now: Timestamp) {
        let longest = self.longest_leaf;
        for authority in &mut self.authorities {
            if authority.id() == id {
                authority.phase = Phase::Active;
                authority.activated_at = Some(now);
                authority.drain_until = None;
            } else if authority.phase == Phase::Active {
                authority.drain(drained(longest, now));
            }
        }
    }

    /// Trusts the roots that are listed beside the issuer's, and lets those go that are listed no more.
    fn list_others(&mut self, plugged: &Plugged, now: Timestamp) -> bool {
        let mut changed = false;
        let longest = self.longest_leaf;
        let listed = |id: &KeyId| plugged.others.iter().any(|other| other.id() == id);
        for known in &mut self.authorities {
            let only_trusted = known.phase == Phase::Published && !known.is_next();
            let is_listed = listed(known.id());
            if only_trusted && !is_listed {
                known.drain(drained(longest, now));
                changed = true;
            } else if known.phase == Phase::Draining && is_listed {
                known.phase = Phase::Published;
                (known.kind, known.drain_until) = (Kind::Plugged, None);
                known.intermediates.clear();
                changed = true;
            }
        }
        for other in &plugged.others {
            let trusted = |known: &&RootAuthority| known.phase.is_trusted();
            let mut known = self.authorities.iter().filter(trusted);
            if !known.any(|known| known.id() == other.id()) {
                self.authorities.retain(|record| record.id() != other.id());
                self.authorities.push(trusted_root(other.clone(), now));
                changed = true;
            }
        }
        changed
    }
}

impl RootAuthority {
    /// Whether it did not already.
    fn sign_with(&mut self, plugged: &Plugged, now: Timestamp) -> bool {
        let present = self.intermediate(IntermediateState::Active);
        if present.is_some_and(|present| {
            present.certificate == plugged.issuer
                && present.above == plugged.above
                && present.key.is_some()
        }) {
            return false;
        }
        for past in &mut self.intermediates {
            past.state = IntermediateState::Past;
            past.key = None;
        }
        self.intermediates.retain(|past| {
            past.certificate.id() != plugged.issuer.id()
                && now < past.certificate.validity().not_after
        });
        let surplus = (self.intermediates.len() + 1).saturating_sub(KEPT_INTERMEDIATES);
        self.intermediates.drain(..surplus);
        self.intermediates.push(signing(plugged));
        true
    }

    fn drain(&mut self, until: Timestamp) {
        self.phase = Phase::Draining;
        self.drain_until = Some(until);
        self.forget_keys();
    }

    fn retire(&mut self, now: Timestamp) {
        self.phase = Phase::Retired;
        self.retired_at = Some(now);
        self.forget_keys();
    }

    fn forget_keys(&mut self) {
        self.key = None;
        for intermediate in &mut self.intermediates {
            intermediate.state = IntermediateState::Past;
            intermediate.key = None;
        }
    }
}

fn plugged_root(plugged: &Plugged, now: Timestamp) -> RootAuthority {
    RootAuthority {
        intermediates: vec![signing(plugged)],
        ..trusted_root(plugged.root.clone(), now)
    }
}

fn signing(plugged: &Plugged) -> Intermediate {
    Intermediate {
        certificate: plugged.issuer.clone(),
        above: plugged.above.clone(),
        key: Some(plugged.key.clone()),
        state: IntermediateState::Active,
    }
}

fn trusted_root(certificate: CaCertificate, now: Timestamp) -> RootAuthority {
    RootAuthority {
        kind: Kind::Plugged,
        certificate,
        key: None,
        cross_certificates: Vec::new(),
        phase: Phase::Published,
        prepared_at: now,
        published_at: Some(now),
        activated_at: None,
        drain_until: None,
        retired_at: None,
        tainted: None,
        intermediates: Vec::new(),
    }
}

#[cfg(test)]
mod tests;
