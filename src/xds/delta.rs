//! What one stream of delta xDS was told, holds, and still lacks.
//!
//! request -> [`Session::hear`] -> [`Heard`]; change -> [`Session::touch`]; [`Session::next`] -> [`Push`], or nothing to say
//!
//! Kept are names and 8-byte hashes, never bytes: what is sent is looked up when it is sent, so a slow reader gets the
//! newest version once. Per type one *round* is under way: what changes meanwhile waits until every part of it is
//! answered.
//!
//! The order is Envoy's: clusters, their endpoints, listeners, routes; what goes away goes after whatever refers to it
//! is gone (listeners, routes, clusters, endpoints). The ACK of a cluster comes only after it is warm, and it is warm
//! only with its endpoints: so endpoints never wait for clusters, and every cluster that is sent is followed by its
//! endpoints, even if they are what they were.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
    num::NonZeroU64,
    sync::Arc,
};

use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use prost::Message;

use super::{Kind, Resource};
use crate::mesh::{ObjectName, ObjectRef};

#[cfg(test)]
mod tests;

impl Kind {
    /// All of them, in the order in which additions are pushed.
    pub const ALL: [Self; 5] = [
        Self::Secret,
        Self::Cluster,
        Self::Endpoints,
        Self::Listener,
        Self::Route,
    ];

    /// The kind of a `type_url`, where we serve it.
    pub fn of_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == url)
    }

    /// As metrics and answers call it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Secret => "sds",
            Self::Cluster => "cds",
            Self::Endpoints => "eds",
            Self::Listener => "lds",
            Self::Route => "rds",
        }
    }

    /// Whether a first request without names asks for everything: an old form of `*` that only these two know.
    fn is_wildcard_without_names(self) -> bool {
        matches!(self, Self::Cluster | Self::Listener)
    }

    /// Kinds whose resources may refer to one of this kind.
    fn referrers(self) -> &'static [Self] {
        match self {
            Self::Secret | Self::Listener => &[],
            Self::Route => &[Self::Listener],
            Self::Cluster => &[Self::Listener, Self::Route],
            Self::Endpoints => &[Self::Cluster, Self::Listener, Self::Route],
        }
    }
}

/// What there is for the proxy of a session.
pub trait View {
    /// One resource.
    fn find(&self, kind: Kind, name: &str) -> Option<Arc<Resource>>;
    /// Everything that it is told without asking by name.
    fn all(&self, kind: Kind) -> Vec<Arc<Resource>>;
}

/// A request of delta xDS for one type.
#[derive(Clone, Debug, Default)]
pub struct Request<'a> {
    /// Names asked for from now on; `*` is everything.
    pub subscribe: Vec<&'a str>,
    /// Names not asked for any more.
    pub unsubscribe: Vec<&'a str>,
    /// What the client holds, by name, as it was told by whoever it was connected to before.
    pub held: BTreeMap<&'a str, &'a str>,
    /// The response that this answers; empty where it answers none.
    pub nonce: &'a str,
    /// Why that response is refused; `None` where it is not.
    pub error: Option<&'a str>,
}

/// What a request meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// The response that was answered, and how.
    pub answer: Option<(u64, Answer)>,
    /// Names that are watched from now on.
    pub subscribed: Vec<Arc<str>>,
    /// Names that are not watched any more.
    pub unsubscribed: Vec<Arc<str>>,
}

/// How a response was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is in effect.
    Acked,
    /// Refused; these are to blame, and are not sent again until they change.
    Refused(Vec<(Arc<str>, u64)>),
    /// Refused, and it does not tell whose fault it is: each of them is sent again by itself.
    Suspected(usize),
}

/// What to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Push {
    /// Of which kind.
    pub kind: Kind,
    /// Names the response; [`Push::nonce_text`] is what is sent.
    pub nonce: u64,
    /// New and changed resources.
    pub resources: Vec<Arc<Resource>>,
    /// Names of what is no more.
    pub removed: Vec<Arc<str>>,
}

impl Push {
    /// The nonce as it is sent.
    pub fn nonce_text(&self) -> String {
        format!("{:x}", self.nonce)
    }
}

/// How a version is written: 16 lower-case hexadecimal digits.
pub fn version_text(version: u64) -> String {
    format!("{version:016x}")
}

/// How much is sent at once.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// About how many bytes one response may have; a larger resource travels alone.
    pub bytes: usize,
    /// Whether new listeners and routes wait until the clusters that were sent are warm. Not for ever: a cluster that
    /// never gets warm must not stop everything else.
    pub wait_for_clusters: bool,
}

