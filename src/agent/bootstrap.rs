//! What Envoy starts with: who it is, where its configuration and secrets come from, and who may look inside.
//!
//! settings + memory limit -> JSON
//!
//! Everything else comes over xDS. A proxy is ready when that has come, so no wait for it ends early
//! (`initial_fetch_timeout` 0): a half-configured proxy would refuse or, worse, pass on what it should not.

use serde_json::{Value, json};

use super::settings::{Host, Settings};

/// The cluster that SDS references name: the agent's socket.
pub const SDS_CLUSTER: &str = "sds";
/// The cluster of the control plane.
pub const XDS_CLUSTER: &str = "xds";
/// The cluster of Envoy's own admin socket.
const ADMIN_CLUSTER: &str = "admin";

const TLS: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const HTTP_OPTIONS: &str =
    "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
const HTTP_MANAGER: &str = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";

/// The whole bootstrap. `memory_limit` is the container's in bytes, if it has one.
pub fn bootstrap(settings: &Settings, memory_limit: Option<u64>) -> Value {
    json!({
        "node": node(settings),
        "admin": {
            "address": {"pipe": {"path": settings.admin_socket(), "mode": 0o600}},
            // An Envoy that is full must still say so.
            "ignore_global_conn_limit": true,
        },
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [{"envoy_grpc": {
                    "cluster_name": XDS_CLUSTER,
                    // A control plane that comes back is found soon, and not by everybody in one moment.
                    "retry_policy": {"retry_back_off": {"base_interval": "0.5s", "max_interval": "10s"}},
                }}],
            },
            "cds_config": over_ads(),
            "lds_config": over_ads(),
        },
        "static_resources": {
            "clusters": [control_plane(settings), sds(settings), admin(settings)],
            "listeners": [metrics_listener(settings)],
        },
        // A cluster costs 90 KB with everything in it, and most are never called.
        "cluster_manager": {"enable_deferred_cluster_creation": true},
        "deferred_stat_options": {"enable_deferred_creation_stats": true},
        "stats_config": stats(),
        "overload_manager": overload(memory_limit),
    })
}

fn node(settings: &Settings) -> Value {
    let cluster = match settings.workload.as_str() {
        "" => &settings.pod,
        workload => workload,
    };
    json!({
        "id": settings.node_id(),
        "cluster": format!("{cluster}.{}", settings.namespace),
        "metadata": {
            "malha.io/revision": settings.revision,
            "malha.io/cluster": settings.cluster,
            "malha.io/network": settings.network,
        },
    })
}

fn over_ads() -> Value {
    json!({"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"})
}

/// A secret from the agent.
pub fn over_sds(secret: &str) -> Value {
    json!({
        "name": secret,
        "sds_config": {
            "api_config_source": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [{"envoy_grpc": {"cluster_name": SDS_CLUSTER}}],
            },
            "resource_api_version": "V3",
            "initial_fetch_timeout": "0s",
        },
    })
}

fn control_plane(settings: &Settings) -> Value {
    let plane = &settings.control_plane;
    let (host, san) = match &plane.host {
        Host::Name(name) => (name.clone(), "DNS"),
        Host::Ip(ip) => (ip.to_string(), "IP_ADDRESS"),
    };
    let mut tls = json!({
        "@type": TLS,
        "common_tls_context": {
            // Envoy's client stops at 1.2 unless the maximum is raised too.
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
            },
            "alpn_protocols": ["h2"],
            "tls_certificate_sds_secret_configs": [over_sds("default")],
            "combined_validation_context": {
                "default_validation_context": {
                    "match_typed_subject_alt_names": [
                        {"san_type": san, "matcher": {"exact": &host}},
                    ],
                },
                "validation_context_sds_secret_config": over_sds("ROOTCA"),
            },
        },
    });
    if let Host::Name(name) = &plane.host {
        insert(&mut tls, "sni", json!(name));
    }
    let mut cluster = json!({
        "name": XDS_CLUSTER,
        "alt_stat_name": "xds;",
        "connect_timeout": "5s",
        "load_assignment": endpoint(XDS_CLUSTER, &json!({
            "socket_address": {"address": host, "port_value": plane.port},
        })),
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
        // A control plane that has gone without a word is noticed in 40 s, and not in the system's 15 minutes.
        "typed_extension_protocol_options": http2(&json!({
            "connection_keepalive": {"interval": "30s", "timeout": "10s"},
        })),
        "upstream_connection_options": {"tcp_keepalive": {"keepalive_time": 60}},
        "circuit_breakers": {"thresholds": [{
            "max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000,
        }]},
    });
    match &plane.host {
        Host::Name(_) => insert(&mut cluster, "cluster_type", by_name(settings)),
        Host::Ip(_) => insert(&mut cluster, "type", json!("STATIC")),
    }
    cluster
}

/// A Service's address stays for as long as the Service does, so nobody has to ask for it at each end of its five seconds.
fn by_name(settings: &Settings) -> Value {
    let families = match (settings.has_ipv4(), settings.has_ipv6()) {
        (true, true) => "ALL",
        (false, _) => "V6_ONLY",
        (true, false) => "V4_ONLY",
    };
    json!({"name": "envoy.cluster.dns", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.clusters.dns.v3.DnsCluster",
        "dns_lookup_family": families,
        "dns_refresh_rate": "30s",
        "dns_failure_refresh_rate": {"base_interval": "1s", "max_interval": "10s"},
    }})
}

fn sds(settings: &Settings) -> Value {
    json!({
        "name": SDS_CLUSTER,
        "alt_stat_name": "sds;",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": endpoint(SDS_CLUSTER, &json!({"pipe": {"path": settings.sds_socket()}})),
        "typed_extension_protocol_options": http2(&json!({})),
        "circuit_breakers": {"thresholds": [{
            "max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000,
        }]},
    })
}

