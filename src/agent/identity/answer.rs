//! What comes back for a CSR, checked as a peer would check it before anybody in the pod is given it.

use std::sync::Arc;

use jiff::Timestamp;

use crate::{
    agent::identity::trust::{RootsError, Trust, Voice, read_roots},
    ca::{
        KeyedChain,
        bundle::Bundle,
        key::SecretKey,
        peer::{self, PeerError, Side},
        pem,
        svid::{Svid, SvidError},
    },
    identity::SpiffeId,
};

/// A certificate that passed, and the roots that came with it.
#[derive(Debug)]
pub(super) struct Accepted {
    /// The chain and its key.
    pub(super) keyed: Arc<KeyedChain>,
    /// What the authority trusts.
    pub(super) roots: Bundle,
}

/// Checks the elements of an answer: leaf, intermediates one each, last all roots together.
///
/// The chain must be acceptable under the trust set that this pod will have afterwards, on both sides of a connection:
/// peers hold the same one, or an older one that a cross-certificate leads to.
///
/// # Errors
/// The first thing a peer, or we, would object to. Nothing of the answer is used then.
pub(super) fn accept(
    elements: &[String],
    key: &SecretKey,
    id: &SpiffeId,
    trust: &Trust,
    now: Timestamp,
) -> Result<Accepted, AnswerError> {
    let (roots, chain) = elements.split_last().ok_or(AnswerError::Short(0))?;
    if chain.is_empty() {
        return Err(AnswerError::Short(1));
    }
    let chain: Vec<Vec<u8>> = chain
        .iter()
        .zip(1..)
        .map(|(element, number)| one_certificate(element).ok_or(AnswerError::Element(number)))
        .collect::<Result<_, _>>()?;
    let roots = read_roots(roots.as_bytes())?;
    let leaf = Svid::parse(&chain[0])?;
    if leaf.id != *id {
        return Err(AnswerError::Stranger {
            found: Box::new(leaf.id),
            asked: Box::new(id.clone()),
        });
    }
    if leaf.spki != key.public_key().spki() {
        return Err(AnswerError::OtherKey);
    }
    if now < leaf.validity.not_before {
        return Err(AnswerError::NotYet {
            not_before: leaf.validity.not_before,
            now,
        });
    }
    let trusted = trust.after(Voice::Answer, roots.clone());
    for side in [Side::Server, Side::Client] {
        peer::verify(&chain, &trusted, side, now)?;
    }
    let keyed = KeyedChain {
        chain,
        key: key.pkcs8().to_vec().into(),
        validity: leaf.validity,
    };
    Ok(Accepted {
        keyed: Arc::new(keyed),
        roots,
    })
}

fn one_certificate(text: &str) -> Option<Vec<u8>> {
    let mut blocks = pem::parse(text.as_bytes()).ok()?.blocks;
    let block = blocks.pop().filter(|block| block.label == "CERTIFICATE")?;
    blocks.is_empty().then_some(block.der)
}

