//! Small pieces of Envoy's messages, and the few messages that are written here instead.
//!
//! prost writes map fields in random order, so that one message has other bytes in another process, and its version
//! another hash (`xds.md` T5). The generated types are used where a map holds at most one entry; the messages with
//! larger maps are written here with `BTreeMap`, wire-compatible.

use std::{collections::BTreeMap, net::IpAddr};

use envoy_types::pb::{
    envoy::config::core::v3::{
        Address, AggregatedConfigSource, ApiConfigSource, ApiVersion, CidrRange, ConfigSource,
        GrpcService, SocketAddress, TransportSocket, TypedExtensionConfig, address,
        api_config_source::ApiType, config_source::ConfigSourceSpecifier, grpc_service,
        grpc_service::EnvoyGrpc, socket_address, transport_socket,
    },
    google::protobuf::{Any, BoolValue, Duration, UInt32Value},
};
use prost::{Message, Name};

pub(super) fn any<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}

pub(super) fn extension<M: Message + Name>(name: &str, message: &M) -> TypedExtensionConfig {
    TypedExtensionConfig {
        name: name.to_owned(),
        typed_config: Some(any(message)),
    }
}

pub(super) fn socket<M: Message + Name>(name: &str, message: &M) -> TransportSocket {
    TransportSocket {
        name: name.to_owned(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(any(message))),
    }
}

pub(super) fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

pub(super) fn boolean(value: bool) -> Option<BoolValue> {
    Some(BoolValue { value })
}

pub(super) fn seconds(seconds: i64) -> Option<Duration> {
    Some(Duration { seconds, nanos: 0 })
}

pub(super) fn address(ip: IpAddr, port: u16) -> Address {
    Address {
        address: Some(address::Address::SocketAddress(socket_address(ip, port))),
    }
}

pub(super) fn socket_address(ip: IpAddr, port: u16) -> SocketAddress {
    SocketAddress {
        address: ip.to_string(),
        port_specifier: Some(socket_address::PortSpecifier::PortValue(port.into())),
        ..SocketAddress::default()
    }
}

pub(super) fn cidr(ip: IpAddr, length: u8) -> CidrRange {
    CidrRange {
        address_prefix: ip.to_string(),
        prefix_len: number(length.into()),
    }
}

/// From the stream that this resource came by. Without a time limit: what is not complete is not ready.
pub(super) fn from_ads() -> ConfigSource {
    ConfigSource {
        initial_fetch_timeout: seconds(0),
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    }
}

/// From the pod's agent, by the cluster `sds` of its bootstrap.
pub(super) fn from_agent() -> ConfigSource {
    let service = GrpcService {
        target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
            cluster_name: "sds".to_owned(),
            ..EnvoyGrpc::default()
        })),
        ..GrpcService::default()
    };
    let source = ApiConfigSource {
        api_type: ApiType::Grpc.into(),
        transport_api_version: ApiVersion::V3.into(),
        grpc_services: vec![service],
        set_node_on_first_message_only: true,
        ..ApiConfigSource::default()
    };
    ConfigSource {
        initial_fetch_timeout: seconds(0),
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::ApiConfigSource(source)),
        ..ConfigSource::default()
    }
}

/// `envoy.config.core.v3.Metadata`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Metadata {
    #[prost(btree_map = "string, message", tag = "1")]
    pub(super) filter_metadata: BTreeMap<String, Texts>,
}

/// `google.protobuf.Struct` of texts.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Texts {
    #[prost(btree_map = "string, message", tag = "1")]
    pub(super) fields: BTreeMap<String, Text>,
}

/// `google.protobuf.Value` that is a text.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Text {
    #[prost(string, optional, tag = "3")]
    pub(super) string_value: Option<String>,
}

/// `namespace: {key: text, ..}`.
pub(super) fn metadata<'a>(
    namespace: &str,
    texts: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Metadata {
    let texts = texts.into_iter().map(|(key, text)| {
        let string_value = Some(text.to_owned());
        (key.to_owned(), Text { string_value })
    });
    let texts = Texts {
        fields: texts.collect(),
    };
    Metadata {
        filter_metadata: BTreeMap::from([(namespace.to_owned(), texts)]),
    }
}

/// The fields of a Cluster that hold maps; its bytes go behind those of the rest: that is how protobuf merges.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ClusterMaps {
    #[prost(message, optional, tag = "25")]
    pub(super) metadata: Option<Metadata>,
    #[prost(message, optional, tag = "59")]
    pub(super) transport_socket_matcher: Option<Matcher>,
}

/// `xds.type.matcher.v3.Matcher`, a tree.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Matcher {
    #[prost(message, optional, tag = "2")]
    pub(super) tree: Option<MatcherTree>,
    #[prost(message, optional, boxed, tag = "3")]
    pub(super) on_no_match: Option<Box<OnMatch>>,
}

/// `xds.type.matcher.v3.Matcher.MatcherTree`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct MatcherTree {
    #[prost(message, optional, tag = "1")]
    pub(super) input: Option<TypedExtensionConfig>,
    #[prost(message, optional, tag = "2")]
    pub(super) exact: Option<MatchMap>,
}

/// `xds.type.matcher.v3.Matcher.MatcherTree.MatchMap`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct MatchMap {
    #[prost(btree_map = "string, message", tag = "1")]
    pub(super) map: BTreeMap<String, OnMatch>,
}

/// `xds.type.matcher.v3.Matcher.OnMatch`; one of both is there.
#[derive(Clone, PartialEq, Message)]
pub(super) struct OnMatch {
    #[prost(message, optional, boxed, tag = "1")]
    pub(super) matcher: Option<Box<Matcher>>,
    #[prost(message, optional, tag = "2")]
    pub(super) action: Option<TypedExtensionConfig>,
}

/// `envoy.config.endpoint.v3.ClusterLoadAssignment`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Assignment {
    #[prost(string, tag = "1")]
    pub(super) cluster_name: String,
    #[prost(message, repeated, tag = "2")]
    pub(super) endpoints: Vec<Locality>,
}

/// `envoy.config.endpoint.v3.LocalityLbEndpoints`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Locality {
    #[prost(message, optional, tag = "1")]
    pub(super) locality: Option<envoy_types::pb::envoy::config::core::v3::Locality>,
    #[prost(message, repeated, tag = "2")]
    pub(super) lb_endpoints: Vec<LbEndpoint>,
}

/// `envoy.config.endpoint.v3.LbEndpoint`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LbEndpoint {
    #[prost(message, optional, tag = "1")]
    pub(super) endpoint: Option<envoy_types::pb::envoy::config::endpoint::v3::Endpoint>,
    #[prost(int32, tag = "2")]
    pub(super) health_status: i32,
    #[prost(message, optional, tag = "3")]
    pub(super) metadata: Option<Metadata>,
}
