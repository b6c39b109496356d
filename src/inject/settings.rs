//! What is injected and how: `manifests/defaults/inject.yaml`, with the operator's document merged over it.

use std::fmt::Display;

use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{annotations, capture::Capture, quantity::Quantity};
use crate::identity::TrustDomain;

const EMBEDDED: &str = include_str!("../../manifests/defaults/inject.yaml");

/// What is injected and how, as typed data. The default document explains each key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "the keys are explained where operators read them, in the default document"
)]
pub struct InjectSettings {
    pub trust_domain: String,
    pub cluster: String,
    pub network: String,
    pub revision: String,
    pub control_plane: String,
    pub image: ImageSettings,
    pub native: NativeSetting,
    pub redirect: Redirect,
    pub proxy: ProxySettings,
    pub init: InitSettings,
    pub capture: Capture,
    pub token: TokenSettings,
    pub trust_bundle: TrustBundleSettings,
    pub merge_prometheus: bool,
    pub tls_mode_label: bool,
}

/// Images of what is injected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "the keys are explained where operators read them, in the default document"
)]
pub struct ImageSettings {
    pub proxy: String,
    pub init: String,
    pub pull_policy: PullPolicy,
    pub pull_secrets: Vec<String>,
    pub allowed: Vec<String>,
}

/// When the kubelet pulls an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullPolicy {
    /// Kubernetes decides by the tag.
    #[serde(rename = "")]
    ByTag,
    /// At each start.
    Always,
    /// When the node has it not.
    IfNotPresent,
    /// The node has it.
    Never,
}

/// Whether the proxy is a native sidecar (KEP-753).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NativeSetting {
    /// As the oldest kubelet can.
    Auto,
    /// Always.
    True,
    /// Never.
    False,
}

/// YAML reads `true` as a boolean, and a person may well have quoted it.
impl<'de> Deserialize<'de> for NativeSetting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        match (value.as_str(), value.as_bool()) {
            (Some("auto"), _) => Ok(Self::Auto),
            (Some("true"), _) | (_, Some(true)) => Ok(Self::True),
            (Some("false"), _) | (_, Some(false)) => Ok(Self::False),
            _ => Err(serde::de::Error::custom("it is auto, true or false")),
        }
    }
}

/// Who redirects a pod's traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Redirect {
    /// The init container, with `NET_ADMIN`.
    Init,
    /// A component on the node.
    External,
}

/// The sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "the keys are explained where operators read them, in the default document"
)]
pub struct ProxySettings {
    pub uid: u32,
    pub log_level: String,
    pub agent_log_level: String,
    pub hold_application: bool,
    pub resources: ResourceSettings,
    pub guaranteed: AmountSettings,
    pub readiness: ReadinessSettings,
}

/// The init container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "the keys are explained where operators read them, in the default document"
)]
pub struct InitSettings {
    pub resources: ResourceSettings,
}

/// Requests and limits of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(missing_docs, reason = "Kubernetes' own words")]
pub struct ResourceSettings {
    pub requests: AmountSettings,
    pub limits: AmountSettings,
}

/// An amount of each resource; none where it is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(missing_docs, reason = "Kubernetes' own words")]
pub struct AmountSettings {
    #[serde(default, deserialize_with = "empty_is_none")]
    pub cpu: Option<Quantity>,
    #[serde(default, deserialize_with = "empty_is_none")]
    pub memory: Option<Quantity>,
}

/// The sidecar's readiness probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(missing_docs, reason = "Kubernetes' own words")]
pub struct ReadinessSettings {
    pub initial_delay_seconds: u32,
    pub period_seconds: u32,
    pub failure_threshold: u32,
}

/// The token that shows the authority who the pod is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "the keys are explained where operators read them, in the default document"
)]
pub struct TokenSettings {
    pub audience: String,
    pub expiration_seconds: u32,
}

/// Where the pod finds the roots it trusts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "the keys are explained where operators read them, in the default document"
)]
pub struct TrustBundleSettings {
    pub config_map: String,
    pub cluster_trust_bundle: String,
}

