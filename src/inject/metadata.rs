//! Labels and annotations that are added, and the three lists that are merged.

use std::collections::BTreeMap;

use serde_json::json;

use super::{
    annotations::{STATUS, Wishes},
    capture::AGENT_PORT,
    lax::{Slot, write_text, write_text_unexpanded},
    ours,
    patch::{Operations, Pointer},
    pod::{Labels, PodView},
    reason::{Warning, WarningCode},
    record::Record,
    settings::InjectSettings,
};

const TLS_MODE: &str = "security.istio.io/tlsMode";
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";
const DEFAULT_LOGS_CONTAINER: &str = "kubectl.kubernetes.io/default-logs-container";
/// Volumes that do not keep the cluster autoscaler from removing a node; older ones count memory volumes.
const SAFE_TO_EVICT: &str = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes";
pub(super) const SCRAPE: &str = "prometheus.io/scrape";
/// What Prometheus is told instead of what the application's author wrote.
pub(super) const SCRAPE_US: [(&str, &str, &str); 4] = [
    ("path", "prometheus.io/path", "/stats/prometheus"),
    ("port", "prometheus.io/port", "15020"),
    ("scheme", "prometheus.io/scheme", "http"),
    ("scrape", SCRAPE, "true"),
];
const _: () = assert!(AGENT_PORT == 15020, "the agent serves the merged metrics");

/// Labels and annotations to write, each by key.
#[derive(Debug, Default)]
pub(super) struct Additions {
    pub(super) labels: BTreeMap<&'static str, String>,
    pub(super) annotations: BTreeMap<&'static str, String>,
    /// The value of `MALHA_PROMETHEUS`: the application's own annotations; `null` if it is scraped as ever.
    pub(super) prometheus: String,
}

/// Everything but the status, which needs the whole: its place is kept, and [`Additions::set_status`] fills it.
pub(super) fn additions(
    pod: &PodView<'_>,
    wishes: &Wishes<'_>,
    settings: &InjectSettings,
    native: bool,
    record: &mut Record,
    warnings: &mut Vec<Warning>,
) -> Additions {
    let mut additions = Additions {
        prometheus: "null".to_owned(),
        ..Additions::default()
    };
    if settings.tls_mode_label && !pod.has_label(TLS_MODE) {
        additions.labels.insert(TLS_MODE, "istio".to_owned());
        record.labels.push(TLS_MODE.to_owned());
    }
    for key in [DEFAULT_CONTAINER, DEFAULT_LOGS_CONTAINER] {
        if let Some(first) = first_container(pod).filter(|_| !pod.has_annotation(key)) {
            additions.annotations.insert(key, first.to_owned());
            record.annotations.push(key.to_owned());
        }
    }
    merge_safe_to_evict(pod, &mut additions, record);
    let readable = |key| pod.annotation(key).is_some() || !pod.has_annotation(key);
    let readable = SCRAPE_US.iter().all(|(_, key, _)| readable(key));
    if wishes.merge_prometheus && readable && pod.annotation(SCRAPE) != Some("false") {
        additions.prometheus = redirect_prometheus(pod, &mut additions.annotations);
    }
    if !pod.has_annotation(STATUS) {
        record.annotations.push(STATUS.to_owned());
    }
    record.annotations.sort_unstable();
    if !pod.has_annotation(STATUS) {
        let unknown = "0".repeat(LENGTH_OF_HASH);
        let status = status(settings, &unknown, native, record);
        additions.annotations.insert(STATUS, status);
    }
    additions.leave_out_what_does_not_fit(pod, record, warnings);
    additions
}

/// Bytes of all of a pod's annotations, keys and values, which the API server accepts (`TotalAnnotationSizeLimitB`).
const ROOM: usize = 256 << 10;
/// What the sidecar works without, the least useful first.
const OPTIONAL: [&str; 4] = [
    STATUS,
    DEFAULT_LOGS_CONTAINER,
    DEFAULT_CONTAINER,
    SAFE_TO_EVICT,
];

impl Additions {
    /// The status, if there is room for it; `hash` is [`LENGTH_OF_HASH`] long.
    pub(super) fn set_status(
        &mut self,
        settings: &InjectSettings,
        hash: &str,
        native: bool,
        record: &Record,
    ) {
        if let Some(place) = self.annotations.get_mut(STATUS) {
            *place = status(settings, hash, native, record);
        }
    }

