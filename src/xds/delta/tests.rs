//! A client as Envoy is one, a server that changes its mind, and what must come of it.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::mesh::ObjectName;

/// What there is.
#[derive(Clone, Default)]
struct Shelf(BTreeMap<(Kind, String), Arc<Resource>>);

impl View for Shelf {
    fn find(&self, kind: Kind, name: &str) -> Option<Arc<Resource>> {
        self.0.get(&(kind, name.to_owned())).cloned()
    }

    fn all(&self, kind: Kind) -> Vec<Arc<Resource>> {
        let of_kind = self.0.iter().filter(|((of, _), _)| *of == kind);
        of_kind.map(|(_, resource)| resource.clone()).collect()
    }
}

impl Shelf {
    fn put(&mut self, kind: Kind, name: &str, version: u64) {
        let resource = Resource {
            name: name.into(),
            version,
            body: vec![0; 100].into(),
            source: None,
        };
        self.0.insert((kind, name.to_owned()), Arc::new(resource));
    }

    fn with(mut self, kind: Kind, name: &str, version: u64) -> Self {
        self.put(kind, name, version);
        self
    }
}

const AT_ONCE: Pace = Pace {
    bytes: 1 << 20,
    wait_for_clusters: false,
};

fn subscribe<'a>(names: &[&'a str]) -> Request<'a> {
    Request {
        subscribe: names.to_vec(),
        ..Request::default()
    }
}

fn answer<'a>(nonce: &'a str, error: Option<&'a str>) -> Request<'a> {
    Request {
        nonce,
        error,
        ..Request::default()
    }
}

/// `+name@version` and `-name`.
fn said(push: Option<Push>) -> String {
    let Some(push) = push else {
        return "nothing".to_owned();
    };
    let come = push
        .resources
        .iter()
        .map(|it| format!("+{}@{:x}", it.name, it.version & 0xffff));
    let gone = push.removed.iter().map(|name| format!("-{name}"));
    let words: Vec<_> = come.chain(gone).collect();
    format!("{} {}", push.kind.label(), words.join(" "))
        .trim_end()
        .to_owned()
}

fn ack(session: &mut Session, shelf: &Shelf, kind: Kind) {
    let nonce = format!("{:x}", session.last_nonce);
    let heard = session.hear(kind, &answer(&nonce, None), shelf);
    assert!(
        matches!(heard.answer, Some((_, Answer::Acked))),
        "{heard:?}"
    );
}

#[test]
fn the_first_request_decides_what_is_told_without_a_name() {
    let shelf = Shelf::default()
        .with(Kind::Cluster, "a", 1)
        .with(Kind::Cluster, "b", 2)
        .with(Kind::Route, "80", 3);
    for (kind, names, want) in [
        (Kind::Cluster, vec![], "cds +a@1 +b@2"),
        (Kind::Cluster, vec!["*"], "cds +a@1 +b@2"),
        (Kind::Cluster, vec!["b"], "cds +b@2"),
        (Kind::Cluster, vec!["c"], "cds -c"),
        (Kind::Listener, vec![], "lds"),
        (Kind::Route, vec![], "nothing"),
        (Kind::Route, vec!["80"], "rds +80@3"),
        (Kind::Secret, vec!["ROOTCA"], "sds -ROOTCA"),
    ] {
        let mut session = Session::default();
        session.hear(kind, &subscribe(&names), &shelf);
        assert_eq!(
            said(session.next(&shelf, AT_ONCE)),
            want,
            "{kind:?} {names:?}"
        );
        assert_eq!(said(session.next(&shelf, AT_ONCE)), "nothing");
    }
}

