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

mod order {
    use super::*;

    #[test]
    fn a_plain_pod_gets_both_containers_and_the_volumes_in_native_order() {
        let injected = holds(&Injector::default(), &pod(), &call());
        assert_eq!(
            names(&injected["spec"]["initContainers"]),
            ["malha-init", "malha-proxy"]
        );
        assert_eq!(names(&injected["spec"]["containers"]), ["app"]);
        assert_eq!(names(&injected["spec"]["volumes"]), ours::VOLUMES);
        assert_eq!(proxy(&injected)["restartPolicy"], "Always");
        assert_eq!(proxy(&injected)["lifecycle"], Value::Null);
    }

    fn with_inits() -> Value {
        pod_with(
            "/spec/initContainers",
            json!([{"name": "a"}, {"name": "b"}, {"name": "c"}]),
        )
    }

    #[test]
    fn native_order_is_init_proxy_and_then_the_users() {
        let injected = holds(&Injector::default(), &with_inits(), &call());
        assert_eq!(
            names(&injected["spec"]["initContainers"]),
            ["malha-init", "malha-proxy", "a", "b", "c"]
        );
    }

    #[test]
    fn classic_order_is_the_users_then_init_and_the_proxy_first() {
        let answer = Injector::default()
            .inject(with_inits().to_string().as_bytes(), &on_kubelet(32))
            .expect("a pod");
        assert_eq!(codes(&answer), [WarningCode::ClassicInitNetwork]);
        assert!(
            answer.warnings[0].text.contains("a, b, c"),
            "{:?}",
            answer.warnings
        );
        let injected = holds(&Injector::default(), &with_inits(), &on_kubelet(32));
        assert_eq!(
            names(&injected["spec"]["initContainers"]),
            ["a", "b", "c", "malha-init"]
        );
        assert_eq!(
            names(&injected["spec"]["containers"]),
            ["malha-proxy", "app"]
        );
        assert_eq!(proxy(&injected)["restartPolicy"], Value::Null);
        let wait = json!(["malha-agent", "wait", "--timeout", "60s"]);
        assert_eq!(
            proxy(&injected)["lifecycle"]["postStart"]["exec"]["command"],
            wait
        );
    }

    #[test]
    fn without_hold_the_proxy_is_the_last_container() {
        let pod = annotated(&[
            ("malha.io/hold-application", "false"),
            ("sidecar.istio.io/nativeSidecar", "false"),
        ]);
        let injected = holds(&Injector::default(), &pod, &call());
        assert_eq!(
            names(&injected["spec"]["containers"]),
            ["app", "malha-proxy"]
        );
        assert_eq!(proxy(&injected)["lifecycle"], Value::Null);
    }

    #[test]
    fn the_oldest_kubelet_decides_between_native_and_classic() {
        let job = pod_with("/spec/restartPolicy", json!("OnFailure"));
        let always = pod_with("/spec/restartPolicy", json!("Always"));
        let native = |pod: &Value, kubelet| {
            let call = Call {
                oldest_kubelet: kubelet,
                ..call()
            };
            let injected = holds(&Injector::default(), pod, &call);
            names(&injected["spec"]["initContainers"]).contains(&"malha-proxy")
        };
        assert!(native(&pod(), None) && native(&pod(), Some(33)) && !native(&pod(), Some(32)));
        assert!(native(&always, None) && !native(&always, Some(32)));
        assert!(native(&job, Some(29)) && !native(&job, Some(28)));
    }

    #[test]
    fn a_job_in_classic_order_is_warned_about() {
        let job = pod_with("/spec/restartPolicy", json!("Never"));
        let answer = with("native: false")
            .inject(job.to_string().as_bytes(), &call())
            .expect("a pod");
        assert_eq!(codes(&answer), [WarningCode::ClassicJob]);
    }

    #[test]
    fn annotation_over_setting_over_kubelet() {
        let native = |setting: &str, annotation: Option<&str>| {
            let pod = annotation.map_or_else(pod, |value| {
                annotated(&[("sidecar.istio.io/nativeSidecar", value)])
            });
            let injected = holds(&with(setting), &pod, &on_kubelet(30));
            names(&injected["spec"]["initContainers"]).contains(&"malha-proxy")
        };
        assert!(native("native: true", None) && !native("native: auto", None));
        assert!(native("native: false", Some("true")) && !native("native: true", Some("false")));
    }

    #[test]
    fn named_init_containers_stay_ahead_with_raw_probes_and_excluded_ports() {
        let probe = json!({"httpGet": {"port": "health"}});
        let mut pod = annotated(&[("malha.io/run-before", "b")]);
        put(
            &mut pod,
            "/spec/initContainers",
            json!([
                {"name": "a"},
                {"name": "b", "restartPolicy": "Always", "startupProbe": probe, "ports": [{"name": "health", "containerPort": 9000}]},
                {"name": "c", "restartPolicy": "Always", "startupProbe": {"httpGet": {"port": 9001}}},
            ]),
        );
        let injected = holds(&Injector::default(), &pod, &call());
        assert_eq!(
            names(&injected["spec"]["initContainers"]),
            ["a", "b", "malha-init", "malha-proxy", "c"]
        );
        assert_eq!(
            item(&injected["spec"]["initContainers"], "b")["startupProbe"],
            probe
        );
        assert_eq!(
            capture(&injected)["excludeInboundPorts"],
            json!([9000, 15020, 15021, 15090])
        );
        assert!(records(&injected).get("/app-health/c/startupz").is_some());
        let (reason, message) = message(
            &Injector::default(),
            &annotated(&[("malha.io/run-before", "nobody")]),
        );
        assert_eq!(reason, Reason::InvalidAnnotation);
        assert!(message.contains("\"nobody\""), "{message}");
    }

    #[test]
    fn in_classic_order_native_sidecars_of_the_users_keep_raw_probes() {
        let sidecar = json!({"name": "a", "restartPolicy": "Always", "livenessProbe": {"tcpSocket": {"port": 7000}}});
        let pod = pod_with("/spec/initContainers", json!([sidecar]));
        let injected = holds(&with("native: false"), &pod, &call());
        assert_eq!(item(&injected["spec"]["initContainers"], "a"), &sidecar);
        assert_eq!(
            capture(&injected)["excludeInboundPorts"],
            json!([7000, 15020, 15021, 15090])
        );
    }
}

mod gates {
    use super::*;

