//! EDS: who answers for a port of a Service.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use envoy_types::pb::envoy::config::{
    core::v3::{HealthStatus, Locality},
    endpoint::v3::Endpoint,
};
use prost::Message;

use super::{
    cluster::endpoint_metadata,
    wire::{self, Assignment, LbEndpoint, address},
};
use crate::mesh::Health;

/// Someone who answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) health: Health,
    pub(super) zone: Option<Arc<str>>,
    /// Its proxy takes mutual TLS on this port.
    pub(super) mtls: bool,
    /// Label `version`, for metrics.
    pub(super) version: Option<String>,
}

/// An assignment, empty where nobody answers: silence would hold the cluster in warming (`xds.md` T2).
///
/// Where nobody is ready, those that still serve while they end are called healthy, as kube-proxy does.
pub(super) fn assignment(name: &str, targets: &BTreeMap<(IpAddr, u16), Target>) -> Vec<u8> {
    let nobody_is_ready = targets
        .values()
        .all(|target| target.health == Health::Draining);
    let mut zones: BTreeMap<Option<&str>, Vec<LbEndpoint>> = BTreeMap::new();
    for (&(ip, port), target) in targets {
        let healthy = nobody_is_ready || target.health == Health::Healthy;
        let endpoint = LbEndpoint {
            endpoint: Some(Endpoint {
                address: Some(address(ip, port)),
                ..Endpoint::default()
            }),
            health_status: match healthy {
                true => HealthStatus::Healthy.into(),
                false => HealthStatus::Draining.into(),
            },
            metadata: endpoint_metadata(target.mtls, target.version.as_deref()),
        };
        zones
            .entry(target.zone.as_deref())
            .or_default()
            .push(endpoint);
    }
    let assignment = Assignment {
        cluster_name: name.to_owned(),
        endpoints: zones.into_iter().map(locality).collect(),
    };
    assignment.encode_to_vec()
}

fn locality((zone, lb_endpoints): (Option<&str>, Vec<LbEndpoint>)) -> wire::Locality {
    wire::Locality {
        locality: zone.map(|zone| Locality {
            zone: zone.to_owned(),
            ..Locality::default()
        }),
        lb_endpoints,
    }
}

/// The better of two that stand at one address.
pub(super) fn insert(
    targets: &mut BTreeMap<(IpAddr, u16), Target>,
    at: SocketAddr,
    target: Target,
) {
    let known = targets.get(&(at.ip(), at.port()));
    if known.is_none_or(|known| known.health == Health::Draining) {
        targets.insert((at.ip(), at.port()), target);
    }
}