#[test]
fn a_client_that_comes_back_is_told_only_what_differs_and_what_is_gone() {
    let shelf = Shelf::default()
        .with(Kind::Cluster, "same", 1)
        .with(Kind::Cluster, "other", 2)
        .with(Kind::Cluster, "fresh", 3)
        .with(Kind::Endpoints, "same", 4);
    let (same, old) = (version_text(1), version_text(9));
    let mut session = Session::default();
    let held = [("same", &*same), ("other", &*old), ("gone", &*old)];
    let request = Request {
        held: held.into(),
        ..Request::default()
    };
    session.hear(Kind::Cluster, &request, &shelf);
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "cds +fresh@3 +other@2");
    ack(&mut session, &shelf, Kind::Cluster);
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "cds -gone");

    let four = version_text(4);
    let request = Request {
        subscribe: vec!["same"],
        held: [("same", &*four)].into(),
        ..Request::default()
    };
    session.hear(Kind::Endpoints, &request, &shelf);
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "nothing");

    // versions of somebody else's making differ, however they look
    for strange in ["", "4", "0004", "000000000000000A", "v1"] {
        let mut session = Session::default();
        let request = Request {
            subscribe: vec!["same"],
            held: [("same", strange)].into(),
            ..Request::default()
        };
        session.hear(Kind::Endpoints, &request, &shelf);
        assert_eq!(
            said(session.next(&shelf, AT_ONCE)),
            "eds +same@4",
            "{strange}"
        );
    }
}

#[test]
fn a_name_that_is_asked_for_again_is_answered_though_nothing_changed() {
    let shelf = Shelf::default().with(Kind::Endpoints, "a", 1);
    let mut session = Session::default();
    session.hear(Kind::Endpoints, &subscribe(&["a"]), &shelf);
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "eds +a@1");
    ack(&mut session, &shelf, Kind::Endpoints);
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "nothing");
    session.hear(Kind::Endpoints, &subscribe(&["a"]), &shelf);
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "eds +a@1");
}

#[test]
fn t02_a_changed_cluster_is_followed_by_its_endpoints_though_they_are_the_same() {
    let mut shelf = Shelf::default()
        .with(Kind::Cluster, "a", 1)
        .with(Kind::Endpoints, "a", 5);
    let mut session = Session::default();
    session.hear(Kind::Cluster, &subscribe(&[]), &shelf);
    session.next(&shelf, AT_ONCE);
    session.hear(Kind::Endpoints, &subscribe(&["a", "nowhere"]), &shelf);
    assert!(said(session.next(&shelf, AT_ONCE)).starts_with("eds +a@5 +nowhere@"));
    ack(&mut session, &shelf, Kind::Endpoints);

    // T3: the ACK of the cluster is still out
    assert!(session.in_flight(Kind::Cluster));
    session.hear(Kind::Cluster, &answer("1", None), &shelf);
    shelf.put(Kind::Cluster, "a", 2);
    session.touch(Kind::Cluster, &"a".into());
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "cds +a@2");
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "eds +a@5");
}

#[test]
fn listeners_and_routes_wait_for_clusters_while_they_are_told_to() {
    let mut shelf = Shelf::default()
        .with(Kind::Cluster, "a", 1)
        .with(Kind::Listener, "l", 2);
    let mut session = Session::default();
    session.hear(Kind::Cluster, &subscribe(&[]), &shelf);
    session.hear(Kind::Listener, &subscribe(&[]), &shelf);
    let waiting = Pace {
        wait_for_clusters: true,
        ..AT_ONCE
    };
    assert_eq!(said(session.next(&shelf, waiting)), "cds +a@1");
    assert_eq!(said(session.next(&shelf, waiting)), "nothing");
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "lds +l@2");

    // and what goes away goes after whatever refers to it
    session.hear(Kind::Cluster, &answer("1", None), &shelf);
    session.hear(Kind::Listener, &answer("2", None), &shelf);
    shelf.0.clear();
    session.touch(Kind::Cluster, &"a".into());
    session.touch(Kind::Listener, &"l".into());
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "lds -l");
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "nothing");
    session.hear(Kind::Listener, &answer("3", None), &shelf);
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "cds -a");
}

