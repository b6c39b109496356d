//! P2 and P17: the same pod comes out of the injector, of the webhook over HTTP, and of `malha inject` for every kind of
//! workload and both forms of output; and what the webhook says around the patch is what an API server accepts.

use std::{fs, path::Path, process::Command, sync::Arc};

use arc_swap::ArcSwap;
use axum::{body::Body, http::Request};
use malha::{
    inject::{ClusterFacts, Entry, NamespaceFacts},
    webhook::{self, Webhook},
};
use serde_json::{Map, Value, json};
use tower::ServiceExt as _;

use super::{
    POPULATION, SUBJECT,
    annotations::differences,
    answered,
    case::{Case, Outcome, Setup, USUAL},
    injector,
};
use crate::support::review;

/// As `malha inject -n shop` takes the world to be.
const OFFLINE: Setup = Setup {
    oldest_kubelet: None,
    ..USUAL
};

/// Pods of the population that are not refused, as [`OFFLINE`] sees them.
fn accepted(count: usize) -> Vec<Case> {
    let pods = POPULATION.iter().filter_map(|(_, case)| case.as_ref().ok());
    let cases =
        pods.map(|case| answered(&SUBJECT, OFFLINE, case.before.clone()).expect("it was readable"));
    cases
        .filter(|case| !matches!(case.outcome, Outcome::Denied { .. }))
        .take(count)
        .collect()
}

struct Kubelet(Option<u32>);

impl ClusterFacts for Kubelet {
    fn oldest_kubelet(&self) -> Option<u32> {
        self.0
    }
    fn namespace(&self, _: &str) -> Option<NamespaceFacts> {
        None
    }
}

async fn reviewed(setup: Setup, review: &Value) -> Value {
    let router = webhook::router(Webhook {
        injector: Arc::new(ArcSwap::from_pointee(injector())),
        cluster: Arc::new(Kubelet(setup.oldest_kubelet)),
        metrics: webhook::Metrics::default(),
        limits: webhook::Limits::default(),
    });
    let request = Request::post(setup.entry.path("default"))
        .header("content-type", "application/json")
        .body(Body::from(review.to_string()))
        .expect("a request");
    let response = router.oneshot(request).await.expect("infallible");
    assert_eq!(response.status(), 200);
    let body = axum::body::to_bytes(response.into_body(), 1 << 24)
        .await
        .expect("a body");
    serde_json::from_slice(&body).expect("JSON")
}

#[tokio::test]
async fn p02_p17_the_webhook_sends_the_injectors_answer() {
    for (seed, case) in POPULATION.iter().step_by(5) {
        let Ok(case) = case else {
            continue;
        };
        let uid = format!("uid-{seed}-\"\\u00e9\"");
        let mut review = review::of_pod(&uid, case.setup.namespace, &case.before);
        let answer = reviewed(case.setup, &review).await;
        assert_eq!(answer["apiVersion"], "admission.k8s.io/v1", "seed {seed}");
        assert_eq!(answer["kind"], "AdmissionReview", "seed {seed}");
        let response = &answer["response"];
        assert_eq!(response["uid"], uid, "seed {seed}");
        assert_eq!(
            response.get("patch").is_some(),
            response.get("patchType").is_some(),
            "seed {seed}"
        );
        match &case.outcome {
            Outcome::Patched { json, .. } => {
                assert_eq!(response["allowed"], true, "seed {seed}");
                assert_eq!(response["patchType"], "JSONPatch", "seed {seed}");
                let sent = review::patch_of(&answer).expect("a patch");
                assert_eq!(
                    sent,
                    serde_json::from_str::<Value>(json).expect("JSON"),
                    "seed {seed}"
                );
            }
            Outcome::Skipped(_) => {
                assert_eq!(response["allowed"], true, "seed {seed}");
                assert!(response.get("patch").is_none(), "seed {seed}: {response}");
            }
            Outcome::Denied { reason, message } => {
                assert_eq!(response["allowed"], false, "seed {seed}");
                assert!(response.get("patch").is_none(), "seed {seed}: {response}");
                assert_eq!(response["status"]["code"], 400, "seed {seed}");
                let said = response["status"]["message"].as_str().expect("words");
                assert!(said.contains(message.as_str()), "seed {seed}: {said}");
                assert!(
                    response["status"].to_string().contains(reason.as_str()),
                    "seed {seed}: {response}"
                );
            }
        }
        for warning in response["warnings"].as_array().into_iter().flatten() {
            let text = warning.as_str().expect("text");
            assert!(text.chars().count() <= 120, "seed {seed}: {text}");
        }
        // a dry run gets the same bytes
        review["request"]["dryRun"] = json!(true);
        assert_eq!(reviewed(case.setup, &review).await, answer, "seed {seed}");
    }
}

