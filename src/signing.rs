//! Signs certificates for callers that prove who they are.
//!
//! token or client certificate -> [`Authenticate`] -> caller -> rate limits -> CSR -> [`Authority::issue`] -> chain,
//! bundle, audit record
//!
//! [`Signing`] is the service and knows no protocol; [`router`] speaks two for it, JSON over HTTP and gRPC. A request comes
//! in two steps, [`Signing::admit`] for the credential and [`Admitted::certify`] for the CSR, so that nothing of a body is
//! read before its sender is known.

mod answers;
mod audit;
mod gate;
mod grpc;
mod http;
mod metrics;
mod rates;
mod refusal;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use aws_lc_rs::{digest, rand};
use axum::{Router, extract::Request, response::Response};
use jiff::{SignedDuration, Timestamp};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, timeout},
};

use self::{
    answers::{Answer, Answers, Question},
    audit::Act,
    rates::Rates,
};
pub use self::{
    audit::{Audit, AuditError, verify_chain},
    gate::{Fault, Gate},
    metrics::Metrics,
    rates::Rate,
    refusal::{Outcome, Refusal},
};
use crate::{
    ca::{
        Authority, LeafPolicy, Serial,
        csr::{Csr, KeyPolicy},
        profile::Profile,
    },
    caller::{Authenticate, Caller, CallerError, Class, Denial, Shown},
    clock::Clock,
};

/// What one signer may hold and how fast one caller may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests under way at once; one more is answered `QueueFull`. A request whose caller has gone gives its place
    /// back at once, so that nobody waits behind the abandoned.
    pub entries: usize,
    /// How long a request may have been under way before it is no longer worth its signature: a client's own deadline
    /// is over by then, and its retry is on the way.
    pub patience: Duration,
    /// Bytes of a request's body. A CSR may have 16 KiB, and JSON escapes some of them.
    pub body: usize,
    /// For each pod.
    pub per_pod: Rate,
    /// For each node's proxy, which asks for all pods of its node.
    pub per_node: Rate,
    /// For each service account; its replicas share it.
    pub per_account: Rate,
    /// Pods, and service accounts, whose rates are remembered at once.
    pub rates: usize,
    /// Answers remembered for repeated requests, at about 1 KiB each.
    pub answers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 4096,
            patience: Duration::from_secs(10),
            body: 64 * 1024,
            per_pod: Rate {
                per_second: 1,
                burst: 10,
            },
            per_node: Rate {
                per_second: 10,
                burst: 250,
            },
            per_account: Rate {
                per_second: 200,
                burst: 1000,
            },
            rates: 65_536,
            answers: 32_768,
        }
    }
}

/// The signing service.
pub struct Signing<A> {
    authority: Box<dyn Fn() -> Arc<Authority> + Send + Sync>,
    authenticate: A,
    leaf: LeafPolicy,
    keys: KeyPolicy,
    limits: Limits,
    gate: Gate,
    clock: Clock,
    metrics: Metrics,
    audit: Audit,
    entries: Semaphore,
    rates: Rates,
    answers: Answers,
    cluster: String,
}

/// What is answered on the CA's port: JSON, gRPC, and for every other path what there is. Other services are merged into
/// it, if they bring no fallback of their own.
pub fn router<A: Authenticate>(signing: Arc<Signing<A>>) -> Router {
    http::routes(signing.clone())
        .merge(grpc::routes(signing))
        .fallback(unknown)
}

async fn unknown(request: Request) -> Response {
    match grpc::is_call(request.headers()) {
        true => grpc::unimplemented(request.uri().path()),
        false => http::not_found(request).await,
    }
}

/// What a caller shows.
#[derive(Clone, Debug)]
pub struct Credential<'a> {
    /// The bearer token, or why there is none.
    pub token: Result<&'a str, CallerError>,
    /// A leaf, DER, whose chain was verified at the handshake against what was trusted then.
    pub certificate: Option<&'a [u8]>,
    /// Where it is.
    pub peer: Option<SocketAddr>,
}

