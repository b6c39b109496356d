use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicU32, AtomicUsize, Ordering},
    },
};

use prometheus_client::{encoding::text::encode, registry::Registry};

use super::*;
use crate::ca::{
    KeyedChain, Serial,
    journal::{IntermediateState, Journal, Phase},
    peer::{self, Side},
    plugged::Files,
    profile::Profile,
    rotation::Done,
    tests::support::{
        DAY, HOUR, OperatorCa, at, founded, mesh, new_key, plugged_files, roll, workload,
    },
};

const BIRTH: &str = "2026-01-01T00:00:00Z";

/// A home in memory, shared by all who open it, that fails where a test says so.
#[derive(Clone, Default)]
pub(crate) struct MemoryHome(Arc<Shared>);

#[derive(Default)]
struct Shared {
    content: Mutex<Content>,
    plan: Mutex<Vec<Fault>>,
    writes: AtomicUsize,
    loads: AtomicUsize,
}

#[derive(Default)]
struct Content {
    version: u64,
    /// The text, so that every read is a parse.
    text: Option<Vec<u8>>,
    earlier_life: bool,
    /// What an operator put beside it.
    plugged: Option<Files>,
    /// Who holds the store up: every call fails.
    unreachable: bool,
}

/// What happens to the next write.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// Somebody else was first (and really was: the version moved).
    Conflict,
    /// The process dies before the write reaches the store.
    KilledBefore,
    /// The write reaches the store, its answer never the process.
    KilledAfter,
}

impl MemoryHome {
    pub(crate) fn journal(&self) -> Option<Journal> {
        let content = self.0.content.lock().expect("no panic while locked");
        let text = content.text.as_ref()?;
        Some(Journal::from_json(text).expect("only good journals are written"))
    }

    fn change(&self, change: impl FnOnce(&mut Content)) {
        change(&mut self.0.content.lock().expect("no panic while locked"));
    }

    fn put(&self, text: Option<Vec<u8>>) {
        self.change(|content| {
            content.text = text;
            content.version += 1;
        });
    }

    fn plan(&self, faults: &[Fault]) {
        let mut plan = self.0.plan.lock().expect("no panic while locked");
        *plan = faults.iter().rev().copied().collect();
    }

    fn writes(&self) -> usize {
        self.0.writes.load(Ordering::Relaxed)
    }

    fn write(&self, seen: Option<&str>, journal: &Journal) -> Result<Stored, HomeError> {
        let fault = self.0.plan.lock().expect("no panic while locked").pop();
        let mut content = self.0.content.lock().expect("no panic while locked");
        if content.unreachable || matches!(fault, Some(Fault::KilledBefore)) {
            return Err(unreachable());
        }
        if matches!(fault, Some(Fault::Conflict)) {
            content.version += 1;
        }
        let expected = match seen {
            None => content.text.is_none(),
            Some(seen) => content.text.is_some() && seen == content.version.to_string(),
        };
        if !expected {
            let home = "memory".to_owned();
            return Err(HomeError::Conflict { home });
        }
        content.version += 1;
        content.text = Some(journal.to_json().to_vec());
        self.0.writes.fetch_add(1, Ordering::Relaxed);
        if matches!(fault, Some(Fault::KilledAfter)) {
            return Err(unreachable());
        }
        Ok(Stored {
            journal: journal.clone(),
            version: content.version.to_string(),
        })
    }
}

fn unreachable() -> HomeError {
    HomeError::Unreachable {
        home: "memory".to_owned(),
        source: "a test says so".into(),
    }
}

impl JournalHome for MemoryHome {
    async fn load(&self) -> Result<Option<Stored>, HomeError> {
        tokio::task::yield_now().await;
        self.0.loads.fetch_add(1, Ordering::Relaxed);
        let content = self.0.content.lock().expect("no panic while locked");
        if content.unreachable {
            return Err(unreachable());
        }
        let Some(text) = &content.text else {
            return Ok(None);
        };
        let journal = Journal::from_json(text).map_err(|error| HomeError::Unreadable {
            home: "memory".to_owned(),
            fault: error.to_string(),
        })?;
        let version = content.version.to_string();
        Ok(Some(Stored { journal, version }))
    }

    async fn create(&self, journal: &Journal) -> Result<Stored, HomeError> {
        tokio::task::yield_now().await;
        self.write(None, journal)
    }

    async fn replace(&self, seen: &str, journal: &Journal) -> Result<Stored, HomeError> {
        tokio::task::yield_now().await;
        self.write(Some(seen), journal)
    }

    async fn plugged(&self) -> Result<Option<Files>, HomeError> {
        tokio::task::yield_now().await;
        let content = self.0.content.lock().expect("no panic while locked");
        match content.unreachable {
            true => Err(unreachable()),
            false => Ok(content.plugged.clone()),
        }
    }

    async fn has_earlier_life(&self) -> Result<bool, HomeError> {
        tokio::task::yield_now().await;
        Ok(self
            .0
            .content
            .lock()
            .expect("no panic while locked")
            .earlier_life)
    }
}

/// A clock that a test moves.
#[derive(Clone)]
struct Hand(Arc<AtomicI64>);

impl Hand {
    fn at(instant: Timestamp) -> Self {
        Self(Arc::new(AtomicI64::new(instant.as_second())))
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_second(self.0.load(Ordering::Relaxed)).expect("an instant")
    }

    fn advance(&self, span: Duration) {
        let seconds = i64::try_from(span.as_secs()).expect("short");
        self.0.fetch_add(seconds, Ordering::Relaxed);
    }

