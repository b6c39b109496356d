//! A second call for a pod that an earlier one has injected: other webhooks may have added containers since.
//!
//! Nothing of ours is rendered again and nothing is removed: containers that came since are completed, and the order
//! is restored.

use super::{
    Answer, Injector, Patch, Verdict,
    annotations::{PROXY_IMAGE, REWRITE_PROBES, RUN_BEFORE, WORKLOAD_API, names, shown},
    lax::{Slot, write_text},
    ours::{self, Ours},
    patch::{Operations, Pointer},
    pod::{Container, PodView},
    probes::{self, Records},
    reason::{Reason, SkipReason, Warning, WarningCode},
    record::Record,
    workload_api,
};

/// Completes what the earlier call did.
pub(super) fn complete(
    injector: &Injector,
    pod: &PodView<'_>,
    ours: &Ours<'_, '_>,
    present: &[&str],
) -> Answer {
    let mut warnings = Vec::new();
    let mut operations = Operations::default();
    warn_of_other_version(injector, pod, ours, &mut warnings);
    complete_containers(pod, ours, &mut operations, &mut warnings);
    injector.add_volumes(pod, present, &mut operations);
    restore_order(pod, ours, &mut operations);
    let verdict = match operations.is_empty() {
        true => Verdict::Skip(SkipReason::AlreadyInjected),
        false => Verdict::Patch(Patch {
            json: operations.into_json(),
            reason: Reason::Reinvoked,
        }),
    };
    Answer { verdict, warnings }
}

fn warn_of_other_version(
    injector: &Injector,
    pod: &PodView<'_>,
    ours: &Ours<'_, '_>,
    warnings: &mut Vec<Warning>,
) {
    let image = ours.proxy.image.text().unwrap_or_default();
    let wanted = pod
        .annotation(PROXY_IMAGE)
        .unwrap_or(&injector.settings().image.proxy);
    if image != wanted {
        warnings.push(Warning::new(
            WarningCode::OtherVersion,
            format_args!(
                "the sidecar is of another version, {}; it stays",
                shown(image)
            ),
        ));
    }
}

/// Rewrites and records the probes of containers that came since, and offers them the Workload API.
fn complete_containers(
    pod: &PodView<'_>,
    ours: &Ours<'_, '_>,
    operations: &mut Operations,
    warnings: &mut Vec<Warning>,
) {
    let mut records: Records = ours
        .probes
        .iter()
        .map(|(path, raw)| (path.clone(), probes::kept(raw)))
        .collect();
    let before = records.len();
    let (rewrite, offer) = (
        pod.annotation(REWRITE_PROBES) != Some("false"),
        pod.annotation(WORKLOAD_API) == Some("true"),
    );
    let kept = ours::variable(ours.proxy, ours::RESTORE_VARIABLE);
    let mut record: Option<Record> = kept.and_then(|(_, json)| serde_json::from_str(&json).ok());
    let known = record.clone();
    for (container, pointer) in behind_the_proxy(pod, ours) {
        if rewrite {
            probes::rewrite(container, &pointer, &mut records, operations, warnings);
        }
        if let Some(record) = record.as_mut().filter(|_| offer) {
            workload_api::offer(container, &pointer, record, operations);
        }
    }
    if records.len() > before {
        replace_variable(
            ours,
            ours::PROBES_VARIABLE,
            &probes::to_json(&records),
            operations,
        );
    }
    if let Some(record) = record.filter(|record| known.as_ref() != Some(record)) {
        replace_variable(ours, ours::RESTORE_VARIABLE, &record.to_json(), operations);
    }
}

/// Containers of the user's that start after the proxy, each with where it stands now.
fn behind_the_proxy<'p, 'a>(
    pod: &'p PodView<'a>,
    ours: &Ours<'_, '_>,
) -> impl Iterator<Item = (&'p Container<'a>, Pointer)> {
    let ahead = ahead(pod);
    let users = pod
        .init_containers()
        .iter()
        .enumerate()
        .filter(|(_, slot)| !is_ours(slot));
    let native = users.skip(ahead).filter(move |_| ours.native);
    let inits = native.filter(|(_, slot)| slot.present().is_some_and(Container::is_native_sidecar));
    let init_pointer = Pointer::new(&["spec", "initContainers"]);
    let pointer = Pointer::new(&["spec", "containers"]);
    let inits = inits.map(move |(at, slot)| (slot, init_pointer.index(at)));
    let containers = pod
        .containers()
        .iter()
        .enumerate()
        .map(move |(at, slot)| (slot, pointer.index(at)));
    let all = inits.chain(containers).filter(|(slot, _)| !is_ours(slot));
    all.filter_map(|(slot, pointer)| Some((slot.present()?, pointer)))
}

fn is_ours(slot: &Slot<Container<'_>>) -> bool {
    slot.present().is_some_and(ours::is_ours)
}

/// How many of the user's init containers stay ahead of ours.
fn ahead(pod: &PodView<'_>) -> usize {
    let first = names(pod.annotation(RUN_BEFORE).unwrap_or_default());
    super::ahead_of_us(
        pod.init_containers().iter().filter(|slot| !is_ours(slot)),
        &first,
    )
}

fn replace_variable(ours: &Ours<'_, '_>, name: &str, value: &str, operations: &mut Operations) {
    let Some((at, _)) = ours::variable(ours.proxy, name) else {
        return;
    };
    let list = if ours.native {
        "initContainers"
    } else {
        "containers"
    };
    let pointer = Pointer::new(&["spec", list])
        .index(ours.proxy_at)
        .key("env")
        .index(at)
        .key("value");
    let mut json = String::new();
    write_text(value, &mut json);
    operations.replace(&pointer, &json);
}

/// Native: `malha-init`, `malha-proxy`, then the user's but those that run before. Classic: `malha-init` last, the
/// proxy first or, where it does not hold the application, last.
fn restore_order(pod: &PodView<'_>, ours: &Ours<'_, '_>, operations: &mut Operations) {
    let inits = Pointer::new(&["spec", "initContainers"]);
    let total = pod.init_containers().len();
    if !ours.native {
        shift(&inits, ours.init_at, total.saturating_sub(1), operations);
        let last = pod.containers().len().saturating_sub(1);
        let wanted = if holds(ours.proxy) { 0 } else { last };
        shift(
            &Pointer::new(&["spec", "containers"]),
            ours.proxy_at,
            wanted,
            operations,
        );
        return;
    }
    let ahead = ahead(pod);
    if (ours.init_at, ours.proxy_at) == (ahead, ahead + 1) {
        return;
    }
    // The proxy steps aside, so that the others' indices are those of a list with `malha-init` alone.
    let last = total.saturating_sub(1);
    shift(&inits, ours.proxy_at, last, operations);
    shift(
        &inits,
        ours.init_at - usize::from(ours.proxy_at < ours.init_at),
        ahead,
        operations,
    );
    shift(&inits, last, ahead + 1, operations);
}

fn holds(proxy: &Container<'_>) -> bool {
    proxy
        .lifecycle
        .present()
        .is_some_and(|lifecycle| lifecycle.post_start.present().is_some())
}

fn shift(list: &Pointer, from: usize, to: usize, operations: &mut Operations) {
    if from != to {
        operations.shift(&list.index(from), &list.index(to));
    }
}
