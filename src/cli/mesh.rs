//! What the offline verbs take the mesh to be: the injector's settings, and the namespaces.

use std::collections::BTreeMap;

use anyhow::{Context as _, anyhow};
use serde_json::Value;

use super::{
    Exit, Failure, documents::Document, exit::OrExit as _, serve::overrides::Overrides,
    settings::SettingsArgs,
};
use crate::{
    config::{Layers, Settings},
    inject::{
        Injector, NamespaceFacts,
        workload::{self, Surroundings},
    },
};

/// Flags about the mesh.
#[derive(Debug, clap::Args)]
pub(super) struct MeshArgs {
    /// The namespace of objects that say none: default, or the kubeconfig's where a cluster is asked.
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,
    /// Labels of the namespaces that are not among the input, such as istio-injection=enabled (the default),
    /// istio.io/rev=default, or "" for none.
    #[arg(long, value_name = "KEY=VALUE,..", value_parser = parse_labels)]
    namespace_labels: Option<Labels>,
    #[command(flatten)]
    settings: SettingsArgs,
    /// YAML that overrides the defaults of what is injected (key injector.yaml of ConfigMap malha-config).
    #[arg(long, value_name = "FILE")]
    injector_config: Option<String>,
    /// The oldest kubelet of the cluster; from 1.33 on, and when not given, sidecars are native.
    #[arg(long, value_name = "1.MINOR", value_parser = parse_kubelet)]
    oldest_kubelet: Option<u32>,
}

type Labels = BTreeMap<String, String>;

/// Settings as somebody wrote them into a cluster.
pub(super) struct Written {
    /// Where.
    pub(super) origin: String,
    /// Key `malha.yaml`.
    pub(super) settings: String,
    /// Key `injector.yaml`.
    pub(super) injector: String,
}

impl MeshArgs {
    /// The namespace that is named on the command line.
    pub(super) fn named_namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    /// The namespace of objects that say none, without a cluster.
    pub(super) fn namespace(&self) -> &str {
        self.namespace.as_deref().unwrap_or("default")
    }

    /// The oldest kubelet that is named on the command line.
    pub(super) fn oldest_kubelet(&self) -> Option<u32> {
        self.oldest_kubelet
    }

    /// The injector as the control plane of a cluster has it, unless the command line says otherwise.
    pub(super) fn injector_of(&self, written: Option<&Written>) -> Result<Injector, Failure> {
        let Some(written) = written else {
            return self.injector();
        };
        if self.injector_config.is_some() || self.settings.is_given() {
            return self.injector();
        }
        let named = || written.origin.clone();
        let layers = Layers::default()
            .with_file(&written.settings)
            .with_context(named)
            .or_exit(Exit::BadInput)?;
        let settings = Settings::parse(&layers)
            .with_context(named)
            .or_exit(Exit::BadInput)?;
        Overrides::of(&settings)
            .injector(&written.injector)
            .with_context(named)
            .or_exit(Exit::BadInput)
    }

    /// The injector with the operator's settings, as `malha serve` would make it.
    pub(super) fn injector(&self) -> Result<Injector, Failure> {
        let file = self.injector_config.iter();
        let flags = file.map(|file| ("injector-config".to_owned(), file.clone()));
        let settings = self.settings.read(flags.collect())?;
        Overrides::of(&settings).load().or_exit(Exit::BadInput)
    }

    /// The namespaces of all templates in `documents`: as the documents say, else as the flag says, else selected.
    ///
    /// # Errors
    /// [`Exit::BadInput`] where a label or annotation that decides is not text: read as absent, it would decide wrongly.
    pub(super) fn surroundings(&self, documents: &[Document]) -> Result<Surroundings, Failure> {
        let mut namespaces = Vec::new();
        for document in documents {
            namespaces_in(&document.value, &mut namespaces)
                .and_then(|()| templates_are_text(&document.value))
                .map_err(|fault| document.fault(fault))
                .or_exit(Exit::BadInput)?;
        }
        if let Some(labels) = &self.namespace_labels {
            for template in documents
                .iter()
                .flat_map(|document| workload::templates(&document.value))
            {
                let name = template
                    .namespace
                    .unwrap_or_else(|| self.namespace().to_owned());
                if !namespaces
                    .iter()
                    .any(|known: &NamespaceFacts| known.name == name)
                {
                    namespaces.push(NamespaceFacts {
                        name,
                        labels: labels.clone(),
                    });
                }
            }
        }
        Ok(Surroundings {
            namespaces,
            default_namespace: self.namespace().to_owned(),
            oldest_kubelet: self.oldest_kubelet,
        })
    }
}

