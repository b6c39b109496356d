//! The rig itself: what every other test here leans on.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};

use crate::rig::{self, Cluster, Setup, TokenOf, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn controllers_make_the_pods_of_a_deployment_and_kubectl_reads_them() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("rig", &[]).await;
    let args = [
        "create",
        "deployment",
        "web",
        "--image=example.com/web:1",
        "--replicas=2",
        "-n",
        &namespace,
    ];
    let output = cluster.kubectl(args, None).await;
    assert!(output.status.success(), "{output:?}");
    let pods: Api<Pod> = Api::namespaced(cluster.client().await, &namespace);
    eventually(Duration::from_secs(10), "two pods", || async {
        let list = pods
            .list(&ListParams::default())
            .await
            .map_err(|error| error.to_string())?;
        if list.items.len() == 2 {
            Ok(())
        } else {
            Err(format!("{} pods", list.items.len()))
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_names_its_account_and_rbac_applies_to_it() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("rig", &[]).await;
    let kubeconfig = cluster.service_account(&namespace, "default").await;
    let output = cluster
        .kubectl_as(
            &kubeconfig,
            [
                "auth",
                "whoami",
                "-o",
                "jsonpath={.status.userInfo.username}",
            ],
            None,
        )
        .await;
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("system:serviceaccount:{namespace}:default"),
        "{output:?}"
    );
    let pods: Api<Pod> = Api::namespaced(rig::client(&kubeconfig).await, &namespace);
    let refused = pods
        .list(&ListParams::default())
        .await
        .expect_err("nothing is granted");
    assert!(
        matches!(&refused, kube::Error::Api(status) if status.code == 403),
        "{refused:?}"
    );
    let missing = cluster
        .try_token(
            &namespace,
            "default",
            &TokenOf::Pod("gone"),
            &["malha-ca"],
            600,
        )
        .await;
    assert!(
        missing.is_err(),
        "a token bound to a pod that does not exist"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_outlives_the_death_of_its_api_server() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let namespace = cluster.namespace("kept", &[]).await;
    cluster.api_server().kill();
    cluster.api_server().start().expect("it starts again");
    cluster.api_server_ready().await.expect("it is ready again");
    let output = cluster
        .kubectl(["get", "namespace", &namespace], None)
        .await;
    assert!(output.status.success(), "{output:?}");
}
