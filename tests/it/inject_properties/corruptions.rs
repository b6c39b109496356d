//! Are the checks honest? Each property is broken on purpose, and its check must notice.

use std::sync::atomic::{AtomicU64, Ordering};

use malha::inject::{Answer, Entry, Reason, SkipReason, Verdict};
use serde_json::{Value, json};

use super::{
    CHECKS, SUBJECT,
    adversarial::rich,
    answered, case,
    case::{Case, Outcome, Setup, Subject, USUAL},
    checked,
    expected::{INIT, PROXY},
    injector,
};

struct Corruption {
    what: &'static str,
    /// The checks that must notice; others may.
    caught_by: &'static [&'static str],
    corrupt: fn(&mut Case),
}

/// The rich pod injected: init containers `first malha-init malha-proxy sidecar`, containers `app second`.
const CORRUPTIONS: &[Corruption] = &[
    Corruption {
        what: "the proxy is gone",
        caught_by: &["P3"],
        corrupt: |case| {
            inits(case).remove(2);
        },
    },
    Corruption {
        what: "a second proxy",
        caught_by: &["P3", "P8"],
        corrupt: |case| {
            let proxy = inits(case)[2].clone();
            apps(case).push(proxy);
        },
    },
    Corruption {
        what: "ours in the other order",
        caught_by: &["P3"],
        corrupt: |case| inits(case).swap(1, 2),
    },
    Corruption {
        what: "the proxy would end at once",
        caught_by: &["P3"],
        corrupt: |case| {
            remove(&mut inits(case)[2], "restartPolicy");
        },
    },
    Corruption {
        what: "run-before not honoured",
        caught_by: &["P3"],
        corrupt: |case| inits(case).rotate_left(1),
    },
    Corruption {
        what: "classic instead of native",
        caught_by: &["P3"],
        corrupt: |case| {
            let mut proxy = inits(case).remove(2);
            remove(&mut proxy, "restartPolicy");
            apps(case).insert(0, proxy);
        },
    },
    Corruption {
        what: "another image in the user's container",
        caught_by: &["P4", "P13"],
        corrupt: |case| apps(case)[0]["image"] = json!("evil"),
    },
    Corruption {
        what: "the user's containers swapped",
        caught_by: &["P4", "P13"],
        corrupt: |case| apps(case).swap(0, 1),
    },
    Corruption {
        what: "a user's container gone",
        caught_by: &["P4", "P13"],
        corrupt: |case| {
            apps(case).remove(1);
        },
    },
    Corruption {
        what: "a user's init container gone",
        caught_by: &["P4", "P13"],
        corrupt: |case| {
            inits(case).remove(0);
        },
    },
    Corruption {
        what: "an exec probe rewritten",
        caught_by: &["P4"],
        corrupt: |case| {
            apps(case)[0]["readinessProbe"] = json!({"httpGet": {"port": 15020, "path": "/app-health/app/readyz", "scheme": "HTTP"}})
        },
    },
    Corruption {
        what: "a user's container gets a variable",
        caught_by: &["P4"],
        corrupt: |case| {
            apps(case)[0]["env"]
                .as_array_mut()
                .expect("env")
                .push(json!({"name": "B"}))
        },
    },
    Corruption {
        what: "rewritten to another path",
        caught_by: &["P4"],
        corrupt: |case| {
            apps(case)[0]["livenessProbe"]["httpGet"]["path"] = json!("/app-health/second/livez")
        },
    },
    Corruption {
        what: "headers lost",
        caught_by: &["P4"],
        corrupt: |case| {
            remove(
                &mut apps(case)[0]["livenessProbe"]["httpGet"],
                "httpHeaders",
            );
        },
    },
    Corruption {
        what: "the host stays",
        caught_by: &["P4"],
        corrupt: |case| apps(case)[0]["livenessProbe"]["httpGet"]["host"] = json!("127.0.0.1"),
    },
    Corruption {
        what: "two handlers",
        caught_by: &["P4"],
        corrupt: |case| apps(case)[0]["startupProbe"]["grpc"] = json!({"port": 1}),
    },
    Corruption {
        what: "a handler left raw",
        caught_by: &["P4"],
        corrupt: |case| apps(case)[0]["livenessProbe"] = case_probe(),
    },
    Corruption {
        what: "another period",
        caught_by: &["P5"],
        corrupt: |case| apps(case)[0]["livenessProbe"]["periodSeconds"] = json!(8),
    },
    Corruption {
        what: "a shorter timeout",
        caught_by: &["P5"],
        corrupt: |case| apps(case)[0]["livenessProbe"]["timeoutSeconds"] = json!(2),
    },
    Corruption {
        what: "no timeout",
        caught_by: &["P5"],
        corrupt: |case| {
            remove(&mut apps(case)[0]["livenessProbe"], "timeoutSeconds");
        },
    },
    Corruption {
        what: "grace lost",
        caught_by: &["P5"],
        corrupt: |case| {
            remove(
                &mut apps(case)[0]["livenessProbe"],
                "terminationGracePeriodSeconds",
            );
        },
    },
    Corruption {
        what: "a record lost",
        caught_by: &["P6"],
        corrupt: |case| {
            with_record(case, |record| {
                remove(record, "/app-health/app/livez");
            })
        },
    },
    Corruption {
        what: "a record of nothing",
        caught_by: &["P6"],
        corrupt: |case| with_record(case, |record| record["/app-health/x/livez"] = json!({})),
    },
    Corruption {
        what: "a port recorded by name",
        caught_by: &["P6"],
        corrupt: |case| {
            with_record(case, |record| {
                record["/app-health/app/livez"]["httpGet"]["port"] = json!("http")
            })
        },
    },
    Corruption {
        what: "another path recorded",
        caught_by: &["P6"],
        corrupt: |case| {
            with_record(case, |record| {
                record["/app-health/app/livez"]["httpGet"]["path"] = json!("/")
            })
        },
    },
    Corruption {
        what: "the gRPC service lost",
        caught_by: &["P6"],
        corrupt: |case| {
            with_record(case, |record| {
                remove(&mut record["/app-health/app/startupz"]["grpc"], "service");
            })
        },
    },
    Corruption {
        what: "a record twice",
        caught_by: &["P6"],
        corrupt: |case| {
            let variable = probes(case);
            let text = variable["value"].as_str().expect("text").replacen(
                '{',
                "{\"/app-health/app/livez\":{},",
                1,
            );
            variable["value"] = json!(text);
        },
    },
    Corruption {
        what: "a label lost",
        caught_by: &["P7", "P13"],
        corrupt: |case| {
            remove(&mut case.after["metadata"]["labels"], "app");
        },
    },
    Corruption {
        what: "an annotation changed",
        caught_by: &["P7"],
        corrupt: |case| {
            case.after["metadata"]["annotations"]["example.com/note"] = json!("keep me")
        },
    },
    Corruption {
        what: "a strange annotation",
        caught_by: &["P7"],
        corrupt: |case| case.after["metadata"]["annotations"]["example.com/new"] = json!(""),
    },
    Corruption {
        what: "a strange label",
        caught_by: &["P7"],
        corrupt: |case| case.after["metadata"]["labels"]["new"] = json!(""),
    },
    Corruption {
        what: "the autoscaler's list replaced",
        caught_by: &["P7"],
        corrupt: |case| {
            case.after["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"] =
                json!("malha-run")
        },
    },
    Corruption {
        what: "a volume lost",
        caught_by: &["P7", "P8", "P13"],
        corrupt: |case| volumes(case).retain(|volume| volume["name"] != "data"),
    },
    Corruption {
        what: "a toleration lost",
        caught_by: &["P7", "P13"],
        corrupt: |case| case.after["spec"]["tolerations"] = json!([]),
    },
    Corruption {
        what: "a pull secret lost",
        caught_by: &["P7", "P13"],
        corrupt: |case| case.after["spec"]["imagePullSecrets"] = json!([]),
    },
    Corruption {
        what: "another DNS policy",
        caught_by: &["P7", "P13"],
        corrupt: |case| case.after["spec"]["dnsPolicy"] = json!("None"),
    },
    Corruption {
        what: "a pod-wide group",
        caught_by: &["P7"],
        corrupt: |case| case.after["spec"]["securityContext"]["fsGroup"] = json!(1337),
    },
    Corruption {
        what: "another namespace",
        caught_by: &["P7"],
        corrupt: |case| case.after["metadata"]["namespace"] = json!("shop"),
    },
    Corruption {
        what: "a volume twice",
        caught_by: &["P8"],
        corrupt: |case| {
            let volume = volumes(case)[0].clone();
            volumes(case).push(volume);
        },
    },
    Corruption {
        what: "a mount of nothing",
        caught_by: &["P8"],
        corrupt: |case| volumes(case).retain(|volume| volume["name"] != "malha-run"),
    },
    Corruption {
        what: "a port name of 16",
        caught_by: &["P8"],
        corrupt: |case| inits(case)[2]["ports"][0]["name"] = json!("a-sixteen-letter"),
    },
    Corruption {
        what: "the user has a port of ours",
        caught_by: &["P8"],
        corrupt: |case| apps(case)[1]["ports"] = json!([{"containerPort": 15020}]),
    },
    Corruption {
        what: "unsorted variables",
        caught_by: &["P8"],
        corrupt: |case| inits(case)[2]["env"].as_array_mut().expect("env").reverse(),
    },
    Corruption {
        what: "two mounts at one path",
        caught_by: &["P8"],
        corrupt: |case| {
            let mount = inits(case)[2]["volumeMounts"][0].clone();
            inits(case)[2]["volumeMounts"]
                .as_array_mut()
                .expect("mounts")
                .push(mount);
        },
    },
    Corruption {
        what: "ports that are no list",
        caught_by: &["P9"],
        corrupt: |case| apps(case)[1]["ports"] = json!("none"),
    },
    Corruption {
        what: "a host-network pod patched",
        caught_by: &["P12", "decision"],
        corrupt: |case| case.before["spec"]["hostNetwork"] = json!(true),
    },
    Corruption {
        what: "a foreign mesh's pod patched",
        caught_by: &["P12", "decision"],
        corrupt: |case| case.before["spec"]["containers"][1]["name"] = json!("istio-proxy"),
    },
    Corruption {
        what: "an unknown field of the pod lost",
        caught_by: &["P13", "P7"],
        corrupt: |case| {
            remove(&mut case.after, "futureTop");
        },
    },
    Corruption {
        what: "an unknown field of a container lost",
        caught_by: &["P13", "P4"],
        corrupt: |case| {
            remove(&mut apps(case)[0], "futureToo");
        },
    },
    Corruption {
        what: "an unknown null lost",
        caught_by: &["P13", "P4"],
        corrupt: |case| {
            remove(&mut apps(case)[0], "futureField");
        },
    },
    Corruption {
        what: "an unknown field of a rewritten handler lost",
        caught_by: &["P13"],
        corrupt: |case| {
            with_record(case, |record| {
                remove(
                    &mut record["/app-health/sidecar/readyz"]["tcpSocket"],
                    "futureField",
                );
            })
        },
    },
    Corruption {
        what: "no longer Burstable",
        caught_by: &["P15"],
        corrupt: |case| all(case, |container| container["resources"] = json!({})),
    },
    Corruption {
        what: "the pod's own resources appear",
        caught_by: &["P15"],
        corrupt: |case| case.after["spec"]["resources"] = json!({"limits": {"cpu": "1"}}),
    },
    Corruption {
        what: "request over limit",
        caught_by: &["P15"],
        corrupt: |case| inits(case)[2]["resources"]["requests"]["cpu"] = json!("64"),
    },
    Corruption {
        what: "a value that the kubelet would expand",
        caught_by: &["expansion"],
        corrupt: |case| probes(case)["value"] = json!("{\"a\":\"$(POD_NAME)\"}"),
    },
    Corruption {
        what: "an argument that the kubelet would shorten",
        caught_by: &["expansion"],
        corrupt: |case| inits(case)[1]["args"][0] = json!("{\"a\":\"$$\"}"),
    },
    Corruption {
        what: "the proxy may escalate",
        caught_by: &["P16"],
        corrupt: |case| inits(case)[2]["securityContext"]["allowPrivilegeEscalation"] = json!(true),
    },
    Corruption {
        what: "the proxy keeps capabilities",
        caught_by: &["P16"],
        corrupt: |case| {
            remove(&mut inits(case)[2]["securityContext"], "capabilities");
        },
    },
    Corruption {
        what: "the proxy may be root",
        caught_by: &["P16"],
        corrupt: |case| {
            remove(&mut inits(case)[2]["securityContext"], "runAsNonRoot");
        },
    },
    Corruption {
        what: "a host path of ours",
        caught_by: &["P16"],
        corrupt: |case| {
            let volume = volumes(case)
                .iter_mut()
                .find(|volume| volume["name"] == "malha-run")
                .expect("ours");
            *volume = json!({"name": "malha-run", "hostPath": {"path": "/run"}});
        },
    },
    Corruption {
        what: "the init container wants more",
        caught_by: &["P16"],
        corrupt: |case| {
            inits(case)[1]["securityContext"]["capabilities"]["add"] =
                json!(["NET_ADMIN", "NET_RAW"])
        },
    },
    Corruption {
        what: "the init container is root",
        caught_by: &["P16"],
        corrupt: |case| inits(case)[1]["securityContext"]["runAsUser"] = json!(0),
    },
    Corruption {
        what: "another decision",
        caught_by: &["decision"],
        corrupt: |case| case.outcome = Outcome::Skipped(SkipReason::NotSelected),
    },
    Corruption {
        what: "reinvoked at the first call",
        caught_by: &["decision"],
        corrupt: |case| {
            if let Outcome::Patched { reason, .. } = &mut case.outcome {
                *reason = Reason::Reinvoked
            }
        },
    },
    Corruption {
        what: "a refusal with a newline",
        caught_by: &["refusal"],
        corrupt: |case| {
            case.outcome = Outcome::Denied {
                reason: malha::inject::DenyReason::PortConflict,
                message: "change the port of\nyour container".into(),
            }
        },
    },
    Corruption {
        what: "warnings swallowed",
        caught_by: &["warnings", "P19"],
        corrupt: |case| case.warnings.clear(),
    },
    Corruption {
        what: "a warning of 121 characters",
        caught_by: &["warnings"],
        corrupt: |case| case.warnings[0].1 = "x".repeat(121),
    },
    Corruption {
        what: "other bytes",
        caught_by: &["P19"],
        corrupt: |case| {
            if let Outcome::Patched { json, .. } = &mut case.outcome {
                json.push(' ')
            }
        },
    },
    Corruption {
        what: "something stays behind",
        caught_by: &["P18"],
        corrupt: |case| case.after["spec"]["dnsPolicy"] = json!("None"),
    },
];

