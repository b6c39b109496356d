//! RDS: which cluster a request goes to, by its host.

use std::collections::BTreeSet;

use envoy_types::pb::envoy::{
    config::route::v3::{
        RetryPolicy, Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, retry_policy,
        route::Action, route_action::ClusterSpecifier, route_match::PathSpecifier,
    },
    extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate,
};

use super::{
    cluster::PASSTHROUGH,
    wire::{any, boolean, number, seconds},
};

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
        name: name.to_owned(),
        virtual_hosts,
        ignore_port_in_host_matching: true,
        // Clusters come before their routes, but a route must not wait for them.
        validate_clusters: boolean(false),
        ..RouteConfiguration::default()
    }
}

/// Everything goes to one cluster.
pub(super) fn everything_to(name: &str, cluster: &str, inbound: bool) -> RouteConfiguration {
    let retry_policy = match inbound {
        // The application closed a kept connection while the request was on its way.
        true => RetryPolicy {
            retry_on: "reset-before-request".to_owned(),
            num_retries: number(1),
            ..RetryPolicy::default()
        },
        false => retries(),
    };
    RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts: vec![VirtualHost {
            retry_policy: Some(retry_policy),
            ..virtual_host(name, vec!["*".to_owned()], cluster)
        }],
        validate_clusters: boolean(false),
        ..RouteConfiguration::default()
    }
}

/// Not on 503: the application may have acted.
fn retries() -> RetryPolicy {
    let other_hosts = retry_policy::RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(retry_policy::retry_host_predicate::ConfigType::TypedConfig(
            any(&PreviousHostsPredicate {}),
        )),
    };
    RetryPolicy {
        retry_on: "connect-failure,refused-stream,unavailable,cancelled".to_owned(),
        num_retries: number(2),
        retry_host_predicate: vec![other_hosts],
        host_selection_retry_max_attempts: 5,
        ..RetryPolicy::default()
    }
}

fn virtual_host(name: &str, domains: Vec<String>, cluster: &str) -> VirtualHost {
    let action = RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        timeout: seconds(0),
        ..RouteAction::default()
    };
    VirtualHost {
        name: name.to_owned(),
        domains,
        routes: vec![Route {
            r#match: Some(RouteMatch {
                path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
                ..RouteMatch::default()
            }),
            action: Some(Action::Route(action)),
            ..Route::default()
        }],
        ..VirtualHost::default()
    }
}
