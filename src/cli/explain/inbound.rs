//! What each port of a meshed pod accepts, and which object says so.
//!
//! policies + the pod + what is captured -> [`Inbound`] -> rows, JSON

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::core::v1::{Pod, Service},
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde_json::{Value, json};

use crate::{
    inject::capture::Capture,
    mesh::{
        Event, Mode, ObjectName, ObjectRef, World, istio, kubernetes,
        modes::{self, Policies},
    },
    redirect::Include,
};

/// Port 0 is nobody's: what holds for it holds for every port that no object names.
const ANY_OTHER: u16 = 0;

/// The PeerAuthentications and Services that may say something about a pod.
#[derive(Debug, Default)]
pub(super) struct Rules {
    world: World,
    services: Vec<Service>,
    /// The namespace whose policies bind the whole mesh.
    root_namespace: String,
    /// What is wrong with the policies.
    pub(super) findings: Vec<String>,
    /// No policy is known to exist.
    pub(super) silent: bool,
}

impl Rules {
    /// Sorts out of `objects` what says something; `namespace` is that of objects that say none.
    pub(super) fn of<'a>(
        objects: impl IntoIterator<Item = &'a Value>,
        namespace: &str,
        root_namespace: &str,
    ) -> Self {
        let mut rules = Self {
            root_namespace: root_namespace.to_owned(),
            silent: true,
            ..Self::default()
        };
        objects
            .into_iter()
            .for_each(|object| rules.take(object, namespace));
        rules
    }

    fn take(&mut self, object: &Value, namespace: &str) {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let group = text("/apiVersion").unwrap_or_default();
        match text("/kind") {
            Some("List") => {
                let items = object["items"].as_array().into_iter().flatten();
                items.for_each(|item| self.take(item, namespace));
            }
            Some("PeerAuthentication") if group.starts_with("security.istio.io/") => {
                let namespace = text("/metadata/namespace").unwrap_or(namespace);
                let name = ObjectName::new(namespace, text("/metadata/name").unwrap_or_default());
                let (policy, findings) = istio::peer_authentication(object);
                let told = findings.iter().map(|finding| {
                    format!(
                        "{}: PeerAuthentication {name}: {finding}",
                        finding.reason.code()
                    )
                });
                self.findings.extend(told);
                self.silent = false;
                self.world.apply(Event::PeerAuthentication(name, policy));
            }
            Some("Service") if group == "v1" => {
                if let Ok(mut service) = serde_json::from_value::<Service>(object.clone()) {
                    let own = &mut service.metadata.namespace;
                    own.get_or_insert_with(|| namespace.to_owned());
                    self.services.push(service);
                }
            }
            _ => {}
        }
    }

    /// What the ports of `pod` accept, its namespace and name being filled in.
    pub(super) fn inbound(&self, pod: &Pod, captured: Captured) -> Option<Inbound> {
        let (name, workload) = kubernetes::workload(pod)?;
        let mut world = self.world.clone();
        let mut ports: BTreeMap<u16, BTreeSet<String>> = BTreeMap::new();
        for port in &workload.ports {
            let names = ports.entry(port.number).or_default();
            names.extend((!port.name.is_empty()).then(|| port.name.clone()));
        }
        for number in self.of_services(pod, &workload.labels) {
            ports.entry(number).or_default();
        }
        world.apply(Event::Workload(name.clone(), Some(workload)));
        for number in Policies::of(&world, &self.root_namespace, &name).ports() {
            ports.entry(number).or_default();
        }
        let lines = ports.into_iter().map(Some).chain([None]).map(|port| {
            let number = port.as_ref().map(|(number, _)| *number);
            let (mode, decided) = modes::effective(
                &world,
                &self.root_namespace,
                &name,
                number.unwrap_or(ANY_OTHER),
            );
            Port {
                names: port.map(|(_, names)| names).unwrap_or_default(),
                outside: captured.outside(number),
                number,
                mode,
                decided,
            }
        });
        Some(Inbound {
            ports: lines.collect(),
        })
    }

    /// The ports of the pod behind the Services that select it.
    fn of_services(&self, pod: &Pod, labels: &BTreeMap<String, String>) -> BTreeSet<u16> {
        let selects = |service: &&Service| {
            let selector = service
                .spec
                .as_ref()
                .and_then(|spec| spec.selector.as_ref());
            let same_namespace = service.metadata.namespace == pod.metadata.namespace;
            same_namespace
                && selector.is_some_and(|selector| {
                    !selector.is_empty()
                        && selector
                            .iter()
                            .all(|(key, value)| labels.get(key) == Some(value))
                })
        };
        let specs = self
            .services
            .iter()
            .filter(selects)
            .filter_map(|service| service.spec.as_ref());
        let ports = specs.flat_map(|spec| spec.ports.iter().flatten());
        ports
            .filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP")
            .filter_map(|port| match &port.target_port {
                None => u16::try_from(port.port).ok(),
                Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
                // A name is one of the container ports, which are listed already.
                Some(IntOrString::String(_)) => None,
            })
            .filter(|number| *number > 0)
            .collect()
    }
}

