use proptest::prelude::{any, proptest};
use serde_json::{Value, json};

use super::*;
use crate::ca::{
    rotation::{KeyFor, RotationPolicy, with_key},
    tests::support::{DAY, at, founded, new_key, roll},
};

const NOON: &str = "2026-11-22T12:00:00.5Z";

fn journal() -> Journal {
    founded(at(NOON), &RotationPolicy::default())
}

/// With a prepared intermediate, so that all states are in it but `past`.
fn prepared() -> Journal {
    let policy = RotationPolicy::default();
    let now = at(NOON) + 16 * DAY;
    let (journal, _) = with_key(
        &journal(),
        KeyFor::NextIntermediate,
        new_key(),
        roll(),
        now,
        &policy,
    )
    .expect("signed");
    journal
}

fn value(journal: &Journal) -> Value {
    serde_json::from_slice(&journal.to_json()).expect("JSON")
}

fn read(value: &Value) -> Result<Journal, JournalError> {
    Journal::from_json(&serde_json::to_vec(value).expect("JSON"))
}

#[test]
fn what_was_written_is_read_back() {
    for mut journal in [journal(), prepared()] {
        journal.epoch = 7;
        journal.denied = vec![Denied {
            serial: "4000ffff".to_owned(),
            until: at(NOON),
        }];
        let text = journal.to_json();
        let read = Journal::from_json(&text).expect("our own text");
        assert_eq!(read, journal);
        assert_eq!(
            *read.to_json(),
            *text,
            "and the same bytes are written again"
        );
    }
}

#[test]
fn the_text_is_written_without_growing_a_buffer() {
    let journal = prepared();
    assert!(journal.to_json().len() <= journal.size_hint());
}

#[test]
fn the_format_is_the_documented_one() {
    let value = value(&prepared());
    let keys = |value: &Value| -> Vec<String> {
        value
            .as_object()
            .expect("an object")
            .keys()
            .cloned()
            .collect()
    };
    assert_eq!(
        keys(&value),
        [
            "format",
            "generation",
            "epoch",
            "trustDomain",
            "longestLeaf",
            "authorities",
            "denied"
        ]
    );
    assert_eq!(value["format"], 1);
    assert_eq!(value["trustDomain"], "cluster.local");
    assert_eq!(value["longestLeaf"], "PT168H");
    let authority = &value["authorities"][0];
    assert_eq!(
        keys(authority),
        [
            "id",
            "kind",
            "certificate",
            "key",
            "crossCertificates",
            "phase",
            "preparedAt",
            "publishedAt",
            "activatedAt",
            "intermediates"
        ]
    );
    assert_eq!(authority["kind"], "root");
    assert_eq!(authority["phase"], "active");
    assert_eq!(authority["activatedAt"], "2026-11-22T12:00:00Z");
    let next = &authority["intermediates"][1];
    assert_eq!(keys(next), ["id", "certificate", "key", "state"]);
    assert_eq!(next["state"], "next");
}

#[test]
fn an_unknown_format_is_refused_before_anything_else_is_read() {
    for format in [json!(0), json!(2), json!(999)] {
        let error = read(&json!({ "format": format, "somethingNew": {} })).expect_err("unknown");
        assert!(matches!(error, JournalError::UnknownFormat(_)), "{error}");
    }
    for text in [
        "",
        "{}",
        "null",
        "[]",
        "\"\"",
        "{\"format\":\"1\"}",
        "{\"format\":-1}",
        "\u{feff}{}",
    ] {
        assert!(Journal::from_json(text.as_bytes()).is_err(), "{text}");
    }
    assert!(matches!(
        Journal::from_json(&vec![b' '; MAX_BYTES + 1]),
        Err(JournalError::TooLarge(_))
    ));
}

#[test]
fn room_for_a_root_rotation_is_there() {
    let now = at(NOON);
    let mut journal = journal();
    let older = founded(now - 900 * DAY, &RotationPolicy::default());
    let mut retired = older.active().clone();
    retired.phase = Phase::Draining;
    retired.key = None;
    retired.drain_until = Some(now + 9 * DAY);
    retired.tainted = Some(now);
    for intermediate in &mut retired.intermediates {
        intermediate.key = None;
        intermediate.state = IntermediateState::Past;
    }
    journal.authorities.push(retired.clone());
    let mut next = founded(now, &RotationPolicy::default()).active().clone();
    next.phase = Phase::Prepared;
    next.published_at = None;
    next.activated_at = None;
    journal.authorities.push(next);
    let read = Journal::from_json(&journal.to_json()).expect("three authorities");
    assert_eq!(read, journal);
    assert_eq!(
        read.bundle().len(),
        2,
        "active and draining are trusted, prepared is not"
    );

    let mut published = journal.clone();
    published.authorities[2].phase = Phase::Published;
    published.authorities[2].published_at = Some(now);
    assert_eq!(
        Journal::from_json(&published.to_json())
            .expect("readable")
            .bundle()
            .len(),
        3
    );
}

