//! Pods of a size, like those that people run: a few containers with ports, probes, mounts, resources, and environment
//! variables until the size is reached.

use serde_json::{Value, json};

/// A pod of `bytes` bytes of JSON, to within one variable.
pub(crate) fn of_size(bytes: usize) -> Value {
    let mut pod = small();
    while pod.to_string().len() + 60 < bytes {
        grow(&mut pod);
    }
    pod
}

/// A pod with so many environment variables.
pub(crate) fn with_variables(count: usize) -> Value {
    let mut pod = small();
    for _ in 0..count {
        grow(&mut pod);
    }
    pod
}

fn grow(pod: &mut Value) {
    let containers = pod["spec"]["containers"]
        .as_array_mut()
        .expect("made below");
    let count = containers.len();
    let total: usize = containers
        .iter()
        .map(|one| one["env"].as_array().map_or(0, Vec::len))
        .sum();
    let env = containers[total % count]["env"]
        .as_array_mut()
        .expect("made below");
    env.push(json!({"name": format!("SETTING_{total:05}"), "value": format!("value-{total}-of-the-application")}));
}

fn small() -> Value {
    let container = |name: &str, port: u16| {
        json!({
            "name": name, "image": format!("registry.example.com/shop/{name}:1.4.2"), "imagePullPolicy": "IfNotPresent",
            "ports": [{"name": "http", "containerPort": port, "protocol": "TCP"}],
            "env": [],
            "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
            "volumeMounts": [{"name": "kube-api-access-x7k2p", "readOnly": true, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}],
            "livenessProbe": {"httpGet": {"path": "/healthz", "port": "http", "scheme": "HTTP"}, "periodSeconds": 10, "timeoutSeconds": 1},
            "readinessProbe": {"httpGet": {"path": "/ready", "port": "http", "scheme": "HTTP"}, "periodSeconds": 5, "timeoutSeconds": 1},
        })
    };
    json!({
        "kind": "Pod", "apiVersion": "v1",
        "metadata": {
            "generateName": "web-6d4cf56db6-", "creationTimestamp": null,
            "labels": {"app": "web", "pod-template-hash": "6d4cf56db6"},
            "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "8080"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-6d4cf56db6", "uid": "5a1f27c4-9c2b-4f0e-8f5e-0d1c2b3a4f5e", "controller": true, "blockOwnerDeletion": true}],
        },
        "spec": {
            "volumes": [{"name": "kube-api-access-x7k2p", "projected": {"defaultMode": 420, "sources": [{"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}}]}}],
            "containers": [container("web", 8080), container("cache", 6379)],
            "restartPolicy": "Always", "terminationGracePeriodSeconds": 30, "dnsPolicy": "ClusterFirst", "serviceAccountName": "web",
            "serviceAccount": "web", "securityContext": {}, "schedulerName": "default-scheduler", "preemptionPolicy": "PreemptLowerPriority",
            "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
        },
    })
}

/// The AdmissionReview that asks about it.
pub(crate) fn review(pod: &Value) -> Vec<u8> {
    let review = json!({
        "kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": {"group": "", "version": "v1", "kind": "Pod"}, "resource": {"group": "", "version": "v1", "resource": "pods"},
            "requestKind": {"group": "", "version": "v1", "kind": "Pod"}, "requestResource": {"group": "", "version": "v1", "resource": "pods"},
            "namespace": "shop", "operation": "CREATE",
            "userInfo": {"username": "system:serviceaccount:kube-system:replicaset-controller", "uid": "b7b4", "groups": ["system:serviceaccounts", "system:authenticated"]},
            "object": pod, "oldObject": null, "dryRun": false, "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
        },
    });
    review.to_string().into_bytes()
}