/// Which inbound ports go through the proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Captured {
    /// `None`: all.
    only: Option<BTreeSet<u16>>,
    excluded: BTreeSet<u16>,
}

impl Captured {
    /// As the injector would have it.
    pub(super) fn of(capture: &Capture) -> Self {
        Self {
            only: match &capture.include_inbound_ports {
                Include::All => None,
                Include::Only(ports) => Some(ports.iter().copied().collect()),
            },
            excluded: capture.exclude_inbound_ports.iter().copied().collect(),
        }
    }

    /// As the argument of the pod's own `malha-init` has it; `None` where it is not readable.
    pub(super) fn by_init(pod: &Value) -> Option<Self> {
        let containers = pod.pointer("/spec/initContainers")?.as_array()?;
        let init = containers
            .iter()
            .find(|container| container["name"] == "malha-init")?;
        let argument: Value =
            serde_json::from_str(init["args"].as_array()?.last()?.as_str()?).ok()?;
        let ports = |list: &Value| -> Option<BTreeSet<u16>> {
            let ports = list.as_array()?.iter();
            ports
                .map(|port| u16::try_from(port.as_u64()?).ok())
                .collect()
        };
        let included = &argument["includeInboundPorts"];
        Some(Self {
            only: match included.as_str() {
                Some("*") => None,
                _ => Some(ports(included)?),
            },
            excluded: ports(&argument["excludeInboundPorts"])?,
        })
    }

    /// Why a port (`None`: any that is not named) is outside the mesh, if it is.
    fn outside(&self, port: Option<u16>) -> Option<&'static str> {
        let excluded = port.is_some_and(|port| self.excluded.contains(&port));
        let named = |only: &BTreeSet<u16>| port.is_some_and(|port| only.contains(&port));
        if excluded {
            Some("not captured: excluded inbound")
        } else if self.only.as_ref().is_some_and(|only| !named(only)) {
            Some("not captured: the included inbound ports do not name it")
        } else {
            None
        }
    }
}

/// What a pod's ports accept.
#[derive(Debug)]
pub(super) struct Inbound {
    /// By number; the last one stands for all others.
    ports: Vec<Port>,
}

#[derive(Debug)]
struct Port {
    number: Option<u16>,
    names: BTreeSet<String>,
    mode: Mode,
    decided: Option<ObjectRef>,
    /// Why no mode counts.
    outside: Option<&'static str>,
}

impl Inbound {
    /// PORT, MODE, DECIDED BY, without a head.
    pub(super) fn rows(&self) -> Vec<Vec<String>> {
        self.ports.iter().map(Port::row).collect()
    }

    pub(super) fn to_json(&self) -> Value {
        json!({ "ports": self.ports.iter().map(Port::to_json).collect::<Vec<_>>() })
    }
}

impl Port {
    fn row(&self) -> Vec<String> {
        let port = match self.number {
            None => "any other".to_owned(),
            Some(number) if self.names.is_empty() => number.to_string(),
            Some(number) => {
                let names: Vec<_> = self.names.iter().map(String::as_str).collect();
                format!("{number} ({})", names.join(", "))
            }
        };
        let (mode, why) = match (self.outside, &self.decided) {
            (Some(why), _) => ("outside mutual TLS", why.to_owned()),
            (None, Some(by)) => (word(self.mode), format!("{} {}", by.kind, by.name)),
            (None, None) => (word(self.mode), "no object; it is the default".to_owned()),
        };
        vec![port, mode.to_owned(), why]
    }

    fn to_json(&self) -> Value {
        let by = self.decided.as_ref().filter(|_| self.outside.is_none()).map(|by| {
            json!({ "kind": by.kind, "namespace": *by.name.namespace, "name": *by.name.name })
        });
        json!({
            "port": self.number,
            "names": self.names,
            "captured": self.outside.is_none(),
            "mode": self.outside.is_none().then(|| word(self.mode)),
            "decidedBy": by,
            "note": self.outside,
        })
    }
}

