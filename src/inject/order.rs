//! Where ours stand among the user's containers.
//!
//! Native: `malha-init`, `malha-proxy`, then the user's init containers but those that run before. Classic: the user's
//! init containers, then `malha-init`; the proxy is the first container or, where it does not hold the application,
//! the last.

use std::collections::BTreeSet;

use super::{
    lax::Slot,
    ours::{self, Ours},
    patch::{Operations, Pointer},
    pod::{Container, PodView},
};

/// How many of the user's init containers start before ours: in native order up to the last that is named.
pub(super) fn ahead(pod: &PodView<'_>, native: bool, run_before: &BTreeSet<&str>) -> usize {
    let users = pod.init_containers().iter().filter(|slot| !is_ours(slot));
    let stays = |slot: &Slot<Container<'_>>| {
        let name = slot.present().and_then(Container::name);
        !native || name.is_some_and(|name| run_before.contains(name))
    };
    let last = users.enumerate().filter(|(_, slot)| stays(slot)).last();
    last.map_or(0, |(at, _)| at + 1)
}

/// The first `ahead` of the user's init containers, as far as they stay beside the application.
pub(super) fn sidecars_before<'p, 'a>(
    pod: &'p PodView<'a>,
    ahead: usize,
) -> impl Iterator<Item = &'p Container<'a>> {
    let users = pod.init_containers().iter().filter(|slot| !is_ours(slot));
    let first = users.take(ahead).filter_map(Slot::present);
    first.filter(|container| container.is_native_sidecar())
}

/// The user's containers that start after the proxy and stay, each with where it stands now.
pub(super) fn behind<'p, 'a>(
    pod: &'p PodView<'a>,
    ahead: usize,
) -> impl Iterator<Item = (&'p Container<'a>, Pointer)> {
    let (inits, containers) = (inits(), containers());
    let init_containers = pod.init_containers().iter().enumerate();
    let users = init_containers
        .filter(|(_, slot)| !is_ours(slot))
        .skip(ahead);
    let sidecars =
        users.filter(|(_, slot)| slot.present().is_some_and(Container::is_native_sidecar));
    let sidecars = sidecars.map(move |(at, slot)| (slot, inits.index(at)));
    let apps = pod
        .containers()
        .iter()
        .enumerate()
        .filter(|(_, slot)| !is_ours(slot));
    let apps = apps.map(move |(at, slot)| (slot, containers.index(at)));
    sidecars
        .chain(apps)
        .filter_map(|(slot, pointer)| Some((slot.present()?, pointer)))
}

/// Adds `malha-init` and the proxy to a pod that has neither.
pub(super) fn add(
    pod: &PodView<'_>,
    [init, proxy]: [&str; 2],
    place: Place,
    operations: &mut Operations,
) {
    let none = pod
        .spec
        .present()
        .is_none_or(|spec| spec.init_containers.is_missing());
    match place {
        Place::Native { .. } if none => operations.add(&inits(), &format!("[{init},{proxy}]")),
        Place::Native { ahead } => {
            operations.add(&inits().index(ahead), init);
            operations.add(&inits().index(ahead + 1), proxy);
        }
        Place::Classic { .. } if none => operations.add(&inits(), &format!("[{init}]")),
        Place::Classic { .. } => operations.add(&inits().end(), init),
    }
    match place {
        Place::Native { .. } => {}
        Place::Classic { hold: true } => operations.add(&containers().index(0), proxy),
        Place::Classic { hold: false } => operations.add(&containers().end(), proxy),
    }
}

/// Where ours go.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// Both among the init containers.
    Native {
        /// Behind so many of the user's.
        ahead: usize,
    },
    /// The proxy among the containers.
    Classic {
        /// The application waits for it.
        hold: bool,
    },
}

/// Moves ours back to where they belong, after other webhooks have added containers.
pub(super) fn restore(
    pod: &PodView<'_>,
    ours: &Ours<'_, '_>,
    ahead: usize,
    operations: &mut Operations,
) {
    let last_init = pod.init_containers().len().saturating_sub(1);
    let last = pod.containers().len().saturating_sub(1);
    if !ours.native {
        shift(&inits(), ours.init_at, last_init, operations);
        let wanted = if holds(ours.proxy) { 0 } else { last };
        shift(&containers(), ours.proxy_at, wanted, operations);
    } else if (ours.init_at, ours.proxy_at) != (ahead, ahead + 1) {
        // The proxy steps aside, so that `malha-init` alone stands among the user's.
        shift(&inits(), ours.proxy_at, last_init, operations);
        let init_at = ours.init_at - usize::from(ours.proxy_at < ours.init_at);
        shift(&inits(), init_at, ahead, operations);
        shift(&inits(), last_init, ahead + 1, operations);
    }
}

fn holds(proxy: &Container<'_>) -> bool {
    let lifecycle = proxy.lifecycle.read();
    lifecycle
        .present()
        .is_some_and(|lifecycle| lifecycle.post_start.present().is_some())
}

fn shift(list: &Pointer, from: usize, to: usize, operations: &mut Operations) {
    if from != to {
        operations.shift(&list.index(from), &list.index(to));
    }
}

fn is_ours(slot: &Slot<Container<'_>>) -> bool {
    slot.present().is_some_and(ours::is_ours)
}

fn inits() -> Pointer {
    Pointer::new(&["spec", "initContainers"])
}

fn containers() -> Pointer {
    Pointer::new(&["spec", "containers"])
}
