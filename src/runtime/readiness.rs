//! Whether the process is ready: when every named gate is open, and until it is told to stop.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Whether every gate is open. Clones share the gates.
#[derive(Clone)]
pub struct Readiness {
    shut: Arc<Mutex<Vec<&'static str>>>,
    stop: CancellationToken,
}

/// One thing that must have happened. Dropped without being [opened](Gate::open) it stays shut for good, so that a task
/// that died on its way makes nothing ready.
#[derive(Debug)]
#[must_use = "a gate that nobody opens keeps the process unready"]
pub struct Gate {
    name: &'static str,
    readiness: Readiness,
}

/// What `/readyz` answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Every gate is open.
    Ready,
    /// These gates are still shut.
    Waiting(Vec<&'static str>),
    /// The process was told to stop.
    Stopping,
}

impl Readiness {
    /// Ready at once, unless gates are added; never again after `stop`.
    pub fn new(stop: CancellationToken) -> Self {
        Self {
            shut: Arc::default(),
            stop,
        }
    }

    /// Adds a gate. `name` is what `/readyz` and the log call it.
    pub fn gate(&self, name: &'static str) -> Gate {
        self.lock().push(name);
        Gate {
            name,
            readiness: self.clone(),
        }
    }

    /// The state of now.
    pub fn state(&self) -> State {
        if self.stop.is_cancelled() {
            return State::Stopping;
        }
        let shut = self.lock();
        if shut.is_empty() {
            State::Ready
        } else {
            State::Waiting(shut.clone())
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<&'static str>> {
        // A list of names is whole after every statement in here.
        self.shut.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate {
    /// Says that it has happened. It does not unhappen.
    pub fn open(self) {
        let left = {
            let mut shut = self.readiness.lock();
            if let Some(place) = shut.iter().position(|name| *name == self.name) {
                shut.remove(place);
            }
            shut.clone()
        };
        if left.is_empty() {
            tracing::info!(gate = self.name, "ready");
        } else {
            tracing::info!(
                gate = self.name,
                left = left.len(),
                waiting_for = %left.join(", "),
                "one step closer to ready"
            );
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready"),
            Self::Waiting(shut) => write!(f, "not ready: waiting for {}", shut.join(", ")),
            Self::Stopping => f.write_str("not ready: stopping"),
        }
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Readiness").field(&self.state()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_means_that_every_gate_was_opened() {
        let readiness = Readiness::new(CancellationToken::new());
        assert_eq!(readiness.state(), State::Ready);
        let (journal, webhook) = (readiness.gate("journal"), readiness.gate("webhook"));
        assert_eq!(
            readiness.state().to_string(),
            "not ready: waiting for journal, webhook"
        );
        journal.open();
        assert_eq!(readiness.state(), State::Waiting(vec!["webhook"]));
        webhook.open();
        assert_eq!(readiness.state(), State::Ready);
    }

    #[test]
    fn a_gate_that_is_dropped_stays_shut() {
        let readiness = Readiness::new(CancellationToken::new());
        drop(readiness.gate("journal"));
        assert_eq!(readiness.state(), State::Waiting(vec!["journal"]));
    }

    #[test]
    fn a_process_that_stops_is_not_ready() {
        let stop = CancellationToken::new();
        let readiness = Readiness::new(stop.clone());
        stop.cancel();
        assert_eq!(readiness.state(), State::Stopping);
    }
}
