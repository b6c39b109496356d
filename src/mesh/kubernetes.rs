//! Kubernetes objects -> the mesh's own. `None`: the object says nothing to the mesh.
//!
//! Typed objects come in, so that fields newer than the types are simply not seen.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{self, Container, Pod},
        discovery::v1::{self as discovery, EndpointSlice},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};

use super::{
    Address, ContainerPort, Endpoint, ExportTo, Health, Namespace, ObjectName, Protocol, Service,
    ServicePort, Slice, TargetPort, Workload,
};

/// A namespace.
pub fn namespace(object: &v1::Namespace) -> Option<(Arc<str>, Namespace)> {
    let labels = object.metadata.labels.clone().unwrap_or_default();
    let name = object.metadata.name.as_deref()?;
    Some((name.into(), Namespace { labels }))
}

/// A Service.
pub fn service(object: &v1::Service) -> Option<(ObjectName, Service)> {
    let name = name_of(&object.metadata)?;
    let spec = object.spec.as_ref()?;
    let annotations = object.metadata.annotations.as_ref();
    let export_to = annotations.and_then(|all| all.get("networking.istio.io/exportTo"));
    let service = Service {
        address: address(spec),
        ports: spec.ports.iter().flatten().filter_map(port).collect(),
        selector: spec.selector.clone().unwrap_or_default(),
        export_to: export_to.map_or(ExportTo::Everyone, |text| exported(text, &name.namespace)),
    };
    Some((name, service))
}

/// An EndpointSlice; one without a Service, or of DNS names, is nobody's.
pub fn slice(object: &EndpointSlice) -> Option<(ObjectName, Slice)> {
    let labels = object.metadata.labels.as_ref()?;
    let service = labels.get("kubernetes.io/service-name")?;
    let name = name_of(&object.metadata)?;
    let ports = object.ports.iter().flatten();
    let ports = ports.filter(|port| is_tcp(port.protocol.as_deref()));
    let slice = Slice {
        service: service.as_str().into(),
        ports: ports
            .filter_map(|port| {
                let number = u16::try_from(port.port?).ok().filter(|&n| n > 0)?;
                Some((port.name.clone().unwrap_or_default(), number))
            })
            .collect(),
        endpoints: object
            .endpoints
            .iter()
            .filter_map(|endpoint_of| endpoint(endpoint_of, &name.namespace))
            .collect(),
    };
    Some((name, slice))
}

/// A pod.
pub fn workload(object: &Pod) -> Option<(ObjectName, Workload)> {
    let name = name_of(&object.metadata)?;
    let spec = object.spec.as_ref()?;
    let status = object.status.as_ref();
    let account = spec.service_account_name.as_deref();
    let phase = status.and_then(|status| status.phase.as_deref());
    let init = spec.init_containers.iter().flatten();
    let containers = || spec.containers.iter();
    let workload = Workload {
        account: account
            .filter(|name| !name.is_empty())
            .unwrap_or("default")
            .into(),
        addresses: status.map(addresses).unwrap_or_default(),
        labels: object.metadata.labels.clone().unwrap_or_default(),
        sidecar: init.chain(containers()).any(is_sidecar),
        host_network: spec.host_network.unwrap_or_default(),
        ended: matches!(phase, Some("Succeeded" | "Failed")),
        ports: containers()
            .filter(|container| !is_sidecar(container))
            .flat_map(|container| container.ports.iter().flatten())
            .filter(|port| is_tcp(port.protocol.as_deref()))
            .filter_map(|port| {
                let number = u16::try_from(port.container_port).ok().filter(|&n| n > 0)?;
                let name = port.name.clone().unwrap_or_default();
                Some(ContainerPort { name, number })
            })
            .collect(),
    };
    Some((name, workload))
}

/// What is spoken on a Service's port, as Istio's "Protocol Selection" documents it.
pub fn protocol(app_protocol: Option<&str>, name: &str, number: u16) -> Protocol {
    match app_protocol {
        Some("kubernetes.io/h2c") => return Protocol::Http2,
        Some("kubernetes.io/ws") => return Protocol::Http,
        Some("kubernetes.io/wss") => return Protocol::Tcp,
        _ => {}
    }
    let said = app_protocol.unwrap_or(name).to_ascii_lowercase();
    let word = said.split('-').next().unwrap_or_default();
    match word {
        "http" => Protocol::Http,
        "http2" => Protocol::Http2,
        "grpc" => Protocol::Grpc,
        "tcp" | "tls" | "https" | "mongo" | "mysql" | "redis" => Protocol::Tcp,
        _ if SERVER_FIRST.contains(&number) => Protocol::Tcp,
        _ => Protocol::Undeclared,
    }
}

