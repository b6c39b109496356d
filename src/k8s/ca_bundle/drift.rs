//! Whether the live bundle is the wanted one, and if not, what happened to it.

use crate::ca::bundle::Bundle;

/// The name under which the API server records that the field is ours.
pub const FIELD_MANAGER: &str = "malha-ca-bundle";

/// One webhook of a configuration, as far as its trust is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// `webhooks[].name`.
    pub(super) name: String,
    /// `webhooks[].clientConfig.caBundle`, decoded from base64; empty where there is none.
    pub(super) ca_bundle: Vec<u8>,
    /// What the API server's records say about who wrote it.
    pub(super) record: Record,
}

/// What `metadata.managedFields` says about an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// We never wrote it.
    Fresh,
    /// We wrote it before, and somebody else wrote the bundle since.
    Overwritten,
    /// The bundle is as we wrote it.
    Ours,
}

/// Why a bundle is not the wanted one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Cause {
    /// What we wrote ourselves, earlier.
    Stale,
    /// Nothing in it.
    Blank,
    /// Somebody else's certificates, or none that can be read.
    Foreign,
}

impl Cause {
    pub(super) const ALL: [Self; 3] = [Self::Stale, Self::Blank, Self::Foreign];

    /// The metric label.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Stale => "stale",
            Self::Blank => "blank",
            Self::Foreign => "foreign",
        }
    }

    pub(super) fn in_words(self) -> &'static str {
        match self {
            Self::Stale => "out of date",
            Self::Blank => "empty",
            Self::Foreign => "overwritten with something else",
        }
    }
}

/// What must be written, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Drift {
    /// The worst of what happened.
    pub(super) cause: Cause,
    /// The entries it happened to.
    pub(super) entries: Vec<String>,
    /// Nothing was taken from us: these entries never had our bundle.
    pub(super) first: bool,
}

/// What is wrong with the live entries; `None` where each carries exactly the wanted certificates.
pub(super) fn drift(entries: &[Entry], wanted: &Bundle) -> Option<Drift> {
    // nothing to publish yet: to blank the field would be the very fault that this room repairs
    wanted.certificates().next()?;
    let wrong: Vec<(&Entry, Cause)> = entries
        .iter()
        .filter_map(|entry| Some((entry, fault(entry, wanted)?)))
        .collect();
    let cause = wrong.iter().map(|(_, cause)| *cause).max()?;
    Some(Drift {
        cause,
        entries: wrong.iter().map(|(entry, _)| entry.name.clone()).collect(),
        first: wrong
            .iter()
            .all(|(entry, cause)| entry.record == Record::Fresh && *cause == Cause::Blank),
    })
}

fn fault(entry: &Entry, wanted: &Bundle) -> Option<Cause> {
    if entry.ca_bundle.trim_ascii().is_empty() {
        return Some(Cause::Blank);
    }
    let live = Bundle::parse_pem(&entry.ca_bundle);
    if live.is_ok_and(|live| live == *wanted) {
        return None;
    }
    Some(match entry.record {
        Record::Ours => Cause::Stale,
        Record::Fresh | Record::Overwritten => Cause::Foreign,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two roots of nobody, made in memory.
    fn bundles() -> (Bundle, Bundle, Bundle) {
        let pem = |name: &str| {
            let key = rcgen::KeyPair::generate().expect("a key");
            let mut params = rcgen::CertificateParams::default();
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            params
                .distinguished_name
                .push(rcgen::DnType::CommonName, name);
            params.self_signed(&key).expect("a root").pem()
        };
        let (a, b) = (pem("a"), pem("b"));
        let parse = |text: &str| Bundle::parse_pem(text.as_bytes()).expect("a bundle");
        (parse(&a), parse(&b), parse(&format!("{a}{b}")))
    }

    fn entry(name: &str, ca_bundle: &str, record: Record) -> Entry {
        Entry {
            name: name.to_owned(),
            ca_bundle: ca_bundle.into(),
            record,
        }
    }

    #[test]
    fn the_cause_says_what_happened_to_the_bundle() {
        let (ours, theirs, both) = bundles();
        let (good, foreign) = (ours.to_pem(), theirs.to_pem());
        let union = both.to_pem();
        let comments = format!("# root\n\n{good}\n\n\n{}", good.trim_end());
        for (live, record, want) in [
            (good.as_str(), Record::Ours, None),
            (comments.as_str(), Record::Overwritten, None),
            ("", Record::Fresh, Some(Cause::Blank)),
            ("\n", Record::Overwritten, Some(Cause::Blank)),
            (foreign.as_str(), Record::Fresh, Some(Cause::Foreign)),
            (union.as_str(), Record::Overwritten, Some(Cause::Foreign)),
            ("garbage", Record::Overwritten, Some(Cause::Foreign)),
            (union.as_str(), Record::Ours, Some(Cause::Stale)),
        ] {
            let found = drift(&[entry("a", live, record)], &ours);
            assert_eq!(found.map(|drift| drift.cause), want, "{record:?}: {live}");
        }
    }

    #[test]
    fn a_first_write_takes_nothing_back_from_anybody() {
        let (ours, theirs, _) = bundles();
        let fresh = entry("a", "", Record::Fresh);
        let first = drift(std::slice::from_ref(&fresh), &ours).expect("blank");
        assert!(first.first);
        let taken = drift(&[fresh.clone(), entry("b", "", Record::Overwritten)], &ours);
        assert!(!taken.expect("blank").first);
        let placed = drift(&[fresh, entry("b", &theirs.to_pem(), Record::Fresh)], &ours);
        let placed = placed.expect("foreign");
        assert_eq!((placed.cause, placed.first), (Cause::Foreign, false));
        assert_eq!(placed.entries, ["a", "b"]);
    }

    #[test]
    fn without_a_wanted_bundle_nothing_is_ever_blanked() {
        let (_, theirs, _) = bundles();
        let live = [
            entry("a", &theirs.to_pem(), Record::Fresh),
            entry("b", "", Record::Ours),
        ];
        assert_eq!(drift(&live, &Bundle::default()), None);
        assert_eq!(drift(&[], &theirs), None);
    }
}