#[test]
fn broken_promises_are_found_when_it_is_read() {
    let other = value(&journal());
    type Change = fn(&mut Value, &Value);
    let table: &[(&str, Change, &str)] = &[
        (
            "no authority",
            |v, _| v["authorities"] = json!([]),
            "0 authorities are active",
        ),
        (
            "nobody active",
            |v, _| v["authorities"][0]["phase"] = json!("prepared"),
            "0 authorities",
        ),
        (
            "two active",
            |v, o| {
                let second = o["authorities"][0].clone();
                v["authorities"]
                    .as_array_mut()
                    .expect("a list")
                    .push(second);
            },
            "2 authorities are active",
        ),
        (
            "the same twice",
            |v, _| {
                let mut second = v["authorities"][0].clone();
                second["phase"] = json!("prepared");
                v["authorities"]
                    .as_array_mut()
                    .expect("a list")
                    .push(second);
            },
            "stands twice",
        ),
        (
            "two rotations",
            |v, o| {
                for phase in ["prepared", "published"] {
                    let mut second = o["authorities"][0].clone();
                    second["phase"] = json!(phase);
                    v["authorities"]
                        .as_array_mut()
                        .expect("a list")
                        .push(second);
                }
            },
            "two root rotations",
        ),
        (
            "another's root key",
            |v, o| {
                v["authorities"][0]["key"] = o["authorities"][0]["key"].clone();
            },
            "root's key is another's",
        ),
        (
            "no root key",
            |v, _| {
                v["authorities"][0]
                    .as_object_mut()
                    .expect("an object")
                    .remove("key");
            },
            "key is missing",
        ),
        (
            "another's intermediate key",
            |v, o| {
                v["authorities"][0]["intermediates"][0]["key"] =
                    o["authorities"][0]["intermediates"][0]["key"].clone();
            },
            "intermediate's key is another's",
        ),
        (
            "no intermediate key",
            |v, _| {
                v["authorities"][0]["intermediates"][0]
                    .as_object_mut()
                    .expect("an object")
                    .remove("key");
            },
            "key is missing",
        ),
        (
            "another's intermediate",
            |v, o| {
                v["authorities"][0]["intermediates"] = o["authorities"][0]["intermediates"].clone();
            },
            "not signed by its root",
        ),
        (
            "no active intermediate",
            |v, _| {
                v["authorities"][0]["intermediates"][0]["state"] = json!("next");
            },
            "exactly one active intermediate",
        ),
        (
            "no intermediate",
            |v, _| v["authorities"][0]["intermediates"] = json!([]),
            "exactly one",
        ),
        (
            "a past one with its key",
            |v, _| {
                v["authorities"][0]["intermediates"][1]["state"] = json!("past");
            },
            "still there after",
        ),
        (
            "two next",
            |v, _| {
                let next = v["authorities"][0]["intermediates"][1].clone();
                v["authorities"][0]["intermediates"]
                    .as_array_mut()
                    .expect("a list")
                    .push(next);
            },
            "stands twice",
        ),
        (
            "another id",
            |v, _| v["authorities"][0]["id"] = json!("00ff"),
            "filed under 00ff",
        ),
        (
            "another trust domain",
            |v, _| v["trustDomain"] = json!("other"),
            "another trust domain",
        ),
        (
            "no trust domain",
            |v, _| v["trustDomain"] = json!(""),
            "not a legal name",
        ),
        (
            "a negative life",
            |v, _| v["longestLeaf"] = json!("-PT1H"),
            "negative",
        ),
        (
            "an unknown field",
            |v, _| v["foo"] = json!(1),
            "unknown field `foo`",
        ),
        (
            "an unknown field inside",
            |v, _| v["authorities"][0]["foo"] = json!(1),
            "unknown field",
        ),
        (
            "an unknown phase",
            |v, _| v["authorities"][0]["phase"] = json!("done"),
            "unknown variant",
        ),
        (
            "no epoch",
            |v, _| {
                v.as_object_mut().expect("an object").remove("epoch");
            },
            "missing field `epoch`",
        ),
        (
            "drains for ever",
            |v, o| {
                let mut second = o["authorities"][0].clone();
                second["phase"] = json!("draining");
                second.as_object_mut().expect("an object").remove("key");
                second["intermediates"] = json!([]);
                v["authorities"]
                    .as_array_mut()
                    .expect("a list")
                    .push(second);
            },
            "without an end",
        ),
        (
            "a leaf as a root",
            |v, _| {
                v["authorities"][0]["certificate"] = json!("MAA=");
            },
            "not readable X.509",
        ),
        (
            "a certificate for a key",
            |v, _| {
                v["authorities"][0]["key"] = v["authorities"][0]["certificate"].clone();
            },
            "not a P-256, P-384 or RSA key",
        ),
        (
            "an intermediate for a root",
            |v, _| {
                let intermediate = v["authorities"][0]["intermediates"][0].clone();
                v["authorities"][0]["certificate"] = intermediate["certificate"].clone();
                v["authorities"][0]["id"] = intermediate["id"].clone();
            },
            "stands twice",
        ),
        (
            "a foreign cross-certificate",
            |v, o| {
                v["authorities"][0]["crossCertificates"] =
                    json!([o["authorities"][0]["certificate"]]);
            },
            "cross-certificate is for another key",
        ),
    ];
    for (name, change, words) in table {
        let mut value = value(&prepared());
        change(&mut value, &other);
        let error = read(&value).expect_err(name).to_string();
        assert!(error.contains(words), "{name}: {error}");
    }
}

