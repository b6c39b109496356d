//! The filters of a chain: HTTP, or bytes as they are.

use envoy_types::pb::envoy::{
    config::{
        accesslog::v3::{
            AccessLogFilter, AndFilter, HeaderFilter, ResponseFlagFilter,
            access_log_filter::FilterSpecifier,
        },
        common::mutation_rules::v3::{HeaderMutation, header_mutation},
        core::v3::{
            DataSource, HeaderValue, HeaderValueOption, Http1ProtocolOptions, HttpProtocolOptions,
            SubstitutionFormatString, data_source, header_value_option::HeaderAppendAction,
            substitution_format_string::Format,
        },
        listener::v3::{Filter, filter},
        route::v3::RouteConfiguration,
    },
    extensions::{
        filters::{
            common::set_filter_state::v3::{
                FilterStateValue,
                filter_state_value::{Key, SharedWithUpstream, Value},
            },
            http::router::v3::Router,
            network::{
                http_connection_manager::v3::{
                    HttpConnectionManager, HttpFilter, LocalReplyConfig, Rds, ResponseMapper,
                    http_connection_manager::{
                        ForwardClientCertDetails, RouteSpecifier, ServerHeaderTransformation,
                        SetCurrentClientCertDetails, UpgradeConfig,
                    },
                    http_filter,
                },
                set_filter_state::v3::Config as SetFilterState,
                tcp_proxy::v3::{TcpProxy, tcp_proxy::ClusterSpecifier},
            },
        },
        http::early_header_mutation::header_mutation::v3::HeaderMutation as EarlyHeaderMutation,
    },
    r#type::{
        matcher::v3::{StringMatcher, string_matcher::MatchPattern},
        v3::Percent,
    },
};

use super::{
    route::{self, TRY_ANOTHER},
    telemetry::{Reporter, request_metrics},
    wire::{any, boolean, extension, from_ads, seconds},
};

/// Where an HTTP chain's routes come from.
pub(super) enum Routes<'a> {
    /// By RDS, under this name.
    Named(&'a str),
    /// They stand here.
    Inline(Box<RouteConfiguration>),
}

/// An HTTP chain of the caller's side.
pub(super) fn outbound(stat_prefix: &str, routes: Routes<'_>) -> Filter {
    let manager = manager(stat_prefix, routes, &Reporter::Source);
    filter("envoy.filters.network.http_connection_manager", &manager)
}

/// An HTTP chain of the server's side. What a caller says about itself is dropped; who it is, its certificate says.
pub(super) fn inbound(
    stat_prefix: &str,
    routes: RouteConfiguration,
    reporter: &Reporter<'_>,
) -> Filter {
    let mtls = matches!(reporter, Reporter::Destination { mtls: true, .. });
    let mut manager = manager(stat_prefix, Routes::Inline(routes.into()), reporter);
    if mtls {
        manager.forward_client_cert_details = ForwardClientCertDetails::SanitizeSet.into();
        manager.set_current_client_cert_details = Some(SetCurrentClientCertDetails {
            uri: true,
            ..SetCurrentClientCertDetails::default()
        });
        // A connection ends before the certificate it was made with: 12 to 18 of its 24 hours.
        manager.common_http_protocol_options = Some(HttpProtocolOptions {
            max_connection_duration: seconds(12 * 3600),
            max_connection_duration_jitter: Some(Percent { value: 50.0 }),
            ..HttpProtocolOptions::default()
        });
        manager.local_reply_config = Some(tells_what_to_try_elsewhere());
    }
    manager.early_header_mutation_extensions = vec![extension(
        "envoy.http.early_header_mutation.header_mutation",
        &EarlyHeaderMutation {
            mutations: vec![without_headers("x-envoy-")],
        },
    )];
    filter("envoy.filters.network.http_connection_manager", &manager)
}

