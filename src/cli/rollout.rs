//! Whether the pods of a workload are all of its newest template, and ready.
//!
//! Deployment, StatefulSet or DaemonSet as the API server tells it -> what is left to wait for

use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

use super::{Failure, cluster::Cluster, rendering::ObjectName};

/// Waits until a workload has rolled out.
///
/// # Errors
/// It has not when `patience` is over; with what was left.
pub(super) async fn finished(
    cluster: &Cluster,
    workload: &ObjectName,
    patience: Duration,
) -> Result<(), Failure> {
    let what = format!("the rollout of {workload}");
    cluster
        .until(&what, patience, || async {
            let found = cluster
                .object(
                    &workload.resource,
                    workload.namespace.as_deref(),
                    &workload.name,
                )
                .await?;
            let found = found.with_context(|| format!("{workload} is gone"))?;
            Ok(left(&found))
        })
        .await
}

/// What is left of a rollout; `None` where it is done. (`kubectl rollout status` asks the same.)
pub(super) fn left(workload: &Value) -> Option<String> {
    let number = |pointer: &str, absent: u64| {
        let value = workload.pointer(pointer).and_then(Value::as_u64);
        value.unwrap_or(absent)
    };
    if number("/status/observedGeneration", 0) < number("/metadata/generation", 0) {
        return Some("its controller has not looked at it yet".to_owned());
    }
    let (wanted, updated, available) = match workload["kind"].as_str() {
        Some("DaemonSet") => (
            number("/status/desiredNumberScheduled", 0),
            number("/status/updatedNumberScheduled", 0),
            number("/status/numberAvailable", 0),
        ),
        _ => (
            number("/spec/replicas", 1),
            number("/status/updatedReplicas", 0),
            number("/status/availableReplicas", 0),
        ),
    };
    let old = number("/status/replicas", 0).saturating_sub(updated);
    if updated < wanted {
        Some(format!("{updated} of {wanted} pods are new"))
    } else if old > 0 && workload["kind"] == "Deployment" {
        Some(format!("{old} old pods are still there"))
    } else if available < wanted {
        Some(format!("{available} of {wanted} pods are available"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rollout_is_done_when_all_pods_are_new_and_available() {
        let deployment = |status: Value| json!({ "kind": "Deployment", "metadata": { "generation": 2 }, "spec": { "replicas": 2 }, "status": status });
        for (status, words) in [
            (json!({ "observedGeneration": 1 }), Some("controller")),
            (
                json!({ "observedGeneration": 2 }),
                Some("0 of 2 pods are new"),
            ),
            (
                json!({ "observedGeneration": 2, "replicas": 3, "updatedReplicas": 2 }),
                Some("1 old"),
            ),
            (
                json!({ "observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 1 }),
                Some("1 of 2 pods are available"),
            ),
            (
                json!({ "observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2 }),
                None,
            ),
        ] {
            let left = left(&deployment(status));
            match (&left, words) {
                (None, None) => {}
                (Some(left), Some(words)) => assert!(left.contains(words), "{left}"),
                _ => panic!("{left:?} instead of {words:?}"),
            }
        }
        let daemon_set = json!({ "kind": "DaemonSet", "metadata": { "generation": 1 }, "status": {
            "observedGeneration": 1, "desiredNumberScheduled": 3, "updatedNumberScheduled": 3, "numberAvailable": 3,
        } });
        assert_eq!(left(&daemon_set), None);
    }
}
