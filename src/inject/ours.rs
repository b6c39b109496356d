//! What is ours in a pod: two containers and four volumes, known by their names and never by an annotation.

use std::collections::BTreeMap;

use serde_json::{Map, Value, value::RawValue};

use super::{
    Denial,
    lax::{Fields, Slot},
    pod::{Container, PodView},
    reason::DenyReason,
};

/// The sidecar.
pub(super) const PROXY: &str = "malha-proxy";
/// The init container that redirects the pod's traffic.
pub(super) const INIT: &str = "malha-init";
/// Sockets, bootstrap and private key, in memory.
pub(super) const RUN_VOLUME: &str = "malha-run";
/// The token that shows the authority who the pod is.
pub(super) const TOKEN_VOLUME: &str = "malha-token";
/// The roots that the pod trusts.
pub(super) const CA_VOLUME: &str = "malha-ca";
/// The pod's labels and annotations.
pub(super) const PODINFO_VOLUME: &str = "malha-podinfo";
/// Every volume of ours, in the order in which they are added.
pub(super) const VOLUMES: [&str; 4] = [RUN_VOLUME, TOKEN_VOLUME, CA_VOLUME, PODINFO_VOLUME];

/// The original handlers, by the path at which the agent serves them.
pub(super) const PROBES_VARIABLE: &str = "MALHA_PROBES";
/// The application's own metrics annotations.
pub(super) const PROMETHEUS_VARIABLE: &str = "MALHA_PROMETHEUS";
/// What `uninject` takes back.
pub(super) const RESTORE_VARIABLE: &str = "MALHA_RESTORE";
/// Where a workload finds the SPIFFE Workload API.
pub(super) const WORKLOAD_API_VARIABLE: &str = "SPIFFE_ENDPOINT_SOCKET";
/// Its value.
pub(super) const WORKLOAD_API_SOCKET: &str = "unix:///run/malha/workload/socket";
/// Its directory, the only part of `malha-run` that an application sees.
pub(super) const WORKLOAD_API_DIRECTORY: &str = "/run/malha/workload";

pub(super) fn is_ours(container: &Container<'_>) -> bool {
    container.is_named(PROXY) || container.is_named(INIT)
}

/// Both containers of ours, as an earlier call left them.
#[derive(Debug)]
pub(super) struct Ours<'p, 'a> {
    pub(super) proxy: &'p Container<'a>,
    pub(super) init: &'p Container<'a>,
    /// Index of the proxy in its list.
    pub(super) proxy_at: usize,
    /// Index of `malha-init` among the init containers.
    pub(super) init_at: usize,
    /// The proxy is a native sidecar, among the init containers.
    pub(super) native: bool,
    /// The value of `MALHA_PROBES`: original handlers as JSON, by path.
    pub(super) probes: BTreeMap<String, Box<RawValue>>,
}

/// Looks for ours by name; `None` if neither container is there.
///
/// # Errors
/// When a name of ours is taken by something that is not ours.
pub(super) fn presence<'p, 'a>(pod: &'p PodView<'a>) -> Result<Option<Ours<'p, 'a>>, Denial> {
    let (init, proxy, native) = match stations(pod)? {
        (None, None, None) => return Ok(None),
        (Some(init), Some(proxy), None) => (init, proxy, true),
        (Some(init), None, Some(proxy)) => (init, proxy, false),
        (Some(_), None, None) => return Err(conflict(INIT, "stands there without malha-proxy")),
        (None, ..) => return Err(conflict(PROXY, "stands there without malha-init")),
        (_, Some(_), Some(_)) => return Err(conflict(PROXY, "stands there twice")),
    };
    if native && !proxy.1.is_native_sidecar() {
        return Err(conflict(
            PROXY,
            "is an init container without restartPolicy Always",
        ));
    }
    let probes =
        variable(proxy.1, PROBES_VARIABLE).and_then(|(_, value)| serde_json::from_str(&value).ok());
    Ok(Some(Ours {
        proxy: proxy.1,
        proxy_at: proxy.0,
        init: init.1,
        init_at: init.0,
        native,
        probes: probes.ok_or_else(|| {
            conflict(
                PROXY,
                "is not the injector's: its MALHA_PROBES is unreadable",
            )
        })?,
    }))
}

type Station<'p, 'a> = Option<(usize, &'p Container<'a>)>;

