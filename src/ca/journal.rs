//! The CA's journal: everything the authority must remember, in one object that changes only by compare-and-swap.
//!
//! text of a Secret or file -> [`Journal::from_json`] -> [`super::rotation`] -> [`Journal::to_json`]
//!
//! The format is whole from the first version on: it has room for a second root beside the first, for cross-certificates
//! and for revoked leaves, so that a later version that uses them finds a journal it can read.

use std::{future::Future, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    ca::{KeyId, bundle::Bundle, certificate::CaCertificate, key::SecretKey, plugged::Files},
    identity::TrustDomain,
};

/// The journal (format 1). Once read it is known to be consistent; only [`super::rotation`] makes new ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Journal {
    /// Counts the changes of the trust set.
    pub(super) generation: u64,
    /// Counts the leaders: one that finds a higher epoch than its own has been replaced.
    pub(super) epoch: u64,
    pub(super) trust_domain: TrustDomain,
    /// The longest life that a leaf may have been granted. Raised before a longer one is granted, since a root stays
    /// trusted for this long after it stopped signing.
    pub(super) longest_leaf: Duration,
    pub(super) authorities: Vec<RootAuthority>,
    pub(super) denied: Vec<Denied>,
}

/// One root key with its certificate, the intermediates below it, and the certificates that older roots gave it.
#[derive(Clone, Debug, PartialEq)]
pub struct RootAuthority {
    /// Where its root comes from.
    pub kind: Kind,
    /// The root certificate.
    pub certificate: CaCertificate,
    /// The root's key; gone once it drains, and never here for a plugged-in root.
    pub key: Option<SecretKey>,
    /// This root's name and key, signed by another root.
    pub cross_certificates: Vec<CaCertificate>,
    /// How far it has come.
    pub phase: Phase,
    /// When it was made.
    pub prepared_at: Timestamp,
    /// When it entered the trust set.
    pub published_at: Option<Timestamp>,
    /// When it began to sign.
    pub activated_at: Option<Timestamp>,
    /// Until when it must stay trusted after it stopped signing.
    pub drain_until: Option<Timestamp>,
    /// When it left the trust set.
    pub retired_at: Option<Timestamp>,
    /// Since when it counts as compromised.
    pub tainted: Option<Timestamp>,
    /// Oldest first.
    pub intermediates: Vec<Intermediate>,
}

/// Where a root comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Made here.
    Root,
    /// The operator's own; only its intermediate signs here.
    Plugged,
}

/// How far a root authority has come. It moves in this order and never back, unless an operator plugs in once more what
/// was plugged in before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Made, and known to this journal alone.
    Prepared,
    /// Trusted.
    Published,
    /// Trusted, and signs.
    Active,
    /// Trusted, signs no more; its keys are gone.
    Draining,
    /// Neither; a record.
    Retired,
}

/// A certificate that signs leaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Intermediate {
    /// Signed by its authority's root, or by the first of those above it.
    pub certificate: CaCertificate,
    /// What stands between it and its root, nearest first. Only an operator's has any.
    pub above: Vec<CaCertificate>,
    /// Gone once it is past.
    pub key: Option<SecretKey>,
    /// Whether it signs.
    pub state: IntermediateState,
}

/// Whether an intermediate signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IntermediateState {
    /// Not yet.
    Next,
    /// Now.
    Active,
    /// No more; kept until its certificate ends.
    Past,
}

/// A leaf that must not be renewed with itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Denied {
    /// Lower-case hex.
    pub serial: String,
    /// When the leaf ends, and this entry with it.
    pub until: Timestamp,
}

impl Journal {
    /// Reads what a home holds, and checks that it can be worked with: keys fit their certificates, intermediates are
    /// signed by their roots, exactly one authority signs.
    ///
    /// # Errors
    /// A format that this version does not know, or a broken promise. Nothing may be written then.
    pub fn from_json(text: &[u8]) -> Result<Self, JournalError> {
        if text.len() > MAX_BYTES {
            return Err(JournalError::TooLarge(text.len()));
        }
        let format: FormatOnly = serde_json::from_slice(text).map_err(JournalError::json)?;
        if format.format != FORMAT {
            return Err(JournalError::UnknownFormat(format.format));
        }
        let wire: Wire = serde_json::from_slice(text).map_err(JournalError::json)?;
        let journal = wire.into_journal()?;
        journal.check()?;
        Ok(journal)
    }

