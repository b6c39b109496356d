//! Pods made by hand to mislead: forged claims, lists that hold what lists should not, JSON that two readers would read
//! differently.

use malha::inject::{Call, DenyReason, Reason, SkipReason};
use serde_json::{Value, json};

use super::{
    SUBJECT, answered,
    case::{Case, Outcome, Setup, Subject, USUAL},
    checked, checks,
    expected::{PROXY, containers, list},
};

/// A pod with one of everything that the injector reads.
pub(crate) fn rich() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "futureTop": {"a": [1, null]},
        "metadata": {
            "generateName": "web-6d4cf56db6-", "labels": {"app": "web", "pod-template-hash": "6d4cf56db6"},
            "annotations": {
                "example.com/note": "keep \"me\"\n", "prometheus.io/scrape": "true", "prometheus.io/port": "8080", "prometheus.io/path": "/m",
                "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes": "data", "sidecar.istio.io/proxyImage": "x",
                "malha.io/run-before": "first",
            },
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-6d4cf56db6", "uid": "u", "controller": true}],
        },
        "spec": {
            "serviceAccountName": "default", "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "futureField": {"deep": [{}]},
            "tolerations": [{"key": "a", "operator": "Exists"}], "imagePullSecrets": [{"name": "registry"}],
            "securityContext": {"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "volumes": [{"name": "data", "emptyDir": {}, "futureField": 1}],
            "initContainers": [
                {"name": "first", "image": "i:1", "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}},
                {"name": "sidecar", "image": "s:1", "restartPolicy": "Always", "ports": [{"name": "adm", "containerPort": 9100}],
                 "readinessProbe": {"tcpSocket": {"port": "adm", "futureField": true}, "periodSeconds": 3},
                 "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}},
            ],
            "containers": [
                {"name": "app", "image": "app:1", "ports": [{"name": "http", "containerPort": 8080}], "env": [{"name": "A", "value": "{{ }}"}],
                 "volumeMounts": [{"name": "data", "mountPath": "/data"}], "futureField": null, "futureToo": "x",
                 "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
                 "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                 "livenessProbe": {"httpGet": {"port": "http", "path": "/live", "httpHeaders": [{"name": "X-A", "value": "b"}]},
                                   "periodSeconds": 7, "timeoutSeconds": 3, "terminationGracePeriodSeconds": 9},
                 "readinessProbe": {"exec": {"command": ["true"]}}, "startupProbe": {"grpc": {"port": 9000, "service": "s"}},
                 "lifecycle": {"preStop": {"httpGet": {"port": 8080, "path": "/stop"}}, "postStart": {"exec": {"command": ["id"]}}}},
                {"name": "second", "image": "b:1", "livenessProbe": {"httpGet": {"port": "nowhere"}},
                 "readinessProbe": {"httpGet": {"port": 80, "host": "example.com"}},
                 "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}},
            ],
        },
    })
}

fn injected(pod: &Value) -> Case {
    let case =
        answered(&SUBJECT, USUAL, pod.clone()).unwrap_or_else(|fault| panic!("{fault}\n{pod}"));
    assert!(case.is_patched(), "{case}");
    case
}

fn all_checks(case: &Case) {
    for (name, check) in super::CHECKS {
        checked(*check, &SUBJECT, case).unwrap_or_else(|fault| panic!("{name}: {fault}\n{case}"));
    }
}

#[test]
fn the_rich_pod_has_every_property() {
    all_checks(&injected(&rich()));
}

#[test]
fn s12_a_forged_status_skips_nothing_and_removes_nothing() {
    let honest = injected(&rich());
    let claims = [
        json!({"malha.io/status": honest.after["metadata"]["annotations"]["malha.io/status"]}),
        json!({"malha.io/status": "{\"containers\":[\"app\",\"second\"],\"initContainers\":[\"first\"],\"volumes\":[\"data\"]}"}),
        json!({"sidecar.istio.io/status": "{\"initContainers\":[\"app\"],\"containers\":[\"istio-proxy\",\"app\"],\"volumes\":[\"data\"],\"revision\":\"default\"}"}),
        json!({"malha.io/status": "\u{0}", "sidecar.istio.io/status": "]"}),
    ];
    for claim in claims {
        let mut pod = rich();
        for (key, value) in claim.as_object().expect("made above") {
            pod["metadata"]["annotations"][key] = value.clone();
        }
        let case = injected(&pod);
        assert_eq!(
            without_restore(&case.after),
            without_restore(&honest.after),
            "{claim}"
        );
        // and claimed between two calls: nothing is taken away on its word
        let mut between = honest.after.clone();
        for (key, value) in claim.as_object().expect("made above") {
            between["metadata"]["annotations"][key] = value.clone();
        }
        let again = answered(&SUBJECT, USUAL, between).expect("readable");
        assert_eq!(
            without_restore(&again.after),
            without_restore(&honest.after),
            "{claim}"
        );
    }
}

