//! The pod's side of the mesh: what `malha-agent` does as PID 1 of the sidecar.

pub mod identity;
