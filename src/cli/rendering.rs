//! What an installation consists of: the renderings of `manifests/`, which travel with the program.
//!
//! `manifests/install.yaml`, `monitoring.yaml` -> [`objects`], [`monitoring`] -> what `install` applies, `uninstall`
//! removes and `check` compares with

use std::fmt;

use kube::api::{ApiResource, GroupVersionKind};
use serde_json::Value;

/// Where everything of an installation is.
pub(super) const NAMESPACE: &str = "malha-system";

/// The rendering, byte for byte as `make manifests` wrote it.
pub(super) fn text(ha: bool) -> &'static str {
    if ha {
        include_str!("../../manifests/install-ha.yaml")
    } else {
        include_str!("../../manifests/install.yaml")
    }
}

/// What watches it, where the Prometheus operator is; byte for byte as `make manifests` wrote it.
pub(super) fn monitoring_text() -> &'static str {
    include_str!("../../manifests/monitoring.yaml")
}

/// The objects of [`monitoring_text`].
pub(super) fn monitoring() -> Vec<Value> {
    serde_saphyr::from_multiple(monitoring_text()).expect("a test reads it")
}

/// Its objects, in the order in which they are applied: namespace and CRDs first, what calls the control plane last.
pub(super) fn objects(ha: bool) -> Vec<Value> {
    let mut objects: Vec<Value> =
        serde_saphyr::from_multiple(text(ha)).expect("a test reads both renderings");
    for object in &mut objects {
        // kustomize takes these kinds of the cluster for kinds of a namespace; kubectl and helm ask the API server.
        if let Some("ValidatingAdmissionPolicy" | "ValidatingAdmissionPolicyBinding") =
            object["kind"].as_str()
            && let Some(metadata) = object["metadata"].as_object_mut()
        {
            metadata.shift_remove("namespace");
        }
    }
    objects
}

/// Makes the objects pull their images from `registry`.
///
/// The control plane's image stands in its pods; the others in the injector's settings.
pub(super) fn pull_from(registry: &str, objects: &mut [Value]) {
    for object in objects {
        let spec = match object["kind"].as_str() {
            Some("Deployment") => object.pointer_mut("/spec/template/spec"),
            Some("CronJob") => object.pointer_mut("/spec/jobTemplate/spec/template/spec"),
            Some("ConfigMap") if object["metadata"]["name"] == "malha-config" => {
                object["data"]["injector.yaml"] = injector_settings(registry).into();
                None
            }
            _ => None,
        };
        let containers = spec.and_then(|spec| spec["containers"].as_array_mut());
        for container in containers.into_iter().flatten() {
            if let Some(image) = container["image"].as_str() {
                container["image"] = format!("{registry}/{image}").into();
            }
        }
    }
}

fn injector_settings(registry: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "image:\n  proxy: {registry}/malha-proxy:{version}\n  init: {registry}/malha-init:{version}\n"
    )
}

/// An object by kind and name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ObjectName {
    pub(super) resource: ApiResource,
    pub(super) namespace: Option<String>,
    pub(super) name: String,
}

impl ObjectName {
    pub(super) fn new(gvk: (&str, &str, &str), namespace: Option<&str>, name: &str) -> Self {
        let (group, version, kind) = gvk;
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        Self {
            resource,
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
        }
    }

    /// Of an object that says its kind and its name.
    pub(super) fn of(object: &Value) -> Self {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let version = text("/apiVersion").unwrap_or_default();
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        let kind = text("/kind").unwrap_or_default();
        let name = text("/metadata/name").unwrap_or_default();
        Self::new((group, version, kind), text("/metadata/namespace"), name)
    }

    /// `deployment.apps/malha`, as kubectl's `-o name`.
    pub(super) fn as_kubectl(&self) -> String {
        let ApiResource { kind, group, .. } = &self.resource;
        let kind = kind.to_ascii_lowercase();
        match group.as_str() {
            "" => format!("{kind}/{}", self.name),
            group => format!("{kind}.{group}/{}", self.name),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.resource.kind)?;
        match &self.namespace {
            Some(namespace) => write!(f, "{namespace}/{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespace_and_crds_come_first_and_webhooks_last() {
        for ha in [false, true] {
            let objects = objects(ha);
            let kinds: Vec<_> = objects
                .iter()
                .filter_map(|it| it["kind"].as_str())
                .collect();
            assert_eq!(kinds[..2], ["Namespace", "CustomResourceDefinition"]);
            assert_eq!(
                kinds[kinds.len() - 2..],
                [
                    "MutatingWebhookConfiguration",
                    "ValidatingWebhookConfiguration"
                ]
            );
        }
    }

    #[test]
    fn objects_are_named_as_kubectl_names_them() {
        let names: Vec<_> = objects(false).iter().map(ObjectName::of).collect();
        let find = |kind: &str| names.iter().find(|name| name.resource.kind == kind);
        let deployment = find("Deployment").expect("one");
        assert_eq!(deployment.as_kubectl(), "deployment.apps/malha");
        assert_eq!(deployment.to_string(), "Deployment malha-system/malha");
        let policies = find("NetworkPolicy").expect("some");
        assert_eq!(policies.resource.plural, "networkpolicies");
        assert_eq!(
            find("Namespace").expect("one").to_string(),
            "Namespace malha-system"
        );
    }

    #[test]
    fn every_image_comes_from_the_registry_that_is_named() {
        let mut objects = objects(true);
        pull_from("registry.example.com/mesh", &mut objects);
        let text = serde_json::to_string(&objects).expect("JSON");
        assert!(!text.contains("\"image\":\"malha"), "{text}");
        let version = env!("CARGO_PKG_VERSION");
        for (image, count) in [("malha", 2), ("malha-proxy", 1), ("malha-init", 1)] {
            let image = format!("registry.example.com/mesh/{image}:{version}");
            assert_eq!(text.matches(&image).count(), count, "{image}");
        }
        let config = objects.iter().find(|it| it["kind"] == "ConfigMap");
        let settings = config.and_then(|it| it["data"]["injector.yaml"].as_str());
        crate::inject::InjectSettings::merged(settings.expect("settings")).expect("readable");
    }
}
