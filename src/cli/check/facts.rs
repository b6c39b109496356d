//! What a check looks at, as data.

use std::collections::BTreeMap;

use jiff::SignedDuration;
use serde_json::Value;

use super::{admission::Tried, issuance::Issuance};
use crate::{ca::bundle::Bundle, inject::NamespaceFacts};

/// Something that was looked at, or why it could not be.
pub(super) type Looked<T> = Result<T, String>;

/// All that was looked at.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// Minor version of the API server (major version 1).
    pub(super) minor: Looked<u32>,
    /// How far the API server's clock is ahead of this machine's.
    pub(super) skew: Looked<SignedDuration>,
    /// Every MutatingWebhookConfiguration.
    pub(super) mutating: Looked<Vec<Value>>,
    /// Every CustomResourceDefinition that has the name of one of ours.
    pub(super) crds: Looked<Vec<Value>>,
    /// What is looked at before the install.
    pub(super) rights: Option<Looked<Vec<String>>>,
    /// What is looked at after it.
    pub(super) installed: Option<Looked<Option<Installed>>>,
}

/// What is looked at where the control plane's namespace is there.
#[derive(Clone, Debug)]
pub(super) struct Installed {
    /// Deployment `malha`.
    pub(super) deployment: Looked<Option<Value>>,
    /// Pods of the control plane.
    pub(super) pods: Looked<Vec<Value>>,
    /// The namespaces that are not going away.
    pub(super) namespaces: Looked<Vec<NamespaceFacts>>,
    /// ConfigMap `malha-ca-root-cert` of each namespace that has one: its PEM text.
    pub(super) trusted: Looked<BTreeMap<String, String>>,
    /// What the authority's journal says is trusted; `None` where there is no journal.
    pub(super) bundle: Looked<Option<Bundle>>,
    /// Of the objects that bring pods to the injector or refuse them without it, those that are there.
    pub(super) guards: Looked<Vec<Value>>,
    /// A pod in a dry run.
    pub(super) tried: Looked<Tried>,
    /// A certificate that was asked for, where there is an authority.
    pub(super) issued: Looked<Issuance>,
}
