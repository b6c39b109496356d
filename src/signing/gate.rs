//! Whether this process may sign at all.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use arc_swap::ArcSwapOption;

/// A door that others close: the shutdown for good, whoever watches the clock or the journal until it is well again.
/// Clones are the same door.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<State>);

#[derive(Debug, Default)]
struct State {
    draining: AtomicBool,
    fault: ArcSwapOption<Fault>,
}

/// Why nothing is signed now.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Fault {
    /// The process is about to end.
    #[error("this replica is shutting down; try again")]
    Draining,
    /// The clock cannot be believed.
    #[error("{0}; nothing is signed until the clock is right again")]
    ClockJump(String),
    /// The journal was not readable for too long.
    #[error("{0}; nothing is signed until the CA journal can be read again")]
    JournalStale(String),
}

impl Fault {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Draining => "Draining",
            Self::ClockJump(_) => "ClockJump",
            Self::JournalStale(_) => "JournalStale",
        }
    }
}

impl Gate {
    /// Signs nothing any more, for good.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::Relaxed);
    }

    /// Signs nothing while there is a fault; `None` opens again.
    pub fn set(&self, fault: Option<Fault>) {
        self.0.fault.store(fault.map(Arc::new));
    }

    /// # Errors
    /// Why nothing is signed.
    pub fn check(&self) -> Result<(), Fault> {
        if self.0.draining.load(Ordering::Relaxed) {
            return Err(Fault::Draining);
        }
        self.0
            .fault
            .load()
            .as_deref()
            .map_or(Ok(()), |fault| Err(fault.clone()))
    }
}