/// SMTP, DNS, MySQL and MongoDB: Istio takes these for TCP where nothing is said, because a proxy that waits for the
/// client's first bytes would wait for ever.
const SERVER_FIRST: [u16; 4] = [25, 53, 3306, 27017];

fn name_of(metadata: &ObjectMeta) -> Option<ObjectName> {
    let namespace = metadata.namespace.as_deref().unwrap_or("default");
    Some(ObjectName::new(namespace, metadata.name.as_deref()?))
}

fn address(spec: &v1::ServiceSpec) -> Address {
    if spec.type_.as_deref() == Some("ExternalName") {
        return Address::External(spec.external_name.clone().unwrap_or_default());
    }
    let first = spec.cluster_ip.iter();
    let all = spec.cluster_ips.iter().flatten();
    let mut ips: Vec<IpAddr> = first.chain(all).filter_map(|ip| ip.parse().ok()).collect();
    ips.sort_unstable();
    ips.dedup();
    if ips.is_empty() {
        Address::Headless
    } else {
        Address::ClusterIps(ips)
    }
}

fn port(port: &v1::ServicePort) -> Option<ServicePort> {
    if !is_tcp(port.protocol.as_deref()) {
        return None;
    }
    let number = u16::try_from(port.port).ok().filter(|&n| n > 0)?;
    let name = port.name.clone().unwrap_or_default();
    let protocol = protocol(port.app_protocol.as_deref(), &name, number);
    let target = match &port.target_port {
        Some(IntOrString::String(name)) => TargetPort::Name(name.clone()),
        Some(IntOrString::Int(target)) => {
            let target = u16::try_from(*target).ok().filter(|&n| n > 0);
            TargetPort::Number(target.unwrap_or(number))
        }
        None => TargetPort::Number(number),
    };
    Some(ServicePort {
        name,
        number,
        target,
        protocol,
    })
}

fn exported(text: &str, own: &Arc<str>) -> ExportTo {
    let mut namespaces = Vec::new();
    for word in text
        .split(',')
        .map(str::trim)
        .filter(|word| !word.is_empty())
    {
        match word {
            "*" => return ExportTo::Everyone,
            "~" => {}
            "." => namespaces.push(Arc::clone(own)),
            name => namespaces.push(name.into()),
        }
    }
    namespaces.sort_unstable();
    namespaces.dedup();
    ExportTo::Only(namespaces)
}

fn endpoint(endpoint: &discovery::Endpoint, namespace: &Arc<str>) -> Option<Endpoint> {
    let target = endpoint.target_ref.as_ref();
    let target = target.filter(|target| target.kind.as_deref() == Some("Pod"));
    let pod = target.and_then(|target| {
        let namespace = target.namespace.as_deref().unwrap_or(namespace);
        Some(ObjectName::new(namespace, target.name.as_deref()?))
    });
    Some(Endpoint {
        // "Consumers should only pay attention to the first element."
        address: endpoint.addresses.first()?.parse().ok()?,
        pod,
        health: health(endpoint.conditions.as_ref())?,
        zone: endpoint.zone.as_deref().map(Arc::from),
        hostname: endpoint.hostname.as_deref().map(Arc::from),
    })
}

/// What is not said is `true` for `ready` ("unknown should be interpreted as ready"), and as `ready` for `serving`.
fn health(conditions: Option<&discovery::EndpointConditions>) -> Option<Health> {
    let said = |of: fn(&discovery::EndpointConditions) -> Option<bool>| conditions.and_then(of);
    let ready = said(|all| all.ready).unwrap_or(true);
    let serving = said(|all| all.serving).unwrap_or(ready);
    let terminating = said(|all| all.terminating).unwrap_or(false);
    match (ready, serving && terminating) {
        (true, _) => Some(Health::Healthy),
        (false, true) => Some(Health::Draining),
        (false, false) => None,
    }
}

fn addresses(status: &v1::PodStatus) -> Vec<IpAddr> {
    let first = status.pod_ip.iter();
    let all = status.pod_ips.iter().flatten().map(|ip| &ip.ip);
    let mut ips: Vec<IpAddr> = first.chain(all).filter_map(|ip| ip.parse().ok()).collect();
    ips.sort_unstable();
    ips.dedup();
    ips
}

fn is_sidecar(container: &Container) -> bool {
    matches!(container.name.as_str(), "malha-proxy" | "istio-proxy")
}

