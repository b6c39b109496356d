//! Rotation as a function: journal + instant -> the one next write. Whoever has the key generator and the home does it.

use std::time::Duration;

use crate::ca::LeafPolicy;

/// How long the authority's own certificates live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RotationPolicy {
    /// A root's life: 5 years.
    pub root_life: Duration,
    /// An intermediate's life: 30 days.
    pub intermediate_life: Duration,
    /// Bounds on a leaf's life.
    pub leaf: LeafPolicy,
}

impl RotationPolicy {
    /// Whether the lifetimes fit into each other.
    pub fn check(&self) -> Result<(), PolicyError> {
        Ok(())
    }
}

impl Default for RotationPolicy {
    fn default() -> Self {
        const HOUR: u64 = 3600;
        Self {
            root_life: Duration::from_secs(5 * 365 * 24 * HOUR),
            intermediate_life: Duration::from_secs(30 * 24 * HOUR),
            leaf: LeafPolicy {
                default: Duration::from_secs(24 * HOUR),
                min: Duration::from_secs(5 * 60),
                max: Duration::from_secs(7 * 24 * HOUR),
            },
        }
    }
}

/// Why lifetimes do not fit into each other.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PolicyError {}
