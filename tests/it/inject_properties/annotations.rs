//! P20 and the forging of structure: every annotation with every kind of bad value gets an explicit answer, and a text
//! of the user's changes the one field it is meant for, or nothing.

use malha::inject::{DenyReason, WarningCode};
use serde_json::{Value, json};

use super::{
    SUBJECT, answered,
    case::{Case, Outcome, USUAL},
    strict,
};
use crate::pods::{ANNOTATIONS, IGNORED, ODD_TEXTS, REFUSED};

fn pod_with(key: &str, value: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "annotations": {key: value}},
        "spec": {
            "containers": [{"name": "app", "image": "app:1", "readinessProbe": {"httpGet": {"port": 8080}}}],
            "initContainers": [{"name": "prepare", "image": "app:1"}],
        },
    })
}

fn ask(key: &str, value: &str) -> Case {
    answered(&SUBJECT, USUAL, pod_with(key, value))
        .unwrap_or_else(|fault| panic!("{key}: {value:?}: {fault}"))
}

/// Newline, quotes, template, NUL, control, 4 KiB and one, 10 KiB, and all the odd texts.
fn hostile() -> Vec<String> {
    let mut values: Vec<String> = ODD_TEXTS.iter().map(|text| (*text).to_owned()).collect();
    values.extend(
        [
            "\u{0}",
            "a\u{0}b",
            "true\n",
            "\r\n",
            "\u{1b}[31m",
            "\u{202e}",
            "1,\n2",
            "'",
            "\"",
            "{{",
            "}}",
            "$(id)",
        ]
        .map(str::to_owned),
    );
    values.extend([4_097, 10_240].map(|length| "x".repeat(length)));
    values.push("8,".repeat(5_120));
    values.push("9".repeat(400));
    values
}

#[test]
fn p20_every_bad_value_is_refused_by_name() {
    for annotation in ANNOTATIONS {
        for bad in annotation.bad {
            let case = ask(annotation.key, bad);
            let Outcome::Denied { reason, message } = &case.outcome else {
                panic!("{}: {bad:?} was accepted: {case}", annotation.key);
            };
            assert_eq!(
                *reason,
                DenyReason::InvalidAnnotation,
                "{}: {bad:?}",
                annotation.key
            );
            names_the_culprit(annotation.key, bad, message);
        }
    }
}

#[test]
fn every_good_value_is_accepted() {
    for annotation in ANNOTATIONS {
        for good in annotation.good {
            let case = ask(annotation.key, good);
            assert!(case.is_patched(), "{}: {good:?}: {case}", annotation.key);
        }
    }
    assert!(ask("malha.io/run-before", "prepare").is_patched());
    assert!(ask("inject.istio.io/templates", "sidecar").is_patched());
}

#[test]
fn p20_what_would_change_traffic_is_refused() {
    for (key, value) in REFUSED {
        let case = ask(key, value);
        let Outcome::Denied { reason, message } = &case.outcome else {
            panic!("{key}: {value:?} was accepted: {case}");
        };
        assert_eq!(
            *reason,
            DenyReason::UnsupportedAnnotation,
            "{key}: {value:?}"
        );
        names_the_culprit(key, value, message);
    }
}

#[test]
fn p20_what_has_no_effect_here_is_told_once() {
    for (key, value) in IGNORED {
        let case = ask(key, value);
        assert!(case.is_patched(), "{key}: {case}");
        let told = case
            .warnings
            .iter()
            .filter(|(code, text)| *code == WarningCode::AnnotationIgnored && text.contains(key));
        assert_eq!(told.count(), 1, "{key}: {:?}", case.warnings);
    }
}

#[test]
fn a_misspelt_annotation_is_told_with_the_nearest_name() {
    for (typo, meant) in [
        ("sidecar.istio.io/proxyCpu", "sidecar.istio.io/proxyCPU"),
        (
            "sidecar.istio.io/rewriteAppHTTPProbes",
            "sidecar.istio.io/rewriteAppHTTPProbers",
        ),
        (
            "traffic.sidecar.istio.io/excludeOutboundPort",
            "traffic.sidecar.istio.io/excludeOutboundPorts",
        ),
        ("malha.io/hold-aplication", "malha.io/hold-application"),
    ] {
        let case = ask(typo, "true");
        let told = case
            .warnings
            .iter()
            .find(|(code, _)| *code == WarningCode::AnnotationUnknown);
        assert!(
            told.is_some_and(|(_, text)| text.contains(meant)),
            "{typo}: {:?}",
            case.warnings
        );
    }
}

