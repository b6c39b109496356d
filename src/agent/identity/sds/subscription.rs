//! One stream's subscription, for both protocols: what Envoy wants, what it was told, what it said to that.
//!
//! request -> [`Subscription::hear`] -> [`Heard`]; versions as they are now -> [`Subscription::tell`] -> what to send

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
};

/// The two secrets, by the names that Istio's configurations use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SecretName {
    /// `default`: certificate chain and private key.
    Default,
    /// `ROOTCA`: the trusted roots.
    RootCa,
}

impl SecretName {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Default, Self::RootCa];

    /// As it goes over the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::RootCa => "ROOTCA",
        }
    }

    fn read(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.as_str() == name)
    }
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A hash of what a secret says publicly: the chain, or the roots. The same content has the same version in every
/// process, so nobody is confused by an agent that started again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A request, in neither protocol's words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    /// State of the world: every name that is wanted now.
    pub(super) whole: Option<&'a [String]>,
    /// Delta: names that are wanted from now on.
    pub(super) subscribe: &'a [String],
    /// Delta: names that are wanted no more.
    pub(super) unsubscribe: &'a [String],
    /// Of the answer that this is about; empty in a stream's first request, whatever version that names.
    pub(super) nonce: &'a str,
    /// Why the answer was refused.
    pub(super) error: Option<&'a str>,
}

/// What a request meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Names, some of which nobody knows.
    Asked { unknown: Vec<String> },
    /// It holds these now.
    Acknowledged(Vec<(SecretName, Version)>),
    /// It refused these, and says why.
    Refused(Vec<(SecretName, Version)>, String),
    /// About an answer that was never sent, or one before an answer that it has spoken about.
    Late,
}

/// What to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) nonce: u64,
    pub(super) secrets: Vec<(SecretName, Version)>,
}

/// The state of one stream.
#[derive(Debug, Default)]
pub(super) struct Subscription {
    wanted: BTreeSet<SecretName>,
    /// Asked for by name: an answer is owed, whatever was sent before.
    owed: BTreeSet<SecretName>,
    sent: BTreeMap<SecretName, Version>,
    refused: BTreeSet<(SecretName, Version)>,
    /// Sent, and not spoken about yet.
    open: VecDeque<Told>,
    nonce: u64,
}

impl Subscription {
    /// Takes a request in.
    pub(super) fn hear(&mut self, asked: &Asked<'_>) -> Heard {
        let verdict = match asked.nonce {
            "" => None,
            // A new stream that goes on with an old stream's nonce asks like any other.
            _ if self.nonce == 0 => None,
            nonce => match self.close(nonce) {
                Some(told) => Some(told),
                None => return Heard::Late,
            },
        };
        let unknown = self.want(asked, verdict.is_none());
        match (verdict, asked.error) {
            (None, _) => Heard::Asked { unknown },
            (Some(told), None) => Heard::Acknowledged(told.secrets),
            (Some(told), Some(why)) => {
                self.refused.extend(&told.secrets);
                Heard::Refused(told.secrets, why.to_owned())
            }
        }
    }

    /// What must be sent, as the secrets are now: what is owed or differs from what was sent, but never a version that
    /// was refused.
    pub(super) fn tell(&mut self, now: &[(SecretName, Version)]) -> Option<Told> {
        let due = now.iter().filter(|(name, version)| {
            self.wanted.contains(name)
                && !self.refused.contains(&(*name, *version))
                && (self.owed.contains(name) || self.sent.get(name) != Some(version))
        });
        let secrets: Vec<_> = due.copied().collect();
        if secrets.is_empty() {
            return None;
        }
        for (name, version) in &secrets {
            self.owed.remove(name);
            self.sent.insert(*name, *version);
        }
        self.nonce += 1;
        let told = Told {
            nonce: self.nonce,
            secrets,
        };
        self.open.push_back(told.clone());
        // Envoy speaks about every answer; whoever does not is not remembered for ever.
        if self.open.len() > MAX_OPEN {
            self.open.pop_front();
        }
        Some(told)
    }