/// The spec but for the note of what `uninject` must take back, which rightly depends on what was there.
fn without_restore(pod: &Value) -> Value {
    let mut spec = pod["spec"].clone();
    for container in spec["initContainers"].as_array_mut().into_iter().flatten() {
        if let Some(variables) = container["env"].as_array_mut() {
            variables.retain(|variable| variable["name"] != "MALHA_RESTORE");
        }
    }
    spec
}

#[test]
fn one_of_ours_alone_or_a_strange_one_is_a_conflict() {
    let both = |variables: Value| {
        let mut pod = rich();
        pod["spec"]["initContainers"] = json!([
            {"name": "malha-init", "image": "x"}, {"name": "malha-proxy", "image": "x", "restartPolicy": "Always", "env": variables},
        ]);
        pod
    };
    let mut proxy_alone = rich();
    proxy_alone["spec"]["containers"][1]["name"] = json!("malha-proxy");
    let mut init_alone = rich();
    init_alone["spec"]["initContainers"][0]["name"] = json!("malha-init");
    init_alone["metadata"]["annotations"] = json!({});
    let mut volume = rich();
    volume["spec"]["volumes"][0]["name"] = json!("malha-token");
    for (what, pod) in [
        ("the proxy alone", proxy_alone),
        ("the init container alone", init_alone),
        ("a volume of ours with another source", volume),
        ("ours without a record", both(json!([]))),
        (
            "ours with a record that is no JSON",
            both(json!([{"name": "MALHA_PROBES", "value": "{{"}])),
        ),
        (
            "ours with a record that is a list",
            both(json!([{"name": "MALHA_PROBES", "value": "[]"}])),
        ),
    ] {
        let case = answered(&SUBJECT, USUAL, pod).expect("readable");
        let conflict = matches!(
            &case.outcome,
            Outcome::Denied {
                reason: DenyReason::NameConflict,
                ..
            }
        );
        assert!(conflict, "{what}: {case}");
    }
}

#[test]
fn a_second_webhooks_container_gets_its_probe_rewritten_and_recorded() {
    for (field, at) in [("containers", 0), ("containers", 2), ("initContainers", 4)] {
        let first = injected(&rich());
        let mut between = first.after.clone();
        let mut container = json!({"name": "late", "image": "l:1", "ports": [{"name": "p", "containerPort": 7000}],
            "readinessProbe": {"httpGet": {"port": "p", "path": "/late"}}, "securityContext": {"privileged": true}});
        if field == "initContainers" {
            container["restartPolicy"] = json!("Always");
        }
        between["spec"][field]
            .as_array_mut()
            .expect("a list")
            .insert(at, container);
        let again = injected(&between);
        assert!(
            matches!(
                again.outcome,
                Outcome::Patched {
                    reason: Reason::Reinvoked,
                    ..
                }
            ),
            "{again}"
        );
        let late = containers(&again.after)
            .find(|container| container["name"] == "late")
            .expect("kept");
        assert_eq!(
            late["readinessProbe"]["httpGet"]["path"], "/app-health/late/readyz",
            "{field} {at}"
        );
        assert_eq!(
            checks::record(&again.after).expect("a record")["/app-health/late/readyz"]["httpGet"]["port"],
            7000
        );
        let third = answered(&SUBJECT, USUAL, again.after.clone()).expect("readable");
        assert_eq!(
            third.outcome,
            Outcome::Skipped(SkipReason::AlreadyInjected),
            "{third}"
        );
    }
}

#[test]
fn sixty_four_containers_are_as_good_as_one() {
    let mut pod = rich();
    let template = pod["spec"]["containers"][0].clone();
    let list = pod["spec"]["containers"].as_array_mut().expect("a list");
    for number in 2..64 {
        let mut container = template.clone();
        container["name"] = json!(format!("c-{number}"));
        list.push(container);
    }
    all_checks(&injected(&pod));
}

#[test]
fn lists_that_hold_nulls_and_scalars_keep_them() {
    for odd in [
        json!(null),
        json!(7),
        json!("text"),
        json!([]),
        json!({}),
        json!({"name": null}),
        json!({"name": 7}),
    ] {
        for field in [
            "containers",
            "initContainers",
            "volumes",
            "imagePullSecrets",
        ] {
            for at in [0, 1] {
                let mut pod = rich();
                pod["spec"][field]
                    .as_array_mut()
                    .expect("a list")
                    .insert(at, odd.clone());
                let case = answered(&SUBJECT, USUAL, pod)
                    .unwrap_or_else(|fault| panic!("{field} {odd}: {fault}"));
                let kept: Vec<&Value> = list(&case.after["spec"][field])
                    .filter(|item| **item == odd)
                    .collect();
                assert_eq!(kept.len(), 1, "{field} at {at}: {odd}: {case}");
                if case.is_patched() {
                    let proxies = containers(&case.after)
                        .filter(|container| container["name"] == PROXY)
                        .count();
                    assert_eq!(proxies, 1, "{field} at {at}: {odd}: {case}");
                }
            }
        }
    }
}

