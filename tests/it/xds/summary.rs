//! What matters of each resource, for people to read.

use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{Cluster, cluster::ClusterDiscoveryType},
            core::v3::{TransportSocket, transport_socket},
            endpoint::v3::{ClusterLoadAssignment, lb_endpoint::HostIdentifier},
            listener::v3::{FilterChain, FilterChainMatch, Listener, filter, listener_filter},
            route::v3::{
                RetryPolicy, Route, RouteConfiguration, VirtualHost,
                header_matcher::HeaderMatchSpecifier, route::Action,
                route_action::ClusterSpecifier,
            },
        },
        extensions::{
            filters::network::{
                http_connection_manager::v3::{
                    HttpConnectionManager, http_connection_manager::RouteSpecifier,
                },
                tcp_proxy::v3::{TcpProxy, tcp_proxy},
            },
            transport_sockets::tls::v3::{
                CommonTlsContext, DownstreamTlsContext, UpstreamTlsContext,
                common_tls_context::ValidationContextType,
            },
        },
        r#type::matcher::v3::string_matcher::MatchPattern,
    },
    google::protobuf::{Any, value},
};
use malha::{
    mesh::ObjectName,
    xds::{Catalogue, Kind},
};
use prost::Message;
use serde_json::{Value, json};

pub(super) fn of(catalogue: &Catalogue, proxy: &ObjectName) -> Value {
    let mut all = json!({"clusters": {}, "endpoints": {}, "listeners": {}, "routes": {}});
    for (kind, resource) in super::resources(catalogue, proxy) {
        let (section, said) = match kind {
            Kind::Cluster => ("clusters", cluster(&decode(&resource.body))),
            Kind::Endpoints => ("endpoints", endpoints(&decode(&resource.body))),
            Kind::Listener => ("listeners", listener(&decode(&resource.body))),
            Kind::Route => ("routes", routes(&decode(&resource.body))),
            Kind::Secret => unreachable!("no proxy asks the control plane for secrets"),
        };
        all[section][&*resource.name] = said;
    }
    all
}

pub(super) fn decode<M: Message + Default>(bytes: &[u8]) -> M {
    M::decode(bytes).expect("a message of Envoy's")
}

fn cluster(cluster: &Cluster) -> Value {
    let kind = match cluster.cluster_discovery_type {
        Some(ClusterDiscoveryType::Type(0)) => "STATIC",
        Some(ClusterDiscoveryType::Type(3)) => "EDS",
        Some(ClusterDiscoveryType::Type(4)) => "ORIGINAL_DST",
        _ => "?",
    };
    let mut said = json!({"type": kind});
    for socket in &cluster.transport_socket_matches {
        said["sockets"][&socket.name] = client(socket.transport_socket.as_ref());
    }
    if let Some(from) = &cluster.upstream_bind_config {
        let first = from.source_address.iter();
        let others = from
            .extra_source_addresses
            .iter()
            .flat_map(|extra| &extra.address);
        said["from"] = first
            .chain(others)
            .map(|from| from.address.clone())
            .collect();
    }
    said
}

fn endpoints(assignment: &ClusterLoadAssignment) -> Value {
    let localities = assignment.endpoints.iter();
    localities
        .flat_map(|locality| &locality.lb_endpoints)
        .map(|endpoint| {
            let Some(HostIdentifier::Endpoint(host)) = &endpoint.host_identifier else {
                panic!("an endpoint without an address")
            };
            let metadata = endpoint.metadata.as_ref();
            let metadata = metadata.and_then(|all| all.filter_metadata.values().next());
            let mtls = metadata.and_then(|texts| texts.fields.get("tlsMode")?.kind.clone());
            let mtls = matches!(mtls, Some(value::Kind::StringValue(mode)) if mode == "istio");
            let health = ["unknown", "healthy", "unhealthy", "draining"];
            format!(
                "{} {} {}",
                address(host.address.as_ref()),
                health[usize::try_from(endpoint.health_status).expect("one of them")],
                if mtls { "mtls" } else { "plain" },
            )
        })
        .collect()
}

