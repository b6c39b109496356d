//! What is added: containers, volumes, variables.

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