/// Each value of the rich pod replaced by each kind of nonsense: whatever is decided, nothing breaks and nothing is lost.
#[test]
fn nonsense_anywhere_breaks_nothing() {
    let nonsense = [
        json!(null),
        json!(true),
        json!(-1),
        json!(u64::MAX),
        json!(1.5e308),
        json!(""),
        json!("{{\u{0}}}\n\"~/"),
        json!([]),
        json!([null]),
        json!([[]]),
        json!({}),
        json!({"": null}),
        json!([{"name": "malha-proxy"}]),
    ];
    let mut pointers = Vec::new();
    pointers_into("", &rich(), &mut pointers);
    assert!(
        pointers.len() > 150,
        "the rich pod has become poor: {}",
        pointers.len()
    );
    for pointer in pointers {
        for value in &nonsense {
            let mut pod = rich();
            *pod.pointer_mut(&pointer).expect("a pointer into it") = value.clone();
            let case = answered(&SUBJECT, USUAL, pod)
                .unwrap_or_else(|fault| panic!("{pointer} = {value}: {fault}"));
            for (name, check) in [
                ("refusal", checks::refusals_help as checks::Check),
                ("P12", checks::p12_strangers_are_left_alone),
            ] {
                checked(check, &SUBJECT, &case)
                    .unwrap_or_else(|fault| panic!("{pointer} = {value}: {name}: {fault}\n{case}"));
            }
        }
    }
}

fn pointers_into(at: &str, value: &Value, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(fields) => {
            for (key, field) in fields {
                pointers_into(
                    &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")),
                    field,
                    found,
                );
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                pointers_into(&format!("{at}/{index}"), item, found);
            }
        }
        _ => {}
    }
}

#[test]
fn absent_parents_are_made_or_the_pod_is_left_alone() {
    for gone in [
        "/metadata",
        "/metadata/labels",
        "/metadata/annotations",
        "/spec/volumes",
        "/spec/initContainers",
        "/spec/imagePullSecrets",
    ] {
        for value in [None, Some(json!(null)), Some(json!({})), Some(json!([]))] {
            let mut pod = rich();
            pod["metadata"]["annotations"] = json!({});
            let (parent, key) = gone.rsplit_once('/').expect("a pointer");
            let parent = pod
                .pointer_mut(parent)
                .expect("there")
                .as_object_mut()
                .expect("an object");
            match &value {
                None => {
                    parent.shift_remove(key);
                }
                Some(value) => {
                    parent.insert(key.to_owned(), value.clone());
                }
            }
            let case = answered(&SUBJECT, USUAL, pod)
                .unwrap_or_else(|fault| panic!("{gone} = {value:?}: {fault}"));
            let right_kind = match &value {
                Some(Value::Object(_)) => gone.starts_with("/metadata"),
                Some(Value::Array(_)) => gone.starts_with("/spec"),
                _ => true,
            };
            assert!(
                case.is_patched() || !right_kind,
                "{gone} = {value:?}: {case}"
            );
        }
    }
}

// -- JSON that two readers would read differently --

fn raw(subject: &Subject, setup: Setup, bytes: &[u8]) -> Result<String, String> {
    let call = Call {
        entry: setup.entry,
        namespace: setup.namespace,
        oldest_kubelet: setup.oldest_kubelet,
    };
    (subject.inject)(bytes, &call)
        .map(|answer| format!("{:?}", answer.verdict))
        .map_err(|fault| fault.to_string())
}

#[test]
fn blanks_and_escapes_make_no_difference() {
    let plain = rich().to_string();
    let wanted = raw(&SUBJECT, USUAL, plain.as_bytes()).expect("readable");
    let pretty = format!(
        " \r\n\t{}\n ",
        serde_json::to_string_pretty(&rich()).expect("JSON")
    );
    assert_eq!(
        raw(&SUBJECT, USUAL, pretty.as_bytes()).expect("readable"),
        wanted
    );
    // every letter in every string written as an escape
    let mut escaped = String::new();
    let mut inside = false;
    let mut characters = plain.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => {
                inside = !inside;
                escaped.push('"');
            }
            '\\' => {
                escaped.push('\\');
                escaped.extend(characters.next());
            }
            letter if inside && letter.is_ascii_alphabetic() => {
                escaped.push_str(&format!("\\u{:04x}", u32::from(letter)))
            }
            other => escaped.push(other),
        }
    }
    let read: Value = serde_json::from_str(&escaped).expect("still JSON");
    assert_eq!(read, rich(), "the test's own escaping");
    assert_eq!(
        raw(&SUBJECT, USUAL, escaped.as_bytes()).expect("readable"),
        wanted
    );
}

