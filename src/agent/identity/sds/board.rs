//! What Envoy holds, over all of its streams.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::{SecretName, Version};

/// Where streams write down what Envoy said; readiness and the push read it.
#[derive(Clone, Debug)]
pub struct Board {
    seats: Arc<Mutex<Seats>>,
    tell: watch::Sender<Holding>,
}

/// What Envoy holds now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    taken: BTreeSet<SecretName>,
    held: BTreeMap<SecretName, Version>,
    refused: BTreeMap<SecretName, (Version, String)>,
}

impl Holding {
    /// Whether Envoy has taken both secrets, whichever versions.
    pub fn is_complete(&self) -> bool {
        self.taken.len() == SecretName::ALL.len()
    }

    /// The version that every stream of a secret has acknowledged; none while they differ, or there is none.
    pub fn version(&self, name: SecretName) -> Option<Version> {
        self.held.get(&name).copied()
    }

    /// Why that version was refused, where one stream refused it.
    pub fn refusal(&self, name: SecretName, version: Version) -> Option<&str> {
        let (refused, why) = self.refused.get(&name)?;
        (*refused == version).then_some(why)
    }
}

#[derive(Debug, Default)]
struct Seats {
    next: u64,
    held: BTreeMap<(SecretName, u64), Version>,
    refused: BTreeMap<(SecretName, u64), (Version, String)>,
}

/// One stream's place; given up when the stream ends.
#[derive(Debug)]
pub(super) struct Seat {
    number: u64,
    board: Board,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            seats: Arc::default(),
            tell: watch::channel(Holding::default()).0,
        }
    }
}

impl Board {
    /// What Envoy holds, now and from now on.
    pub fn watch(&self) -> watch::Receiver<Holding> {
        self.tell.subscribe()
    }

    pub(super) fn take_seat(&self) -> Seat {
        let mut seats = self.lock();
        seats.next += 1;
        Seat {
            number: seats.next,
            board: self.clone(),
        }
    }

    fn change(&self, change: impl FnOnce(&mut Seats)) {
        let mut seats = self.lock();
        change(&mut seats);
        let holding = seats.sum();
        self.tell.send_if_modified(|told| {
            let differs = *told != holding;
            *told = holding;
            differs
        });
    }

    fn lock(&self) -> MutexGuard<'_, Seats> {
        // What is under it is whole after every line.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    pub(super) fn holds(&self, name: SecretName, version: Version) {
        self.board.change(|seats| {
            seats.held.insert((name, self.number), version);
            seats.refused.remove(&(name, self.number));
        });
    }

    pub(super) fn refuses(&self, name: SecretName, version: Version, why: &str) {
        let why = (version, why.to_owned());
        self.board.change(|seats| {
            seats.refused.insert((name, self.number), why);
        });
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.board.change(|seats| {
            seats.held.retain(|(_, seat), _| *seat != self.number);
            seats.refused.retain(|(_, seat), _| *seat != self.number);
        });
    }
}

impl Seats {
    fn sum(&self) -> Holding {
        let mut holding = Holding::default();
        for name in SecretName::ALL {
            let mut versions = self.held.iter().filter(|((of, _), _)| *of == name);
            if let Some((_, first)) = versions.next() {
                holding.taken.insert(name);
                // In the middle of a rotation one stream is ahead of another.
                if versions.all(|(_, version)| version == first) {
                    holding.held.insert(name, *first);
                }
            }
            let mut refused = self.refused.iter().filter(|((of, _), _)| *of == name);
            if let Some((_, last)) = refused.next_back() {
                holding.refused.insert(name, last.clone());
            }
        }
        holding
    }
}

#[cfg(test)]
mod tests {
    use super::{SecretName::*, *};

    #[test]
    fn both_secrets_are_held_when_each_was_acknowledged_and_none_when_envoy_is_gone() {
        let board = Board::default();
        let holding = board.watch();
        let (certificate, roots) = (board.take_seat(), board.take_seat());
        certificate.holds(Default, Version(1));
        assert!(!holding.borrow().is_complete());
        roots.holds(RootCa, Version(2));
        assert!(holding.borrow().is_complete());
        drop((certificate, roots));
        assert_eq!(*holding.borrow(), Holding::default());
    }

    #[test]
    fn a_version_is_held_when_every_stream_holds_it() {
        let board = Board::default();
        let holding = board.watch();
        let (server, client) = (board.take_seat(), board.take_seat());
        server.holds(RootCa, Version(1));
        client.holds(RootCa, Version(1));
        server.holds(RootCa, Version(2));
        assert_eq!(holding.borrow().version(RootCa), None);
        server.holds(Default, Version(1));
        assert!(
            holding.borrow().is_complete(),
            "a rotation is no reason to be not ready"
        );
        client.holds(RootCa, Version(2));
        assert_eq!(holding.borrow().version(RootCa), Some(Version(2)));
    }

    #[test]
    fn a_refusal_stands_until_that_stream_takes_something_else() {
        let board = Board::default();
        let holding = board.watch();
        let seat = board.take_seat();
        seat.holds(RootCa, Version(1));
        seat.refuses(RootCa, Version(2), "no certificate in it");
        let why = holding
            .borrow()
            .refusal(RootCa, Version(2))
            .map(str::to_owned);
        assert_eq!(why.as_deref(), Some("no certificate in it"));
        assert_eq!(holding.borrow().version(RootCa), Some(Version(1)));
        seat.holds(RootCa, Version(3));
        assert_eq!(holding.borrow().refusal(RootCa, Version(2)), None);
    }
}
