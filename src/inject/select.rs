//! Selection by labels: one table, as a function and as the selectors that the API server evaluates.
//!
//! labels of the namespace and of the pod -> [`Entry`], or the reason why no entry calls

use std::collections::BTreeMap;

use serde::Serialize;

use super::{NamespaceFacts, reason::SkipReason};

/// Namespaces that no entry ever matches: a mesh that is down must not keep the cluster itself from starting.
pub const PROTECTED_NAMESPACES: [&str; 4] = [
    "malha-system",
    "kube-system",
    "kube-public",
    "kube-node-lease",
];
/// The label that the API server puts on every namespace, with its name.
pub const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";
/// On a namespace: `enabled` selects its pods, anything else refuses them.
pub const INJECTION: &str = "istio-injection";
/// On a namespace or a pod: the revision that is asked for.
pub const REVISION: &str = "istio.io/rev";
/// On a pod, as label or annotation: `true` or `false`.
pub const INJECT: &str = "sidecar.istio.io/inject";
/// On the control plane's own pods, which must start while the webhook is down.
pub const CONTROL_PLANE: &str = "malha.io/control-plane";
/// The annotation that marks a static pod's mirror.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// Which of the four disjoint webhook entries called; its path says which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Entry {
    /// `istio-injection=enabled` on the namespace (`/inject/ns`).
    Namespace,
    /// `sidecar.istio.io/inject=true` on the pod alone (`/inject/pod`).
    Pod,
    /// `istio.io/rev=<ours>` on the namespace (`/inject/rev/<r>/ns`).
    RevisionNamespace,
    /// `istio.io/rev=<ours>` on the pod alone (`/inject/rev/<r>/pod`).
    RevisionPod,
}

impl Entry {
    /// Every entry.
    pub const ALL: [Self; 4] = [
        Self::Namespace,
        Self::Pod,
        Self::RevisionNamespace,
        Self::RevisionPod,
    ];

    /// The path at which the API server calls this entry.
    pub fn path(self, revision: &str) -> String {
        match self {
            Self::Namespace => "/inject/ns".to_owned(),
            Self::Pod => "/inject/pod".to_owned(),
            Self::RevisionNamespace => format!("/inject/rev/{revision}/ns"),
            Self::RevisionPod => format!("/inject/rev/{revision}/pod"),
        }
    }

    /// The entry that `path` calls, if it is one of this revision's.
    pub fn from_path(path: &str, revision: &str) -> Option<Self> {
        let rest = path.strip_prefix("/inject/")?;
        match rest {
            "ns" => return Some(Self::Namespace),
            "pod" => return Some(Self::Pod),
            _ => {}
        }
        let (asked, scope) = rest.strip_prefix("rev/")?.rsplit_once('/')?;
        match scope {
            _ if asked != revision => None,
            "ns" => Some(Self::RevisionNamespace),
            "pod" => Some(Self::RevisionPod),
            _ => None,
        }
    }

    /// The entry's name in the MutatingWebhookConfiguration.
    pub fn webhook_name(self) -> &'static str {
        match self {
            Self::Namespace => "namespace.injector.malha.io",
            Self::Pod => "pod.injector.malha.io",
            Self::RevisionNamespace => "rev-namespace.injector.malha.io",
            Self::RevisionPod => "rev-pod.injector.malha.io",
        }
    }
}

/// What selection looks at in a pod.
#[derive(Clone, Copy, Debug, Default)]
pub struct PodFacts<'a> {
    /// The label `sidecar.istio.io/inject`.
    pub inject: Option<&'a str>,
    /// The label `istio.io/rev`.
    pub revision: Option<&'a str>,
    /// The label `malha.io/control-plane` is present.
    pub control_plane: bool,
    /// `spec.hostNetwork` is true.
    pub host_network: bool,
    /// The pod is a static pod's mirror.
    pub mirror: bool,
}