    fn clock(&self) -> Clock {
        let hand = self.clone();
        Clock::new(move || hand.now())
    }
}

fn policy() -> RotationPolicy {
    RotationPolicy::default()
}

async fn try_open(
    home: &MemoryHome,
    hand: &Hand,
) -> Result<Arc<Custody<MemoryHome>>, CustodyError> {
    Custody::open(
        home.clone(),
        policy(),
        mesh(),
        hand.clock(),
        Metrics::default(),
    )
    .await
}

async fn open(home: &MemoryHome, hand: &Hand) -> Arc<Custody<MemoryHome>> {
    try_open(home, hand).await.expect("it opens")
}

/// A leaf of `from` is accepted by whoever trusts what `by` trusts.
fn accepts(from: &Authority, by: &Authority, now: Timestamp) {
    let key = new_key().public_key();
    let serial = Serial::for_workload(now, roll());
    let issued = from
        .issue(&key, &workload("a", "b"), DAY, serial, now)
        .expect("signed");
    for side in [Side::Server, Side::Client] {
        peer::verify(&issued.chain, by.bundle(), side, now).expect("accepted");
    }
}

fn samples(metrics: &Metrics) -> String {
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let mut text = String::new();
    encode(&mut text, &registry).expect("text");
    text
}

fn sample(text: &str, name: &str) -> Option<i64> {
    let line = text.lines().find(|line| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(' '))
    })?;
    line.rsplit(' ').next()?.parse().ok()
}

#[tokio::test]
async fn the_first_start_makes_one_root_and_the_second_finds_it() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let first = open(&home, &hand).await;
    assert_eq!(home.writes(), 1);
    hand.advance(HOUR);
    let second = open(&home, &hand).await;
    assert_eq!(home.writes(), 1);
    assert_eq!(first.authority().bundle(), second.authority().bundle());
    accepts(&first.authority(), &second.authority(), hand.now());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r12_fifty_replicas_starting_at_once_make_one_root() {
    for run in 0..100 {
        let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
        let mut openers = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let (home, hand) = (home.clone(), hand.clone());
            openers.spawn(async move {
                let custody = open(&home, &hand).await;
                // A leader would leave its traces now, while others have only looked for the journal.
                home.change(|content| content.earlier_life = true);
                custody.authority().root_key_id().clone()
            });
        }
        let roots: HashSet<_> = openers.join_all().await.into_iter().collect();
        assert_eq!(roots.len(), 1, "run {run}");
        assert_eq!(home.writes(), 1, "run {run}");
    }
}

#[tokio::test]
async fn a_lost_journal_is_not_replaced_by_a_new_root() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    home.change(|content| content.earlier_life = true);
    let error = try_open(&home, &hand).await.err().expect("lost");
    assert!(matches!(error, CustodyError::JournalLost), "{error}");
    assert_eq!(home.writes(), 0);
}

#[tokio::test]
async fn a_journal_that_cannot_be_read_is_left_alone() {
    let hand = Hand::at(at(BIRTH));
    for text in ["", "garbage", "{}", r#"{"format":2}"#] {
        let home = MemoryHome::default();
        home.put(Some(text.as_bytes().to_vec()));
        let error = try_open(&home, &hand).await.err().expect("unreadable");
        assert!(
            matches!(error, CustodyError::Home(HomeError::Unreadable { .. })),
            "{error}"
        );
        let clock = hand.clock();
        rotate(
            &home,
            &policy(),
            RotateRequest {
                if_due: true,
                ..Default::default()
            },
            &clock,
        )
        .await
        .expect_err("unreadable");
        assert_eq!(home.writes(), 0, "{text}");
    }
}

#[tokio::test]
async fn settings_that_contradict_the_journal_or_themselves_are_refused() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let mut odd = policy();
    odd.leaf.max = 20 * DAY;
    let open = |policy: RotationPolicy, domain: &str| {
        let domain = domain.parse().expect("a trust domain");
        Custody::open(
            home.clone(),
            policy,
            domain,
            hand.clock(),
            Metrics::default(),
        )
    };
    let error = open(odd.clone(), "cluster.local")
        .await
        .err()
        .expect("does not fit");
    assert!(matches!(error, CustodyError::Policy(_)), "{error}");
    let request = RotateRequest::default();
    let error = rotate(&home, &odd, request, &hand.clock())
        .await
        .expect_err("likewise");
    assert!(matches!(error, CustodyError::Policy(_)), "{error}");
    assert_eq!(home.writes(), 0, "nothing was made yet");
    open(policy(), "cluster.local").await.expect("fits");
    let error = open(policy(), "other.mesh")
        .await
        .err()
        .expect("another mesh");
    assert!(
        matches!(error, CustodyError::OtherTrustDomain { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn an_ended_intermediate_is_replaced_before_the_first_issuance() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let first = open(&home, &hand).await;
    hand.advance(200 * DAY);
    let custody = open(&home, &hand).await;
    assert_eq!(custody.authority().bundle(), first.authority().bundle());
    accepts(&custody.authority(), &first.authority(), hand.now());
}

#[tokio::test]
async fn a_home_that_fails_at_start_is_reported_as_passing() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    home.change(|content| content.unreachable = true);
    assert!(
        try_open(&home, &hand)
            .await
            .err()
            .expect("down")
            .is_passing()
    );
    home.change(|content| content.unreachable = false);
    // The answer to the very first write is lost: the root is there, and is found.
    home.plan(&[Fault::KilledAfter]);
    assert!(
        try_open(&home, &hand)
            .await
            .err()
            .expect("killed")
            .is_passing()
    );
    let root = home.journal().expect("written").active().id().clone();
    assert_eq!(*open(&home, &hand).await.authority().root_key_id(), root);
}

#[tokio::test]
async fn a_tick_rotates_what_is_due_and_nothing_else() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let custody = open(&home, &hand).await;
    let before = custody.authority();
    let ticked = custody.tick().await.expect("ticks");
    assert_eq!(ticked.done, []);
    assert_eq!(ticked.next, before.issuer_validity().half());
    hand.advance(15 * DAY);
    custody.refresh().await.expect("reads");
    let before = custody.authority();
    let mut watch = custody.watch();
    let ticked = custody.tick().await.expect("ticks");
    assert!(
        matches!(
            ticked.done[..],
            [
                Done::IntermediatePrepared { .. },
                Done::IntermediateActivated { .. }
            ]
        ),
        "{ticked:?}"
    );
    assert_eq!(home.writes(), 3);
    assert!(watch.has_changed().expect("open"));
    let after = watch.borrow_and_update().clone();
    assert_ne!(after.issuer_key_id(), before.issuer_key_id());
    accepts(&before, &after, hand.now());
    accepts(&after, &before, hand.now());
    assert_eq!(custody.tick().await.expect("ticks").done, []);
    assert!(
        !watch.has_changed().expect("open"),
        "nothing new, nobody is woken"
    );
}