fn admin(settings: &Settings) -> Value {
    json!({
        "name": ADMIN_CLUSTER,
        "alt_stat_name": "admin;",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": endpoint(ADMIN_CLUSTER, &json!({"pipe": {"path": settings.admin_socket()}})),
    })
}

fn endpoint(cluster: &str, address: &Value) -> Value {
    json!({
        "cluster_name": cluster,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
    })
}

fn http2(options: &Value) -> Value {
    json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": HTTP_OPTIONS,
        "explicit_http_config": {"http2_protocol_options": options},
    }})
}

/// Envoy's metrics for whoever scrapes it alone, and nothing else of its admin interface.
fn metrics_listener(settings: &Settings) -> Value {
    let address = settings.listen_on(settings.envoy_metrics_port);
    let mut socket = json!({
        "address": address.ip().to_string(),
        "port_value": address.port(),
    });
    if address.is_ipv6() {
        insert(&mut socket, "ipv4_compat", json!(true));
    }
    let manager = json!({
        "@type": HTTP_MANAGER,
        "stat_prefix": "metrics",
        "route_config": {"name": "metrics", "virtual_hosts": [{
            "name": "metrics",
            "domains": ["*"],
            "routes": [{
                "match": {
                    "path": "/stats/prometheus",
                    "headers": [{"name": ":method", "string_match": {"exact": "GET"}}],
                },
                "route": {"cluster": ADMIN_CLUSTER, "timeout": "10s"},
            }],
        }]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": ROUTER}}],
    });
    json!({
        "name": "metrics",
        "stat_prefix": "metrics",
        "address": {"socket_address": socket},
        // Full downstream listeners must not hide what they are full of.
        "ignore_global_conn_limit": true,
        "filter_chains": [{"filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": manager,
        }]}],
    })
}

/// Series that are kept: what `malha` shows, what the recording rules and their alerts read, and what says why a
/// connection was refused. The rest would be four fifths of Envoy's memory per cluster.
const BEGIN_WITH: [&str; 7] = [
    "malha.",
    "server.",
    "cluster_manager.",
    "listener_manager.",
    "control_plane.",
    "sds.",
    "overload.",
];
const CONTAIN: [&str; 21] = [
    ".upstream_rq",
    ".upstream_cx_active",
    ".upstream_cx_total",
    ".upstream_cx_connect_",
    ".upstream_cx_overflow",
    ".upstream_cx_none_healthy",
    ".upstream_cx_destroy",
    ".upstream_cx_pool_overflow",
    ".circuit_breakers.",
    ".outlier_detection.",
    ".membership_",
    ".ssl.",
    ".downstream_rq_",
    ".downstream_cx_",
    ".no_filter_chain_match",
    "rbac.",
    "jwt_authn.",
    ".fault.",
    "local_rate_limit",
    "ext_authz",
    ".update_rejected",
];

fn stats() -> Value {
    let begin = BEGIN_WITH.iter().map(|text| json!({"prefix": text}));
    let contain = CONTAIN.iter().map(|text| json!({"contains": text}));
    let patterns: Vec<Value> = begin.chain(contain).collect();
    // `envoy.cluster_name` with an expression of our own: names of clusters hold dots, and end in `;` for its sake.
    let by_name = [
        "envoy.response_code",
        "envoy.response_code_class",
        "envoy.http_conn_manager_prefix",
        "envoy.listener_address",
        "envoy.tcp_prefix",
        "envoy.rds_route_config",
        "envoy.worker_id",
    ];
    let mut tags = vec![json!({
        "tag_name": "envoy.cluster_name",
        "regex": r"^cluster\.((.+?);\.)",
    })];
    tags.extend(by_name.iter().map(|name| json!({"tag_name": name})));
    json!({
        "use_all_default_tags": false,
        "stats_tags": tags,
        "stats_matcher": {"inclusion_list": {"patterns": patterns}},
    })
}

/// More connections than a sidecar has memory for.
const CONNECTIONS: u32 = 65_536;
/// The agent, the sockets and the page cache live under the container's limit too.
const NOT_ENVOYS: u64 = 16 << 20;

fn overload(memory_limit: Option<u64>) -> Value {
    let mut monitors = vec![json!({
        "name": "envoy.resource_monitors.global_downstream_max_connections",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
            "max_active_downstream_connections": CONNECTIONS,
        },
    })];
    let mut actions = Vec::new();
    if let Some(heap) = memory_limit.and_then(|limit| limit.checked_sub(NOT_ENVOYS)) {
        let name = "envoy.resource_monitors.fixed_heap";
        monitors.push(json!({
            "name": name,
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
                "max_heap_size_bytes": heap,
            },
        }));
        for (action, threshold) in [
            ("envoy.overload_actions.shrink_heap", 0.90),
            ("envoy.overload_actions.stop_accepting_requests", 0.95),
        ] {
            actions.push(json!({
                "name": action,
                "triggers": [{"name": name, "threshold": {"value": threshold}}],
            }));
        }
    }
    json!({"refresh_interval": "0.25s", "resource_monitors": monitors, "actions": actions})
}

fn insert(object: &mut Value, key: &str, value: Value) {
    if let Some(object) = object.as_object_mut() {
        object.insert(key.to_owned(), value);
    }
}

/// The container's memory limit in bytes: cgroup v2's `memory.max`, which is a number or `max`.
pub fn memory_limit(memory_max: Option<&str>) -> Option<u64> {
    memory_max?.trim().parse().ok()
}
