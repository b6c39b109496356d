//! Malha as users install it, on a real node.

use serde_json::Value;

use crate::node;

#[tokio::test(flavor = "multi_thread")]
async fn both_replicas_run_from_the_manifests_that_users_get() {
    let Some(node) = node::shared().await else {
        return;
    };
    let pods = node
        .kubectl(&["get", "pods", "-n", "malha-system", "-o", "json"])
        .await;
    let pods: Value = serde_json::from_str(&pods).expect("JSON");
    let ready = pods["items"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(|pod| {
            let status = &pod["status"]["containerStatuses"][0];
            status["ready"] == true
                && status["restartCount"] == 0
                && pod["metadata"]["deletionTimestamp"].is_null()
        });
    assert_eq!(ready.count(), 2, "{pods:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_find_each_other_by_the_name_of_a_service() {
    let Some(node) = node::shared().await else {
        return;
    };
    let plain = node.namespace("plain", &[]).await;
    plain.apply(node::WEB_AND_CLIENT).await;
    plain.ready("pod/web").await;
    plain.ready("pod/client").await;
    let url = format!("http://web.{}.svc.cluster.local/hostname", plain.name());
    let answer = plain
        .exec(
            "pod/client",
            "client",
            &["curl", "-sS", "--retry", "5", "--retry-connrefused", &url],
        )
        .await;
    assert_eq!(answer.as_deref(), Ok("web"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_labelled_pod_is_given_its_sidecar_by_the_webhook_in_the_cluster() {
    let Some(node) = node::shared().await else {
        return;
    };
    let mesh = node
        .namespace("mesh", &[("istio-injection", "enabled")])
        .await;
    mesh.apply(node::WEB_AND_CLIENT).await;
    let containers = mesh
        .kubectl(&[
            "get",
            "pod/web",
            "-o",
            "jsonpath={.spec.initContainers[*].name} {.spec.containers[*].name}",
        ])
        .await;
    assert_eq!(containers, "malha-init malha-proxy web");
}
