//! Who is at the other end, and whether it may be told what it asks for.
//!
//! certificate -> identity; `node.id` -> pod -> the account that the world knows it by; both must be the same

use std::sync::Arc;

use jiff::Timestamp;
use tokio::time::timeout;
use tonic::Status;

use super::{Hub, wire::Node};
use crate::{ca::svid::Svid, identity::SpiffeId, mesh::ObjectName, tls::Peer};

/// A client that is who it says.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) proxy: ObjectName,
    pub(super) identity: SpiffeId,
    pub(super) certificate_ends: Timestamp,
}

/// Why a client is told nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stranger {
    #[error(
        "configuration is only told to who shows a certificate of the mesh, and this client showed none"
    )]
    NoCertificate,
    #[error("{0}")]
    BadCertificate(String),
    #[error("the first request names no node; set node.id to <pod>.<namespace>")]
    NoNode,
    #[error("node.id {0:?} is not <pod>.<namespace>")]
    BadNode(String),
    #[error("this replica does not know the mesh yet; try again")]
    NotReady,
    #[error("pod {0} is not known (yet); try again")]
    UnknownPod(ObjectName),
    #[error("pod {pod} runs as {wanted}, and this client's certificate is for {shown}")]
    OtherIdentity {
        pod: ObjectName,
        wanted: String,
        shown: String,
    },
    #[error("pod {0} has too many streams open; is its proxy connecting in a loop?")]
    TooManyStreams(ObjectName),
}

impl Stranger {
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::NoCertificate => "NoCertificate",
            Self::BadCertificate(_) => "BadCertificate",
            Self::NoNode | Self::BadNode(_) => "BadNode",
            Self::NotReady => "NotReady",
            Self::UnknownPod(_) => "UnknownPod",
            Self::OtherIdentity { .. } => "OtherIdentity",
            Self::TooManyStreams(_) => "TooManyStreams",
        }
    }
}

impl From<Stranger> for Status {
    fn from(stranger: Stranger) -> Self {
        let text = stranger.to_string();
        match stranger {
            Stranger::NoCertificate | Stranger::BadCertificate(_) => Self::unauthenticated(text),
            Stranger::NoNode | Stranger::BadNode(_) => Self::invalid_argument(text),
            Stranger::NotReady | Stranger::UnknownPod(_) => Self::unavailable(text),
            Stranger::OtherIdentity { .. } => Self::permission_denied(text),
            Stranger::TooManyStreams(_) => Self::resource_exhausted(text),
        }
    }
}

/// The identity that a peer proved, and until when.
pub(super) fn proven(peer: Option<&Peer>) -> Result<(SpiffeId, Timestamp), Stranger> {
    let leaf = peer.and_then(|peer| peer.certificates.first());
    let leaf = leaf.ok_or(Stranger::NoCertificate)?;
    match Svid::parse(leaf) {
        Ok(svid) => Ok((svid.id, svid.validity.not_after)),
        Err(error) => Err(Stranger::BadCertificate(error.to_string())),
    }
}

/// The pod that a node says it is: a pod's name may hold dots, a namespace's may not.
pub(super) fn pod_of(node: Option<&Node>) -> Result<ObjectName, Stranger> {
    let id = &node.ok_or(Stranger::NoNode)?.id;
    match id.rsplit_once('.') {
        Some((pod, namespace)) if !pod.is_empty() && !namespace.is_empty() && id.len() <= 317 => {
            Ok(ObjectName::new(namespace, pod))
        }
        _ if id.is_empty() => Err(Stranger::NoNode),
        _ => Err(Stranger::BadNode(id.chars().take(317).collect())),
    }
}

impl Hub {
    /// Whether the client is who it says; waits a while for a pod that the world has not told of yet, which is the rule
    /// and not the exception for a pod that just started.
    pub(super) async fn recognise(
        self: &Arc<Self>,
        peer: Option<&Peer>,
        node: Option<&Node>,
    ) -> Result<Caller, Stranger> {
        let (identity, certificate_ends) = proven(peer)?;
        let proxy = pod_of(node)?;
        let known = timeout(self.limits.unknown, self.until_known(&proxy)).await;
        if known.is_err() {
            return Err(match *self.whole.borrow() {
                true => Stranger::UnknownPod(proxy),
                false => Stranger::NotReady,
            });
        }
        self.check(&proxy, &identity)?;
        Ok(Caller {
            proxy,
            identity,
            certificate_ends,
        })
    }

    /// Whether a pod runs as who its proxy proved to be. One that is no more was it.
    pub(super) fn check(&self, pod: &ObjectName, shown: &SpiffeId) -> Result<(), Stranger> {
        let catalogue = self.catalogue();
        let Some(workload) = catalogue.world().workloads.get(pod) else {
            return Ok(());
        };
        let trust_domain = &catalogue.settings().trust_domain;
        let wanted = SpiffeId::new(trust_domain, &pod.namespace, &workload.account);
        match wanted {
            Ok(wanted) if wanted == *shown => Ok(()),
            wanted => Err(Stranger::OtherIdentity {
                pod: pod.clone(),
                wanted: wanted.map_or_else(|error| error.to_string(), |id| id.to_string()),
                shown: shown.to_string(),
            }),
        }
    }

    async fn until_known(&self, pod: &ObjectName) {
        let mut whole = self.whole.subscribe();
        let mut changed = self.changed.subscribe();
        // both live as long as we do
        let _ = whole.wait_for(|whole| *whole).await;
        while !self.catalogue().world().workloads.contains_key(pod) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_a_pod_of_a_namespace() {
        let node = |id: &str| {
            let mut node = Node::default();
            id.clone_into(&mut node.id);
            node
        };
        for (id, want) in [
            ("web.shop", Some(("shop", "web"))),
            ("web.v1.shop", Some(("shop", "web.v1"))),
            ("web", None),
            (".shop", None),
            ("web.", None),
            ("", None),
        ] {
            let pod = pod_of(Some(&node(id))).ok();
            assert_eq!(
                pod,
                want.map(|(namespace, pod)| ObjectName::new(namespace, pod)),
                "{id}"
            );
        }
        assert!(matches!(pod_of(None), Err(Stranger::NoNode)));
    }

    #[test]
    fn who_shows_no_certificate_is_told_so() {
        let peer = Peer {
            address: ([127, 0, 0, 1], 1).into(),
            certificates: Arc::new([]),
        };
        for peer in [None, Some(&peer)] {
            let status = Status::from(proven(peer).expect_err("nothing was shown"));
            assert_eq!(status.code(), tonic::Code::Unauthenticated);
        }
        let peer = Peer {
            certificates: Arc::new([b"nonsense".to_vec().into()]),
            ..peer
        };
        assert!(matches!(
            proven(Some(&peer)),
            Err(Stranger::BadCertificate(_))
        ));
    }
}
