use super::*;
use crate::ca::{
    Authority,
    peer::{self, Side},
    tests::support::{at, authority, founded, new_key, roll, workload},
};

const BIRTH: &str = "2026-01-01T00:00:00Z";

fn policy() -> RotationPolicy {
    RotationPolicy::default()
}

/// Does what the leader does, without a home: until there is nothing to do at `now`.
fn settle(
    journal: &mut Journal,
    now: Timestamp,
    policy: &RotationPolicy,
) -> (Vec<Done>, Timestamp) {
    let mut all = Vec::new();
    loop {
        match step(journal, now, policy) {
            Step::Wait(until) => return (all, until),
            Step::Save(next, done) => {
                *journal = *next;
                all.push(done);
            }
            Step::MakeKey(purpose) => {
                let (next, done) =
                    with_key(journal, purpose, new_key(), roll(), now, policy).expect("signed");
                *journal = next;
                all.push(done);
            }
            Step::Refuse(refusal) => panic!("{now}: {refusal}"),
        }
        assert!(all.len() < 5, "it settles");
    }
}

fn reread(journal: &Journal) -> Journal {
    Journal::from_json(&journal.to_json()).expect("our own text")
}

#[test]
fn the_defaults_fit_into_each_other() {
    assert_eq!(policy().check(), Ok(()));
}

#[test]
fn lifetimes_that_do_not_fit_are_refused_with_words() {
    let with = |change: fn(&mut RotationPolicy)| {
        let mut policy = policy();
        change(&mut policy);
        policy.check().expect_err("does not fit").to_string()
    };
    let table = [
        (
            with(|p| p.leaf.max = 15 * DAY),
            "the longest leaf lives 15 d, but may live up to 359 h: half of the intermediate's life less an hour",
        ),
        (
            with(|p| p.intermediate_life = 913 * DAY),
            "an intermediate lives 913 d, but may live up to 21900 h: half of the root's life",
        ),
        (
            with(|p| p.leaf.min = 2 * DAY),
            "leaf lifetimes must be in order: shortest 2 d, default 1 d, longest 7 d",
        ),
        (
            with(|p| p.leaf.max = HOUR),
            "leaf lifetimes must be in order: shortest 5 min, default 1 d, longest 1 h",
        ),
        (
            with(|p| p.leaf.min = Duration::from_secs(1)),
            "the shortest leaf lives 1 s; at least 1 minute is needed",
        ),
        (
            with(|p| p.intermediate_life = Duration::ZERO),
            "the longest leaf lives 7 d, but may live up to 0 s: half of the intermediate's life less an hour",
        ),
        (
            with(|p| p.root_life = 36_500 * DAY),
            "the root lives 36500 d; 50 years is the most",
        ),
    ];
    for (text, want) in table {
        assert_eq!(text, want);
    }
    let mut longest = policy();
    longest.leaf.max = 15 * DAY - HOUR;
    longest.intermediate_life = 30 * DAY;
    assert_eq!(longest.check(), Ok(()));
}

#[test]
fn nothing_is_due_before_half_of_the_intermediates_life() {
    let birth = at(BIRTH);
    let journal = founded(birth, &policy());
    // From ten minutes before the birth to thirty days after it.
    let half = birth + 15 * DAY - Duration::from_secs(5 * 60);
    for now in [birth, birth + DAY, half - Duration::from_secs(1)] {
        assert!(matches!(step(&journal, now, &policy()), Step::Wait(until) if until == half));
    }
    assert!(matches!(
        step(&journal, half, &policy()),
        Step::MakeKey(KeyFor::NextIntermediate)
    ));
}

#[test]
fn the_next_intermediate_is_written_before_it_signs_and_the_old_key_goes_at_once() {
    let mut journal = founded(at(BIRTH), &policy());
    let now = at(BIRTH) + 16 * DAY;
    let old = journal.active().intermediates[0].certificate.id().clone();

    let (prepared, done) = with_key(
        &journal,
        KeyFor::NextIntermediate,
        new_key(),
        roll(),
        now,
        &policy(),
    )
    .expect("signed");
    let next = prepared
        .active()
        .intermediate(IntermediateState::Next)
        .expect("next");
    let id = next.certificate.id().clone();
    assert_eq!(done, Done::IntermediatePrepared { id: id.clone() });
    assert_eq!(
        *authority(&prepared).issuer_key_id(),
        old,
        "the old one signs on"
    );
    assert_eq!(
        prepared.generation(),
        journal.generation(),
        "no trust changes"
    );

    let Step::Save(active, done) = step(&reread(&prepared), now, &policy()) else {
        panic!("a prepared intermediate is activated");
    };
    assert_eq!(done, Done::IntermediateActivated { id: id.clone() });
    assert_eq!(*authority(&active).issuer_key_id(), id);
    let past = active
        .active()
        .intermediate(IntermediateState::Past)
        .expect("past");
    assert_eq!(*past.certificate.id(), old);
    assert!(past.key.is_none());
    assert_eq!(active.bundle(), journal.bundle());

    journal = reread(&active);
    let (done, next) = settle(&mut journal, now, &policy());
    assert_eq!(done, []);
    assert_eq!(next, now + 15 * DAY - Duration::from_secs(5 * 60));
}