/// What the proxy answers for an application that cannot have acted bears [`TRY_ANOTHER`]: no connection to it came about,
/// or it ended while it was asked something that only asks. The header's value is the SNI: empty, and so no header, from
/// callers whose proxy does not know that it carries HTTP and could not take it out again.
fn tells_what_to_try_elsewhere() -> LocalReplyConfig {
    let refused = flagged(&["UF"]);
    let ended = all_of([
        flagged(&["UC", "UR"]),
        FilterSpecifier::HeaderFilter(HeaderFilter {
            header: Some(route::only_asks()),
        }),
    ]);
    let mark = HeaderValueOption {
        header: Some(HeaderValue {
            key: TRY_ANOTHER.to_owned(),
            value: "%REQUESTED_SERVER_NAME%".to_owned(),
            ..HeaderValue::default()
        }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        ..HeaderValueOption::default()
    };
    LocalReplyConfig {
        mappers: [refused, ended]
            .map(|filter| ResponseMapper {
                filter: Some(filtered(filter)),
                headers_to_add: vec![mark.clone()],
                ..ResponseMapper::default()
            })
            .into(),
        ..LocalReplyConfig::default()
    }
}

/// Answers that Envoy gave itself for one of these reasons.
fn flagged(flags: &[&str]) -> FilterSpecifier {
    let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
    FilterSpecifier::ResponseFlagFilter(ResponseFlagFilter { flags })
}

fn all_of(filters: [FilterSpecifier; 2]) -> FilterSpecifier {
    FilterSpecifier::AndFilter(AndFilter {
        filters: filters.map(filtered).into(),
    })
}

fn filtered(by: FilterSpecifier) -> AccessLogFilter {
    AccessLogFilter {
        filter_specifier: Some(by),
    }
}

/// Bytes as they are.
pub(super) fn tcp(cluster: &str) -> Filter {
    let proxy = TcpProxy {
        stat_prefix: without_dots(cluster),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        ..TcpProxy::default()
    };
    filter("envoy.filters.network.tcp_proxy", &proxy)
}

/// Remembers texts about the connection that the choice of the upstream's transport socket reads. `factory` says how
/// a text is read; the key itself where that is one that Envoy knows.
pub(super) fn remember(texts: &[(&str, &str, &str)]) -> Filter {
    let value = |&(key, factory, format): &(&str, &str, &str)| {
        let inline = data_source::Specifier::InlineString(format.to_owned());
        FilterStateValue {
            key: Some(Key::ObjectKey(key.to_owned())),
            factory_key: factory.to_owned(),
            shared_with_upstream: SharedWithUpstream::Once.into(),
            value: Some(Value::FormatString(SubstitutionFormatString {
                format: Some(Format::TextFormatSource(DataSource {
                    specifier: Some(inline),
                    ..DataSource::default()
                })),
                ..SubstitutionFormatString::default()
            })),
            ..FilterStateValue::default()
        }
    };
    let state = SetFilterState {
        on_new_connection: texts.iter().map(value).collect(),
        ..SetFilterState::default()
    };
    filter("envoy.filters.network.set_filter_state", &state)
}

fn manager(
    stat_prefix: &str,
    routes: Routes<'_>,
    reporter: &Reporter<'_>,
) -> HttpConnectionManager {
    let route_specifier = match routes {
        Routes::Named(name) => RouteSpecifier::Rds(Rds {
            config_source: Some(from_ads()),
            route_config_name: name.to_owned(),
        }),
        Routes::Inline(routes) => RouteSpecifier::RouteConfig(*routes),
    };
    HttpConnectionManager {
        stat_prefix: without_dots(stat_prefix),
        http_filters: vec![HttpFilter {
            name: "envoy.filters.http.router".to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(
                any(&Router::default()),
            )),
            ..HttpFilter::default()
        }],
        http_protocol_options: Some(Http1ProtocolOptions {
            accept_http_10: true,
            ..Http1ProtocolOptions::default()
        }),
        access_log: vec![request_metrics(reporter)],
        server_header_transformation: ServerHeaderTransformation::PassThrough.into(),
        upgrade_configs: vec![UpgradeConfig {
            upgrade_type: "websocket".to_owned(),
            ..UpgradeConfig::default()
        }],
        normalize_path: boolean(true),
        merge_slashes: true,
        // A stream that is silent may be alive; the application has the time limits.
        stream_idle_timeout: seconds(0),
        route_specifier: Some(route_specifier),
        ..HttpConnectionManager::default()
    }
}

/// Envoy cuts the prefix out of a counter's name at the first dot; the rest would be another metric for each.
fn without_dots(prefix: &str) -> String {
    prefix.replace('.', "_")
}

fn without_headers(prefix: &str) -> HeaderMutation {
    let remove = header_mutation::RemoveOnMatch {
        key_matcher: Some(StringMatcher {
            match_pattern: Some(MatchPattern::Prefix(prefix.to_owned())),
            ..StringMatcher::default()
        }),
    };
    HeaderMutation {
        action: Some(header_mutation::Action::RemoveOnMatch(remove)),
    }
}

fn filter<M: prost::Message + prost::Name>(name: &str, config: &M) -> Filter {
    Filter {
        name: name.to_owned(),
        config_type: Some(filter::ConfigType::TypedConfig(any(config))),
    }
}
