//! Where ours stand among the user's containers.

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
