//! AdmissionReviews as the API server sends them.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

/// A request for the creation of `pod` in `namespace`.
pub(crate) fn of_pod(uid: &str, namespace: &str, pod: &Value) -> Value {
    json!({
        "kind": "AdmissionReview",
        "apiVersion": "admission.k8s.io/v1",
        "request": {
            "uid": uid,
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "requestKind": {"group": "", "version": "v1", "kind": "Pod"},
            "requestResource": {"group": "", "version": "v1", "resource": "pods"},
            "name": pod["metadata"]["name"].as_str().unwrap_or(""),
            "namespace": namespace,
            "operation": "CREATE",
            "userInfo": {"username": "kubernetes-admin", "groups": ["system:masters", "system:authenticated"]},
            "object": pod,
            "oldObject": null,
            "dryRun": false,
            "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
        },
    })
}

/// The operations of a review's answer; `None` where it carries no patch.
pub(crate) fn patch_of(answer: &Value) -> Option<Value> {
    let encoded = answer["response"]["patch"].as_str()?;
    let json = STANDARD.decode(encoded).expect("the patch is base64");
    Some(serde_json::from_slice(&json).expect("the patch is JSON"))
}
