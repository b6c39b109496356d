//! Pods with addresses of both families, and pods of IPv6 alone.

use super::{STRICT, counter, curl, until};
use crate::node::{self, Namespace};

/// Servers and clients, one of each with both families and one of each with IPv6 alone.
const SHOP: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: both}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: both}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-raw, port: 9000, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: six}
spec:
  ipFamilies: [IPv6]
  selector: {app: six}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-raw, port: 9000, targetPort: 8080}]
"#;

/// Servers are clients too.
fn pod(name: &str, families: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}, annotations: {{rig.local/families: {families}}}}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: rig.local/agnhost:1
    args: [netexec, --http-port=8080]
    ports: [{{containerPort: 8080}}]
    readinessProbe: {{httpGet: {{path: /healthz, port: 8080}}, periodSeconds: 1, timeoutSeconds: 10}}
  - {{name: shell, image: "rig.local/tools:1", command: [sleep, "100000"]}}
"#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_both_families_and_of_ipv6_alone_reach_each_other_under_strict() {
    let Some(node) = node::shared().await else {
        return;
    };
    let injected = [("istio-injection", "enabled")];
    let mesh = node.namespace("families", &injected).await;
    let outside = node.namespace("outside", &[]).await;
    for document in [STRICT, SHOP, &pod("both", "both"), &pod("six", "ipv6")] {
        mesh.apply(document).await;
    }
    outside.apply(&pod("outsider", "ipv6")).await;
    for pod in ["pod/both", "pod/six"] {
        mesh.ready(pod).await;
    }
    outside.ready("pod/outsider").await;
    assert_eq!(
        list(&mesh, "pod/both", ".status.podIPs[*].ip").await.len(),
        2
    );
    let six = list(&mesh, "pod/six", ".status.podIPs[*].ip").await;
    assert!(six.len() == 1 && six[0].contains(':'), "{six:?}");

    let caller = format!("/ns/{}/sa/default", mesh.name());
    let path = "header?key=X-Forwarded-Client-Cert";
    let cluster_ips = list(&mesh, "service/both", ".spec.clusterIPs[*]").await;
    let [v4, v6] = &cluster_ips[..] else {
        panic!("an address of each family: {cluster_ips:?}");
    };
    let six_ip = list(&mesh, "service/six", ".spec.clusterIPs[*]")
        .await
        .remove(0);
    // A pod finds its own name in /etc/hosts, so a Service's is said in full.
    let full = |name: &str| format!("{name}.{}.svc.cluster.local", mesh.name());
    for (from, to) in [
        ("pod/both", v4.clone()),
        ("pod/both", format!("[{v6}]")),
        ("pod/both", format!("[{six_ip}]")),
        ("pod/both", full("six")),
        ("pod/both", format!("[{}]:8080", six[0])),
        ("pod/six", format!("[{v6}]")),
        ("pod/six", full("both")),
        ("pod/six", full("six")),
    ] {
        let url = format!("http://{to}/{path}");
        until(
            &format!("{from} is known at {url}"),
            |seen: &Result<String, String>| seen.as_ref().is_ok_and(|seen| seen.contains(&caller)),
            async || curl(&mesh, from, "shell", &["-g", &url]).await,
        )
        .await;
    }
    for (from, to) in [
        ("pod/both", format!("[{v6}]")),
        ("pod/both", full("six")),
        ("pod/six", full("six")),
    ] {
        let url = format!("http://{to}:9000/hostname");
        let raw = curl(&mesh, from, "shell", &["-g", &url]).await;
        assert!(raw.is_ok(), "TCP from {from} to {to}: {raw:?}");
    }

    let refused = async || {
        let name = "envoy_listener_no_filter_chain_match";
        counter(&mesh, ("pod/six", "shell"), name).await
    };
    let before = refused().await;
    let plaintext = format!("http://[{}]:8080/hostname", six[0]);
    let plaintext = curl(&outside, "pod/outsider", "shell", &["-g", &plaintext]).await;
    assert!(plaintext.is_err(), "{plaintext:?}");
    until("the refusal is counted", |count| *count > before, refused).await;
}

async fn list(mesh: &Namespace, object: &str, path: &str) -> Vec<String> {
    let path = format!("jsonpath={{{path}}}");
    let text = mesh.kubectl(&["get", object, "-o", &path]).await;
    text.split_whitespace().map(str::to_owned).collect()
}