    /// The text that a home keeps. It holds the keys, so it is wiped when it is dropped.
    pub fn to_json(&self) -> Zeroizing<Vec<u8>> {
        // Room for everything at once: a buffer that grows leaves unwiped copies behind.
        let mut text = Zeroizing::new(Vec::with_capacity(self.size_hint()));
        serde_json::to_writer(&mut *text, &Wire::of(self))
            .expect("a journal is made of strings and numbers");
        text
    }

    /// Counts the changes of the trust set.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Counts the leaders.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The trust domain of everything that is signed with it.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The longest life that a leaf may have.
    pub fn longest_leaf(&self) -> Duration {
        self.longest_leaf
    }

    /// All root authorities, retired ones included.
    pub fn authorities(&self) -> &[RootAuthority] {
        &self.authorities
    }

    /// Leaves that must not be renewed with themselves.
    pub fn denied(&self) -> &[Denied] {
        &self.denied
    }

    /// The root authority that signs.
    pub fn active(&self) -> &RootAuthority {
        self.authorities
            .iter()
            .find(|authority| authority.phase == Phase::Active)
            .expect("a journal has exactly one active authority")
    }

    /// What verifiers must trust.
    pub fn bundle(&self) -> Bundle {
        let trusted = self.authorities.iter().filter(|a| a.phase.is_trusted());
        Bundle::of(trusted.map(|authority| &authority.certificate))
    }

    /// The newest instant that it has seen. A clock behind it is wrong.
    pub fn newest(&self) -> Timestamp {
        self.authorities
            .iter()
            .flat_map(RootAuthority::instants)
            .max()
            .expect("a journal has an authority, and an authority the instant it was made")
    }

    /// This journal in the name of the next leader.
    pub fn led_anew(&self) -> Self {
        let mut journal = self.clone();
        journal.epoch = journal.epoch.saturating_add(1);
        journal
    }

    pub(super) fn active_mut(&mut self) -> &mut RootAuthority {
        self.authorities
            .iter_mut()
            .find(|authority| authority.phase == Phase::Active)
            .expect("a journal has exactly one active authority")
    }

    fn size_hint(&self) -> usize {
        let certificates = self
            .authorities
            .iter()
            .flat_map(RootAuthority::certificates);
        let base64: usize = certificates.map(|c| c.der().len() * 4 / 3 + 256).sum();
        // A key of ours has under 200 bytes, an RSA key of 4096 bits 3200 in base64; there are no more of them than certificates.
        let keys = self
            .authorities
            .iter()
            .flat_map(|a| &a.intermediates)
            .count()
            * 4096;
        4096 + base64 + keys + self.authorities.len() * 1024 + self.denied.len() * 128
    }

    fn check(&self) -> Result<(), JournalError> {
        let count = |phases: &[Phase]| {
            let authorities = self.authorities.iter();
            authorities.filter(|a| phases.contains(&a.phase)).count()
        };
        let active = count(&[Phase::Active]);
        if active != 1 {
            return Err(JournalError::NotOneActive(active));
        }
        if self.authorities.iter().filter(|a| a.is_next()).count() > 1 {
            return Err(JournalError::TwoRotations);
        }
        // An operator may have one issuer's key signed by an old root and a new one, so it may stand below both.
        let roots = self.authorities.iter().map(RootAuthority::id).collect();
        let each = self.authorities.iter().map(|a| a.own_ids().collect());
        if let Some(id) = std::iter::once(roots).chain(each).find_map(repeated) {
            return Err(JournalError::Twice(id));
        }
        let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        let is_serial = |s: &str| (1..=40).contains(&s.len()) && s.bytes().all(is_hex);
        if !self.denied.iter().all(|denied| is_serial(&denied.serial)) {
            return Err(JournalError::Serial);
        }
        self.authorities
            .iter()
            .try_for_each(|authority| authority.check(&self.trust_domain))
    }
}

impl RootAuthority {
    /// The root's subject key id.
    pub fn id(&self) -> &KeyId {
        self.certificate.id()
    }

    /// Whether it shall sign next. One without an intermediate is only trusted: an operator's bundle lists it.
    pub(super) fn is_next(&self) -> bool {
        let waits = matches!(self.phase, Phase::Prepared | Phase::Published);
        waits && (self.kind == Kind::Root || !self.intermediates.is_empty())
    }

