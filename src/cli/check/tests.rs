//! Each fault is planted into facts of a sound installation, and found by its id with a way out.

use serde_json::json;

use super::*;

/// A root of nobody.
fn root(name: &str) -> Bundle {
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    let pem = params.self_signed(&key).expect("a root").pem();
    Bundle::parse_pem(pem.as_bytes()).expect("a bundle")
}

fn encoded(bundle: &Bundle) -> Value {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    BASE64_STANDARD.encode(bundle.to_pem()).into()
}

/// The objects of the rendering as an API server would have them, with the bundle that the control plane wrote.
fn of_kinds(kinds: &[&str], bundle: &Bundle) -> Vec<Value> {
    let mut found = rendering::objects(false);
    found.retain(|object| kinds.iter().any(|kind| object["kind"] == *kind));
    for object in &mut found {
        object["metadata"]["uid"] = "1".into();
        let webhooks = object["webhooks"].as_array_mut();
        for webhook in webhooks.into_iter().flatten() {
            webhook["clientConfig"]["caBundle"] = encoded(bundle);
        }
    }
    found
}

fn guards(bundle: &Bundle) -> Vec<Value> {
    let kinds: Vec<_> = GUARDS
        .iter()
        .flat_map(|(_, kinds)| *kinds)
        .copied()
        .collect();
    of_kinds(&kinds, bundle)
}

fn sound() -> Facts {
    let bundle = root("ours");
    let namespace = |name: &str| NamespaceFacts {
        name: name.to_owned(),
        ..NamespaceFacts::default()
    };
    let names = ["malha-system", "kube-system", "shop"];
    let pem = |name: &str| (name.to_owned(), bundle.to_pem());
    Facts {
        minor: Ok(33),
        skew: Ok(SignedDuration::from_secs(-1)),
        mutating: Ok(guards(&bundle)
            .into_iter()
            .filter(|guard| guard["kind"] == "MutatingWebhookConfiguration")
            .collect()),
        crds: Ok(of_kinds(&["CustomResourceDefinition"], &bundle)),
        rights: Some(Ok(Vec::new())),
        installed: Some(Ok(Some(Installed {
            deployment: Ok(Some(json!({
                "kind": "Deployment",
                "metadata": { "generation": 1 },
                "spec": { "replicas": 2 },
                "status": { "observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2 },
            }))),
            pods: Ok(Vec::new()),
            namespaces: Ok(names.map(namespace).to_vec()),
            trusted: Ok(["malha-system", "shop"].map(pem).into()),
            guards: Ok(guards(&bundle)),
            bundle: Ok(Some(bundle)),
            tried: Ok(Tried {
                namespace: "shop".to_owned(),
                outcome: Outcome::Injected,
            }),
            issued: Ok(Issuance::Issued(
                "spiffe://cluster.local/ns/malha-system/sa/malha"
                    .parse()
                    .expect("an identity"),
            )),
        }))),
    }
}

fn installed(facts: &mut Facts) -> &mut Installed {
    let installed = facts.installed.as_mut().expect("after the install");
    installed
        .as_mut()
        .expect("looked at")
        .as_mut()
        .expect("there")
}

fn guard<'a>(facts: &'a mut Facts, kind: &str) -> &'a mut Value {
    let guards = installed(facts).guards.as_mut().expect("looked at");
    guards
        .iter_mut()
        .find(|guard| guard["kind"] == kind)
        .expect("one")
}

fn tried(outcome: Outcome) -> impl Fn(&mut Facts) {
    move |facts| {
        installed(facts).tried = Ok(Tried {
            namespace: "shop".to_owned(),
            outcome: outcome.clone(),
        });
    }
}

fn uncalled(words: &str) -> impl Fn(&mut Facts) {
    let words = format!("failed calling webhook \"namespace.injector.malha.io\": {words}");
    tried(Outcome::Uncalled(words))
}

