//! One look over the pods that the mesh is about.

use std::sync::Arc;

use jiff::Timestamp;

use super::super::world::{Owner, Pod, World};
use crate::inject::{
    Entry, InjectSettings, NamespaceFacts, SkipReason,
    select::{PodFacts, select},
};

/// A pod of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sighting {
    pub(super) namespace: String,
    pub(super) pod: String,
    pub(super) subject: Subject,
    pub(super) owner: Option<Owner>,
    pub(super) created: Option<Timestamp>,
    pub(super) found: Found,
}

/// What all pods of one template have in common; a pod of its own is its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Subject {
    pub(super) uid: Arc<str>,
    pub(super) template: Arc<str>,
}

/// How it is with a pod's sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// There, as configured.
    Current,
    /// There, of another image than configured.
    Stale,
    /// Not there, and the labels say why.
    Skipped(SkipReason),
    /// Not there, although this entry would be called.
    Without(Entry),
}

/// Pods of one namespace by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) injected: i64,
    pub(super) missing: i64,
    pub(super) stale: i64,
}

impl Counts {
    pub(super) fn states(&self) -> [(&'static str, i64); 3] {
        [
            ("injected", self.injected),
            ("missing", self.missing),
            ("stale", self.stale),
        ]
    }
}

/// The pods of the mesh: those that an entry selects, and those that are left alone by name in a namespace of the mesh.
pub(super) fn survey(world: &World, settings: &InjectSettings) -> Vec<Sighting> {
    let mut sightings = Vec::new();
    world.each_namespace(|namespace, pods| {
        let Some(facts) = facts(world, namespace) else {
            return;
        };
        let running = pods.filter(|(_, pod)| !pod.finished && pod.deletion.is_none());
        let found =
            running.filter_map(|(name, pod)| Some((name, pod, judge(&facts, pod, settings)?)));
        sightings.extend(found.map(|(name, pod, found)| Sighting {
            namespace: namespace.to_owned(),
            pod: name.to_owned(),
            subject: subject(pod),
            owner: pod.owner.clone(),
            created: pod.created,
            found,
        }));
    });
    sightings
}

fn facts(world: &World, namespace: &str) -> Option<NamespaceFacts> {
    let found = world.find_namespace(namespace)?;
    (!found.terminating).then(|| NamespaceFacts {
        name: namespace.to_owned(),
        labels: found.labels,
    })
}

fn subject(pod: &Pod) -> Subject {
    match &pod.owner {
        Some(owner) => Subject {
            uid: owner.uid.clone(),
            template: owner.template.clone(),
        },
        None => Subject {
            uid: pod.uid.as_ref().into(),
            template: "".into(),
        },
    }
}

/// `None` for a pod that is none of the mesh's business.
fn judge(namespace: &NamespaceFacts, pod: &Pod, settings: &InjectSettings) -> Option<Found> {
    let facts = PodFacts {
        host_network: pod.host_network,
        mirror: pod.mirror,
        ..PodFacts::from_labels(&pod.labels)
    };
    match (
        select(namespace, &facts, &settings.revision).outcome,
        &pod.proxy_image,
    ) {
        (Ok(_), Some(image)) if **image == *settings.image.proxy || pod.chosen_image => {
            Some(Found::Current)
        }
        (Ok(_), Some(_)) => Some(Found::Stale),
        (Ok(entry), None) => Some(Found::Without(entry)),
        (Err(reason), None) => {
            worth_telling(reason, namespace, settings).then_some(Found::Skipped(reason))
        }
        // it was selected once, or was given a sidecar by hand
        (Err(_), Some(_)) => None,
    }
}

/// Whether somebody might wonder why this pod has no sidecar: it is alone with that in a namespace of the mesh.
fn worth_telling(
    reason: SkipReason,
    namespace: &NamespaceFacts,
    settings: &InjectSettings,
) -> bool {
    let plain = select(namespace, &PodFacts::default(), &settings.revision);
    plain.outcome.is_ok()
        && matches!(
            reason,
            SkipReason::OptedOutByLabel | SkipReason::HostNetwork
        )
}