    /// A pod whose author has filled the room for annotations must not become invalid through ours.
    fn leave_out_what_does_not_fit(
        &mut self,
        pod: &PodView<'_>,
        record: &mut Record,
        warnings: &mut Vec<Warning>,
    ) {
        let mut left_out = Vec::new();
        for key in OPTIONAL {
            if self.bytes_of_annotations(pod) > ROOM && self.annotations.remove(key).is_some() {
                record.annotations.retain(|added| added != key);
                record.replaced.remove(key);
                left_out.push(key);
            }
        }
        let redirected = SCRAPE_US
            .iter()
            .any(|(_, key, _)| self.annotations.contains_key(key));
        if redirected && self.bytes_of_annotations(pod) > ROOM {
            // Part of them would send Prometheus astray: the application is scraped as ever.
            for (_, key, _) in SCRAPE_US {
                self.annotations.remove(key);
            }
            "null".clone_into(&mut self.prometheus);
            left_out.push("prometheus.io/*");
        }
        if !left_out.is_empty() {
            warnings.push(Warning::new(
                WarningCode::LargePod,
                format_args!(
                    "annotations are full at {ROOM} bytes; left out: {}",
                    left_out.join(", ")
                ),
            ));
        }
    }

    /// As the patched pod will have them.
    fn bytes_of_annotations(&self, pod: &PodView<'_>) -> usize {
        let own = pod
            .metadata
            .present()
            .and_then(|it| it.annotations.present());
        let own = own.into_iter().flat_map(|own| own.iter());
        let kept = own.filter(|(key, _)| !self.annotations.contains_key(key));
        let kept = kept.map(|(key, value)| key.len() + value.text().map_or(0, str::len));
        let added = self.annotations.iter();
        kept.sum::<usize>()
            + added
                .map(|(key, value)| key.len() + value.len())
                .sum::<usize>()
    }
}

fn first_container<'p>(pod: &'p PodView<'_>) -> Option<&'p str> {
    pod.containers()
        .iter()
        .filter_map(Slot::present)
        .find_map(|container| container.name())
}

fn merge_safe_to_evict(pod: &PodView<'_>, additions: &mut Additions, record: &mut Record) {
    let Some(own) = pod.annotation(SAFE_TO_EVICT) else {
        if !pod.has_annotation(SAFE_TO_EVICT) {
            additions
                .annotations
                .insert(SAFE_TO_EVICT, ours::VOLUMES.join(","));
            record.annotations.push(SAFE_TO_EVICT.to_owned());
        }
        return;
    };
    let named: Vec<&str> = own.split(',').map(str::trim).collect();
    let missing = ours::VOLUMES
        .into_iter()
        .filter(|volume| !named.contains(volume));
    let kept = (!own.trim().is_empty()).then_some(own);
    let merged: Vec<&str> = kept.into_iter().chain(missing).collect();
    let merged = merged.join(",");
    if merged != own {
        additions.annotations.insert(SAFE_TO_EVICT, merged);
        record
            .replaced
            .insert(SAFE_TO_EVICT.to_owned(), own.to_owned());
    }
}

/// Points Prometheus at the agent; what the author wrote goes to the agent, which scrapes the application.
fn redirect_prometheus(
    pod: &PodView<'_>,
    annotations: &mut BTreeMap<&'static str, String>,
) -> String {
    let mut own = String::from("{");
    for (name, key, ours) in SCRAPE_US {
        let theirs = pod.annotation(key);
        if let Some(theirs) = theirs {
            if own.len() > 1 {
                own.push(',');
            }
            write_text(name, &mut own);
            own.push(':');
            write_text_unexpanded(theirs, &mut own);
        }
        if theirs != Some(ours) {
            annotations.insert(key, ours.to_owned());
        }
    }
    own.push('}');
    own
}

/// Hexadecimal digits of the hash in the status.
pub(super) const LENGTH_OF_HASH: usize = 32;

