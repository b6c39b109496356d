//! Every golden world goes through `envoy --mode validate`: all that a proxy is told, as one bootstrap.
//!
//! Routes stand in a listener of their own and endpoints in clusters of their own, so that Envoy reads them too.

use std::{path::Path, process::Command};

use envoy_types::pb::{
    envoy::{
        config::{
            bootstrap::v3::{
                Admin, Bootstrap,
                bootstrap::{DynamicResources, StaticResources},
            },
            cluster::v3::{
                Cluster,
                cluster::{ClusterDiscoveryType, DiscoveryType},
            },
            core::v3::{
                Address, AggregatedConfigSource, ApiConfigSource, ApiVersion, ConfigSource,
                GrpcService, Http2ProtocolOptions, Node, Pipe, SocketAddress, address,
                api_config_source::ApiType,
                config_source::ConfigSourceSpecifier,
                grpc_service::{EnvoyGrpc, TargetSpecifier},
                socket_address::PortSpecifier,
            },
            endpoint::v3::{
                ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
                lb_endpoint::HostIdentifier,
            },
            listener::v3::{Filter, FilterChain, Listener, filter},
            route::v3::RouteConfiguration,
        },
        extensions::{
            filters::{
                http::router::v3::Router,
                network::http_connection_manager::v3::{
                    HttpConnectionManager, HttpFilter, http_connection_manager::RouteSpecifier,
                    http_filter,
                },
            },
            upstreams::http::v3::{
                HttpProtocolOptions,
                http_protocol_options::{
                    ExplicitHttpConfig, UpstreamProtocolOptions,
                    explicit_http_config::ProtocolConfig,
                },
            },
        },
    },
    google::protobuf::{Any, Duration},
};
use malha::{
    mesh::ObjectName,
    xds::{Catalogue, Kind},
};
use prost::{Message, Name};

use super::summary::decode;

#[test]
fn envoy_takes_each_golden_world() {
    let Some(envoy) = crate::envoy::find_or_skip() else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let mut seen = std::collections::BTreeSet::new();
    for case in super::cases() {
        let catalogue = super::catalogue(&case);
        for proxy in super::proxies(&catalogue) {
            let bootstrap = everything(&catalogue, &proxy);
            // Equal pods are told the same; Envoy need not hear it twice.
            if seen.insert(bootstrap.clone()) {
                let file = directory.path().join("bootstrap.pb");
                std::fs::write(&file, bootstrap).expect("a writable directory");
                validate(&envoy, &file, &format!("{} {proxy}", case.display()));
            }
        }
    }
}

#[test]
fn envoy_refuses_what_is_wrong() {
    let Some(envoy) = crate::envoy::find_or_skip() else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("bootstrap.pb");
    let mut wrong = bootstrap("x.y");
    let listener = Listener {
        name: "nowhere".to_owned(),
        ..Listener::default()
    };
    wrong.static_resources.get_or_insert_default().listeners = vec![listener];
    std::fs::write(&file, wrong.encode_to_vec()).expect("a writable directory");
    let output = run(&envoy, &file);
    assert!(
        !output.status.success(),
        "a listener without an address was taken"
    );
}

