//! An operator's own issuer: four PEM files, named as Istio names them, checked as a whole before anything is done with
//! them.
//!
//! [`Files`] -> [`read`] -> [`Plugged`] -> [`rotation::plug`](super::rotation::plug) -> next journal

use std::fmt;

use jiff::Timestamp;
use zeroize::Zeroizing;

use crate::{
    ca::{
        LeafPolicy, Serial, Validity,
        bundle::Bundle,
        certificate::{self, CaCertificate},
        key::SecretKey,
        peer::{self, Side},
        pem,
        profile::{self, Profile},
        rotation::on,
    },
    identity::{SpiffeId, TrustDomain},
};

/// The issuer's certificate.
pub const CA_CERT: &str = "ca-cert.pem";
/// Its private key.
pub const CA_KEY: &str = "ca-key.pem";
/// What stands between the issuer and its root; the issuer and the root may be repeated there.
pub const CERT_CHAIN: &str = "cert-chain.pem";
/// The roots to trust. The issuer's own must be among them; the others are trusted too.
pub const ROOT_CERT: &str = "root-cert.pem";

/// What an operator put where its issuer belongs, as it was found.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Files {
    /// [`CA_CERT`].
    pub ca_cert: Option<Vec<u8>>,
    /// [`CA_KEY`]; wiped when it is dropped.
    pub ca_key: Option<Zeroizing<Vec<u8>>>,
    /// [`CERT_CHAIN`].
    pub cert_chain: Option<Vec<u8>>,
    /// [`ROOT_CERT`].
    pub root_cert: Option<Vec<u8>>,
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Files(<redacted>)")
    }
}

/// An issuer that can be worked with: a leaf that it signs is accepted by whoever trusts its root.
#[derive(Clone, Debug, PartialEq)]
pub struct Plugged {
    pub(super) issuer: CaCertificate,
    pub(super) key: SecretKey,
    /// Between the issuer and its root, nearest first.
    pub(super) above: Vec<CaCertificate>,
    pub(super) root: CaCertificate,
    /// Trusted besides; they sign nothing here.
    pub(super) others: Vec<CaCertificate>,
}

impl Plugged {
    /// The certificate that is to sign leaves.
    pub fn issuer(&self) -> &CaCertificate {
        &self.issuer
    }

    /// The root above it.
    pub fn root(&self) -> &CaCertificate {
        &self.root
    }
}

/// Reads the files of an issuer and checks what its users would: the key is the certificate's, a chain leads to one of
/// the roots, every certificate of it may sign what is below it and is valid now, and a leaf signed with it is accepted.
///
/// # Errors
/// The first fault. Nothing of the files is used then.
pub fn read(
    files: &Files,
    trust_domain: &TrustDomain,
    leaf: &LeafPolicy,
    now: Timestamp,
) -> Result<Plugged, PlugError> {
    let text = |file: &Option<Vec<u8>>, name| file.clone().ok_or(PlugError::Missing(name));
    let key_text = files.ca_key.as_ref().ok_or(PlugError::Missing(CA_KEY))?;
    let cert_text = text(&files.ca_cert, CA_CERT)?;
    let chain_text = text(&files.cert_chain, CERT_CHAIN)?;
    let root_text = text(&files.root_cert, ROOT_CERT)?;

    let issuer = one(certificates(&cert_text, CA_CERT)?)?;
    let key = SecretKey::from_pem(key_text).map_err(|fault| unreadable(CA_KEY, &fault))?;
    let chain = certificates(&chain_text, CERT_CHAIN)?;
    let roots = roots(certificates(&root_text, ROOT_CERT)?)?;

    if key.public_key().spki() != issuer.spki() {
        return Err(PlugError::KeyMismatch);
    }
    if issuer.is_root() {
        return Err(PlugError::IsRoot);
    }
    let (above, root) = path(&issuer, &chain, &roots)?;
    let others = roots.into_iter().filter(|other| *other != root).collect();
    let plugged = Plugged {
        issuer,
        key,
        above,
        root,
        others,
    };
    plugged.check_lengths()?;
    plugged.check_times(leaf, now)?;
    plugged.rehearse(trust_domain, leaf, now)?;
    Ok(plugged)
}

/// More roots than anybody rotates through at once; the journal has to hold them all.
const MOST_ROOTS: usize = 16;

/// More levels than anybody's hierarchy has.
const MOST_LEVELS: usize = 8;

