use super::*;
use crate::ca::tests::support::{DAY, HOUR, OperatorCa, at, mesh, plugged_files};

fn now() -> Timestamp {
    at("2026-11-22T12:00:00Z")
}

fn days(count: u32) -> Validity {
    Validity {
        not_before: at("2026-11-01T00:00:00Z"),
        not_after: on(now(), DAY * count),
    }
}

struct Scene {
    root: OperatorCa,
    issuer: OperatorCa,
}

impl Scene {
    fn new() -> Self {
        let root = OperatorCa::root("root", days(1000));
        let issuer = root.below("issuer", days(90), Some(0));
        Self { root, issuer }
    }

    fn files(&self) -> Files {
        plugged_files(&self.issuer, &[&self.issuer, &self.root], &[&self.root])
    }
}

fn taken(files: &Files) -> Result<Plugged, PlugError> {
    read(files, &mesh(), &LeafPolicy::default(), now())
}

fn code(files: &Files) -> &'static str {
    taken(files).expect_err("not taken").code()
}

fn some(text: &str) -> Option<Vec<u8>> {
    Some(text.as_bytes().to_vec())
}

/// What may have become of a file on its way into the Secret.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Whole,
    Missing,
    Empty,
    CutShort,
    Garbage,
    /// A good file of another issuer.
    Foreign,
}

impl State {
    const ALL: [Self; 6] = [
        Self::Whole,
        Self::Missing,
        Self::Empty,
        Self::CutShort,
        Self::Garbage,
        Self::Foreign,
    ];

    fn of(self, whole: Vec<u8>, foreign: Vec<u8>) -> Option<Vec<u8>> {
        match self {
            Self::Whole => Some(whole),
            Self::Missing => None,
            Self::Empty => Some(Vec::new()),
            Self::CutShort => Some(whole[..whole.len() / 2].to_vec()),
            Self::Garbage => some("garbage"),
            Self::Foreign => Some(foreign),
        }
    }
}

/// Every combination of every state of the four files: whole or missing or broken (3 ways) is 2^4 and more; together with
/// files of another issuer 6^4.
#[test]
fn only_four_files_that_belong_together_are_taken() {
    let (ours, theirs) = (Scene::new(), Scene::new());
    // The intermediate in between makes each of the four files count.
    let files_of = |scene: &Scene| {
        let policy = scene.root.below("policy", days(500), Some(1));
        let issuer = policy.below("issuer", days(90), Some(0));
        plugged_files(&issuer, &[&policy], &[&scene.root])
    };
    let (ours, theirs) = (files_of(&ours), files_of(&theirs));
    let mut taken_ones = Vec::new();
    for ca_cert in State::ALL {
        for ca_key in State::ALL {
            for cert_chain in State::ALL {
                for root_cert in State::ALL {
                    let file =
                        |state: State, of: fn(&Files) -> Vec<u8>| state.of(of(&ours), of(&theirs));
                    let files = Files {
                        ca_cert: file(ca_cert, |f| f.ca_cert.clone().unwrap()),
                        ca_key: file(ca_key, |f| f.ca_key.clone().unwrap().to_vec())
                            .map(Zeroizing::new),
                        cert_chain: file(cert_chain, |f| f.cert_chain.clone().unwrap()),
                        root_cert: file(root_cert, |f| f.root_cert.clone().unwrap()),
                    };
                    let states = [ca_cert, ca_key, cert_chain, root_cert];
                    match taken(&files) {
                        Ok(_) => taken_ones.push(states),
                        Err(fault) => {
                            let missing = states.contains(&State::Missing);
                            assert_eq!(
                                fault.code() == "PluggedIncomplete",
                                missing,
                                "{states:?}: {fault}"
                            );
                        }
                    }
                }
            }
        }
    }
    assert_eq!(taken_ones, [[State::Whole; 4], [State::Foreign; 4]]);
}

