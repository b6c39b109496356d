//! Keeps the authority: loads its journal, rotates it, and publishes what may be signed with.
//!
//! journal's home -> [`Custody`] -> `Arc<Authority>` -> everyone who signs or serves

use std::sync::Arc;

use jiff::Timestamp;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    ca::{
        Authority, KeyedChain,
        journal::{HomeError, JournalHome},
        profile::Profile,
        rotation::{PolicyError, RotationPolicy},
    },
    clock::Clock,
    identity::TrustDomain,
};

/// The owner of one journal in one process.
pub struct Custody<H> {
    home: H,
}

impl<H: JournalHome> Custody<H> {
    /// Loads the journal, or makes the first one; replaces an expired intermediate before the first issuance.
    pub async fn open(
        _home: H,
        _policy: RotationPolicy,
        _trust_domain: TrustDomain,
        _clock: Clock,
    ) -> Result<Arc<Self>, CustodyError> {
        unimplemented!()
    }
    /// What signs now.
    pub fn authority(&self) -> Arc<Authority> {
        unimplemented!()
    }
    /// Every change of what signs or what is trusted.
    pub fn watch(&self) -> watch::Receiver<Arc<Authority>> {
        unimplemented!()
    }
    /// The journal's home.
    pub fn home(&self) -> &H {
        &self.home
    }
    /// Reads the home again and publishes what changed; keeps the last good where it cannot be read.
    pub async fn refresh(&self) -> Result<(), CustodyError> {
        unimplemented!()
    }
    /// Does what is due: load, step, save by compare-and-swap, read back, publish; at most 5 tries.
    pub async fn tick(&self) -> Result<Ticked, CustodyError> {
        unimplemented!()
    }
    /// The leader's tick and everyone's refresh, until `stop`.
    pub async fn keep(self: Arc<Self>, _leader: watch::Receiver<bool>, _stop: CancellationToken) {
        unimplemented!()
    }
    /// Puts the `malha_ca_*` gauges and counters of rotation into a registry.
    pub fn register(&self, _registry: &mut Registry) {
        unimplemented!()
    }
}

/// What a tick or a verb did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticked {
    /// What was written, in order; empty where nothing was due.
    pub done: Vec<Done>,
    /// When something is due again.
    pub next: Timestamp,
}

/// One written change.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Done {
    /// A new intermediate stands ready.
    IntermediatePrepared {
        /// Its key id.
        id: String,
    },
    /// It signs from now on; the old key is gone.
    IntermediateActivated {
        /// Its key id.
        id: String,
    },
    /// `longestLeaf` was raised.
    LongestLeafRaised,
}

/// What `malha ca rotate` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RotateRequest {
    /// Only the intermediate. Without it the whole schedule; by force, the root.
    pub intermediate: bool,
    /// Only what is due.
    pub if_due: bool,
    /// Say what would be done, write nothing.
    pub dry_run: bool,
}

/// One rotation by hand or by the cron job: the same step as the leader's tick, safe beside it.
pub async fn rotate<H: JournalHome>(
    _home: &H,
    _policy: &RotationPolicy,
    _request: RotateRequest,
    _clock: &Clock,
) -> Result<Ticked, CustodyError> {
    unimplemented!()
}

/// Keeps one serving certificate fresh: a new key each time, from the current authority; at start, on every change of
/// the authority, and at half of its life. Checked as its client would before it is handed out.
pub async fn keep_serving<H: JournalHome>(
    _custody: Arc<Custody<H>>,
    _profile: Profile,
    _clock: Clock,
    _out: watch::Sender<Option<Arc<KeyedChain>>>,
    _stop: CancellationToken,
) {
    unimplemented!()
}

/// Why the journal cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum CustodyError {
    /// The home refused or could not be reached.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// No journal, but traces of one.
    #[error(
        "the CA journal is gone, but traces of an earlier life are there; restore it from a backup: a new root would lock out every running pod"
    )]
    JournalLost,
    /// Lost every race for a write.
    #[error("another writer changed the CA journal {0} times in a row; try again")]
    LostRaces(u32),
    /// Not done, and trying again will not help.
    #[error("{0}")]
    Refused(String),
    /// The settings do not fit together.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}