fn certificates(text: &[u8], file: &'static str) -> Result<Vec<CaCertificate>, PlugError> {
    let read = pem::parse(text).map_err(|fault| unreadable(file, &fault))?;
    let mut certificates = Vec::new();
    for block in read.blocks {
        if block.label != "CERTIFICATE" {
            return Err(unreadable(
                file,
                &"it holds something else than certificates",
            ));
        }
        let certificate = CaCertificate::parse(&block.der);
        certificates.push(certificate.map_err(|fault| unreadable(file, &fault))?);
    }
    match certificates.is_empty() {
        true => Err(unreadable(file, &"it holds no CERTIFICATE block")),
        false => Ok(certificates),
    }
}

fn one(mut certificates: Vec<CaCertificate>) -> Result<CaCertificate, PlugError> {
    match (certificates.pop(), certificates.is_empty()) {
        (Some(only), true) => Ok(only),
        _ => Err(unreadable(
            CA_CERT,
            &"it holds more than the issuer's certificate; the others belong into cert-chain.pem",
        )),
    }
}

/// The roots, each once.
fn roots(listed: Vec<CaCertificate>) -> Result<Vec<CaCertificate>, PlugError> {
    let mut roots: Vec<CaCertificate> = Vec::new();
    for root in listed {
        if !root.is_root() {
            let fault = "it holds a certificate that is not signed by itself";
            return Err(unreadable(ROOT_CERT, &fault));
        }
        match roots.iter().find(|known| known.id() == root.id()) {
            Some(known) if *known != root => {
                let fault = format!("two of its roots have the key id {}", root.id());
                return Err(unreadable(ROOT_CERT, &fault));
            }
            Some(_) => {}
            None => roots.push(root),
        }
    }
    match roots.len() <= MOST_ROOTS {
        true => Ok(roots),
        false => Err(unreadable(
            ROOT_CERT,
            &format!("it holds more than {MOST_ROOTS} roots"),
        )),
    }
}

/// From the issuer to one of the roots, over certificates of the chain in whatever order they stand.
fn path(
    issuer: &CaCertificate,
    chain: &[CaCertificate],
    roots: &[CaCertificate],
) -> Result<(Vec<CaCertificate>, CaCertificate), PlugError> {
    let mut above: Vec<CaCertificate> = Vec::new();
    while above.len() < MOST_LEVELS {
        let last = above.last().unwrap_or(issuer);
        if let Some(root) = roots.iter().find(|root| last.is_signed_by(root)) {
            return Ok((above, root.clone()));
        }
        let next = chain
            .iter()
            .find(|next| *next != issuer && !above.contains(next) && last.is_signed_by(next));
        let Some(next) = next.cloned() else { break };
        above.push(next);
    }
    Err(PlugError::NoPath)
}

impl Plugged {
    /// Root last.
    fn signers(&self) -> impl Iterator<Item = &CaCertificate> {
        std::iter::once(&self.issuer)
            .chain(&self.above)
            .chain([&self.root])
    }

    /// RFC 5280 4.2.1.9. Verifiers look at it in intermediates, and only some of them in a root.
    fn check_lengths(&self) -> Result<(), PlugError> {
        for (signer, below) in self.signers().zip(0_u32..) {
            if let Some(allowed) = signer.path_length()
                && allowed < below
            {
                let id = signer.id().to_string();
                return Err(PlugError::PathLength { id, allowed, below });
            }
        }
        Ok(())
    }

    fn check_times(&self, leaf: &LeafPolicy, now: Timestamp) -> Result<(), PlugError> {
        let rest = leaf.min.max(super::SHORTEST_REST);
        for signer in self.signers() {
            let Validity {
                not_before,
                not_after,
            } = signer.validity();
            let id = || signer.id().to_string();
            if now < not_before {
                let id = id();
                return Err(PlugError::NotYet {
                    id,
                    not_before,
                    now,
                });
            }
            if on(now, rest) > not_after {
                let id = id();
                return Err(PlugError::Ends { id, not_after, now });
            }
        }
        Ok(())
    }

