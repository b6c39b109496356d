//! What the CLI asks on 15016: who is connected, and what each proxy was told.
//!
//! On loopback, for who may port-forward to this pod. A page in a browser on the same machine may not read it: `Host` must
//! be a loopback name, and a request that says which page it comes from is refused.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json, Router,
    extract::{Path, Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::get,
};
use envoy_types::pb::envoy::config::{
    core::v3::{address::Address, socket_address::PortSpecifier},
    endpoint::v3::{ClusterLoadAssignment, LbEndpoint, lb_endpoint::HostIdentifier},
};
use jiff::Timestamp;
use prost::Message as _;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Hub, Seat, lock, wire::Program};
use crate::{
    mesh::ObjectName,
    xds::{
        Kind,
        delta::{self, version_text},
    },
};

/// `GET /v1/proxies` and `GET /v1/config/NAMESPACE/POD`.
pub fn router(hub: Arc<Hub>) -> Router {
    Router::new()
        .route("/v1/proxies", get(proxies))
        .route("/v1/config/{namespace}/{pod}", get(config))
        .fallback(async || {
            (
                StatusCode::NOT_FOUND,
                "there is GET /v1/proxies and GET /v1/config/NAMESPACE/POD\n",
            )
        })
        .with_state(hub)
        .layer(middleware::from_fn(from_here))
}

/// DNS rebinding: a name of somebody else's that points to 127.0.0.1 comes with that name as `Host`.
async fn from_here(request: Request, next: Next) -> Response {
    match is_from_here(request.headers()) {
        true => next.run(request).await,
        false => {
            let text = "only answered to http://localhost, and to no web page\n";
            (StatusCode::FORBIDDEN, text).into_response()
        }
    }
}

fn is_from_here(headers: &HeaderMap) -> bool {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.chars().all(|c| c.is_ascii_digit()) => name,
        _ => host,
    };
    matches!(name, "localhost" | "127.0.0.1" | "[::1]") && !headers.contains_key(header::ORIGIN)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct List<T> {
    api_version: &'static str,
    kind: &'static str,
    items: Vec<T>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Proxy {
    namespace: String,
    pod: String,
    identity: String,
    connected_since: Timestamp,
    #[serde(skip_serializing_if = "String::is_empty")]
    envoy_version: String,
    /// When the agent's stream is open, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    agent_version: Option<String>,
    certificate_not_after: Timestamp,
    types: BTreeMap<&'static str, Type>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Type {
    state: &'static str,
    resources: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_ack: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resource: Option<String>,
}

async fn proxies(State(hub): State<Arc<Hub>>) -> Json<List<Proxy>> {
    Json(List {
        api_version: "malha/v1",
        kind: "ProxyList",
        items: hub.proxies(),
    })
}

impl Hub {
    /// One line for each pod: its Envoy's stream and its agent's are told together.
    fn proxies(&self) -> Vec<Proxy> {
        let mut seats = self.seats();
        // the newest last, so that of two streams of one program the living one is told
        seats.sort_by_key(|seat| seat.number);
        let mut found: BTreeMap<ObjectName, Proxy> = BTreeMap::new();
        for seat in seats {
            let own = seat.told();
            match found.get_mut(&seat.proxy) {
                Some(proxy) => proxy.join(own),
                None => drop(found.insert(seat.proxy.clone(), own)),
            }
        }
        found.into_values().collect()
    }
}

impl Seat {
    fn told(&self) -> Proxy {
        let (envoy, agent) = match &self.program {
            Program::Envoy(version) => (version.clone(), None),
            Program::Agent(version) => (String::new(), Some(version.clone())),
            Program::Other(_) => (String::new(), None),
        };
        Proxy {
            namespace: self.proxy.namespace.to_string(),
            pod: self.proxy.name.to_string(),
            identity: self.identity.to_string(),
            connected_since: self.since,
            envoy_version: envoy,
            agent_version: agent,
            certificate_not_after: self.certificate_ends,
            types: self.types(),
        }
    }

    fn types(&self) -> BTreeMap<&'static str, Type> {
        let book = lock(&self.book);
        let told = |kind: Kind| {
            let status = book.session.status(kind)?;
            let refused = status
                .refused
                .map(|(name, text)| (name.to_string(), text.to_string()));
            let (resource, error) = refused.unzip();
            let told = Type {
                state: match status.state {
                    delta::State::Synced => "synced",
                    delta::State::Pending => "pending",
                    delta::State::Rejected => "rejected",
                },
                resources: status.resources,
                last_ack: book.acked.get(&kind).copied(),
                error,
                resource,
            };
            Some((kind.label(), told))
        };
        Kind::ALL.into_iter().filter_map(told).collect()
    }
}