    #[test]
    fn each_gate_has_its_code() {
        let label =
            |value: &str| pod_with("/metadata/labels/sidecar.istio.io~1inject", json!(value));
        let annotation = |value: &str| annotated(&[("sidecar.istio.io/inject", value)]);
        let mut both = annotation("false");
        put(
            &mut both,
            "/metadata/labels",
            json!({"sidecar.istio.io/inject": "true"}),
        );
        let named = |name: &str| pod_with("/spec/initContainers", json!([{"name": name}]));
        let port =
            |port: u32| pod_with("/spec/containers/0/ports", json!([{"containerPort": port}]));
        let cases = [
            (pod(), Reason::Injected),
            (
                pod_with("/spec/hostNetwork", json!(true)),
                Reason::HostNetwork,
            ),
            (
                pod_with("/spec/hostNetwork", json!(false)),
                Reason::Injected,
            ),
            (
                annotated(&[("kubernetes.io/config.mirror", "x")]),
                Reason::MirrorPod,
            ),
            (label("false"), Reason::OptedOutByLabel),
            (label("true"), Reason::Injected),
            (label("True"), Reason::InvalidInjectValue),
            (label(""), Reason::InvalidInjectValue),
            (annotation("false"), Reason::OptedOutByAnnotation),
            (annotation("true"), Reason::Injected),
            (annotation("no"), Reason::InvalidInjectValue),
            (both, Reason::Injected),
            (pod_with("/spec/containers", json!([])), Reason::InvalidPod),
            (
                pod_with("/spec/containers", json!(null)),
                Reason::InvalidPod,
            ),
            (
                pod_with("/spec/containers", json!("app")),
                Reason::InvalidPod,
            ),
            (
                pod_with("/spec/containers", json!([null, 7, {"image": "app"}])),
                Reason::InvalidPod,
            ),
            (pod_with("/spec/volumes", json!({})), Reason::InvalidPod),
            (pod_with("/metadata/labels", json!([])), Reason::InvalidPod),
            (json!({}), Reason::InvalidPod),
            (json!([]), Reason::InvalidPod),
            (json!(null), Reason::InvalidPod),
            (json!({"spec": ["containers"]}), Reason::InvalidPod),
            (
                pod_with("/spec/os", json!({"name": "windows"})),
                Reason::WindowsPod,
            ),
            (
                pod_with("/spec/os", json!({"name": "linux"})),
                Reason::Injected,
            ),
            (
                pod_with("/spec/nodeSelector/kubernetes.io~1os", json!("windows")),
                Reason::WindowsPod,
            ),
            (named("istio-proxy"), Reason::ForeignSidecar),
            (
                pod_with("/spec/containers/1", json!({"name": "linkerd-proxy"})),
                Reason::ForeignSidecar,
            ),
            (named("malha-init"), Reason::NameConflict),
            (named("malha-proxy"), Reason::NameConflict),
            (
                pod_with("/spec/containers/0/name", json!("malha-init")),
                Reason::NameConflict,
            ),
            (
                pod_with(
                    "/spec/volumes",
                    json!([{"name": "malha-run", "hostPath": {"path": "/"}}]),
                ),
                Reason::NameConflict,
            ),
            (
                annotated(&[("sidecar.istio.io/proxyCPU", "lots")]),
                Reason::InvalidAnnotation,
            ),
            (
                annotated(&[("sidecar.istio.io/interceptionMode", "TPROXY")]),
                Reason::UnsupportedAnnotation,
            ),
            (
                pod_with("/spec/securityContext/runAsGroup", json!(1337)),
                Reason::AppUsesProxyGid,
            ),
            (
                pod_with("/spec/containers/0/securityContext/runAsGroup", json!(1337)),
                Reason::AppUsesProxyGid,
            ),
            (
                pod_with("/spec/securityContext/runAsUser", json!(1337)),
                Reason::Injected,
            ),
            (port(15020), Reason::PortConflict),
            (port(15022), Reason::Injected),
        ];
        for (pod, wanted) in cases {
            assert_eq!(reason(&Injector::default(), &pod), wanted, "{pod}");
        }
        let protected = Call {
            namespace: "kube-system",
            ..call()
        };
        let answer = Injector::default()
            .inject(pod().to_string().as_bytes(), &protected)
            .expect("a pod");
        assert_eq!(answer.verdict.reason(), Reason::ProtectedNamespace);
    }

    #[test]
    fn refusals_name_what_is_wrong_and_what_to_change() {
        let (_, port) = message(
            &Injector::default(),
            &pod_with(
                "/spec/containers/0/ports",
                json!([{"containerPort": 15090}]),
            ),
        );
        assert!(port.contains("\"app\"") && port.contains("15090"), "{port}");
        let (_, group) = message(
            &Injector::default(),
            &pod_with("/spec/containers/0/securityContext/runAsGroup", json!(1337)),
        );
        assert!(
            group.contains("\"app\"") && group.contains("1337"),
            "{group}"
        );
        let (_, annotation) = message(
            &Injector::default(),
            &annotated(&[("sidecar.istio.io/proxyCPU", &"\n\"{{".repeat(40))]),
        );
        assert!(
            annotation.contains("proxyCPU")
                && annotation.contains("quantity")
                && annotation.contains("\\n"),
            "{annotation}"
        );
        assert!(
            !annotation.contains('\n') && annotation.len() < 250,
            "{annotation}"
        );
    }

    #[test]
    fn a_request_that_is_no_json_is_the_requests_fault() {
        for bytes in [
            &b""[..],
            b"{",
            b"{}x",
            b"\xff",
            b"\xef\xbb\xbf{}",
            b"{\"spec\":{},\"spec\":{}}",
            b"{\"metadata\":{\"labels\":{\"a\":\"1\",\"a\":\"2\"}}}",
            b"{\"spec\":{\"containers\":[{\"name\":\"a\",\"name\":\"b\"}]}}",
        ] {
            assert!(
                Injector::default().inject(bytes, &call()).is_err(),
                "{}",
                bytes.escape_ascii()
            );
        }
    }

    #[test]
    fn odd_types_in_fields_that_are_only_read_are_skipped() {
        for pointer in [
            "/metadata/generateName",
            "/metadata/ownerReferences",
            "/spec/os",
            "/spec/nodeSelector",
            "/spec/restartPolicy",
            "/spec/securityContext",
            "/spec/resources",
            "/spec/containers/0/ports",
            "/spec/containers/0/env",
            "/spec/containers/0/volumeMounts",
            "/spec/containers/0/resources",
            "/spec/containers/0/securityContext",
            "/spec/containers/0/livenessProbe",
            "/spec/containers/0/lifecycle",
            "/spec/containers/0/image",
            "/spec/containers/0/livenessProbe/httpGet",
            "/spec/containers/0/resources/limits",
        ] {
            for odd in [
                json!(null),
                json!(7),
                json!(-1.5),
                json!("x"),
                json!(true),
                json!([]),
                json!([[1]]),
                json!({"a": {"b": []}}),
            ] {
                let pod = pod_with(pointer, odd);
                holds(&Injector::default(), &pod, &call());
            }
        }
    }

    #[test]
    fn a_forged_status_changes_nothing_and_stays() {
        let status = [(
            "malha.io/status",
            "{\"added\":{\"labels\":[\"app\"],\"containers\":[\"app\"]}}",
        )];
        let mut pod = annotated(&status);
        put(&mut pod, "/metadata/labels", json!({"app": "web"}));
        let injected = holds(&Injector::default(), &pod, &call());
        assert_eq!(
            injected["metadata"]["annotations"]["malha.io/status"],
            status[0].1
        );
        let mut untouched = pod.clone();
        assert!(!uninject::uninject(&mut untouched).expect("nothing to read"));
        assert_eq!(untouched, pod);
    }
}

mod containers {
    use super::*;

    #[test]
    fn the_sidecar_satisfies_the_restricted_level_and_init_but_for_one_capability() {
        let injected = patched(&Injector::default(), &pod());
        for container in [proxy(&injected), init(&injected)] {
            let context = &container["securityContext"];
            assert_eq!(context["allowPrivilegeEscalation"], false);
            assert_eq!(context["privileged"], false);
            assert_eq!(context["runAsNonRoot"], true);
            assert_eq!(context["readOnlyRootFilesystem"], true);
            assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault");
            assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
        }
        assert_eq!(
            proxy(&injected)["securityContext"]["capabilities"].get("add"),
            None
        );
        assert_eq!(proxy(&injected)["securityContext"]["runAsUser"], 1337);
        assert_eq!(proxy(&injected)["securityContext"]["runAsGroup"], 1337);
        assert_eq!(
            init(&injected)["securityContext"]["capabilities"]["add"],
            json!(["NET_ADMIN"])
        );
        assert_eq!(init(&injected)["securityContext"]["runAsUser"], 65534);
    }

