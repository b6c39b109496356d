//! Decides whether a pod gets a sidecar, and how the pod changes.
//!
//! pod (raw JSON) + the entry that called + settings -> [`Answer`] { verdict, warnings }
//!
//! ```text
//! pod, lax      the few fields that a decision looks at, borrowed from JSON that nobody has validated
//! select        who is called at all: labels -> entry
//! judge, gates  the questions, in order; annotations, resources: what the pod's author asks for
//! render        the patch; sidecar, probes, metadata, order: its parts; record: what undoes it
//! again         a second call for the same pod
//! workload, uninject, explain, advice   the same decision for manifests, backwards, gate by gate, for authors
//! ```

pub mod advice;
pub mod capture;
pub mod explain;
pub mod quantity;
pub mod reason;
pub mod select;
pub mod settings;
pub mod uninject;
pub mod workload;

mod again;
mod annotations;
mod gates;
mod judge;
mod lax;
mod metadata;
mod order;
mod ours;
mod patch;
mod pod;
mod probes;
mod record;
mod render;
mod resources;
mod sidecar;
mod workload_api;

use std::{borrow::Cow, collections::BTreeMap};

use self::{judge::Judgement, pod::PodView, sidecar::Fragments};
pub use metadata::Owner;
pub use reason::{DenyReason, Reason, SkipReason, Warning, WarningCode};
pub use select::Entry;
pub use settings::{InjectSettings, SettingsError};

/// Operator's settings with everything that does not depend on a pod serialised beforehand.
#[derive(Debug)]
pub struct Injector {
    settings: InjectSettings,
    fragments: Fragments,
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

impl NamespaceFacts {
    /// A namespace whose every pod is selected, for when its labels are not known.
    pub fn enabled(name: &str) -> Self {
        let labels = [
            (select::INJECTION, "enabled"),
            (select::NAMESPACE_NAME, name),
        ];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
        Self {
            name: name.to_owned(),
            labels: labels.into_iter().collect(),
        }
    }
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

impl Default for Injector {
    /// With the embedded settings.
    fn default() -> Self {
        Self::new(InjectSettings::embedded())
    }
}

impl Injector {
    /// Prepares the fragments.
    pub fn new(settings: InjectSettings) -> Self {
        let fragments = Fragments::new(&settings);
        Self {
            settings,
            fragments,
        }
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
    pub fn inject(&self, pod: &[u8], call: &Call<'_>) -> Result<Answer, PodError> {
        Ok(self.decide(&PodView::parse(pod)?, call, None))
    }

    /// Decides for the pods of a workload, given its template (`metadata` and `spec`).
    ///
    /// # Errors
    /// As [`Self::inject`].
    pub fn inject_template(
        &self,
        template: &[u8],
        call: &Call<'_>,
        owner: &Owner,
    ) -> Result<Answer, PodError> {
        Ok(self.decide(&PodView::parse(template)?, call, Some(owner)))
    }

    /// What becomes of a pod that is created in this namespace: the API server's selection, then the decision.
    /// `owner` is given for a workload's template.
    ///
    /// # Errors
    /// As [`Self::inject`].
    pub fn rehearse(
        &self,
        pod: &[u8],
        namespace: &NamespaceFacts,
        oldest_kubelet: Option<u32>,
        owner: Option<&Owner>,
    ) -> Result<Answer, PodError> {
        let pod = PodView::parse(pod)?;
        let selection = select::select(namespace, &pod.facts(), &self.settings.revision);
        Ok(match selection.outcome {
            Err(reason) => Answer {
                verdict: Verdict::Skip(reason),
                warnings: Vec::new(),
            },
            Ok(entry) => {
                let call = Call {
                    entry,
                    namespace: &namespace.name,
                    oldest_kubelet,
                };
                self.decide(&pod, &call, owner)
            }
        })
    }

    fn decide(&self, pod: &PodView<'_>, call: &Call<'_>, owner: Option<&Owner>) -> Answer {
        let mut warnings = Vec::new();
        match self.judge(pod, call, &mut warnings) {
            Ok(Judgement::Again(again)) => self.complete(pod, &again),
            Ok(Judgement::First(accepted)) => {
                let owner = owner.map_or_else(|| Cow::Owned(Owner::of_pod(pod)), Cow::Borrowed);
                let json = self.render(pod, &accepted, &owner, &mut warnings);
                let reason = Reason::Injected;
                Answer {
                    verdict: Verdict::Patch(Patch { json, reason }),
                    warnings,
                }
            }
            Err(verdict) => Answer { verdict, warnings },
        }
    }
}

impl From<Denial> for Verdict {
    fn from(denial: Denial) -> Self {
        Self::Deny(denial)
    }
}

#[cfg(test)]
mod tests;