impl Proxy {
    fn join(&mut self, other: Self) {
        if !other.envoy_version.is_empty() {
            self.envoy_version = other.envoy_version;
            self.connected_since = other.connected_since;
        }
        self.agent_version = other.agent_version.or_else(|| self.agent_version.take());
        self.certificate_not_after = self.certificate_not_after.max(other.certificate_not_after);
        self.types.extend(other.types);
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    api_version: &'static str,
    kind: &'static str,
    resources: Vec<Told>,
}

#[derive(Serialize)]
struct Told {
    kind: &'static str,
    name: String,
    version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    /// Of endpoints: Envoy tells no version of them, so they are compared by address.
    #[serde(skip_serializing_if = "Option::is_none")]
    json: Option<Value>,
}

/// What a proxy that connects now would be told.
async fn config(
    State(hub): State<Arc<Hub>>,
    Path((namespace, pod)): Path<(String, String)>,
) -> Response {
    let proxy = ObjectName::new(&namespace, &pod);
    match hub.config(&proxy) {
        Some(resources) => Json(Config {
            api_version: "malha/v1",
            kind: "ProxyConfig",
            resources,
        })
        .into_response(),
        None => {
            let text = format!("pod {proxy} is not known here\n");
            (StatusCode::NOT_FOUND, text).into_response()
        }
    }
}

impl Hub {
    fn config(&self, proxy: &ObjectName) -> Option<Vec<Told>> {
        let catalogue = self.catalogue();
        if !catalogue.world().workloads.contains_key(proxy) {
            return None;
        }
        let mut told = Vec::new();
        for (kind, called) in [(Kind::Cluster, "cluster"), (Kind::Listener, "listener")] {
            for resource in catalogue.all(proxy, kind) {
                if kind == Kind::Cluster
                    && let Some(endpoints) = catalogue.find(proxy, Kind::Endpoints, &resource.name)
                {
                    told.push(Told::of("endpoints", &endpoints));
                }
                told.push(Told::of(called, &resource));
            }
        }
        // routes are asked for by name, so only who is connected knows which
        for name in self.asked_for(proxy, Kind::Route) {
            if let Some(route) = catalogue.find(proxy, Kind::Route, &name) {
                told.push(Told::of("route", &route));
            }
        }
        Some(told)
    }

    fn asked_for(&self, proxy: &ObjectName, kind: Kind) -> Vec<Arc<str>> {
        let of_proxy = self.seats().into_iter().filter(|seat| seat.proxy == *proxy);
        let mut names: Vec<_> = of_proxy
            .flat_map(|seat| {
                let book = lock(&seat.book);
                book.session.subscribed(kind).cloned().collect::<Vec<_>>()
            })
            .collect();
        names.sort();
        names.dedup();
        names
    }
}

impl Told {
    fn of(kind: &'static str, resource: &crate::xds::Resource) -> Self {
        Self {
            kind,
            name: resource.name.to_string(),
            version: version_text(resource.version),
            source: resource
                .source
                .as_ref()
                .map(|source| format!("{}/{}", source.kind, source.name)),
            json: (kind == "endpoints")
                .then(|| assignment(&resource.body))
                .flatten(),
        }
    }
}

/// The addresses of a ClusterLoadAssignment, under the names of the protocol.
fn assignment(body: &[u8]) -> Option<Value> {
    let assignment = ClusterLoadAssignment::decode(body).ok()?;
    let localities = assignment.endpoints.iter().map(|locality| {
        let endpoints = locality.lb_endpoints.iter().filter_map(socket_address);
        let endpoints = endpoints
            .map(|socket| json!({ "endpoint": { "address": { "socket_address": socket } } }));
        json!({ "lb_endpoints": endpoints.collect::<Vec<_>>() })
    });
    Some(json!({
        "cluster_name": assignment.cluster_name,
        "endpoints": localities.collect::<Vec<_>>(),
    }))
}

fn socket_address(endpoint: &LbEndpoint) -> Option<Value> {
    let Some(HostIdentifier::Endpoint(endpoint)) = &endpoint.host_identifier else {
        return None;
    };
    let Some(Address::SocketAddress(socket)) = &endpoint.address.as_ref()?.address else {
        return None;
    };
    let port = match &socket.port_specifier {
        Some(PortSpecifier::PortValue(port)) => json!(port),
        Some(PortSpecifier::NamedPort(name)) => json!(name),
        None => Value::Null,
    };
    Some(json!({ "address": socket.address, "port_value": port }))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn endpoints_are_told_by_their_addresses() {
        use envoy_types::pb::envoy::config::{
            core::v3::{self as core, SocketAddress},
            endpoint::v3::{Endpoint, LocalityLbEndpoints},
        };
        let socket = SocketAddress {
            address: "10.1.0.7".to_owned(),
            port_specifier: Some(PortSpecifier::PortValue(8080)),
            ..SocketAddress::default()
        };
        let endpoint = Endpoint {
            address: Some(core::Address {
                address: Some(Address::SocketAddress(socket)),
            }),
            ..Endpoint::default()
        };
        let locality = LocalityLbEndpoints {
            lb_endpoints: vec![LbEndpoint {
                host_identifier: Some(HostIdentifier::Endpoint(endpoint)),
                ..LbEndpoint::default()
            }],
            ..LocalityLbEndpoints::default()
        };
        let whole = ClusterLoadAssignment {
            cluster_name: "outbound|80||web.shop".to_owned(),
            endpoints: vec![locality],
            ..ClusterLoadAssignment::default()
        };
        let told = assignment(&whole.encode_to_vec()).expect("readable");
        let socket = &told["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"];
        assert_eq!(
            socket["socket_address"],
            json!({ "address": "10.1.0.7", "port_value": 8080 })
        );
        assert_eq!(assignment(b"\xff"), None);
    }

    #[test]
    fn only_loopback_names_are_answered_and_no_web_page() {
        for (host, origin, want) in [
            ("localhost:15016", None, true),
            ("127.0.0.1:40000", None, true),
            ("[::1]:15016", None, true),
            ("localhost", None, true),
            ("evil.example:15016", None, false),
            ("127.0.0.1.evil.example", None, false),
            ("", None, false),
            ("localhost:15016", Some("http://evil.example"), false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static(host));
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
            }
            assert_eq!(is_from_here(&headers), want, "{host} {origin:?}");
        }
    }
}
