//! What kinds of certificates there are, field by field.

use crate::identity::SpiffeId;

/// A leaf's kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// A workload's SVID: exactly one URI SAN.
    Workload(SpiffeId),
    /// What we serve on the CA and xDS port: a URI and DNS names.
    ControlPlane {
        /// Our own identity.
        id: SpiffeId,
        /// DNS names that callers dial.
        dns_names: Vec<String>,
    },
    /// What we serve to the API server: DNS names only.
    Webhook {
        /// `malha.malha-system.svc`, or the standalone's host names.
        dns_names: Vec<String>,
    },
}
