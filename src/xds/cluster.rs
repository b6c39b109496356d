//! CDS: where connections go.

use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{
                CircuitBreakers, Cluster,
                circuit_breakers::Thresholds,
                cluster::{
                    ClusterDiscoveryType, CommonLbConfig, DiscoveryType, EdsClusterConfig,
                    LbConfig, LbPolicy, LeastRequestLbConfig, TransportSocketMatch,
                },
            },
            core::v3::{
                BindConfig, ExtraSourceAddress, Http1ProtocolOptions, Http2ProtocolOptions,
            },
        },
        extensions::upstreams::http::v3::{
            HttpProtocolOptions,
            http_protocol_options::{
                ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig,
                explicit_http_config::ProtocolConfig,
            },
        },
        r#type::v3::Percent,
    },
    google::protobuf::{Struct, Value, value},
};
use prost::Message;

use super::{
    transport,
    wire::{self, ClusterMaps, any, from_ads, metadata, number, seconds, socket_address},
};
use crate::{
    identity::SpiffeId,
    mesh::{ObjectName, Protocol},
};

/// Sent on as it is, to the address that the application called.
pub(super) const PASSTHROUGH: &str = "PassthroughCluster";
/// Nowhere.
pub(super) const BLACK_HOLE: &str = "BlackHoleCluster";
/// To a port of the pod that no Service names.
pub(super) const INBOUND_PASSTHROUGH: &str = "InboundPassthroughCluster";

/// Endpoint metadata by which Envoy chooses the transport socket.
pub(super) const SOCKET_METADATA: &str = "envoy.transport_socket_match";
/// Its key, and the value of an endpoint that speaks mutual TLS.
pub(super) const TLS_MODE: (&str, &str) = ("tlsMode", "istio");

/// A port of a Service, as its callers reach it: its endpoints come by EDS under the same name.
pub(super) fn outbound(
    name: &str,
    service: (&ObjectName, &str, u16),
    protocol: Protocol,
    servers: &BTreeSet<SpiffeId>,
) -> Vec<u8> {
    let (object, host, port) = service;
    let sni = format!("outbound_.{port}_._.{host}");
    let tls = transport::client(servers, &sni, client_alpn(protocol));
    let cluster = Cluster {
        cluster_discovery_type: discovery(DiscoveryType::Eds),
        eds_cluster_config: Some(EdsClusterConfig {
            eds_config: Some(from_ads()),
            ..EdsClusterConfig::default()
        }),
        lb_policy: LbPolicy::LeastRequest.into(),
        lb_config: Some(LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
            choice_count: number(2),
            ..LeastRequestLbConfig::default()
        })),
        // Nobody is served by an endpoint that is on its way out while others are ready; where all are,
        // `endpoints` says that they are healthy.
        common_lb_config: Some(CommonLbConfig {
            healthy_panic_threshold: Some(Percent { value: 0.0 }),
            ..CommonLbConfig::default()
        }),
        transport_socket_matches: vec![
            TransportSocketMatch {
                name: "mtls".to_owned(),
                r#match: Some(tls_mode()),
                transport_socket: Some(tls),
            },
            TransportSocketMatch {
                name: "plain".to_owned(),
                r#match: Some(Struct::default()),
                transport_socket: Some(transport::raw()),
            },
        ],
        typed_extension_protocol_options: http_options(protocol),
        ..base(name)
    };
    let service = [("service", host), ("namespace", &*object.namespace)];
    let maps = ClusterMaps {
        metadata: Some(metadata("malha", service)),
        ..ClusterMaps::default()
    };
    encode(&cluster, &maps)
}

/// A port of the pod itself, called from an address that redirection knows for ours (`xds.md` 3.2.6).
pub(super) fn inbound(name: &str) -> Vec<u8> {
    let from = |ip: &str| socket_address(ip.parse().expect("an address written here"), 0);
    let cluster = Cluster {
        upstream_bind_config: Some(BindConfig {
            source_address: Some(from("127.0.0.6")),
            extra_source_addresses: vec![ExtraSourceAddress {
                address: Some(from("::6")),
                ..ExtraSourceAddress::default()
            }],
            ..BindConfig::default()
        }),
        ..original_destination(name)
    };
    cluster.encode_to_vec()
}

/// What no Service and no pod of the mesh is behind.
pub(super) fn passthrough() -> Vec<u8> {
    original_destination(PASSTHROUGH).encode_to_vec()
}

