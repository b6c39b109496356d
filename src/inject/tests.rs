//! The injector as its callers see it: a pod goes in, the patched pod or the refusal comes out.

mod again;
mod around;
mod containers;
mod gates;
mod handlers;
mod metadata;
mod order;
mod shares;
mod wishes;

use serde_json::{Value, json};

use super::*;

fn call() -> Call<'static> {
    Call {
        entry: Entry::Namespace,
        namespace: "shop",
        oldest_kubelet: None,
    }
}

fn on_kubelet(minor: u32) -> Call<'static> {
    Call {
        oldest_kubelet: Some(minor),
        ..call()
    }
}

fn with(overrides: &str) -> Injector {
    Injector::new(InjectSettings::merged(overrides).expect("good settings"))
}

fn answer(injector: &Injector, pod: &Value) -> Answer {
    injector
        .inject(pod.to_string().as_bytes(), &call())
        .expect("a readable pod")
}

/// The pod after the patch; the patch must be there and must apply.
fn patched(injector: &Injector, pod: &Value) -> Value {
    apply(pod, &answer(injector, pod))
}

fn apply(pod: &Value, answer: &Answer) -> Value {
    let Verdict::Patch(patch) = &answer.verdict else {
        panic!("no patch: {:?}", answer.verdict);
    };
    let operations: json_patch::Patch = serde_json::from_slice(&patch.json).expect("a patch");
    let mut pod = pod.clone();
    json_patch::patch(&mut pod, &operations).expect("it applies");
    pod
}

fn reason(injector: &Injector, pod: &Value) -> Reason {
    answer(injector, pod).verdict.reason()
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(|item| item["name"].as_str())
        .collect()
}

fn item<'v>(list: &'v Value, name: &str) -> &'v Value {
    let mut items = list.as_array().into_iter().flatten();
    items
        .find(|item| item["name"] == name)
        .unwrap_or(&Value::Null)
}

/// The sidecar, wherever it stands.
fn proxy(pod: &Value) -> &Value {
    match item(&pod["spec"]["initContainers"], "malha-proxy") {
        Value::Null => item(&pod["spec"]["containers"], "malha-proxy"),
        native => native,
    }
}

fn init(pod: &Value) -> &Value {
    item(&pod["spec"]["initContainers"], "malha-init")
}

fn variable(pod: &Value, name: &str) -> String {
    item(&proxy(pod)["env"], name)["value"]
        .as_str()
        .unwrap_or("absent")
        .to_owned()
}

fn records(pod: &Value) -> Value {
    serde_json::from_str(&variable(pod, "MALHA_PROBES")).expect("records")
}

fn capture(pod: &Value) -> Value {
    serde_json::from_str(init(pod)["args"][0].as_str().expect("an argument"))
        .expect("the argument is JSON")
}

fn codes(answer: &Answer) -> Vec<WarningCode> {
    answer.warnings.iter().map(|warning| warning.code).collect()
}

fn pod() -> Value {
    json!({"metadata": {"generateName": "web-"}, "spec": {"containers": [{"name": "app", "image": "app:1"}]}})
}

/// The plain pod with `value` at `pointer`, whose parents are made.
fn pod_with(pointer: &str, value: Value) -> Value {
    let mut pod = pod();
    put(&mut pod, pointer, value);
    pod
}

fn put(pod: &mut Value, pointer: &str, value: Value) {
    let mut at = pod;
    for token in pointer.split('/').skip(1) {
        let token = token.replace("~1", "/");
        at = match token.parse::<usize>() {
            Ok(index) => {
                let list = at.as_array_mut().expect("a list");
                list.resize(list.len().max(index + 1), Value::Null);
                &mut list[index]
            }
            Err(_) => &mut at[token.as_str()],
        };
    }
    *at = value;
}

fn annotated(pairs: &[(&str, &str)]) -> Value {
    let map = pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), json!(value)))
        .collect();
    pod_with("/metadata/annotations", Value::Object(map))
}

fn message(injector: &Injector, pod: &Value) -> (Reason, String) {
    match answer(injector, pod).verdict {
        Verdict::Deny(denial) => (Reason::from(denial.reason), denial.message),
        other => panic!("not refused: {other:?}"),
    }
}

/// Nulls, empty lists and empty objects are as good as absent.
fn normal(value: &Value) -> Value {
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    match value {
        Value::Object(map) => {
            let kept = map.iter().map(|(key, value)| (key.clone(), normal(value)));
            Value::Object(kept.filter(|(_, value)| !empty(value)).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(normal).collect()),
        other => other.clone(),
    }
}

/// What must hold of every pod that is patched.
fn holds(injector: &Injector, pod: &Value, call: &Call<'_>) -> Value {
    let first = injector
        .inject(pod.to_string().as_bytes(), call)
        .expect("a readable pod");
    let injected = apply(pod, &first);
    let second = injector
        .inject(injected.to_string().as_bytes(), call)
        .expect("a readable pod");
    assert_eq!(
        second.verdict.reason(),
        Reason::AlreadyInjected,
        "a second call changes {pod}"
    );
    let mut restored = injected.clone();
    assert!(uninject::uninject(&mut restored).expect("readable records"));
    assert_eq!(normal(&restored), normal(pod), "it can be taken back");
    for warning in &first.warnings {
        assert!(
            warning.text.chars().count() <= Warning::LONGEST,
            "{}",
            warning.text
        );
    }
    injected
}
