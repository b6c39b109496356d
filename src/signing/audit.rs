//! Who got which certificate: one record for each issuance and each refusal, chained by hashes.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Granted, Outcome, Refusal, sha256};
use crate::ca::{
    Issued, KeyId,
    caller::{BoundObject, Caller},
};

/// Writes the records of one process, each as one JSON text on the tracing target `audit`.
///
/// Each record holds the hash of the one before it, so a line that was taken out, put in or changed shows
/// ([`verify_chain`]). The first of a process points to nothing; the name of the process tells chains apart.
pub struct Audit {
    replica: String,
    /// Held while a record is written, so that the log has them in the order of their chain.
    chain: Mutex<Chain>,
    names: RandomState,
}

#[derive(Default)]
struct Chain {
    sequence: u64,
    previous: String,
    /// Whose key it was, as a hash, for the last [`KEYS`] keys: the same key under two identities is worth a look.
    keys: HashMap<KeyId, u64>,
}

/// At some 60 bytes each.
const KEYS: usize = 32_768;

/// What happened.
pub(super) enum Act<'a> {
    Issued {
        issued: &'a Issued,
        key: &'a KeyId,
        issuer: &'a KeyId,
    },
    Repeated(&'a Granted),
    Refused(&'a Refusal),
}

impl Audit {
    /// A chain of its own. `replica` must differ between any two processes, also between a process and the one it was
    /// before a restart (a pod's name and the time of its start will do).
    pub fn new(replica: String) -> Self {
        Self {
            replica,
            chain: Mutex::default(),
            names: RandomState::new(),
        }
    }

    pub(super) fn record(
        &self,
        now: Timestamp,
        peer: Option<SocketAddr>,
        caller: Option<&Caller>,
        csr: Option<&[u8; 32]>,
        act: &Act<'_>,
    ) {
        let mut record = Record {
            time: now.to_string(),
            replica: &self.replica,
            peer: peer.map(|peer| peer.to_string()),
            csr_sha256: csr.map(hex),
            ..Record::default()
        };
        record.called_by(caller);
        record.tell(act);
        let mut chain = self.chain.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Act::Issued { key, .. }, Some(caller)) = (act, caller) {
            record.key_of_another =
                chain.held_by_another(key, self.names.hash_one(&caller.identity));
        }
        record.sequence = chain.sequence;
        record.previous = &chain.previous;
        let line = serde_json::to_string(&record).expect("a record is texts and numbers");
        tracing::info!(target: "audit", "{line}");
        chain.previous = hex(&sha256(&line));
        chain.sequence += 1;
    }
}

impl Chain {
    fn held_by_another(&mut self, key: &KeyId, holder: u64) -> bool {
        if self.keys.len() >= KEYS {
            // forgetting all at once costs nothing until the next time, and what is lost is a hint
            self.keys.clear();
        }
        match self.keys.entry(key.clone()) {
            Entry::Occupied(mut known) => known.insert(holder) != holder,
            Entry::Vacant(unknown) => {
                unknown.insert(holder);
                false
            }
        }
    }
}

#[derive(Default, Serialize)]
struct Record<'a> {
    time: String,
    replica: &'a str,
    sequence: u64,
    result: &'static str,
    code: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_after: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    key_of_another: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    issuer_key_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<Named<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<Named<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    csr_sha256: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stale: bool,
    previous: &'a str,
}

#[derive(Serialize)]
struct Named<'a> {
    name: &'a str,
    uid: &'a str,
}

impl<'a> Named<'a> {
    fn of(object: &'a BoundObject) -> Self {
        Self {
            name: &object.name,
            uid: &object.uid,
        }
    }
}

impl<'a> Record<'a> {
    fn called_by(&mut self, caller: Option<&'a Caller>) {
        let Some(caller) = caller else { return };
        self.spiffe_id = Some(caller.identity.to_string());
        self.method = Some(caller.method.as_str());
        self.pod = caller.pod.as_ref().map(Named::of);
        self.node = caller.node.as_ref().map(Named::of);
        self.token_id = caller.token_id.as_deref();
        self.stale = caller.stale;
    }

    fn tell(&mut self, act: &Act<'_>) {
        match act {
            Act::Issued {
                issued,
                key,
                issuer,
            } => {
                (self.result, self.code) = (Outcome::Issued.as_str(), "New");
                self.serial = Some(issued.serial.to_string());
                self.not_after = Some(issued.validity.not_after.to_string());
                self.key_id = Some(key.to_string());
                self.issuer_key_id = Some(issuer.to_string());
            }
            Act::Repeated(granted) => {
                (self.result, self.code) = (Outcome::Issued.as_str(), "Repeated");
                self.serial = Some(granted.serial.to_string());
                self.not_after = Some(granted.not_after.to_string());
            }
            Act::Refused(refusal) => {
                (self.result, self.code) = (refusal.outcome().as_str(), refusal.code());
                // part of it may be a stranger's words
                self.detail = Some(refusal.to_string().chars().take(512).collect());
            }
        }
    }
}

fn hex(hash: &[u8; 32]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checks records (one JSON text a line, of any number of processes) against their hashes, and says how many there are.
/// Where the oldest lines were rotated away, the chain begins with the first that is left.
///
/// # Errors
/// The first line that is no record, or that does not follow the one before it.
pub fn verify_chain<'a>(lines: impl IntoIterator<Item = &'a str>) -> Result<usize, AuditError> {
    #[derive(Deserialize)]
    struct Link {
        replica: String,
        sequence: u64,
        previous: String,
    }
    let mut last: HashMap<String, (u64, String)> = HashMap::new();
    let mut count = 0;
    for (at, line) in lines.into_iter().enumerate() {
        let at = at + 1;
        let Link {
            replica,
            sequence,
            previous,
        } = serde_json::from_str(line).map_err(|_| AuditError::NotARecord(at))?;
        let next = (sequence + 1, hex(&sha256(line)));
        match last.insert(replica.clone(), next) {
            Some(expected) if expected != (sequence, previous) => {
                return Err(AuditError::Broken {
                    line: at,
                    replica,
                    sequence,
                });
            }
            Some(_) | None => count += 1,
        }
    }
    Ok(count)
}

/// Why records cannot be trusted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AuditError {
    /// Not a record.
    #[error("line {0} is not an audit record")]
    NotARecord(usize),
    /// Something was taken out, put in or changed before it.
    #[error(
        "line {line} (record {sequence} of {replica}) does not follow the record before it: lines are missing or were changed"
    )]
    Broken {
        /// Counted from 1.
        line: usize,
        /// Whose chain.
        replica: String,
        /// Which record of it.
        sequence: u64,
    },
}