/// Whatever stands in it: refused by name, or only this annotation (and what it is meant for) differs.
#[test]
fn s05_no_value_of_any_annotation_becomes_structure() {
    let keys = ANNOTATIONS
        .iter()
        .map(|annotation| annotation.key)
        .chain(REFUSED.iter().chain(IGNORED).map(|(key, _)| *key));
    for key in keys.chain([
        "sidecar.istio.io/inject",
        "inject.istio.io/templates",
        "sidecar.istio.io/unheard-of",
        "malha.io/status",
    ]) {
        for value in hostile() {
            let case = ask(key, &value);
            match &case.outcome {
                Outcome::Denied { message, .. } => names_the_culprit(key, &value, message),
                Outcome::Skipped(reason) => panic!("{key}: {value:?}: skipped, {reason}"),
                Outcome::Patched { .. } => {
                    let known = ANNOTATIONS.iter().find(|annotation| annotation.key == key);
                    let good = known.is_none_or(|known| {
                        known.good.contains(&value.as_str()) || is_plainly_good(key, &value)
                    });
                    assert!(
                        good,
                        "{key}: {value:?} was silently taken for something: {case}"
                    );
                    if known.is_none() {
                        let without = ask("example.com/other", "x");
                        let found = differences(&without.after, &case.after);
                        let meant = |path: &String| {
                            path.starts_with("/metadata/annotations/")
                                || environment(&case.after, path).as_deref()
                                    == Some("MALHA_RESTORE")
                        };
                        assert!(
                            found.iter().all(meant),
                            "{key}: {value:?} also changed {found:?}"
                        );
                    }
                }
            }
        }
    }
}

/// A hostile text may by chance be a legal value: an empty list, or one whose range nobody limits.
fn is_plainly_good(key: &str, value: &str) -> bool {
    value.is_empty()
        && ANNOTATIONS
            .iter()
            .any(|annotation| annotation.key == key && annotation.good.contains(&""))
        || (value.is_empty()
            && [
                "malha.io/run-before",
                "malha.io/exclude-outbound-uids",
                "sidecar.istio.io/componentLogLevel",
            ]
            .contains(&key))
        || (value == "plain" && key == "traffic.sidecar.istio.io/excludeInterfaces")
        || (value == "null" && key == "traffic.sidecar.istio.io/excludeInterfaces")
}

