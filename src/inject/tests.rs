//! The injector as its callers see it: a pod goes in, the patched pod or the refusal comes out.

use serde_json::{Value, json};

use super::*;

fn call() -> Call<'static> {
    Call {
        entry: Entry::Namespace,
        namespace: "shop",
        oldest_kubelet: None,
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

fn pod() -> Value {
    json!({"metadata": {"generateName": "web-"}, "spec": {"containers": [{"name": "app", "image": "app:1"}]}})
}

#[test]
fn a_plain_pod_gets_both_containers_and_the_volumes_in_native_order() {
    let injected = patched(&Injector::default(), &pod());
    assert_eq!(
        names(&injected["spec"]["initContainers"]),
        ["malha-init", "malha-proxy"]
    );
    assert_eq!(names(&injected["spec"]["containers"]), ["app"]);
    assert_eq!(names(&injected["spec"]["volumes"]), ours::VOLUMES);
    assert_eq!(
        injected["spec"]["initContainers"][1]["restartPolicy"],
        "Always"
    );
    assert_eq!(
        reason(&Injector::default(), &injected),
        Reason::AlreadyInjected
    );
}

#[test]
fn an_injection_can_be_taken_back() {
    let mut injected = patched(&Injector::default(), &pod());
    assert!(uninject::uninject(&mut injected).expect("readable records"));
    assert_eq!(injected, pod());
}