#[test]
fn a_key_in_the_wrong_place_does_not_get_into_the_message() {
    let mut value = value(&journal());
    let key = value["authorities"][0]["key"]
        .as_str()
        .expect("text")
        .to_owned();
    for place in [
        "generation",
        "longestLeaf",
        "trustDomain",
        "denied",
        "authorities",
    ] {
        let mut wrong = value.clone();
        wrong[place] = json!(key);
        let error = read(&wrong).expect_err(place);
        let printed = format!("{error} {error:?}");
        assert!(!printed.contains(&key[..40]), "{place}: {printed}");
    }
    for place in [
        "phase",
        "id",
        "kind",
        "certificate",
        "preparedAt",
        "crossCertificates",
    ] {
        let mut wrong = value.clone();
        wrong["authorities"][0][place] = json!(key);
        let error = read(&wrong).expect_err(place);
        let printed = format!("{error} {error:?}");
        assert!(!printed.contains(&key[..40]), "{place}: {printed}");
    }
    value["denied"] = json!([{ "serial": key, "until": "2026-11-22T12:00:00Z" }]);
    let error = read(&value).expect_err("serial");
    assert!(matches!(error, JournalError::Serial), "{error}");
}

#[test]
fn the_newest_instant_counts_intermediates_too() {
    assert_eq!(journal().newest(), at("2026-11-22T12:00:00Z"));
    assert_eq!(prepared().newest(), at("2026-12-08T12:00:00Z"));
}

#[test]
fn flipped_bits_and_cut_texts_never_panic_and_never_pass_for_another_journal() {
    let journal = prepared();
    let text = journal.to_json();
    for length in (0..text.len()).step_by(37) {
        assert!(Journal::from_json(&text[..length]).is_err());
    }
    for bit in (0..text.len() * 8).step_by(29) {
        let mut changed = text.to_vec();
        changed[bit / 8] ^= 1 << (bit % 8);
        if let Ok(read) = Journal::from_json(&changed) {
            // A digit of a number or of an instant may well be another one; certificates and keys may not. (The same key
            // can be written in more than one way.)
            assert_eq!(read.bundle(), journal.bundle());
            for (ours, theirs) in read
                .active()
                .intermediates
                .iter()
                .zip(&journal.active().intermediates)
            {
                assert_eq!(ours.certificate, theirs.certificate, "bit {bit}");
                let public = |i: &Intermediate| i.key.as_ref().map(SecretKey::public_key);
                assert_eq!(public(ours), public(theirs));
            }
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(text in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Journal::from_json(&text);
    }
}