    #[test]
    fn an_external_redirection_needs_no_capability() {
        let injected = holds(&with("redirect: external"), &pod(), &call());
        assert_eq!(
            init(&injected)["securityContext"]["capabilities"],
            json!({"drop": ["ALL"]})
        );
        assert_eq!(init(&injected)["args"][0], "--check");
    }

    #[test]
    fn both_containers_mount_something_where_the_api_token_would_go() {
        let injected = patched(&Injector::default(), &pod());
        let directory = "/var/run/secrets/kubernetes.io/serviceaccount";
        let mounted = |container: &Value| {
            let mounts = container["volumeMounts"].as_array().expect("mounts").iter();
            mounts
                .filter(|mount| mount["mountPath"] == directory)
                .map(|mount| mount["name"].clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(mounted(proxy(&injected)), ["malha-token"]);
        assert_eq!(mounted(init(&injected)), ["malha-podinfo"]);
    }

    #[test]
    fn variables_are_sorted_and_tell_the_sidecar_who_it_serves() {
        let mut pod = pod();
        put(
            &mut pod,
            "/metadata",
            json!({
                "generateName": "web-5d4f8-",
                "labels": {"pod-template-hash": "5d4f8"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d4f8", "controller": true}],
            }),
        );
        put(
            &mut pod,
            "/spec/containers/0/ports",
            json!([{"containerPort": 8080, "name": "http"}, {"containerPort": 0}]),
        );
        let injected = holds(&Injector::default(), &pod, &call());
        let mut sorted = names(&proxy(&injected)["env"]);
        sorted.sort_unstable();
        assert_eq!(names(&proxy(&injected)["env"]), sorted);
        assert_eq!(variable(&injected, "MALHA_OWNER"), "apps/v1/Deployment/web");
        assert_eq!(variable(&injected, "MALHA_WORKLOAD"), "web");
        assert_eq!(variable(&injected, "MALHA_APP_CONTAINERS"), "[\"app\"]");
        assert_eq!(variable(&injected, "MALHA_TRUST_DOMAIN"), "cluster.local");
        let ports = "[{\"containerPort\":8080,\"name\":\"http\",\"protocol\":\"TCP\"}]";
        assert_eq!(variable(&injected, "MALHA_PORTS"), ports);
        assert_eq!(
            item(&proxy(&injected)["env"], "POD_IPS")["valueFrom"]["fieldRef"]["fieldPath"],
            "status.podIPs"
        );
    }

    #[test]
    fn a_template_gets_what_its_pods_get() {
        let pod = json!({
            "metadata": {
                "generateName": "web-5d4f8-",
                "labels": {"app": "web", "pod-template-hash": "5d4f8"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d4f8", "controller": true}],
            },
            "spec": {"containers": [{"name": "app"}]},
        });
        let mut deployment = json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"template": {"metadata": {"labels": {"app": "web"}}, "spec": pod["spec"]}},
        });
        let outcomes = workload::inject(
            &Injector::default(),
            &mut deployment,
            &workload::Surroundings::default(),
        );
        assert_eq!(outcomes.expect("a readable template").len(), 1);
        assert_eq!(
            deployment["spec"]["template"]["spec"],
            patched(&Injector::default(), &pod)["spec"]
        );
        assert_eq!(
            workload::uninject(&mut deployment).expect("readable records"),
            1
        );
        assert_eq!(deployment["spec"]["template"]["spec"], pod["spec"]);
    }

    #[test]
    fn no_value_is_expanded_by_the_kubelet() {
        let mut pod = annotated(&[("prometheus.io/path", "/$(HOST_IP)")]);
        put(
            &mut pod,
            "/spec/containers/0/livenessProbe",
            json!({"httpGet": {"path": "/$(POD_NAME)", "port": 80}}),
        );
        let injected = holds(&with("network: a$(HOST_IP)"), &pod, &call());
        for name in ["MALHA_PROBES", "MALHA_PROMETHEUS", "MALHA_RESTORE"] {
            assert!(!variable(&injected, name).contains('$'), "{name}");
        }
        assert_eq!(
            records(&injected)["/app-health/app/livez"]["httpGet"]["path"],
            "/$(POD_NAME)"
        );
        assert_eq!(variable(&injected, "MALHA_NETWORK"), "a$$(HOST_IP)");
    }

    #[test]
    fn a_volume_that_the_pod_brings_itself_is_used_and_stays() {
        let ours = patched(&Injector::default(), &pod())["spec"]["volumes"].clone();
        let mut token = item(&ours, "malha-token").clone();
        token["projected"]["sources"][0]["serviceAccountToken"]["audience"] = json!("malha-ca");
        let mut podinfo = item(&ours, "malha-podinfo").clone();
        podinfo["downwardAPI"]["defaultMode"] = json!(420);
        let own = pod_with("/spec/volumes", json!([token, podinfo]));
        let injected = holds(&Injector::default(), &own, &call());
        assert_eq!(
            names(&injected["spec"]["volumes"]),
            ["malha-token", "malha-podinfo", "malha-run", "malha-ca"]
        );
        let mut other = token.clone();
        other["projected"]["sources"][0]["serviceAccountToken"]["audience"] = json!("vault");
        assert_eq!(
            reason(
                &Injector::default(),
                &pod_with("/spec/volumes", json!([other]))
            ),
            Reason::NameConflict
        );
        let twice = pod_with("/spec/volumes", json!([token, token]));
        assert_eq!(reason(&Injector::default(), &twice), Reason::NameConflict);
    }

    #[test]
    fn pull_secrets_are_appended_once() {
        let injector = with("image: {pullSecrets: [mesh, own]}");
        let pod = pod_with("/spec/imagePullSecrets", json!([{"name": "own"}]));
        assert_eq!(
            names(&holds(&injector, &pod, &call())["spec"]["imagePullSecrets"]),
            ["own", "mesh"]
        );
        assert_eq!(
            names(&holds(&injector, &super::pod(), &call())["spec"]["imagePullSecrets"]),
            ["mesh", "own"]
        );
    }

    #[test]
    fn the_workload_api_is_mounted_where_it_is_asked_for() {
        let mut pod = annotated(&[("malha.io/workload-api", "true")]);
        put(
            &mut pod,
            "/spec/containers/1",
            json!({
                "name": "own", "env": [{"name": "SPIFFE_ENDPOINT_SOCKET", "value": "unix:///own"}], "volumeMounts": [{"name": "x", "mountPath": "/x"}],
            }),
        );
        put(
            &mut pod,
            "/spec/initContainers",
            json!([{"name": "plain"}, {"name": "beside", "restartPolicy": "Always"}]),
        );
        let injected = holds(&Injector::default(), &pod, &call());
        let app = &injected["spec"]["containers"][0];
        assert_eq!(
            item(&app["env"], "SPIFFE_ENDPOINT_SOCKET")["value"],
            "unix:///run/malha/workload/socket"
        );
        assert_eq!(
            app["volumeMounts"][0],
            json!({"name": "malha-run", "mountPath": "/run/malha/workload", "readOnly": true, "subPath": "workload"})
        );
        let own = &injected["spec"]["containers"][1];
        assert_eq!(own["env"], pod["spec"]["containers"][1]["env"]);
        assert_eq!(names(&own["volumeMounts"]), ["x", "malha-run"]);
        assert_eq!(
            item(&injected["spec"]["initContainers"], "plain"),
            &json!({"name": "plain"})
        );
        assert_eq!(
            names(&item(&injected["spec"]["initContainers"], "beside")["volumeMounts"]),
            ["malha-run"]
        );
    }
}

mod shares {
    use super::*;