#[test]
fn each_fault_has_its_code() {
    let scene = Scene::new();
    let issuer = |path, validity| {
        let issuer = scene.root.below("other", validity, path);
        plugged_files(&issuer, &[&issuer], &[&scene.root])
    };
    let deep = |allowed| {
        let policy = scene.root.below("policy", days(90), allowed);
        let issuer = policy.below("issuer", days(30), Some(0));
        plugged_files(&issuer, &[&policy], &[&scene.root])
    };
    let ended = Validity {
        not_before: at("2026-11-01T00:00:00Z"),
        not_after: at("2026-11-22T12:04:00Z"),
    };
    let future = Validity {
        not_before: at("2026-11-22T12:00:01Z"),
        not_after: at("2027-11-22T12:00:00Z"),
    };
    let ended_root = OperatorCa::root("ended", ended);
    let below_ended = ended_root.below("issuer", days(90), Some(0));
    let table: Vec<(&str, Files, &str)> = vec![
        ("whole", scene.files(), ""),
        ("no path length", issuer(None, days(90)), ""),
        ("one level more", deep(Some(1)), ""),
        ("a level too many", deep(Some(0)), "PluggedPathLength"),
        ("about to end", issuer(Some(0), ended), "PluggedNotValid"),
        ("not yet valid", issuer(Some(0), future), "PluggedNotValid"),
        (
            "an ended root",
            plugged_files(&below_ended, &[&below_ended], &[&ended_root]),
            "PluggedNotValid",
        ),
        (
            "a root as issuer",
            plugged_files(&scene.root, &[&scene.root], &[&scene.root]),
            "PluggedRoot",
        ),
        (
            "another's key",
            Files {
                ca_key: Scene::new().files().ca_key,
                ..scene.files()
            },
            "PluggedKeyMismatch",
        ),
        (
            "another's root",
            Files {
                root_cert: Scene::new().files().root_cert,
                ..scene.files()
            },
            "PluggedNoPath",
        ),
        (
            "no root as root",
            Files {
                root_cert: scene.files().ca_cert,
                ..scene.files()
            },
            "PluggedUnreadable",
        ),
        (
            "two issuers",
            Files {
                ca_cert: scene.files().cert_chain,
                ..scene.files()
            },
            "PluggedUnreadable",
        ),
        (
            "a key among the roots",
            Files {
                root_cert: some(&format!("{}{}", scene.root.certificate, scene.root.key)),
                ..scene.files()
            },
            "PluggedUnreadable",
        ),
    ];
    for (case, files, want) in table {
        match (taken(&files), want) {
            (Ok(_), "") => {}
            (Err(fault), want) if fault.code() == want => {
                assert!(!fault.to_string().contains("PRIVATE"), "{fault}");
            }
            (other, want) => panic!("{case}: {want:?}, but {other:?}"),
        }
    }
}

#[test]
fn a_chain_may_stand_in_any_order_and_hold_more_than_is_needed() {
    let scene = Scene::new();
    let policy = scene.root.below("policy", days(500), Some(2));
    let region = policy.below("region", days(400), Some(1));
    let issuer = region.below("issuer", days(90), Some(0));
    let stranger = OperatorCa::root("stranger", days(10));
    for chain in [
        vec![&policy, &region],
        vec![&region, &policy],
        vec![&issuer, &region, &policy, &scene.root],
        vec![&stranger, &scene.root, &policy, &issuer, &region],
    ] {
        let plugged = taken(&plugged_files(&issuer, &chain, &[&scene.root])).expect("taken");
        let lengths: Vec<_> = plugged
            .above
            .iter()
            .map(CaCertificate::path_length)
            .collect();
        assert_eq!(lengths, [Some(1), Some(2)], "nearest first");
    }
    assert_eq!(
        code(&plugged_files(&issuer, &[&policy], &[&scene.root])),
        "PluggedNoPath"
    );
}

#[test]
fn roots_beside_the_issuers_are_trusted_and_counted_once() {
    let (scene, other) = (Scene::new(), OperatorCa::root("other", days(10)));
    let roots = [&other, &scene.root, &other, &scene.root];
    let plugged = taken(&plugged_files(&scene.issuer, &[&scene.issuer], &roots)).expect("taken");
    assert_eq!(plugged.others.len(), 1);
    assert_ne!(plugged.others[0], plugged.root);
    let many: Vec<_> = (0..17)
        .map(|_| OperatorCa::root("other", days(10)))
        .collect();
    let many: Vec<_> = many.iter().collect();
    assert_eq!(
        code(&plugged_files(&scene.issuer, &[&scene.issuer], &many)),
        "PluggedUnreadable"
    );
}

#[test]
fn a_minute_makes_the_difference_for_a_short_lived_issuer() {
    let scene = Scene::new();
    let files = scene.files();
    let end = days(90).not_after;
    let policy = LeafPolicy::default();
    let read_at = |instant| read(&files, &mesh(), &policy, instant).map(|_| ());
    assert_eq!(read_at(super::super::back(end, HOUR)), Ok(()));
    assert_eq!(read_at(super::super::back(end, policy.min)), Ok(()));
    let late = super::super::back(end, policy.min - std::time::Duration::from_secs(1));
    assert_eq!(
        read_at(late).expect_err("too late").code(),
        "PluggedNotValid"
    );
}