/// The process dies at each write of the machine, before and after it; another one goes on. Three replicas sign all the
/// while, each with what it last read.
#[tokio::test]
async fn g28_killed_at_every_write_nothing_is_lost_or_made_twice() {
    let points = [Fault::KilledBefore, Fault::KilledAfter];
    for first in points {
        for at_write in 0..2 {
            for second in [
                Fault::None,
                Fault::Conflict,
                Fault::KilledBefore,
                Fault::KilledAfter,
            ] {
                let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
                let founder = open(&home, &hand).await;
                let replicas = [open(&home, &hand).await, open(&home, &hand).await];
                hand.advance(16 * DAY);
                let mut plan = vec![Fault::None; at_write];
                plan.extend([first, second]);
                home.plan(&plan);
                for replica in &replicas {
                    replica.refresh().await.expect("reads");
                }
                let story = format!("{first:?} at write {at_write}, then {second:?}");

                founder.tick().await.expect_err(&story);
                drop(founder);
                let mut prepared = HashSet::new();
                let note = |prepared: &mut HashSet<KeyId>| {
                    let journal = home.journal().expect("always there");
                    assert_eq!(journal.authorities().len(), 1);
                    for intermediate in &journal.active().intermediates {
                        prepared.insert(intermediate.certificate.id().clone());
                    }
                };
                note(&mut prepared);
                let heir = open(&home, &hand).await;
                for _ in 0..4 {
                    drop(heir.tick().await);
                    note(&mut prepared);
                    for replica in &replicas {
                        accepts(&replica.authority(), &heir.authority(), hand.now());
                        accepts(&heir.authority(), &replica.authority(), hand.now());
                    }
                }
                let journal = home.journal().expect("there");
                assert_eq!(prepared.len(), 2, "{story}: one was there, one was made");
                let active = journal.active().intermediate(IntermediateState::Active);
                let active = active.expect("one signs").certificate.id();
                assert_eq!(heir.authority().issuer_key_id(), active, "{story}");
                assert!(
                    journal
                        .active()
                        .intermediate(IntermediateState::Next)
                        .is_none()
                );
                for replica in &replicas {
                    replica.refresh().await.expect("reads");
                    assert_eq!(replica.authority().issuer_key_id(), active);
                }
            }
        }
    }
}

#[tokio::test]
async fn a_failed_write_changes_nothing_in_memory() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let custody = open(&home, &hand).await;
    let before = custody.authority().issuer_key_id().clone();
    hand.advance(16 * DAY);
    home.plan(&[Fault::None, Fault::KilledAfter]);
    custody.tick().await.expect_err("its answer was lost");
    assert_eq!(
        *custody.authority().issuer_key_id(),
        before,
        "not used until it is read back"
    );
    custody.refresh().await.expect("reads");
    assert_ne!(*custody.authority().issuer_key_id(), before);
}

#[tokio::test]
async fn lost_races_are_run_again_and_given_up_after_five() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let custody = open(&home, &hand).await;
    hand.advance(16 * DAY);
    home.plan(&[Fault::Conflict; 5]);
    let error = custody.tick().await.expect_err("five lost races");
    assert!(matches!(error, CustodyError::LostRaces(5)) && error.is_passing());
    home.plan(&[Fault::Conflict; 4]);
    assert_eq!(custody.tick().await.expect("the fifth wins").done.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_ticks_at_once_rotate_once() {
    for _ in 0..20 {
        let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
        let mut ticks = tokio::task::JoinSet::new();
        let mut all = Vec::new();
        for _ in 0..10 {
            all.push(open(&home, &hand).await);
        }
        hand.advance(16 * DAY);
        for custody in &all {
            let custody = custody.clone();
            let (home, clock) = (home.clone(), hand.clock());
            ticks.spawn(async move { custody.tick().await.map(|_| ()) });
            // The cron job, beside them.
            ticks.spawn(async move {
                let request = RotateRequest {
                    if_due: true,
                    ..Default::default()
                };
                rotate(&home, &policy(), request, &clock).await.map(|_| ())
            });
        }
        for ticked in ticks.join_all().await {
            assert!(
                matches!(ticked, Ok(()) | Err(CustodyError::LostRaces(_))),
                "{ticked:?}"
            );
        }
        assert_eq!(home.writes(), 3, "founded, prepared, activated");
        assert_eq!(
            home.journal().expect("there").active().intermediates.len(),
            2
        );
    }
}

#[tokio::test]
async fn r13_a_leader_that_was_only_paused_writes_no_more() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let paused = open(&home, &hand).await;
    paused.claim().await.expect("leads");
    let next = open(&home, &hand).await;
    next.claim().await.expect("leads now");
    hand.advance(16 * DAY);
    let writes = home.writes();
    let error = paused.tick().await.expect_err("replaced");
    assert!(
        matches!(error, CustodyError::Superseded { own: 1, seen: 2 }),
        "{error}"
    );
    assert_eq!(home.writes(), writes);
    assert_eq!(next.tick().await.expect("leads").done.len(), 2);
    paused.refresh().await.expect("reads on");
    assert_eq!(
        paused.authority().issuer_key_id(),
        next.authority().issuer_key_id()
    );
}

