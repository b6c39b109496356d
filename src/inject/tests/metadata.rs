//! Labels, annotations and merged lists.

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
fn scraping_that_cannot_be_read_is_left_alone() {
    for (key, odd) in [
        ("prometheus.io/port", json!(8080)),
        ("prometheus.io/scrape", json!(true)),
        ("prometheus.io/scheme", json!(["http"])),
    ] {
        let mut pod = annotated(&[("prometheus.io/path", "/metrics")]);
        put(
            &mut pod,
            &format!("/metadata/annotations/{}", key.replace('/', "~1")),
            odd.clone(),
        );
        let injected = holds(&Injector::default(), &pod, &call());
        let annotations = &injected["metadata"]["annotations"];
        assert_eq!(annotations[key], odd);
        assert_eq!(annotations["prometheus.io/path"], "/metrics");
        let keys = annotations.as_object().expect("annotations").keys();
        let own = keys.filter(|key| key.starts_with("prometheus.io/"));
        assert_eq!(own.count(), 2, "{annotations}");
        assert_eq!(variable(&injected, "MALHA_PROMETHEUS"), "null");
    }
}

#[test]
fn a_pod_full_of_annotations_stays_valid() {
    let bytes = |pod: &Value| -> usize {
        let annotations = pod["metadata"]["annotations"].as_object();
        let annotations = annotations.expect("annotations").iter();
        let sizes = annotations.map(|(key, value)| key.len() + value.as_str().map_or(0, str::len));
        sizes.sum()
    };
    let room = 262_144;
    let safe = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes";
    let ours = [
        "malha.io/status",
        "kubectl.kubernetes.io/default-logs-container",
        "kubectl.kubernetes.io/default-container",
        safe,
        "prometheus.io/port",
    ];
    let filled = |free: usize| {
        let own = [
            (safe, "cache"),
            ("notes", ""),
            ("prometheus.io/scrape", "true"),
            ("prometheus.io/port", "80"),
        ];
        let mut pod = annotated(&own);
        let text = "n".repeat(room - free - bytes(&pod));
        put(&mut pod, "/metadata/annotations/notes", json!(text));
        pod
    };
    let mut met = std::collections::BTreeSet::new();
    for free in (0..8).chain((8..1_200).step_by(17)) {
        let pod = filled(free);
        assert_eq!(bytes(&pod), room - free);
        let injected = holds(&Injector::default(), &pod, &call());
        assert!(bytes(&injected) <= room, "{free}: {}", bytes(&injected));
        let left_out = |key: &&&str| {
            injected["metadata"]["annotations"][**key] == pod["metadata"]["annotations"][**key]
        };
        let missing = ours.iter().filter(left_out).count();
        assert!(
            ours.iter().take(missing).all(|key| left_out(&key)),
            "{free}: the order"
        );
        let warned = codes(&answer(&Injector::default(), &pod));
        assert_eq!(
            warned,
            vec![WarningCode::LargePod; usize::from(missing > 0)]
        );
        let scraped = variable(&injected, "MALHA_PROMETHEUS");
        assert_eq!(
            scraped == "null",
            missing == ours.len(),
            "{free}: {scraped}"
        );
        met.insert(missing);
    }
    assert_eq!(met, (0..=ours.len()).collect());
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