/// Where a session stands with one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Whether the client holds what there is.
    pub state: State,
    /// How many resources it holds.
    pub resources: usize,
    /// One that it refused, with its reason.
    pub refused: Option<(Arc<str>, Arc<str>)>,
}

/// Whether a client holds what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It does.
    Synced,
    /// Something is to be sent, or to be answered.
    Pending,
    /// It refused something that has not changed since.
    Rejected,
}

/// What became of a user's object in the proxies that are told of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Proxies in which it is in effect.
    pub acked: usize,
    /// Proxies that have not answered yet.
    pub pending: usize,
    /// Proxies that refused it, and in which words.
    pub refused: BTreeMap<ObjectName, Arc<str>>,
}

/// One stream's subscriptions.
#[derive(Debug, Default)]
pub struct Session {
    kinds: BTreeMap<Kind, Subscription>,
    last_nonce: u64,
}

/// What a stream wants and holds of one kind.
#[derive(Debug, Default)]
struct Subscription {
    /// Everything is asked for.
    wildcard: bool,
    /// By name: asked for, or held.
    entries: BTreeMap<Arc<str>, Entry>,
    /// Names to look at once the round is over.
    dirty: BTreeSet<Arc<str>>,
    /// Every name is to be looked at once the round is over.
    all_dirty: bool,
    /// Names of this round that are still to be looked at.
    round: VecDeque<Arc<str>>,
    /// Names that were refused together: each is sent by itself, to learn which one it was.
    suspects: VecDeque<Arc<str>>,
    /// Held, but no more there; told once nothing can refer to them.
    gone: BTreeSet<Arc<str>>,
    /// Responses without an answer.
    in_flight: VecDeque<Sent>,
    /// Versions that are not sent again, and why.
    refused: BTreeMap<Arc<str>, (Version, Arc<str>)>,
    /// Objects that resources were made from, where somebody wrote them.
    sources: BTreeMap<Arc<str>, ObjectRef>,
    /// The first request is to be answered, even with nothing: a client waits for its first answer before it is ready.
    owes_answer: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    held: Option<Version>,
    /// Asked for by name.
    subscribed: bool,
    /// Answered even if unchanged.
    owed: bool,
    /// It may hold what was last sent instead: that was in a response that was refused for something else.
    unsure: bool,
}

#[derive(Debug)]
struct Sent {
    nonce: u64,
    /// `None`: removed.
    names: Vec<(Arc<str>, Option<Version>)>,
}

/// A resource's version, so that none at all takes no room of its own.
type Version = NonZeroU64;

/// Holding something that nobody here ever sent.
const STRANGE: Version = Version::MAX;

fn version(number: u64) -> Version {
    Version::new(number).unwrap_or(STRANGE)
}

fn parse_version(text: &str) -> Version {
    u64::from_str_radix(text, 16)
        .ok()
        .filter(|number| version_text(*number) == text)
        .map_or(STRANGE, version)
}

impl Session {
    /// Takes a request in. `view` only lends the names, so that all sessions share them.
    pub fn hear(&mut self, kind: Kind, request: &Request<'_>, view: &impl View) -> Heard {
        let mut heard = Heard::default();
        let first = !self.kinds.contains_key(&kind);
        let subscription = self.kinds.entry(kind).or_default();
        if first {
            subscription.begin(kind, request, view);
        } else {
            heard.answer = subscription.answered(request);
        }
        let intern = |name: &str| {
            let known = view.find(kind, name);
            known.map_or_else(|| Arc::from(name), |resource| resource.name.clone())
        };
        for name in &request.subscribe {
            if let Some(name) = subscription.subscribe(name, first, intern) {
                heard.subscribed.push(name);
            }
        }
        for name in &request.unsubscribe {
            if let Some(name) = subscription.unsubscribe(name) {
                heard.unsubscribed.push(name);
            }
        }
        heard
    }

    /// One resource may have come, changed or gone; whether that is of interest here.
    pub fn touch(&mut self, kind: Kind, name: &Arc<str>) -> bool {
        let Some(subscription) = self.kinds.get_mut(&kind) else {
            return false;
        };
        let watched = subscription.wildcard
            || subscription
                .entries
                .get(name)
                .is_some_and(|entry| entry.subscribed);
        watched && subscription.dirty.insert(name.clone())
    }

