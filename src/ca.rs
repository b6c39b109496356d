//! The certificate authority as values: what is asked, who asks, what is issued, and when its own keys change.
//!
//! CSR -> [`csr::Csr`]; with the caller's identity -> [`Authority::issue`] -> [`Issued`];
//! journal + instant -> [`rotation`] -> next journal
//!
//! The identity of a certificate comes from the authenticated caller, its lifetime from our settings, its key from the
//! CSR. Nothing else enters.

pub mod bundle;
pub mod certificate;
pub mod csr;
mod der;
pub mod journal;
pub mod key;
pub mod peer;
pub mod pem;
pub mod plugged;
pub mod profile;
pub mod rotation;
pub mod svid;

use std::{fmt, sync::Arc, time::Duration};

use aws_lc_rs::digest;
use jiff::Timestamp;
use rcgen::Issuer;
use zeroize::Zeroizing;

use crate::{
    ca::{
        bundle::Bundle,
        csr::PublicKey,
        journal::{IntermediateState, Journal, Phase},
        key::{SecretKey, Signer},
        peer::Side,
        profile::{LEAF_BACKDATE, Profile},
        rotation::{CLOCK_TOLERANCE, back, on, whole_seconds},
    },
    identity::TrustDomain,
};

/// The active issuer, built once from a journal and shared by all requests.
#[derive(Clone)]
pub struct Authority {
    kept: Arc<Kept>,
    /// Until when it may sign without the journal having been read again; none where nobody minds.
    fresh_until: Option<Timestamp>,
}

/// What stays the same for as long as the journal does.
struct Kept {
    trust_domain: TrustDomain,
    generation: u64,
    bundle: Bundle,
    root_id: KeyId,
    issuer_id: KeyId,
    issuer: Issuer<'static, Signer>,
    issuer_key: PublicKey,
    /// The intermediate, what is above it, then cross-certificates; never a root.
    above_leaf: Vec<Vec<u8>>,
    /// The span in which every certificate above a leaf is valid.
    bounds: Validity,
    /// The newest instant in the journal.
    newest: Timestamp,
    /// Serial numbers of leaves that must not be renewed with themselves.
    denied: Vec<String>,
    shortest_life: Duration,
    longest_life: Duration,
    shortest_rest: Duration,
}

impl Authority {
    /// The authority that a journal holds.
    ///
    /// # Errors
    /// Keys that cannot be used: a journal that was read through [`Journal::from_json`] has none.
    pub fn from_journal(journal: &Journal, leaf: &LeafPolicy) -> Result<Self, AuthorityError> {
        let root = journal.active();
        let signing = root.intermediate(IntermediateState::Active);
        let Some((active, key)) = signing.and_then(|i| Some((i, i.key.as_ref()?))) else {
            return Err(AuthorityError::SignFailed(
                "the journal holds no key to sign with".to_owned(),
            ));
        };
        // A verifier that only knows an older root gets to the new one through the certificate the old one gave it.
        let trusted_elsewhere = |id: &KeyId| {
            let authorities = journal.authorities().iter();
            authorities
                .filter(|other| other.phase.is_trusted() && other.phase != Phase::Active)
                .any(|other| other.id() == id)
        };
        let crossed = root
            .cross_certificates
            .iter()
            .filter(|cross| cross.issuer_id().is_some_and(trusted_elsewhere));
        let above_leaf: Vec<_> = std::iter::once(&active.certificate)
            .chain(&active.above)
            .chain(crossed)
            .collect();
        let bounds = above_leaf
            .iter()
            .fold(root.certificate.validity(), |bounds, certificate| {
                bounds.inside(certificate.validity())
            });
        Ok(Self {
            fresh_until: None,
            kept: Arc::new(Kept {
                trust_domain: journal.trust_domain().clone(),
                generation: journal.generation(),
                bundle: journal.bundle(),
                root_id: root.id().clone(),
                issuer_id: active.certificate.id().clone(),
                issuer: profile::issuer(&active.certificate, key)?,
                issuer_key: key.public_key(),
                above_leaf: above_leaf.iter().map(|c| c.der().to_owned()).collect(),
                bounds,
                newest: journal.newest(),
                denied: journal.denied().iter().map(|d| d.serial.clone()).collect(),
                shortest_life: leaf.min,
                longest_life: journal.longest_leaf(),
                shortest_rest: leaf.min.max(SHORTEST_REST),
            }),
        })
    }