impl Credential<'_> {
    /// Of the token, or else of the certificate.
    fn hash(&self) -> [u8; 32] {
        match (&self.token, self.certificate) {
            (Ok(token), _) => sha256(token),
            (Err(_), leaf) => sha256(leaf.unwrap_or_default()),
        }
    }
}

/// A certificate and what its holder needs with it.
#[derive(Clone, Debug)]
pub struct Granted {
    /// Whose it is.
    pub caller: Caller,
    /// The serial number.
    pub serial: Serial,
    /// Leaf first, DER, without the root.
    pub chain: Vec<Vec<u8>>,
    /// PEM of all roots to trust.
    pub trust_bundle: String,
    /// Not before.
    pub not_before: Timestamp,
    /// Not after.
    pub not_after: Timestamp,
    /// When to ask for the next one.
    pub renew_at: Timestamp,
}

/// A CSR as it was sent.
#[derive(Clone, Copy, Debug)]
pub enum Encoded<'a> {
    /// One PEM block.
    Pem(&'a [u8]),
    /// DER.
    Der(&'a [u8]),
}

impl<A: Authenticate> Signing<A> {
    /// A service that signs with whatever authority is current at each request.
    pub fn new(
        authority: impl Fn() -> Arc<Authority> + Send + Sync + 'static,
        authenticate: A,
        leaf: LeafPolicy,
        limits: Limits,
        clock: Clock,
        metrics: Metrics,
    ) -> Self {
        Self {
            authority: Box::new(authority),
            authenticate,
            leaf,
            keys: KeyPolicy::default(),
            limits,
            gate: Gate::default(),
            audit: Audit::new(String::new()),
            clock,
            metrics,
            entries: Semaphore::new(limits.entries),
            rates: Rates::new(&limits),
            answers: Answers::new(limits.answers),
            cluster: String::new(),
        }
    }

    /// Accepts other kinds of keys than the default.
    #[must_use]
    pub fn with_keys(self, keys: KeyPolicy) -> Self {
        Self { keys, ..self }
    }

    /// Lets somebody else close the service (clock, shutdown).
    #[must_use]
    pub fn with_gate(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// Names this process in the audit records.
    #[must_use]
    pub fn with_audit(self, audit: Audit) -> Self {
        Self { audit, ..self }
    }

    /// Names the cluster, for callers that say of which one they are. By default they may say nothing.
    #[must_use]
    pub fn with_cluster(self, cluster: String) -> Self {
        Self { cluster, ..self }
    }

    /// The trust set, PEM.
    pub fn trust_bundle(&self) -> String {
        (self.authority)().bundle().to_pem()
    }

    /// Decides who is calling and whether it may ask now.
    ///
    /// # Errors
    /// Every refusal was counted and audited when it is returned.
    pub async fn admit(&self, credential: Credential<'_>) -> Result<Admitted<'_, A>, Refusal> {
        let since = Instant::now();
        let now = self.clock.now();
        let peer = credential.peer;
        let refuse = |refusal| self.refuse(refusal, now, peer, None, None);
        if let Err(fault) = self.gate.check() {
            return Err(refuse(Refusal::Closed(fault)));
        }
        let Ok(permit) = self.entries.try_acquire() else {
            return Err(refuse(Refusal::QueueFull));
        };
        let entry = Entry {
            _permit: permit,
            _counted: self.metrics.enter(),
        };
        let identified = self.identify(&credential, now).await;
        let caller = identified.map_err(|error| refuse(Refusal::Caller(error)))?;
        let admitted = Admitted {
            signing: self,
            caller,
            credential: credential.hash(),
            entry,
            since,
            peer,
        };
        let for_others = self.authenticate.is_node_proxy(&admitted.caller);
        match self.rates.take(&admitted.caller, for_others, since) {
            Ok(()) => Ok(admitted),
            Err(limited) => Err(admitted.refuse(limited)),
        }
    }

    /// By the certificate where it can be used. A token beside it must be of the same holder.
    async fn identify(
        &self,
        credential: &Credential<'_>,
        now: Timestamp,
    ) -> Result<Caller, CallerError> {
        let shown = credential.certificate;
        let shown = shown.map(|leaf| self.by_certificate(leaf, credential.peer, now));
        let identified = match (shown, &credential.token) {
            (Some(shown), Err(CallerError::NoCredential)) => shown,
            (_, Err(error)) => return Err(error.clone()),
            (None | Some(Err(_)), Ok(token)) => self.by_token(token, now).await,
            (Some(Ok(shown)), Ok(token)) => both(shown, self.by_token(token, now).await),
        };
        let (method, result) = match &identified {
            Ok(caller) => (caller.method, "ok"),
            Err(Denial { method, error }) => match error.class() {
                Class::Unauthenticated => (*method, "denied"),
                Class::Unavailable => (*method, "error"),
            },
        };
        self.metrics.token(method, result);
        identified.map_err(|denial| denial.error)
    }

    /// Whoever shows a leaf of ours may renew it, within bounds.
    fn by_certificate(
        &self,
        leaf: &[u8],
        peer: Option<SocketAddr>,
        now: Timestamp,
    ) -> Result<Caller, Denial> {
        let authority = (self.authority)();
        let denied = |serial: &Serial| authority.denies(serial);
        let shown = Shown::read(leaf, authority.trust_domain(), denied, now);
        let address = peer.map(|peer| peer.ip());
        let renewed = shown.and_then(|shown| self.authenticate.renew(shown, address, now));
        renewed.map_err(Denial::of_certificate)
    }

    /// Whoever is asked about a token may hang; a place in the queue is not for ever.
    async fn by_token(&self, token: &str, now: Timestamp) -> Result<Caller, Denial> {
        let identified = self.authenticate.authenticate(token, now);
        match timeout(self.limits.patience, identified).await {
            Ok(identified) => identified,
            Err(_) => Err(Denial::by_review(CallerError::VerifierUnavailable(
                "the API server did not answer in time".to_owned(),
            ))),
        }
    }

    fn refuse(
        &self,
        refusal: Refusal,
        now: Timestamp,
        peer: Option<SocketAddr>,
        caller: Option<&Caller>,
        csr: Option<&[u8; 32]>,
    ) -> Refusal {
        self.metrics.csr(refusal.outcome().as_str(), refusal.code());
        self.audit
            .record(now, peer, caller, csr, &Act::Refused(&refusal));
        refusal
    }
}

/// A caller that may ask, holding its place in the queue until this is dropped.
pub struct Admitted<'a, A> {
    signing: &'a Signing<A>,
    caller: Caller,
    /// Hash of what it showed.
    credential: [u8; 32],
    #[expect(dead_code, reason = "a place in the queue, given back by its drop")]
    entry: Entry<'a>,
    since: Instant,
    peer: Option<SocketAddr>,
}

struct Entry<'a> {
    _permit: SemaphorePermit<'a>,
    _counted: metrics::Entered,
}

impl<A: Authenticate> Admitted<'_, A> {
    /// Who it is.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Refuses what came after the credential.
    pub fn refuse(&self, refusal: Refusal) -> Refusal {
        let now = self.signing.clock.now();
        self.signing
            .refuse(refusal, now, self.peer, Some(&self.caller), None)
    }

    /// Signs, or hands out again what was signed for this very request within the last minute.
    ///
    /// # Errors
    /// Every refusal was counted and audited when it is returned.
    pub fn certify(
        &self,
        encoded: Encoded<'_>,
        asked: Option<Duration>,
    ) -> Result<Granted, Refusal> {
        self.certify_as(&self.caller, encoded, asked)
    }

    /// The same in the name of a pod that the caller, its node's proxy, may ask for.
    ///
    /// # Errors
    /// As above, and [`Refusal::Impersonation`].
    pub fn certify_for(
        &self,
        target: &str,
        encoded: Encoded<'_>,
        asked: Option<Duration>,
    ) -> Result<Granted, Refusal> {
        let now = self.signing.clock.now();
        let authenticate = &self.signing.authenticate;
        let target = authenticate.impersonate(&self.caller, target, now);
        let caller = Caller {
            identity: target.map_err(|refused| self.refuse(refused.into()))?,
            node_proxy: Some(self.caller.identity.clone()),
            ..self.caller.clone()
        };
        self.certify_as(&caller, encoded, asked)
    }

    fn certify_as(
        &self,
        caller: &Caller,
        encoded: Encoded<'_>,
        asked: Option<Duration>,
    ) -> Result<Granted, Refusal> {
        let signing = self.signing;
        let now = signing.clock.now();
        let csr = sha256(encoded.bytes());
        let refuse = |refusal| signing.refuse(refusal, now, self.peer, Some(caller), Some(&csr));
        let asked = signing.life(asked).map_err(refuse)?;
        if self.since.elapsed() > signing.limits.patience {
            return Err(refuse(Refusal::QueueFull));
        }
        if let Err(fault) = signing.gate.check() {
            return Err(refuse(Refusal::Closed(fault)));
        }
        let authority = (signing.authority)();
        let question = Question::new(&self.credential, &caller.identity, &csr, asked);
        let _only_one = signing.answers.hold(&question);
        if let Some(answer) = signing.answers.find(&question, &authority, self.since) {
            let granted = grant(caller, &authority, answer);
            signing.metrics.csr(Outcome::Issued.as_str(), "Repeated");
            signing.audit.record(
                now,
                self.peer,
                Some(caller),
                Some(&csr),
                &Act::Repeated(&granted),
            );
            return Ok(granted);
        }
        let answer = self
            .issue(caller, encoded, asked, &authority, &csr, now)
            .map_err(refuse)?;
        signing.answers.keep(question, &answer, self.since);
        signing.metrics.issued("New", self.since.elapsed());
        Ok(grant(caller, &authority, answer))
    }

    /// The chain is not verified again before it goes out. The authority was, once, when it was published, with a leaf
    /// of its own; each leaf differs from that one by values that are set here and not parsed from anywhere, and a
    /// signature that is made and not checked costs a quarter of one that is. What is left is to check the CSR and to
    /// sign, which is all the work that nobody could leave out.
    fn issue(
        &self,
        caller: &Caller,
        encoded: Encoded<'_>,
        asked: Duration,
        authority: &Authority,
        csr_hash: &[u8; 32],
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let signing = self.signing;
        let csr = match encoded {
            Encoded::Pem(text) => Csr::parse_pem(text, signing.keys),
            Encoded::Der(der) => Csr::parse_der(der, signing.keys),
        }
        .map_err(Refusal::Csr)?;
        if csr.asks_beyond(&caller.identity) {
            signing.metrics.surplus();
        }
        let dice = Dice::throw()?;
        let issued = authority
            .issue(
                &csr.public_key,
                &Profile::Workload(caller.identity.clone()),
                granted_life(asked, signing.leaf.min, dice.life),
                Serial::for_workload(caller.proved.unwrap_or(now), dice.serial),
                now,
            )
            .map_err(Refusal::Authority)?;
        let renew_at = renew_at(now, issued.validity.not_after, dice.renewal);
        let key = csr.public_key.key_id();
        signing.audit.record(
            now,
            self.peer,
            Some(caller),
            Some(csr_hash),
            &Act::Issued {
                issued: &issued,
                key: &key,
                issuer: authority.issuer_key_id(),
            },
        );
        Ok(Answer::new(issued, authority, renew_at))
    }
}

