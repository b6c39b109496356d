//! Selection by labels: the table, and the selectors generated from it.

/// Which of the four disjoint webhook entries called; its path says which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Entry {
    /// `istio-injection=enabled` on the namespace (`/inject/ns`).
    Namespace,
    /// `sidecar.istio.io/inject=true` on the pod alone (`/inject/pod`).
    Pod,
    /// `istio.io/rev=<ours>` on the namespace (`/inject/rev/<r>/ns`).
    RevisionNamespace,
    /// `istio.io/rev=<ours>` on the pod alone (`/inject/rev/<r>/pod`).
    RevisionPod,
}