    /// The intermediate in a state, of which there is at most one (of past ones: the newest).
    pub fn intermediate(&self, state: IntermediateState) -> Option<&Intermediate> {
        self.intermediates.iter().rev().find(|i| i.state == state)
    }

    fn own_ids(&self) -> impl Iterator<Item = &KeyId> {
        let intermediates = self.intermediates.iter().map(|i| i.certificate.id());
        std::iter::once(self.id()).chain(intermediates)
    }

    fn certificates(&self) -> impl Iterator<Item = &CaCertificate> {
        std::iter::once(&self.certificate)
            .chain(&self.cross_certificates)
            .chain(self.intermediates.iter().map(|i| &i.certificate))
            .chain(self.intermediates.iter().flat_map(|i| &i.above))
    }

    /// An intermediate of ours has no instant of its own: its certificate begins a known span before it was made.
    fn instants(&self) -> impl Iterator<Item = Timestamp> {
        let phases = [
            Some(self.prepared_at),
            self.published_at,
            self.activated_at,
            self.retired_at,
            self.tainted,
        ];
        let ours = self
            .intermediates
            .iter()
            .filter(|_| self.kind == Kind::Root);
        let made = ours.map(|i| {
            let begin = i.certificate.validity().not_before;
            begin
                .saturating_add(super::profile::CA_BACKDATE)
                .unwrap_or(begin)
        });
        phases.into_iter().flatten().chain(made)
    }

    fn check(&self, trust_domain: &TrustDomain) -> Result<(), JournalError> {
        let id = || self.id().clone();
        let broken = |fault| Err(JournalError::Authority { id: id(), fault });
        if self.kind == Kind::Root && self.certificate.uris() != [trust_domain.uri()] {
            return broken("its root is of another trust domain");
        }
        if !self.certificate.is_root() {
            return broken("its root is not signed by itself");
        }
        if !fits(self.key.as_ref(), &self.certificate) {
            return broken("its root's key is another's");
        }
        if self.key.is_some() != (self.kind == Kind::Root && self.phase.has_keys()) {
            return broken("its root's key is missing, or still there after it stopped signing");
        }
        if self.phase >= Phase::Published
            && self.phase != Phase::Retired
            && self.published_at.is_none()
        {
            return broken("it is trusted, but was never published");
        }
        if self.phase == Phase::Draining && self.drain_until.is_none() {
            return broken("it drains without an end");
        }
        if self
            .cross_certificates
            .iter()
            .any(|c| c.id() != self.id() || c.spki() != self.certificate.spki())
        {
            return broken("a cross-certificate is for another key");
        }
        let count = |state| {
            let all = self.intermediates.iter();
            all.filter(|i| i.state == state).count()
        };
        if self.phase == Phase::Active && count(IntermediateState::Active) != 1 {
            return broken("it does not have exactly one active intermediate");
        }
        if count(IntermediateState::Active) > 1 || count(IntermediateState::Next) > 1 {
            return broken("it has two intermediates in one state");
        }
        for intermediate in &self.intermediates {
            if !intermediate.is_below(&self.certificate) {
                return broken("an intermediate is not signed by its root");
            }
            if self.kind == Kind::Root && intermediate.certificate.uris() != [trust_domain.uri()] {
                return broken("an intermediate is of another trust domain");
            }
            if !fits(intermediate.key.as_ref(), &intermediate.certificate) {
                return broken("an intermediate's key is another's");
            }
            let wants_key = self.phase.has_keys() && intermediate.state != IntermediateState::Past;
            if intermediate.key.is_some() != wants_key {
                return broken(
                    "an intermediate's key is missing, or still there after it stopped signing",
                );
            }
        }
        Ok(())
    }
}

impl Intermediate {
    fn is_below(&self, root: &CaCertificate) -> bool {
        let above = self.above.iter().chain([root]);
        let path = std::iter::once(&self.certificate).chain(&self.above);
        path.zip(above)
            .all(|(certificate, issuer)| certificate.is_signed_by(issuer))
    }
}

impl Phase {
    /// Whether verifiers trust it.
    pub fn is_trusted(self) -> bool {
        matches!(self, Self::Published | Self::Active | Self::Draining)
    }

    fn has_keys(self) -> bool {
        self <= Self::Active
    }
}