    fn resources(injector: &Injector, pod: &Value) -> Value {
        proxy(&holds(injector, pod, &call()))["resources"].clone()
    }

    fn both(cpu: [&str; 2], memory: [&str; 2]) -> Value {
        let side = |at: usize| {
            let amounts = [("cpu", cpu[at]), ("memory", memory[at])];
            let amounts = amounts.iter().filter(|(_, text)| !text.is_empty());
            amounts
                .map(|(key, text)| ((*key).to_owned(), json!(text)))
                .collect()
        };
        normal(&json!({"requests": Value::Object(side(0)), "limits": Value::Object(side(1))}))
    }

    #[test]
    fn each_value_is_merged_by_itself() {
        let memory = ["128Mi", "1Gi"];
        let cases = [
            (&[][..], both(["100m", "2"], memory)),
            (&[("proxyCPU", "200m")], both(["200m", "2"], memory)),
            (&[("proxyCPU", "3")], both(["3", "3"], memory)),
            (&[("proxyCPULimit", "50m")], both(["50m", "50m"], memory)),
            (&[("proxyCPULimit", "4")], both(["100m", "4"], memory)),
            (&[("proxyCPULimit", "0")], both(["100m", ""], memory)),
            (
                &[("proxyCPU", "5"), ("proxyCPULimit", "0")],
                both(["5", ""], memory),
            ),
            (&[("proxyCPU", "0")], both(["0", "2"], memory)),
            (
                &[("proxyCPU", "1000m"), ("proxyCPULimit", "1")],
                both(["1000m", "1"], memory),
            ),
            (
                &[("proxyMemory", "2Gi"), ("proxyMemoryLimit", "3Gi")],
                both(["100m", "2"], ["2Gi", "3Gi"]),
            ),
        ];
        for (annotations, wanted) in cases {
            let keys: Vec<_> = annotations
                .iter()
                .map(|(key, value)| (format!("sidecar.istio.io/{key}"), *value))
                .collect();
            let pairs: Vec<_> = keys
                .iter()
                .map(|(key, value)| (key.as_str(), *value))
                .collect();
            assert_eq!(
                resources(&Injector::default(), &annotated(&pairs)),
                wanted,
                "{annotations:?}"
            );
        }
        let contradiction = [
            ("sidecar.istio.io/proxyCPU", "2"),
            ("sidecar.istio.io/proxyCPULimit", "1"),
        ];
        let (reason, message) = message(&Injector::default(), &annotated(&contradiction));
        assert_eq!(reason, Reason::InvalidAnnotation);
        assert!(
            message.contains("proxyCPU") && message.contains("\"2\"") && message.contains('1'),
            "{message}"
        );
    }

    fn guaranteed() -> Value {
        pod_with(
            "/spec/containers/0/resources",
            json!({"limits": {"cpu": 1, "memory": "1Gi"}, "requests": {"cpu": "1000m"}}),
        )
    }

    #[test]
    fn a_guaranteed_pod_stays_guaranteed() {
        let injected = holds(&Injector::default(), &guaranteed(), &call());
        assert_eq!(
            proxy(&injected)["resources"],
            both(["500m", "500m"], ["256Mi", "256Mi"])
        );
        assert_eq!(
            init(&injected)["resources"],
            both(["100m", "100m"], ["64Mi", "64Mi"])
        );
        let mut asked = guaranteed();
        put(
            &mut asked,
            "/metadata/annotations",
            json!({"sidecar.istio.io/proxyCPU": "1", "sidecar.istio.io/proxyMemoryLimit": "1Gi"}),
        );
        assert_eq!(
            resources(&Injector::default(), &asked),
            both(["1", "1"], ["1Gi", "1Gi"])
        );
    }

    #[test]
    fn a_best_effort_pod_stays_so_only_without_defaults() {
        let none =
            "proxy: {resources: {requests: {cpu: '', memory: ''}, limits: {cpu: '', memory: ''}}}";
        let injected = holds(&with(none), &pod(), &call());
        assert_eq!(proxy(&injected)["resources"], json!({}));
        assert_eq!(init(&injected)["resources"], json!({}));
    }

    #[test]
    fn the_pods_own_resources_make_room() {
        let own = json!({"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1500m", "hugepages-2Mi": "2Mi"}});
        let pod = pod_with("/spec/resources", own);
        let injected = holds(&Injector::default(), &pod, &call());
        let padded = json!({"requests": {"cpu": "1100m", "memory": "1152Mi"}, "limits": {"cpu": "3500m", "hugepages-2Mi": "2Mi"}});
        assert_eq!(injected["spec"]["resources"], padded);
        let garbage = pod_with(
            "/spec/resources",
            json!({"requests": {"cpu": "lots", "memory": null}}),
        );
        assert_eq!(
            holds(&Injector::default(), &garbage, &call())["spec"]["resources"],
            garbage["spec"]["resources"]
        );
    }