/// Why a settings document is refused. The last good settings stay in force.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// Not YAML, or a key stands in it twice.
    #[error("the injector's settings are not a YAML document: {0}")]
    NotYaml(String),
    /// Not a mapping.
    #[error("the injector's settings are {0}, not a mapping of keys")]
    NotAMapping(&'static str),
    /// No such key.
    #[error("the injector's settings have no key `{key}`; known here: {known}")]
    UnknownKey {
        /// Its path, with dots.
        key: String,
        /// The keys that stand there.
        known: String,
    },
    /// A key with a value that it cannot have.
    #[error("the injector's setting `{key}` cannot be {value}: {why}")]
    BadValue {
        /// Its path, with dots.
        key: String,
        /// The value as JSON.
        value: String,
        /// What is allowed.
        why: String,
    },
}

impl InjectSettings {
    /// The defaults.
    pub fn embedded() -> Self {
        serde_json::from_value(embedded())
            .expect("the embedded defaults are whole; a test reads them")
    }

    /// The defaults with the operator's YAML document merged over them; an empty document changes nothing.
    ///
    /// # Errors
    /// Names the key that does not exist or whose value is wrong.
    pub fn merged(overrides: &str) -> Result<Self, SettingsError> {
        let given = match read_yaml(overrides)? {
            Value::Null => return Ok(Self::embedded()),
            given @ Value::Object(_) => given,
            other => return Err(SettingsError::NotAMapping(kind(&other))),
        };
        let mut path = Vec::new();
        let defaults = embedded();
        known_keys(&given, &defaults, &mut path)?;
        let mut merged = defaults.clone();
        merge(&mut merged, given.clone());
        let settings: Self =
            serde_json::from_value(merged).map_err(|error| culprit(&given, &defaults, &error))?;
        settings.checked()
    }

    /// What types alone do not hold.
    fn checked(self) -> Result<Self, SettingsError> {
        let (proxy, token, readiness) = (&self.proxy, &self.token, &self.proxy.readiness);
        let seconds = |value: u32, least: u32| (least..=3600).contains(&value);
        let named = |text: &str| !text.is_empty();
        let bundled =
            named(&self.trust_bundle.config_map) || named(&self.trust_bundle.cluster_trust_bundle);
        let log_level = annotations::is_level(&proxy.log_level);
        let agent_level = &proxy.agent_log_level;
        let agent =
            annotations::is_level(agent_level) || annotations::are_component_levels(agent_level);
        let trust_domain = self.trust_domain.parse::<TrustDomain>().is_ok();
        let rules: [(&str, &dyn Display, bool, &str); 13] = [
            (
                "trustDomain",
                &self.trust_domain,
                trust_domain,
                "it is no SPIFFE trust domain",
            ),
            (
                "revision",
                &self.revision,
                is_dns_label(&self.revision),
                "it is no DNS label",
            ),
            (
                "controlPlane",
                &self.control_plane,
                named(&self.control_plane),
                "it must name a host and port",
            ),
            (
                "image.proxy",
                &self.image.proxy,
                named(&self.image.proxy),
                "it must name an image",
            ),
            (
                "image.init",
                &self.image.init,
                named(&self.image.init),
                "it must name an image",
            ),
            (
                "proxy.uid",
                &proxy.uid,
                (1..1 << 31).contains(&proxy.uid),
                "it is 1 to 2147483647: never root",
            ),
            (
                "proxy.logLevel",
                &proxy.log_level,
                log_level,
                "it is no level of Envoy's",
            ),
            (
                "proxy.agentLogLevel",
                agent_level,
                agent,
                "it is no level, nor a list of component:level",
            ),
            (
                "proxy.readiness.initialDelaySeconds",
                &readiness.initial_delay_seconds,
                seconds(readiness.initial_delay_seconds, 0),
                "it is 0 to 3600",
            ),
            (
                "proxy.readiness.periodSeconds",
                &readiness.period_seconds,
                seconds(readiness.period_seconds, 1),
                "it is 1 to 3600",
            ),
            (
                "proxy.readiness.failureThreshold",
                &readiness.failure_threshold,
                seconds(readiness.failure_threshold, 1),
                "it is 1 to 3600",
            ),
            (
                "token.expirationSeconds",
                &token.expiration_seconds,
                token.expiration_seconds >= 600,
                "Kubernetes allows 600 and more",
            ),
            (
                "token.audience",
                &token.audience,
                named(&token.audience),
                "the authority asks for one",
            ),
        ];
        if let Some((key, value, _, why)) = rules.iter().find(|(_, _, holds, _)| !holds) {
            return Err(bad_value(key, *value, why));
        }
        if !bundled {
            return Err(bad_value(
                "trustBundle.configMap",
                &"",
                "a pod without roots trusts nobody",
            ));
        }
        proxy.resources.checked("proxy.resources")?;
        self.init.resources.checked("init.resources")?;
        Ok(self)
    }
}

