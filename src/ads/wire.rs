//! The messages of delta xDS, as far as they are read and in the form in which they are written.
//!
//! They are those of `envoy.service.discovery.v3` on the wire. Two things differ from the generated ones: a resource's
//! body is [`Bytes`], so that what is encoded once is not copied for each stream that waits; and of a node only what is
//! asked for is decoded, where Envoy sends some 100 KB of extension names.

use std::collections::HashMap;

use bytes::Bytes;
use envoy_types::pb::google::protobuf::{Struct, value};

use crate::xds::{
    Kind,
    delta::{Push, version_text},
};

/// `DeltaDiscoveryRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Request {
    #[prost(message, optional, tag = "1")]
    pub(super) node: Option<Node>,
    #[prost(string, tag = "2")]
    pub(super) type_url: String,
    #[prost(string, repeated, tag = "3")]
    pub(super) subscribe: Vec<String>,
    #[prost(string, repeated, tag = "4")]
    pub(super) unsubscribe: Vec<String>,
    #[prost(map = "string, string", tag = "5")]
    pub(super) held: HashMap<String, String>,
    #[prost(string, tag = "6")]
    pub(super) nonce: String,
    #[prost(message, optional, tag = "7")]
    pub(super) error: Option<Error>,
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Error {
    #[prost(string, tag = "2")]
    pub(super) message: String,
}

/// `envoy.config.core.v3.Node`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Node {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(message, optional, tag = "3")]
    pub(super) metadata: Option<Struct>,
    #[prost(string, tag = "6")]
    pub(super) user_agent: String,
    #[prost(string, tag = "7")]
    pub(super) user_agent_version: String,
    #[prost(message, optional, tag = "8")]
    pub(super) build: Option<Build>,
}

/// `envoy.config.core.v3.BuildVersion`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Build {
    #[prost(message, optional, tag = "1")]
    version: Option<Version>,
}

/// `envoy.type.v3.SemanticVersion`.
#[derive(Clone, PartialEq, prost::Message)]
struct Version {
    #[prost(uint32, tag = "1")]
    major: u32,
    #[prost(uint32, tag = "2")]
    minor: u32,
    #[prost(uint32, tag = "3")]
    patch: u32,
}

impl Node {
    /// What is connected, by its own word: for people, nothing is decided by it.
    pub(super) fn program(&self) -> Program {
        match self.agent() {
            Some(version) => Program::Agent(short(version)),
            None if self.user_agent == "envoy" => Program::Envoy(self.version()),
            None => Program::Other(short(&self.user_agent)),
        }
    }

    fn agent(&self) -> Option<&str> {
        match &self.metadata.as_ref()?.fields.get("malha.io/agent")?.kind {
            Some(value::Kind::StringValue(version)) => Some(version),
            _ => None,
        }
    }

    fn version(&self) -> String {
        let build = self.build.as_ref().and_then(|build| build.version.as_ref());
        match build {
            Some(it) => format!("{}.{}.{}", it.major, it.minor, it.patch),
            None => short(&self.user_agent_version),
        }
    }
}

/// A client, with its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Program {
    /// The proxy.
    Envoy(String),
    /// Our agent beside it.
    Agent(String),
    /// Somebody else, with its name.
    Other(String),
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

/// `DeltaDiscoveryResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Response {
    #[prost(message, repeated, tag = "2")]
    resources: Vec<Resource>,
    #[prost(string, tag = "4")]
    type_url: String,
    #[prost(string, tag = "5")]
    nonce: String,
    #[prost(string, repeated, tag = "6")]
    removed: Vec<String>,
}

/// `envoy.service.discovery.v3.Resource`.
#[derive(Clone, PartialEq, prost::Message)]
struct Resource {
    #[prost(string, tag = "1")]
    version: String,
    #[prost(message, optional, tag = "2")]
    resource: Option<Any>,
    #[prost(string, tag = "3")]
    name: String,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, prost::Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

impl Response {
    /// A push as it is sent.
    pub(super) fn of(push: &Push) -> Self {
        let kind: Kind = push.kind;
        let resources = push.resources.iter().map(|resource| Resource {
            version: version_text(resource.version),
            resource: Some(Any {
                type_url: kind.type_url().to_owned(),
                value: resource.body.clone(),
            }),
            name: resource.name.to_string(),
        });
        Self {
            resources: resources.collect(),
            type_url: kind.type_url().to_owned(),
            nonce: push.nonce_text(),
            removed: push.removed.iter().map(|name| name.to_string()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use envoy_types::pb::{
        envoy::{
            config::core::v3 as core,
            service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
            r#type::v3::SemanticVersion,
        },
        google::rpc,
    };
    use prost::Message as _;

    use super::*;

    #[test]
    fn a_request_is_read_as_envoy_writes_it() {
        let build = core::BuildVersion {
            version: Some(SemanticVersion {
                major_number: 1,
                minor_number: 40,
                patch: 0,
            }),
            ..core::BuildVersion::default()
        };
        let theirs = DeltaDiscoveryRequest {
            node: Some(core::Node {
                id: "web.shop".to_owned(),
                cluster: "web".to_owned(),
                user_agent_name: "envoy".to_owned(),
                user_agent_version_type: Some(
                    core::node::UserAgentVersionType::UserAgentBuildVersion(build),
                ),
                ..core::Node::default()
            }),
            type_url: Kind::Cluster.type_url().to_owned(),
            resource_names_subscribe: vec!["a".to_owned()],
            resource_names_unsubscribe: vec!["b".to_owned()],
            initial_resource_versions: [("c".to_owned(), "1".to_owned())].into(),
            response_nonce: "7".to_owned(),
            error_detail: Some(rpc::Status {
                code: 13,
                message: "no".to_owned(),
                details: Vec::new(),
            }),
            ..DeltaDiscoveryRequest::default()
        };
        let ours = Request::decode(theirs.encode_to_vec().as_slice()).expect("readable");
        let node = ours.node.expect("a node");
        assert_eq!(
            (&*node.id, node.program()),
            ("web.shop", Program::Envoy("1.40.0".to_owned()))
        );
        assert_eq!(ours.type_url, Kind::Cluster.type_url());
        assert_eq!(
            (ours.subscribe, ours.unsubscribe),
            (vec!["a".to_owned()], vec!["b".to_owned()])
        );
        assert_eq!(ours.held.get("c").map(String::as_str), Some("1"));
        assert_eq!(
            (&*ours.nonce, &*ours.error.expect("an error").message),
            ("7", "no")
        );
    }

    #[test]
    fn a_response_is_written_as_envoy_reads_it() {
        let push = Push {
            kind: Kind::Endpoints,
            nonce: 26,
            resources: vec![Arc::new(crate::xds::Resource {
                name: "a".into(),
                version: 255,
                body: Bytes::from_static(b"body"),
                source: None,
            })],
            removed: vec!["b".into()],
        };
        let bytes = Response::of(&push).encode_to_vec();
        let theirs = DeltaDiscoveryResponse::decode(bytes.as_slice()).expect("readable");
        assert_eq!(theirs.type_url, Kind::Endpoints.type_url());
        assert_eq!(
            (&*theirs.nonce, theirs.removed_resources),
            ("1a", vec!["b".to_owned()])
        );
        let resource = &theirs.resources[0];
        assert_eq!(
            (&*resource.name, &*resource.version),
            ("a", "00000000000000ff")
        );
        let any = resource.resource.as_ref().expect("a body");
        assert_eq!(
            (&*any.type_url, &*any.value),
            (Kind::Endpoints.type_url(), &b"body"[..])
        );
    }
}
