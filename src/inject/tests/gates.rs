//! Who is stopped, with which code and which words.

use super::*;

#[test]
fn each_gate_has_its_code() {
    let label = |value: &str| pod_with("/metadata/labels/sidecar.istio.io~1inject", json!(value));
    let annotation = |value: &str| annotated(&[("sidecar.istio.io/inject", value)]);
    let mut both = annotation("false");
    put(
        &mut both,
        "/metadata/labels",
        json!({"sidecar.istio.io/inject": "true"}),
    );
    let named = |name: &str| pod_with("/spec/initContainers", json!([{"name": name}]));
    let port = |port: u32| pod_with("/spec/containers/0/ports", json!([{"containerPort": port}]));
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
            pod_with("/spec/volumes", json!([{"name": "malha-run"}])),
            Reason::NameConflict,
        ),
        (
            pod_with(
                "/spec/volumes",
                json!([{"name": "malha-run", "emptyDir": null}]),
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

#[test]
fn no_depth_and_no_count_can_exhaust_the_process() {
    let nested =
        |open: &str, close: &str| format!("{}{}", open.repeat(1_000_000), close.repeat(1_000_000));
    let handler = format!(
        r#"{{"spec":{{"containers":[{{"name":"app","livenessProbe":{{"httpGet":{{"port":80,"x":{}}}}}}}]}}}}"#,
        nested("[", "]")
    );
    let unread = format!(
        r#"{{"x":{},"spec":{{"containers":[{{"name":"app"}}]}}}}"#,
        nested("{\"a\":", "}").replace(":}", ":0}")
    );
    for pod in [handler, unread] {
        let answer = Injector::default()
            .inject(pod.as_bytes(), &call())
            .expect("a readable pod");
        assert_eq!(answer.verdict.reason(), Reason::Injected);
    }
    let read = format!(r#"{{"spec":{{"containers":{}}}}}"#, nested("[", "]"));
    let _ = Injector::default().inject(read.as_bytes(), &call());
    let many = format!(
        r#"{{"spec":{{"containers":[{}{{"name":"app"}}]}}}}"#,
        "{},".repeat(500_000)
    );
    let answer = Injector::default()
        .inject(many.as_bytes(), &call())
        .expect("a readable pod");
    assert_eq!(answer.verdict.reason(), Reason::InvalidPod);
}

#[test]
fn duplicate_keys_in_what_is_read_are_the_requests_fault() {
    for container in [
        r#""ports":[{"containerPort":1,"containerPort":2}]"#,
        r#""livenessProbe":{"httpGet":{"port":1,"port":2}}"#,
        r#""livenessProbe":{"httpGet":{"port":1}},"livenessProbe":{}"#,
        r#""lifecycle":{"preStop":{"httpGet":{}},"preStop":{}}"#,
        r#""resources":{"limits":{"cpu":1,"cpu":2}}"#,
    ] {
        let pod = format!(r#"{{"spec":{{"containers":[{{"name":"app",{container}}}]}}}}"#);
        assert!(
            Injector::default().inject(pod.as_bytes(), &call()).is_err(),
            "{pod}"
        );
    }
}