    /// Everything may differ. Whether anything is asked for at all.
    pub fn touch_all(&mut self) -> bool {
        for subscription in self.kinds.values_mut() {
            subscription.all_dirty = true;
        }
        !self.kinds.is_empty()
    }

    /// What to send now; `None` until something is heard, touched, or the pace changes.
    pub fn next(&mut self, view: &impl View, pace: Pace) -> Option<Push> {
        loop {
            if let Some(push) = self.addition(view, pace) {
                return Some(push);
            }
            let returned = self.recall(view);
            let push = self.farewell();
            if push.is_some() || !returned {
                return push;
            }
        }
    }

    /// Looks again at what was gone and is back; whether there is any.
    fn recall(&mut self, view: &impl View) -> bool {
        let mut returned = false;
        for (&kind, subscription) in &mut self.kinds {
            if !subscription.in_flight.is_empty() {
                continue;
            }
            let back = |name: &Arc<str>| view.find(kind, name).is_some();
            let (back, gone) = mem::take(&mut subscription.gone)
                .into_iter()
                .partition(back);
            subscription.gone = gone;
            returned |= !back.is_empty();
            subscription.dirty.extend::<BTreeSet<_>>(back);
        }
        returned
    }

    fn addition(&mut self, view: &impl View, pace: Pace) -> Option<Push> {
        for kind in Kind::ALL {
            let waits = matches!(kind, Kind::Listener | Kind::Route) && pace.wait_for_clusters;
            if waits && self.in_flight(Kind::Cluster) {
                continue;
            }
            let Some(subscription) = self.kinds.get_mut(&kind) else {
                continue;
            };
            let (resources, removed) = subscription.news(kind, view, pace.bytes);
            if !resources.is_empty()
                || !removed.is_empty()
                || mem::take(&mut subscription.owes_answer)
            {
                return Some(self.push(kind, resources, removed));
            }
        }
        None
    }

    fn farewell(&mut self) -> Option<Push> {
        for kind in [
            Kind::Listener,
            Kind::Route,
            Kind::Cluster,
            Kind::Endpoints,
            Kind::Secret,
        ] {
            let referred = |by: &Kind| self.kinds.get(by).is_some_and(|it| !it.is_quiet());
            if kind.referrers().iter().any(referred) {
                continue;
            }
            let Some(subscription) = self.kinds.get_mut(&kind) else {
                continue;
            };
            let (resources, removed) = subscription.farewells(kind);
            if !resources.is_empty() || !removed.is_empty() {
                return Some(self.push(kind, resources, removed));
            }
        }
        None
    }

    /// Whether a response of this kind has no answer yet.
    pub fn in_flight(&self, kind: Kind) -> bool {
        let found = self.kinds.get(&kind);
        found.is_some_and(|it| !it.in_flight.is_empty())
    }

    /// Where it stands with a kind; `None` where nothing of it was ever asked for.
    pub fn status(&self, kind: Kind) -> Option<Status> {
        let subscription = self.kinds.get(&kind)?;
        let refused = subscription.refused.iter().next();
        Some(Status {
            state: match refused {
                Some(_) => State::Rejected,
                None if subscription.is_quiet() => State::Synced,
                None => State::Pending,
            },
            resources: subscription.held().count(),
            refused: refused.map(|(name, (_, text))| (name.clone(), text.clone())),
        })
    }

    /// What the client holds of a kind for certain: names and versions.
    pub fn held(&self, kind: Kind) -> impl Iterator<Item = (&Arc<str>, u64)> {
        self.kinds
            .get(&kind)
            .into_iter()
            .flat_map(Subscription::held)
    }

    /// Names that are asked for.
    pub fn subscribed(&self, kind: Kind) -> impl Iterator<Item = &Arc<str>> {
        let entries = self.kinds.get(&kind).map(|it| it.entries.iter());
        let asked = entries.into_iter().flatten();
        asked.filter_map(|(name, entry)| entry.subscribed.then_some(name))
    }

    /// The users' objects of which something was sent here, and whether it is in effect, on its way, or refused (with
    /// the reason).
    pub fn sources(&self) -> impl Iterator<Item = (&ObjectRef, State, Option<&Arc<str>>)> {
        self.kinds.values().flat_map(|subscription| {
            subscription.sources.iter().map(|(name, source)| {
                let refused = subscription.refused.get(name).map(|(_, text)| text);
                let state = match refused {
                    Some(_) => State::Rejected,
                    None if subscription.awaits(name) => State::Pending,
                    None => State::Synced,
                };
                (source, state, refused)
            })
        })
    }