#[test]
fn a_sound_installation_passes_and_every_line_has_its_own_id() {
    let findings = verdicts(&sound());
    for finding in &findings {
        assert_eq!(finding.mark, Mark::Pass, "{finding:?}");
        assert!(finding.hint.is_empty(), "{finding:?}");
    }
    let ids: Vec<_> = findings.iter().map(|finding| finding.id).collect();
    assert_eq!(
        ids,
        [
            "api-version",
            "clock",
            "rights",
            "crds",
            "foreign-webhooks",
            "control-plane",
            "authority",
            "trust-bundles",
            "webhooks",
            "admission-policy",
            "ca-bundle",
            "admission",
            "issuance"
        ],
        "ids are a promise to scripts"
    );
}

/// What is planted; the id and the mark that it must give; words of the text; words of the way out.
type Case = (
    &'static str,
    Box<dyn Fn(&mut Facts)>,
    &'static str,
    Mark,
    &'static str,
    &'static str,
);

fn case(
    what: &'static str,
    plant: impl Fn(&mut Facts) + 'static,
    (id, mark): (&'static str, Mark),
    text: &'static str,
    hint: &'static str,
) -> Case {
    (what, Box::new(plant), id, mark, text, hint)
}

#[test]
fn every_planted_fault_is_named_with_its_id_and_the_way_out() {
    use Mark::{Fail, Warn};
    let cases = [
        case(
            "an old API server",
            |facts| facts.minor = Ok(32),
            ("api-version", Fail),
            "1.32",
            "1.33 or later",
        ),
        case(
            "a clock a minute behind",
            |facts| facts.skew = Ok(SignedDuration::from_secs(-60)),
            ("clock", Warn),
            "60 s behind",
            "NTP",
        ),
        case(
            "a clock an hour ahead",
            |facts| facts.skew = Ok(SignedDuration::from_secs(3600)),
            ("clock", Fail),
            "3600 s ahead",
            "NTP",
        ),
        case(
            "an authority that refuses",
            |facts| {
                let words = "TokenExpired: the token expired".to_owned();
                installed(facts).issued = Ok(Issuance::Refused(words));
            },
            ("issuance", Fail),
            "TokenExpired",
            "malha doc",
        ),
        case(
            "no right to have a token made",
            |facts| installed(facts).issued = Err("forbidden".to_owned()),
            ("issuance", Warn),
            "forbidden",
            "rights",
        ),
        case(
            "a right that is missing",
            |facts| facts.rights = Some(Ok(vec!["patch clusterroles".to_owned()])),
            ("rights", Fail),
            "patch clusterroles",
            "cluster administrator",
        ),
        case(
            "Istio's injector",
            |facts| {
                let selector = json!({ "matchLabels": { "istio-injection": "enabled" } });
                let rule =
                    json!({ "apiGroups": [""], "resources": ["pods"], "operations": ["CREATE"] });
                facts.mutating = Ok(vec![json!({
                    "metadata": { "name": "istio-sidecar-injector" },
                    "webhooks": [{ "name": "a.istio.io", "namespaceSelector": selector, "rules": [rule] }],
                })]);
            },
            ("foreign-webhooks", Fail),
            "istio-sidecar-injector (a.istio.io)",
            "remove that configuration",
        ),
        case(
            "Istio's CRD",
            |facts| {
                let crds = facts.crds.as_mut().expect("looked at");
                crds[0]["metadata"]["labels"] = json!({ "app": "istio-pilot" });
            },
            ("crds", Warn),
            "belongs to istio-pilot",
            "--force",
        ),
        case(
            "a CRD of a version nobody watches",
            |facts| {
                let crds = facts.crds.as_mut().expect("looked at");
                crds[0]["spec"]["versions"] = json!([{ "name": "v1beta1", "served": true }]);
            },
            ("crds", Fail),
            "does not serve version v1",
            "up to date",
        ),
        case(
            "a CRD that is gone",
            |facts| facts.crds = Ok(Vec::new()),
            ("crds", Fail),
            "no CustomResourceDefinition peerauthentications.security.istio.io",
            "install --apply",
        ),
        case(
            "no installation",
            |facts| facts.installed = Some(Ok(None)),
            ("installed", Fail),
            "no namespace malha-system",
            "install --apply",
        ),
        case(
            "no Deployment",
            |facts| installed(facts).deployment = Ok(None),
            ("control-plane", Fail),
            "no Deployment",
            "install --apply",
        ),
        case(
            "no replica, for want of the image",
            |facts| {
                let deployment = installed(facts).deployment.as_mut().expect("looked at");
                deployment.as_mut().expect("there")["status"]["availableReplicas"] = json!(0);
                let waiting = json!([{ "state": { "waiting": { "reason": "ImagePullBackOff" } } }]);
                let status = json!({ "containerStatuses": waiting });
                installed(facts).pods = Ok(vec![
                    json!({ "metadata": { "name": "malha-1" }, "status": status }),
                ]);
            },
            ("control-plane", Fail),
            "0 of 2 replicas are available; pod malha-1: ImagePullBackOff",
            "describe pods",
        ),
        case(
            "one replica of two, for want of a node",
            |facts| {
                let deployment = installed(facts).deployment.as_mut().expect("looked at");
                deployment.as_mut().expect("there")["status"]["availableReplicas"] = json!(1);
                let condition = json!({ "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no node" });
                let status = json!({ "conditions": [condition] });
                installed(facts).pods = Ok(vec![
                    json!({ "metadata": { "name": "malha-2" }, "status": status }),
                ]);
            },
            ("control-plane", Warn),
            "pod malha-2: Unschedulable: no node",
            "describe pods",
        ),
        case(
            "a journal that is gone",
            |facts| installed(facts).bundle = Ok(None),
            ("authority", Fail),
            "no Secret malha-system/malha-ca",
            "backup",
        ),
        case(
            "a namespace without the roots",
            |facts| {
                let trusted = installed(facts).trusted.as_mut().expect("looked at");
                trusted.remove("shop");
            },
            ("trust-bundles", Fail),
            "not in shop",
            "leader",
        ),
        case(
            "a namespace with another's roots",
            |facts| {
                let trusted = installed(facts).trusted.as_mut().expect("looked at");
                trusted.insert("shop".to_owned(), root("another's").to_pem());
            },
            ("trust-bundles", Fail),
            "does not hold the authority's roots in shop",
            "leader",
        ),
        case(
            "another's caBundle",
            |facts| {
                let injector = guard(facts, "MutatingWebhookConfiguration");
                injector["webhooks"][1]["clientConfig"]["caBundle"] = encoded(&root("another's"));
            },
            ("ca-bundle", Fail),
            "pod.injector.malha.io (another's)",
            "writes it back",
        ),
        case(
            "an empty caBundle",
            |facts| {
                let advice = guard(facts, "ValidatingWebhookConfiguration");
                let config = advice["webhooks"][0]["clientConfig"].as_object_mut();
                config.expect("an object").remove("caBundle");
            },
            ("ca-bundle", Fail),
            "namespace.advice.malha.io (empty)",
            "writes it back",
        ),
        case(
            "a webhook that fails open",
            |facts| {
                let injector = guard(facts, "MutatingWebhookConfiguration");
                injector["webhooks"][0]["failurePolicy"] = json!("Ignore");
            },
            ("webhooks", Warn),
            "webhooks[namespace.injector.malha.io].failurePolicy is \"Ignore\", and was \"Fail\"",
            "--force",
        ),
        case(
            "an entry that is gone",
            |facts| {
                let injector = guard(facts, "MutatingWebhookConfiguration");
                injector["webhooks"].as_array_mut().expect("a list").pop();
            },
            ("webhooks", Warn),
            "webhooks is a list of 3, and was a list of 4",
            "--force",
        ),
        case(
            "a webhook configuration that is gone",
            |facts| {
                let guards = installed(facts).guards.as_mut().expect("looked at");
                guards.retain(|guard| guard["kind"] != "MutatingWebhookConfiguration");
            },
            ("webhooks", Fail),
            "MutatingWebhookConfiguration malha-injector is gone",
            "install --apply",
        ),
        case(
            "a policy that is gone",
            |facts| {
                let guards = installed(facts).guards.as_mut().expect("looked at");
                guards.retain(|guard| guard["kind"] != "ValidatingAdmissionPolicy");
            },
            ("admission-policy", Fail),
            "malha-sidecar-present is gone",
            "install --apply",
        ),
        case(
            "an installation of another version",
            |facts| {
                let policy = guard(facts, "ValidatingAdmissionPolicy");
                policy["metadata"]["labels"]["app.kubernetes.io/version"] = json!("9.0.0");
            },
            ("admission-policy", Warn),
            "is of version \"9.0.0\"",
            "upgrade",
        ),
        case(
            "a blocked port",
            uncalled("Post \"https://malha..\": context deadline exceeded"),
            ("admission", Fail),
            "namespace shop",
            "TCP 15017",
        ),
        case(
            "nobody who listens",
            uncalled("dial tcp 10.0.0.1:443: connect: connection refused"),
            ("admission", Fail),
            "cannot call the injector",
            "nobody listens",
        ),
        case(
            "a certificate that is not believed",
            uncalled(
                "tls: failed to verify certificate: x509: certificate signed by unknown authority",
            ),
            ("admission", Fail),
            "x509",
            "see ca-bundle",
        ),
        case(
            "a Service that is gone",
            uncalled("service \"malha\" not found"),
            ("admission", Fail),
            "not found",
            "Service malha-system/malha",
        ),
        case(
            "an injector that nobody asks",
            tried(Outcome::Plain),
            ("admission", Fail),
            "without its sidecar",
            "see webhooks",
        ),
        case(
            "an injector that nobody asks, and a policy that notices",
            tried(Outcome::Unasked),
            ("admission", Fail),
            "malha-sidecar-present",
            "see webhooks",
        ),
        case(
            "a namespace that lets no sidecar in",
            tried(Outcome::Refused("violates PodSecurity".to_owned())),
            ("admission", Fail),
            "violates PodSecurity",
            "another namespace",
        ),
        case(
            "what may not be read",
            |facts| installed(facts).guards = Err("forbidden".to_owned()),
            ("webhooks", Warn),
            "could not be looked at: forbidden",
            "rights",
        ),
    ];
    for (what, plant, id, mark, text, hint) in cases {
        let mut facts = sound();
        plant(&mut facts);
        let findings = verdicts(&facts);
        let found: Vec<_> = findings
            .iter()
            .filter(|finding| finding.mark != Mark::Pass)
            .collect();
        let [found] = found.as_slice() else {
            panic!("{what}: not one finding: {found:#?}");
        };
        assert_eq!((found.id, found.mark), (id, mark), "{what}: {found:#?}");
        assert!(found.text.contains(text), "{what}: {found:#?}");
        assert!(found.hint.contains(hint), "{what}: {found:#?}");
    }
}

#[test]
fn webhooks_that_never_see_a_pod_of_the_mesh_are_no_rivals() {
    let webhook = |selector: Value, resources: &[&str], operations: &[&str]| {
        json!({ "metadata": { "name": "other" }, "webhooks": [{
            "name": "w", "namespaceSelector": selector,
            "rules": [{ "apiGroups": [""], "resources": resources, "operations": operations }],
        }] })
    };
    let asks = |key: &str, operator: &str, values: &[&str]| json!({ "matchExpressions": [{ "key": key, "operator": operator, "values": values }] });
    let enabled = || asks("istio-injection", "In", &["enabled"]);
    for (configuration, rival) in [
        (webhook(enabled(), &["pods"], &["CREATE"]), true),
        (webhook(enabled(), &["*"], &["*"]), true),
        (webhook(enabled(), &["services"], &["CREATE"]), false),
        (webhook(enabled(), &["pods"], &["UPDATE"]), false),
        (
            webhook(
                asks("istio.io/rev", "In", &["canary"]),
                &["pods"],
                &["CREATE"],
            ),
            false,
        ),
        (
            webhook(
                asks("istio-injection", "DoesNotExist", &[]),
                &["pods"],
                &["CREATE"],
            ),
            false,
        ),
        (
            webhook(
                asks("linkerd.io/inject", "Exists", &[]),
                &["pods"],
                &["CREATE"],
            ),
            false,
        ),
        (webhook(json!({}), &["pods"], &["CREATE"]), false),
    ] {
        let found = foreign(std::slice::from_ref(&configuration));
        assert_eq!(found[0].mark == Mark::Fail, rival, "{configuration:#}");
    }
}