/// `malha inject` of a file; both streams.
fn inject(directory: &Path, input: &str, output: &str) -> String {
    let file = directory.join("input.json");
    fs::write(&file, input).expect("a file");
    let ended = Command::new(env!("CARGO_BIN_EXE_malha"))
        .args(["inject", "-n", "shop", "-o", output, "-f"])
        .arg(&file)
        .output()
        .expect("malha runs");
    assert!(
        ended.status.success(),
        "{}: {}",
        ended.status,
        String::from_utf8_lossy(&ended.stderr)
    );
    String::from_utf8(ended.stdout).expect("text")
}

fn list(items: impl IntoIterator<Item = Value>) -> Value {
    json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": items.into_iter().collect::<Vec<_>>()})
}

#[test]
fn p17_malha_inject_gives_the_webhooks_pods() {
    let directory = tempfile::tempdir().expect("a directory");
    let cases = accepted(300);
    assert!(
        cases.iter().filter(|case| case.is_patched()).count() > 200,
        "too few are injected"
    );
    let input = list(cases.iter().map(|case| case.before.clone())).to_string();
    for (output, read) in [
        ("json", read_json as fn(&str) -> Value),
        ("yaml", read_yaml),
    ] {
        let given = read(&inject(directory.path(), &input, output));
        let items = given["items"].as_array().expect("a list");
        assert_eq!(items.len(), cases.len());
        for (item, case) in items.iter().zip(&cases) {
            same(item, &case.after, output);
        }
    }
}

/// Equal, or the first few differences.
fn same(given: &Value, wanted: &Value, what: &str) {
    let mut found = differences(given, wanted);
    found.truncate(3);
    let shown = found.iter().map(|path| {
        let pointer = path.replace("malha.io/status", "malha.io~1status");
        format!(
            "{path}: {:?} instead of {:?}",
            given.pointer(&pointer),
            wanted.pointer(&pointer)
        )
    });
    assert!(
        found.is_empty(),
        "{what}: {}\nin {wanted}",
        shown.collect::<Vec<_>>().join("\n")
    );
}

fn read_json(text: &str) -> Value {
    serde_json::from_str(text).expect("one JSON object")
}

fn read_yaml(text: &str) -> Value {
    serde_saphyr::from_str(text).expect("one YAML document")
}

/// A kind of workload: its API version, kind, where its template stands, and what its pods carry.
type Kind = (
    &'static str,
    &'static str,
    &'static [&'static str],
    fn(&mut Map<String, Value>),
);

const KINDS: [Kind; 7] = [
    ("apps/v1", "Deployment", &["template"], |pod| {
        pod.insert("generateName".into(), json!("web-6d4cf56db6-"));
        pod.insert(
            "ownerReferences".into(),
            owner("apps/v1", "ReplicaSet", "web-6d4cf56db6"),
        );
    }),
    ("apps/v1", "ReplicaSet", &["template"], |pod| {
        pod.insert("generateName".into(), json!("web-"));
        pod.insert(
            "ownerReferences".into(),
            owner("apps/v1", "ReplicaSet", "web"),
        );
    }),
    ("apps/v1", "StatefulSet", &["template"], |pod| {
        pod.insert("name".into(), json!("web-0"));
        pod.insert(
            "ownerReferences".into(),
            owner("apps/v1", "StatefulSet", "web"),
        );
    }),
    ("apps/v1", "DaemonSet", &["template"], |pod| {
        pod.insert("generateName".into(), json!("web-"));
        pod.insert(
            "ownerReferences".into(),
            owner("apps/v1", "DaemonSet", "web"),
        );
    }),
    ("v1", "ReplicationController", &["template"], |pod| {
        pod.insert("generateName".into(), json!("web-"));
        pod.insert(
            "ownerReferences".into(),
            owner("v1", "ReplicationController", "web"),
        );
    }),
    ("batch/v1", "Job", &["template"], |pod| {
        pod.insert("generateName".into(), json!("web-"));
        pod.insert("ownerReferences".into(), owner("batch/v1", "Job", "web"));
    }),
    (
        "batch/v1",
        "CronJob",
        &["jobTemplate", "spec", "template"],
        |pod| {
            pod.insert("generateName".into(), json!("web-29361600-"));
            pod.insert(
                "ownerReferences".into(),
                owner("batch/v1", "Job", "web-29361600"),
            );
        },
    ),
];

fn owner(api_version: &str, kind: &str, name: &str) -> Value {
    json!([{"apiVersion": api_version, "kind": kind, "name": name, "uid": "u", "controller": true}])
}

