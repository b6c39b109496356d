use super::*;
use crate::ca::{
    Authority, Serial, Validity,
    peer::{self, Side},
    plugged::read,
    rotation::{RotationPolicy, step_with},
    tests::support::{
        DAY, OperatorCa, at, authority, founded, mesh, new_key, plugged_files, roll, workload,
    },
};

const BIRTH: &str = "2026-01-01T00:00:00Z";

/// When a root that was published at `BIRTH` signs: half of the longest leaf (7 d) and 5 min later.
const KNOWN: &str = "2026-01-04T12:05:00Z";

fn years(count: u32) -> Validity {
    Validity {
        not_before: at("2025-12-01T00:00:00Z"),
        not_after: on(at(BIRTH), DAY * 365 * count),
    }
}

fn root(name: &str) -> OperatorCa {
    OperatorCa::root(name, years(10))
}

fn issuer(root: &OperatorCa) -> OperatorCa {
    root.below("issuer", years(1), Some(0))
}

fn plugged(issuer: &OperatorCa, roots: &[&OperatorCa]) -> Plugged {
    let files = plugged_files(issuer, &[issuer], roots);
    read(&files, &mesh(), &LeafPolicy::default(), at(BIRTH)).expect("whole files")
}

/// Does what a leader does until nothing is due, with every journal written and read back.
fn settle(journal: &mut Journal, plugged: Option<&Plugged>, now: Timestamp) -> Vec<Done> {
    let mut all = Vec::new();
    loop {
        match step_with(journal, plugged, now, &RotationPolicy::default()) {
            Step::Wait(until) => {
                assert!(until > now, "{until} is over");
                return all;
            }
            Step::Save(next, done) => {
                *journal = Journal::from_json(&next.to_json()).expect("our own text");
                all.push(done);
            }
            Step::MakeKey(_) => panic!("a key is made below an operator's root"),
            Step::Refuse(refusal) => panic!("{refusal}"),
        }
        assert!(all.len() < 5, "it settles: {all:?}");
    }
}

fn leaf(authority: &Authority, now: Timestamp) -> Vec<Vec<u8>> {
    let key = new_key().public_key();
    let serial = Serial::random(roll());
    let issued = authority.issue(&key, &workload("prod", "web"), DAY, serial, now);
    issued.expect("issued").chain
}

fn accepted(chain: &[Vec<u8>], by: &Authority, now: Timestamp) -> bool {
    peer::verify(chain, by.bundle(), Side::Client, now).is_ok()
}

fn phases(journal: &Journal) -> Vec<Phase> {
    journal.authorities().iter().map(|a| a.phase).collect()
}

#[test]
fn an_authority_may_begin_with_an_operators_issuer() {
    let root = root("a");
    let files = plugged(&issuer(&root), &[&root]);
    let (journal, _) = first_plugged(&mesh(), &files, at(BIRTH), &LeafPolicy::default());
    let mut journal = Journal::from_json(&journal.to_json()).expect("our own text");
    let authority = authority(&journal);
    authority.rehearse(at(BIRTH)).expect("accepted by a peer");
    assert_eq!(authority.issuer_key_id(), files.issuer().id());
    assert_eq!((journal.generation(), journal.bundle().len()), (1, 1));
    assert_eq!(settle(&mut journal, Some(&files), at(BIRTH)), []);
    // Within five minutes of its issuer's making, too: the clock is not behind.
    assert!(journal.newest() <= at(BIRTH));
}

#[test]
fn a_leaf_never_outlives_a_short_lived_issuer() {
    let root = root("a");
    let end = at("2026-01-01T03:00:00Z");
    let short = Validity {
        not_after: end,
        ..years(1)
    };
    let files = plugged(&root.below("short", short, Some(0)), &[&root]);
    let (journal, _) = first_plugged(&mesh(), &files, at(BIRTH), &LeafPolicy::default());
    let authority = authority(&journal);
    let serial = Serial::random(roll());
    let key = new_key().public_key();
    let issue = |now| authority.issue(&key, &workload("prod", "web"), DAY, serial, now);
    assert_eq!(issue(at(BIRTH)).expect("issued").validity.not_after, end);
    let late = issue(at("2026-01-01T02:56:00Z")).expect_err("too late");
    assert_eq!(late.code(), "IssuerExpiring");
}

