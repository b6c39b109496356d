//! Istio's kinds -> the mesh's own, and what is wrong with them.
//!
//! Raw JSON comes in: a typed reader would drop a misspelt field, and nobody would say so. What guards something and
//! cannot be read is read as the stricter.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{Finding, FindingReason, Mode, PeerAuthentication};

/// A PeerAuthentication (`security.istio.io/v1` and `v1beta1`).
///
/// A mode that is no mode is STRICT. A selector that cannot be read makes the whole namespace STRICT: which pods it
/// was meant for is not known.
pub fn peer_authentication(object: &Value) -> (Option<PeerAuthentication>, Vec<Finding>) {
    let mut findings = Findings::default();
    let version = object.get("apiVersion").and_then(Value::as_str);
    if !matches!(
        version,
        Some("security.istio.io/v1" | "security.istio.io/v1beta1")
    ) {
        let text = "is not served; write security.istio.io/v1";
        findings.say(FindingReason::NotServed, "apiVersion", text);
        return (None, findings.0);
    }
    let no_spec = Map::new();
    let spec = match object.get("spec") {
        None | Some(Value::Null) => &no_spec,
        Some(Value::Object(spec)) => spec,
        Some(_) => {
            findings.invalid("spec", "is not an object; read as STRICT");
            return (Some(closed(object)), findings.0);
        }
    };
    findings.unknown(spec, "spec", &["selector", "mtls", "portLevelMtls"]);
    let Ok(selector) = selector(spec, &mut findings) else {
        return (Some(closed(object)), findings.0);
    };
    let policy = PeerAuthentication {
        mode: mtls(spec.get("mtls"), "spec.mtls", &mut findings),
        ports: ports(spec, &mut findings),
        created: created(object),
        selector,
    };
    if policy.selector.is_none() && !policy.ports.is_empty() {
        let text =
            "Istio refuses ports without a selector; here they bind every pod of the namespace";
        findings.invalid("spec.portLevelMtls", text);
    }
    (Some(policy), findings.0)
}

fn closed(object: &Value) -> PeerAuthentication {
    PeerAuthentication {
        selector: None,
        mode: Some(Mode::Strict),
        ports: BTreeMap::new(),
        created: created(object),
    }
}

/// An empty selector is none, as in Istio.
fn selector(
    spec: &Map<String, Value>,
    findings: &mut Findings,
) -> Result<Option<BTreeMap<String, String>>, ()> {
    let path = "spec.selector";
    let selector = match spec.get("selector") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(selector)) => selector,
        Some(_) => {
            findings.invalid(path, "is not an object; the whole namespace is STRICT");
            return Err(());
        }
    };
    findings.unknown(selector, path, &["matchLabels"]);
    let labels = match selector.get("matchLabels") {
        // `matchExpressions` and misspellings chose somebody: not everybody.
        None | Some(Value::Null) if selector.is_empty() => return Ok(None),
        Some(Value::Object(labels)) => labels,
        _ => {
            let text = "holds no matchLabels; the whole namespace is STRICT";
            findings.invalid(path, text);
            return Err(());
        }
    };
    let read: Option<BTreeMap<_, _>> = labels
        .iter()
        .map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect();
    match read {
        Some(labels) => Ok(Some(labels).filter(|labels| !labels.is_empty())),
        None => {
            let text = "holds a value that is not text (quote it); the whole namespace is STRICT";
            findings.invalid("spec.selector.matchLabels", text);
            Err(())
        }
    }
}

fn ports(spec: &Map<String, Value>, findings: &mut Findings) -> BTreeMap<u16, Mode> {
    let path = "spec.portLevelMtls";
    let ports = match spec.get("portLevelMtls") {
        None | Some(Value::Null) => return BTreeMap::new(),
        Some(Value::Object(ports)) => ports,
        Some(_) => {
            findings.invalid(path, "is not an object from port to mode; not applied");
            return BTreeMap::new();
        }
    };
    let mut read = BTreeMap::new();
    for (port, value) in ports {
        let path = format!("{path}[{port}]");
        match port.parse() {
            Ok(0) | Err(_) => {
                findings.invalid(&path, "is not a port of a pod (1 to 65535); not applied")
            }
            Ok(number) => {
                if let Some(mode) = mtls(Some(value), &path, findings) {
                    read.insert(number, mode);
                }
            }
        }
    }
    read
}

