//! A second call for a pod that an earlier one has injected: other webhooks may have added containers since.
//!
//! Nothing of ours is rendered again and nothing is removed: containers that came since are completed, and the order
//! is restored.

use super::{
    Answer, Injector, Patch, Verdict,
    annotations::{PROXY_IMAGE, REWRITE_PROBES, RUN_BEFORE, WORKLOAD_API, names, shown},
    capture,
    judge::Again,
    lax::write_text,
    order,
    ours::{self, Ours},
    patch::{Operations, Pointer},
    pod::PodView,
    probes::{self, Records},
    reason::{Reason, SkipReason, Warning, WarningCode},
    record::Record,
    workload_api,
};

impl Injector {
    /// Completes what the earlier call did.
    pub(super) fn complete(&self, pod: &PodView<'_>, again: &Again<'_, '_>) -> Answer {
        let mut warnings: Vec<Warning> = self.other_version(pod, &again.ours).into_iter().collect();
        let mut operations = Operations::default();
        let first = names(pod.annotation(RUN_BEFORE).unwrap_or_default());
        let ahead = order::ahead(pod, again.ours.native, &first);
        complete_containers(pod, &again.ours, ahead, &mut operations, &mut warnings);
        exclude_probed_ports(pod, &again.ours, ahead, &mut operations);
        self.add_volumes(pod, &again.volumes, &mut operations);
        order::restore(pod, &again.ours, ahead, &mut operations);
        let verdict = match operations.is_empty() {
            true => Verdict::Skip(SkipReason::AlreadyInjected),
            false => Verdict::Patch(Patch {
                json: operations.into_json(),
                reason: Reason::Reinvoked,
            }),
        };
        Answer { verdict, warnings }
    }

    fn other_version(&self, pod: &PodView<'_>, ours: &Ours<'_, '_>) -> Option<Warning> {
        let image = ours.proxy.image.text().unwrap_or_default();
        let wanted = pod
            .annotation(PROXY_IMAGE)
            .unwrap_or(&self.settings.image.proxy);
        (image != wanted).then(|| {
            let image = shown(image);
            Warning::new(
                WarningCode::OtherVersion,
                format_args!("the sidecar stays as it is, of another version: {image}"),
            )
        })
    }
}

/// Rewrites and records the probes that came since, and offers them the Workload API.
fn complete_containers(
    pod: &PodView<'_>,
    ours: &Ours<'_, '_>,
    ahead: usize,
    operations: &mut Operations,
    warnings: &mut Vec<Warning>,
) {
    let rewrite = pod.annotation(REWRITE_PROBES) != Some("false");
    let offer = pod.annotation(WORKLOAD_API) == Some("true");
    let mut records = Records::of_earlier_call(&ours.probes);
    let mut record = ours::variable(ours.proxy, ours::RESTORE_VARIABLE)
        .and_then(|(_, json)| serde_json::from_str::<Record>(&json).ok());
    let known = record.clone();
    for (container, pointer) in order::behind(pod, ahead) {
        if rewrite {
            probes::rewrite(container, &pointer, &mut records, operations, warnings);
        }
        if let Some(record) = record.as_mut().filter(|_| offer) {
            workload_api::offer(container, &pointer, record, operations);
        }
    }
    if records.have_grown() {
        replace_variable(ours, ours::PROBES_VARIABLE, &records.to_json(), operations);
    }
    if let Some(record) = record.filter(|record| known.as_ref() != Some(record)) {
        replace_variable(ours, ours::RESTORE_VARIABLE, &record.to_json(), operations);
    }
}

/// Native sidecars that came since and start before ours are probed by the kubelet itself, which the redirection must
/// let in.
fn exclude_probed_ports(
    pod: &PodView<'_>,
    ours: &Ours<'_, '_>,
    ahead: usize,
    operations: &mut Operations,
) {
    let probed: Vec<u16> = order::sidecars_before(pod, ahead)
        .flat_map(probes::probed_ports)
        .collect();
    let args = ours.init.args();
    let Some((at, argument)) = args.items().iter().enumerate().next_back() else {
        return;
    };
    if let Some(changed) = argument
        .text()
        .and_then(|argument| capture::with_probed(argument, &probed))
    {
        let init = Pointer::new(&["spec", "initContainers"]).index(ours.init_at);
        replace_text(&init.key("args").index(at), &changed, operations);
    }
}

fn replace_text(pointer: &Pointer, text: &str, operations: &mut Operations) {
    let mut json = String::new();
    write_text(text, &mut json);
    operations.replace(pointer, &json);
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
    let proxy = Pointer::new(&["spec", list]).index(ours.proxy_at);
    replace_text(&proxy.key("env").index(at).key("value"), value, operations);
}