#[test]
fn another_issuer_below_the_same_root_signs_at_once_and_the_old_key_is_gone() {
    let root = root("a");
    let first = plugged(&issuer(&root), &[&root]);
    let (mut journal, _) = first_plugged(&mesh(), &first, at(BIRTH), &LeafPolicy::default());
    let old = leaf(&authority(&journal), at(BIRTH));
    let second = plugged(&issuer(&root), &[&root]);
    let done = settle(&mut journal, Some(&second), at(BIRTH));
    let id = second.issuer().id().clone();
    assert_eq!(done, [Done::PluggedIssuerActivated { id: id.clone() }]);
    assert_eq!(*authority(&journal).issuer_key_id(), id);
    assert_eq!(journal.generation(), 1, "nothing else is trusted");
    let keys = journal.active().intermediates.iter();
    assert_eq!(keys.filter(|i| i.key.is_some()).count(), 1);
    assert!(accepted(&old, &authority(&journal), at(BIRTH)));
    // and back again
    settle(&mut journal, Some(&first), at(BIRTH));
    assert_eq!(authority(&journal).issuer_key_id(), first.issuer().id());
}

#[test]
fn another_root_is_trusted_at_once_signs_when_it_is_known_and_the_old_one_goes_last() {
    let begin = founded(at(BIRTH), &RotationPolicy::default());
    let (a, b) = (root("a"), root("b"));
    let of_operator = plugged(&issuer(&a), &[&a]);
    let (plugged_in, _) = first_plugged(&mesh(), &of_operator, at(BIRTH), &LeafPolicy::default());
    for (what, mut journal) in [("a root made here", begin), ("an operator's", plugged_in)] {
        let files = plugged(&issuer(&b), &[&b]);
        let before = authority(&journal);
        let old_leaf = leaf(&before, at(BIRTH));
        let done = settle(&mut journal, Some(&files), at(BIRTH));
        let id = files.root().id().clone();
        assert_eq!(done, [Done::RootPublished { id: id.clone() }], "{what}");
        let published = authority(&journal);
        assert_eq!((journal.generation(), published.bundle().len()), (2, 2));
        assert_eq!(published.issuer_key_id(), before.issuer_key_id());

        // The Secret may be gone by then: what was taken over is in the journal.
        let early = super::super::back(at(KNOWN), Duration::from_secs(1));
        assert_eq!(settle(&mut journal, None, early), []);
        let done = settle(&mut journal, None, at(KNOWN));
        assert_eq!(done, [Done::RootActivated { id }], "{what}");
        let active = authority(&journal);
        assert_eq!(active.issuer_key_id(), files.issuer().id());
        assert_eq!(phases(&journal), [Phase::Draining, Phase::Active]);
        let left = |a: &RootAuthority| a.key.is_some() || a.intermediates[0].key.is_some();
        assert!(!left(&journal.authorities()[0]), "its keys are gone");
        let new_leaf = leaf(&active, at(KNOWN));
        assert!(accepted(&new_leaf, &published, at(KNOWN)), "{what}");
        assert!(accepted(&old_leaf, &active, at(BIRTH)), "{what}");

        // 24 h that a replica may be cut off, 7 d of the longest leaf, 10 min.
        let drained = at("2026-01-12T12:15:00Z");
        let early = super::super::back(drained, Duration::from_secs(1));
        assert_eq!(settle(&mut journal, Some(&files), early), []);
        settle(&mut journal, Some(&files), drained);
        assert_eq!(phases(&journal), [Phase::Retired, Phase::Active]);
        let last = authority(&journal);
        assert_eq!((journal.generation(), last.bundle().len()), (3, 1));
    }
}

