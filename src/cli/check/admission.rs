//! A pod that the API server tries: a dry run through every webhook and policy, of which nothing is stored. It is the one
//! look from the API server's own side, and so the one that finds a blocked port.

use anyhow::{Context as _, anyhow};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::ApiResource;
use serde_json::{Value, json};

use crate::{
    cli::{
        cluster::{Cluster, has_sidecar},
        mesh::namespace_facts,
    },
    inject::{
        NamespaceFacts,
        select::{INJECT, PodFacts, select},
    },
    k8s::ApiError,
};

/// The revision of the entries that are installed.
const REVISION: &str = "default";

/// What became of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Outcome {
    /// It would have its sidecar.
    Injected,
    /// It would be let in without one: nobody asked the injector.
    Plain,
    /// The admission policy refused it for want of a sidecar: nobody asked the injector.
    Unasked,
    /// The API server could not call the injector; its own words.
    Uncalled(String),
    /// Refused for another reason; the API server's words.
    Refused(String),
}

/// A pod that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) struct Tried {
    pub(in crate::cli) namespace: String,
    pub(in crate::cli) outcome: Outcome,
}

impl Tried {
    /// What went wrong, in words; `None` where the pod got its sidecar.
    pub(in crate::cli) fn fault(&self) -> Option<String> {
        let namespace = &self.namespace;
        match &self.outcome {
            Outcome::Injected => None,
            Outcome::Plain => Some(format!(
                "a pod of namespace {namespace} would be let in without its sidecar: the injector is not asked"
            )),
            Outcome::Unasked => Some(format!(
                "a pod of namespace {namespace} is refused by the policy malha-sidecar-present: the injector is not asked"
            )),
            Outcome::Uncalled(words) => Some(format!(
                "the API server cannot call the injector for a pod of namespace {namespace}: {words}"
            )),
            Outcome::Refused(words) => Some(format!(
                "a pod of namespace {namespace} is refused: {words}"
            )),
        }
    }
}

/// Has the API server try a pod in a namespace of the mesh; where there is none yet, elsewhere with the label that makes a
/// single pod one of the mesh.
///
/// # Errors
/// The namespaces cannot be listed, or each of them refuses sidecars.
pub(in crate::cli) async fn try_a_pod(cluster: &Cluster) -> anyhow::Result<Tried> {
    let namespaces = cluster
        .objects(&ApiResource::erase::<Namespace>(&()), None)
        .await?;
    let facts: anyhow::Result<Vec<_>> = namespaces
        .iter()
        .filter(|namespace| namespace["status"]["phase"] != "Terminating")
        .map(namespace_facts)
        .collect();
    let (namespace, by_label) = place(&facts?).context(
        "there is no namespace whose pods may have a sidecar; label one istio-injection=enabled",
    )?;
    let pod = pod(by_label);
    let pods = ApiResource::erase::<Pod>(&());
    let answer = cluster.dry_run(&pods, &namespace, &pod).await;
    let outcome = outcome(answer)?;
    Ok(Tried { namespace, outcome })
}

/// Where the pod is tried, and whether it needs the label.
fn place(namespaces: &[NamespaceFacts]) -> Option<(String, bool)> {
    let asked = PodFacts {
        inject: Some("true"),
        ..PodFacts::default()
    };
    let takes = |pod: &PodFacts<'_>| {
        let mut taking: Vec<_> = namespaces
            .iter()
            .filter(|namespace| select(namespace, pod, REVISION).outcome.is_ok())
            .map(|namespace| namespace.name.clone())
            .collect();
        taking.sort_by_key(|name| name != "default");
        taking.into_iter().next()
    };
    let meshed = takes(&PodFacts::default()).map(|name| (name, false));
    meshed.or_else(|| takes(&asked).map(|name| (name, true)))
}

/// A pod that asks for nothing.
fn pod(by_label: bool) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "generateName": "malha-check-" },
        "spec": {
            "containers": [{
                "name": "app",
                "image": "example.invalid/never-pulled:1",
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "capabilities": { "drop": ["ALL"] },
                    "runAsNonRoot": true,
                    "seccompProfile": { "type": "RuntimeDefault" },
                },
            }],
        },
    });
    if by_label {
        pod["metadata"]["labels"] = json!({ INJECT: "true" });
    }
    pod
}

fn outcome(answer: Result<Value, ApiError>) -> anyhow::Result<Outcome> {
    match answer {
        Ok(stored) => {
            let stored: Pod = serde_json::from_value(stored).context("a pod that is none")?;
            Ok(if has_sidecar(&stored) {
                Outcome::Injected
            } else {
                Outcome::Plain
            })
        }
        Err(ApiError::Refused(kube::Error::Api(status))) => Ok(refusal(status.message.clone())),
        Err(silent @ ApiError::Silent(_)) => Ok(Outcome::Uncalled(silent.to_string())),
        Err(error) => Err(anyhow!(error).context("cannot try a pod")),
    }
}

fn refusal(words: String) -> Outcome {
    if words.contains("failed calling webhook") && words.contains("injector.malha.io") {
        Outcome::Uncalled(words)
    } else if words.contains("malha-sidecar-present") {
        Outcome::Unasked
    } else {
        Outcome::Refused(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_of_the_mesh_comes_before_one_that_needs_the_pods_label() {
        let namespace = |name: &str, labels: &[(&str, &str)]| NamespaceFacts {
            name: name.to_owned(),
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        };
        let system = namespace("kube-system", &[]);
        let off = namespace("off", &[("istio-injection", "disabled")]);
        let shop = namespace("shop", &[("istio-injection", "enabled")]);
        let (a, default) = (namespace("a", &[]), namespace("default", &[]));
        assert_eq!(place(&[system.clone(), off.clone()]), None);
        let elsewhere = [system.clone(), a.clone(), off, default.clone()];
        assert_eq!(place(&elsewhere), Some(("default".to_owned(), true)));
        assert_eq!(
            place(&[system, a, default, shop]),
            Some(("shop".to_owned(), false))
        );
    }

    #[test]
    fn refusals_are_told_apart_by_whose_they_are() {
        let call = "Internal error occurred: failed calling webhook \"pod.injector.malha.io\": connection refused";
        assert_eq!(refusal(call.to_owned()), Outcome::Uncalled(call.to_owned()));
        let policy = "pods \"x\" is forbidden: ValidatingAdmissionPolicy 'malha-sidecar-present' with binding ..";
        assert_eq!(refusal(policy.to_owned()), Outcome::Unasked);
        let other = "failed calling webhook \"images.example.com\": timeout";
        assert_eq!(
            refusal(other.to_owned()),
            Outcome::Refused(other.to_owned())
        );
    }
}