    #[test]
    fn a_guaranteed_pod_by_its_own_resources_stays_so() {
        let pod = pod_with(
            "/spec/resources",
            json!({"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}),
        );
        let injected = holds(&Injector::default(), &pod, &call());
        let own = &injected["spec"]["resources"];
        assert_eq!(own["requests"], own["limits"]);
        assert_eq!(own["limits"], json!({"cpu": "1500m", "memory": "1280Mi"}));
    }
}

mod metadata {
    use super::*;

    #[test]
    fn absent_and_null_maps_are_written_whole() {
        let spec = pod()["spec"].clone();
        for metadata in [
            json!(null),
            json!({}),
            json!({"labels": null, "annotations": null}),
        ] {
            let pod = json!({"metadata": metadata, "spec": spec});
            let injected = holds(&Injector::default(), &pod, &call());
            assert_eq!(
                injected["metadata"]["labels"],
                json!({"security.istio.io/tlsMode": "istio"})
            );
            assert_eq!(
                injected["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"],
                "app"
            );
        }
        holds(&Injector::default(), &json!({"spec": spec}), &call());
        let nulls = json!({"metadata": {}, "spec": {"containers": [{"name": "app"}], "initContainers": null, "volumes": null, "imagePullSecrets": null}});
        holds(&with("image: {pullSecrets: [a]}"), &nulls, &call());
    }

    #[test]
    fn what_the_author_wrote_stays() {
        let mut pod = annotated(&[
            ("kubectl.kubernetes.io/default-container", "db"),
            ("sidecar.istio.io/status", "theirs"),
            ("prometheus.io/scrape", "false"),
            ("prometheus.io/port", "9090"),
        ]);
        put(
            &mut pod,
            "/metadata/labels",
            json!({"security.istio.io/tlsMode": "disabled"}),
        );
        let injected = holds(&Injector::default(), &pod, &call());
        for (key, value) in pod["metadata"]["annotations"]
            .as_object()
            .expect("annotations")
        {
            assert_eq!(&injected["metadata"]["annotations"][key], value, "{key}");
        }
        assert_eq!(injected["metadata"]["labels"], pod["metadata"]["labels"]);
        assert_eq!(variable(&injected, "MALHA_PROMETHEUS"), "null");
    }

    #[test]
    fn prometheus_is_sent_to_the_agent() {
        let own = [
            ("prometheus.io/scrape", "true"),
            ("prometheus.io/port", "9090"),
            ("prometheus.io/path", "/a\"b"),
        ];
        let injected = holds(&Injector::default(), &annotated(&own), &call());
        let annotations = &injected["metadata"]["annotations"];
        assert_eq!(annotations["prometheus.io/port"], "15020");
        assert_eq!(annotations["prometheus.io/path"], "/stats/prometheus");
        assert_eq!(annotations["prometheus.io/scheme"], "http");
        assert_eq!(
            variable(&injected, "MALHA_PROMETHEUS"),
            r#"{"path":"/a\"b","port":"9090","scrape":"true"}"#
        );
        let off = holds(
            &Injector::default(),
            &annotated(&[("prometheus.istio.io/merge-metrics", "false")]),
            &call(),
        );
        assert_eq!(
            off["metadata"]["annotations"].get("prometheus.io/scrape"),
            None
        );
    }

    #[test]
    fn our_volumes_join_the_autoscalers_list_once() {
        let key = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes";
        let merged = |own: &str| {
            let injected = holds(&Injector::default(), &annotated(&[(key, own)]), &call());
            injected["metadata"]["annotations"][key].clone()
        };
        assert_eq!(
            merged("cache"),
            "cache,malha-run,malha-token,malha-ca,malha-podinfo"
        );
        assert_eq!(
            merged("malha-ca, cache"),
            "malha-ca, cache,malha-run,malha-token,malha-podinfo"
        );
        assert_eq!(merged(""), "malha-run,malha-token,malha-ca,malha-podinfo");
        let all = "malha-run,malha-token,malha-ca,malha-podinfo";
        assert_eq!(merged(all), all);
    }

    #[test]
    fn the_status_says_what_was_added() {
        let injected = patched(&Injector::default(), &pod());
        let status = injected["metadata"]["annotations"]["malha.io/status"]
            .as_str()
            .expect("a status");
        let status: Value = serde_json::from_str(status).expect("it is JSON");
        assert_eq!(status["revision"], "default");
        assert_eq!(
            status["added"]["initContainers"],
            json!(["malha-init", "malha-proxy"])
        );
        assert_eq!(status["hash"].as_str().map(str::len), Some(32));
        let other = patched(&with("proxy: {uid: 2000}"), &pod());
        assert_ne!(
            injected["metadata"]["annotations"]["malha.io/status"],
            other["metadata"]["annotations"]["malha.io/status"]
        );
    }

    #[test]
    fn key_order_and_nulls_do_not_change_the_patch() {
        let one = r#"{"metadata":{"labels":{"a":"1","b":"2"},"annotations":{"prometheus.io/port":"1","malha.io/hold-application":"true"}},
            "spec":{"containers":[{"name":"app","livenessProbe":{"httpGet":{"path":"/","port":80,"httpHeaders":[{"name":"A","value":"B"}]}}}]}}"#;
        let two = r#"{"spec":{"initContainers":null,"containers":[{"livenessProbe":{"exec":null,"httpGet":{"host":null,"httpHeaders":[{"value":"B","name":"A"}],
            "port":80,"path":"\/"}},"ports":null,"name":"app"}]},"metadata":{"annotations":{"malha.io/hold-application":"true","prometheus.io/port":"1"},"labels":{"b":"2","a":"1"}}}"#;
        let patch = |text: &str| match Injector::default()
            .inject(text.as_bytes(), &call())
            .expect("a pod")
            .verdict
        {
            Verdict::Patch(patch) => String::from_utf8(patch.json).expect("text"),
            other => panic!("{other:?}"),
        };
        assert_eq!(patch(one), patch(two));
        assert_eq!(patch(one), patch(one));
    }
}

mod handlers {
    use super::*;

    fn with_container(container: Value) -> Value {
        pod_with("/spec/containers/0", container)
    }

    #[test]
    fn each_kind_goes_to_the_agent_and_its_original_to_the_records() {
        let pod = with_container(json!({
            "name": "app",
            "ports": [{"name": "http", "containerPort": 8080}],
            "livenessProbe": {"periodSeconds": 7, "timeoutSeconds": 3, "httpGet": {
                "path": "/live", "port": "http", "scheme": "HTTPS", "host": "127.0.0.1", "httpHeaders": [{"name": "Host", "value": "a.b"}], "newer": {"x": 1},
            }},
            "readinessProbe": {"tcpSocket": {"port": 5432}},
            "startupProbe": {"grpc": {"port": 9000, "service": "s"}},
            "lifecycle": {"postStart": {"httpGet": {"port": 8080}}, "preStop": {"httpGet": {"port": 8080, "path": "/stop"}}},
        }));
        let injected = holds(&Injector::default(), &pod, &call());
        let app = &injected["spec"]["containers"][0];
        assert_eq!(
            app["livenessProbe"],
            json!({"periodSeconds": 7, "timeoutSeconds": 3, "httpGet": {
                "path": "/app-health/app/livez", "port": 15020, "scheme": "HTTP", "httpHeaders": [{"name": "Host", "value": "a.b"}], "newer": {"x": 1},
            }})
        );
        let served =
            |path: &str| json!({"httpGet": {"path": path, "port": 15020, "scheme": "HTTP"}});
        assert_eq!(app["readinessProbe"], served("/app-health/app/readyz"));
        assert_eq!(app["startupProbe"], served("/app-health/app/startupz"));
        assert_eq!(
            app["lifecycle"]["postStart"],
            served("/app-lifecycle/app/poststart")
        );
        assert_eq!(
            app["lifecycle"]["preStop"],
            served("/app-lifecycle/app/prestop")
        );
        assert_eq!(
            records(&injected),
            json!({
                "/app-health/app/livez": {
                    "httpGet": {"path": "/live", "port": 8080, "scheme": "HTTPS", "host": "127.0.0.1", "httpHeaders": [{"name": "Host", "value": "a.b"}], "newer": {"x": 1}},
                    "named": "http", "timeoutSeconds": 3,
                },
                "/app-health/app/readyz": {"tcpSocket": {"port": 5432}},
                "/app-health/app/startupz": {"grpc": {"port": 9000, "service": "s"}},
                "/app-lifecycle/app/poststart": {"httpGet": {"port": 8080}},
                "/app-lifecycle/app/prestop": {"httpGet": {"port": 8080, "path": "/stop"}},
            })
        );
    }

    #[test]
    fn what_does_not_go_over_the_network_stays() {
        let container = json!({
            "name": "app",
            "livenessProbe": {"exec": {"command": ["true"]}},
            "readinessProbe": {"httpGet": {"port": 1}, "tcpSocket": {"port": 2}},
            "lifecycle": {"preStop": {"sleep": {"seconds": 1}}, "postStart": {"tcpSocket": {"port": 80}}},
        });
        let mut pod = with_container(container.clone());
        put(
            &mut pod,
            "/spec/initContainers",
            json!([{"name": "plain", "livenessProbe": {"httpGet": {"port": 80}}}]),
        );
        let injected = holds(&Injector::default(), &pod, &call());
        assert_eq!(injected["spec"]["containers"][0], container);
        assert_eq!(
            item(&injected["spec"]["initContainers"], "plain"),
            &pod["spec"]["initContainers"][0]
        );
        assert_eq!(records(&injected), json!({}));
    }

