//! What was changed besides adding what is ours, kept in the sidecar's environment so that it can be taken back.
//!
//! It stands in a container of ours and not in an annotation: it is looked at only where the containers say that the
//! pod was injected, so that no annotation can claim it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The value of `MALHA_RESTORE`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Record {
    /// Keys of annotations that were not there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) annotations: Vec<String>,
    /// Keys of labels that were not there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) labels: Vec<String>,
    /// User containers that were given a mount of the Workload API.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) mounts: Vec<String>,
    /// Names of pull secrets that were not there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) pull_secrets: Vec<String>,
    /// What annotations held that were changed.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) replaced: BTreeMap<String, String>,
    /// What the pod's own resources held that were changed: side, resource, amount as it stood there; null
    /// where it did not.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) resources: BTreeMap<String, BTreeMap<String, Value>>,
    /// User containers that were given the variable of the Workload API.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) sockets: Vec<String>,
    /// Volumes of ours that the pod brought itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) volumes: Vec<String>,
}

impl Record {
    /// Keeps an amount of the pod's own resources.
    pub(super) fn resource(&mut self, side: &str, key: &str, amount: Value) {
        let originals = self.resources.entry(side.to_owned()).or_default();
        originals.insert(key.to_owned(), amount);
    }

    /// The value of the variable; `$` is escaped, because the kubelet expands `$(NAME)`.
    pub(super) fn to_json(&self) -> String {
        let json = serde_json::to_string(self).expect("a record always serialises");
        json.replace('$', "\\u0024")
    }
}
