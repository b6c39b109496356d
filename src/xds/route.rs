//! RDS: which cluster a request goes to, by its host, and what becomes of it when nobody answers.
//!
//! A rolling restart must lose nothing, although an application that ends stops listening before its callers have heard
//! that it goes. Its proxy outlives it, and says so where the application cannot have acted ([`TRY_ANOTHER`]); the caller's
//! proxy tries exactly those elsewhere. Another 503 is the application's own, and is not tried again.

use std::collections::BTreeSet;

use envoy_types::pb::envoy::{
    config::route::v3::{
        HeaderMatcher, RetryPolicy, Route, RouteAction, RouteConfiguration, RouteMatch,
        VirtualHost, header_matcher::HeaderMatchSpecifier, retry_policy, route::Action,
        route_action::ClusterSpecifier, route_match::PathSpecifier,
    },
    extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate,
    r#type::matcher::v3::{RegexMatcher, StringMatcher, string_matcher::MatchPattern},
};

use super::{
    cluster::PASSTHROUGH,
    wire::{any, boolean, number, seconds},
};

/// The header by which a server's proxy tells a caller's that the application did not act: it never saw the request, or
/// the request only asks. Only proxies see it: it is taken from what applications answer, and from what they are answered.
pub(super) const TRY_ANOTHER: &str = "x-malha-try-another";

/// Methods that ask and do not act (RFC 9110, 9.2.1).
const SAFE: &str = "GET|HEAD|OPTIONS";

/// One Service's port, by every name it has.
pub(super) struct Host {
    /// The name of its virtual host.
    pub(super) name: String,
    /// What callers write as host; of one that two claim the first keeps it.
    pub(super) domains: Vec<String>,
    /// Where its requests go.
    pub(super) cluster: String,
}

/// The routes of one port. A host that is nobody's here is called as it is.
pub(super) fn routes(name: &str, hosts: impl IntoIterator<Item = Host>) -> RouteConfiguration {
    let mut taken = BTreeSet::new();
    let mut virtual_hosts: Vec<_> = hosts
        .into_iter()
        .filter_map(|host| {
            let mut domains = host.domains;
            // Envoy refuses a whole configuration with one domain twice.
            domains.retain(|domain| taken.insert(domain.clone()));
            (!domains.is_empty()).then(|| VirtualHost {
                retry_policy: Some(retries()),
                ..virtual_host(&host.name, domains, &host.cluster)
            })
        })
        .collect();
    virtual_hosts.push(virtual_host("allow_any", vec!["*".to_owned()], PASSTHROUGH));
    RouteConfiguration {
        ignore_port_in_host_matching: true,
        ..configuration(name, virtual_hosts)
    }
}

/// Everything that a caller sends to one address goes to one cluster.
pub(super) fn everything_to(name: &str, cluster: &str) -> RouteConfiguration {
    let all = VirtualHost {
        retry_policy: Some(retries()),
        ..virtual_host(name, vec!["*".to_owned()], cluster)
    };
    configuration(name, vec![all])
}

/// Everything goes to the pod's own application. A request that met the end of a kept connection is tried on another:
/// any request of which nothing was sent, and those that only ask (RFC 9110, 9.2.2) even when they were. Where the whole
/// application ends the other connections end too, and the caller's proxy [tries another pod](TRY_ANOTHER).
pub(super) fn to_application(name: &str, cluster: &str) -> RouteConfiguration {
    let again = |retry_on: &str| {
        Some(RetryPolicy {
            retry_on: retry_on.to_owned(),
            num_retries: number(3),
            ..RetryPolicy::default()
        })
    };
    let all = VirtualHost {
        routes: vec![
            route(cluster, vec![only_asks()], again("reset")),
            route(cluster, Vec::new(), again("reset-before-request")),
        ],
        ..virtual_host(name, vec!["*".to_owned()], cluster)
    };
    configuration(name, vec![all])
}

/// Requests that an application may be asked twice.
pub(super) fn only_asks() -> HeaderMatcher {
    HeaderMatcher {
        name: ":method".to_owned(),
        header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(StringMatcher {
            match_pattern: Some(MatchPattern::SafeRegex(RegexMatcher {
                regex: SAFE.to_owned(),
                ..RegexMatcher::default()
            })),
            ..StringMatcher::default()
        })),
        ..HeaderMatcher::default()
    }
}

fn configuration(name: &str, virtual_hosts: Vec<VirtualHost>) -> RouteConfiguration {
    RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts,
        response_headers_to_remove: vec![TRY_ANOTHER.to_owned()],
        // Clusters come before their routes, but a route must not wait for them.
        validate_clusters: boolean(false),
        ..RouteConfiguration::default()
    }
}

/// Where the application did not act. Not on its own 503: it may have.
fn retries() -> RetryPolicy {
    let other_hosts = retry_policy::RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(retry_policy::retry_host_predicate::ConfigType::TypedConfig(
            any(&PreviousHostsPredicate {}),
        )),
    };
    RetryPolicy {
        retry_on: "connect-failure,refused-stream,unavailable,cancelled,reset-before-request,retriable-headers"
            .to_owned(),
        retriable_headers: vec![HeaderMatcher {
            name: TRY_ANOTHER.to_owned(),
            header_match_specifier: Some(HeaderMatchSpecifier::PresentMatch(true)),
            ..HeaderMatcher::default()
        }],
        num_retries: number(2),
        retry_host_predicate: vec![other_hosts],
        host_selection_retry_max_attempts: 5,
        ..RetryPolicy::default()
    }
}

fn virtual_host(name: &str, domains: Vec<String>, cluster: &str) -> VirtualHost {
    VirtualHost {
        name: name.to_owned(),
        domains,
        routes: vec![route(cluster, Vec::new(), None)],
        ..VirtualHost::default()
    }
}

fn route(cluster: &str, headers: Vec<HeaderMatcher>, retry_policy: Option<RetryPolicy>) -> Route {
    let action = RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        timeout: seconds(0),
        retry_policy,
        ..RouteAction::default()
    };
    Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            headers,
            ..RouteMatch::default()
        }),
        action: Some(Action::Route(action)),
        ..Route::default()
    }
}
