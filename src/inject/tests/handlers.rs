//! Probes and lifecycle handlers.

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
    let served = |path: &str| json!({"httpGet": {"path": path, "port": 15020, "scheme": "HTTP"}});
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
    let container = |name: &str| json!({"name": name, "livenessProbe": {"httpGet": {"port": 80}}});
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
