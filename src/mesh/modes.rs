//! Which transport a workload's port accepts, and the object that says so.
//!
//! Workload over namespace over mesh; within one object its port over its general mode; the oldest of two, then the
//! name. Nobody says anything: PERMISSIVE.

use super::{Mode, ObjectName, ObjectRef, PeerAuthentication, World};

/// What `port` of a workload accepts, and the PeerAuthentication that decided it.
pub fn effective(
    world: &World,
    root_namespace: &str,
    workload: &ObjectName,
    port: u16,
) -> (Mode, Option<ObjectRef>) {
    let (mode, decided) = Policies::of(world, root_namespace, workload).at(Some(port));
    let reference = |name: &ObjectName| ObjectRef {
        kind: "PeerAuthentication",
        name: name.clone(),
    };
    (mode, decided.map(reference))
}

/// The PeerAuthentications that bind one workload, the most specific first.
#[derive(Debug, Default)]
pub(crate) struct Policies<'w>(Vec<(&'w ObjectName, &'w PeerAuthentication)>);

impl<'w> Policies<'w> {
    pub(crate) fn of(world: &'w World, root_namespace: &str, workload: &ObjectName) -> Self {
        let no_labels = std::collections::BTreeMap::new();
        let labels = world.workloads.get(workload);
        let labels = labels.map_or(&no_labels, |pod| &pod.labels);
        let selects = |policy: &PeerAuthentication| {
            policy.selector.as_ref().is_some_and(|selector| {
                let mut wanted = selector.iter();
                wanted.all(|(key, value)| labels.get(key) == Some(value))
            })
        };
        let whole = |policy: &PeerAuthentication| policy.selector.is_none();
        let levels = [
            oldest(world, &workload.namespace, selects),
            oldest(world, &workload.namespace, whole),
            oldest(world, root_namespace, whole),
        ];
        Self(levels.into_iter().flatten().collect())
    }

    /// The mode of a port, or (`None`) of ports that nothing is known about.
    pub(crate) fn at(&self, port: Option<u16>) -> (Mode, Option<&'w ObjectName>) {
        let said = |policy: &PeerAuthentication| {
            let of_port = port.and_then(|port| policy.ports.get(&port).copied());
            of_port.or(policy.mode)
        };
        let mut levels = self.0.iter();
        levels
            .find_map(|&(name, policy)| Some((said(policy)?, Some(name))))
            .unwrap_or((Mode::Permissive, None))
    }

    /// Every port that some object names.
    pub(crate) fn ports(&self) -> impl Iterator<Item = u16> {
        self.0
            .iter()
            .flat_map(|(_, policy)| policy.ports.keys().copied())
    }
}

/// Creation times have seconds only, so that the name often decides. No time is the youngest.
fn oldest<'w>(
    world: &'w World,
    namespace: &str,
    wanted: impl Fn(&PeerAuthentication) -> bool,
) -> Option<(&'w ObjectName, &'w PeerAuthentication)> {
    let first = ObjectName::new(namespace, "");
    let of_namespace = world.peer_authentications.range(first..);
    of_namespace
        .take_while(|(name, _)| *name.namespace == *namespace)
        .filter(|(_, policy)| wanted(policy))
        .min_by_key(|(name, policy)| (policy.created.is_none(), policy.created, *name))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::mesh::{Event, Workload};

    fn policy(namespace: &str, name: &str, app: Option<&str>, mode: Option<Mode>) -> Event {
        let selector = app.map(|app| BTreeMap::from([("app".to_owned(), app.to_owned())]));
        let policy = PeerAuthentication {
            selector,
            mode,
            ports: BTreeMap::new(),
            created: None,
        };
        Event::PeerAuthentication(ObjectName::new(namespace, name), Some(policy))
    }

    fn aged(event: Event, second: i64, port: Option<(u16, Mode)>) -> Event {
        let Event::PeerAuthentication(name, Some(mut policy)) = event else {
            unreachable!("built by policy()")
        };
        policy.created = Some(jiff::Timestamp::from_second(second).expect("in range"));
        policy.ports.extend(port);
        Event::PeerAuthentication(name, Some(policy))
    }

    fn decided(events: impl IntoIterator<Item = Event>, port: u16) -> (Mode, String) {
        let mut world = World::default();
        let pod = ObjectName::new("shop", "web-a");
        let workload = Workload {
            account: "web".into(),
            addresses: vec![],
            labels: BTreeMap::from([("app".to_owned(), "web".to_owned())]),
            sidecar: true,
            host_network: false,
            ended: false,
            ports: vec![],
        };
        world.apply(Event::Workload(pod.clone(), Some(workload)));
        for event in events {
            world.apply(event);
        }
        let (mode, by) = effective(&world, "malha-system", &pod, port);
        (mode, by.map(|by| by.name.to_string()).unwrap_or_default())
    }

    #[test]
    fn the_most_specific_object_decides() {
        use Mode::{Disable, Permissive, Strict};
        let mesh = || policy("malha-system", "mesh", None, Some(Strict));
        let namespace = || policy("shop", "default", None, Some(Permissive));
        let workload = || policy("shop", "web", Some("web"), Some(Disable));
        let said = |mode, by: &str| (mode, by.to_owned());
        assert_eq!(decided([], 80), said(Permissive, ""));
        assert_eq!(decided([mesh()], 80), said(Strict, "malha-system/mesh"));
        assert_eq!(
            decided([mesh(), namespace()], 80),
            said(Permissive, "shop/default")
        );
        assert_eq!(
            decided([mesh(), namespace(), workload()], 80),
            said(Disable, "shop/web")
        );
        let port = aged(
            policy("shop", "web", Some("web"), None),
            5,
            Some((80, Disable)),
        );
        assert_eq!(
            decided([mesh(), port.clone()], 80),
            said(Disable, "shop/web")
        );
        assert_eq!(
            decided([mesh(), port], 81),
            said(Strict, "malha-system/mesh")
        );
        let others = policy("shop", "db", Some("db"), Some(Disable));
        let elsewhere = policy("jobs", "default", None, Some(Strict));
        assert_eq!(decided([others, elsewhere], 80), said(Permissive, ""));
    }

    #[test]
    fn of_two_the_oldest_decides_and_then_the_name() {
        let at = |name, second, mode| aged(policy("shop", name, None, Some(mode)), second, None);
        let old = [at("b", 1, Mode::Strict), at("a", 2, Mode::Disable)];
        assert_eq!(decided(old, 80), (Mode::Strict, "shop/b".to_owned()));
        let same = [at("b", 1, Mode::Strict), at("a", 1, Mode::Disable)];
        assert_eq!(decided(same, 80), (Mode::Disable, "shop/a".to_owned()));
        let unknown = [
            at("b", 1, Mode::Strict),
            policy("shop", "a", None, Some(Mode::Disable)),
        ];
        assert_eq!(decided(unknown, 80), (Mode::Strict, "shop/b".to_owned()));
    }
}
