//! What was answered lately, so that a repeated request gets the same certificate and no second serial number.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aws_lc_rs::digest::{Context, SHA256};
use jiff::Timestamp;
use tokio::time::Instant;

use crate::{
    ca::{Authority, Issued, KeyId, Serial, Validity},
    identity::SpiffeId,
};

/// How long a request counts as a repetition: an agent whose answer was lost on the way tries again within seconds.
const MEMORY: Duration = Duration::from_secs(60);

/// A request as far as it decides the answer. Only a hash: a token that is kept is a token that can leak.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Question([u8; 32]);

impl Question {
    pub(super) fn new(
        credential: &[u8; 32],
        identity: &SpiffeId,
        csr: &[u8; 32],
        asked: Duration,
    ) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(credential);
        context.update(csr);
        context.update(&asked.as_secs().to_be_bytes());
        // last, because it alone has no fixed length
        context.update(identity.to_string().as_bytes());
        let mut hash = [0; 32];
        hash.copy_from_slice(context.finish().as_ref());
        Self(hash)
    }
}

/// What was issued.
#[derive(Clone)]
pub(super) struct Answer {
    pub(super) serial: Serial,
    pub(super) validity: Validity,
    pub(super) renew_at: Timestamp,
    leaf: Arc<[u8]>,
    issuers: Arc<Issuers>,
}

/// What all leaves of one authority have in common.
#[derive(PartialEq, Eq)]
struct Issuers {
    id: KeyId,
    generation: u64,
    /// The chain without the leaf.
    chain: Vec<Vec<u8>>,
}

impl Answer {
    pub(super) fn new(issued: Issued, authority: &Authority, renew_at: Timestamp) -> Self {
        let mut chain = issued.chain.into_iter();
        Self {
            serial: issued.serial,
            validity: issued.validity,
            renew_at,
            leaf: chain.next().unwrap_or_default().into(),
            issuers: Arc::new(Issuers {
                id: authority.issuer_key_id().clone(),
                generation: authority.generation(),
                chain: chain.collect(),
            }),
        }
    }

    pub(super) fn into_chain(self) -> Vec<Vec<u8>> {
        let issuers = self.issuers.chain.iter().cloned();
        std::iter::once(self.leaf.to_vec()).chain(issuers).collect()
    }

    /// A chain is repeated only while the same key would sign it and the same roots would be sent along.
    fn is_of(&self, authority: &Authority) -> bool {
        self.issuers.id == *authority.issuer_key_id()
            && self.issuers.generation == authority.generation()
    }
}

/// The answers of the last minute, or as many of them as there is room for.
pub(super) struct Answers {
    most: usize,
    kept: Mutex<Kept>,
    /// Two identical requests at once wait for each other here, so that the second finds the first one's answer.
    /// Holding one lock for all would let no two cores sign at once; by a byte of the hash, two different requests
    /// meet once in 64 times, and then for about 150 µs.
    stripes: [Mutex<()>; 64],
}

#[derive(Default)]
struct Kept {
    answers: HashMap<Question, (Instant, Answer)>,
    by_age: VecDeque<(Instant, Question)>,
    /// One allocation for all answers of an authority.
    issuers: Option<Arc<Issuers>>,
}

impl Answers {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            kept: Mutex::default(),
            stripes: std::array::from_fn(|_| Mutex::new(())),
        }
    }

    /// While this is held, nobody else answers this question.
    pub(super) fn hold(&self, question: &Question) -> Option<MutexGuard<'_, ()>> {
        let first = usize::from(*question.0.first()?);
        let stripe = self.stripes.get(first % self.stripes.len())?;
        Some(stripe.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn find(
        &self,
        question: &Question,
        authority: &Authority,
        now: Instant,
    ) -> Option<Answer> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let (then, answer) = kept.answers.get(question)?;
        let fresh = now.saturating_duration_since(*then) < MEMORY;
        (fresh && answer.is_of(authority)).then(|| answer.clone())
    }

    pub(super) fn keep(&self, question: Question, answer: &Answer, now: Instant) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = &mut *kept;
        kept.forget(now, self.most);
        let mut answer = answer.clone();
        match &kept.issuers {
            Some(issuers) if *issuers == answer.issuers => answer.issuers = Arc::clone(issuers),
            Some(_) | None => kept.issuers = Some(Arc::clone(&answer.issuers)),
        }
        kept.by_age.push_back((now, question.clone()));
        kept.answers.insert(question, (now, answer));
    }
}

impl Kept {
    fn forget(&mut self, now: Instant, most: usize) {
        while let Some((then, _)) = self.by_age.front() {
            let old = now.saturating_duration_since(*then) >= MEMORY;
            if !old && self.by_age.len() < most {
                return;
            }
            let Some((then, question)) = self.by_age.pop_front() else {
                return;
            };
            // answered anew since, by another authority: the younger answer stays
            if self
                .answers
                .get(&question)
                .is_some_and(|(kept, _)| *kept == then)
            {
                self.answers.remove(&question);
            }
        }
    }
}