/// The status: for people and for `explain`, never read to decide.
fn status(settings: &InjectSettings, hash: &str, native: bool, record: &Record) -> String {
    let containers = match native {
        true => json!({"initContainers": [ours::INIT, ours::PROXY]}),
        false => json!({"initContainers": [ours::INIT], "containers": [ours::PROXY]}),
    };
    let mut added = containers;
    if let Some(added) = added.as_object_mut() {
        let volumes = ours::VOLUMES
            .iter()
            .filter(|volume| !record.volumes.iter().any(|own| own == *volume));
        added.insert("volumes".to_owned(), volumes.copied().collect());
        for (key, list) in [
            ("labels", &record.labels),
            ("annotations", &record.annotations),
            ("imagePullSecrets", &record.pull_secrets),
        ] {
            if !list.is_empty() {
                added.insert(key.to_owned(), list.iter().map(String::as_str).collect());
            }
        }
    }
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "revision": settings.revision,
        "hash": hash,
        "added": added,
    })
    .to_string()
}

/// Writes the additions; a map that is not there is written whole.
pub(super) fn write(pod: &PodView<'_>, additions: &Additions, operations: &mut Operations) {
    let metadata = Pointer::new(&["metadata"]);
    let there = pod.metadata.present();
    let maps = [
        (
            "annotations",
            &additions.annotations,
            there.map(|metadata| &metadata.annotations),
        ),
        (
            "labels",
            &additions.labels,
            there.map(|metadata| &metadata.labels),
        ),
    ];
    if there.is_none() {
        let whole = maps.iter().filter(|(_, added, _)| !added.is_empty());
        let whole: BTreeMap<_, _> = whole.map(|(name, added, _)| (name, added)).collect();
        operations.add(
            &metadata,
            &serde_json::to_string(&whole).expect("strings always serialise"),
        );
        return;
    }
    for (name, added, there) in maps {
        let map = metadata.key(name);
        if there.is_none_or(|there: &Slot<Labels<'_>>| there.is_missing()) {
            if !added.is_empty() {
                operations.add(
                    &map,
                    &serde_json::to_string(added).expect("strings always serialise"),
                );
            }
        } else {
            for (key, value) in added {
                operations.add_text(&map.key(key), value);
            }
        }
    }
}

/// What a pod belongs to, as `MALHA_OWNER` and `MALHA_WORKLOAD` say it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// `apps/v1`.
    pub api_version: String,
    /// `Deployment`.
    pub kind: String,
    /// Its name.
    pub name: String,
}

impl Owner {
    /// The workload that people know: the Deployment of a ReplicaSet, the CronJob of a Job.
    pub fn new(api_version: &str, kind: &str, name: &str, template_hash: Option<&str>) -> Self {
        let owner = |api_version: &str, kind: &str, name: &str| Self {
            api_version: api_version.to_owned(),
            kind: kind.to_owned(),
            name: name.to_owned(),
        };
        if kind == "ReplicaSet"
            && let Some(deployment) = template_hash
                .filter(|hash| !hash.is_empty())
                .and_then(|hash| name.strip_suffix(hash)?.strip_suffix('-'))
        {
            return owner(api_version, "Deployment", deployment);
        }
        if kind == "Job"
            && let Some((cron_job, minutes)) = name.rsplit_once('-')
            // The controller appends the scheduled time in minutes since 1970: eight digits from 1989 to 2160.
            && minutes.len() == 8
            && minutes.bytes().all(|b| b.is_ascii_digit())
        {
            return owner(api_version, "CronJob", cron_job);
        }
        owner(api_version, kind, name)
    }

    /// The owner that the pod itself tells: no API server is asked.
    pub(super) fn of_pod(pod: &PodView<'_>) -> Self {
        let Some(metadata) = pod.metadata.present() else {
            return Self::new("v1", "Pod", "", None);
        };
        let owners = metadata.owners.items().iter().filter_map(Slot::present);
        let mut controllers = owners.filter(|owner| owner.controller.present() == Some(&true));
        if let Some(owner) = controllers.next() {
            let text =
                |slot: &Slot<super::lax::Text<'_>>| slot.text().unwrap_or_default().to_owned();
            let hash = pod.label("pod-template-hash");
            return Self::new(
                &text(&owner.api_version),
                &text(&owner.kind),
                &text(&owner.name),
                hash,
            );
        }
        let name = metadata.name.text().filter(|name| !name.is_empty());
        let generated = || {
            metadata
                .generate_name
                .text()
                .map(|name| name.trim_end_matches('-'))
        };
        Self::new(
            "v1",
            "Pod",
            name.or_else(generated).unwrap_or_default(),
            None,
        )
    }

    /// The value of `MALHA_OWNER`.
    pub(super) fn path(&self) -> String {
        format!("{}/{}/{}", self.api_version, self.kind, self.name)
    }
}
