//! Annotations, good and bad.

use super::*;
use annotations::{Effect, KNOWN};

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
                    let whole = |warning: &Warning| !warning.text.ends_with("...");
                    assert!(answer.warnings.iter().all(whole), "{:?}", answer.warnings);
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