impl<'a> PodFacts<'a> {
    /// What the labels say, of a pod that is neither on the node's network nor a mirror.
    pub fn from_labels(labels: &'a BTreeMap<String, String>) -> Self {
        Self {
            inject: labels.get(INJECT).map(String::as_str),
            revision: labels.get(REVISION).map(String::as_str),
            control_plane: labels.contains_key(CONTROL_PLANE),
            ..Self::default()
        }
    }
}

/// The row of the table that decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Number of the row, 1 to 12; 0 for a pod of the control plane itself.
    pub row: u8,
    /// The entry that calls, or why none does.
    pub outcome: Result<Entry, SkipReason>,
}

/// The first row of the table that matches.
pub fn select(namespace: &NamespaceFacts, pod: &PodFacts<'_>, revision: &str) -> Selection {
    let rev = |value: &str| value == revision;
    let injection = namespace.labels.get(INJECTION).map(String::as_str);
    let namespace_revision = namespace.labels.get(REVISION).map(String::as_str);
    let (row, outcome) = match (injection, namespace_revision, pod.inject, pod.revision) {
        _ if is_protected(&namespace.name) => (1, Err(SkipReason::ProtectedNamespace)),
        _ if pod.control_plane => (0, Err(SkipReason::NotSelected)),
        _ if pod.host_network => (2, Err(SkipReason::HostNetwork)),
        _ if pod.mirror => (3, Err(SkipReason::MirrorPod)),
        (Some(value), ..) if value != "enabled" => (4, Err(SkipReason::NamespaceDisabled)),
        (_, _, Some("false"), _) => (5, Err(SkipReason::OptedOutByLabel)),
        (Some(_), ..) => (6, Ok(Entry::Namespace)),
        (None, Some(asked), ..) if rev(asked) => (7, Ok(Entry::RevisionNamespace)),
        (None, Some(_), ..) => (8, Err(SkipReason::OtherRevision)),
        (None, None, _, Some(asked)) if rev(asked) => (9, Ok(Entry::RevisionPod)),
        (None, None, _, Some(_)) => (10, Err(SkipReason::OtherRevision)),
        (None, None, Some("true"), None) => (11, Ok(Entry::Pod)),
        (None, None, _, None) => (12, Err(SkipReason::NotSelected)),
    };
    Selection { row, outcome }
}

/// A namespace that the mesh never touches.
pub fn is_protected(namespace: &str) -> bool {
    PROTECTED_NAMESPACES.contains(&namespace)
}

/// One entry of the MutatingWebhookConfiguration, as far as it decides who is called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WebhookEntry {
    /// The entry's name.
    pub name: &'static str,
    /// The path at which it calls.
    #[serde(skip)]
    pub path: String,
    /// Which namespaces.
    pub namespace_selector: LabelSelector,
    /// Which pods.
    pub object_selector: LabelSelector,
    /// Which of those never reach us: a pod that is not sent cannot be blocked by us.
    pub match_conditions: Vec<MatchCondition>,
}

/// `metav1.LabelSelector`, in its general form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LabelSelector {
    /// All must hold.
    pub match_expressions: Vec<Requirement>,
}

/// `metav1.LabelSelectorRequirement`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Requirement {
    /// The label.
    pub key: &'static str,
    /// What must hold of it.
    pub operator: Operator,
    /// For `In` and `NotIn`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// `metav1.LabelSelectorOperator`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Operator {
    /// Present, with one of the values.
    In,
    /// Absent, or present with none of the values.
    NotIn,
    /// Present.
    Exists,
    /// Absent.
    DoesNotExist,
}

/// A CEL expression that must hold; an error in it follows the failure policy, so each one is total.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MatchCondition {
    /// Its name.
    pub name: &'static str,
    /// The expression.
    pub expression: &'static str,
}

/// `hostNetwork` is not set.
pub const NOT_HOST_NETWORK: &str =
    "!has(object.spec) || !has(object.spec.hostNetwork) || !object.spec.hostNetwork";
/// The pod is not a static pod's mirror.
pub const NOT_MIRROR: &str = "!has(object.metadata) || !has(object.metadata.annotations) || \
    !('kubernetes.io/config.mirror' in object.metadata.annotations)";