fn listener(listener: &Listener) -> Value {
    let first = address(listener.address.as_ref());
    let others = listener.additional_addresses.iter();
    let others = others.map(|other| address(other.address.as_ref()));
    let inspectors = listener.listener_filters.iter().map(|filter| {
        assert!(matches!(
            filter.config_type,
            Some(listener_filter::ConfigType::TypedConfig(_))
        ));
        let name = filter.name.trim_start_matches("envoy.filters.listener.");
        match &filter.filter_disabled {
            Some(disabled) => format!("{name}, not where {}", ports(disabled)),
            None => name.to_owned(),
        }
    });
    let chains = listener.filter_chains.iter().map(chain);
    let default = listener.default_filter_chain.iter().map(chain);
    json!({
        "at": std::iter::once(first).chain(others).collect::<Vec<_>>(),
        "inspectors": inspectors.collect::<Vec<_>>(),
        "chains": chains.collect::<Vec<_>>(),
        "otherwise": default.collect::<Vec<_>>(),
    })
}

fn ports(
    predicate: &envoy_types::pb::envoy::config::listener::v3::ListenerFilterChainMatchPredicate,
) -> String {
    use envoy_types::pb::envoy::config::listener::v3::listener_filter_chain_match_predicate::Rule;
    match predicate.rule.as_ref().expect("a rule") {
        Rule::OrMatch(set) => set.rules.iter().map(ports).collect::<Vec<_>>().join(" or "),
        Rule::AndMatch(_) => "?".to_owned(),
        Rule::NotMatch(not) => format!("not {}", ports(not)),
        Rule::AnyMatch(_) => "anything".to_owned(),
        Rule::DestinationPortRange(range) => format!("port {}", range.start),
    }
}

/// `8080-mtls: port 8080, tls, istio|istio-h2 -> mTLS spiffe://.. -> http inbound|8080||`
fn chain(chain: &FilterChain) -> String {
    let mut said = format!("{}:", chain.name);
    if let Some(matching) = &chain.filter_chain_match {
        said += &matches(matching);
    }
    if let Some(server) = server(chain.transport_socket.as_ref()) {
        said += &format!(" -> {server}");
    }
    for filter in &chain.filters {
        let Some(filter::ConfigType::TypedConfig(config)) = &filter.config_type else {
            panic!("a filter without configuration")
        };
        said += &format!(" -> {}", network_filter(config));
    }
    said
}

fn matches(matching: &FilterChainMatch) -> String {
    let mut said = String::new();
    if let Some(port) = &matching.destination_port {
        said += &format!(" port {}", port.value);
    }
    for range in &matching.prefix_ranges {
        let length = range.prefix_len.map(|length| length.value);
        said += &format!(" {}/{}", range.address_prefix, length.unwrap_or_default());
    }
    if !matching.transport_protocol.is_empty() {
        said += &format!(" {}", matching.transport_protocol);
    }
    if !matching.application_protocols.is_empty() {
        said += &format!(" {}", matching.application_protocols.join("|"));
    }
    said
}

fn network_filter(config: &Any) -> String {
    let kind = config.type_url.rsplit_once('.').map(|(_, name)| name);
    match kind {
        Some("TcpProxy") => {
            let proxy: TcpProxy = decode(&config.value);
            let Some(tcp_proxy::ClusterSpecifier::Cluster(cluster)) = proxy.cluster_specifier
            else {
                panic!("a TCP proxy without a cluster")
            };
            format!("tcp {cluster}")
        }
        Some("HttpConnectionManager") => {
            let manager: HttpConnectionManager = decode(&config.value);
            let client = ["-", "-", "-", "client's identity", "-"];
            let client = client[usize::try_from(manager.forward_client_cert_details).expect("one")];
            match manager.route_specifier.expect("routes") {
                RouteSpecifier::Rds(rds) => format!("http routes {}", rds.route_config_name),
                RouteSpecifier::RouteConfig(routes) => {
                    let to = routes.virtual_hosts.iter().map(goes_to).collect::<Vec<_>>();
                    let says = match manager.local_reply_config {
                        Some(_) => ", says what to try elsewhere",
                        None => "",
                    };
                    format!("http {} {client}{says}", to.join(", "))
                }
                RouteSpecifier::ScopedRoutes(_) => "?".to_owned(),
            }
        }
        _ => "remember".to_owned(),
    }
}

fn routes(routes: &RouteConfiguration) -> Value {
    let hosts = routes.virtual_hosts.iter();
    hosts
        .map(|host| format!("{} -> {}", host.domains.join(" "), goes_to(host)))
        .collect()
}