impl<A> Signing<A> {
    fn life(&self, asked: Option<Duration>) -> Result<Duration, Refusal> {
        let LeafPolicy { default, min, max } = self.leaf;
        match asked {
            None => Ok(default),
            Some(asked) if (min..=max).contains(&asked) => Ok(asked),
            Some(_) => Err(Refusal::TtlOutOfRange { min, max }),
        }
    }
}

fn grant(caller: &Caller, authority: &Authority, answer: Answer) -> Granted {
    Granted {
        caller: caller.clone(),
        serial: answer.serial,
        trust_bundle: authority.bundle().to_pem(),
        not_before: answer.validity.not_before,
        not_after: answer.validity.not_after,
        renew_at: answer.renew_at,
        chain: answer.into_chain(),
    }
}

/// A token beside a certificate must be of the same holder. One that has only run out, or that nobody can check now, is as
/// good as none: it is for such times that certificates renew themselves.
fn both(shown: Caller, by_token: Result<Caller, Denial>) -> Result<Caller, Denial> {
    match by_token {
        Ok(caller) if caller.identity == shown.identity => Ok(caller),
        Ok(caller) => Err(CallerError::IdentityConflict(format!(
            "the certificate is of {}, the token of {}",
            shown.identity, caller.identity
        ))
        .into()),
        Err(Denial {
            error: CallerError::TokenExpired { .. } | CallerError::VerifierUnavailable(_),
            ..
        }) => Ok(shown),
        Err(denial) => Err(denial),
    }
}