#[tokio::test]
async fn g30_whatever_happens_to_the_journal_signing_goes_on_and_alarms() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let metrics = Metrics::default();
    let custody = Custody::open(
        home.clone(),
        policy(),
        mesh(),
        hand.clock(),
        metrics.clone(),
    )
    .await
    .expect("it opens");
    let good = home.journal().expect("there");
    let root = custody.authority().root_key_id().clone();
    let matches = || sample(&samples(&metrics), "malha_ca_loaded_key_id_matches");
    assert_eq!(matches(), Some(1));
    hand.advance(HOUR);

    let foreign = founded(hand.now(), &policy()).to_json().to_vec();
    let mut other_mesh = String::from_utf8(good.to_json().to_vec()).expect("JSON");
    other_mesh = other_mesh.replace("cluster.local", "cluster.other");
    type Check = fn(&CustodyError) -> bool;
    let cases: [(&str, Option<Vec<u8>>, Check); 4] = [
        ("deleted", None, |e| matches!(e, CustodyError::JournalLost)),
        ("garbage", Some(b"{".to_vec()), |e| {
            matches!(e, CustodyError::Home(HomeError::Unreadable { .. }))
        }),
        ("another root", Some(foreign), |e| {
            matches!(e, CustodyError::Foreign { .. })
        }),
        ("another mesh", Some(other_mesh.into_bytes()), |e| {
            matches!(e, CustodyError::Home(HomeError::Unreadable { .. }))
        }),
    ];
    for (name, text, is_expected) in cases {
        home.put(text);
        let writes = home.writes();
        for error in [
            custody.refresh().await.expect_err(name),
            custody.tick().await.expect_err(name),
        ] {
            assert!(is_expected(&error), "{name}: {error}");
        }
        assert_eq!(home.writes(), writes, "{name}: nothing is written over it");
        assert_eq!(*custody.authority().root_key_id(), root);
        accepts(&custody.authority(), &custody.authority(), hand.now());
        assert_eq!(matches(), Some(0), "{name}");
    }
    home.put(Some(good.to_json().to_vec()));
    custody.refresh().await.expect("restored");
    assert_eq!(matches(), Some(1));
    let errors = samples(&metrics);
    let errors = |step| {
        sample(
            &errors,
            &format!("malha_ca_rotation_errors_total{{step=\"{step}\"}}"),
        )
    };
    assert_eq!(errors("load"), Some(6));
    assert_eq!(errors("verify"), Some(2));
    assert_eq!(errors("save"), Some(0));
}

#[tokio::test]
async fn a_home_out_of_reach_is_survived_for_a_day_and_not_longer() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let custody = open(&home, &hand).await;
    home.change(|content| content.unreachable = true);
    let key = new_key().public_key();
    let code = || {
        let (serial, now) = (Serial::random(roll()), hand.now());
        let issued = custody
            .authority()
            .issue(&key, &workload("a", "b"), DAY, serial, now);
        issued.map_or_else(|error| error.code(), |_| "issued")
    };
    hand.advance(23 * HOUR);
    custody.refresh().await.expect_err("out of reach");
    assert_eq!(code(), "issued");
    hand.advance(2 * HOUR);
    custody.refresh().await.expect_err("out of reach");
    assert_eq!(code(), "JournalStale");
    home.change(|content| content.unreachable = false);
    let watch = custody.watch();
    custody.refresh().await.expect("back");
    assert_eq!(code(), "issued");
    assert!(
        !watch.has_changed().expect("open"),
        "the same authority wakes nobody"
    );
}

