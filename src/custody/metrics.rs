//! What custody tells about certificates and rotation. Instants, not "seconds left": whoever asks knows the time.

use std::{sync::atomic::AtomicI64, time::Duration};

use jiff::Timestamp;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::ca::{
    Validity,
    certificate::CaCertificate,
    journal::{IntermediateState, Journal, Phase},
};

/// The `malha_ca_*` gauges and counters of certificates and rotation.
#[derive(Clone, Default)]
pub struct Metrics {
    expiration: Family<Certificate, Gauge<i64, AtomicI64>>,
    lifetime: Family<Certificate, Gauge<i64, AtomicI64>>,
    leaf_lifetime: Gauge<i64, AtomicI64>,
    phase: Family<PhaseLabel, Gauge<i64, AtomicI64>>,
    last_success: Gauge<i64, AtomicI64>,
    errors: Family<StepLabel, Counter>,
    generation: Gauge<i64, AtomicI64>,
    matches: Gauge<i64, AtomicI64>,
    plugged: Family<SecretLabel, Gauge<i64, AtomicI64>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Certificate {
    kind: &'static str,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: &'static str,
}

/// A gauge without labels cannot be absent.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SecretLabel {
    secret: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabel {
    step: &'static str,
}

/// Where a rotation failed: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Load,
    Verify,
    Decide,
    MakeKey,
    Save,
    Serve,
    Plug,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Load,
        Self::Verify,
        Self::Decide,
        Self::MakeKey,
        Self::Save,
        Self::Serve,
        Self::Plug,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Verify => "verify",
            Self::Decide => "decide",
            Self::MakeKey => "make_key",
            Self::Save => "save",
            Self::Serve => "serve",
            Self::Plug => "plug",
        }
    }
}

impl Metrics {
    /// Puts them into a registry. Counters stand there with 0 from the start, so that an increase is seen.
    pub fn register(&self, registry: &mut Registry) {
        for step in Step::ALL {
            drop(self.errors.get_or_create(&StepLabel { step: step.name() }));
        }
        registry.register(
            "malha_ca_certificate_expiration_timestamp_seconds",
            "When a certificate of the control plane ends",
            self.expiration.clone(),
        );
        registry.register(
            "malha_ca_certificate_lifetime_seconds",
            "How long a certificate of the control plane lives from its beginning",
            self.lifetime.clone(),
        );
        registry.register(
            "malha_ca_leaf_lifetime_seconds",
            "How long a workload's certificate lives unless it asks for another life",
            self.leaf_lifetime.clone(),
        );
        registry.register(
            "malha_ca_rotation_phase",
            "How many root authorities are in a phase",
            self.phase.clone(),
        );
        registry.register(
            "malha_ca_rotation_last_success_timestamp_seconds",
            "When the leader last did everything that was due, also where nothing was",
            self.last_success.clone(),
        );
        registry.register(
            "malha_ca_rotation_errors",
            "Failed steps of keeping the journal and the certificates below it",
            self.errors.clone(),
        );
        registry.register(
            "malha_ca_generation",
            "How often the trust set has changed",
            self.generation.clone(),
        );
        registry.register(
            "malha_ca_loaded_key_id_matches",
            "1 where the authority in use is the one in the journal",
            self.matches.clone(),
        );
        registry.register(
            "malha_ca_plugged_key_id_matches",
            "1 where the issuer in the Secret cacerts is the one that signs, 0 where it is not, absent where there is none",
            self.plugged.clone(),
        );
    }

    pub(super) fn read(&self, journal: &Journal) {
        self.matches(true);
        self.generation.set(saturate(journal.generation()));
        for phase in [
            Phase::Prepared,
            Phase::Published,
            Phase::Active,
            Phase::Draining,
            Phase::Retired,
        ] {
            let count = journal.authorities().iter().filter(|a| a.phase == phase);
            let label = PhaseLabel {
                phase: phase_name(phase),
            };
            let count = i64::try_from(count.count()).unwrap_or(i64::MAX);
            self.phase.get_or_create(&label).set(count);
        }
        for (phase, state) in [
            (Phase::Prepared, "next"),
            (Phase::Active, "active"),
            (Phase::Draining, "draining"),
        ] {
            let found = journal.authorities().iter().find(|a| a.phase == phase);
            self.show("root", state, found.map(|a| validity(&a.certificate)));
        }
        for (intermediate, state) in [
            (IntermediateState::Next, "next"),
            (IntermediateState::Active, "active"),
        ] {
            let found = journal.active().intermediate(intermediate);
            let found = found.map(|i| validity(&i.certificate));
            self.show("intermediate", state, found);
        }
    }

    pub(super) fn serves(&self, kind: &'static str, validity: Validity) {
        self.show(kind, "active", Some(validity));
    }

    /// The default, not the longest: what is nearer to its end than a quarter of this is late.
    pub(super) fn leaves_live(&self, life: Duration) {
        self.leaf_lifetime.set(saturate(life.as_secs()));
    }

    pub(super) fn ticked(&self, now: Timestamp) {
        self.last_success.set(now.as_second());
    }

    pub(super) fn failed(&self, step: Step) {
        let label = StepLabel { step: step.name() };
        self.errors.get_or_create(&label).inc();
    }

    pub(super) fn matches(&self, matches: bool) {
        self.matches.set(i64::from(matches));
    }

    /// `None` where nothing is plugged in.
    pub(super) fn plugged(&self, matches: Option<bool>) {
        let label = SecretLabel { secret: "cacerts" };
        if let Some(matches) = matches {
            let gauge = self.plugged.get_or_create(&label);
            gauge.set(i64::from(matches));
        } else {
            self.plugged.remove(&label);
        }
    }

    fn show(&self, kind: &'static str, state: &'static str, validity: Option<Validity>) {
        let label = Certificate { kind, state };
        if let Some(validity) = validity {
            let end = validity.not_after.as_second();
            self.expiration.get_or_create(&label).set(end);
            let life = saturate(validity.life().as_secs());
            self.lifetime.get_or_create(&label).set(life);
        } else {
            self.expiration.remove(&label);
            self.lifetime.remove(&label);
        }
    }
}

fn validity(certificate: &CaCertificate) -> Validity {
    certificate.validity()
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepared => "prepared",
        Phase::Published => "published",
        Phase::Active => "active",
        Phase::Draining => "draining",
        Phase::Retired => "retired",
    }
}

fn saturate(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