    fn push(&mut self, kind: Kind, resources: Vec<Arc<Resource>>, removed: Vec<Arc<str>>) -> Push {
        self.last_nonce += 1;
        let nonce = self.last_nonce;
        let sent = resources
            .iter()
            .map(|resource| (resource.name.clone(), Some(version(resource.version))))
            .chain(removed.iter().map(|name| (name.clone(), None)));
        let sent = Sent {
            nonce,
            names: sent.collect(),
        };
        if let Some(subscription) = self.kinds.get_mut(&kind) {
            subscription.in_flight.push_back(sent);
            subscription.owes_answer = false;
        }
        if kind == Kind::Cluster {
            self.follow_with_endpoints(&resources);
        }
        Push {
            kind,
            nonce,
            resources,
            removed,
        }
    }

    /// A changed cluster stays cold until its endpoints arrive, and does not ask for them (envoyproxy/envoy#13009).
    fn follow_with_endpoints(&mut self, clusters: &[Arc<Resource>]) {
        let Some(endpoints) = self.kinds.get_mut(&Kind::Endpoints) else {
            return;
        };
        for cluster in clusters {
            if let Some(entry) = endpoints.entries.get_mut(&cluster.name)
                && entry.subscribed
            {
                entry.owed = true;
                endpoints.dirty.insert(cluster.name.clone());
            }
        }
    }
}

impl Subscription {
    fn begin(&mut self, kind: Kind, request: &Request<'_>, view: &impl View) {
        self.wildcard = request.subscribe.contains(&"*")
            || (request.subscribe.is_empty() && kind.is_wildcard_without_names());
        self.all_dirty = true;
        self.owes_answer = self.wildcard && request.held.is_empty();
        let asked: BTreeSet<_> = request.subscribe.iter().copied().collect();
        for (&name, &text) in &request.held {
            if !self.wildcard && !asked.contains(name) {
                continue;
            }
            let known = view.find(kind, name);
            let name = known.map_or_else(|| Arc::from(name), |resource| resource.name.clone());
            let held = Some(parse_version(text));
            self.entries.insert(
                name,
                Entry {
                    held,
                    ..Entry::default()
                },
            );
        }
    }

    /// `first`: what the first request names and holds is answered only where it differs.
    fn subscribe(
        &mut self,
        name: &str,
        first: bool,
        intern: impl Fn(&str) -> Arc<str>,
    ) -> Option<Arc<str>> {
        if name == "*" {
            self.all_dirty |= !mem::replace(&mut self.wildcard, true);
            return None;
        }
        let name = match self.entries.get_key_value(name) {
            Some((name, _)) => name.clone(),
            None => intern(name),
        };
        let entry = self.entries.entry(name.clone()).or_default();
        entry.owed |= !first || entry.held.is_none();
        self.dirty.insert(name.clone());
        let fresh = !mem::replace(&mut entry.subscribed, true);
        fresh.then_some(name)
    }

    fn unsubscribe(&mut self, name: &str) -> Option<Arc<str>> {
        if name == "*" {
            self.wildcard = false;
            self.entries.retain(|_, entry| entry.subscribed);
            self.refused
                .retain(|name, _| self.entries.contains_key(name));
            self.gone.clear();
            return None;
        }
        let (name, _) = self.entries.get_key_value(name)?;
        let name = name.clone();
        if self.wildcard {
            // it is still told with everything else, and the client may have dropped it
            let entry = self.entries.get_mut(&name)?;
            entry.owed = true;
            self.dirty.insert(name.clone());
            return mem::take(&mut entry.subscribed).then_some(name);
        }
        self.forget(&name);
        Some(name)
    }

    fn forget(&mut self, name: &Arc<str>) {
        self.entries.remove(name);
        self.refused.remove(name);
        self.sources.remove(name);
        self.gone.remove(name);
        self.dirty.remove(name);
    }

    fn answered(&mut self, request: &Request<'_>) -> Option<(u64, Answer)> {
        let nonce = u64::from_str_radix(request.nonce, 16).ok()?;
        let place = self.in_flight.iter().position(|sent| sent.nonce == nonce)?;
        let sent = self.in_flight.remove(place)?;
        let answer = match request.error {
            None => {
                for (name, version) in sent.names {
                    self.acked(name, version);
                }
                Answer::Acked
            }
            Some(text) => self.refused(sent.names, text),
        };
        Some((nonce, answer))
    }