#[test]
fn t07_a_refused_version_is_not_sent_again_and_the_next_one_is() {
    let mut shelf = Shelf::default().with(Kind::Listener, "l", 1);
    let mut session = Session::default();
    session.hear(Kind::Listener, &subscribe(&[]), &shelf);
    session.next(&shelf, AT_ONCE);
    ack(&mut session, &shelf, Kind::Listener);
    shelf.put(Kind::Listener, "l", 2);
    session.touch(Kind::Listener, &"l".into());
    session.next(&shelf, AT_ONCE);
    let heard = session.hear(Kind::Listener, &answer("2", Some("no such filter")), &shelf);
    assert_eq!(
        heard.answer,
        Some((2, Answer::Refused(vec![("l".into(), 2)])))
    );
    session.touch(Kind::Listener, &"l".into());
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "nothing");
    let status = session.status(Kind::Listener).expect("asked for");
    assert_eq!(status.state, State::Rejected);
    assert_eq!(status.refused, Some(("l".into(), "no such filter".into())));
    assert_eq!(status.resources, 1, "the last good one stays");

    // back to what it holds: nothing to send, nothing refused
    shelf.put(Kind::Listener, "l", 1);
    session.touch(Kind::Listener, &"l".into());
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "nothing");
    assert_eq!(
        session.status(Kind::Listener).map(|it| it.state),
        Some(State::Synced)
    );

    shelf.put(Kind::Listener, "l", 3);
    session.touch(Kind::Listener, &"l".into());
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "lds +l@3");
}

#[test]
fn t06_of_a_response_that_is_refused_the_good_resources_still_arrive() {
    let shelf = Shelf::default()
        .with(Kind::Cluster, "a", 1)
        .with(Kind::Cluster, "b", 2)
        .with(Kind::Cluster, "b.c", 3);
    // it names the culprit
    let mut session = Session::default();
    session.hear(Kind::Cluster, &subscribe(&[]), &shelf);
    session.next(&shelf, AT_ONCE);
    let text = "Error adding/updating cluster(s) b: no such type.";
    let heard = session.hear(Kind::Cluster, &answer("1", Some(text)), &shelf);
    assert_eq!(
        heard.answer,
        Some((1, Answer::Refused(vec![("b".into(), 2)])))
    );
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "cds +a@1 +b.c@3");

    // it does not: each is tried by itself
    let mut session = Session::default();
    session.hear(Kind::Cluster, &subscribe(&[]), &shelf);
    session.next(&shelf, AT_ONCE);
    let text = "Proto constraint validation failed";
    let heard = session.hear(Kind::Cluster, &answer("1", Some(text)), &shelf);
    assert_eq!(heard.answer, Some((1, Answer::Suspected(3))));
    let mut alone: Vec<_> = (0..3)
        .map(|_| said(session.next(&shelf, AT_ONCE)))
        .collect();
    alone.sort();
    assert_eq!(alone, ["cds +a@1", "cds +b.c@3", "cds +b@2"]);
}

#[test]
fn t12_a_slow_reader_is_told_the_newest_version_once() {
    let mut shelf = Shelf::default().with(Kind::Endpoints, "a", 1);
    let mut session = Session::default();
    session.hear(Kind::Endpoints, &subscribe(&["a"]), &shelf);
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "eds +a@1");
    for version in 2..1000 {
        shelf.put(Kind::Endpoints, "a", version);
        session.touch(Kind::Endpoints, &"a".into());
        assert_eq!(said(session.next(&shelf, AT_ONCE)), "nothing");
    }
    ack(&mut session, &shelf, Kind::Endpoints);
    assert_eq!(said(session.next(&shelf, AT_ONCE)), "eds +a@3e7");
}

