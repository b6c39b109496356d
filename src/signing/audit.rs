//! Who got which certificate: one record for each issuance and each refusal, chained by hashes.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use aws_lc_rs::rand;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Granted, Outcome, Refusal, sha256};
use crate::{
    ca::{Issued, KeyId},
    caller::{BoundObject, Caller},
};

/// Writes the records of one process, each as one JSON text on the tracing target `audit`. Its first field says so too:
/// `jq 'select(.target=="audit")'` picks the records out of a log.
///
/// Each record holds the hash of the one before it, so a line that was taken out, put in or changed shows
/// ([`verify_chain`]). The first of a process points to nothing; its random `run` tells its chain from those of other
/// processes, and from the one that it was before a restart.
pub struct Audit {
    replica: String,
    run: String,
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

/// The tracing target, and the first field of each record.
const TARGET: &str = "audit";

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
    /// A chain of its own. `replica` is for the reader: a pod's name, say.
    pub fn new(replica: String) -> Self {
        let mut run = [0; 8];
        // without randomness nothing is signed either, and what is refused may share a chain's name
        let _ = rand::fill(&mut run);
        Self {
            replica,
            run: hex(&run),
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
            target: TARGET,
            time: now.to_string(),
            replica: &self.replica,
            run: &self.run,
            peer: peer.map(|peer| peer.to_string()),
            csr_sha256: csr.map(|hash| hex(hash)),
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
        tracing::info!(target: TARGET, "{line}");
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
    target: &'static str,
    time: String,
    replica: &'a str,
    run: &'a str,
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
    node_proxy: Option<String>,
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
        self.node_proxy = caller.node_proxy.as_ref().map(ToString::to_string);
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
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
        run: String,
        sequence: u64,
        previous: String,
    }
    let mut last: HashMap<(String, String), (u64, String)> = HashMap::new();
    let mut count = 0;
    for (at, line) in lines.into_iter().enumerate() {
        let at = at + 1;
        let Link {
            replica,
            run,
            sequence,
            previous,
        } = serde_json::from_str(line).map_err(|_| AuditError::NotARecord(at))?;
        let next = (sequence + 1, hex(&sha256(line)));
        match last.insert((replica.clone(), run), next) {
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

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, PoisonError},
    };

    use super::*;
    use crate::caller::CallerError;

    /// What was logged while `work` ran.
    fn logged(work: impl FnOnce()) -> Vec<String> {
        #[derive(Clone, Default)]
        struct Buffer(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Buffer {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .without_time()
            .with_level(false)
            .with_target(false)
            .with_ansi(false)
            .finish();
        // tracing asks the thread that first meets a callsite; without a subscriber there it would be off for all threads
        static LISTENING: std::sync::Once = std::sync::Once::new();
        LISTENING.call_once(|| {
            let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry());
        });
        tracing::subscriber::with_default(subscriber, work);
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes)
            .unwrap()
            .lines()
            .map(|line| line.trim().to_owned())
            .collect()
    }

    fn refusals(replica: &str, count: usize) -> Vec<String> {
        let audit = Audit::new(replica.to_owned());
        let now = "2026-11-22T10:00:00Z".parse().unwrap();
        let peer = "10.0.0.7:4711".parse().ok();
        logged(|| {
            for at in 0..count {
                let fault = CallerError::TokenInvalid(format!("\"\n{{ {at}"));
                audit.record(
                    now,
                    peer,
                    None,
                    None,
                    &Act::Refused(&Refusal::Caller(fault)),
                );
            }
        })
    }

    fn verify(lines: &[String]) -> Result<usize, AuditError> {
        verify_chain(lines.iter().map(String::as_str))
    }

    #[test]
    fn a_refusal_is_one_line_whatever_the_stranger_wrote() {
        let lines = refusals("malha-0", 1);
        let (before, after) = lines[0].split_once("\"run\":\"").unwrap();
        let without_run = format!("{before}{}", &after[18..]);
        assert_eq!(
            [without_run],
            [
                r#"{"target":"audit","time":"2026-11-22T10:00:00Z","replica":"malha-0","sequence":0,"result":"denied","code":"TokenInvalid","detail":"the token is not acceptable: \"\n{ 0","peer":"10.0.0.7:4711","previous":""}"#
            ]
        );
    }

    #[test]
    fn a_chain_shows_what_was_taken_out_put_in_or_changed() {
        let lines = refusals("malha-0", 5);
        assert_eq!(verify(&lines), Ok(5));
        assert_eq!(verify(&lines[2..]), Ok(3), "the oldest were rotated away");

        let broken = |line, sequence| {
            Err(AuditError::Broken {
                line,
                replica: "malha-0".into(),
                sequence,
            })
        };
        let mut removed = lines.clone();
        removed.remove(2);
        assert_eq!(verify(&removed), broken(3, 3));
        let mut changed = lines.clone();
        changed[2] = changed[2].replace("denied", "issued");
        assert_eq!(verify(&changed), broken(4, 3));
        let mut swapped = lines.clone();
        swapped.swap(1, 2);
        assert!(verify(&swapped).is_err());
        let mut doubled = lines.clone();
        doubled.insert(1, lines[0].clone());
        assert!(verify(&doubled).is_err());
        assert_eq!(
            verify(&["not json".to_owned()]),
            Err(AuditError::NotARecord(1))
        );
    }

    #[test]
    fn the_chains_of_two_replicas_may_be_mixed() {
        let mut lines = Vec::new();
        for (a, b) in refusals("malha-0", 3)
            .into_iter()
            .zip(refusals("malha-1", 3))
        {
            lines.extend([a, b]);
        }
        // and one of them was restarted
        lines.extend(refusals("malha-0", 3));
        assert_eq!(verify(&lines), Ok(9));
    }
}