    #[test]
    fn a_handler_that_cannot_be_repeated_stays_with_a_warning() {
        let unresolved = [
            json!({"port": "nope"}),
            json!({"port": 0}),
            json!({"port": 65536}),
            json!({}),
            json!({"port": "80"}),
            json!({"port": 15020}),
        ];
        let external = [
            json!({"port": 80, "host": "example.com"}),
            json!({"port": "nope", "host": "10.0.0.1"}),
            json!({"port": 80, "host": 7}),
        ];
        let cases = unresolved
            .iter()
            .map(|get| (get, WarningCode::ProbePortUnresolved));
        for (get, code) in cases.chain(
            external
                .iter()
                .map(|get| (get, WarningCode::ProbeHostExternal)),
        ) {
            let pod = with_container(json!({"name": "app", "livenessProbe": {"httpGet": get}}));
            let answer = answer(&Injector::default(), &pod);
            assert_eq!(codes(&answer), [code], "{get}");
            assert!(
                answer.warnings[0].text.contains("livenessProbe of \"app\""),
                "{:?}",
                answer.warnings
            );
            assert_eq!(
                apply(&pod, &answer)["spec"]["containers"][0],
                pod["spec"]["containers"][0]
            );
            holds(&Injector::default(), &pod, &call());
        }
    }

    #[test]
    fn hosts_that_mean_the_pod_are_rewritten() {
        for host in ["", "localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"] {
            let pod = with_container(
                json!({"name": "app", "livenessProbe": {"tcpSocket": {"port": 80, "host": host}}}),
            );
            assert!(
                records(&holds(&Injector::default(), &pod, &call()))
                    .get("/app-health/app/livez")
                    .is_some(),
                "{host}"
            );
        }
    }

    #[test]
    fn rewriting_can_be_switched_off() {
        let mut pod = annotated(&[("sidecar.istio.io/rewriteAppHTTPProbers", "false")]);
        assert_eq!(codes(&answer(&Injector::default(), &pod)), []);
        put(
            &mut pod,
            "/spec/containers/0/livenessProbe",
            json!({"httpGet": {"port": 80}}),
        );
        assert_eq!(
            codes(&answer(&Injector::default(), &pod)),
            [WarningCode::ProbesNotRewritten]
        );
        let injected = holds(&Injector::default(), &pod, &call());
        assert_eq!(injected["spec"]["containers"], pod["spec"]["containers"]);
    }

    #[test]
    fn odd_names_make_no_two_paths_equal() {
        let container =
            |name: &str| json!({"name": name, "livenessProbe": {"httpGet": {"port": 80}}});
        let pod = pod_with(
            "/spec/containers",
            json!([
                container("a/livez"),
                container("a%2Flivez"),
                container("é"),
                container("a\"b")
            ]),
        );
        let injected = holds(&Injector::default(), &pod, &call());
        assert_eq!(
            records(&injected).as_object().map(serde_json::Map::len),
            Some(4)
        );
    }
}

mod again {
    use super::*;

    fn reinvoked(injector: &Injector, pod: &Value) -> (Value, Answer) {
        let second = answer(injector, pod);
        assert_eq!(second.verdict.reason(), Reason::Reinvoked, "{second:?}");
        let completed = apply(pod, &second);
        assert_eq!(reason(injector, &completed), Reason::AlreadyInjected);
        (completed, second)
    }

    fn insert(pod: &mut Value, list: &str, at: usize, container: Value) {
        pod["spec"][list]
            .as_array_mut()
            .expect("a list")
            .insert(at, container);
    }

    #[test]
    fn containers_that_came_since_are_completed() {
        let late = json!({"name": "late", "livenessProbe": {"httpGet": {"port": 7}}});
        let mut pod = annotated(&[("malha.io/workload-api", "true")]);
        put(
            &mut pod,
            "/spec/containers/0/livenessProbe",
            json!({"httpGet": {"port": 80}}),
        );
        let mut wanted = pod.clone();
        insert(&mut wanted, "containers", 0, late.clone());
        for injector in [Injector::default(), with("native: false")] {
            let mut injected = patched(&injector, &pod);
            insert(&mut injected, "containers", 0, late.clone());
            let (mut completed, _) = reinvoked(&injector, &injected);
            assert_eq!(
                records(&completed)["/app-health/late/livez"],
                json!({"httpGet": {"port": 7}})
            );
            assert_eq!(
                records(&completed)["/app-health/app/livez"],
                json!({"httpGet": {"port": 80}})
            );
            assert_eq!(
                names(&item(&completed["spec"]["containers"], "late")["env"]),
                ["SPIFFE_ENDPOINT_SOCKET"]
            );
            assert!(uninject::uninject(&mut completed).expect("readable records"));
            assert_eq!(completed, wanted);
        }
    }

    #[test]
    fn native_order_is_restored_wherever_others_stand() {
        let base = annotated(&[("malha.io/run-before", "first")]);
        let mut base = base;
        put(
            &mut base,
            "/spec/initContainers",
            json!([{"name": "first"}, {"name": "mine"}]),
        );
        let injected = patched(&Injector::default(), &base);
        let ours = injected["spec"]["initContainers"]
            .as_array()
            .expect("a list")
            .clone();
        let orders = permutations(ours.len());
        assert_eq!(orders.len(), 24);
        for order in orders {
            let mut pod = injected.clone();
            pod["spec"]["initContainers"] = order.iter().map(|&at| ours[at].clone()).collect();
            let users: Vec<_> = names(&pod["spec"]["initContainers"])
                .into_iter()
                .filter(|name| !name.starts_with("malha"))
                .map(str::to_owned)
                .collect();
            let ahead = users
                .iter()
                .position(|name| name == "first")
                .map_or(0, |at| at + 1);
            let mut wanted = users;
            wanted.splice(
                ahead..ahead,
                ["malha-init".to_owned(), "malha-proxy".to_owned()],
            );
            let answer = answer(&Injector::default(), &pod);
            let restored = match answer.verdict {
                Verdict::Patch(_) => apply(&pod, &answer),
                _ => pod,
            };
            assert_eq!(
                names(&restored["spec"]["initContainers"]),
                wanted,
                "{order:?}"
            );
            assert_eq!(
                reason(&Injector::default(), &restored),
                Reason::AlreadyInjected
            );
        }
    }

    fn permutations(n: usize) -> Vec<Vec<usize>> {
        if n == 0 {
            return vec![Vec::new()];
        }
        let shorter = permutations(n - 1);
        let grown = shorter.iter().flat_map(|order| {
            (0..n).map(move |at| {
                let mut order = order.clone();
                order.insert(at, n - 1);
                order
            })
        });
        grown.collect()
    }