/// A workload's template, and the pod that its controller makes of it, end in the same spec.
#[test]
fn p17_a_template_is_given_what_its_pods_would_get() {
    let directory = tempfile::tempdir().expect("a directory");
    let (mut workloads, mut wanted) = (Vec::new(), Vec::new());
    for (number, case) in accepted(210).into_iter().enumerate() {
        let (api_version, kind, place, controlled) = KINDS[number % KINDS.len()];
        let mut template = case.before;
        let metadata = template["metadata"]
            .as_object_mut()
            .expect("the generator gives it");
        metadata.retain(|key, _| ["labels", "annotations"].contains(&key.as_str()));
        if metadata.get("labels").is_none_or(Value::is_null) {
            metadata.insert("labels".into(), json!({}));
        }
        // the hash that a Deployment's controller adds, and no other
        let labels = metadata["labels"].as_object_mut().expect("labels");
        labels.shift_remove("pod-template-hash");
        let mut pod = template.clone();
        if kind == "Deployment" {
            pod["metadata"]["labels"]["pod-template-hash"] = json!("6d4cf56db6");
        }
        controlled(pod["metadata"].as_object_mut().expect("metadata"));
        wanted.push(answered(&SUBJECT, OFFLINE, pod).expect("readable"));
        let nested = place
            .iter()
            .rev()
            .fold(template, |inner, step| json!({*step: inner}));
        workloads.push(json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": "web"}, "spec": nested}));
    }
    let given = read_json(&inject(
        directory.path(),
        &list(workloads.clone()).to_string(),
        "json",
    ));
    let items = given["items"].as_array().expect("a list");
    assert_eq!(items.len(), wanted.len());
    let mut patched = 0;
    for (number, (item, case)) in items.iter().zip(&wanted).enumerate() {
        let (_, kind, place, _) = KINDS[number % KINDS.len()];
        patched += usize::from(case.is_patched());
        let template = place
            .iter()
            .fold(&item["spec"], |inner, step| &inner[*step]);
        same(&template["spec"], &case.after["spec"], kind);
        for key in [
            "malha.io/status",
            "prometheus.io/port",
            "kubectl.kubernetes.io/default-container",
        ] {
            let (left, right) = (
                &template["metadata"]["annotations"][key],
                &case.after["metadata"]["annotations"][key],
            );
            assert_eq!(left, right, "{kind} {key}: {case}");
        }
        // and nothing else of the workload changed
        let mut rest = item.clone();
        let own = place
            .iter()
            .fold(&mut rest["spec"], |inner, step| &mut inner[*step]);
        *own = place
            .iter()
            .fold(&workloads[number]["spec"], |inner, step| &inner[*step])
            .clone();
        assert_eq!(rest, workloads[number], "{kind}");
    }
    assert!(patched > 150, "only {patched} are injected");
}

#[test]
fn p17_other_kinds_pass_as_they_are() {
    let directory = tempfile::tempdir().expect("a directory");
    let others = [
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"spec": "{{ }}\n", "n": "0x10"}}),
        json!({"apiVersion": "example.com/v1", "kind": "Deployment", "spec": {"template": {"spec": {"containers": [{"name": "x"}]}}}}),
        json!({"apiVersion": "v1", "kind": "PodTemplate", "template": {"spec": {"containers": [{"name": "x"}]}}}),
    ];
    let given = read_json(&inject(
        directory.path(),
        &list(others.clone()).to_string(),
        "json",
    ));
    assert_eq!(
        given["items"].as_array().map(Vec::as_slice),
        Some(&others[..])
    );
}

/// Documents of one stream keep their order, and what is not ours keeps its text.
#[test]
fn p17_many_documents_stay_many() {
    let directory = tempfile::tempdir().expect("a directory");
    let text = "# first\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio-injection: enabled}}\n---\n\
                apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: app, image: 'a:1'}]}\n---\n\
                apiVersion: v1\nkind: Service # kept\nmetadata: {name: web}\n";
    let given = inject(directory.path(), text, "yaml");
    let documents: Vec<&str> = given.split("\n---\n").collect();
    assert_eq!(documents.len(), 3, "{given}");
    assert!(
        documents[0].contains("# first") && documents[2].contains("Service # kept"),
        "{given}"
    );
    let pod = read_yaml(documents[1]);
    let wanted = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": {"containers": [{"name": "app", "image": "a:1"}]}});
    let wanted = answered(
        &SUBJECT,
        Setup {
            entry: Entry::Namespace,
            ..OFFLINE
        },
        wanted,
    )
    .expect("readable");
    assert_eq!(pod, wanted.after);
}