/// Why an answer is not used.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// At least a leaf and the roots are needed.
    #[error("the answer has {0} elements, fewer than a leaf and its roots")]
    Short(usize),
    /// Not one certificate.
    #[error("element {0} of the answer is not one PEM certificate")]
    Element(usize),
    /// The last element.
    #[error(transparent)]
    Roots(#[from] RootsError),
    /// The leaf is no workload's.
    #[error(transparent)]
    Svid(#[from] SvidError),
    /// Another's identity.
    #[error("the certificate is for {found}, but this pod is {asked}")]
    Stranger {
        /// What it says.
        found: Box<SpiffeId>,
        /// What it should say.
        asked: Box<SpiffeId>,
    },
    /// For another key.
    #[error("the certificate is for another key than the one that was sent")]
    OtherKey,
    /// Clocks differ.
    #[error(
        "the certificate begins at {not_before}, but this node's clock says {now}; set the clock of one of them right"
    )]
    NotYet {
        /// What it says.
        not_before: Timestamp,
        /// Our clock.
        now: Timestamp,
    },
    /// What a peer says.
    #[error(transparent)]
    Peer(#[from] PeerError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::{
        Authority, Serial,
        profile::Profile,
        rotation::RotationPolicy,
        tests::support::{DAY, at, authority, founded, new_key, roll, workload},
    };

    const NOW: &str = "2026-11-22T10:00:00Z";

    struct Case {
        authority: Authority,
        key: SecretKey,
        trust: Trust,
        elements: Vec<String>,
    }

    impl Case {
        fn new() -> Self {
            let authority = authority(&founded(at(NOW), &RotationPolicy::default()));
            let mut trust = Trust::default();
            trust.hear(Voice::File, authority.bundle().clone());
            let key = new_key();
            let mut case = Self {
                authority,
                key,
                trust,
                elements: Vec::new(),
            };
            case.elements = case.issued(&workload("shop", "web"));
            case
        }

        fn issued(&self, profile: &Profile) -> Vec<String> {
            let issued = self
                .authority
                .issue(
                    &self.key.public_key(),
                    profile,
                    DAY,
                    Serial::random(roll()),
                    at(NOW),
                )
                .expect("issued");
            let chain = issued.chain.iter();
            let mut elements: Vec<_> = chain.map(|der| pem::encode("CERTIFICATE", der)).collect();
            elements.push(self.authority.bundle().to_pem());
            elements
        }

        fn accept_at(&self, now: Timestamp) -> Result<Accepted, String> {
            let id = "spiffe://cluster.local/ns/shop/sa/web";
            let id = id.parse().expect("an id");
            accept(&self.elements, &self.key, &id, &self.trust, now).map_err(|e| e.to_string())
        }

        fn refused(&self) -> String {
            self.accept_at(at(NOW)).expect_err("to be refused")
        }
    }

    #[test]
    fn what_the_authority_signs_is_taken() {
        let case = Case::new();
        let accepted = case.accept_at(at(NOW)).expect("good");
        assert_eq!(accepted.roots, *case.authority.bundle());
        assert_eq!(accepted.keyed.chain.len(), 2);
        assert_eq!(accepted.keyed.key.as_slice(), case.key.pkcs8());
    }

    #[test]
    fn another_pods_identity_is_not_taken() {
        let mut case = Case::new();
        case.elements = case.issued(&workload("shop", "billing"));
        assert!(case.refused().contains("sa/billing, but this pod is"));
        case.elements = case.issued(&Profile::Webhook {
            dns_names: vec!["web.shop.svc".to_owned()],
        });
        assert!(case.refused().contains("exactly one URI"));
    }

    #[test]
    fn a_certificate_for_another_key_is_not_taken() {
        let mut case = Case::new();
        case.key = new_key();
        assert!(case.refused().contains("another key"));
    }

    #[test]
    fn a_root_that_comes_out_of_the_blue_is_not_taken_while_the_push_says_otherwise() {
        let mut case = Case::new();
        let elsewhere = Case::new();
        case.trust
            .hear(Voice::Push, elsewhere.authority.bundle().clone());
        case.trust.attend(true);
        assert!(case.refused().contains("a peer would refuse the chain"));
        // without a push, who was reached over TLS may name new roots, and the chain must lead to them
        let mut fresh = Case::new();
        let last = fresh.elements.len() - 1;
        fresh.elements[last] = elsewhere.authority.bundle().to_pem();
        assert!(fresh.refused().contains("a peer would refuse the chain"));
    }

    #[test]
    fn clocks_that_differ_are_named() {
        let case = Case::new();
        let early = case
            .accept_at(at("2026-11-22T09:54:00Z"))
            .expect_err("early");
        assert!(early.contains("this node's clock says 2026-11-22T09:54:00Z"));
        case.accept_at(at("2026-11-22T09:56:00Z"))
            .expect("four minutes behind is what leaves are dated back for");
        let late = case
            .accept_at(at("2026-11-24T10:00:00Z"))
            .expect_err("late");
        assert!(late.contains("a peer would refuse the chain"), "{late}");
    }

    #[test]
    fn parts_that_are_missing_doubled_or_mangled_are_not_guessed() {
        let whole = Case::new();
        type Spoil = fn(&mut Vec<String>);
        let cases: &[(&str, Spoil)] = &[
            ("has 0 elements", Vec::clear),
            ("has 1 elements", |e| e.truncate(1)),
            ("no root", |e| e.truncate(2)),
            ("a peer would refuse", |e| {
                e.remove(1);
            }),
            ("element 1 of the answer", |e| e[0].clear()),
            ("element 1 of the answer", |e| e[0] = e[0].repeat(2)),
            ("holds no CERTIFICATE", |e| e[2].clear()),
            ("not a workload's", |e| e.swap(0, 1)),
        ];
        for (part, spoil) in cases {
            let mut case = Case::new();
            case.elements = whole.elements.clone();
            case.key = SecretKey::from_pkcs8(whole.key.pkcs8().to_vec().into()).expect("a key");
            case.trust = whole.trust.clone();
            spoil(&mut case.elements);
            let fault = case.refused();
            assert!(fault.contains(part), "{part}: {fault}");
        }
    }
}