    /// The same authority, which stops signing after `until` unless a later one replaces it.
    pub fn fresh_until(&self, until: Timestamp) -> Self {
        Self {
            kept: self.kept.clone(),
            fresh_until: Some(until),
        }
    }

    /// The trust set.
    pub fn bundle(&self) -> &Bundle {
        &self.kept.bundle
    }

    /// Counts the changes of the trust set.
    pub fn generation(&self) -> u64 {
        self.kept.generation
    }

    /// The trust domain of everything that is issued here.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.kept.trust_domain
    }

    /// Whether a leaf must not be renewed with itself.
    pub fn denies(&self, serial: &Serial) -> bool {
        let serial = serial.to_string();
        self.kept.denied.contains(&serial)
    }

    /// Subject key id of the root that signs intermediates.
    pub fn root_key_id(&self) -> &KeyId {
        &self.kept.root_id
    }

    /// Subject key id of the certificate that signs leaves.
    pub fn issuer_key_id(&self) -> &KeyId {
        &self.kept.issuer_id
    }

    /// The span in which everything above a leaf is valid; no leaf goes beyond it.
    pub fn issuer_validity(&self) -> Validity {
        self.kept.bounds
    }

    /// Signs a public key with the profile's names and usages, for `life` from `now` on (within the bounds of the
    /// settings), but never beyond a certificate of its chain.
    ///
    /// # Errors
    /// [`AuthorityError::IssuerExpiring`] where the issuer's rest is too short to be useful: a certificate for one second
    /// would only hide the fault. The others as their texts say.
    pub fn issue(
        &self,
        public_key: &PublicKey,
        profile: &Profile,
        life: Duration,
        serial: Serial,
        now: Timestamp,
    ) -> Result<Issued, AuthorityError> {
        let kept = &*self.kept;
        self.may_sign(now)?;
        if let Some(id) = profile.id()
            && *id.trust_domain() != kept.trust_domain
        {
            return Err(AuthorityError::SignFailed(format!(
                "{id} is of another trust domain than {}",
                kept.trust_domain
            )));
        }
        let validity = Validity {
            not_before: back(now, LEAF_BACKDATE),
            not_after: on(now, life.max(kept.shortest_life).min(kept.longest_life)),
        }
        .inside(kept.bounds)
        .in_whole_seconds();
        let leaf = profile::leaf(&kept.issuer, public_key, profile, validity, serial)?;
        let chain = std::iter::once(leaf).chain(kept.above_leaf.iter().cloned());
        Ok(Issued {
            chain: chain.collect(),
            serial,
            validity,
        })
    }

    /// Signs a leaf for a key of ours and verifies it as peers will, on both sides of a connection. Nothing is published
    /// before that.
    ///
    /// # Errors
    /// What a peer would object to. An issuer that is about to end is no objection: its trust set is still right.
    pub fn rehearse(&self, now: Timestamp) -> Result<(), AuthorityError> {
        let profile = Profile::Workload(
            crate::identity::SpiffeId::new(&self.kept.trust_domain, "malha-system", "rehearsal")
                .map_err(|error| AuthorityError::SignFailed(error.to_string()))?,
        );
        let life = self.kept.shortest_rest;
        let serial = Serial::random([1; 16]);
        match self.issue(&self.kept.issuer_key, &profile, life, serial, now) {
            Ok(issued) => [Side::Server, Side::Client]
                .into_iter()
                .try_for_each(|side| {
                    peer::verify(&issued.chain, &self.kept.bundle, side, now)
                        .map_err(|error| AuthorityError::SignFailed(error.to_string()))
                }),
            Err(AuthorityError::SignFailed(fault)) => Err(AuthorityError::SignFailed(fault)),
            Err(_) => Ok(()),
        }
    }

    /// Whether both trust the same roots and show the same certificates above a leaf.
    pub fn says_the_same(&self, other: &Self) -> bool {
        self.kept.generation == other.kept.generation
            && self.kept.bundle == other.kept.bundle
            && self.kept.above_leaf == other.kept.above_leaf
    }

    fn may_sign(&self, now: Timestamp) -> Result<(), AuthorityError> {
        let kept = &*self.kept;
        let newest = kept.newest.max(kept.bounds.not_before);
        if on(now, CLOCK_TOLERANCE) < newest {
            return Err(AuthorityError::ClockJump { now, newest });
        }
        if let Some(until) = self.fresh_until
            && now > until
        {
            return Err(AuthorityError::JournalStale(until));
        }
        if self.has_ended(now) {
            return Err(AuthorityError::IssuerExpiring(kept.bounds.not_after));
        }
        Ok(())
    }

    /// Whether the issuer's rest is too short for any leaf.
    pub(crate) fn has_ended(&self, now: Timestamp) -> bool {
        on(now, self.kept.shortest_rest) > self.kept.bounds.not_after
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("generation", &self.kept.generation)
            .field("root", &self.kept.root_id)
            .field("issuer", &self.kept.issuer_id)
            .field("bounds", &self.kept.bounds)
            .finish_non_exhaustive()
    }
}