#[tokio::test]
async fn verbs_do_what_is_asked_and_say_what_they_did() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let clock = hand.clock();
    let run = |request| {
        let (home, clock) = (home.clone(), clock.clone());
        async move { rotate(&home, &policy(), request, &clock).await }
    };
    let if_due = RotateRequest {
        if_due: true,
        ..Default::default()
    };
    let now = RotateRequest {
        intermediate: true,
        ..Default::default()
    };
    let dry = RotateRequest {
        dry_run: true,
        ..now
    };
    assert!(matches!(run(if_due).await, Err(CustodyError::NoJournal)));
    assert!(matches!(run(dry).await, Err(CustodyError::NoJournal)));
    let custody = open(&home, &hand).await;
    assert!(matches!(
        run(RotateRequest::default()).await,
        Err(CustodyError::RootByHand)
    ));
    hand.advance(HOUR);

    let nothing = run(if_due).await.expect("nothing due");
    assert_eq!((nothing.done.len(), home.writes()), (0, 1));
    assert_eq!(nothing.next, custody.authority().issuer_validity().half());

    let planned = run(dry).await.expect("planned");
    assert_eq!(
        (planned.done.len(), home.writes()),
        (2, 1),
        "written: nothing"
    );

    let done = run(now).await.expect("rotated");
    assert_eq!((done.done.len(), home.writes()), (2, 3));
    assert!(done.next > hand.now() + 14 * DAY);
    custody.refresh().await.expect("reads");
    let [_, Done::IntermediateActivated { id }] = &done.done[..] else {
        panic!("{done:?}");
    };
    assert_eq!(custody.authority().issuer_key_id(), id);

    hand.advance(16 * DAY);
    let due = RotateRequest {
        if_due: true,
        intermediate: true,
        dry_run: true,
    };
    assert_eq!(run(due).await.expect("due").done.len(), 2);
    assert_eq!(run(if_due).await.expect("due").done.len(), 2);
    hand.0
        .store((at(BIRTH) + DAY).as_second(), Ordering::Relaxed);
    assert!(matches!(
        run(now).await,
        Err(CustodyError::Refused(Refusal::ClockJump { .. }))
    ));
    home.change(|content| content.unreachable = true);
    assert!(run(if_due).await.expect_err("down").is_passing());
}

#[tokio::test]
async fn a_forced_rotation_survives_a_raised_leaf_and_lost_races() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    open(&home, &hand).await;
    let mut longer = policy();
    longer.leaf.max = 10 * DAY;
    home.plan(&[Fault::Conflict, Fault::None, Fault::Conflict]);
    let request = RotateRequest {
        intermediate: true,
        ..Default::default()
    };
    let ticked = rotate(&home, &longer, request, &hand.clock())
        .await
        .expect("rotated");
    assert!(
        matches!(
            ticked.done[..],
            [
                Done::LongestLeafRaised { .. },
                Done::IntermediatePrepared { .. },
                Done::IntermediateActivated { .. }
            ]
        ),
        "{ticked:?}"
    );
}

#[tokio::test]
async fn verbs_work_when_the_intermediate_has_ended_and_say_so_when_the_root_has() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    open(&home, &hand).await;
    let if_due = RotateRequest {
        if_due: true,
        ..Default::default()
    };
    hand.advance(400 * DAY);
    let done = rotate(&home, &policy(), if_due, &hand.clock())
        .await
        .expect("works");
    assert_eq!(done.done.len(), 2);
    hand.advance(5 * 365 * DAY);
    let error = rotate(&home, &policy(), if_due, &hand.clock())
        .await
        .expect_err("no root");
    assert!(
        matches!(error, CustodyError::Refused(Refusal::RootEnded(_))),
        "{error}"
    );
    // A process still starts: the injector needs no authority, and nothing is signed.
    let custody = open(&home, &hand).await;
    let key = new_key().public_key();
    let (serial, now) = (Serial::random(roll()), hand.now());
    let issued = custody
        .authority()
        .issue(&key, &workload("a", "b"), DAY, serial, now);
    assert_eq!(issued.expect_err("ended").code(), "IssuerExpiring");
}

#[tokio::test]
async fn metrics_name_every_certificate_with_its_end() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let metrics = Metrics::default();
    let custody = Custody::open(
        home.clone(),
        policy(),
        mesh(),
        hand.clock(),
        metrics.clone(),
    )
    .await
    .expect("it opens");
    hand.advance(16 * DAY);
    home.plan(&[Fault::None, Fault::KilledBefore]);
    custody.tick().await.expect_err("killed after prepare");
    custody.refresh().await.expect("reads");
    let text = samples(&metrics);
    let end = |kind, state| {
        let name = "malha_ca_certificate_expiration_timestamp_seconds";
        sample(
            &text,
            &format!("{name}{{kind=\"{kind}\",state=\"{state}\"}}"),
        )
    };
    let birth = at(BIRTH);
    assert_eq!(
        end("root", "active"),
        Some((birth + 5 * 365 * DAY).as_second())
    );
    assert_eq!(
        end("intermediate", "active"),
        Some((birth + 30 * DAY).as_second())
    );
    assert_eq!(
        end("intermediate", "next"),
        Some((birth + 46 * DAY).as_second())
    );
    let life = "malha_ca_certificate_lifetime_seconds{kind=\"intermediate\",state=\"active\"}";
    assert_eq!(sample(&text, life), Some(30 * 86_400 + 600));
    assert_eq!(sample(&text, "malha_ca_generation"), Some(1));
    assert_eq!(
        sample(&text, "malha_ca_leaf_lifetime_seconds"),
        Some(86_400)
    );
    assert_eq!(
        sample(&text, "malha_ca_rotation_phase{phase=\"active\"}"),
        Some(1)
    );
    custody.tick().await.expect("goes on");
    let text = samples(&metrics);
    let next =
        "malha_ca_certificate_expiration_timestamp_seconds{kind=\"intermediate\",state=\"next\"}";
    assert_eq!(sample(&text, next), None, "it is not next any more");
    let success = "malha_ca_rotation_last_success_timestamp_seconds";
    assert_eq!(sample(&text, success), Some(hand.now().as_second()));
}

/// The loops, at a pace at which nobody waits for them.
mod kept {
    use super::*;
    use tokio::time::timeout;

    const MINUTE: Duration = Duration::from_secs(60);
    const FAST: Pace = Pace {
        period: Duration::from_millis(10),
        retry: Duration::from_millis(2),
        glance: Duration::from_millis(2),
    };

