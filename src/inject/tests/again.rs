//! A second call for the same pod.

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

#[test]
fn a_probe_that_was_written_over_ours_is_rewritten_again() {
    let mut pod = pod();
    put(
        &mut pod,
        "/spec/containers/0/livenessProbe",
        json!({"httpGet": {"port": 80}}),
    );
    let mut injected = patched(&Injector::default(), &pod);
    let theirs = json!({"tcpSocket": {"port": 81}});
    injected["spec"]["containers"][0]["livenessProbe"] = theirs.clone();
    let (mut completed, _) = reinvoked(&Injector::default(), &injected);
    assert_eq!(
        records(&completed),
        json!({"/app-health/app/livez": theirs})
    );
    assert!(uninject::uninject(&mut completed).expect("readable records"));
    assert_eq!(completed["spec"]["containers"][0]["livenessProbe"], theirs);
}

#[test]
fn what_the_api_server_fills_in_between_two_calls_changes_nothing() {
    let mut pod = annotated(&[("malha.io/workload-api", "true")]);
    put(
        &mut pod,
        "/spec/containers/0/readinessProbe",
        json!({"tcpSocket": {"port": 80}}),
    );
    let mut injected = patched(&Injector::default(), &pod);
    let proxy = &mut injected["spec"]["initContainers"][1];
    proxy["terminationMessagePath"] = json!("/dev/termination-log");
    proxy["readinessProbe"]["successThreshold"] = json!(1);
    for variable in proxy["env"].as_array_mut().expect("variables") {
        if variable["value"] == "" {
            variable
                .as_object_mut()
                .expect("a variable")
                .remove("value");
        }
        if variable["valueFrom"]["fieldRef"].is_object() {
            variable["valueFrom"]["fieldRef"]["apiVersion"] = json!("v1");
        }
    }
    for volume in injected["spec"]["volumes"].as_array_mut().expect("volumes") {
        for source in ["projected", "downwardAPI", "configMap"] {
            if volume[source].is_object() {
                volume[source]["defaultMode"] = json!(420);
            }
        }
    }
    assert_eq!(
        reason(&Injector::default(), &injected),
        Reason::AlreadyInjected
    );
}

#[test]
fn a_native_sidecar_that_came_since_is_probed_past_the_redirection_in_classic_order() {
    let late = json!({"name": "late", "restartPolicy": "Always", "startupProbe": {"httpGet": {"port": 7000}}});
    for settings in ["native: false", "native: false\nredirect: external"] {
        let mut injected = patched(&with(settings), &pod());
        insert(&mut injected, "initContainers", 1, late.clone());
        let (completed, _) = reinvoked(&with(settings), &injected);
        assert_eq!(item(&completed["spec"]["initContainers"], "late"), &late);
        let argument = init(&completed)["args"]
            .as_array()
            .and_then(|args| args.last()?.as_str())
            .expect("an argument");
        let argument: Value = serde_json::from_str(argument).expect("it is JSON");
        assert_eq!(
            argument["excludeInboundPorts"],
            json!([7000, 15020, 15021, 15090])
        );
        assert_eq!(argument["proxyGid"], 1337);
    }
}