    #[test]
    fn classic_order_is_restored() {
        for (hold, wanted) in [
            ("true", ["malha-proxy", "app", "late"]),
            ("false", ["app", "late", "malha-proxy"]),
        ] {
            let pod = annotated(&[
                ("malha.io/hold-application", hold),
                ("sidecar.istio.io/nativeSidecar", "false"),
            ]);
            let mut injected = patched(&Injector::default(), &pod);
            let at = if hold == "true" { 0 } else { 2 };
            insert(&mut injected, "containers", at, json!({"name": "late"}));
            insert(&mut injected, "initContainers", 1, json!({"name": "slow"}));
            let (completed, _) = reinvoked(&Injector::default(), &injected);
            assert_eq!(
                names(&completed["spec"]["initContainers"]),
                ["slow", "malha-init"]
            );
            let mut order = names(&completed["spec"]["containers"]);
            order.sort_unstable_by_key(|name| wanted.iter().position(|other| other == name));
            assert_eq!(
                names(&completed["spec"]["containers"])[if hold == "true" { 0 } else { 2 }],
                "malha-proxy"
            );
            assert_eq!(order, wanted);
        }
    }

    #[test]
    fn a_volume_that_was_lost_is_added_again_and_a_stolen_name_is_refused() {
        let mut injected = patched(&Injector::default(), &pod());
        injected["spec"]["volumes"]
            .as_array_mut()
            .expect("volumes")
            .remove(1);
        let (completed, _) = reinvoked(&Injector::default(), &injected);
        assert!(names(&completed["spec"]["volumes"]).contains(&"malha-token"));
        injected["spec"]["volumes"][0] = json!({"name": "malha-run", "hostPath": {"path": "/"}});
        assert_eq!(
            reason(&Injector::default(), &injected),
            Reason::NameConflict
        );
    }

    #[test]
    fn another_version_stays_with_a_warning() {
        let injected = patched(&with("image: {proxy: 'malha-proxy:0.0.9'}"), &pod());
        let answer = answer(&Injector::default(), &injected);
        assert_eq!(answer.verdict.reason(), Reason::AlreadyInjected);
        assert_eq!(codes(&answer), [WarningCode::OtherVersion]);
    }

    #[test]
    fn unreadable_records_are_a_conflict() {
        let mut injected = patched(&Injector::default(), &pod());
        let env = injected["spec"]["initContainers"][1]["env"]
            .as_array_mut()
            .expect("variables");
        env.iter_mut()
            .find(|variable| variable["name"] == "MALHA_PROBES")
            .expect("it is there")["value"] = json!("{");
        let (reason, message) = message(&Injector::default(), &injected);
        assert_eq!(reason, Reason::NameConflict);
        assert!(message.contains("MALHA_PROBES"), "{message}");
        assert!(uninject::uninject(&mut injected).is_err());
    }
}

mod wishes {
    use super::*;
    use crate::inject::annotations::{Effect, KNOWN};

    #[test]
    fn every_annotation_answers_garbage_explicitly() {
        let long = "a".repeat(10 * 1024);
        for (key, effect) in KNOWN {
            let key = key.replace('*', "InclusionRegexps");
            for value in [
                "\n",
                "\"",
                "{{ .Values }}",
                "\0",
                "\u{1}",
                "'; rm -rf",
                "$(POD_NAME)",
                long.as_str(),
            ] {
                let pod = annotated(&[(&key, value)]);
                let answer = answer(&Injector::default(), &pod);
                let reason = answer.verdict.reason();
                match effect {
                    Effect::Unsupported(_) => {
                        assert_eq!(reason, Reason::UnsupportedAnnotation, "{key}")
                    }
                    Effect::Ignored(_) => {
                        assert_eq!(reason, Reason::Injected, "{key}");
                        assert_eq!(codes(&answer), [WarningCode::AnnotationIgnored], "{key}");
                    }
                    Effect::Known if key == "sidecar.istio.io/inject" => {
                        assert_eq!(reason, Reason::InvalidInjectValue)
                    }
                    Effect::Known => assert_eq!(reason, Reason::Injected, "{key}"),
                    Effect::Set(_) if key == "inject.istio.io/templates" && value.len() < 1024 => {
                        assert_eq!(reason, Reason::UnsupportedAnnotation)
                    }
                    Effect::Set(_) => {
                        assert_eq!(reason, Reason::InvalidAnnotation, "{key}={value:?}")
                    }
                }
                if let Verdict::Deny(denial) = answer.verdict {
                    assert!(denial.message.contains(&key), "{}", denial.message);
                    assert!(
                        !denial.message.contains(['\n', '\0', '\u{1}']),
                        "{}",
                        denial.message
                    );
                }
            }
        }
    }

    #[test]
    fn good_values_arrive_where_they_are_meant() {
        let pod = annotated(&[
            ("traffic.sidecar.istio.io/includeInboundPorts", "80,443"),
            ("traffic.sidecar.istio.io/excludeInboundPorts", "9000"),
            ("traffic.sidecar.istio.io/includeOutboundPorts", "*"),
            ("traffic.sidecar.istio.io/excludeOutboundPorts", "25"),
            (
                "traffic.sidecar.istio.io/includeOutboundIPRanges",
                "10.0.0.0/8,fd00::/8",
            ),
            (
                "traffic.sidecar.istio.io/excludeOutboundIPRanges",
                "10.96.0.1/32",
            ),
            ("traffic.sidecar.istio.io/excludeInterfaces", "eth1"),
            ("malha.io/exclude-outbound-uids", "0,1000"),
            ("sidecar.istio.io/interceptionMode", "REDIRECT"),
            ("inject.istio.io/templates", "sidecar"),
            ("sidecar.istio.io/logLevel", "debug"),
            ("sidecar.istio.io/agentLogLevel", "default:info"),
            (
                "sidecar.istio.io/componentLogLevel",
                "upstream:trace,http:off",
            ),
            ("readiness.status.sidecar.istio.io/initialDelaySeconds", "0"),
            ("readiness.status.sidecar.istio.io/periodSeconds", "5"),
            ("readiness.status.sidecar.istio.io/failureThreshold", "3600"),
        ]);
        let injected = holds(&Injector::default(), &pod, &call());
        assert_eq!(
            capture(&injected),
            json!({
                "proxyGid": 1337, "inboundPort": 15006, "outboundPort": 15001,
                "includeInboundPorts": [80, 443], "excludeInboundPorts": [9000, 15020, 15021, 15090],
                "includeOutboundPorts": "*", "excludeOutboundPorts": [25],
                "includeOutboundIPRanges": ["10.0.0.0/8", "fd00::/8"], "excludeOutboundIPRanges": ["10.96.0.1/32"],
                "excludeInterfaces": ["eth1"], "excludeOutboundUids": [0, 1000],
            })
        );
        assert_eq!(
            variable(&injected, "MALHA_LOG"),
            r#"{"agent":"default:info","components":"upstream:trace,http:off","envoy":"debug"}"#
        );
        let readiness = &proxy(&injected)["readinessProbe"];
        assert_eq!(
            (
                &readiness["initialDelaySeconds"],
                &readiness["periodSeconds"],
                &readiness["failureThreshold"]
            ),
            (&json!(0), &json!(5), &json!(3600))
        );
    }