fn word(mode: Mode) -> &'static str {
    match mode {
        Mode::Strict => "STRICT",
        Mode::Permissive => "PERMISSIVE",
        Mode::Disable => "DISABLE",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": "web-1", "namespace": "shop", "labels": { "app": "web" } },
            "spec": { "containers": [
                { "name": "app", "ports": [{ "containerPort": 8080, "name": "http" }, { "containerPort": 53, "protocol": "UDP" }] },
                { "name": "malha-proxy", "ports": [{ "containerPort": 15090 }] },
            ] },
        }))
        .expect("a pod")
    }

    fn policy(namespace: &str, name: &str, spec: Value) -> Value {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": { "namespace": namespace, "name": name }, "spec": spec,
        })
    }

    fn everything() -> Captured {
        Captured {
            only: None,
            excluded: BTreeSet::new(),
        }
    }

    fn lines(objects: &[Value], captured: Captured) -> Vec<String> {
        let rules = Rules::of(objects, "shop", "malha-system");
        let inbound = rules.inbound(&pod(), captured).expect("a pod with a name");
        inbound.rows().iter().map(|row| row.join(" | ")).collect()
    }

    #[test]
    fn each_port_is_told_with_the_object_that_decided() {
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "shop", "name": "web" },
            "spec": { "selector": { "app": "web" }, "ports": [
                { "port": 80, "targetPort": 9000 }, { "port": 81, "targetPort": "http" }, { "port": 7000 },
            ] },
        });
        let mut of_others = service.clone();
        of_others["spec"]["selector"] = json!({ "app": "db" });
        of_others["spec"]["ports"][0]["targetPort"] = json!(5432);
        let strict = json!({ "mtls": { "mode": "STRICT" } });
        let of_port = json!({
            "selector": { "matchLabels": { "app": "web" } },
            "portLevelMtls": { "9090": { "mode": "DISABLE" } },
        });
        assert_eq!(
            lines(
                &[
                    json!({ "apiVersion": "v1", "kind": "List", "items": [service, of_others] }),
                    policy("malha-system", "default", strict),
                    policy("shop", "web", of_port),
                    policy("bank", "default", json!({ "mtls": { "mode": "DISABLE" } })),
                ],
                everything()
            ),
            [
                "7000 | STRICT | PeerAuthentication malha-system/default",
                "8080 (http) | STRICT | PeerAuthentication malha-system/default",
                "9000 | STRICT | PeerAuthentication malha-system/default",
                "9090 | DISABLE | PeerAuthentication shop/web",
                "any other | STRICT | PeerAuthentication malha-system/default",
            ]
        );
    }

    #[test]
    fn where_no_object_says_anything_the_default_is_told_as_such() {
        assert_eq!(
            lines(&[], everything()),
            [
                "8080 (http) | PERMISSIVE | no object; it is the default",
                "any other | PERMISSIVE | no object; it is the default",
            ]
        );
    }

    #[test]
    fn ports_that_are_not_captured_are_outside_whatever_the_policies_say() {
        let strict = || policy("shop", "default", json!({ "mtls": { "mode": "STRICT" } }));
        let excluded = Captured {
            only: None,
            excluded: BTreeSet::from([8080]),
        };
        assert_eq!(
            lines(&[strict()], excluded),
            [
                "8080 (http) | outside mutual TLS | not captured: excluded inbound",
                "any other | STRICT | PeerAuthentication shop/default",
            ]
        );
        let only = Captured {
            only: Some(BTreeSet::from([8080])),
            excluded: BTreeSet::new(),
        };
        assert_eq!(
            lines(&[strict()], only),
            [
                "8080 (http) | STRICT | PeerAuthentication shop/default",
                "any other | outside mutual TLS | not captured: the included inbound ports do not name it",
            ]
        );
    }

    #[test]
    fn a_running_pod_is_read_by_the_argument_of_its_own_init_container() {
        let pod = |argument: &str| {
            json!({ "spec": { "initContainers": [
                { "name": "malha-init", "args": ["--check", argument] },
            ] } })
        };
        let argument = r#"{"includeInboundPorts":"*","excludeInboundPorts":[15020,9090]}"#;
        let captured = Captured {
            only: None,
            excluded: BTreeSet::from([9090, 15020]),
        };
        assert_eq!(Captured::by_init(&pod(argument)), Some(captured));
        let argument = r#"{"includeInboundPorts":[8080],"excludeInboundPorts":[]}"#;
        let captured = Captured {
            only: Some(BTreeSet::from([8080])),
            excluded: BTreeSet::new(),
        };
        assert_eq!(Captured::by_init(&pod(argument)), Some(captured));
        for unreadable in [
            "",
            "{}",
            r#"{"includeInboundPorts":"*","excludeInboundPorts":[70000]}"#,
        ] {
            assert_eq!(Captured::by_init(&pod(unreadable)), None, "{unreadable}");
        }
    }

    #[test]
    fn a_policy_with_a_fault_is_named() {
        let objects = [policy(
            "shop",
            "default",
            json!({ "mtls": { "mode": "STRIKT" } }),
        )];
        let rules = Rules::of(&objects, "shop", "malha-system");
        assert_eq!(rules.findings.len(), 1);
        assert!(
            rules.findings[0]
                .starts_with("InvalidValue: PeerAuthentication shop/default: spec.mtls.mode: "),
            "{:?}",
            rules.findings
        );
        assert!(lines(&objects, everything())[0].contains("| STRICT |"));
    }
}
