//! What one Service is to its callers: a cluster and endpoints for each port, and listeners where a port is not HTTP.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use prost::Message;

use super::{
    Kind, Settings, cluster,
    endpoints::{self, Target},
    outbound,
};
use crate::{
    identity::SpiffeId,
    mesh::{
        Address, Mode, ObjectName, Protocol, Service, ServicePort, Slice, TargetPort, Workload,
        World, modes::Policies,
    },
};

/// A Service in its world.
pub(super) struct View<'w> {
    pub(super) world: &'w World,
    pub(super) settings: &'w Settings,
    pub(super) name: &'w ObjectName,
    pub(super) service: &'w Service,
    /// Its slices.
    pub(super) slices: Vec<&'w Slice>,
}

impl View<'_> {
    /// Every resource of the Service: kind, name, bytes.
    pub(super) fn resources(&self) -> Vec<(Kind, String, Vec<u8>)> {
        if matches!(self.service.address, Address::External(_)) {
            return Vec::new();
        }
        let host = host(self.name, self.settings);
        let servers = self.servers();
        let ports = self.service.ports.iter();
        ports
            .flat_map(|port| self.of_port(port, &host, &servers))
            .collect()
    }

    fn of_port(
        &self,
        port: &ServicePort,
        host: &str,
        servers: &BTreeSet<SpiffeId>,
    ) -> Vec<(Kind, String, Vec<u8>)> {
        let name = cluster_name(host, port.number);
        let of = (self.name, host, port.number);
        let clusters = cluster::outbound(&name, of, port.protocol, servers);
        let endpoints = endpoints::assignment(&name, &self.targets(port));
        let mut all = vec![
            (Kind::Cluster, name.clone(), clusters),
            (Kind::Endpoints, name.clone(), endpoints),
        ];
        let Address::ClusterIps(ips) = &self.service.address else {
            return all;
        };
        if !is_http(port.protocol) {
            all.extend(ips.iter().map(|&ip| {
                let listener = outbound::address(ip, port.number, port.protocol, &name);
                let name = outbound::address_name(ip, port.number);
                (Kind::Listener, name, listener.encode_to_vec())
            }));
        }
        all
    }

    /// Who may answer: the accounts of every pod that it selects, ready or not, and of every endpoint. So an account is
    /// known before its first endpoint, and forgotten after its last.
    fn servers(&self) -> BTreeSet<SpiffeId> {
        let selected = selected(self.world, self.name, self.service);
        let endpoints = self.slices.iter().flat_map(|slice| &slice.endpoints);
        let endpoints = endpoints.filter_map(|endpoint| {
            let pod = endpoint.pod.as_ref()?;
            self.world.workloads.get_key_value(pod)
        });
        let pods = selected.chain(endpoints);
        pods.filter_map(|(name, pod)| identity(self.settings, name, pod))
            .collect()
    }

    fn targets(&self, port: &ServicePort) -> BTreeMap<(IpAddr, u16), Target> {
        let mut targets = BTreeMap::new();
        for slice in &self.slices {
            let Some(&number) = slice.ports.get(&port.name) else {
                continue;
            };
            for endpoint in &slice.endpoints {
                let pod = endpoint.pod.as_ref();
                let workload = pod.and_then(|pod| self.world.workloads.get_key_value(pod));
                let target = Target {
                    health: endpoint.health,
                    zone: endpoint.zone.clone(),
                    mtls: workload.is_some_and(|(name, pod)| self.takes_mtls(name, pod, number)),
                    version: workload.and_then(|(_, pod)| version(pod)).cloned(),
                };
                let at = SocketAddr::new(endpoint.address, number);
                endpoints::insert(&mut targets, at, target);
            }
        }
        targets
    }

    fn takes_mtls(&self, name: &ObjectName, pod: &Workload, port: u16) -> bool {
        let policies = || Policies::of(self.world, &self.settings.root_namespace, name);
        is_meshed(pod) && policies().at(Some(port)).0 != Mode::Disable
    }
}

/// `outbound|80||web.shop.svc.cluster.local`.
pub(super) fn cluster_name(host: &str, port: u16) -> String {
    format!("outbound|{port}||{host}")
}

/// `web.shop.svc.cluster.local`.
pub(super) fn host(name: &ObjectName, settings: &Settings) -> String {
    format!(
        "{}.{}.svc.{}",
        name.name, name.namespace, settings.cluster_domain
    )
}

/// Routed by host.
pub(super) fn is_http(protocol: Protocol) -> bool {
    matches!(protocol, Protocol::Http | Protocol::Http2 | Protocol::Grpc)
}

/// A proxy of ours stands before it.
pub(super) fn is_meshed(pod: &Workload) -> bool {
    pod.sidecar && !pod.host_network && !pod.ended
}

pub(super) fn identity(settings: &Settings, name: &ObjectName, pod: &Workload) -> Option<SpiffeId> {
    SpiffeId::new(&settings.trust_domain, &name.namespace, &pod.account).ok()
}

/// The label by which metrics tell versions apart.
pub(super) fn version(pod: &Workload) -> Option<&String> {
    let labels = &pod.labels;
    labels
        .get("version")
        .or_else(|| labels.get("app.kubernetes.io/version"))
}

/// Whether a Service selects a pod of its namespace; one without a selector selects nobody.
pub(super) fn selects(service: &Service, pod: &Workload) -> bool {
    let mut wanted = service.selector.iter();
    !service.selector.is_empty()
        && !pod.ended
        && wanted.all(|(key, value)| pod.labels.get(key) == Some(value))
}

/// The pods that a Service selects.
pub(super) fn selected<'w>(
    world: &'w World,
    name: &ObjectName,
    service: &'w Service,
) -> impl Iterator<Item = (&'w ObjectName, &'w Workload)> {
    in_namespace(&world.workloads, &name.namespace).filter(|(_, pod)| selects(service, pod))
}

/// Objects of one namespace.
pub(super) fn in_namespace<'w, T>(
    all: &'w BTreeMap<ObjectName, T>,
    namespace: &str,
) -> impl Iterator<Item = (&'w ObjectName, &'w T)> {
    let namespace = ObjectName::new(namespace, "");
    let (first, own) = (namespace.clone(), namespace.namespace);
    all.range(first..)
        .take_while(move |(name, _)| name.namespace == own)
}

/// The port of a pod behind a port of a Service.
pub(super) fn target(port: &ServicePort, pod: &Workload) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => {
            let mut declared = pod.ports.iter();
            Some(declared.find(|port| port.name == *name)?.number)
        }
    }
}
