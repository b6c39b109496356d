//! Decides whether a pod gets a sidecar, and how the pod changes.
//!
//! pod (raw JSON) + the entry that called + settings -> [`Answer`] { verdict, warnings }

pub mod capture;
pub mod quantity;
pub mod reason;
pub mod select;
pub mod settings;

use std::collections::BTreeMap;

pub use reason::{DenyReason, Reason, SkipReason, Warning, WarningCode};
pub use select::Entry;
pub use settings::{InjectSettings, SettingsError};

/// Operator's settings with everything that does not depend on a pod serialised beforehand.
pub struct Injector {
    settings: InjectSettings,
}

/// What is known about a pod besides the pod.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    /// Which webhook entry selected the pod.
    pub entry: Entry,
    /// The namespace of the request (authoritative; the object's own is often empty).
    pub namespace: &'a str,
    /// Minor version of the oldest kubelet, where a watch of nodes has told it (`Some(33)` for 1.33).
    pub oldest_kubelet: Option<u32>,
}

/// What is known about a namespace, for selection, advice and `explain`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceFacts {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
}

/// What the webhook may know about the cluster without asking it: watched beforehand, never read on the way.
pub trait ClusterFacts: Send + Sync {
    /// Minor version of the oldest kubelet (`Some(33)` for 1.33); `None` while unknown.
    fn oldest_kubelet(&self) -> Option<u32>;
    /// A namespace's labels, for advice only: no decision about a pod hangs on them.
    fn namespace(&self, name: &str) -> Option<NamespaceFacts>;
}

/// The whole answer for one pod.
#[derive(Debug)]
pub struct Answer {
    /// What happens to the pod.
    pub verdict: Verdict,
    /// What its author should know.
    pub warnings: Vec<Warning>,
}

/// Why no decision about a pod is possible.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// Not UTF-8, of which JSON is made.
    #[error("the pod is not UTF-8")]
    NotUtf8(#[from] std::str::Utf8Error),
    /// Not one JSON value, or a key that is read stands in it twice.
    #[error("the pod is not readable as JSON")]
    NotJson(#[from] serde_json::Error),
}

/// What the webhook answers for one pod.
#[derive(Debug)]
pub enum Verdict {
    /// Operations that only add or replace what is ours.
    Patch(Patch),
    /// The pod goes in as it is.
    Skip(SkipReason),
    /// The author must change something; the message says what.
    Deny(Denial),
}

/// A JSON Patch (RFC 6902), serialised.
#[derive(Debug)]
pub struct Patch {
    /// The operations as a JSON array.
    pub json: Vec<u8>,
    /// `Injected`, or `Reinvoked` where an earlier call's work was completed.
    pub reason: Reason,
}

/// Why a pod is refused, and what its author must change.
#[derive(Debug)]
pub struct Denial {
    /// The code.
    pub reason: DenyReason,
    /// The object, the fault, the way out.
    pub message: String,
}

impl Verdict {
    /// The one code of this decision.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Patch(patch) => patch.reason,
            Self::Skip(reason) => Reason::from(*reason),
            Self::Deny(denial) => Reason::from(denial.reason),
        }
    }
}

impl Injector {
    /// Prepares the fragments.
    pub fn new(settings: InjectSettings) -> Self {
        Self { settings }
    }
    /// The settings in force.
    pub fn settings(&self) -> &InjectSettings {
        &self.settings
    }
    /// Decides for one pod, given as the raw JSON of `request.object`.
    ///
    /// # Errors
    /// When the bytes are not one JSON value, or a key that we read stands in it twice: the request is at fault, not
    /// the pod.
    pub fn inject(&self, _pod: &[u8], _call: &Call<'_>) -> Result<Answer, PodError> {
        Ok(Answer {
            verdict: Verdict::Skip(SkipReason::NotSelected),
            warnings: Vec::new(),
        })
    }
}