/// What an issuer must have left of its life, unless even the shortest leaf lives longer.
const SHORTEST_REST: Duration = Duration::from_secs(5 * 60);

/// A span in which a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Not before.
    pub not_before: Timestamp,
    /// Not after.
    pub not_after: Timestamp,
}

impl Validity {
    /// How long it is.
    pub fn life(&self) -> Duration {
        let span = self.not_after.duration_since(self.not_before);
        Duration::try_from(span).unwrap_or(Duration::ZERO)
    }

    /// The instant when half of it has passed.
    pub fn half(&self) -> Timestamp {
        on(self.not_before, self.life() / 2)
    }

    /// Whether an instant lies in it.
    pub fn contains(&self, instant: Timestamp) -> bool {
        (self.not_before..=self.not_after).contains(&instant)
    }

    /// What lies in both.
    fn inside(self, other: Self) -> Self {
        Self {
            not_before: self.not_before.max(other.not_before),
            not_after: self.not_after.min(other.not_after),
        }
    }

    /// As a certificate will say it.
    fn in_whole_seconds(self) -> Self {
        Self {
            not_before: whole_seconds(self.not_before),
            not_after: whole_seconds(self.not_after),
        }
    }
}

/// A certificate and what its receiver needs with it.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, then intermediate, then cross-certificates while they serve; each DER. Never the root.
    pub chain: Vec<Vec<u8>>,
    /// The serial number.
    pub serial: Serial,
    /// When it is valid.
    pub validity: Validity,
}

/// A certificate chain together with its private key: what a TLS listener of ours serves.
pub struct KeyedChain {
    /// Leaf first; each DER.
    pub chain: Vec<Vec<u8>>,
    /// PKCS#8 DER; wiped when dropped.
    pub key: Zeroizing<Vec<u8>>,
    /// When the leaf is valid.
    pub validity: Validity,
}

impl KeyedChain {
    /// A chain for a key of ours.
    pub fn new(issued: Issued, key: &SecretKey) -> Self {
        Self {
            chain: issued.chain,
            key: Zeroizing::new(key.pkcs8().to_owned()),
            validity: issued.validity,
        }
    }
}

impl fmt::Debug for KeyedChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyedChain")
            .field("validity", &self.validity)
            .finish_non_exhaustive()
    }
}

/// Bounds on a leaf's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafPolicy {
    /// Granted when nothing is asked for: 24 h. Half of it is what the mesh lives without a control plane.
    pub default: Duration,
    /// The shortest: 5 min.
    pub min: Duration,
    /// The longest: 7 d.
    pub max: Duration,
}