/// The four entries: every selector that decides who is called, generated from the same table as [`select`].
pub fn webhook_entries(revision: &str) -> [WebhookEntry; 4] {
    Entry::ALL.map(|entry| WebhookEntry {
        name: entry.webhook_name(),
        path: entry.path(revision),
        namespace_selector: LabelSelector {
            match_expressions: namespace_requirements(entry, revision),
        },
        object_selector: LabelSelector {
            match_expressions: pod_requirements(entry, revision),
        },
        match_conditions: vec![
            MatchCondition {
                name: "not-host-network",
                expression: NOT_HOST_NETWORK,
            },
            MatchCondition {
                name: "not-a-mirror-pod",
                expression: NOT_MIRROR,
            },
        ],
    })
}

fn namespace_requirements(entry: Entry, revision: &str) -> Vec<Requirement> {
    let mut all = vec![not_in(NAMESPACE_NAME, &PROTECTED_NAMESPACES)];
    match entry {
        Entry::Namespace => all.push(one_of(INJECTION, "enabled")),
        Entry::RevisionNamespace => all.extend([absent(INJECTION), one_of(REVISION, revision)]),
        Entry::Pod | Entry::RevisionPod => all.extend([absent(INJECTION), absent(REVISION)]),
    }
    all
}

fn pod_requirements(entry: Entry, revision: &str) -> Vec<Requirement> {
    let mut all = vec![absent(CONTROL_PLANE)];
    match entry {
        Entry::Namespace | Entry::RevisionNamespace => all.push(not_in(INJECT, &["false"])),
        Entry::RevisionPod => {
            all.extend([not_in(INJECT, &["false"]), one_of(REVISION, revision)]);
        }
        Entry::Pod => all.extend([one_of(INJECT, "true"), absent(REVISION)]),
    }
    all
}

fn one_of(key: &'static str, value: &str) -> Requirement {
    Requirement {
        key,
        operator: Operator::In,
        values: vec![value.to_owned()],
    }
}

fn not_in(key: &'static str, values: &[&str]) -> Requirement {
    Requirement {
        key,
        operator: Operator::NotIn,
        values: values.iter().map(|&value| value.to_owned()).collect(),
    }
}

fn absent(key: &'static str) -> Requirement {
    Requirement {
        key,
        operator: Operator::DoesNotExist,
        values: Vec::new(),
    }
}

impl LabelSelector {
    /// Evaluates the selector as the API server does (`k8s.io/apimachinery/pkg/labels`).
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.match_expressions.iter().all(|r| r.matches(labels))
    }
}

