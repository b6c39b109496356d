//! The generator itself: what it promises to the tests that use it.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::pods::{self, Mode};

#[test]
fn the_same_seed_gives_the_same_bytes() {
    for seed in 0..50 {
        for mode in [Mode::Valid, Mode::Anything] {
            assert_eq!(
                pods::pod(seed, mode).to_string(),
                pods::pod(seed, mode).to_string(),
                "seed {seed}"
            );
        }
    }
}

#[test]
fn valid_pods_have_the_shape_of_pods() {
    for seed in 0..500 {
        let pod = pods::pod(seed, Mode::Valid);
        let typed: Pod = serde_json::from_value(pod.clone())
            .unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{pod:#}"));
        let spec = typed.spec.expect("a pod has a spec");
        let names: Vec<String> = spec
            .containers
            .into_iter()
            .chain(spec.init_containers.into_iter().flatten())
            .map(|container| container.name)
            .collect();
        assert_eq!(
            names.iter().collect::<BTreeSet<_>>().len(),
            names.len(),
            "seed {seed}: {names:?}"
        );
    }
}

/// A generator that has quietly lost a feature would leave properties without a case.
#[test]
fn a_thousand_pods_show_every_oddity() {
    let mut seen = BTreeSet::new();
    for seed in 0..1_000 {
        paths("", &pods::pod(seed, Mode::Anything), &mut seen);
    }
    for wanted in [
        "/metadata/labels=null",
        "/metadata/labels={}",
        "/metadata/annotations=null",
        "/metadata/annotations={}",
        "/metadata/annotations/malha.io/run-before=",
        "/metadata/annotations/malha.io/status=",
        "/metadata/annotations/sidecar.istio.io/inject=",
        "/metadata/ownerReferences/*/kind=",
        "/spec/initContainers=null",
        "/spec/initContainers/*/restartPolicy=",
        "/spec/initContainers/*/livenessProbe/grpc/port=",
        "/spec/initContainers/*/livenessProbe/httpGet/port=",
        "/spec/initContainers/*/lifecycle/preStop/httpGet/port=",
        "/spec/containers/*/startupProbe/tcpSocket/host=",
        "/spec/containers/*/livenessProbe/httpGet/host=",
        "/spec/containers/*/livenessProbe/httpGet/httpHeaders/*/value=",
        "/spec/containers/*/readinessProbe/exec/command/*=",
        "/spec/containers/*/readinessProbe=null",
        "/spec/containers/*/lifecycle/postStart/sleep/seconds=",
        "/spec/containers/*/lifecycle/postStart/tcpSocket/port=",
        "/spec/containers/*/resources=null",
        "/spec/containers/*/resources/limits=null",
        "/spec/containers/*/securityContext/runAsGroup=",
        "/spec/containers/*/futureField=null",
        "/spec/containers/*/ports=null",
        "/spec/ephemeralContainers/*/name=",
        "/spec/hostNetwork=",
        "/spec/imagePullSecrets=null",
        "/spec/imagePullSecrets=[]",
        "/spec/os/name=",
        "/spec/resources/limits/cpu=",
        "/spec/volumes=null",
        "/spec/volumes=[]",
    ] {
        assert!(seen.contains(wanted), "no pod of a thousand shows {wanted}");
    }
}

/// Every path that occurs, list positions as `*`; leaves that are null or empty say so.
fn paths(at: &str, value: &Value, seen: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (key, field) in fields {
                paths(&format!("{at}/{key}"), field, seen);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            items
                .iter()
                .for_each(|item| paths(&format!("{at}/*"), item, seen));
        }
        Value::Object(_) => {
            seen.insert(format!("{at}={{}}"));
        }
        Value::Array(_) => {
            seen.insert(format!("{at}=[]"));
        }
        Value::Null => {
            seen.insert(format!("{at}=null"));
        }
        _ => {
            seen.insert(format!("{at}="));
        }
    }
}