/// The Namespaces in a document, which may be a List.
fn namespaces_in(object: &Value, found: &mut Vec<NamespaceFacts>) -> anyhow::Result<()> {
    match object["kind"].as_str() {
        Some("List" | "NamespaceList") => {
            for item in object["items"].as_array().into_iter().flatten() {
                namespaces_in(item, found)?;
            }
        }
        Some("Namespace") => found.push(namespace_facts(object)?),
        _ => {}
    }
    Ok(())
}

/// What selection asks of a Namespace.
///
/// # Errors
/// A label that is not text.
pub(super) fn namespace_facts(object: &Value) -> anyhow::Result<NamespaceFacts> {
    let name = object["metadata"]["name"]
        .as_str()
        .context("a Namespace without metadata.name")?;
    let mut labels = Labels::new();
    match &object["metadata"]["labels"] {
        Value::Null => {}
        Value::Object(entries) => {
            for (key, value) in entries {
                let value = value
                    .as_str()
                    .with_context(|| not_text(&format!("Namespace {name}"), "label", key, value))?;
                labels.insert(key.clone(), value.to_owned());
            }
        }
        _ => return Err(anyhow!("Namespace {name}: metadata.labels is not a map")),
    }
    Ok(NamespaceFacts {
        name: name.to_owned(),
        labels,
    })
}

/// Whether all labels and annotations of the pods and templates in a document are text, as the API server wants them. A
/// null is an empty text to it.
fn templates_are_text(document: &Value) -> anyhow::Result<()> {
    for template in workload::templates(document) {
        let Some(pod) = template.pod(document) else {
            continue;
        };
        let object = format!("{} {}", template.kind, template.name);
        for (field, noun) in [("labels", "label"), ("annotations", "annotation")] {
            let entries = pod["metadata"][field].as_object().into_iter().flatten();
            for (key, value) in entries {
                if !(value.is_string() || value.is_null()) {
                    return Err(anyhow!(not_text(object.trim_end(), noun, key, value)));
                }
            }
        }
    }
    Ok(())
}

/// YAML makes another type of an unquoted `false` or `8080`.
fn not_text(object: &str, noun: &str, key: &str, value: &Value) -> String {
    format!("{object}: {noun} {key} is {value}, not text; quote it")
}

fn parse_labels(text: &str) -> Result<Labels, String> {
    text.split(',')
        .filter(|pair| !pair.is_empty())
        .map(|pair| match pair.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(format!("{pair:?} is not KEY=VALUE")),
        })
        .collect()
}

/// `1.33`, `v1.33.2`: the minor.
pub(super) fn parse_kubelet(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is not a version such as 1.33");
    let rest = text
        .strip_prefix('v')
        .unwrap_or(text)
        .strip_prefix("1.")
        .ok_or_else(wrong)?;
    let minor = rest.split('.').next().unwrap_or_default();
    minor.parse().map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_pairs() {
        let labels = parse_labels("istio-injection=enabled,istio.io/rev=").expect("pairs");
        assert_eq!(labels.len(), 2);
        assert_eq!(labels["istio.io/rev"], "");
        assert_eq!(parse_labels(""), Ok(Labels::new()));
        for wrong in ["a", "=b", "a=b,c"] {
            assert!(parse_labels(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn kubelets_are_told_by_their_minor() {
        for (text, minor) in [("1.33", 33), ("v1.29.4", 29), ("1.30.0-gke.1", 30)] {
            assert_eq!(parse_kubelet(text), Ok(minor));
        }
        for wrong in ["", "33", "2.1", "1.x", "1."] {
            assert!(parse_kubelet(wrong).is_err(), "{wrong}");
        }
    }
}