    async fn open(home: &MemoryHome, hand: &Hand) -> Arc<Custody<MemoryHome>> {
        open_with(home, hand, Metrics::default()).await
    }

    async fn open_with(
        home: &MemoryHome,
        hand: &Hand,
        metrics: Metrics,
    ) -> Arc<Custody<MemoryHome>> {
        Custody::open_at(FAST, home.clone(), policy(), mesh(), hand.clock(), metrics)
            .await
            .expect("it opens")
    }

    async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let looked = async {
            while !is_so() {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(MINUTE, looked)
            .await
            .unwrap_or_else(|_| panic!("{what}"));
    }

    /// Until a loop has read the journal so many times more.
    async fn reads(home: &MemoryHome, count: usize) {
        let loads = || home.0.loads.load(Ordering::Relaxed);
        let enough = loads() + count;
        until("it reads on", || loads() >= enough).await;
    }

    #[tokio::test]
    async fn the_leader_rotates_and_the_others_follow() {
        let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
        let (leads, leader) = watch::channel(false);
        let (stop, follower_leads) = (CancellationToken::new(), watch::channel(false).1);
        let (first, second) = (open(&home, &hand).await, open(&home, &hand).await);
        let tasks = [
            tokio::spawn(first.clone().keep(leader, stop.clone())),
            tokio::spawn(second.clone().keep(follower_leads, stop.clone())),
        ];
        let before = first.authority().issuer_key_id().clone();
        hand.advance(16 * DAY);
        reads(&home, 10).await;
        assert_eq!(home.writes(), 1, "nobody leads, nobody writes");
        leads.send_replace(true);
        until("both sign with the new one", || {
            *first.authority().issuer_key_id() != before
                && first.authority().issuer_key_id() == second.authority().issuer_key_id()
        })
        .await;
        assert_eq!(home.journal().expect("there").epoch(), 1);
        leads.send_replace(false);
        reads(&home, 10).await;
        leads.send_replace(true);
        until("it leads again", || {
            home.journal().expect("there").epoch() == 2
        })
        .await;
        stop.cancel();
        for task in tasks {
            timeout(MINUTE, task)
                .await
                .expect("it stops")
                .expect("no panic");
        }
    }

    #[tokio::test]
    async fn a_quiet_leader_writes_nothing() {
        let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
        let custody = open(&home, &hand).await;
        let (_leads, leader) = watch::channel(true);
        let stop = CancellationToken::new();
        let task = tokio::spawn(custody.keep(leader, stop.clone()));
        reads(&home, 100).await;
        assert_eq!(home.writes(), 2, "founded, and one epoch");
        stop.cancel();
        task.await.expect("no panic");
    }

    #[tokio::test]
    async fn an_outage_is_waited_out_and_the_last_word_of_a_closed_channel_stands() {
        let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
        let metrics = Metrics::default();
        let custody = open_with(&home, &hand, metrics.clone()).await;
        let (leads, leader) = watch::channel(true);
        let stop = CancellationToken::new();
        home.change(|content| content.unreachable = true);
        let task = tokio::spawn(custody.clone().keep(leader, stop.clone()));
        reads(&home, 5).await;
        assert_eq!(home.writes(), 1);
        hand.advance(16 * DAY);
        home.change(|content| content.unreachable = false);
        until("it leads and rotates once the home is back", || {
            home.writes() == 4
        })
        .await;
        drop(leads);
        hand.advance(16 * DAY);
        until("it leads on", || home.writes() == 6).await;
        let before = home.0.loads.load(Ordering::Relaxed);
        let since = std::time::Instant::now();
        sleep(FAST.period * 20).await;
        let loads = home.0.loads.load(Ordering::Relaxed) - before;
        let periods = since.elapsed().as_millis() / FAST.period.as_millis();
        assert!(
            loads as u128 <= periods * 2,
            "it does not spin: {loads} reads in {periods} periods"
        );
        stop.cancel();
        task.await.expect("no panic");
    }

    #[tokio::test]
    async fn a_leader_that_was_replaced_only_reads_until_it_is_called_again() {
        let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
        let custody = open(&home, &hand).await;
        let (leads, leader) = watch::channel(true);
        let stop = CancellationToken::new();
        let task = tokio::spawn(custody.keep(leader, stop.clone()));
        until("it leads", || home.writes() == 2).await;
        open(&home, &hand)
            .await
            .claim()
            .await
            .expect("another one leads");
        hand.advance(16 * DAY);
        reads(&home, 10).await;
        assert_eq!(home.writes(), 3, "it writes no more");
        leads.send_replace(true);
        until("it is called again", || home.writes() == 6).await;
        stop.cancel();
        task.await.expect("no panic");
    }

    fn webhook() -> Profile {
        let dns_names = vec!["malha.malha-system.svc".to_owned(), "127.0.0.1".to_owned()];
        Profile::Webhook { dns_names }
    }

    #[tokio::test]
    async fn a_serving_certificate_is_new_with_each_authority_and_at_half_of_its_life() {
        let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
        let metrics = Metrics::default();
        let custody = open_with(&home, &hand, metrics.clone()).await;
        let (out, served) = watch::channel(None::<Arc<KeyedChain>>);
        let stop = CancellationToken::new();
        let task = tokio::spawn(keep_serving(
            custody.clone(),
            webhook(),
            hand.clock(),
            out,
            stop.clone(),
        ));
        let leaf = || served.borrow().as_ref().map(|keyed| keyed.chain[0].clone());
        let changed_from = async |before: &Option<Vec<u8>>, what: &str| {
            until(what, || leaf() != *before).await;
        };
        changed_from(&None, "at start").await;
        let mut keys = HashSet::new();
        let check = |keys: &mut HashSet<Vec<u8>>| {
            let keyed = served.borrow().clone().expect("served");
            peer::verify(
                &keyed.chain,
                custody.authority().bundle(),
                Side::Server,
                hand.now(),
            )
            .expect("its client accepts it");
            peer::verify_name(&keyed.chain, "malha.malha-system.svc").expect("its name");
            assert!(keys.insert(keyed.key.to_vec()), "a new key each time");
            keyed
        };
        let first = check(&mut keys);
        assert_eq!(first.validity.not_after, hand.now() + DAY);

        let before = leaf();
        hand.advance(10 * HOUR);
        sleep(FAST.glance * 20).await;
        assert_eq!(leaf(), before, "not before half of its life");
        hand.advance(3 * HOUR);
        changed_from(&before, "at half of its life").await;
        check(&mut keys);

        let before = leaf();
        let request = RotateRequest {
            intermediate: true,
            ..Default::default()
        };
        rotate(&home, &policy(), request, &hand.clock())
            .await
            .expect("rotated");
        custody.refresh().await.expect("reads");
        changed_from(&before, "with the new intermediate").await;
        let last = check(&mut keys);
        let end = sample(
            &samples(&metrics),
            "malha_ca_certificate_expiration_timestamp_seconds{kind=\"webhook\",state=\"active\"}",
        );
        assert_eq!(end, Some(last.validity.not_after.as_second()));

        // Whatever fails, what is served stays.
        let before = leaf();
        hand.0
            .store((at(BIRTH) + 400 * DAY).as_second(), Ordering::Relaxed);
        let failed = || {
            sample(
                &samples(&metrics),
                "malha_ca_rotation_errors_total{step=\"serve\"}",
            )
        };
        until("it fails", || failed() == Some(1)).await;
        sleep(FAST.glance * 20).await;
        assert_eq!(failed(), Some(1), "it is not tried again at once");
        hand.advance(Duration::from_secs(5));
        until("it is tried again", || failed() == Some(2)).await;
        assert_eq!(leaf(), before);
        custody.tick().await.expect("rotates");
        changed_from(&before, "once it can be made again").await;
        stop.cancel();
        task.await.expect("no panic");
    }
}

#[tokio::test]
async fn reads_never_go_back_in_time() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let custody = open(&home, &hand).await;
    hand.advance(16 * DAY);
    let counter = Arc::new(AtomicU32::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (custody, counter) = (custody.clone(), counter.clone());
        tasks.spawn(async move {
            custody.refresh().await.expect("reads");
            counter.fetch_add(1, Ordering::Relaxed);
        });
    }
    custody.tick().await.expect("ticks");
    let after = custody.authority().issuer_key_id().clone();
    tasks.join_all().await;
    assert_eq!(*custody.authority().issuer_key_id(), after);
    assert_eq!(counter.load(Ordering::Relaxed), 20);
    assert_eq!(
        home.journal().expect("there").authorities()[0].phase,
        Phase::Active
    );
}