impl Default for LeafPolicy {
    fn default() -> Self {
        Self {
            default: Duration::from_secs(24 * 60 * 60),
            min: Duration::from_secs(5 * 60),
            max: Duration::from_secs(7 * 24 * 60 * 60),
        }
    }
}

/// A certificate's serial number: 16 bytes, positive, never zero (RFC 5280 4.1.2.2). The dice are the caller's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial([u8; 16]);

impl Serial {
    /// All random, but for the sign bit.
    pub fn random(mut dice: [u8; 16]) -> Self {
        dice[0] &= 0x7f;
        if dice == [0; 16] {
            dice[15] = 1;
        }
        Self(dice)
    }

    /// A workload's: 4 bytes for the hour in which its holder last showed a token, 12 random. Renewals carry the hour on,
    /// so that how long somebody has renewed without a token is known without keeping a state for it.
    pub fn for_workload(token_proof: Timestamp, dice: [u8; 12]) -> Self {
        let hours = (token_proof.as_second() - YEAR_2020).div_euclid(3600);
        let hours = u32::try_from(hours.clamp(0, i64::from(HOURS))).unwrap_or(0);
        let mut serial = [0; 16];
        serial[..4].copy_from_slice(&(WORKLOAD | hours).to_be_bytes());
        serial[4..].copy_from_slice(&dice);
        Self(serial)
    }

    /// One that was read from a certificate; `None` where it is not of this form.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// When the holder of a workload's leaf last showed a token, to the hour.
    pub fn token_proof(&self) -> Option<Timestamp> {
        let [a, b, c, d, ..] = self.0;
        let word = u32::from_be_bytes([a, b, c, d]);
        let hours = i64::from(word & HOURS);
        (word & !HOURS == WORKLOAD)
            .then(|| Timestamp::from_second(YEAR_2020 + hours * 3600).ok())
            .flatten()
    }

    /// Big-endian.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

const WORKLOAD: u32 = 0x4000_0000;
/// The lower 30 bits: 122,000 years of hours.
const HOURS: u32 = 0x3fff_ffff;
/// 2020-01-01T00:00:00Z.
const YEAR_2020: i64 = 1_577_836_800;

/// Lower-case hex, all 32 digits.
impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

/// A subject key id (RFC 5280 4.2.1.2); prints as lower-case hex.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(Vec<u8>);

impl KeyId {
    /// The id that we give to a key: the first 160 bits of SHA-256 over its SubjectPublicKeyInfo (RFC 7093 2, 4).
    pub fn of_spki(spki: &[u8]) -> Self {
        let digest = digest::digest(&digest::SHA256, spki);
        Self(digest.as_ref().iter().copied().take(20).collect())
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

fn hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Why nothing can be signed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AuthorityError {
    /// What is left of the issuer's life is shorter than the shortest leaf.
    #[error(
        "the issuing certificate ends at {0}, too soon for the shortest leaf; nothing is signed until it is replaced, try again"
    )]
    IssuerExpiring(Timestamp),
    /// The clock is behind what the journal has seen.
    #[error(
        "this clock says {now}, but the CA journal was written at {newest}; nothing is signed until they agree"
    )]
    ClockJump {
        /// Our clock.
        now: Timestamp,
        /// The newest time in the journal.
        newest: Timestamp,
    },
    /// The journal could not be read for too long: another replica may have retired this authority.
    #[error(
        "the CA journal could not be read again until {0}; nothing is signed with what is remembered"
    )]
    JournalStale(Timestamp),
    /// A fault of ours.
    #[error("cannot sign: {0}")]
    SignFailed(String),
}

impl AuthorityError {
    /// The stable code: `IssuerExpiring`, `ClockJump`, `JournalStale` or `SignFailed`. All but the last may pass when
    /// the caller tries again.
    pub fn code(&self) -> &'static str {
        match self {
            Self::IssuerExpiring(_) => "IssuerExpiring",
            Self::ClockJump { .. } => "ClockJump",
            Self::JournalStale(_) => "JournalStale",
            Self::SignFailed(_) => "SignFailed",
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