#[test]
fn a_prepared_intermediate_that_ended_before_its_turn_is_made_anew() {
    let birth = at(BIRTH);
    let journal = founded(birth, &policy());
    let (prepared, _) = with_key(
        &journal,
        KeyFor::NextIntermediate,
        new_key(),
        roll(),
        birth + 16 * DAY,
        &policy(),
    )
    .expect("signed");
    let stale = prepared
        .active()
        .intermediate(IntermediateState::Next)
        .expect("next");
    let stale = stale.certificate.id().clone();
    let mut journal = reread(&prepared);
    // The cluster was off for a year.
    let now = birth + 400 * DAY;
    let (done, _) = settle(&mut journal, now, &policy());
    assert_eq!(done.len(), 2, "{done:?}");
    assert_ne!(*authority(&journal).issuer_key_id(), stale);
    assert_eq!(
        journal.active().intermediates.len(),
        1,
        "what has ended is forgotten"
    );
    authority(&journal).rehearse(now).expect("peers accept it");
}

#[test]
fn an_ended_intermediate_is_replaced_before_anything_is_signed() {
    let birth = at(BIRTH);
    let mut journal = founded(birth, &policy());
    let now = birth + 60 * DAY;
    let key = new_key().public_key();
    let issue = |authority: &Authority| {
        let serial = Serial::random(roll());
        authority.issue(&key, &workload("a", "b"), DAY, serial, now)
    };
    assert_eq!(
        issue(&authority(&journal)).expect_err("ended").code(),
        "IssuerExpiring"
    );
    settle(&mut journal, now, &policy());
    let issued = issue(&authority(&journal)).expect("signed");
    peer::verify(&issued.chain, &journal.bundle(), Side::Server, now).expect("accepted");
}

#[test]
fn by_hand_an_intermediate_rotates_at_any_time() {
    let now = at(BIRTH) + HOUR;
    let mut journal = founded(at(BIRTH), &policy());
    let before = authority(&journal).issuer_key_id().clone();
    assert!(matches!(
        step_now(&journal, now, &policy()),
        Step::MakeKey(_)
    ));
    let (next, _) = with_key(
        &journal,
        KeyFor::NextIntermediate,
        new_key(),
        roll(),
        now,
        &policy(),
    )
    .expect("signed");
    journal = reread(&next);
    let (done, _) = settle(&mut journal, now, &policy());
    assert_eq!(done.len(), 1);
    assert_ne!(*authority(&journal).issuer_key_id(), before);
}

#[test]
fn rotations_in_a_loop_do_not_fill_the_secret() {
    let mut journal = founded(at(BIRTH), &policy());
    for minute in 1..60 {
        let now = at(BIRTH) + Duration::from_secs(60 * minute);
        let (next, _) = with_key(
            &journal,
            KeyFor::NextIntermediate,
            new_key(),
            roll(),
            now,
            &policy(),
        )
        .expect("signed");
        journal = next;
        settle(&mut journal, now, &policy());
        assert!(journal.active().intermediates.len() <= KEPT_INTERMEDIATES);
    }
    let journal = reread(&journal);
    assert!(journal.to_json().len() < 64 * 1024);
    assert_eq!(
        journal.active().intermediates.last().map(|i| i.state),
        Some(IntermediateState::Active)
    );
}

#[test]
fn intermediates_never_outlive_their_root_and_do_not_multiply_at_its_end() {
    let birth = at(BIRTH);
    let policy = RotationPolicy {
        root_life: 100 * DAY,
        ..policy()
    };
    let mut journal = founded(birth, &policy);
    let root_end = birth + 100 * DAY;
    let mut made = 0;
    for hour in 0..100 * 24 {
        let now = birth + HOUR * hour;
        let (done, _) = settle(&mut journal, now, &policy);
        made += done
            .iter()
            .filter(|d| matches!(d, Done::IntermediatePrepared { .. }))
            .count();
        let end = authority(&journal).issuer_validity().not_after;
        assert!(end <= root_end);
    }
    // At days 15, 30, .. 75; the last one ends with the root.
    assert_eq!(made, 5);
    assert_eq!(authority(&journal).issuer_validity().not_after, root_end);
    assert!(matches!(
        step_now(&journal, root_end - HOUR, &policy),
        Step::Refuse(Refusal::NothingGained(end)) if end == root_end
    ));
    assert!(matches!(
        step(&journal, root_end, &policy),
        Step::Refuse(Refusal::RootEnded(end)) if end == root_end
    ));
}