impl<'a> Encoded<'a> {
    fn bytes(self) -> &'a [u8] {
        match self {
            Self::Pem(bytes) | Self::Der(bytes) => bytes,
        }
    }
}

/// The randomness of one certificate, thrown together.
struct Dice {
    serial: [u8; 12],
    life: f64,
    renewal: f64,
}

impl Dice {
    fn throw() -> Result<Self, Refusal> {
        let mut serial = [0; 12];
        let mut fractions = [[0; 4]; 2];
        rand::fill(&mut serial)
            .and_then(|()| rand::fill(fractions.as_flattened_mut()))
            .map_err(|_| Refusal::NoRandomness)?;
        let [life, renewal] =
            fractions.map(|bytes| f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX));
        Ok(Self {
            serial,
            life,
            renewal,
        })
    }
}

/// Between 90 and 100 % of what was asked, so that pods that started together do not renew together for ever; in whole
/// seconds, as certificates count.
fn granted_life(asked: Duration, min: Duration, dice: f64) -> Duration {
    let granted = asked.mul_f64(0.9 + 0.1 * dice);
    Duration::from_secs(granted.as_secs()).max(min)
}

/// Between 45 and 55 % of what is left: with 24 h leaves a dead control plane may stay dead for about 11 h before the
/// first leaf expires.
fn renew_at(now: Timestamp, not_after: Timestamp, dice: f64) -> Timestamp {
    let left = not_after.duration_since(now).max(SignedDuration::ZERO);
    let wait = SignedDuration::from_secs(left.mul_f64(0.45 + 0.1 * dice).as_secs());
    now.checked_add(wait).unwrap_or(not_after)
}

