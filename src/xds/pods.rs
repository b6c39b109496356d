//! Calls to a pod's own address: headless Services, StatefulSets, clients that look addresses up themselves.
//!
//! Such a connection must reach that very pod, by mutual TLS if it takes it (istio/istio#37431, #31319, #27831). Envoy
//! knows nothing about an address that an application calls, so each block of addresses that holds pods of the mesh has a
//! cluster that goes where the application goes, and a map from address to the identity that must answer there. Blocks
//! are as large as what a node usually owns: a pod that comes or goes touches one small cluster, and no listener.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use envoy_types::pb::envoy::{
    config::{cluster::v3::cluster::TransportSocketMatch, listener::v3::Filter},
    extensions::matching::common_inputs::transport_socket::v3::{
        FilterStateInput, TransportSocketNameAction,
    },
};

use super::{
    cluster, http, transport,
    wire::{MatchMap, Matcher, MatcherTree, OnMatch, extension},
};
use crate::{identity::SpiffeId, mesh::Mode};

/// A block of addresses: a /24, or a /64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Block(IpAddr);

impl Block {
    pub(super) fn of(ip: IpAddr) -> Self {
        Self(match ip {
            IpAddr::V4(ip) => (u32::from(ip) & !0xff).to_be_bytes().into(),
            IpAddr::V6(ip) => (u128::from(ip) & !u128::from(u64::MAX))
                .to_be_bytes()
                .into(),
        })
    }

    pub(super) fn is_v6(self) -> bool {
        self.0.is_ipv6()
    }

    pub(super) fn network(self) -> (IpAddr, u8) {
        (self.0, if self.is_v6() { 64 } else { 24 })
    }

    pub(super) fn cluster_name(self) -> String {
        let (ip, length) = self.network();
        format!("pods|{ip}/{length}")
    }

    /// What [`cluster`] asks about a connection.
    pub(super) fn remember(self) -> Filter {
        http::remember(&[
            (
                ADDRESS,
                "envoy.string",
                "%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%",
            ),
            (PORT, "envoy.string", "%DOWNSTREAM_LOCAL_PORT%"),
        ])
    }
}

const ADDRESS: &str = "malha.destination.address";
const PORT: &str = "malha.destination.port";
const PLAIN: &str = "plain";

/// A pod of the mesh: who it is, and what its ports take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) identity: SpiffeId,
    pub(super) mode: Mode,
    /// Ports whose mode may differ.
    pub(super) ports: BTreeMap<u16, Mode>,
}

/// The cluster of one block.
pub(super) fn cluster(block: Block, pods: &BTreeMap<IpAddr, Pod>) -> Vec<u8> {
    let identities: BTreeSet<_> = pods.values().map(|pod| &pod.identity).collect();
    let mut sockets: Vec<_> = identities
        .into_iter()
        .map(|identity| TransportSocketMatch {
            name: identity.to_string(),
            transport_socket: Some(transport::client(
                &BTreeSet::from([identity.clone()]),
                "",
                &["istio"],
            )),
            ..TransportSocketMatch::default()
        })
        .collect();
    sockets.push(TransportSocketMatch {
        name: PLAIN.to_owned(),
        transport_socket: Some(transport::raw()),
        ..TransportSocketMatch::default()
    });
    let by_address = pods.iter().map(|(ip, pod)| (ip.to_string(), answer(pod)));
    let matcher = tree(ADDRESS, by_address.collect(), action(PLAIN));
    cluster::by_address(&block.cluster_name(), sockets, matcher)
}

fn answer(pod: &Pod) -> OnMatch {
    let of = |mode: Mode| match mode {
        Mode::Disable => action(PLAIN),
        Mode::Strict | Mode::Permissive => action(&pod.identity.to_string()),
    };
    let other = |mode: &Mode| (*mode == Mode::Disable) != (pod.mode == Mode::Disable);
    let ports: BTreeMap<_, _> = pod
        .ports
        .iter()
        .filter(|(_, mode)| other(mode))
        .map(|(port, mode)| (port.to_string(), of(*mode)))
        .collect();
    if ports.is_empty() {
        return of(pod.mode);
    }
    OnMatch {
        matcher: Some(Box::new(tree(PORT, ports, of(pod.mode)))),
        ..OnMatch::default()
    }
}

fn tree(key: &str, map: BTreeMap<String, OnMatch>, otherwise: OnMatch) -> Matcher {
    let input = FilterStateInput {
        key: key.to_owned(),
    };
    Matcher {
        tree: Some(MatcherTree {
            input: Some(extension(
                "envoy.matching.inputs.transport_socket_filter_state",
                &input,
            )),
            exact: Some(MatchMap { map }),
        }),
        on_no_match: Some(Box::new(otherwise)),
    }
}

fn action(socket: &str) -> OnMatch {
    let action = TransportSocketNameAction {
        name: socket.to_owned(),
    };
    OnMatch {
        action: Some(extension(
            "envoy.matching.action.transport_socket.name",
            &action,
        )),
        ..OnMatch::default()
    }
}