    /// The answer that a nonce is about; those before it are settled too.
    fn close(&mut self, nonce: &str) -> Option<Told> {
        let nonce = nonce.parse::<u64>().ok()?;
        let at = self.open.iter().position(|told| told.nonce == nonce)?;
        self.open.drain(..=at).next_back()
    }

    fn want(&mut self, asked: &Asked<'_>, first: bool) -> Vec<String> {
        let names = asked.whole.unwrap_or(asked.subscribe);
        let (known, unknown): (Vec<_>, Vec<_>) = names
            .iter()
            .map(|name| SecretName::read(name).ok_or_else(|| name.clone()))
            .partition(Result::is_ok);
        let known: BTreeSet<_> = known.into_iter().flatten().collect();
        // An ACK of the state of the world repeats the names; only new ones are owed then. Delta names what is new.
        let repeats = asked.whole.is_some() && !first;
        let owed = known
            .iter()
            .filter(|name| !repeats || !self.wanted.contains(name));
        self.owed.extend(owed);
        match asked.whole {
            Some(_) => self.wanted = known,
            None => self.wanted.extend(known),
        }
        for name in asked.unsubscribe.iter().filter_map(|n| SecretName::read(n)) {
            self.wanted.remove(&name);
            self.sent.remove(&name);
        }
        self.owed.retain(|name| self.wanted.contains(name));
        unknown.into_iter().filter_map(Result::err).collect()
    }
}

const MAX_OPEN: usize = 64;

#[cfg(test)]
mod tests {
    use super::{Heard as H, SecretName::*, *};

    #[test]
    fn a_first_request_is_answered_whatever_version_it_names() {
        for protocol in [whole, delta] {
            let mut stream = Subscription::default();
            assert_eq!(ask(&mut stream, protocol, &["default"]), known());
            let told = stream.tell(&now(1, 1)).expect("an answer");
            assert_eq!(told.secrets, [(Default, Version(1))]);
            assert_eq!(stream.tell(&now(1, 1)), None);
        }
    }

    #[test]
    fn after_an_agent_restart_the_same_content_is_sent_once_more() {
        // The new agent's stream begins where the old one's ended: Envoy names its version, and no nonce.
        let mut stream = Subscription::default();
        ask(&mut stream, whole, &["ROOTCA"]);
        assert!(stream.tell(&now(7, 7)).is_some());
    }

    #[test]
    fn nothing_is_said_before_there_is_an_identity() {
        let mut stream = Subscription::default();
        ask(&mut stream, whole, &["default"]);
        assert_eq!(stream.tell(&[]), None);
        assert!(stream.tell(&now(1, 1)).is_some());
    }

    #[test]
    fn an_ack_is_not_answered_and_a_new_version_is_pushed_unasked() {
        for protocol in [whole, delta] {
            let mut stream = Subscription::default();
            ask(&mut stream, protocol, &["default"]);
            stream.tell(&now(1, 1));
            let names: &[&str] = if protocol(&[]).whole.is_some() {
                &["default"]
            } else {
                &[]
            };
            let names = owned(names);
            let heard = stream.hear(&Asked {
                nonce: "1",
                ..protocol(&names)
            });
            assert_eq!(heard, H::Acknowledged(vec![(Default, Version(1))]));
            assert_eq!(stream.tell(&now(1, 1)), None);
            assert_eq!(stream.tell(&now(1, 2)), None, "only the roots changed");
            let told = stream.tell(&now(2, 2)).expect("a push");
            assert_eq!((told.nonce, told.secrets), (2, vec![(Default, Version(2))]));
        }
    }

    #[test]
    fn a_refused_version_is_never_sent_again_and_the_next_one_is() {
        let names = owned(&["default"]);
        for protocol in [whole, delta] {
            let mut stream = Subscription::default();
            stream.hear(&protocol(&names));
            stream.tell(&now(1, 1));
            let heard = stream.hear(&Asked {
                nonce: "1",
                error: Some("key does not match"),
                ..whole(&names)
            });
            assert_eq!(
                heard,
                H::Refused(vec![(Default, Version(1))], "key does not match".into())
            );
            assert_eq!(stream.tell(&now(1, 1)), None);
            // not even when it is asked for by name
            stream.hear(&protocol(&names));
            assert_eq!(stream.tell(&now(1, 1)), None);
            assert!(stream.tell(&now(2, 1)).is_some());
        }
    }