#[test]
fn a_key_that_stands_twice_is_not_guessed_at() {
    let pod = rich().to_string();
    for (what, twice) in [
        (
            "spec",
            pod.replacen(
                "\"spec\":",
                "\"spec\":{\"containers\":[{\"name\":\"other\"}]},\"spec\":",
                1,
            ),
        ),
        (
            "spec, escaped",
            pod.replacen(
                "\"spec\":",
                "\"sp\\u0065c\":{\"containers\":[]},\"spec\":",
                1,
            ),
        ),
        (
            "metadata",
            pod.replacen("\"metadata\":", "\"metadata\":{},\"metadata\":", 1),
        ),
        (
            "annotations",
            pod.replacen(
                "\"annotations\":",
                "\"annotations\":null,\"annotations\":",
                1,
            ),
        ),
        (
            "an annotation",
            pod.replacen(
                "\"malha.io/run-before\":",
                "\"malha.io/run-before\":\"x\",\"malha.io/run-before\":",
                1,
            ),
        ),
        (
            "containers",
            pod.replacen("\"containers\":", "\"containers\":[],\"containers\":", 1),
        ),
        (
            "a container's name",
            pod.replacen("\"name\":\"app\"", "\"name\":\"x\",\"name\":\"app\"", 1),
        ),
        (
            "hostNetwork",
            pod.replacen(
                "\"dnsPolicy\":",
                "\"hostNetwork\":true,\"hostNetwork\":false,\"dnsPolicy\":",
                1,
            ),
        ),
    ] {
        assert_ne!(twice, pod, "{what}: the test's own replacement");
        let answer = raw(&SUBJECT, USUAL, twice.as_bytes());
        assert!(answer.is_err(), "{what}: {answer:?}");
    }
}

#[test]
fn what_is_not_one_json_value_is_refused() {
    let pod = rich().to_string();
    let mut invalid = pod.clone().into_bytes();
    let at = invalid
        .windows(4)
        .position(|four| four == b"keep")
        .expect("in it");
    invalid[at] = 0xff;
    for (what, bytes) in [
        ("nothing", Vec::new()),
        (
            "a byte order mark",
            [b"\xef\xbb\xbf", pod.as_bytes()].concat(),
        ),
        ("something after it", format!("{pod}x").into_bytes()),
        ("two of them", format!("{pod}{pod}").into_bytes()),
        ("half of it", pod.as_bytes()[..pod.len() / 2].to_vec()),
        ("invalid UTF-8", invalid),
        (
            "UTF-16",
            pod.encode_utf16().flat_map(u16::to_le_bytes).collect(),
        ),
    ] {
        let answer = raw(&SUBJECT, USUAL, &bytes);
        assert!(answer.is_err(), "{what}: {answer:?}");
    }
    for not_a_pod in [
        "null",
        "[]",
        "7",
        "\"pod\"",
        "{}",
        "{\"spec\":null}",
        "{\"spec\":[]}",
        "{\"spec\":{\"containers\":{}}}",
    ] {
        let answer = raw(&SUBJECT, USUAL, not_a_pod.as_bytes());
        let left_alone = answer
            .as_ref()
            .map_or(true, |verdict| verdict.contains("InvalidPod"));
        assert!(left_alone, "{not_a_pod}: {answer:?}");
    }
}

#[test]
fn depth_and_size_of_what_is_not_read_do_no_harm() {
    let pod = rich().to_string();
    let with = |value: &str| {
        pod.replacen(
            "\"futureTop\":",
            &format!("\"deep\":{value},\"futureTop\":"),
            1,
        )
    };
    for depth in [100, 127, 128, 1_000, 200_000] {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let middle = if open == "[" { "" } else { "1" };
            let value = format!("{}{middle}{}", open.repeat(depth), close.repeat(depth));
            let _ = raw(&SUBJECT, USUAL, with(&value).as_bytes());
            let _ = raw(&SUBJECT, USUAL, with(&open.repeat(depth)).as_bytes());
        }
    }
    for number in [
        "1e999",
        "-0",
        "1e-999",
        &"9".repeat(10_000),
        "0.1e+5",
        "-1.0",
    ] {
        let _ = raw(&SUBJECT, USUAL, with(number).as_bytes());
    }
    for text in [
        "\"\\ud800\"",
        "\"\\udc00\\ud800\"",
        "\"\\u0000\"",
        "\"\\ud83e\\udd80\"",
    ] {
        let _ = raw(&SUBJECT, USUAL, with(text).as_bytes());
    }
}