    fn acked(&mut self, name: Arc<str>, version: Option<Version>) {
        if self
            .refused
            .get(&name)
            .is_some_and(|(bad, _)| Some(*bad) != version)
        {
            self.refused.remove(&name);
        }
        match version {
            Some(_) => {
                if let Some(entry) = self.entries.get_mut(&name) {
                    entry.held = version;
                    entry.unsure = false;
                } else if self.wildcard {
                    let entry = Entry {
                        held: version,
                        ..Entry::default()
                    };
                    self.entries.insert(name, entry);
                }
            }
            None => self.removed(&name),
        }
    }

    fn removed(&mut self, name: &Arc<str>) {
        self.sources.remove(name);
        match self.entries.get_mut(name) {
            Some(entry) if entry.subscribed => {
                entry.held = None;
                entry.unsure = false;
            }
            Some(_) => drop(self.entries.remove(name)),
            None => {}
        }
    }

    /// Envoy takes what is good of a response and names what is not, or refuses it as a whole without a name when a
    /// single field breaks a rule of its schema. Either way the good ones must arrive.
    fn refused(&mut self, sent: Vec<(Arc<str>, Option<Version>)>, text: &str) -> Answer {
        for (name, version) in &sent {
            if version.is_none() {
                // it refused something else: what it was told to drop it does not hold in our books
                self.removed(name);
            }
        }
        let sent: Vec<_> = sent
            .into_iter()
            .filter_map(|(name, version)| Some((name, version?)))
            .collect();
        let alone = sent.len() == 1;
        let (blamed, others): (Vec<_>, Vec<_>) = sent
            .into_iter()
            .partition(|(name, _)| alone || names(text, name));
        for (name, _) in &others {
            match self.entries.get_mut(name) {
                Some(entry) => entry.unsure = true,
                None if self.wildcard => {
                    let entry = Entry {
                        unsure: true,
                        ..Entry::default()
                    };
                    self.entries.insert(name.clone(), entry);
                }
                None => {}
            }
        }
        if blamed.is_empty() {
            let suspects = others.len();
            self.suspects
                .extend(others.into_iter().map(|(name, _)| name));
            return Answer::Suspected(suspects);
        }
        self.dirty.extend(others.into_iter().map(|(name, _)| name));
        let text: Arc<str> = text.into();
        for (name, version) in &blamed {
            self.refused.insert(name.clone(), (*version, text.clone()));
        }
        let blamed = blamed
            .into_iter()
            .map(|(name, version)| (name, version.get()));
        Answer::Refused(blamed.collect())
    }

    /// The next part of what is new. A round begins only when every part of the last one is answered.
    fn news(
        &mut self,
        kind: Kind,
        view: &impl View,
        bytes: usize,
    ) -> (Vec<Arc<Resource>>, Vec<Arc<str>>) {
        let (mut resources, mut removed) = (Vec::new(), Vec::new());
        while let Some(name) = self.suspects.pop_front() {
            self.look(kind, name, view, &mut resources, &mut removed);
            if !resources.is_empty() || !removed.is_empty() {
                return (resources, removed);
            }
        }
        let mut size = 0;
        while resources.is_empty() && removed.is_empty() {
            if self.round.is_empty() && self.in_flight.is_empty() {
                self.begin_round(kind, view);
            }
            if self.round.is_empty() {
                break;
            }
            while size < bytes
                && let Some(name) = self.round.pop_front()
            {
                let before = resources.len();
                self.look(kind, name, view, &mut resources, &mut removed);
                let more: Option<&Arc<Resource>> = resources.get(before);
                size += more.map_or(0, |resource| resource.body.len());
            }
        }
        (resources, removed)
    }

    fn begin_round(&mut self, kind: Kind, view: &impl View) {
        let mut names = mem::take(&mut self.dirty);
        if mem::take(&mut self.all_dirty) {
            names.extend(self.entries.keys().cloned());
            if self.wildcard {
                names.extend(view.all(kind).into_iter().map(|it| it.name.clone()));
            }
        }
        self.round.extend(names);
    }

