//! The SPIFFE Workload API in the application's own containers, where the pod asks for it.

use super::{
    lax::{Slot, write_text},
    ours,
    patch::{Operations, Pointer},
    pod::Container,
    record::Record,
};

/// Mounts the socket's directory and sets its variable in one container that stands at `pointer`; what is there
/// already stays.
pub(super) fn offer(
    container: &Container<'_>,
    pointer: &Pointer,
    record: &mut Record,
    operations: &mut Operations,
) {
    let Some(name) = container.name() else {
        return;
    };
    let mounts = container.volume_mounts();
    let mounted = mounts.items().iter().filter_map(Slot::present);
    if !mounts.is_odd()
        && !mounted
            .into_iter()
            .any(|mount| mount.path.text() == Some(ours::WORKLOAD_API_DIRECTORY))
    {
        append(
            &pointer.key("volumeMounts"),
            mounts.is_missing(),
            &mount(),
            operations,
        );
        record.mounts.push(name.to_owned());
    }
    let env = container.env();
    let mut variables = env.items().iter().filter_map(Slot::present);
    if !env.is_odd()
        && !variables.any(|variable| variable.name.text() == Some(ours::WORKLOAD_API_VARIABLE))
    {
        append(
            &pointer.key("env"),
            env.is_missing(),
            &variable(),
            operations,
        );
        record.sockets.push(name.to_owned());
    }
}

fn append(list: &Pointer, missing: bool, item: &str, operations: &mut Operations) {
    match missing {
        true => operations.add(list, &format!("[{item}]")),
        false => operations.add(&list.end(), item),
    }
}

/// Only the socket's directory: the proxy's private key stands beside it.
fn mount() -> String {
    let mut out = String::from("{\"name\":");
    write_text(ours::RUN_VOLUME, &mut out);
    out.push_str(",\"mountPath\":");
    write_text(ours::WORKLOAD_API_DIRECTORY, &mut out);
    out.push_str(",\"readOnly\":true,\"subPath\":\"workload\"}");
    out
}

fn variable() -> String {
    let mut out = String::from("{\"name\":");
    write_text(ours::WORKLOAD_API_VARIABLE, &mut out);
    out.push_str(",\"value\":");
    write_text(ours::WORKLOAD_API_SOCKET, &mut out);
    out.push('}');
    out
}