    #[test]
    fn words_about_an_answer_that_was_overtaken_or_never_sent_change_nothing() {
        let names = owned(&["default"]);
        let mut stream = Subscription::default();
        stream.hear(&whole(&names));
        stream.tell(&now(1, 1));
        stream.tell(&now(2, 1));
        let about = |stream: &mut Subscription, nonce| {
            stream.hear(&Asked {
                nonce,
                ..whole(&names)
            })
        };
        assert_eq!(about(&mut stream, "9"), H::Late);
        assert_eq!(about(&mut stream, "nonsense"), H::Late);
        assert_eq!(
            about(&mut stream, "2"),
            H::Acknowledged(vec![(Default, Version(2))])
        );
        assert_eq!(about(&mut stream, "1"), H::Late);
        assert_eq!(stream.tell(&now(2, 1)), None);
    }

    #[test]
    fn an_unknown_name_is_told_and_waited_for_without_an_answer() {
        for protocol in [whole, delta] {
            let mut stream = Subscription::default();
            let unknown = vec!["kubernetes://web".to_owned()];
            assert_eq!(
                ask(&mut stream, protocol, &["kubernetes://web"]),
                H::Asked { unknown }
            );
            assert_eq!(stream.tell(&now(1, 1)), None);
        }
    }

    #[test]
    fn both_names_in_one_stream_come_together_and_then_each_when_it_changes() {
        let mut stream = Subscription::default();
        ask(&mut stream, whole, &["default", "ROOTCA"]);
        assert_eq!(stream.tell(&now(1, 1)).expect("both").secrets.len(), 2);
        let told = stream.tell(&now(1, 2)).expect("the roots");
        assert_eq!(told.secrets, [(RootCa, Version(2))]);
    }

    #[test]
    fn a_name_that_comes_with_an_ack_is_owed_and_one_that_went_is_not() {
        let mut stream = Subscription::default();
        ask(&mut stream, whole, &["default"]);
        stream.tell(&now(1, 1));
        let names = owned(&["ROOTCA"]);
        stream.hear(&Asked {
            nonce: "1",
            ..whole(&names)
        });
        let told = stream.tell(&now(2, 1)).expect("the roots");
        assert_eq!(told.secrets, [(RootCa, Version(1))]);

        let mut stream = Subscription::default();
        ask(&mut stream, delta, &["default", "ROOTCA"]);
        stream.tell(&now(1, 1));
        stream.hear(&Asked {
            unsubscribe: &owned(&["default"]),
            ..delta(&[])
        });
        assert_eq!(stream.tell(&now(2, 1)), None);
    }

    #[test]
    fn a_peer_that_never_speaks_costs_no_memory() {
        let mut stream = Subscription::default();
        ask(&mut stream, whole, &["default"]);
        for version in 0..10_000 {
            stream.tell(&now(version, 1));
        }
        assert!(stream.open.len() <= MAX_OPEN);
    }

    fn whole(names: &[String]) -> Asked<'_> {
        Asked {
            whole: Some(names),
            ..delta(&[])
        }
    }

    fn delta(names: &[String]) -> Asked<'_> {
        Asked {
            whole: None,
            subscribe: names,
            unsubscribe: &[],
            nonce: "",
            error: None,
        }
    }

    fn ask(stream: &mut Subscription, of: fn(&[String]) -> Asked<'_>, names: &[&str]) -> Heard {
        stream.hear(&of(&owned(names)))
    }

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn known() -> Heard {
        H::Asked {
            unknown: Vec::new(),
        }
    }

    fn now(default: u64, roots: u64) -> [(SecretName, Version); 2] {
        [(Default, Version(default)), (RootCa, Version(roots))]
    }
}