fn validate(envoy: &Path, file: &Path, what: &str) {
    let output = run(envoy, file);
    assert!(
        output.status.success(),
        "{what}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn run(envoy: &Path, file: &Path) -> std::process::Output {
    Command::new(envoy)
        .args([
            "--mode",
            "validate",
            "--concurrency",
            "1",
            "-l",
            "error",
            "-c",
        ])
        .arg(file)
        .output()
        .expect("Envoy starts")
}

fn everything(catalogue: &Catalogue, proxy: &ObjectName) -> Vec<u8> {
    let mut bootstrap = bootstrap(&proxy.to_string());
    let all = bootstrap.static_resources.get_or_insert_default();
    for (kind, resource) in super::resources(catalogue, proxy) {
        match kind {
            Kind::Cluster => all.clusters.push(decode(&resource.body)),
            Kind::Endpoints => all.clusters.push(Cluster {
                name: format!("endpoints of {}", resource.name),
                cluster_discovery_type: Some(ClusterDiscoveryType::Type(
                    DiscoveryType::Static.into(),
                )),
                load_assignment: Some(decode(&resource.body)),
                ..Cluster::default()
            }),
            Kind::Listener => all.listeners.push(decode(&resource.body)),
            Kind::Route => all.listeners.push(listener(decode(&resource.body))),
            Kind::Secret => unreachable!("no proxy asks the control plane for secrets"),
        }
    }
    bootstrap.encode_to_vec()
}

fn listener(routes: RouteConfiguration) -> Listener {
    let address = SocketAddress {
        address: "127.0.0.1".to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(0)),
        ..SocketAddress::default()
    };
    let manager = HttpConnectionManager {
        stat_prefix: "routes".to_owned(),
        http_filters: vec![HttpFilter {
            name: "router".to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(
                any(&Router::default()),
            )),
            ..HttpFilter::default()
        }],
        route_specifier: Some(RouteSpecifier::RouteConfig(routes)),
        ..HttpConnectionManager::default()
    };
    let filter = Filter {
        name: "http".to_owned(),
        config_type: Some(filter::ConfigType::TypedConfig(any(&manager))),
    };
    Listener {
        address: Some(Address {
            address: Some(address::Address::SocketAddress(address)),
        }),
        filter_chains: vec![FilterChain {
            filters: vec![filter],
            ..FilterChain::default()
        }],
        ..Listener::default()
    }
}

/// What the agent's bootstrap holds and resources refer to: the clusters `xds` and `sds`.
pub(super) fn bootstrap(node: &str) -> Bootstrap {
    let xds = ApiConfigSource {
        api_type: ApiType::DeltaGrpc.into(),
        transport_api_version: ApiVersion::V3.into(),
        grpc_services: vec![GrpcService {
            timeout: Some(Duration {
                seconds: 5,
                nanos: 0,
            }),
            target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                cluster_name: "xds".to_owned(),
                ..EnvoyGrpc::default()
            })),
            ..GrpcService::default()
        }],
        set_node_on_first_message_only: true,
        ..ApiConfigSource::default()
    };
    Bootstrap {
        node: Some(Node {
            id: node.to_owned(),
            cluster: "test".to_owned(),
            ..Node::default()
        }),
        static_resources: Some(StaticResources {
            clusters: ["xds", "sds"].map(http2_cluster).into(),
            ..StaticResources::default()
        }),
        dynamic_resources: Some(DynamicResources {
            ads_config: Some(xds),
            ..DynamicResources::default()
        }),
        ..Bootstrap::default()
    }
}

/// The same, alive: everything is at `directory/control`, and Envoy's own interface at `directory/<node>.admin`.
pub(super) fn live_bootstrap(node: &str, directory: &Path) -> Bootstrap {
    let path = |name: &str| directory.join(name).to_str().expect("UTF-8").to_owned();
    let mut all = bootstrap(node);
    for cluster in &mut all.static_resources.get_or_insert_default().clusters {
        let endpoint = LbEndpoint {
            host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
                address: Some(pipe(path("control"))),
                ..Endpoint::default()
            })),
            ..LbEndpoint::default()
        };
        cluster.load_assignment = Some(ClusterLoadAssignment {
            cluster_name: cluster.name.clone(),
            endpoints: vec![LocalityLbEndpoints {
                lb_endpoints: vec![endpoint],
                ..LocalityLbEndpoints::default()
            }],
            ..ClusterLoadAssignment::default()
        });
    }
    let ads = ConfigSource {
        initial_fetch_timeout: Some(Duration {
            seconds: 0,
            nanos: 0,
        }),
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    };
    let dynamic = all.dynamic_resources.get_or_insert_default();
    dynamic.cds_config = Some(ads.clone());
    dynamic.lds_config = Some(ads);
    all.admin = Some(Admin {
        address: Some(pipe(path(&format!("{node}.admin")))),
        ..Admin::default()
    });
    all
}

fn pipe(path: String) -> Address {
    let pipe = Pipe { path, mode: 0o600 };
    Address {
        address: Some(address::Address::Pipe(pipe)),
    }
}

fn http2_cluster(name: &str) -> Cluster {
    let http2 = ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions::default());
    let options = HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(
            ExplicitHttpConfig {
                protocol_config: Some(http2),
            },
        )),
        ..HttpProtocolOptions::default()
    };
    let key = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
        typed_extension_protocol_options: [(key.to_owned(), any(&options))].into(),
        ..Cluster::default()
    }
}

pub(super) fn any<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}
