//! The CustomResourceDefinitions of the users' kinds, as data.
//!
//! What a schema does not list, an API server drops before anybody sees it: an object that is stored and does nothing,
//! without a word. So every object that lists its fields also keeps those that it does not list, and `mesh::istio` names
//! them.

use std::collections::BTreeMap;

use k8s_openapi::{
    apiextensions_apiserver::pkg::apis::apiextensions::v1::{
        CustomResourceColumnDefinition, CustomResourceDefinition, CustomResourceDefinitionNames,
        CustomResourceDefinitionSpec, CustomResourceDefinitionVersion,
        CustomResourceSubresourceStatus, CustomResourceSubresources, CustomResourceValidation,
        JSON, JSONSchemaProps, JSONSchemaPropsOrBool,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::Mode;

/// `peerauthentications.security.istio.io`: `v1` is stored, `v1beta1` is served, both are the same.
pub fn peer_authentication() -> CustomResourceDefinition {
    let version = |name: &str, stored: bool| CustomResourceDefinitionVersion {
        name: name.to_owned(),
        served: true,
        storage: stored,
        additional_printer_columns: Some(columns()),
        schema: Some(CustomResourceValidation {
            open_api_v3_schema: Some(schema()),
        }),
        subresources: Some(CustomResourceSubresources {
            status: Some(CustomResourceSubresourceStatus(serde_json::json!({}))),
            ..CustomResourceSubresources::default()
        }),
        ..CustomResourceDefinitionVersion::default()
    };
    let words = |words: &[&str]| Some(words.iter().map(|&word| word.to_owned()).collect());
    CustomResourceDefinition {
        metadata: ObjectMeta {
            name: Some("peerauthentications.security.istio.io".to_owned()),
            ..ObjectMeta::default()
        },
        spec: CustomResourceDefinitionSpec {
            group: "security.istio.io".to_owned(),
            names: CustomResourceDefinitionNames {
                kind: "PeerAuthentication".to_owned(),
                list_kind: Some("PeerAuthenticationList".to_owned()),
                plural: "peerauthentications".to_owned(),
                singular: Some("peerauthentication".to_owned()),
                short_names: words(&["pa"]),
                categories: words(&["istio-io", "security-istio-io"]),
            },
            scope: "Namespaced".to_owned(),
            versions: vec![version("v1", true), version("v1beta1", false)],
            ..CustomResourceDefinitionSpec::default()
        },
        status: None,
    }
}

/// As Istio shows them.
fn columns() -> Vec<CustomResourceColumnDefinition> {
    let column = |name: &str, json_path: &str, r#type: &str, description: &str| {
        CustomResourceColumnDefinition {
            name: name.to_owned(),
            json_path: json_path.to_owned(),
            type_: r#type.to_owned(),
            description: Some(description.to_owned()),
            ..CustomResourceColumnDefinition::default()
        }
    };
    vec![
        column(
            "Mode",
            ".spec.mtls.mode",
            "string",
            "Defines the mTLS mode used for peer authentication.",
        ),
        column(
            "Age",
            ".metadata.creationTimestamp",
            "date",
            "When it was created.",
        ),
    ]
}

fn schema() -> JSONSchemaProps {
    let labels = map(text(), "Labels that a pod must carry, all of them.");
    let selector = object(
        [("matchLabels", labels)],
        "The workloads it binds; without it all of the namespace, or of the mesh in the control plane's own namespace.",
    );
    let spec = object(
        [
            ("selector", selector),
            ("mtls", mtls("What the workloads accept.")),
            (
                "portLevelMtls",
                map(
                    mtls("What the port accepts."),
                    "Modes of single ports, by the number that the pod listens on.",
                ),
            ),
        ],
        "Which transport workloads accept.",
    );
    let status = object([], "What became of it.");
    JSONSchemaProps {
        type_: Some("object".to_owned()),
        properties: Some([("spec".to_owned(), spec), ("status".to_owned(), status)].into()),
        ..JSONSchemaProps::default()
    }
}

fn mtls(description: &str) -> JSONSchemaProps {
    let modes = [Mode::Disable, Mode::Permissive, Mode::Strict].map(Mode::as_str);
    let modes = ["UNSET"].into_iter().chain(modes);
    let mode = JSONSchemaProps {
        enum_: Some(modes.map(|mode| JSON(mode.into())).collect()),
        description: Some("UNSET is inherited from what binds more.".to_owned()),
        ..text()
    };
    object([("mode", mode)], description)
}

fn object<const N: usize>(
    properties: [(&str, JSONSchemaProps); N],
    description: &str,
) -> JSONSchemaProps {
    let properties: BTreeMap<_, _> = properties
        .into_iter()
        .map(|(name, schema)| (name.to_owned(), schema))
        .collect();
    JSONSchemaProps {
        type_: Some("object".to_owned()),
        description: Some(description.to_owned()),
        properties: (!properties.is_empty()).then_some(properties),
        x_kubernetes_preserve_unknown_fields: Some(true),
        ..JSONSchemaProps::default()
    }
}

fn map(values: JSONSchemaProps, description: &str) -> JSONSchemaProps {
    JSONSchemaProps {
        type_: Some("object".to_owned()),
        description: Some(description.to_owned()),
        additional_properties: Some(JSONSchemaPropsOrBool::Schema(Box::new(values))),
        ..JSONSchemaProps::default()
    }
}

fn text() -> JSONSchemaProps {
    JSONSchemaProps {
        type_: Some("string".to_owned()),
        ..JSONSchemaProps::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_object_that_lists_fields_keeps_the_others_too() {
        fn look(schema: &JSONSchemaProps, path: &str, seen: &mut usize) {
            if path != "." && schema.properties.is_some() {
                *seen += 1;
                assert_eq!(
                    schema.x_kubernetes_preserve_unknown_fields,
                    Some(true),
                    "{path}"
                );
            }
            for (name, inner) in schema.properties.iter().flatten() {
                look(inner, &format!("{path}{name}."), seen);
            }
            if let Some(JSONSchemaPropsOrBool::Schema(inner)) = &schema.additional_properties {
                look(inner, &format!("{path}*."), seen);
            }
        }
        let mut seen = 0;
        look(&schema(), ".", &mut seen);
        assert_eq!(seen, 4, "spec, selector, mtls, portLevelMtls.*");
    }
}
