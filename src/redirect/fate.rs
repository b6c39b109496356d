//! What the kernel does with a connection under a rule set, told without a kernel.

use std::net::IpAddr;

use super::rules::{Act, Family, Match, OUTPUT, PREROUTING, RuleSet, Side};

/// The first packet of a connection, as a chain sees it.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// Where it is.
    pub place: Place<'a>,
    /// Whether it is TCP.
    pub tcp: bool,
    /// The sender's address.
    pub source: IpAddr,
    /// The receiver's address.
    pub destination: IpAddr,
    /// The receiver's port.
    pub port: u16,
}

/// Where a packet is, and what the kernel knows of it there.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// It came in by an interface.
    Entering(&'a str),
    /// A process sends it.
    Leaving {
        /// By this interface.
        interface: &'a str,
        /// The process' user.
        uid: u32,
        /// The process' group.
        gid: u32,
    },
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes where it wanted to.
    Untouched,
    /// It comes to this port of the pod.
    Redirected(u16),
}

impl RuleSet {
    /// What the kernel does with a connection under these rules.
    pub fn fate(&self, connection: &Connection<'_>) -> Fate {
        self.follow(
            match connection.place {
                Place::Entering(_) => PREROUTING,
                Place::Leaving { .. } => OUTPUT,
            },
            connection,
        )
    }

    fn follow(&self, name: &str, connection: &Connection<'_>) -> Fate {
        let chain = self.chains.iter().find(|chain| chain.name == name);
        let mut rules = chain.into_iter().flat_map(|chain| &chain.rules);
        let act = rules
            .find(|rule| rule.matches.iter().all(|matched| matched.holds(connection)))
            .map(|rule| rule.act);
        match act {
            None | Some(Act::Return) => Fate::Untouched,
            // The chains form no ring: only `inbound` is gone to, and it goes nowhere.
            Some(Act::Goto(next)) => self.follow(next, connection),
            Some(Act::Redirect(port)) => Fate::Redirected(port),
        }
    }
}

impl Match {
    fn holds(&self, connection: &Connection<'_>) -> bool {
        match (self, connection.place) {
            (Self::NotTcp, _) => !connection.tcp,
            (Self::Tcp, _) => connection.tcp,
            (Self::Family(family), _) => Family::of(connection.destination) == *family,
            (Self::In(name), Place::Entering(interface))
            | (Self::Out(name), Place::Leaving { interface, .. }) => name.as_str() == interface,
            (Self::OutLoopback, Place::Leaving { interface, .. }) => interface == "lo",
            (Self::Group(group), Place::Leaving { gid, .. }) => *group == gid,
            (Self::User(user), Place::Leaving { uid, .. }) => *user == uid,
            (
                Self::Address {
                    side,
                    range,
                    within,
                },
                _,
            ) => {
                let address = match side {
                    Side::Source => connection.source,
                    Side::Destination => connection.destination,
                };
                Family::of(address) == Family::of(range.network())
                    && range.contains(address) == *within
            }
            (Self::Port(range), _) => range.contains(connection.port),
            // What the kernel does not know at a place equals nothing there.
            _ => false,
        }
    }
}
