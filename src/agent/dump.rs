//! What Envoy holds, for `malha config`: its own dump, sorted by kind, without keys.
//!
//! Envoy's `/config_dump` -> `{"listeners", "clusters", "endpoints", "routes", "secrets", "static"}`

use serde_json::{Map, Value, json};

/// The question to Envoy's admin interface.
pub const QUESTION: &str = "/config_dump?include_eds";

/// Sorts what Envoy says. Each item is Envoy's own entry, with `version_info` as the control plane gave it; of secrets only
/// the names come.
pub fn dump(envoys: &Value) -> Value {
    let section = |kind: &str, lists: &[&str]| -> Vec<Value> {
        let sections = envoys["configs"].as_array().into_iter().flatten();
        let of_kind = sections.filter(|section| {
            let name = section["@type"].as_str().unwrap_or_default();
            name.ends_with(&format!(".{kind}"))
        });
        of_kind
            .flat_map(|section| lists.iter().filter_map(|list| section[*list].as_array()))
            .flatten()
            .cloned()
            .collect()
    };
    let mut secrets: Vec<Value> = section(
        "SecretsConfigDump",
        &["static_secrets", "dynamic_active_secrets"],
    )
    .iter()
    .filter_map(|secret| secret.get("name").cloned())
    .collect();
    secrets.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
    secrets.dedup();
    let mut out = Map::new();
    let mut put = |key: &str, items: Vec<Value>| {
        let items = items.into_iter().map(without_keys).collect();
        out.insert(key.to_owned(), Value::Array(items));
    };
    put(
        "listeners",
        section("ListenersConfigDump", &["dynamic_listeners"]),
    );
    put(
        "clusters",
        section(
            "ClustersConfigDump",
            &["dynamic_active_clusters", "dynamic_warming_clusters"],
        ),
    );
    put(
        "endpoints",
        section("EndpointsConfigDump", &["dynamic_endpoint_configs"]),
    );
    put(
        "routes",
        section("RoutesConfigDump", &["dynamic_route_configs"]),
    );
    put("secrets", secrets);
    out.insert(
        "static".to_owned(),
        without_keys(json!({
            "listeners": section("ListenersConfigDump", &["static_listeners"]),
            "clusters": section("ClustersConfigDump", &["static_clusters"]),
        })),
    );
    Value::Object(out)
}

/// Envoy hides keys in its dump; should it forget one, it goes no further than here.
fn without_keys(value: Value) -> Value {
    match value {
        Value::Object(fields) => fields
            .into_iter()
            .filter(|(key, _)| {
                !matches!(
                    key.as_str(),
                    "private_key" | "password" | "session_ticket_keys"
                )
            })
            .map(|(key, value)| (key, without_keys(value)))
            .collect(),
        Value::Array(items) => items.into_iter().map(without_keys).collect(),
        plain => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envoys_dump_is_sorted_by_kind_and_holds_no_key() {
        let of = |kind: &str| format!("type.googleapis.com/envoy.admin.v3.{kind}");
        let listener = json!({"name": "virtualInbound", "active_state": {"version_info": "1f", "listener": {
            "name": "virtualInbound", "tls": {"private_key": {"inline_bytes": "a2V5"}, "kept": 1}
        }}});
        let envoys = json!({"configs": [
            {"@type": of("BootstrapConfigDump"), "bootstrap": {}},
            {"@type": of("ListenersConfigDump"), "dynamic_listeners": [listener],
             "static_listeners": [{"listener": {"name": "metrics"}}]},
            {"@type": of("ClustersConfigDump"), "static_clusters": [{"cluster": {"name": "sds"}}],
             "dynamic_active_clusters": [{"version_info": "2f", "cluster": {"name": "web"}}]},
            {"@type": of("EndpointsConfigDump"), "dynamic_endpoint_configs": [{"endpoint_config": {"cluster_name": "web"}}]},
            {"@type": of("SecretsConfigDump"), "dynamic_active_secrets": [
                {"name": "default", "secret": {"tls_certificate": {"private_key": {"inline_bytes": "a2V5"}}}},
                {"name": "ROOTCA"}
            ]},
        ]});
        let dump = dump(&envoys);
        assert_eq!(dump["listeners"][0]["active_state"]["version_info"], "1f");
        assert_eq!(
            dump["listeners"][0]["active_state"]["listener"]["tls"],
            json!({"kept": 1})
        );
        assert_eq!(dump["clusters"][0]["cluster"]["name"], "web");
        assert_eq!(
            dump["endpoints"][0]["endpoint_config"]["cluster_name"],
            "web"
        );
        assert_eq!(dump["routes"], json!([]));
        assert_eq!(dump["secrets"], json!(["ROOTCA", "default"]));
        assert_eq!(dump["static"]["clusters"][0]["cluster"]["name"], "sds");
        assert!(!dump.to_string().contains("a2V5"), "{dump}");
    }
}