    #[test]
    fn images_come_from_allowed_places() {
        let injector = with(
            "image: {proxy: 'registry.io/mesh/proxy:1', allowed: [registry.io/test, localhost:5000]}",
        );
        let sum = "a".repeat(64);
        let digest = format!("registry.io/mesh/proxy@sha256:{sum}");
        for good in [
            "registry.io/mesh/proxy:2",
            digest.as_str(),
            "registry.io/test/x:1",
            "localhost:5000/x",
        ] {
            let injected = holds(
                &injector,
                &annotated(&[("malha.io/proxy-image", good)]),
                &call(),
            );
            assert_eq!(proxy(&injected)["image"], good);
        }
        for bad in [
            "",
            "evil.io/proxy",
            "registry.io/tests/x",
            "registry.io/mesh/proxy2",
            "registry.io/test/../mesh",
            "registry.io/mesh/proxy:",
            "registry.io/test/x@sha256:ab",
            "registry.io/test/ x",
        ] {
            assert_eq!(
                reason(&injector, &annotated(&[("malha.io/proxy-image", bad)])),
                Reason::InvalidAnnotation,
                "{bad}"
            );
        }
    }

    #[test]
    fn slips_are_named_with_the_nearest_annotation() {
        let answer = answer(
            &Injector::default(),
            &annotated(&[
                ("sidecar.istio.io/proxyCpu", "1"),
                ("sidecar.istio.io/status", "x"),
                ("other.io/x", "y"),
            ]),
        );
        assert_eq!(codes(&answer), [WarningCode::AnnotationUnknown]);
        assert!(
            answer.warnings[0]
                .text
                .contains("did you mean sidecar.istio.io/proxyCPU?"),
            "{:?}",
            answer.warnings
        );
        let many: Vec<_> = (0..1000)
            .map(|at| format!("malha.io/{at}{}", "\u{1}".repeat(200)))
            .collect();
        let pairs: Vec<_> = many.iter().map(|key| (key.as_str(), "")).collect();
        let answer = super::answer(&Injector::default(), &annotated(&pairs));
        assert_eq!(answer.warnings.len(), 9);
        assert!(
            answer
                .warnings
                .iter()
                .all(|warning| warning.text.chars().count() <= Warning::LONGEST)
        );
    }
}

mod around {
    use super::*;
    use crate::inject::{advice::advise, explain::explain};

    fn labelled(labels: &[(&str, &str)]) -> NamespaceFacts {
        let labels = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        NamespaceFacts {
            name: "shop".to_owned(),
            labels: labels.collect(),
        }
    }

    #[test]
    fn an_explanation_ends_at_the_gate_that_decided() {
        let enabled = labelled(&[("istio-injection", "enabled")]);
        let plain = labelled(&[]);
        let injected = patched(&Injector::default(), &pod());
        let cases = [
            (&enabled, pod(), Reason::Injected, 22, true),
            (&plain, pod(), Reason::NotSelected, 12, false),
            (
                &enabled,
                pod_with("/spec/hostNetwork", json!(true)),
                Reason::HostNetwork,
                2,
                false,
            ),
            (
                &enabled,
                pod_with("/metadata/labels/sidecar.istio.io~1inject", json!("false")),
                Reason::OptedOutByLabel,
                5,
                false,
            ),
            (
                &enabled,
                annotated(&[("sidecar.istio.io/inject", "false")]),
                Reason::OptedOutByAnnotation,
                17,
                false,
            ),
            (&enabled, injected, Reason::AlreadyInjected, 18, false),
            (
                &enabled,
                annotated(&[("sidecar.istio.io/proxyCPU", "x")]),
                Reason::InvalidAnnotation,
                20,
                false,
            ),
            (
                &enabled,
                pod_with("/spec/securityContext/runAsGroup", json!(1337)),
                Reason::AppUsesProxyGid,
                21,
                false,
            ),
        ];
        for (namespace, pod, reason, row, passed) in cases {
            let explanation = explain(
                &Injector::default(),
                pod.to_string().as_bytes(),
                namespace,
                None,
                None,
            )
            .expect("a pod");
            assert_eq!(explanation.reason, reason);
            let last = explanation.gates.last().expect("a gate");
            assert_eq!(
                (last.row, last.passed),
                (row, passed),
                "{:?}",
                explanation.gates
            );
            assert!(
                explanation
                    .gates
                    .iter()
                    .rev()
                    .skip(1)
                    .all(|gate| gate.passed),
                "{:?}",
                explanation.gates
            );
            let needs_a_fix = !matches!(reason, Reason::Injected | Reason::AlreadyInjected);
            assert_eq!(explanation.fix.is_some(), needs_a_fix);
        }
    }

    #[test]
    fn an_explanation_shows_the_entry_and_what_is_outside_mutual_tls() {
        let pod = annotated(&[("traffic.sidecar.istio.io/excludeInboundPorts", "9000")]);
        let enabled = labelled(&[("istio-injection", "enabled")]);
        let explanation = explain(
            &Injector::default(),
            pod.to_string().as_bytes(),
            &enabled,
            None,
            None,
        )
        .expect("a pod");
        let selection = explanation
            .gates
            .iter()
            .find(|gate| gate.row == 6)
            .expect("row 6");
        assert!(
            selection.saw.contains("namespace.injector.malha.io")
                && selection.saw.contains("istio-injection in (enabled)"),
            "{}",
            selection.saw
        );
        assert!(
            explanation.notes.iter().any(|note| note.contains("9000")),
            "{:?}",
            explanation.notes
        );
    }

    fn deployment(template: &Value) -> Vec<u8> {
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": {"template": template}}).to_string().into_bytes()
    }

    #[test]
    fn advice_speaks_of_what_may_surprise() {
        let enabled = labelled(&[("istio-injection", "enabled")]);
        let strict = labelled(&[
            ("istio-injection", "enabled"),
            ("pod-security.kubernetes.io/enforce", "restricted"),
        ]);
        let plain = labelled(&[]);
        let annotation = annotated(&[("sidecar.istio.io/inject", "true")]);
        let cases = [
            (&enabled, pod(), Some(Reason::Injected), &[][..]),
            (
                &strict,
                pod(),
                Some(Reason::Injected),
                &["PodSecurityForbidsInit"],
            ),
            (&plain, pod(), Some(Reason::NotSelected), &[]),
            (
                &plain,
                annotation,
                Some(Reason::NotSelected),
                &["NotSelected"],
            ),
            (
                &enabled,
                pod_with("/spec/hostNetwork", json!(true)),
                Some(Reason::HostNetwork),
                &["HostNetwork"],
            ),
            (
                &enabled,
                annotated(&[("sidecar.istio.io/proxyCPU", "x")]),
                Some(Reason::InvalidAnnotation),
                &["InvalidAnnotation"],
            ),
            (
                &enabled,
                annotated(&[("sidecar.istio.io/proxycpu", "1")]),
                Some(Reason::Injected),
                &["AnnotationUnknown"],
            ),
        ];
        for (namespace, template, reason, begins) in cases {
            let advice = advise(
                &Injector::default(),
                &deployment(&template),
                namespace,
                None,
            )
            .expect("JSON");
            assert_eq!(advice.reason, reason);
            assert_eq!(advice.warnings.len(), begins.len(), "{:?}", advice.warnings);
            for (warning, begin) in advice.warnings.iter().zip(begins) {
                assert!(
                    warning.starts_with(begin) && warning.chars().count() <= Warning::LONGEST,
                    "{warning}"
                );
            }
        }
        let service = json!({"apiVersion": "v1", "kind": "Service"}).to_string();
        let advice =
            advise(&Injector::default(), service.as_bytes(), &enabled, None).expect("JSON");
        assert_eq!(advice, crate::inject::advice::Advice::default());
    }
}