impl Requirement {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(self.key);
        match self.operator {
            Operator::In => value.is_some_and(|v| self.values.contains(v)),
            Operator::NotIn => value.is_none_or(|v| !self.values.contains(v)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "default";

    fn labels(pairs: &[(&str, Option<&str>)]) -> BTreeMap<String, String> {
        let present = pairs
            .iter()
            .filter_map(|(key, value)| Some((key, (*value)?)));
        present
            .map(|(key, value)| ((*key).to_owned(), value.to_owned()))
            .collect()
    }

    fn namespace(name: &str, injection: Option<&str>, revision: Option<&str>) -> NamespaceFacts {
        NamespaceFacts {
            name: name.to_owned(),
            labels: labels(&[
                (NAMESPACE_NAME, Some(name)),
                (INJECTION, injection),
                (REVISION, revision),
            ]),
        }
    }

    /// Every namespace and every pod that the table can tell apart, and a few more.
    fn product() -> Vec<(NamespaceFacts, BTreeMap<String, String>)> {
        let mut all = Vec::new();
        let revisions = [None, Some(OURS), Some("canary"), Some("")];
        for name in ["shop", "default"].into_iter().chain(PROTECTED_NAMESPACES) {
            for injection in [
                None,
                Some("enabled"),
                Some("disabled"),
                Some("true"),
                Some(""),
            ] {
                for namespace_revision in revisions {
                    for inject in [None, Some("true"), Some("false"), Some("True"), Some("")] {
                        for revision in revisions {
                            for own in [None, Some(""), Some("true")] {
                                let pod =
                                    [(INJECT, inject), (REVISION, revision), (CONTROL_PLANE, own)];
                                all.push((
                                    namespace(name, injection, namespace_revision),
                                    labels(&pod),
                                ));
                            }
                        }
                    }
                }
            }
        }
        all
    }

    #[test]
    fn generated_selectors_agree_with_the_function_over_the_full_product() {
        let entries = webhook_entries(OURS);
        for (namespace, pod) in product() {
            let called: Vec<_> = entries
                .iter()
                .filter(|e| e.namespace_selector.matches(&namespace.labels))
                .filter(|e| e.object_selector.matches(&pod))
                .map(|e| e.name)
                .collect();
            let chosen = select(&namespace, &PodFacts::from_labels(&pod), OURS).outcome;
            let wanted: Vec<_> = chosen.ok().map(Entry::webhook_name).into_iter().collect();
            assert_eq!(called, wanted, "{namespace:?} {pod:?}");
        }
    }

    #[test]
    fn each_row_of_the_table_decides_for_its_pod() {
        use SkipReason as S;
        let pod = |inject, revision| PodFacts {
            inject,
            revision,
            ..PodFacts::default()
        };
        let on_host = PodFacts {
            host_network: true,
            ..PodFacts::default()
        };
        let mirror = PodFacts {
            mirror: true,
            ..PodFacts::default()
        };
        let own = PodFacts {
            control_plane: true,
            ..PodFacts::default()
        };
        let (enabled, off) = (Some("enabled"), Some("disabled"));
        let cases = [
            (
                namespace("kube-system", enabled, None),
                pod(None, None),
                1,
                Err(S::ProtectedNamespace),
            ),
            (
                namespace("shop", enabled, None),
                own,
                0,
                Err(S::NotSelected),
            ),
            (
                namespace("shop", enabled, None),
                on_host,
                2,
                Err(S::HostNetwork),
            ),
            (
                namespace("shop", enabled, None),
                mirror,
                3,
                Err(S::MirrorPod),
            ),
            (
                namespace("shop", off, Some(OURS)),
                pod(Some("true"), None),
                4,
                Err(S::NamespaceDisabled),
            ),
            (
                namespace("shop", enabled, None),
                pod(Some("false"), None),
                5,
                Err(S::OptedOutByLabel),
            ),
            (
                namespace("shop", enabled, Some("canary")),
                pod(None, Some("canary")),
                6,
                Ok(Entry::Namespace),
            ),
            (
                namespace("shop", None, Some(OURS)),
                pod(None, None),
                7,
                Ok(Entry::RevisionNamespace),
            ),
            (
                namespace("shop", None, Some("canary")),
                pod(Some("true"), None),
                8,
                Err(S::OtherRevision),
            ),
            (
                namespace("shop", None, None),
                pod(None, Some(OURS)),
                9,
                Ok(Entry::RevisionPod),
            ),
            (
                namespace("shop", None, None),
                pod(Some("true"), Some("canary")),
                10,
                Err(S::OtherRevision),
            ),
            (
                namespace("shop", None, None),
                pod(Some("true"), None),
                11,
                Ok(Entry::Pod),
            ),
            (
                namespace("shop", None, None),
                pod(None, None),
                12,
                Err(S::NotSelected),
            ),
        ];
        for (namespace, pod, row, outcome) in cases {
            let selection = select(&namespace, &pod, OURS);
            assert_eq!(
                selection,
                Selection { row, outcome },
                "{namespace:?} {pod:?}"
            );
        }
    }

    #[test]
    fn each_path_names_one_entry_of_one_revision() {
        for entry in Entry::ALL {
            assert_eq!(Entry::from_path(&entry.path("blue"), "blue"), Some(entry));
        }
        for path in [
            "/inject",
            "/inject/",
            "/inject/rev/green/ns",
            "/inject/rev/blue/",
            "/inject/rev/blue",
            "/advise",
        ] {
            assert_eq!(Entry::from_path(path, "blue"), None, "{path}");
        }
    }
}