impl ResourceSettings {
    /// No request above its limit; a limit of 0 is none.
    fn checked(&self, key: &str) -> Result<(), SettingsError> {
        let pairs = [
            ("cpu", &self.requests.cpu, &self.limits.cpu),
            ("memory", &self.requests.memory, &self.limits.memory),
        ];
        for (name, request, limit) in pairs {
            let limit = limit.as_ref().filter(|limit| !limit.is_zero());
            if let Some(request) = request
                .as_ref()
                .filter(|request| limit.is_some_and(|limit| *request > limit))
            {
                return Err(bad_value(
                    &format!("{key}.requests.{name}"),
                    request,
                    "it is above the limit",
                ));
            }
        }
        Ok(())
    }
}

fn bad_value(key: &str, value: &dyn Display, why: &str) -> SettingsError {
    SettingsError::BadValue {
        key: key.to_owned(),
        value: format!("{:?}", value.to_string()),
        why: why.to_owned(),
    }
}

/// RFC 1123; a revision is a label's value and a part of a path.
fn is_dns_label(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(legal)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

impl Default for InjectSettings {
    fn default() -> Self {
        Self::embedded()
    }
}

fn embedded() -> Value {
    read_yaml(EMBEDDED).expect("the embedded defaults are YAML; a test reads them")
}

fn read_yaml(text: &str) -> Result<Value, SettingsError> {
    if text
        .lines()
        .all(|line| line.trim_start().is_empty() || line.trim_start().starts_with('#'))
    {
        return Ok(Value::Null);
    }
    serde_saphyr::from_str(text).map_err(|error| SettingsError::NotYaml(error.to_string()))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    }
}

/// The default document names every key, so it is the schema.
fn known_keys(
    given: &Value,
    defaults: &Value,
    path: &mut Vec<String>,
) -> Result<(), SettingsError> {
    let (Value::Object(given), Value::Object(defaults)) = (given, defaults) else {
        return Ok(());
    };
    for (key, value) in given {
        path.push(key.clone());
        let Some(default) = defaults.get(key) else {
            let known: Vec<_> = defaults.keys().map(String::as_str).collect();
            return Err(SettingsError::UnknownKey {
                key: path.join("."),
                known: known.join(", "),
            });
        };
        known_keys(value, default, path)?;
        path.pop();
    }
    Ok(())
}

fn merge(into: &mut Value, given: Value) {
    match (into, given) {
        (Value::Object(into), Value::Object(given)) => {
            for (key, value) in given {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, given) => *into = given,
    }
}

/// Finds the key whose value made the whole unreadable, by setting each one alone.
fn culprit(given: &Value, defaults: &Value, error: &serde_json::Error) -> SettingsError {
    let mut leaves = Vec::new();
    collect_leaves(given, &mut Vec::new(), &mut leaves);
    for (path, value) in leaves {
        let alone = path.iter().rev().fold(value.clone(), |inner, key| {
            Value::Object([(key.clone(), inner)].into_iter().collect())
        });
        let mut merged = defaults.clone();
        merge(&mut merged, alone);
        if let Err(error) = readable::<InjectSettings>(merged) {
            return SettingsError::BadValue {
                key: path.join("."),
                value: value.to_string(),
                why: error.to_string(),
            };
        }
    }
    SettingsError::NotYaml(error.to_string())
}

fn readable<T: DeserializeOwned>(value: Value) -> Result<T, serde_json::Error> {
    serde_json::from_value(value)
}

fn collect_leaves(value: &Value, path: &mut Vec<String>, leaves: &mut Vec<(Vec<String>, Value)>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                path.push(key.clone());
                collect_leaves(value, path, leaves);
                path.pop();
            }
        }
        leaf => leaves.push((path.clone(), leaf.clone())),
    }
}

