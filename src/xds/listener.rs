//! Pieces that inbound and outbound listeners share.

use std::net::IpAddr;

use envoy_types::pb::envoy::{
    config::{
        core::v3::TrafficDirection,
        listener::v3::{
            AdditionalAddress, Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter,
            ListenerFilterChainMatchPredicate, listener_filter,
            listener_filter_chain_match_predicate::{MatchSet, Rule},
        },
    },
    extensions::filters::listener::{
        http_inspector::v3::HttpInspector, original_dst::v3::OriginalDst,
        tls_inspector::v3::TlsInspector,
    },
    r#type::v3::Int32Range,
};

use super::wire::{address, any, number};
use crate::mesh::Workload;

/// What `http_inspector` calls HTTP without TLS.
pub(super) const HTTP_1: [&str; 2] = ["http/1.0", "http/1.1"];
pub(super) const HTTP_2: [&str; 1] = ["h2c"];

/// Address families of a pod. No address yet: IPv4, until the API server knows better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Families {
    v4: bool,
    v6: bool,
}

impl Families {
    pub(super) fn of(workload: &Workload) -> Self {
        let v6 = workload.addresses.iter().any(IpAddr::is_ipv6);
        let v4 = workload.addresses.iter().any(IpAddr::is_ipv4) || !v6;
        Self { v4, v6 }
    }

    /// The address of each family, of a pair.
    pub(super) fn pick(self, v4: &str, v6: &str) -> Vec<IpAddr> {
        let parse = |ip: &str| ip.parse().expect("an address written here");
        let v4 = self.v4.then(|| parse(v4));
        let v6 = self.v6.then(|| parse(v6));
        v4.into_iter().chain(v6).collect()
    }
}

/// A listener at `ips` (at least one).
pub(super) fn listener(
    name: &str,
    ips: &[IpAddr],
    port: u16,
    direction: TrafficDirection,
    filter_chains: Vec<FilterChain>,
) -> Listener {
    let mut addresses = ips.iter().map(|&ip| Some(address(ip, port)));
    let first = addresses.next().flatten();
    let additional = addresses.map(|address| AdditionalAddress {
        address,
        ..AdditionalAddress::default()
    });
    Listener {
        name: name.to_owned(),
        address: first,
        additional_addresses: additional.collect(),
        traffic_direction: direction.into(),
        filter_chains,
        ..Listener::default()
    }
}

pub(super) fn chain(
    name: &str,
    matching: Option<FilterChainMatch>,
    filters: Vec<Filter>,
) -> FilterChain {
    FilterChain {
        name: name.to_owned(),
        filter_chain_match: matching,
        filters,
        ..FilterChain::default()
    }
}

pub(super) fn protocols(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

pub(super) fn original_dst() -> ListenerFilter {
    let config = any(&OriginalDst::default());
    listener_filter("envoy.filters.listener.original_dst", config, None)
}

pub(super) fn tls_inspector(disabled: Option<Ports>) -> ListenerFilter {
    let config = any(&TlsInspector::default());
    listener_filter("envoy.filters.listener.tls_inspector", config, disabled)
}

pub(super) fn http_inspector(disabled: Option<Ports>) -> ListenerFilter {
    let config = any(&HttpInspector::default());
    listener_filter("envoy.filters.listener.http_inspector", config, disabled)
}

/// Ports on which nobody waits for the client's first bytes.
pub(super) enum Ports {
    These(Vec<u16>),
    AllBut(Vec<u16>),
}

fn listener_filter(
    name: &str,
    config: envoy_types::pb::google::protobuf::Any,
    disabled: Option<Ports>,
) -> ListenerFilter {
    ListenerFilter {
        name: name.to_owned(),
        filter_disabled: disabled.and_then(predicate),
        config_type: Some(listener_filter::ConfigType::TypedConfig(config)),
    }
}

fn predicate(ports: Ports) -> Option<ListenerFilterChainMatchPredicate> {
    let rule = |rule| ListenerFilterChainMatchPredicate { rule: Some(rule) };
    let any_of = |ports: Vec<u16>| {
        let mut ranges = ports.into_iter().map(|port| {
            rule(Rule::DestinationPortRange(Int32Range {
                start: port.into(),
                end: i32::from(port) + 1,
            }))
        });
        match ranges.len() {
            // A set wants two of them.
            0 => None,
            1 => ranges.next(),
            _ => Some(rule(Rule::OrMatch(MatchSet {
                rules: ranges.collect(),
            }))),
        }
    };
    match ports {
        Ports::These(ports) => any_of(ports),
        Ports::AllBut(ports) => Some(match any_of(ports) {
            Some(these) => rule(Rule::NotMatch(Box::new(these))),
            None => rule(Rule::AnyMatch(true)),
        }),
    }
}

pub(super) fn to_port(port: u16) -> FilterChainMatch {
    FilterChainMatch {
        destination_port: number(port.into()),
        ..FilterChainMatch::default()
    }
}