#[test]
fn a_new_root_does_not_wait_until_the_present_issuer_has_ended() {
    let (a, b) = (root("a"), root("b"));
    let short = Validity {
        not_after: at("2026-01-02T00:00:00Z"),
        ..years(1)
    };
    let first = plugged(&a.below("short", short, Some(0)), &[&a]);
    let (mut journal, _) = first_plugged(&mesh(), &first, at(BIRTH), &LeafPolicy::default());
    let second = plugged(&issuer(&b), &[&b]);
    settle(&mut journal, Some(&second), at(BIRTH));
    assert_eq!(next_elapsed(&journal), Some(at("2026-01-01T23:00:00Z")));
    settle(&mut journal, Some(&second), at("2026-01-01T23:00:00Z"));
    assert_eq!(authority(&journal).issuer_key_id(), second.issuer().id());
}

#[test]
fn who_changes_its_mind_before_the_new_root_signs_has_lost_nothing() {
    let (a, b) = (root("a"), root("b"));
    let (first, second) = (plugged(&issuer(&a), &[&a]), plugged(&issuer(&b), &[&b]));
    let (mut journal, _) = first_plugged(&mesh(), &first, at(BIRTH), &LeafPolicy::default());
    settle(&mut journal, Some(&second), at(BIRTH));
    settle(&mut journal, Some(&first), at(BIRTH));
    assert_eq!(phases(&journal), [Phase::Active, Phase::Retired]);
    assert_eq!(authority(&journal).issuer_key_id(), first.issuer().id());
    // A root that drains is trusted everywhere, so it signs again without a wait.
    settle(&mut journal, Some(&second), at(BIRTH));
    settle(&mut journal, Some(&second), at(KNOWN));
    let done = settle(&mut journal, Some(&first), at(KNOWN));
    assert!(matches!(done[..], [Done::RootActivated { .. }]), "{done:?}");
    assert_eq!(authority(&journal).issuer_key_id(), first.issuer().id());
}

#[test]
fn roots_that_are_only_listed_are_trusted_and_sign_nothing() {
    let (a, b) = (root("a"), root("b"));
    let both = plugged(&issuer(&a), &[&b, &a]);
    let (mut journal, _) = first_plugged(&mesh(), &both, at(BIRTH), &LeafPolicy::default());
    assert_eq!(journal.bundle().len(), 2);
    assert_eq!(
        settle(&mut journal, Some(&both), at("2026-02-01T00:00:00Z")),
        []
    );
    assert_eq!(authority(&journal).issuer_key_id(), both.issuer().id());
    // Known for a month, so it may sign as soon as it is asked to.
    let next = plugged(&issuer(&b), &[&a, &b]);
    settle(&mut journal, Some(&next), at("2026-02-01T00:00:00Z"));
    assert_eq!(authority(&journal).issuer_key_id(), next.issuer().id());
    // What is listed stays trusted, what is listed no more leaves when its leaves have ended.
    settle(&mut journal, Some(&next), at("2026-05-01T00:00:00Z"));
    assert_eq!(journal.bundle().len(), 2);
    let alone = plugged(&issuer(&b), &[&b]);
    settle(&mut journal, Some(&alone), at("2026-05-01T00:00:00Z"));
    assert_eq!(journal.bundle().len(), 2, "it drains");
    settle(&mut journal, Some(&alone), at("2026-06-01T00:00:00Z"));
    assert_eq!(journal.bundle().len(), 1);
}

#[test]
fn one_issuers_key_may_be_signed_by_an_old_and_a_new_root() {
    let (a, b) = (root("a"), root("b"));
    let below_a = issuer(&a);
    let below_b = b.certify(&below_a, "issuer", years(1));
    let first = plugged(&below_a, &[&a]);
    let second = plugged(&below_b, &[&b]);
    assert_eq!(first.issuer().id(), second.issuer().id());
    let (mut journal, _) = first_plugged(&mesh(), &first, at(BIRTH), &LeafPolicy::default());
    settle(&mut journal, Some(&second), at(BIRTH));
    settle(&mut journal, Some(&second), at(KNOWN));
    let active = authority(&journal);
    assert_eq!(active.root_key_id(), second.root().id());
    active.rehearse(at(KNOWN)).expect("accepted by a peer");
}
