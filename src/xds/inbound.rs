//! LDS and CDS of the server's side: 15006, one chain for each port, transport and protocol.
//!
//! | mode | TLS with a mesh ALPN | other TLS | plaintext |
//! |---|---|---|---|
//! | STRICT | mutual TLS | the same: reset without our certificate | no chain: reset |
//! | PERMISSIVE | mutual TLS | passed on | passed on |
//! | DISABLE | passed on | passed on | passed on |

use std::{net::IpAddr, sync::Arc};

use envoy_types::pb::envoy::config::{
    core::v3::{TrafficDirection, TransportSocket},
    listener::v3::{FilterChain, FilterChainMatch, Listener},
};

use super::{
    cluster::{BLACK_HOLE, INBOUND_PASSTHROUGH},
    http,
    listener::{
        Families, HTTP_1, HTTP_2, Ports, chain, http_inspector, listener, original_dst, protocols,
        tls_inspector, to_port,
    },
    route,
    telemetry::Reporter,
    transport::{self, MESH_ALPN},
    wire::seconds,
};
use crate::{
    identity::TrustDomain,
    mesh::{Mode, ObjectName, Protocol},
};

/// The port that redirection sends connections to the pod to.
pub(super) const PORT: u16 = 15006;

/// Everything that a proxy's own resources are made from: equal pods share them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pod {
    pub(super) families: Families,
    /// Mode of ports that nobody names.
    pub(super) mode: Mode,
    /// The PeerAuthentication that decides it, else the one of the first port that one decides: whom to tell what became
    /// of the listener.
    pub(super) policy: Option<ObjectName>,
    /// Label `version`.
    pub(super) version: Option<String>,
    /// By number, each once.
    pub(super) ports: Vec<Port>,
}

/// A port of the pod that a Service or a policy names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Port {
    pub(super) number: u16,
    pub(super) mode: Mode,
    /// `None`: a policy names it, and no Service.
    pub(super) service: Option<Behind>,
}

/// The Service in front of a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Behind {
    pub(super) name: ObjectName,
    pub(super) host: Arc<str>,
    pub(super) protocol: Protocol,
}

impl Port {
    fn protocol(&self) -> Protocol {
        let service = self.service.as_ref();
        service.map_or(Protocol::Tcp, |service| service.protocol)
    }

    /// Where its connections go.
    pub(super) fn cluster_name(&self) -> String {
        match self.service {
            Some(_) => format!("inbound|{}||", self.number),
            None => INBOUND_PASSTHROUGH.to_owned(),
        }
    }
}

/// Where every connection to the pod arrives.
pub(super) fn virtual_inbound(pod: &Pod, trust_domain: &TrustDomain) -> Listener {
    let builder = Builder { pod, trust_domain };
    let mut chains = vec![chain(
        "loop",
        Some(to_port(PORT)),
        vec![http::tcp(BLACK_HOLE)],
    )];
    chains.extend(pod.ports.iter().flat_map(|port| builder.chains(Some(port))));
    chains.extend(builder.chains(None));
    let mut listener_filters = vec![original_dst(), tls_inspector(pod.without_tls())];
    let undeclared = |port: &&Port| port.protocol() == Protocol::Undeclared;
    let sniffed: Vec<_> = numbers(pod.ports.iter().filter(undeclared));
    if !sniffed.is_empty() {
        listener_filters.push(http_inspector(Some(Ports::AllBut(sniffed))));
    }
    let ips: Vec<IpAddr> = pod.families.pick("0.0.0.0", "::");
    Listener {
        listener_filters,
        // Who says nothing for this long speaks no TLS: under STRICT there is no chain for that, and a PERMISSIVE
        // server that speaks first is heard at last.
        listener_filters_timeout: seconds(15),
        continue_on_listener_filters_timeout: true,
        ..listener(
            "virtualInbound",
            &ips,
            PORT,
            TrafficDirection::Inbound,
            chains,
        )
    }
}

impl Pod {
    /// Ports where nobody looks for TLS: bytes are passed on whatever they are.
    fn without_tls(&self) -> Option<Ports> {
        let blind = |port: &&Port| port.mode == Mode::Disable && port.protocol() == Protocol::Tcp;
        match self.mode {
            Mode::Disable => {
                let seeing = self.ports.iter().filter(|port| !blind(port));
                Some(Ports::AllBut(numbers(seeing)))
            }
            _ => Some(Ports::These(numbers(self.ports.iter().filter(blind)))),
        }
    }
}

fn numbers<'p>(ports: impl Iterator<Item = &'p Port>) -> Vec<u16> {
    ports.map(|port| port.number).collect()
}

struct Builder<'a> {
    pod: &'a Pod,
    trust_domain: &'a TrustDomain,
}