/// Where `malha-init`, and the proxy among init containers or containers, stand.
fn stations<'p, 'a>(
    pod: &'p PodView<'a>,
) -> Result<(Station<'p, 'a>, Station<'p, 'a>, Station<'p, 'a>), Denial> {
    if only(pod.containers(), INIT)?.is_some() {
        return Err(conflict(INIT, "is no init container"));
    }
    Ok((
        only(pod.init_containers(), INIT)?,
        only(pod.init_containers(), PROXY)?,
        only(pod.containers(), PROXY)?,
    ))
}

fn only<'p, 'a>(list: &'p [Slot<Container<'a>>], name: &str) -> Result<Station<'p, 'a>, Denial> {
    let containers = list
        .iter()
        .enumerate()
        .filter_map(|(at, slot)| Some((at, slot.present()?)));
    let mut named = containers.filter(|(_, container)| container.is_named(name));
    match (named.next(), named.next()) {
        (_, Some(_)) => Err(conflict(name, "stands there twice")),
        (first, None) => Ok(first),
    }
}

/// A variable of the container's environment, with its index.
pub(super) fn variable(container: &Container<'_>, name: &str) -> Option<(usize, String)> {
    let env = container.env();
    let variables = env.items().iter().enumerate();
    let found = variables
        .filter_map(|(at, slot)| Some((at, slot.present()?)))
        .find(|(_, v)| v.name.text() == Some(name));
    found.and_then(|(at, variable)| Some((at, variable.value.text()?.to_owned())))
}

/// The volumes of ours that the pod has already: on a first call each must be what we would add; where our containers
/// stand already it may be another version's, but of the same kind.
///
/// # Errors
/// When the name is taken by another volume.
pub(super) fn volumes_present(
    pod: &PodView<'_>,
    fragments: &[(&'static str, String)],
    again: bool,
) -> Result<Vec<&'static str>, Denial> {
    let mut present = Vec::new();
    for volume in pod.volumes() {
        let name = volume.read::<super::lax::Text<'_>>("name");
        let Some((name, fragment)) = fragments
            .iter()
            .find(|(ours, _)| name.text() == Some(*ours))
        else {
            continue;
        };
        let agrees = if again {
            is_of_our_kind(name, volume)
        } else {
            is_the_same(fragment, volume)
        };
        if !agrees || present.contains(name) {
            return Err(conflict_of_volume(name));
        }
        present.push(*name);
    }
    Ok(present)
}

fn is_of_our_kind(name: &str, volume: &Fields<'_>) -> bool {
    let kinds: &[&str] = match name {
        RUN_VOLUME => &["emptyDir"],
        TOKEN_VOLUME => &["projected"],
        CA_VOLUME => &["configMap", "projected"],
        _ => &["downwardAPI"],
    };
    kinds.iter().any(|kind| volume.contains(kind))
}

/// Every field of ours is there with our value, and no second source; defaults that the API server has filled in may
/// stand inside ours. A volume without a source is none of ours: it is defaulted to a directory on the node's disk.
fn is_the_same(fragment: &str, volume: &Fields<'_>) -> bool {
    let ours: Value = serde_json::from_str(fragment).expect("a fragment of ours is JSON");
    let theirs = volume.iter().map(|(key, raw)| {
        let value = serde_json::from_str(raw.0.get()).unwrap_or(Value::Null);
        (key.to_owned(), value)
    });
    let theirs: Map<String, Value> = theirs.collect();
    let second_source = theirs.keys().any(|key| ours.get(key).is_none());
    !second_source && agrees(&ours, &Value::Object(theirs))
}

fn agrees(ours: &Value, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => ours
            .iter()
            .all(|(key, value)| theirs.get(key).is_some_and(|theirs| agrees(value, theirs))),
        (Value::Array(ours), Value::Array(theirs)) => {
            ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(a, b)| agrees(a, b))
        }
        (ours, theirs) => ours == theirs,
    }
}

fn conflict(container: &str, fault: &str) -> Denial {
    Denial {
        reason: DenyReason::NameConflict,
        message: format!(
            "container {container} {fault}; the name is the injector's: rename or remove yours"
        ),
    }
}

fn conflict_of_volume(name: &str) -> Denial {
    Denial {
        reason: DenyReason::NameConflict,
        message: format!("volume {name} has another source than the injector's; rename yours"),
    }
}
