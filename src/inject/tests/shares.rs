//! Requests, limits and the QoS class.

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
fn a_pods_request_never_outgrows_its_limit() {
    let empty = "{resources: {requests: {cpu: '', memory: ''}, limits: {cpu: '', memory: ''}}}";
    let settings = [
        String::new(),
        "proxy: {resources: {limits: {cpu: '', memory: ''}}}".to_owned(),
        "proxy: {resources: {requests: {cpu: '', memory: ''}}}".to_owned(),
        format!("proxy: {empty}"),
        format!("init: {empty}"),
        "init: {resources: {limits: {cpu: '', memory: ''}}}".to_owned(),
        format!("proxy: {empty}\ninit: {{resources: {{limits: {{cpu: '', memory: ''}}}}}}"),
    ];
    let own = [
        json!({"requests": {"cpu": "1", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "64Mi"}}),
        json!({"requests": {"cpu": "10m", "memory": "1Mi"}, "limits": {"cpu": "20m", "memory": "1Mi"}}),
        json!({"requests": {"cpu": 2, "memory": 1_073_741_824}, "limits": {"cpu": 2.5, "memory": 1_073_741_824}}),
    ];
    let zeros = [
        ("sidecar.istio.io/proxyCPULimit", "0"),
        ("sidecar.istio.io/proxyMemoryLimit", "0"),
    ];
    let amount = |resources: &Value, side: &str, key: &str| {
        let text = resources[side][key].as_str().map(str::to_owned);
        let text = text.unwrap_or_else(|| resources[side][key].to_string());
        quantity::Quantity::parse(&text)
    };
    for settings in &settings {
        let injector = with(settings);
        for own in &own {
            for annotations in [&[][..], &zeros[..1], &zeros] {
                let mut pod = annotated(annotations);
                put(&mut pod, "/spec/resources", own.clone());
                let injected = holds(&injector, &pod, &call());
                let padded = &injected["spec"]["resources"];
                for key in ["cpu", "memory"] {
                    let [request, limit] =
                        ["requests", "limits"].map(|side| amount(padded, side, key));
                    assert!(request <= limit, "{settings} {annotations:?}: {padded}");
                    for ours in [proxy(&injected), init(&injected)] {
                        let ours = &ours["resources"];
                        let needed =
                            amount(ours, "requests", key).or_else(|| amount(ours, "limits", key));
                        assert!(
                            needed.is_none() || needed <= request,
                            "{settings} {annotations:?}: {ours} in {padded}"
                        );
                    }
                }
            }
        }
    }
    let mut unlimited = annotated(&zeros[..1]);
    let even = json!({"requests": {"cpu": "1"}, "limits": {"cpu": "1"}});
    put(&mut unlimited, "/spec/resources", even);
    let injected = holds(&Injector::default(), &unlimited, &call());
    assert_eq!(injected["spec"]["resources"]["limits"]["cpu"], "1100m");
    assert_eq!(injected["spec"]["resources"]["requests"]["cpu"], "1100m");
}

#[test]
fn a_request_that_is_defaulted_to_the_pods_limit_stays_so() {
    let limits = json!({"limits": {"cpu": "2", "memory": "1Gi"}});
    let even = json!({"cpu": "2500m", "memory": "1280Mi"});
    for resources in [
        limits.clone(),
        json!({"limits": {"cpu": "2", "memory": "1Gi"}, "requests": null}),
        json!({"limits": {"cpu": "2", "memory": "1Gi"}, "requests": {}}),
        json!({"limits": {"cpu": "2", "memory": "1Gi"}, "requests": {"cpu": null, "memory": "1Gi"}}),
    ] {
        let pod = pod_with("/spec/resources", resources);
        let injected = holds(&Injector::default(), &pod, &call());
        let padded = json!({"limits": even, "requests": even});
        assert_eq!(injected["spec"]["resources"], padded, "{pod}");
    }
    let one = pod_with("/spec/resources", json!({"limits": {"cpu": 2}}));
    let injected = holds(&Injector::default(), &one, &call());
    assert_eq!(
        injected["spec"]["resources"],
        json!({"limits": {"cpu": "4"}, "requests": {"cpu": "2100m"}}),
    );
    // Where a container asks for it, the sum of the containers' is what it is defaulted to, with ours among them.
    for asked in [
        json!({"requests": {"cpu": "0"}}),
        json!({"limits": {"cpu": "1"}}),
    ] {
        let mut pod = pod_with("/spec/resources", limits.clone());
        put(
            &mut pod,
            "/spec/initContainers",
            json!([{"name": "first", "resources": asked}]),
        );
        let injected = holds(&Injector::default(), &pod, &call());
        let requests = &injected["spec"]["resources"]["requests"];
        assert_eq!(requests, &json!({"memory": "1280Mi"}), "{pod}");
    }
    let empty = "{resources: {requests: {cpu: '', memory: ''}, limits: {cpu: '', memory: ''}}}";
    let none = with(&format!("proxy: {empty}\ninit: {empty}"));
    let one = holds(&none, &one, &call());
    assert_eq!(one["spec"]["resources"], json!({"limits": {"cpu": 2}}));
    for odd in [json!([]), json!("x"), json!(1)] {
        let odd = json!({"limits": {"cpu": "2"}, "requests": odd});
        holds(
            &Injector::default(),
            &pod_with("/spec/resources", odd),
            &call(),
        );
    }
}

#[test]
fn amounts_come_back_as_they_were_written() {
    for own in [
        json!(2),
        json!(0.5),
        json!("2"),
        json!("500m"),
        json!("2.0"),
    ] {
        let resources = json!({"requests": {"cpu": own}, "limits": {"cpu": own}});
        let injected = patched(
            &Injector::default(),
            &pod_with("/spec/resources", resources.clone()),
        );
        assert_ne!(injected["spec"]["resources"], resources);
        let mut restored = injected;
        assert!(uninject::uninject(&mut restored).expect("readable records"));
        assert_eq!(restored["spec"]["resources"], resources);
    }
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

#[test]
fn a_default_limit_of_nothing_stays_nothing() {
    let unlimited = with("proxy: {resources: {limits: {cpu: 0}}}");
    let memory = ["128Mi", "1Gi"];
    assert_eq!(resources(&unlimited, &pod()), both(["100m", ""], memory));
    let asked = annotated(&[("sidecar.istio.io/proxyCPU", "3")]);
    assert_eq!(resources(&unlimited, &asked), both(["3", ""], memory));
}

#[test]
fn a_guaranteed_pod_stays_so_where_all_defaults_are_empty() {
    let empty = "{resources: {requests: {cpu: '', memory: ''}, limits: {cpu: '', memory: ''}}}";
    let injected = holds(
        &with(&format!("proxy: {empty}\ninit: {empty}")),
        &guaranteed(),
        &call(),
    );
    let pair = both(["500m", "500m"], ["256Mi", "256Mi"]);
    assert_eq!(proxy(&injected)["resources"], pair);
    assert_eq!(init(&injected)["resources"], pair);
}