fn mtls(value: Option<&Value>, path: &str, findings: &mut Findings) -> Option<Mode> {
    let mtls = match value {
        None | Some(Value::Null) => return None,
        Some(Value::Object(mtls)) => mtls,
        Some(_) => {
            findings.invalid(path, "is not an object with a mode; read as STRICT");
            return Some(Mode::Strict);
        }
    };
    findings.unknown(mtls, path, &["mode"]);
    match mtls.get("mode") {
        None | Some(Value::Null) => None,
        Some(Value::String(mode)) if mode == "UNSET" => None,
        Some(Value::String(mode)) if mode == "STRICT" => Some(Mode::Strict),
        Some(Value::String(mode)) if mode == "PERMISSIVE" => Some(Mode::Permissive),
        Some(Value::String(mode)) if mode == "DISABLE" => Some(Mode::Disable),
        Some(other) => {
            let text = format!(
                "{other} is not a mode (STRICT, PERMISSIVE, DISABLE, UNSET); read as STRICT"
            );
            findings.invalid(&format!("{path}.mode"), &text);
            Some(Mode::Strict)
        }
    }
}

fn created(object: &Value) -> Option<jiff::Timestamp> {
    let text = object.pointer("/metadata/creationTimestamp")?.as_str()?;
    text.parse().ok()
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn say(&mut self, reason: FindingReason, path: &str, text: &str) {
        self.0.push(Finding {
            reason,
            path: path.to_owned(),
            text: text.to_owned(),
        });
    }

    fn invalid(&mut self, path: &str, text: &str) {
        self.say(FindingReason::InvalidValue, path, text);
    }

    fn unknown(&mut self, object: &Map<String, Value>, path: &str, known: &[&str]) {
        for field in object
            .keys()
            .filter(|field| !known.contains(&field.as_str()))
        {
            let text = format!("is not a field here ({}); not applied", known.join(", "));
            self.say(
                FindingReason::UnknownField,
                &format!("{path}.{field}"),
                &text,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(spec: Value) -> (PeerAuthentication, Vec<String>) {
        let object = json!({"apiVersion": "security.istio.io/v1beta1", "kind": "PeerAuthentication", "spec": spec});
        let (policy, findings) = peer_authentication(&object);
        let findings = findings
            .iter()
            .map(|finding| format!("{} {}", finding.reason.code(), finding.path))
            .collect();
        (policy.expect("served"), findings)
    }

    #[test]
    fn modes_of_workload_and_port_are_read() {
        let (policy, findings) = read(json!({
            "selector": {"matchLabels": {"app": "web"}},
            "mtls": {"mode": "STRICT"},
            "portLevelMtls": {"8080": {"mode": "DISABLE"}, "9090": {"mode": "UNSET"}},
        }));
        assert_eq!(policy.mode, Some(Mode::Strict));
        assert_eq!(policy.ports, BTreeMap::from([(8080, Mode::Disable)]));
        assert_eq!(policy.selector.expect("one")["app"], "web");
        assert_eq!(findings, [""; 0]);
    }

    #[test]
    fn what_cannot_be_read_is_closed_and_named() {
        let strict = Some(Mode::Strict);
        let cases = [
            (
                json!({"mtls": {"mode": "strict"}}),
                strict,
                "InvalidValue spec.mtls.mode",
            ),
            (json!({"mtls": "DISABLE"}), strict, "InvalidValue spec.mtls"),
            (
                json!({"mtls": {"mdoe": "STRICT"}}),
                None,
                "UnknownField spec.mtls.mdoe",
            ),
            (json!({"tls": {}}), None, "UnknownField spec.tls"),
            (json!("x"), strict, "InvalidValue spec"),
            (
                json!({"selector": {"matchLabels": {"a": 1}}, "mtls": {"mode": "DISABLE"}}),
                strict,
                "InvalidValue spec.selector.matchLabels",
            ),
            (
                json!({"selector": [], "mtls": {"mode": "DISABLE"}}),
                strict,
                "InvalidValue spec.selector",
            ),
        ];
        for (spec, mode, finding) in cases {
            let (policy, findings) = read(spec.clone());
            assert_eq!((policy.mode, policy.selector), (mode, None), "{spec}");
            assert_eq!(findings, [finding], "{spec}");
        }
    }

    #[test]
    fn a_selector_of_another_form_does_not_choose_everybody_in_silence() {
        let (policy, findings) = read(json!({
            "selector": {"matchExpressions": []}, "mtls": {"mode": "PERMISSIVE"},
        }));
        assert_eq!(policy.mode, Some(Mode::Strict));
        assert_eq!(findings.len(), 2, "{findings:?}");
    }

    #[test]
    fn another_version_is_not_served() {
        let (policy, findings) =
            peer_authentication(&json!({"apiVersion": "security.istio.io/v2"}));
        assert_eq!(policy, None);
        assert_eq!(findings[0].reason, FindingReason::NotServed);
    }
}