#[test]
fn many_resources_travel_in_parts_of_a_bounded_size() {
    let mut shelf = Shelf::default();
    for number in 0..100 {
        shelf.put(Kind::Cluster, &format!("c{number}"), 1);
    }
    let mut session = Session::default();
    session.hear(Kind::Cluster, &subscribe(&[]), &shelf);
    let pace = Pace {
        bytes: 1000,
        ..AT_ONCE
    };
    let parts: Vec<_> = std::iter::from_fn(|| session.next(&shelf, pace))
        .map(|push| push.resources.len())
        .collect();
    assert_eq!(parts, [10; 10]);
}

#[test]
fn an_answer_to_another_response_is_none_to_this() {
    let shelf = Shelf::default().with(Kind::Endpoints, "a", 1);
    let mut session = Session::default();
    session.hear(Kind::Endpoints, &subscribe(&["a"]), &shelf);
    session.next(&shelf, AT_ONCE);
    for nonce in ["", "0", "2", "x", "ffffffffffffffffff"] {
        let heard = session.hear(Kind::Endpoints, &answer(nonce, None), &shelf);
        assert_eq!(heard.answer, None, "{nonce}");
    }
    assert!(session.in_flight(Kind::Endpoints));
}

#[test]
fn a_users_object_is_known_with_what_became_of_it() {
    let mut shelf = Shelf::default();
    let source = ObjectRef {
        kind: "PeerAuthentication",
        name: ObjectName::new("shop", "default"),
    };
    let resource = Resource {
        name: "in".into(),
        version: 1,
        body: vec![1].into(),
        source: Some(source.clone()),
    };
    shelf
        .0
        .insert((Kind::Listener, "in".to_owned()), Arc::new(resource));
    let mut session = Session::default();
    session.hear(Kind::Listener, &subscribe(&[]), &shelf);
    session.next(&shelf, AT_ONCE);
    let state = |session: &Session| {
        session
            .sources()
            .map(|(_, state, _)| state)
            .collect::<Vec<_>>()
    };
    assert_eq!(state(&session), [State::Pending]);
    session.hear(Kind::Listener, &answer("1", Some("bad")), &shelf);
    assert_eq!(state(&session), [State::Rejected]);
    let named: Vec<_> = session
        .sources()
        .map(|(source, ..)| source.clone())
        .collect();
    assert_eq!(named, [source]);
}

/// A client that keeps to the protocol as Envoy does.
#[derive(Default)]
struct Client {
    held: BTreeMap<(Kind, String), u64>,
    asked: BTreeSet<(Kind, String)>,
    inbox: VecDeque<Push>,
}

/// Every third version is not to its taste.
fn is_good(version: u64) -> bool {
    !version.is_multiple_of(3)
}

impl Client {
    fn connect(&mut self, session: &mut Session, shelf: &Shelf) {
        *session = Session::default();
        self.inbox.clear();
        for kind in [Kind::Cluster, Kind::Endpoints, Kind::Listener, Kind::Route] {
            let held: Vec<_> = self
                .held
                .iter()
                .filter(|((of, _), _)| *of == kind)
                .map(|((_, name), version)| (name.clone(), version_text(*version)))
                .collect();
            let asked = self.asked.iter().filter(|(of, _)| *of == kind);
            let request = Request {
                subscribe: asked.map(|(_, name)| &**name).collect(),
                held: held.iter().map(|(name, text)| (&**name, &**text)).collect(),
                ..Request::default()
            };
            if kind.is_wildcard_without_names() || !request.subscribe.is_empty() {
                session.hear(kind, &request, shelf);
            }
        }
    }