fn sha256(bytes: impl AsRef<[u8]>) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, bytes.as_ref()).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn two_replicas_give_no_serial_twice_within_one_hour() {
        let now = at("2026-11-22T10:00:00Z");
        let mut serials = HashSet::new();
        let replicas: Vec<_> = (0..2)
            .map(|_| {
                std::thread::spawn(move || -> Vec<Serial> {
                    let throw = |_| Serial::for_workload(now, Dice::throw().unwrap().serial);
                    (0..100_000).map(throw).collect()
                })
            })
            .collect();
        for replica in replicas {
            for serial in replica.join().unwrap() {
                assert!(serials.insert(*serial.as_bytes()), "{serial}");
                assert!(
                    (0x40..0x80).contains(&serial.as_bytes()[0]),
                    "{serial} is not positive"
                );
            }
        }
        assert_eq!(serials.len(), 200_000);
    }

    #[test]
    fn a_life_is_between_nine_tenths_and_all_of_what_was_asked() {
        let (hour, minute) = (Duration::from_secs(3600), Duration::from_secs(60));
        assert_eq!(granted_life(hour, minute, 0.0), Duration::from_secs(3240));
        assert_eq!(granted_life(hour, minute, 1.0), hour);
        assert_eq!(
            granted_life(minute, minute, 0.0),
            minute,
            "not below the shortest"
        );
    }

    #[test]
    fn renewal_is_due_around_half_of_what_is_left() {
        let (now, end) = (at("2026-11-22T10:00:00Z"), at("2026-11-23T10:00:00Z"));
        assert_eq!(renew_at(now, end, 0.0), at("2026-11-22T20:48:00Z"));
        assert_eq!(renew_at(now, end, 1.0), at("2026-11-22T23:12:00Z"));
        assert_eq!(renew_at(end, now, 1.0), end, "nothing is left: at once");
    }
}