impl Builder<'_> {
    /// The chains of a port, or (`None`) of all that are not named.
    fn chains(&self, port: Option<&Port>) -> Vec<FilterChain> {
        let mode = port.map_or(self.pod.mode, |port| port.mode);
        let protocol = port.map_or(Protocol::Tcp, Port::protocol);
        let of = Of {
            builder: self,
            port,
        };
        match mode {
            Mode::Strict => of.mutual(protocol, &[]),
            Mode::Permissive => {
                let mut chains = of.mutual(protocol, &MESH_ALPN);
                chains.push(of.bytes("tls", of.tls(&[])));
                chains.extend(of.plain(protocol));
                chains
            }
            // Without a look at the first bytes there is one chain for all.
            Mode::Disable if protocol == Protocol::Tcp => vec![of.bytes("any", of.matching())],
            Mode::Disable => {
                let mut chains = vec![of.bytes("tls", of.tls(&[]))];
                chains.extend(of.plain(protocol));
                chains
            }
        }
    }
}

/// Chains of one port.
struct Of<'a> {
    builder: &'a Builder<'a>,
    port: Option<&'a Port>,
}

impl Of<'_> {
    /// Mutual TLS, taken where the client offers one of `alpn` (none: always).
    fn mutual(&self, protocol: Protocol, alpn: &[&str]) -> Vec<FilterChain> {
        let chains = match protocol {
            Protocol::Http | Protocol::Http2 | Protocol::Grpc => {
                vec![self.requests("mtls", self.tls(alpn), true)]
            }
            Protocol::Tcp => vec![self.bytes("mtls", self.tls(alpn))],
            Protocol::Undeclared => {
                let (http, other): (Vec<_>, Vec<_>) =
                    MESH_ALPN.iter().partition(|name| name.contains("-h"));
                let other = if alpn.is_empty() { Vec::new() } else { other };
                vec![
                    self.requests("mtls-http", self.tls(&http), true),
                    self.bytes("mtls", self.tls(&other)),
                ]
            }
        };
        let secured = |chain| FilterChain {
            transport_socket: Some(self.server()),
            ..chain
        };
        chains.into_iter().map(secured).collect()
    }

    fn plain(&self, protocol: Protocol) -> Vec<FilterChain> {
        let raw = |names: &[&str]| FilterChainMatch {
            transport_protocol: "raw_buffer".to_owned(),
            application_protocols: protocols(names),
            ..self.matching()
        };
        match protocol {
            Protocol::Http | Protocol::Http2 | Protocol::Grpc => {
                vec![self.requests("plain", raw(&[]), false)]
            }
            Protocol::Tcp => vec![self.bytes("plain", raw(&[]))],
            Protocol::Undeclared => {
                let http = raw(&[HTTP_1.as_slice(), HTTP_2.as_slice()].concat());
                vec![
                    self.requests("plain-http", http, false),
                    self.bytes("plain", raw(&[])),
                ]
            }
        }
    }

    fn requests(&self, kind: &str, matching: FilterChainMatch, mtls: bool) -> FilterChain {
        let cluster = self.cluster();
        let routes = route::to_application(&cluster, &cluster);
        let service = self.port.and_then(|port| port.service.as_ref());
        let reporter = Reporter::Destination {
            service: service.map_or("-", |service| &*service.host),
            namespace: service.map_or("-", |service| &*service.name.namespace),
            version: self.builder.pod.version.as_deref(),
            mtls,
        };
        let filter = http::inbound(&self.name("inbound_", "http"), routes, &reporter);
        chain(&self.name("", kind), Some(matching), vec![filter])
    }

    fn bytes(&self, kind: &str, matching: FilterChainMatch) -> FilterChain {
        let filters = vec![http::tcp(&self.cluster())];
        chain(&self.name("", kind), Some(matching), filters)
    }

    fn cluster(&self) -> String {
        self.port
            .map_or_else(|| INBOUND_PASSTHROUGH.to_owned(), Port::cluster_name)
    }

    /// `8080-mtls`, `others-plain`.
    fn name(&self, prefix: &str, kind: &str) -> String {
        match self.port {
            Some(port) => format!("{prefix}{}-{kind}", port.number),
            None => format!("{prefix}others-{kind}"),
        }
    }

    fn matching(&self) -> FilterChainMatch {
        self.port
            .map(|port| to_port(port.number))
            .unwrap_or_default()
    }

    fn tls(&self, alpn: &[&str]) -> FilterChainMatch {
        FilterChainMatch {
            transport_protocol: "tls".to_owned(),
            application_protocols: protocols(alpn),
            ..self.matching()
        }
    }

    fn server(&self) -> TransportSocket {
        transport::server(self.builder.trust_domain)
    }
}
