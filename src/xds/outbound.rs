//! LDS of the caller's side: 15001, and behind it a listener for each port that Services have.
//!
//! 15001 gets every connection and hands it to the listener of its original destination: `10.96.0.7_3306` exactly, else
//! `0.0.0.0_80` of the port, else it keeps it. A pod's own address belongs to a slice of pods ([`super::pods`]) in
//! each listener that can get it.

use std::net::IpAddr;

use envoy_types::pb::envoy::config::{
    core::v3::TrafficDirection,
    listener::v3::{FilterChain, FilterChainMatch, Listener},
};

use super::{
    cluster::{BLACK_HOLE, PASSTHROUGH},
    http::{self, Routes},
    listener::{Families, HTTP_1, HTTP_2, chain, http_inspector, listener, protocols, to_port},
    pods::Block,
    route,
    wire::{boolean, cidr, seconds},
};
use crate::mesh::Protocol;

/// The port that redirection sends the application's connections to.
pub(super) const PORT: u16 = 15001;

/// Where every connection of the application arrives.
pub(super) fn virtual_outbound<'b>(
    families: Families,
    blocks: impl Iterator<Item = &'b Block>,
) -> Listener {
    let mut chains = vec![chain(
        "loop",
        Some(to_port(PORT)),
        vec![http::tcp(BLACK_HOLE)],
    )];
    chains.extend(blocks.map(block_chain));
    Listener {
        use_original_dst: boolean(true),
        default_filter_chain: Some(chain("passthrough", None, vec![http::tcp(PASSTHROUGH)])),
        // The redirection of connections that begin here goes to the loopback.
        ..listener(
            "virtualOutbound",
            &families.pick("127.0.0.1", "::1"),
            PORT,
            TrafficDirection::Outbound,
            chains,
        )
    }
}

/// Name of [`port`]'s listener.
pub(super) fn port_name(v6: bool, number: u16) -> String {
    match v6 {
        false => format!("0.0.0.0_{number}"),
        true => format!("[::]_{number}"),
    }
}

/// Every HTTP Service of one port: requests are routed by their host, and what is not HTTP is sent on as it is.
pub(super) fn port<'b>(v6: bool, number: u16, blocks: impl Iterator<Item = &'b Block>) -> Listener {
    let name = port_name(v6, number);
    let any_ip = if v6 { [0; 16].into() } else { [0; 4].into() };
    let requests = FilterChainMatch {
        application_protocols: protocols(&[HTTP_1.as_slice(), HTTP_2.as_slice()].concat()),
        ..FilterChainMatch::default()
    };
    let routes = Routes::Named(&number.to_string());
    let requests = chain(
        "http",
        Some(requests),
        vec![http::outbound(&format!("outbound_{name}"), routes)],
    );
    let mut chains = vec![requests];
    chains.extend(blocks.filter(|block| block.is_v6() == v6).map(block_chain));
    Listener {
        bind_to_port: boolean(false),
        listener_filters: vec![http_inspector(None)],
        // A pooled connection may say nothing for long, and is HTTP still.
        listener_filters_timeout: seconds(0),
        default_filter_chain: Some(chain("passthrough", None, vec![http::tcp(PASSTHROUGH)])),
        ..listener(&name, &[any_ip], number, TrafficDirection::Outbound, chains)
    }
}

/// Name of [`address`]'s listener.
pub(super) fn address_name(ip: IpAddr, number: u16) -> String {
    match ip {
        IpAddr::V4(ip) => format!("{ip}_{number}"),
        IpAddr::V6(ip) => format!("[{ip}]_{number}"),
    }
}

/// One virtual address of a Service whose port is not declared HTTP.
pub(super) fn address(ip: IpAddr, number: u16, protocol: Protocol, cluster: &str) -> Listener {
    let name = address_name(ip, number);
    let bytes = chain("tcp", None, vec![http::tcp(cluster)]);
    let new = |chains| Listener {
        bind_to_port: boolean(false),
        ..listener(&name, &[ip], number, TrafficDirection::Outbound, chains)
    };
    if protocol == Protocol::Tcp {
        return new(vec![bytes]);
    }
    Listener {
        listener_filters: vec![http_inspector(None)],
        // A server that speaks first is heard after this; the bytes go the same way, only not as HTTP.
        listener_filters_timeout: seconds(5),
        continue_on_listener_filters_timeout: true,
        default_filter_chain: Some(bytes),
        ..new(vec![
            sniffed("http", &HTTP_1, "istio-http/1.1", &name, cluster),
            sniffed("http2", &HTTP_2, "istio-h2", &name, cluster),
        ])
    }
}

/// HTTP that was recognised; the server's proxy is told by ALPN.
fn sniffed(name: &str, seen: &[&str], alpn: &str, listener: &str, cluster: &str) -> FilterChain {
    let key = "envoy.network.application_protocols";
    let seen = FilterChainMatch {
        application_protocols: protocols(seen),
        ..FilterChainMatch::default()
    };
    let routes = Routes::Inline(route::everything_to(listener, cluster).into());
    let filters = vec![
        http::remember(&[(key, "", alpn)]),
        http::outbound(&format!("outbound_{listener}"), routes),
    ];
    chain(name, Some(seen), filters)
}

/// Connections to the pods of a block, each by its own address.
fn block_chain(block: &Block) -> FilterChain {
    let (ip, length) = block.network();
    let matching = FilterChainMatch {
        prefix_ranges: vec![cidr(ip, length)],
        ..FilterChainMatch::default()
    };
    let cluster = block.cluster_name();
    let filters = vec![block.remember(), http::tcp(&cluster)];
    chain(&cluster, Some(matching), filters)
}
