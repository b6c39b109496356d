//! Request metrics with both identities, from Envoy's own stats logger (`xds.md` 5.1, 5.2).
//!
//! They leave Envoy as `envoy_malha_*`; the agent renames them to Istio's names.

use envoy_types::pb::{
    envoy::{
        config::accesslog::v3::{AccessLog, access_log},
        extensions::access_loggers::stats::v3::{
            Config,
            config::{Counter, Histogram, Stat, Tag, histogram::Unit},
        },
        r#type::v3::Scope,
    },
    google::protobuf::UInt64Value,
};

use super::wire::any;

/// Who counts a request.
pub(super) enum Reporter<'a> {
    /// The caller's proxy.
    Source,
    /// The server's proxy, which knows its Service, and whether the caller came by mutual TLS.
    Destination {
        service: &'a str,
        namespace: &'a str,
        version: Option<&'a str>,
        mtls: bool,
    },
}

pub(super) fn request_metrics(reporter: &Reporter<'_>) -> AccessLog {
    let tags = tags(reporter);
    let stat = |name: &str| {
        Some(Stat {
            name: name.to_owned(),
            tags: tags.clone(),
        })
    };
    let config = Config {
        // One scope for all listeners: figures outlive a listener that is replaced.
        stats_scope: Some(Scope {
            prefix: "malha".to_owned(),
            ..Scope::default()
        }),
        counters: vec![Counter {
            stat: stat("requests_total"),
            value_fixed: Some(UInt64Value { value: 1 }),
            ..Counter::default()
        }],
        histograms: vec![Histogram {
            stat: stat("request_duration_milliseconds"),
            unit: Unit::Milliseconds.into(),
            value_format: "%DURATION%".to_owned(),
        }],
        ..Config::default()
    };
    AccessLog {
        name: "envoy.access_loggers.stats".to_owned(),
        config_type: Some(access_log::ConfigType::TypedConfig(any(&config))),
        ..AccessLog::default()
    }
}

fn tags(reporter: &Reporter<'_>) -> Vec<Tag> {
    let of_reporter = match reporter {
        Reporter::Source => [
            ("reporter", "source"),
            ("source_principal", "%UPSTREAM_LOCAL_URI_SAN%"),
            ("destination_principal", "%UPSTREAM_PEER_URI_SAN%"),
            ("destination_service", "%METADATA(CLUSTER:malha:service)%"),
            (
                "destination_service_namespace",
                "%METADATA(CLUSTER:malha:namespace)%",
            ),
            (
                "destination_version",
                "%METADATA(UPSTREAM_HOST:envoy.transport_socket_match:version)%",
            ),
            ("connection_security_policy", "unknown"),
        ],
        Reporter::Destination {
            service,
            namespace,
            version,
            mtls,
        } => [
            ("reporter", "destination"),
            ("source_principal", "%DOWNSTREAM_PEER_URI_SAN%"),
            ("destination_principal", "%DOWNSTREAM_LOCAL_URI_SAN%"),
            ("destination_service", service),
            ("destination_service_namespace", namespace),
            ("destination_version", version.unwrap_or("-")),
            (
                "connection_security_policy",
                if *mtls { "mutual_tls" } else { "none" },
            ),
        ],
    };
    let of_request = [
        ("response_code", "%RESPONSE_CODE%"),
        ("response_flags", "%RESPONSE_FLAGS%"),
        ("request_protocol", "%PROTOCOL%"),
    ];
    let tag = |(name, format): (&str, &str)| Tag {
        name: name.to_owned(),
        value_format: format.to_owned(),
        ..Tag::default()
    };
    of_reporter.into_iter().chain(of_request).map(tag).collect()
}