/// Replicas come and go, clocks run, writes are lost, refused and repeated, verbs are typed in between, in any order.
#[tokio::test]
async fn whatever_happens_in_whatever_order_every_leaf_is_accepted_by_every_replica() {
    struct Dice(u64);
    impl Dice {
        fn below(&mut self, bound: usize) -> usize {
            let Self(state) = self;
            *state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(*state >> 33).expect("31 bits") % bound
        }
    }
    for seed in 0..40 {
        let mut dice = Dice(seed);
        let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
        let mut replicas = vec![open(&home, &hand).await];
        let mut past: Vec<(Timestamp, Vec<Vec<u8>>)> = Vec::new();
        let bundle = replicas[0].authority().bundle().clone();
        let mut epoch = 0;
        for act in 0..60 {
            let story = format!("seed {seed}, act {act}");
            let faults = [
                Fault::None,
                Fault::Conflict,
                Fault::KilledBefore,
                Fault::KilledAfter,
            ];
            let plan: Vec<Fault> = (0..dice.below(4)).map(|_| faults[dice.below(4)]).collect();
            home.plan(&plan);
            let chosen = dice.below(replicas.len());
            match dice.below(9) {
                0 if replicas.len() < 4 => replicas.extend(try_open(&home, &hand).await.ok()),
                1 if replicas.len() > 1 => drop(replicas.remove(chosen)),
                2 => drop(replicas[chosen].claim().await),
                3 => {
                    let request = RotateRequest {
                        intermediate: true,
                        ..Default::default()
                    };
                    drop(rotate(&home, &policy(), request, &hand.clock()).await);
                }
                4 | 5 => hand.advance(HOUR * u32::try_from(dice.below(200)).expect("small")),
                6 => drop(replicas[chosen].refresh().await),
                _ => drop(replicas[chosen].tick().await),
            }
            home.plan(&[]);
            let journal = home.journal().expect(&story);
            assert_eq!(journal.bundle(), bundle, "{story}");
            assert!(journal.epoch() >= epoch, "{story}");
            epoch = journal.epoch();
            let now = hand.now();
            past.retain(|(end, _)| now < *end);
            for replica in &replicas {
                assert_eq!(*replica.authority().bundle(), bundle);
                let (key, serial) = (new_key().public_key(), Serial::for_workload(now, roll()));
                match replica
                    .authority()
                    .issue(&key, &workload("a", "b"), DAY, serial, now)
                {
                    Ok(issued) => past.push((issued.validity.not_after, issued.chain)),
                    Err(error) => assert_ne!(error.code(), "SignFailed", "{story}: {error}"),
                }
            }
            for (_, chain) in past.iter().rev().take(12) {
                peer::verify(chain, &bundle, Side::Client, now)
                    .unwrap_or_else(|error| panic!("{story}: {error}"));
            }
        }
        let last = open(&home, &hand).await;
        last.claim().await.expect("leads");
        last.tick().await.expect("all is well in the end");
        accepts(&last.authority(), &last.authority(), hand.now());
    }
}