/// `TCP` is what Kubernetes means where nothing is said.
fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("" | "TCP"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_port_speaks_what_istio_reads_from_it() {
        let cases = [
            (None, "http", 80, Protocol::Http),
            (None, "HTTP-web", 80, Protocol::Http),
            (None, "http2-x", 80, Protocol::Http2),
            (None, "grpc", 80, Protocol::Grpc),
            (None, "grpc-web", 80, Protocol::Grpc),
            (None, "https", 443, Protocol::Tcp),
            (None, "tcp-x", 80, Protocol::Tcp),
            (None, "web", 80, Protocol::Undeclared),
            (None, "httpx", 80, Protocol::Undeclared),
            (None, "", 3306, Protocol::Tcp),
            (None, "http-admin", 3306, Protocol::Http),
            (Some("http"), "tcp-x", 80, Protocol::Http),
            (Some("kubernetes.io/h2c"), "", 80, Protocol::Http2),
            (Some("kubernetes.io/wss"), "http", 80, Protocol::Tcp),
            (Some("amqp"), "http", 5672, Protocol::Undeclared),
        ];
        for (app, name, number, want) in cases {
            assert_eq!(
                protocol(app, name, number),
                want,
                "{app:?} {name:?} {number}"
            );
        }
    }

    #[test]
    fn a_service_keeps_its_tcp_ports_and_both_families() {
        let object = json!({
            "metadata": {"name": "db", "namespace": "shop",
                "annotations": {"networking.istio.io/exportTo": "., jobs"}},
            "spec": {
                "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00::7"], "selector": {"app": "db"},
                "ports": [{"name": "mysql", "port": 3306}, {"name": "dns", "port": 53, "protocol": "UDP"}],
            },
        });
        let (name, service) =
            service(&serde_json::from_value(object).expect("a Service")).expect("named");
        assert_eq!(name, ObjectName::new("shop", "db"));
        let ips = ["10.96.0.7", "fd00::7"].map(|ip| ip.parse().expect("an address"));
        assert_eq!(service.address, Address::ClusterIps(ips.to_vec()));
        assert_eq!(service.ports.len(), 1);
        assert_eq!(
            service.export_to,
            ExportTo::Only(vec!["jobs".into(), "shop".into()])
        );
    }

    #[test]
    fn exported_to_nobody_is_not_everybody() {
        assert_eq!(exported("~", &"shop".into()), ExportTo::Only(vec![]));
        assert_eq!(exported("*", &"shop".into()), ExportTo::Everyone);
    }

    #[test]
    fn an_endpoint_that_does_not_serve_is_none() {
        let object = json!({
            "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}],
            "endpoints": [
                {"addresses": ["10.0.0.1"], "conditions": {"ready": true},
                    "targetRef": {"kind": "Pod", "name": "web-a", "namespace": "shop"}},
                {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": false, "terminating": true}},
                {"addresses": ["10.0.0.4"], "conditions": {"ready": false, "serving": true}},
                {"addresses": ["10.0.0.5"]},
            ],
        });
        let (_, slice) = slice(&serde_json::from_value(object).expect("a slice")).expect("named");
        let found: Vec<_> = slice
            .endpoints
            .iter()
            .map(|one| (one.address.to_string(), one.health))
            .collect();
        let want = [
            ("10.0.0.1", Health::Healthy),
            ("10.0.0.2", Health::Draining),
            ("10.0.0.5", Health::Healthy),
        ];
        assert_eq!(found, want.map(|(ip, health)| (ip.to_owned(), health)));
        assert_eq!(
            slice.endpoints[0].pod,
            Some(ObjectName::new("shop", "web-a"))
        );
    }

    #[test]
    fn a_sidecar_is_seen_in_either_list_and_its_own_ports_are_not_the_apps() {
        let proxy = json!({"name": "malha-proxy", "restartPolicy": "Always", "ports": [{"containerPort": 15090}]});
        let app = json!({"name": "app", "ports": [{"containerPort": 8080, "name": "http"}]});
        for (init, containers, sidecar) in [
            (json!([proxy]), json!([app]), true),
            (json!([]), json!([app, proxy]), true),
            (json!([]), json!([app]), false),
        ] {
            let object = json!({
                "metadata": {"name": "web-a", "namespace": "shop"},
                "spec": {"initContainers": init, "containers": containers},
                "status": {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
            });
            let (_, pod) =
                workload(&serde_json::from_value(object).expect("a pod")).expect("named");
            assert_eq!(pod.sidecar, sidecar);
            assert_eq!(&*pod.account, "default");
            assert_eq!(pod.addresses.len(), 2);
            let ports: Vec<_> = pod.ports.iter().map(|port| port.number).collect();
            assert_eq!(ports, [8080]);
        }
    }
}