#[test]
fn g27_a_clock_behind_the_journal_rotates_nothing() {
    let now = at(BIRTH);
    let mut journal = founded(now, &policy());
    assert!(matches!(
        step(&journal, now - Duration::from_secs(299), &policy()),
        Step::Wait(_)
    ));
    assert!(matches!(
        step(&journal, now - Duration::from_secs(301), &policy()),
        Step::Refuse(Refusal::ClockJump { newest, .. }) if newest == now
    ));
    // What it saw last counts, not only the founding.
    let later = now + 20 * DAY;
    settle(&mut journal, later, &policy());
    assert!(matches!(
        step(&journal, later - HOUR, &policy()),
        Step::Refuse(Refusal::ClockJump { newest, .. }) if newest == later
    ));
    assert!(matches!(
        step_now(&journal, later - HOUR, &policy()),
        Step::Refuse(Refusal::ClockJump { .. })
    ));
}

#[test]
fn a_longer_leaf_is_in_the_journal_before_it_is_granted() {
    let now = at(BIRTH);
    let mut journal = founded(now, &policy());
    let mut longer = policy();
    longer.leaf.max = 10 * DAY;
    let key = new_key().public_key();
    let end = |journal: &Journal| {
        let serial = Serial::random(roll());
        let issued = authority(journal).issue(&key, &workload("a", "b"), 10 * DAY, serial, now);
        issued.expect("signed").validity.not_after
    };
    assert_eq!(end(&journal), now + 7 * DAY);
    let (done, _) = settle(&mut journal, now, &longer);
    assert_eq!(done, [Done::LongestLeafRaised { seconds: 864_000 }]);
    assert_eq!(end(&reread(&journal)), now + 10 * DAY);
    let (done, _) = settle(&mut journal, now, &policy());
    assert_eq!(done, [], "it never falls: a leaf may still be out");
}

#[test]
fn denied_leaves_are_forgotten_once_they_have_ended() {
    let now = at(BIRTH);
    let mut journal = founded(now, &policy());
    let denied = |days: u32| crate::ca::journal::Denied {
        serial: "40".repeat(16),
        until: now + DAY * days,
    };
    journal.denied = vec![denied(3), denied(90)];
    settle(&mut journal, now + 20 * DAY, &policy());
    assert_eq!(journal.denied(), [denied(90)]);
}

/// Every hour of ten years: a leaf is issued, and the leaf that was issued a leaf's life ago is still accepted by every
/// peer, those that know the newest intermediate and those that do not, since the chain carries it.
#[test]
fn r01_ten_years_of_rotation_leave_no_leaf_that_a_peer_refuses() {
    let birth = at(BIRTH);
    let policy = RotationPolicy {
        root_life: 22 * 365 * DAY,
        ..policy()
    };
    let mut journal = founded(birth, &policy);
    let bundle = journal.bundle();
    let profile = workload("shop", "web");
    let key = new_key().public_key();
    let mut intermediates = 1;
    // One leaf for each of the last 24 hours.
    let mut leaves = std::collections::VecDeque::new();
    let mut signing = authority(&journal);
    for hour in 0..10 * 366 * 24_u32 {
        let now = birth + HOUR * hour;
        let (done, next) = settle(&mut journal, now, &policy);
        assert!(next > now);
        if !done.is_empty() {
            journal = reread(&journal);
            signing = authority(&journal);
            signing
                .rehearse(now)
                .expect("peers accept the new intermediate");
            intermediates += 1;
        }
        let serial = Serial::for_workload(now, roll());
        let issued = signing
            .issue(&key, &profile, DAY, serial, now)
            .expect("signed");
        assert_eq!(
            issued.validity.not_after,
            now + DAY,
            "hour {hour}: never cut short"
        );
        leaves.push_back(issued);
        if leaves.len() > 24 {
            leaves.pop_front();
        }
        for leaf in &leaves {
            assert!(leaf.validity.contains(now), "hour {hour}");
        }
        // Full path validation where something has just changed, and once a week.
        if !done.is_empty() || hour % (7 * 24) == 0 {
            for leaf in [leaves.front(), leaves.back()].into_iter().flatten() {
                for side in [Side::Server, Side::Client] {
                    peer::verify(&leaf.chain, &bundle, side, now)
                        .unwrap_or_else(|error| panic!("hour {hour}: {error}"));
                }
            }
        }
    }
    assert_eq!(journal.bundle(), bundle);
    // One every 15 days, less the 5 minutes by which a backdated beginning moves the half.
    assert_eq!(intermediates, 1 + (10 * 366 - 1) / 15);
}