fn repeated(mut ids: Vec<&KeyId>) -> Option<KeyId> {
    ids.sort();
    let pair = ids.windows(2).find(|pair| pair[0] == pair[1])?;
    pair.first().map(|id| (*id).clone())
}

fn fits(key: Option<&SecretKey>, certificate: &CaCertificate) -> bool {
    key.is_none_or(|key| key.public_key().spki() == certificate.spki())
}

/// Why a text is not a journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Written by a newer version.
    #[error("its format is {0}, and this version knows {FORMAT}")]
    UnknownFormat(u64),
    /// More than a Secret can hold.
    #[error("it has {0} bytes, more than the {MAX_BYTES} that a Secret can hold")]
    TooLarge(usize),
    /// Not JSON, or not of the form.
    #[error("{0}")]
    Json(String),
    /// Not a trust domain.
    #[error("its trust domain is not a legal name")]
    TrustDomain,
    /// A denied serial that is none.
    #[error("a denied serial is not lower-case hex of at most 20 bytes")]
    Serial,
    /// A duration below zero.
    #[error("its longest leaf has a negative life")]
    NegativeLife,
    /// An authority's `id` is not its certificate's.
    #[error("a certificate is filed under {filed}, but its key id is {found}")]
    WrongId {
        /// As written.
        filed: String,
        /// As in the certificate.
        found: KeyId,
    },
    /// Nobody signs, or two do.
    #[error("{0} authorities are active, where one must be")]
    NotOneActive(usize),
    /// Two new roots at once.
    #[error("two root rotations are open at once")]
    TwoRotations,
    /// A key id that stands twice.
    #[error("the key id {0} stands twice in it")]
    Twice(KeyId),
    /// An authority that is not consistent.
    #[error("authority {id}: {fault}")]
    Authority {
        /// Its key id.
        id: KeyId,
        /// What is wrong.
        fault: &'static str,
    },
}

impl JournalError {
    /// serde_json repeats what it did not expect. A key that stands in the wrong place must not get into a log, so what
    /// is as long as one is left out.
    fn json(error: serde_json::Error) -> Self {
        let text = error.to_string();
        Self::Json(text.split(' ').map(shown).collect::<Vec<_>>().join(" "))
    }
}

/// A word that is too short to be a key.
fn shown(word: &str) -> &str {
    if word.len() <= 48 {
        word
    } else {
        "<long text>"
    }
}

const FORMAT: u64 = 1;

/// What etcd and the API server let into one Secret.
const MAX_BYTES: usize = 1024 * 1024;

/// A journal as its home holds it.
#[derive(Clone, Debug)]
pub struct Stored {
    /// What was read back.
    pub journal: Journal,
    /// The home's version: `resourceVersion` of the Secret, or the digest of the file.
    pub version: String,
}

/// Where a journal lives: a Secret (`k8s`) or a file in a directory (`standalone`).
pub trait JournalHome: Send + Sync + 'static {
    /// What is there now; `None` where there is nothing yet.
    fn load(&self) -> impl Future<Output = Result<Option<Stored>, HomeError>> + Send;
    /// Makes it; [`HomeError::Conflict`] where somebody else was first.
    fn create(&self, journal: &Journal) -> impl Future<Output = Result<Stored, HomeError>> + Send;
    /// Replaces exactly the version `seen`; [`HomeError::Conflict`] where it was changed since.
    fn replace(
        &self,
        seen: &str,
        journal: &Journal,
    ) -> impl Future<Output = Result<Stored, HomeError>> + Send;
    /// Whether there is any trace of an earlier life (trust ConfigMap, filled caBundle): then a missing journal is a
    /// loss, and no new root is made.
    fn has_earlier_life(&self) -> impl Future<Output = Result<bool, HomeError>> + Send;
    /// The issuer that the operator has put beside the journal; `None` where there is none, or where this kind of home has
    /// no place for one.
    fn plugged(&self) -> impl Future<Output = Result<Option<Files>, HomeError>> + Send {
        async { Ok(None) }
    }
}