    /// Signs a leaf that nobody gets, and looks at it with a peer's eyes.
    fn rehearse(
        &self,
        trust_domain: &TrustDomain,
        leaf: &LeafPolicy,
        now: Timestamp,
    ) -> Result<(), PlugError> {
        let refused = |fault: &dyn fmt::Display| PlugError::Refused(fault.to_string());
        let id = SpiffeId::new(trust_domain, "malha-system", "rehearsal");
        let profile = Profile::Workload(id.map_err(|fault| refused(&fault))?);
        let validity = Validity {
            not_before: now,
            not_after: on(now, leaf.min),
        };
        let serial = Serial::random([1; 16]);
        let key = self.key.public_key();
        let signed = profile::issuer(&self.issuer, &self.key)
            .and_then(|issuer| profile::leaf(&issuer, &key, &profile, validity, serial))
            .map_err(|fault| refused(&fault))?;
        // A name with two parts of one kind (DC=example, DC=com) does not survive the library that copies it.
        let copied = certificate::read(&signed).map_err(|fault| refused(&fault))?;
        if copied.issuer().as_raw() != self.issuer.subject() {
            return Err(PlugError::Subject);
        }
        let bundle = Bundle::of([&self.root].into_iter());
        let above = self.above.iter().map(|c| c.der().to_owned());
        let chain: Vec<_> = [signed, self.issuer.der().to_owned()]
            .into_iter()
            .chain(above)
            .collect();
        [Side::Server, Side::Client]
            .into_iter()
            .try_for_each(|side| peer::verify(&chain, &bundle, side, now))
            .map_err(|fault| refused(&fault))
    }
}

fn unreadable(file: &'static str, fault: &dyn fmt::Display) -> PlugError {
    PlugError::Unreadable {
        file,
        fault: fault.to_string(),
    }
}

/// Why an operator's issuer is not taken.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlugError {
    /// The files make sense only together.
    #[error(
        "{0} is missing; ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem are needed together"
    )]
    Missing(&'static str),
    /// A file that does not hold what it should.
    #[error("{file} cannot be used: {fault}")]
    Unreadable {
        /// Which.
        file: &'static str,
        /// What is wrong with it.
        fault: String,
    },
    /// Certificate and key do not belong together; perhaps only one of them was replaced yet.
    #[error("ca-key.pem is not the key of ca-cert.pem; replace both at once")]
    KeyMismatch,
    /// The root's own key.
    #[error(
        "ca-cert.pem is a root; sign an intermediate with it, plug that in, and keep the root's key off the cluster"
    )]
    IsRoot,
    /// A certificate in between is missing, or the root is another's.
    #[error(
        "ca-cert.pem does not lead to a root of root-cert.pem; cert-chain.pem must hold every certificate between them"
    )]
    NoPath,
    /// A certificate of the chain may not have so many below it.
    #[error(
        "the certificate {id} allows {allowed} certificates of CAs below it (pathLen), and there are {below}"
    )]
    PathLength {
        /// Its key id.
        id: String,
        /// As it says.
        allowed: u32,
        /// As there are.
        below: u32,
    },
    /// A certificate of the chain is from the future.
    #[error("the certificate {id} is valid from {not_before}; the clock here says {now}")]
    NotYet {
        /// Its key id.
        id: String,
        /// When it begins.
        not_before: Timestamp,
        /// Our clock.
        now: Timestamp,
    },
    /// A certificate of the chain ends before the shortest leaf would.
    #[error(
        "the certificate {id} ends at {not_after}, too soon for the shortest leaf; the clock here says {now}"
    )]
    Ends {
        /// Its key id.
        id: String,
        /// When it ends.
        not_after: Timestamp,
        /// Our clock.
        now: Timestamp,
    },
    /// The library cannot repeat the issuer's name.
    #[error(
        "the subject of ca-cert.pem has two parts of one kind (such as DC=example, DC=com); leaves could not name it as their issuer, use one of each kind"
    )]
    Subject,
    /// A peer's own words.
    #[error("what it signs would not be accepted: {0}")]
    Refused(String),
}

impl PlugError {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing(_) => "PluggedIncomplete",
            Self::Unreadable { .. } => "PluggedUnreadable",
            Self::KeyMismatch => "PluggedKeyMismatch",
            Self::IsRoot => "PluggedRoot",
            Self::NoPath => "PluggedNoPath",
            Self::PathLength { .. } => "PluggedPathLength",
            Self::NotYet { .. } | Self::Ends { .. } => "PluggedNotValid",
            Self::Subject => "PluggedSubject",
            Self::Refused(_) => "PluggedRefused",
        }
    }
}

#[cfg(test)]
mod tests;
