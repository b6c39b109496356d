//! What each proxy is told: (world, proxy) -> resources of Envoy's xDS, and what of them a stream still lacks.
//!
//! [`mesh::Event`](crate::mesh::Event) -> [`Catalogue::apply`] -> [`Touched`] -> streams -> [`Catalogue::find`] -> bytes
//!
//! A resource's version is a hash of its content, the same in every process: a proxy that reconnects names what it holds,
//! and is sent only what differs (`initial_resource_versions` of delta xDS).

pub mod delta;

mod catalogue;
mod cluster;
mod endpoints;
mod http;
mod inbound;
mod listener;
mod outbound;
mod pods;
mod route;
mod service;
mod telemetry;
mod transport;
mod wire;

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;

pub use self::catalogue::Catalogue;
use crate::mesh::{ObjectName, ObjectRef};

/// Kinds of resources, in the order in which additions are pushed. Removals go the other way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The trust bundle, for agents.
    Secret,
    /// CDS.
    Cluster,
    /// EDS.
    Endpoints,
    /// LDS.
    Listener,
    /// RDS.
    Route,
}

impl Kind {
    /// Its type URL on the wire.
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
        }
    }
}

/// One resource as it is sent, encoded once and shared by every stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Its name.
    pub name: Arc<str>,
    /// A hash of its content.
    pub version: u64,
    /// The message, without its `google.protobuf.Any`.
    pub body: Bytes,
    /// The user's object that it was made from, to blame when a proxy refuses it.
    pub source: Option<ObjectRef>,
}

/// What must be looked at again after a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Resources that several proxies share; one may have come, changed or gone.
    pub shared: BTreeSet<(Kind, Arc<str>)>,
    /// Proxies whose own resources (inbound) may all differ.
    pub proxies: BTreeSet<ObjectName>,
}

/// What holds for the whole mesh.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The trust domain of all identities.
    pub trust_domain: crate::identity::TrustDomain,
    /// The namespace whose policies bind the whole mesh: the control plane's own.
    pub root_namespace: Arc<str>,
    /// The cluster's DNS domain, `cluster.local`.
    pub cluster_domain: Arc<str>,
}