/// An operator's root, and an issuer of a year below it.
fn operator() -> (OperatorCa, OperatorCa) {
    let validity = crate::ca::Validity {
        not_before: at("2025-12-01T00:00:00Z"),
        not_after: at("2027-01-01T00:00:00Z"),
    };
    let root = OperatorCa::root("root", validity);
    let issuer = root.below("issuer", validity, Some(0));
    (root, issuer)
}

#[tokio::test]
async fn an_issuer_that_is_broken_at_the_first_start_is_not_replaced_by_a_root_of_ours() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let (root, issuer) = operator();
    let whole = plugged_files(&issuer, &[&issuer], &[&root]);
    let half = Files {
        ca_key: None,
        ..whole.clone()
    };
    home.change(|content| content.plugged = Some(half));
    let metrics = Metrics::default();
    let refused = Custody::open(
        home.clone(),
        policy(),
        mesh(),
        hand.clock(),
        metrics.clone(),
    )
    .await
    .err()
    .expect("nothing to sign with");
    assert!(matches!(refused, CustodyError::Plugged(_)), "{refused}");
    assert!(
        refused.to_string().contains("ca-key.pem is missing"),
        "{refused}"
    );
    assert_eq!(home.journal(), None, "no root was made");
    let failed = "malha_ca_rotation_errors_total{step=\"plug\"}";
    assert_eq!(sample(&samples(&metrics), failed), Some(1));

    home.change(|content| content.unreachable = true);
    try_open(&home, &hand)
        .await
        .err()
        .expect("nobody knows whether there is one");
    home.change(|content| {
        content.unreachable = false;
        content.plugged = Some(whole);
    });
    let custody = open(&home, &hand).await;
    assert_eq!(custody.authority().bundle().len(), 1);
    let active = home.journal().expect("founded");
    assert_eq!(active.active().kind, Kind::Plugged);
}

#[tokio::test]
async fn whatever_becomes_of_the_operators_secret_the_last_good_issuer_signs() {
    let (home, hand) = (MemoryHome::default(), Hand::at(at(BIRTH)));
    let (root, issuer) = operator();
    let whole = plugged_files(&issuer, &[&issuer], &[&root]);
    home.change(|content| content.plugged = Some(whole.clone()));
    let metrics = Metrics::default();
    let custody = Custody::open(
        home.clone(),
        policy(),
        mesh(),
        hand.clock(),
        metrics.clone(),
    )
    .await
    .expect("opens");
    let matches = "malha_ca_plugged_key_id_matches{secret=\"cacerts\"}";
    let shown = || sample(&samples(&metrics), matches);
    let mut news = custody.plugging();
    custody.tick().await.expect("nothing is due");
    assert!(matches!(*news.borrow_and_update(), Plugging::Signs(_)));
    assert_eq!(shown(), Some(1));
    let good = custody.authority().issuer_key_id().clone();

    let (_, other) = operator();
    let half_written = Files {
        ca_cert: Some(other.certificate.clone().into_bytes()),
        ..whole.clone()
    };
    for broken in [Files::default(), half_written] {
        home.change(|content| content.plugged = Some(broken));
        custody.tick().await.expect("what signs goes on");
        assert!(matches!(*news.borrow_and_update(), Plugging::Refused(_)));
        assert_eq!(shown(), Some(0));
        assert_eq!(*custody.authority().issuer_key_id(), good);
        // a restart changes nothing about it
        let again = open(&home, &hand).await;
        assert_eq!(*again.authority().issuer_key_id(), good);
    }
    home.change(|content| content.plugged = None);
    custody.tick().await.expect("what signs goes on");
    assert_eq!(*news.borrow_and_update(), Plugging::Gone);
    assert_eq!(shown(), None);
    assert_eq!(*custody.authority().issuer_key_id(), good);
    assert_eq!(*open(&home, &hand).await.authority().issuer_key_id(), good);

    let next = root.below(
        "next",
        crate::ca::Validity {
            not_before: at("2025-12-01T00:00:00Z"),
            not_after: at("2026-06-01T00:00:00Z"),
        },
        Some(0),
    );
    let follower = open(&home, &hand).await;
    home.change(|content| {
        content.plugged = Some(plugged_files(&next, &[&next], &[&root]));
    });
    let done = custody.tick().await.expect("taken over").done;
    assert!(
        matches!(done[..], [Done::PluggedIssuerActivated { .. }]),
        "{done:?}"
    );
    assert_ne!(*custody.authority().issuer_key_id(), good);
    accepts(&custody.authority(), &follower.authority(), hand.now());
    follower.refresh().await.expect("reads");
    assert_eq!(
        follower.authority().issuer_key_id(),
        custody.authority().issuer_key_id()
    );
    assert!(news.has_changed().expect("it lives"));

    let by_hand = RotateRequest {
        intermediate: true,
        ..RotateRequest::default()
    };
    let refused = rotate(&home, &policy(), by_hand, &hand.clock()).await;
    let refused = refused.expect_err("it is the operator's").to_string();
    assert!(refused.contains("cacerts"), "{refused}");
}