fn empty_is_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Quantity>, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(None),
        Value::String(text) if text.is_empty() => Ok(None),
        value => Quantity::deserialize(value)
            .map(Some)
            .map_err(serde::de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(overrides: &str) -> String {
        InjectSettings::merged(overrides)
            .expect_err(overrides)
            .to_string()
    }

    #[test]
    fn an_empty_document_changes_nothing() {
        for empty in ["", "\n", "# nothing\n", "---\n", "{}"] {
            let merged = InjectSettings::merged(empty).expect(empty);
            assert_eq!(merged, InjectSettings::embedded(), "{empty:?}");
        }
    }

    #[test]
    fn keys_are_merged_one_by_one() {
        let text = "native: false\nproxy: {resources: {limits: {cpu: 4, memory: ''}}}\nimage: {pullSecrets: [a]}";
        let merged = InjectSettings::merged(text).expect("good settings");
        let mut wanted = InjectSettings::embedded();
        wanted.native = NativeSetting::False;
        wanted.proxy.resources.limits.cpu = Quantity::parse("4");
        wanted.proxy.resources.limits.memory = None;
        wanted.image.pull_secrets = vec!["a".to_owned()];
        assert_eq!(merged, wanted);
    }

    #[test]
    fn a_refusal_names_the_key() {
        let cases = [
            ("prox: {}", "`prox`"),
            (
                "proxy: {resources: {request: {}}}",
                "`proxy.resources.request`",
            ),
            (
                "proxy: {resources: {requests: {gpu: 1}}}",
                "`proxy.resources.requests.gpu`",
            ),
            ("proxy: {uid: many}", "`proxy.uid`"),
            ("proxy: {uid: 0}", "`proxy.uid`"),
            (
                "proxy: {resources: {requests: {cpu: 3}}}",
                "`proxy.resources.requests.cpu`",
            ),
            (
                "init: {resources: {limits: {cpu: lots}}}",
                "`init.resources.limits.cpu`",
            ),
            (
                "capture: {excludeInboundPorts: '0'}",
                "`capture.excludeInboundPorts`",
            ),
            ("native: maybe", "`native`"),
            ("redirect: node", "`redirect`"),
            (
                "token: {expirationSeconds: 60}",
                "`token.expirationSeconds`",
            ),
            ("image: {proxy: ''}", "`image.proxy`"),
            ("revision: A/b", "`revision`"),
            ("trustDomain: Cluster.Local", "`trustDomain`"),
            ("proxy: {logLevel: loud}", "`proxy.logLevel`"),
            ("proxy: {agentLogLevel: 'a:b'}", "`proxy.agentLogLevel`"),
            (
                "proxy: {readiness: {periodSeconds: 0}}",
                "`proxy.readiness.periodSeconds`",
            ),
            ("proxy: {uid: 2147483648}", "`proxy.uid`"),
            ("token: {audience: ''}", "`token.audience`"),
            ("trustBundle: {configMap: ''}", "`trustBundle.configMap`"),
            ("controlPlane: ''", "`controlPlane`"),
            ("proxy: null", "`proxy`"),
            ("- a", "a list"),
            ("a: 1\na: 2", "not a YAML document"),
            ("{", "not a YAML document"),
        ];
        for (overrides, named) in cases {
            let refusal = refusal(overrides);
            assert!(refusal.contains(named), "{overrides}: {refusal}");
        }
    }
}