#[test]
fn s05_a_users_text_goes_where_it_is_meant_and_nowhere_else() {
    let plain = |place: &dyn Fn(&mut Value, &str)| {
        let mut pod = pod_with("example.com/note", "n");
        pod["metadata"]["labels"] = json!({"app": "web"});
        pod["metadata"]["ownerReferences"] = json!([{"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "u", "controller": true}]);
        place(&mut pod, "plain");
        pod
    };
    type Place = (&'static str, fn(&mut Value, &str), &'static [&'static str]);
    let places: &[Place] = &[
        (
            "a foreign annotation",
            |pod, text| pod["metadata"]["annotations"]["example.com/note"] = json!(text),
            &["/metadata/annotations/example.com/note"],
        ),
        (
            "a label",
            |pod, text| pod["metadata"]["labels"]["app"] = json!(text),
            &["/metadata/labels/app"],
        ),
        (
            "the image",
            |pod, text| pod["spec"]["containers"][0]["image"] = json!(text),
            &["/spec/containers/0/image"],
        ),
        (
            "the probe's path",
            |pod, text| {
                pod["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"] = json!(text)
            },
            &["MALHA_PROBES"],
        ),
        (
            "the owner's name",
            |pod, text| pod["metadata"]["ownerReferences"][0]["name"] = json!(text),
            &[
                "/metadata/ownerReferences/0/name",
                "MALHA_OWNER",
                "MALHA_WORKLOAD",
            ],
        ),
        (
            "the owner's kind",
            |pod, text| pod["metadata"]["ownerReferences"][0]["kind"] = json!(text),
            &[
                "/metadata/ownerReferences/0/kind",
                "MALHA_OWNER",
                "MALHA_WORKLOAD",
            ],
        ),
        (
            "the pod's name",
            |pod, text| pod["metadata"]["name"] = json!(text),
            &["/metadata/name", "MALHA_WORKLOAD", "MALHA_OWNER"],
        ),
        (
            "the account",
            |pod, text| pod["spec"]["serviceAccountName"] = json!(text),
            &["/spec/serviceAccountName"],
        ),
        (
            "the scrape path",
            |pod, text| {
                pod["metadata"]["annotations"]["prometheus.io/scrape"] = json!("true");
                pod["metadata"]["annotations"]["prometheus.io/path"] = json!(text);
            },
            &["MALHA_PROMETHEUS"],
        ),
        (
            "the container's name",
            |pod, text| pod["spec"]["containers"][0]["name"] = json!(text),
            &[
                "/spec/containers/0/name",
                "/spec/containers/0/readinessProbe/httpGet/path",
                "MALHA_PROBES",
                "MALHA_APP_CONTAINERS",
                "MALHA_PORTS",
                "/metadata/annotations/kubectl.kubernetes.io/default-container",
                "/metadata/annotations/kubectl.kubernetes.io/default-logs-container",
            ],
        ),
    ];
    for (what, place, meant) in places {
        let base = answered(&SUBJECT, USUAL, plain(&|pod, text| place(pod, text)))
            .expect("the plain one is fine");
        assert!(base.is_patched(), "{what}: {base}");
        for text in hostile() {
            let mut pod = base.before.clone();
            place(&mut pod, &text);
            let case = answered(&SUBJECT, USUAL, pod)
                .unwrap_or_else(|fault| panic!("{what} {text:?}: {fault}"));
            if !case.is_patched() {
                continue; // an explicit answer
            }
            for path in differences(&base.after, &case.after) {
                let named = environment(&case.after, &path).unwrap_or_else(|| path.clone());
                if named == "/metadata/annotations/malha.io/status" {
                    same_status_but_for_its_hash(&base, &case);
                    continue;
                }
                assert!(
                    meant.contains(&named.as_str()),
                    "{what} {text:?} changed {named} ({path}): {case}"
                );
            }
        }
    }
}

/// The hash of what was injected may change, what was added may not.
fn same_status_but_for_its_hash(left: &Case, right: &Case) {
    let status = |case: &Case| -> Value {
        let text = case.after["metadata"]["annotations"]["malha.io/status"]
            .as_str()
            .expect("text");
        let mut status = strict::parse(text).expect("JSON");
        status["hash"] = Value::Null;
        status
    };
    assert_eq!(status(left), status(right), "{right}");
}

/// The annotation's name, and of its value the first 64 characters at most, without anything that a terminal acts on.
fn names_the_culprit(key: &str, value: &str, message: &str) {
    assert!(
        message.contains(key),
        "{key}: {value:?} is refused without its name: {message}"
    );
    assert!(
        !message.chars().any(char::is_control),
        "{key}: raw control characters in {message:?}"
    );
    assert!(
        !message.contains('\u{202e}'),
        "{key}: a raw direction override in {message:?}"
    );
    let long = value.chars().filter(|c| c.is_ascii_alphanumeric()).count() > 64;
    assert!(
        !long || !message.contains(&value[..value.len().min(100)]),
        "{key}: the value is not cut: {message}"
    );
}

/// Pointers to where two values differ, keys unescaped.
pub(crate) fn differences(left: &Value, right: &Value) -> Vec<String> {
    let mut found = Vec::new();
    collect("", left, right, &mut found);
    found
}

fn collect(path: &str, left: &Value, right: &Value, found: &mut Vec<String>) {
    match (left, right) {
        (Value::Object(left), Value::Object(right)) => {
            for key in left
                .keys()
                .chain(right.keys().filter(|key| !left.contains_key(*key)))
            {
                let null = Value::Null;
                collect(
                    &format!("{path}/{key}"),
                    left.get(key).unwrap_or(&null),
                    right.get(key).unwrap_or(&null),
                    found,
                );
            }
        }
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            for (index, (left, right)) in left.iter().zip(right).enumerate() {
                collect(&format!("{path}/{index}"), left, right, found);
            }
        }
        _ if left != right => found.push(path.to_owned()),
        _ => {}
    }
}

/// The name of the environment variable whose value stands at `path`.
fn environment(pod: &Value, path: &str) -> Option<String> {
    let parent = path.strip_suffix("/value")?;
    Some(pod.pointer(parent)?["name"].as_str()?.to_owned())
}

/// The generator plants only what the tables of this module judge.
#[test]
fn the_tables_do_not_contradict_each_other() {
    for annotation in ANNOTATIONS {
        for good in annotation.good {
            assert!(
                !annotation.bad.contains(good),
                "{}: {good:?}",
                annotation.key
            );
            assert!(
                !REFUSED.contains(&(annotation.key, good)),
                "{}: {good:?}",
                annotation.key
            );
        }
    }
}