#[test]
fn every_broken_property_is_noticed_by_its_check() {
    let sound = answered(&SUBJECT, USUAL, rich()).expect("the rich pod is injected");
    for corruption in CORRUPTIONS {
        let mut case = sound.clone();
        (corruption.corrupt)(&mut case);
        for name in corruption.caught_by {
            let (_, check) = CHECKS
                .iter()
                .find(|(known, _)| known == name)
                .expect("a check of that name");
            assert!(
                checked(*check, &SUBJECT, &case).is_err(),
                "{}: {name} does not notice",
                corruption.what
            );
        }
    }
}

#[test]
fn a_guaranteed_pod_that_loses_its_class_is_noticed() {
    let limits = json!({"cpu": "1", "memory": "1Gi"});
    let pod = json!({"metadata": {}, "spec": {"containers": [{"name": "app", "resources": {"limits": limits}}]}});
    let sound = answered(&SUBJECT, USUAL, pod).expect("readable");
    notices("P15", &SUBJECT, &sound, false);
    for at in 0..2 {
        let mut case = sound.clone();
        inits(&mut case)[at]["resources"]["requests"]["memory"] = json!("1Mi");
        notices("P15", &SUBJECT, &case, true);
    }
    let pod = json!({"metadata": {}, "spec": {"resources": {"requests": {"cpu": "2"}}, "containers": [{"name": "app"}]}});
    let sound = answered(&SUBJECT, USUAL, pod).expect("readable");
    notices("P15", &SUBJECT, &sound, false);
    let mut case = sound.clone();
    case.after["spec"]["resources"]["requests"]["cpu"] = json!("2");
    notices("P15", &SUBJECT, &case, true);
}