/// Why a home could not do it.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// Somebody else was first: read again and recompute.
    #[error("{home} was changed by another writer; reading it again")]
    Conflict {
        /// The Secret or file.
        home: String,
    },
    /// There, but not a journal.
    #[error(
        "{home} holds no readable CA journal ({fault}); restore it from a backup: a new root would lock out every running pod"
    )]
    Unreadable {
        /// The Secret or file.
        home: String,
        /// What is wrong with it.
        fault: String,
    },
    /// Cannot be reached now.
    #[error("{home} cannot be reached")]
    Unreachable {
        /// The Secret or file.
        home: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Read first: the rest of an unknown format means nothing.
#[derive(Deserialize)]
struct FormatOnly {
    format: u64,
}

/// The journal as JSON. Unknown fields are refused: to rewrite a journal without them would lose what they say.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wire {
    format: u64,
    generation: u64,
    epoch: u64,
    trust_domain: String,
    longest_leaf: SignedDuration,
    authorities: Vec<WireAuthority>,
    #[serde(default)]
    denied: Vec<Denied>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireAuthority {
    id: String,
    kind: Kind,
    certificate: CaCertificate,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<SecretKey>,
    #[serde(default)]
    cross_certificates: Vec<CaCertificate>,
    phase: Phase,
    prepared_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    published_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    activated_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    drain_until: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retired_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tainted: Option<Timestamp>,
    intermediates: Vec<WireIntermediate>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireIntermediate {
    id: String,
    certificate: CaCertificate,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    above: Vec<CaCertificate>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<SecretKey>,
    state: IntermediateState,
}

impl Wire {
    fn of(journal: &Journal) -> Self {
        Self {
            format: FORMAT,
            generation: journal.generation,
            epoch: journal.epoch,
            trust_domain: journal.trust_domain.to_string(),
            longest_leaf: SignedDuration::try_from(journal.longest_leaf)
                .unwrap_or(SignedDuration::MAX),
            authorities: journal.authorities.iter().map(WireAuthority::of).collect(),
            denied: journal.denied.clone(),
        }
    }

    fn into_journal(self) -> Result<Journal, JournalError> {
        let authorities = self.authorities.into_iter();
        Ok(Journal {
            generation: self.generation,
            epoch: self.epoch,
            trust_domain: self
                .trust_domain
                .parse()
                .map_err(|_| JournalError::TrustDomain)?,
            longest_leaf: Duration::try_from(self.longest_leaf)
                .map_err(|_| JournalError::NegativeLife)?,
            authorities: authorities
                .map(WireAuthority::into_authority)
                .collect::<Result<_, _>>()?,
            denied: self.denied,
        })
    }
}

impl WireAuthority {
    fn of(authority: &RootAuthority) -> Self {
        let authority = authority.clone();
        Self {
            id: authority.id().to_string(),
            kind: authority.kind,
            certificate: authority.certificate,
            key: authority.key,
            cross_certificates: authority.cross_certificates,
            phase: authority.phase,
            prepared_at: authority.prepared_at,
            published_at: authority.published_at,
            activated_at: authority.activated_at,
            drain_until: authority.drain_until,
            retired_at: authority.retired_at,
            tainted: authority.tainted,
            intermediates: authority
                .intermediates
                .into_iter()
                .map(|intermediate| WireIntermediate {
                    id: intermediate.certificate.id().to_string(),
                    certificate: intermediate.certificate,
                    above: intermediate.above,
                    key: intermediate.key,
                    state: intermediate.state,
                })
                .collect(),
        }
    }

    fn into_authority(self) -> Result<RootAuthority, JournalError> {
        let intermediates = self.intermediates.into_iter();
        Ok(RootAuthority {
            kind: self.kind,
            certificate: filed(self.id, self.certificate)?,
            key: self.key,
            cross_certificates: self.cross_certificates,
            phase: self.phase,
            prepared_at: self.prepared_at,
            published_at: self.published_at,
            activated_at: self.activated_at,
            drain_until: self.drain_until,
            retired_at: self.retired_at,
            tainted: self.tainted,
            intermediates: intermediates
                .map(|intermediate| {
                    Ok(Intermediate {
                        certificate: filed(intermediate.id, intermediate.certificate)?,
                        above: intermediate.above,
                        key: intermediate.key,
                        state: intermediate.state,
                    })
                })
                .collect::<Result<_, JournalError>>()?,
        })
    }
}

fn filed(id: String, certificate: CaCertificate) -> Result<CaCertificate, JournalError> {
    if certificate.id().to_string() == id {
        Ok(certificate)
    } else {
        Err(JournalError::WrongId {
            filed: shown(&id).to_owned(),
            found: certificate.id().clone(),
        })
    }
}

#[cfg(test)]
mod tests;