    /// Reads one response and answers it, asking for what it now needs in the same breath.
    fn read(&mut self, session: &mut Session, shelf: &Shelf, tells_names: bool) -> bool {
        let Some(push) = self.inbox.pop_front() else {
            return false;
        };
        let kind = push.kind;
        let bad: Vec<_> = push
            .resources
            .iter()
            .filter(|it| kind != Kind::Endpoints && !is_good(it.version))
            .map(|it| it.name.to_string())
            .collect();
        let error = (!bad.is_empty()).then(|| match tells_names {
            true => format!("Error adding: {}: bad", bad.join(": bad, ")),
            false => "Proto constraint validation failed".to_owned(),
        });
        // an error of the schema takes the whole response with it
        let whole = error.is_some() && !tells_names;
        let (mut subscribe, mut unsubscribe) = (Vec::new(), Vec::new());
        let needs = if kind == Kind::Cluster {
            Kind::Endpoints
        } else {
            Kind::Route
        };
        let leads = matches!(kind, Kind::Cluster | Kind::Listener);
        for resource in push.resources.iter().filter(|_| !whole) {
            let name = resource.name.to_string();
            if bad.contains(&name) {
                continue;
            }
            let wanted = leads || self.asked.contains(&(kind, name.clone()));
            if wanted {
                self.held.insert((kind, name.clone()), resource.version);
            }
            if leads && self.asked.insert((needs, name.clone())) {
                subscribe.push(name);
            }
        }
        for name in push.removed.iter().filter(|_| !whole) {
            self.held.remove(&(kind, name.to_string()));
            if leads && self.asked.remove(&(needs, name.to_string())) {
                self.held.remove(&(needs, name.to_string()));
                unsubscribe.push(name.to_string());
            }
        }
        let nonce = push.nonce_text();
        session.hear(kind, &answer(&nonce, error.as_deref()), shelf);
        if !subscribe.is_empty() || !unsubscribe.is_empty() {
            let request = Request {
                subscribe: subscribe.iter().map(|it| &**it).collect(),
                unsubscribe: unsubscribe.iter().map(|it| &**it).collect(),
                ..Request::default()
            };
            session.hear(needs, &request, shelf);
        }
        true
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put(Kind, u8, u64),
    Remove(Kind, u8),
    Push,
    Read { tells_names: bool },
    Reconnect,
    TouchAll,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = prop_oneof![
        Just(Kind::Cluster),
        Just(Kind::Endpoints),
        Just(Kind::Listener),
        Just(Kind::Route)
    ];
    let step = prop_oneof![
        4 => (kind.clone(), 0..6_u8, 1..40_u64).prop_map(|(kind, name, version)| Step::Put(kind, name, version)),
        2 => (kind, 0..6_u8).prop_map(|(kind, name)| Step::Remove(kind, name)),
        6 => Just(Step::Push),
        6 => any::<bool>().prop_map(|tells_names| Step::Read { tells_names }),
        1 => Just(Step::Reconnect),
        1 => Just(Step::TouchAll),
    ];
    prop::collection::vec(step, 0..120)
}

/// Plays a story, then lets both finish; the client must hold what there is.
fn told_to_the_end(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut shelf = Shelf::default();
    let mut session = Session::default();
    let mut client = Client::default();
    client.connect(&mut session, &shelf);
    let pace = Pace {
        bytes: 250,
        wait_for_clusters: false,
    };
    for step in steps {
        match step {
            Step::Put(kind, name, version) => {
                shelf.put(kind, &format!("n{name}"), version);
                session.touch(kind, &format!("n{name}").into());
            }
            Step::Remove(kind, name) => {
                shelf.0.remove(&(kind, format!("n{name}")));
                session.touch(kind, &format!("n{name}").into());
            }
            Step::Push => client.inbox.extend(session.next(&shelf, pace)),
            Step::Read { tells_names } => drop(client.read(&mut session, &shelf, tells_names)),
            Step::Reconnect => client.connect(&mut session, &shelf),
            Step::TouchAll => drop(session.touch_all()),
        }
    }
    let mut rounds = 0;
    loop {
        client.inbox.extend(session.next(&shelf, pace));
        if !client.read(&mut session, &shelf, rounds % 2 == 0) {
            break;
        }
        rounds += 1;
        prop_assert!(rounds < 2000, "it never ends");
    }
    for kind in [Kind::Cluster, Kind::Listener] {
        for resource in shelf.all(kind) {
            let held = client.held.get(&(kind, resource.name.to_string()));
            if is_good(resource.version) {
                prop_assert_eq!(
                    held,
                    Some(&resource.version),
                    "{:?} {}",
                    kind,
                    resource.name
                );
            } else {
                prop_assert_ne!(held, Some(&resource.version));
            }
        }
    }
    for (kind, name) in client
        .held
        .keys()
        .filter(|(kind, _)| *kind != Kind::Endpoints)
    {
        prop_assert!(
            shelf.find(*kind, name).is_some(),
            "{:?} {} was never taken away {:?}",
            kind,
            name,
            session
        );
    }
    for (kind, name) in client
        .asked
        .iter()
        .filter(|(kind, _)| *kind == Kind::Endpoints)
    {
        let there = shelf
            .find(*kind, name)
            .unwrap_or_else(|| nobody(&name.as_str().into()));
        prop_assert_eq!(
            client.held.get(&(*kind, name.clone())),
            Some(&there.version),
            "endpoints {}",
            name
        );
    }
    // the books agree with the client
    for kind in [Kind::Cluster, Kind::Listener, Kind::Endpoints] {
        for (name, version) in session.held(kind) {
            prop_assert_eq!(client.held.get(&(kind, name.to_string())), Some(&version));
        }
        let state = session.status(kind).map(|status| status.state);
        prop_assert_ne!(state, Some(State::Pending), "{:?}", kind);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Whatever changes, is refused, is lost or begins anew in between: in the end the client holds what there is, but
    /// for what it refused, and nothing is left to say.
    #[test]
    fn every_story_ends_with_the_client_holding_what_there_is(steps in steps()) {
        told_to_the_end(steps)?;
    }

    #[test]
    fn no_request_upsets_a_session(
        names in prop::collection::vec("[*a-c]{0,2}", 0..4),
        gone in prop::collection::vec("[*a-c]{0,2}", 0..4),
        nonce in "[0-9a-f]{0,3}",
        error in prop::option::of("[a-c: .]{0,8}"),
    ) {
        let shelf = Shelf::default().with(Kind::Cluster, "a", 1).with(Kind::Cluster, "b", 2);
        let mut session = Session::default();
        for _ in 0..3 {
            let request = Request {
                subscribe: names.iter().map(|it| &**it).collect(),
                unsubscribe: gone.iter().map(|it| &**it).collect(),
                held: names.iter().map(|it| (&**it, "x")).collect(),
                nonce: &nonce,
                error: error.as_deref(),
            };
            session.hear(Kind::Cluster, &request, &shelf);
            while session.next(&shelf, AT_ONCE).is_some() {}
        }
    }
}

/// A part of a round was refused while only names without news were left of the round: what was refused waited for ever.
#[test]
fn a_round_that_ends_without_news_lets_the_next_begin() {
    let read = || Step::Read { tells_names: false };
    let put = |kind, name, version| Step::Put(kind, name, version);
    let (listener, cluster, route) = (Kind::Listener, Kind::Cluster, Kind::Route);
    let steps = vec![
        put(listener, 2, 4),
        put(cluster, 0, 1),
        put(listener, 4, 1),
        Step::Push,
        read(),
        put(listener, 5, 10),
        Step::Push,
        Step::Push,
        read(),
        put(cluster, 0, 1),
        Step::Remove(cluster, 0),
        put(listener, 1, 4),
        read(),
        Step::Push,
        Step::Push,
        put(route, 2, 1),
        Step::TouchAll,
        put(route, 4, 30),
        put(route, 1, 1),
        Step::Push,
        read(),
        put(listener, 0, 1),
        put(cluster, 1, 1),
        Step::Push,
        read(),
        read(),
    ];
    told_to_the_end(steps).expect("everything was told");
}