fn goes_to(host: &VirtualHost) -> String {
    let again = |policy: &RetryPolicy| format!(" (again on {})", policy.retry_on.replace(',', " "));
    let route = |route: &Route| {
        let Some(Action::Route(action)) = &route.action else {
            return "?".to_owned();
        };
        let Some(ClusterSpecifier::Cluster(cluster)) = &action.cluster_specifier else {
            return "?".to_owned();
        };
        let headers = &route.r#match.as_ref().expect("a match").headers;
        let only = headers.iter().map(|header| {
            let Some(HeaderMatchSpecifier::StringMatch(text)) = &header.header_match_specifier
            else {
                return "?".to_owned();
            };
            match &text.match_pattern {
                Some(MatchPattern::SafeRegex(regex)) => format!("{} to ", regex.regex),
                _ => "?".to_owned(),
            }
        });
        let again = action.retry_policy.as_ref().map(again);
        format!(
            "{}{cluster}{}",
            only.collect::<String>(),
            again.unwrap_or_default()
        )
    };
    let routes: Vec<_> = host.routes.iter().map(route).collect();
    let again = host.retry_policy.as_ref().map(again);
    routes.join(", ") + &again.unwrap_or_default()
}

fn client(socket: Option<&TransportSocket>) -> Value {
    let Some((kind, config)) = typed(socket) else {
        return json!("?");
    };
    if kind == "RawBuffer" {
        return json!("plain");
    }
    let context: UpstreamTlsContext = decode(&config.value);
    let (peers, alpn) = common(context.common_tls_context.as_ref().expect("a context"));
    json!({"servers": peers, "alpn": alpn, "sni": context.sni})
}

fn server(socket: Option<&TransportSocket>) -> Option<String> {
    let (_, config) = typed(socket)?;
    let context: DownstreamTlsContext = decode(&config.value);
    assert!(
        context
            .require_client_certificate
            .is_some_and(|required| required.value)
    );
    let (peers, _) = common(context.common_tls_context.as_ref().expect("a context"));
    Some(format!("mTLS {}", peers.join(", ")))
}

fn typed(socket: Option<&TransportSocket>) -> Option<(String, Any)> {
    let transport_socket::ConfigType::TypedConfig(config) = socket?.config_type.clone()?;
    let kind = config
        .type_url
        .rsplit('.')
        .next()
        .unwrap_or_default()
        .to_owned();
    Some((kind, config))
}

fn common(context: &CommonTlsContext) -> (Vec<String>, Vec<String>) {
    let versions = context.tls_params.as_ref().expect("versions");
    let both = [
        versions.tls_minimum_protocol_version,
        versions.tls_maximum_protocol_version,
    ];
    assert_eq!(both, [4, 4], "TLS 1.3 and nothing else");
    let Some(ValidationContextType::CombinedValidationContext(combined)) =
        &context.validation_context_type
    else {
        panic!("peers are not verified")
    };
    let roots = combined.validation_context_sds_secret_config.as_ref();
    assert_eq!(roots.expect("roots").name, "ROOTCA");
    let context_of_peers = combined.default_validation_context.as_ref().expect("peers");
    let peers = context_of_peers.match_typed_subject_alt_names.iter();
    let peers: Vec<_> = peers
        .map(|peer| {
            match peer
                .matcher
                .as_ref()
                .and_then(|matcher| matcher.match_pattern.as_ref())
            {
                Some(MatchPattern::Exact(id)) => id.clone(),
                Some(MatchPattern::Prefix(id)) => format!("{id}*"),
                _ => "?".to_owned(),
            }
        })
        .collect();
    assert!(!peers.is_empty(), "anybody would be a peer");
    (peers, context.alpn_protocols.clone())
}

fn address(address: Option<&envoy_types::pb::envoy::config::core::v3::Address>) -> String {
    use envoy_types::pb::envoy::config::core::v3::{
        address::Address, socket_address::PortSpecifier,
    };
    let Some(Address::SocketAddress(socket)) = address.and_then(|all| all.address.as_ref()) else {
        return "?".to_owned();
    };
    match &socket.port_specifier {
        Some(PortSpecifier::PortValue(port)) => format!("{} {port}", socket.address),
        _ => socket.address.clone(),
    }
}