#[test]
fn a_request_of_the_pod_that_outgrows_its_limit_is_noticed() {
    let even = json!({"requests": {"cpu": "2"}, "limits": {"cpu": "2"}});
    let pod = json!({"metadata": {"annotations": {"sidecar.istio.io/proxyCPULimit": "0"}},
        "spec": {"resources": even, "containers": [{"name": "app"}]}});
    let sound = answered(&SUBJECT, USUAL, pod).expect("readable");
    notices("P9", &SUBJECT, &sound, false);
    notices("P15", &SUBJECT, &sound, false);
    let mut case = sound.clone();
    case.after["spec"]["resources"]["limits"]["cpu"] = json!("2");
    notices("P9", &SUBJECT, &case, true);
    notices("P15", &SUBJECT, &case, true);
}

#[test]
fn patches_that_only_a_lax_engine_takes_are_noticed() {
    let pod = rich();
    let sound = r#"[{"op":"add","path":"/metadata/labels/malha.io~1x","value":"y"}]"#;
    assert!(case::apply(&pod, sound).is_ok());
    for (what, patch) in [
        ("not a list", r#"{"op":"add","path":"/a","value":1}"#),
        ("nothing at all", "[]"),
        ("a test", r#"[{"op":"test","path":"/kind","value":"Pod"}]"#),
        ("a copy", r#"[{"op":"copy","path":"/a","from":"/kind"}]"#),
        (
            "a move of nothing",
            r#"[{"op":"move","path":"/a","from":"/b"}]"#,
        ),
        ("no value", r#"[{"op":"add","path":"/a"}]"#),
        (
            "another member",
            r#"[{"op":"add","path":"/a","value":1,"why":"x"}]"#,
        ),
        (
            "a member twice",
            r#"[{"op":"add","path":"/a","value":1,"value":2}]"#,
        ),
        (
            "a missing parent",
            r#"[{"op":"add","path":"/status/x/y","value":1}]"#,
        ),
        (
            "a parent that is text",
            r#"[{"op":"add","path":"/kind/x","value":1}]"#,
        ),
        (
            "past the end",
            r#"[{"op":"add","path":"/spec/containers/9","value":{}}]"#,
        ),
        (
            "a leading zero",
            r#"[{"op":"replace","path":"/spec/containers/00","value":{}}]"#,
        ),
        (
            "- in a replacement",
            r#"[{"op":"replace","path":"/spec/containers/-","value":{}}]"#,
        ),
        (
            "- in a removal",
            r#"[{"op":"remove","path":"/spec/containers/-"}]"#,
        ),
        (
            "replacing what is not there",
            r#"[{"op":"replace","path":"/metadata/labels/none","value":1}]"#,
        ),
        (
            "removing what is not there",
            r#"[{"op":"remove","path":"/metadata/labels/none"}]"#,
        ),
        (
            "a bad escape",
            r#"[{"op":"add","path":"/metadata/labels/a~2b","value":1}]"#,
        ),
        ("no slash", r#"[{"op":"add","path":"kind","value":1}]"#),
        (
            "what changes nothing",
            r#"[{"op":"replace","path":"/kind","value":"Pod"}]"#,
        ),
        ("half of it", r#"[{"op":"add","path":"/a","value":1}"#),
    ] {
        assert!(case::apply(&pod, patch).is_err(), "{what} is not noticed");
    }
}

#[test]
fn injectors_that_are_broken_are_noticed() {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    for (what, caught_by, broken) in [
        (
            "always adds",
            "P10",
            subject(
                |_, _, answer| answer,
                Some(r#"[{"op":"add","path":"/metadata/finalizers","value":["x"]}]"#),
            ),
        ),
        (
            "does not look again",
            "P11",
            subject(
                |pod, _, answer| if has_ours(pod) { skip(answer) } else { answer },
                None,
            ),
        ),
        (
            "goes by the first key",
            "P14",
            subject(
                |pod, _, answer| {
                    if pod.starts_with(b"{\"apiVersion\"") {
                        answer
                    } else {
                        skip(answer)
                    }
                },
                None,
            ),
        ),
        (
            "takes null for something",
            "P14",
            subject(
                |pod, _, answer| {
                    if contains(pod, b":null") {
                        answer
                    } else {
                        skip(answer)
                    }
                },
                None,
            ),
        ),
        (
            "counts its calls",
            "P19",
            subject(
                |_, _, answer| {
                    let label = format!(
                        r#"{{"op":"add","path":"/metadata/labels/n","value":"{}"}}]"#,
                        CALLS.fetch_add(1, Ordering::Relaxed)
                    );
                    map_patch(answer, |json| {
                        json.trim_end_matches(']').to_owned() + "," + &label
                    })
                },
                None,
            ),
        ),
    ] {
        let case =
            answered(&broken, USUAL, rich()).unwrap_or_else(|fault| panic!("{what}: {fault}"));
        notices(caught_by, &broken, &case, true);
    }
    let careless = Subject {
        name: "leaves all in place",
        inject: subject(|_, _, answer| answer, None).inject,
        uninject: Box::new(Ok),
    };
    let case = answered(&careless, USUAL, rich()).expect("readable");
    notices("P18", &careless, &case, true);
    let setup = Setup {
        entry: Entry::Pod,
        ..USUAL
    };
    let case = answered(&SUBJECT, setup, rich()).expect("readable");
    for (name, _) in CHECKS {
        notices(name, &SUBJECT, &case, false);
    }
}

fn notices(name: &str, subject: &Subject, case: &Case, wanted: bool) {
    let (_, check) = CHECKS
        .iter()
        .find(|(known, _)| *known == name)
        .expect("a check of that name");
    let answer = checked(*check, subject, case);
    assert_eq!(
        answer.is_err(),
        wanted,
        "{}: {name} said {answer:?}\n{case}",
        subject.name
    );
}

/// The injector with its answer bent; `instead` replaces every answer's patch.
fn subject(bend: fn(&[u8], Setup, Answer) -> Answer, instead: Option<&'static str>) -> Subject {
    let injector = injector();
    Subject {
        name: "broken on purpose",
        inject: Box::new(move |pod, call| {
            let answer = bend(pod, USUAL, injector.inject(pod, call)?);
            Ok(match instead {
                Some(json) => Answer {
                    verdict: Verdict::Patch(malha::inject::Patch {
                        json: json.as_bytes().to_vec(),
                        reason: Reason::Injected,
                    }),
                    warnings: answer.warnings,
                },
                None => answer,
            })
        }),
        uninject: Box::new(super::uninjected),
    }
}

fn has_ours(pod: &[u8]) -> bool {
    contains(pod, b"\"malha-proxy\"")
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn skip(answer: Answer) -> Answer {
    Answer {
        verdict: Verdict::Skip(SkipReason::AlreadyInjected),
        ..answer
    }
}

fn map_patch(mut answer: Answer, change: impl Fn(&str) -> String) -> Answer {
    if let Verdict::Patch(patch) = &mut answer.verdict {
        patch.json = change(std::str::from_utf8(&patch.json).expect("text")).into_bytes();
    }
    answer
}

fn list<'a>(case: &'a mut Case, field: &str) -> &'a mut Vec<Value> {
    case.after["spec"][field].as_array_mut().expect("a list")
}

fn inits(case: &mut Case) -> &mut Vec<Value> {
    list(case, "initContainers")
}

fn apps(case: &mut Case) -> &mut Vec<Value> {
    list(case, "containers")
}

fn volumes(case: &mut Case) -> &mut Vec<Value> {
    list(case, "volumes")
}

fn all(case: &mut Case, change: impl Fn(&mut Value)) {
    inits(case).iter_mut().for_each(&change);
    apps(case).iter_mut().for_each(&change);
}

fn remove(value: &mut Value, key: &str) {
    let removed = value.as_object_mut().expect("an object").shift_remove(key);
    assert!(
        removed.is_some(),
        "there is no {key} to take away from {value}"
    );
}

fn case_probe() -> Value {
    rich()["spec"]["containers"][0]["livenessProbe"].clone()
}

fn probes(case: &mut Case) -> &mut Value {
    let proxy = inits(case)
        .iter_mut()
        .find(|container| container["name"] == PROXY)
        .expect("the proxy");
    assert_ne!(proxy["name"], INIT);
    let variables = proxy["env"].as_array_mut().expect("env");
    variables
        .iter_mut()
        .find(|variable| variable["name"] == "MALHA_PROBES")
        .expect("a record")
}

fn with_record(case: &mut Case, change: impl Fn(&mut Value)) {
    let variable = probes(case);
    let mut record: Value =
        serde_json::from_str(variable["value"].as_str().expect("text")).expect("JSON");
    change(&mut record);
    variable["value"] = json!(record.to_string());
}