    /// Adds what must be told about a name, if anything.
    fn look(
        &mut self,
        kind: Kind,
        name: Arc<str>,
        view: &impl View,
        resources: &mut Vec<Arc<Resource>>,
        removed: &mut Vec<Arc<str>>,
    ) {
        let known = self.entries.get_mut(&name);
        if known.is_none() && !self.wildcard {
            return; // it was unsubscribed meanwhile
        }
        let owed = known.as_ref().is_some_and(|entry| entry.owed);
        let held = known.as_ref().and_then(|entry| entry.held);
        let unsure = known.as_ref().is_some_and(|entry| entry.unsure);
        if let Some(entry) = known {
            entry.owed = false;
        }
        let Some(resource) = view.find(kind, &name) else {
            if held.is_some() || unsure {
                self.gone.insert(name);
                return;
            }
            self.refused.remove(&name);
            match owed {
                true if kind == Kind::Endpoints => resources.push(nobody(&name)),
                true => removed.push(name),
                false => {}
            }
            return;
        };
        self.gone.remove(&name);
        match &resource.source {
            Some(source) => drop(self.sources.insert(name.clone(), source.clone())),
            None => drop(self.sources.remove(&name)),
        }
        let version = version(resource.version);
        match self.refused.get(&name) {
            Some((bad, _)) if *bad == version => return,
            // back to what it holds: nothing is refused any more
            Some(_) if held == Some(version) && !unsure => drop(self.refused.remove(&name)),
            Some(_) | None => {}
        }
        if owed || unsure || held != Some(version) {
            resources.push(resource);
        }
    }

    /// What is no more, once nothing refers to it. Endpoints do not go away by being removed, which Envoy ignores: whoever
    /// still asks for them is told that there are none.
    fn farewells(&mut self, kind: Kind) -> (Vec<Arc<Resource>>, Vec<Arc<str>>) {
        let (mut resources, mut removed) = (Vec::new(), Vec::new());
        if !self.in_flight.is_empty() {
            return (resources, removed);
        }
        for name in mem::take(&mut self.gone) {
            let Some(entry) = self.entries.get(&name) else {
                continue;
            };
            if kind == Kind::Endpoints {
                let empty = nobody(&name);
                if entry.unsure || entry.held != Some(version(empty.version)) {
                    resources.push(empty);
                }
            } else {
                removed.push(name);
            }
        }
        (resources, removed)
    }

    /// Whether nothing is to be sent or to be answered.
    fn is_quiet(&self) -> bool {
        !self.all_dirty
            && !self.owes_answer
            && self.dirty.is_empty()
            && self.round.is_empty()
            && self.suspects.is_empty()
            && self.gone.is_empty()
            && self.in_flight.is_empty()
    }

    fn awaits(&self, name: &Arc<str>) -> bool {
        let flies = |sent: &Sent| sent.names.iter().any(|(sent, _)| sent == name);
        self.all_dirty
            || self.dirty.contains(name)
            || self.round.contains(name)
            || self.suspects.contains(name)
            || self.in_flight.iter().any(flies)
    }

    fn held(&self) -> impl Iterator<Item = (&Arc<str>, u64)> {
        self.entries
            .iter()
            .filter(|(_, entry)| !entry.unsure)
            .filter_map(|(name, entry)| Some((name, entry.held?.get())))
    }
}

/// The assignment without endpoints: silence would leave a cluster cold for ever.
fn nobody(name: &Arc<str>) -> Arc<Resource> {
    let assignment = ClusterLoadAssignment {
        cluster_name: name.to_string(),
        ..ClusterLoadAssignment::default()
    };
    let body = assignment.encode_to_vec();
    Arc::new(Resource {
        name: name.clone(),
        version: content_hash(&body),
        body: body.into(),
        source: None,
    })
}

/// A version of something small: FNV-1a, the same in every process.
pub fn content_hash(body: &[u8]) -> u64 {
    body.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Whether a text speaks of a resource: its name stands in it, and is not a piece of a longer one.
fn names(text: &str, name: &str) -> bool {
    let part_of_a_name = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '|' | '/');
    !name.is_empty()
        && text.match_indices(name).any(|(at, found)| {
            let before = text.get(..at).and_then(|text| text.chars().next_back());
            let after = text.get(at + found.len()..);
            let mut after = after.unwrap_or_default().chars();
            // a full stop may end a sentence
            let ends = match (after.next(), after.next()) {
                (Some('.'), next) => next.is_none_or(|c| !part_of_a_name(c)),
                (next, _) => next.is_none_or(|c| !part_of_a_name(c)),
            };
            ends && before.is_none_or(|c| !part_of_a_name(c))
        })
}