/// Connections that must not go anywhere: a proxy that calls itself.
pub(super) fn black_hole() -> Vec<u8> {
    let cluster = Cluster {
        cluster_discovery_type: discovery(DiscoveryType::Static),
        ..base(BLACK_HOLE)
    };
    cluster.encode_to_vec()
}

/// To the address that was called; the transport socket is chosen by `matcher`, plain where it has no answer.
pub(super) fn by_address(
    name: &str,
    sockets: Vec<TransportSocketMatch>,
    matcher: wire::Matcher,
) -> Vec<u8> {
    let cluster = Cluster {
        transport_socket_matches: sockets,
        transport_socket: Some(transport::raw()),
        ..original_destination(name)
    };
    let maps = ClusterMaps {
        transport_socket_matcher: Some(matcher),
        ..ClusterMaps::default()
    };
    encode(&cluster, &maps)
}

fn original_destination(name: &str) -> Cluster {
    Cluster {
        cluster_discovery_type: discovery(DiscoveryType::OriginalDst),
        lb_policy: LbPolicy::ClusterProvided.into(),
        typed_extension_protocol_options: http_options(Protocol::Undeclared),
        ..base(name)
    }
}

fn base(name: &str) -> Cluster {
    let most = number(u32::MAX);
    Cluster {
        name: name.to_owned(),
        // Envoy cuts the tag `envoy_cluster_name` at this end; names hold dots.
        alt_stat_name: format!("{name};"),
        connect_timeout: seconds(10),
        // Envoy's three parallel retries cause 503 in rollouts.
        circuit_breakers: Some(CircuitBreakers {
            thresholds: vec![Thresholds {
                max_connections: most,
                max_pending_requests: most,
                max_requests: most,
                max_retries: most,
                ..Thresholds::default()
            }],
            ..CircuitBreakers::default()
        }),
        ..Cluster::default()
    }
}

fn discovery(kind: DiscoveryType) -> Option<ClusterDiscoveryType> {
    Some(ClusterDiscoveryType::Type(kind.into()))
}

/// What a client says it speaks: HTTP where that is declared, so that the server's proxy sees it before TLS ends.
/// Undeclared ports say it by connection ([`super::http`]).
fn client_alpn(protocol: Protocol) -> &'static [&'static str] {
    match protocol {
        Protocol::Http => &["istio-http/1.1", "istio"],
        Protocol::Http2 | Protocol::Grpc => &["istio-h2", "istio"],
        Protocol::Tcp | Protocol::Undeclared => &["istio"],
    }
}

/// Declared HTTP/2 is always that; otherwise what the client speaks is spoken on.
fn http_options(
    protocol: Protocol,
) -> std::collections::HashMap<String, envoy_types::pb::google::protobuf::Any> {
    let options = match protocol {
        Protocol::Tcp => return Default::default(),
        Protocol::Http2 | Protocol::Grpc => {
            let http2 = ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions::default());
            UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
                protocol_config: Some(http2),
            })
        }
        Protocol::Http | Protocol::Undeclared => {
            UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
                http_protocol_options: Some(Http1ProtocolOptions::default()),
                http2_protocol_options: Some(Http2ProtocolOptions::default()),
                ..UseDownstreamHttpConfig::default()
            })
        }
    };
    let options = HttpProtocolOptions {
        upstream_protocol_options: Some(options),
        ..HttpProtocolOptions::default()
    };
    let name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    [(name.to_owned(), any(&options))].into()
}

fn tls_mode() -> Struct {
    let (key, value) = TLS_MODE;
    let value = Value {
        kind: Some(value::Kind::StringValue(value.to_owned())),
    };
    Struct {
        fields: [(key.to_owned(), value)].into(),
    }
}

fn encode(cluster: &Cluster, maps: &ClusterMaps) -> Vec<u8> {
    let mut bytes = cluster.encode_to_vec();
    maps.encode(&mut bytes).expect("a Vec grows");
    bytes
}

/// Names of an endpoint's texts beside [`TLS_MODE`].
pub(super) fn endpoint_metadata(mtls: bool, version: Option<&str>) -> Option<wire::Metadata> {
    let texts: BTreeMap<_, _> = mtls
        .then_some(TLS_MODE)
        .into_iter()
        .chain(version.map(|version| ("version", version)))
        .collect();
    (!texts.is_empty()).then(|| metadata(SOCKET_METADATA, texts))
}
