//! Explanations and advice.

use super::*;
use advice::advise;
use explain::explain;

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
    let advice = advise(&Injector::default(), service.as_bytes(), &enabled, None).expect("JSON");
    assert_eq!(advice, advice::Advice::default());
}
