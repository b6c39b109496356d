//! Writes the patch of a pod that passed every gate.
//!
//! Operations on the user's own containers come first, while indices are still those of the pod as it came.

use super::{
    Injector, Owner,
    annotations::{self, Wishes},
    judge::Accepted,
    lax::{Slot, Text, write_text},
    metadata, order,
    order::Place,
    patch::{Operations, Pointer},
    pod::{Container, PodView},
    probes::{self, Records},
    reason::{Warning, WarningCode},
    record::Record,
    resources,
    sidecar::{self, Own},
    workload_api,
};

/// A patch in the making.
struct Draft<'p, 'a> {
    pod: &'p PodView<'a>,
    operations: Operations,
    record: Record,
    warnings: &'p mut Vec<Warning>,
}

impl Injector {
    /// The patch as JSON.
    pub(super) fn render(
        &self,
        pod: &PodView<'_>,
        accepted: &Accepted<'_>,
        owner: &Owner,
        warnings: &mut Vec<Warning>,
    ) -> Vec<u8> {
        let Accepted {
            wishes,
            shares,
            native,
            volumes,
        } = accepted;
        let mut draft = Draft::new(pod, volumes, warnings);
        if !native {
            draft.warn_of_classic_order();
        }
        let ahead = order::ahead(pod, *native, &wishes.run_before);
        let records = draft.hand_over(wishes, ahead);
        resources::pad_pod(pod, shares, &mut draft.record, &mut draft.operations);
        draft.add_pull_secrets(&self.settings.image.pull_secrets);
        self.add_volumes(pod, volumes, &mut draft.operations);
        let mut additions = metadata::additions(
            pod,
            wishes,
            &self.settings,
            *native,
            &mut draft.record,
            draft.warnings,
        );

        // The record is complete from here on.
        let own = Own {
            app_containers: &app_containers(pod),
            log: &sidecar::log_levels(wishes),
            owner: &owner.path(),
            ports: &app_ports(pod),
            probes: &records.to_json(),
            prometheus: &additions.prometheus,
            restore: &draft.record.to_json(),
            workload: &owner.name,
        };
        let probed: Vec<u16> = order::sidecars_before(pod, ahead)
            .flat_map(probes::probed_ports)
            .collect();
        let init = self
            .fragments
            .init(&wishes.capture.to_argument(&probed), shares);
        let proxy = self.fragments.proxy(wishes, *native, shares, &own);
        let place = match native {
            true => Place::Native { ahead },
            false => Place::Classic { hold: wishes.hold },
        };
        order::add(pod, [&init, &proxy], place, &mut draft.operations);
        let hash = hash_of([&init, &proxy], &self.fragments.volumes);
        additions.set_status(&self.settings, &hash, *native, &draft.record);
        metadata::write(pod, &additions, &mut draft.operations);
        draft.operations.into_json()
    }

    /// The volumes of ours that are not `present`.
    pub(super) fn add_volumes(
        &self,
        pod: &PodView<'_>,
        present: &[&str],
        operations: &mut Operations,
    ) {
        let missing = self
            .fragments
            .volumes
            .iter()
            .filter(|(name, _)| !present.contains(name));
        let missing: Vec<&str> = missing.map(|(_, json)| json.as_str()).collect();
        let none = pod
            .spec
            .present()
            .is_none_or(|spec| spec.volumes.is_missing());
        append(
            &Pointer::new(&["spec", "volumes"]),
            none,
            &missing,
            operations,
        );
    }
}

impl<'p, 'a> Draft<'p, 'a> {
    /// Nothing is changed yet; `volumes` of ours are the pod's own.
    fn new(pod: &'p PodView<'a>, volumes: &[&str], warnings: &'p mut Vec<Warning>) -> Self {
        let volumes = volumes.iter().map(|&name| name.to_owned()).collect();
        let record = Record {
            volumes,
            ..Record::default()
        };
        Self {
            pod,
            operations: Operations::default(),
            record,
            warnings,
        }
    }

    /// Probes go to the agent, and the Workload API to containers that ask for it.
    fn hand_over(&mut self, wishes: &Wishes<'_>, ahead: usize) -> Records {
        let mut records = Records::default();
        let mut raw = false;
        for (container, pointer) in order::behind(self.pod, ahead) {
            if wishes.rewrite_probes {
                probes::rewrite(
                    container,
                    &pointer,
                    &mut records,
                    &mut self.operations,
                    self.warnings,
                );
            } else {
                raw |= probes::has_networked(container);
            }
            if wishes.workload_api {
                workload_api::offer(container, &pointer, &mut self.record, &mut self.operations);
            }
        }
        if raw {
            self.warnings.push(Warning::new(
                WarningCode::ProbesNotRewritten,
                format_args!(
                    "strict mutual TLS refuses the kubelet's probes ({})",
                    annotations::REWRITE_PROBES
                ),
            ));
        }
        records
    }

    fn warn_of_classic_order(&mut self) {
        if self.pod.ends() {
            self.warnings.push(Warning::new(
                WarningCode::ClassicJob,
                format_args!(
                    "the pod never completes: its sidecar is no native one ({})",
                    annotations::NATIVE_SIDECAR
                ),
            ));
        }
        let inits = self.pod.init_containers().iter().filter_map(Slot::present);
        let names: Vec<_> = inits.filter_map(Container::name).collect();
        if !names.is_empty() {
            self.warnings.push(Warning::new(
                WarningCode::ClassicInitNetwork,
                format_args!(
                    "outside the mesh, before the sidecar: {}",
                    names.join(", ").escape_debug()
                ),
            ));
        }
    }

    fn add_pull_secrets(&mut self, wanted: &[String]) {
        let there = self.pod.spec.present().map(|spec| &spec.pull_secrets);
        let named = |name: &str| {
            let mut secrets = there
                .into_iter()
                .flat_map(|list| list.items())
                .filter_map(Slot::present);
            secrets.any(|secret| secret.name.text() == Some(name))
        };
        let missing: Vec<String> = wanted.iter().filter(|name| !named(name)).cloned().collect();
        let items: Vec<String> = missing.iter().map(|name| named_object(name)).collect();
        let none = there.is_none_or(Slot::is_missing);
        append(
            &Pointer::new(&["spec", "imagePullSecrets"]),
            none,
            &items,
            &mut self.operations,
        );
        self.record.pull_secrets = missing;
    }
}

fn named_object(name: &str) -> String {
    let mut json = String::from("{\"name\":");
    write_text(name, &mut json);
    json.push('}');
    json
}

/// Appends to a list; one that is not there is written whole.
fn append<T: AsRef<str>>(list: &Pointer, none: bool, items: &[T], operations: &mut Operations) {
    if none && !items.is_empty() {
        let items: Vec<&str> = items.iter().map(AsRef::as_ref).collect();
        operations.add(list, &format!("[{}]", items.join(",")));
    } else {
        items
            .iter()
            .for_each(|item| operations.add(&list.end(), item.as_ref()));
    }
}

/// The value of `MALHA_APP_CONTAINERS`.
fn app_containers(pod: &PodView<'_>) -> String {
    let containers = pod.containers().iter().filter_map(Slot::present);
    let names: Vec<&str> = containers.filter_map(Container::name).collect();
    serde_json::to_string(&names).expect("strings always serialise")
}

/// The value of `MALHA_PORTS`: what the application says it listens on.
fn app_ports(pod: &PodView<'_>) -> String {
    #[derive(serde::Serialize)]
    #[serde(rename_all = "camelCase")]
    struct AppPort<'p> {
        container_port: u16,
        #[serde(skip_serializing_if = "Option::is_none")]
        name: Option<Text<'p>>,
        protocol: Text<'p>,
    }
    let containers = pod.containers().iter().filter_map(Slot::present);
    let ports = containers.flat_map(Container::ports).filter_map(|port| {
        let number = u16::try_from(*port.number.present()?).ok();
        Some(AppPort {
            container_port: number.filter(|number| *number != 0)?,
            name: port.name.into_present(),
            protocol: port
                .protocol
                .into_present()
                .unwrap_or(Text::Borrowed("TCP")),
        })
    });
    serde_json::to_string(&ports.collect::<Vec<_>>()).expect("numbers and strings always serialise")
}

/// Tells two injections apart: the first half of SHA-256 over all that was added.
fn hash_of(containers: [&str; 2], volumes: &[(&'static str, String)]) -> String {
    use aws_lc_rs::digest::{Context, SHA256};
    let mut context = Context::new(&SHA256);
    let volumes = volumes.iter().map(|(_, json)| json.as_str());
    containers
        .into_iter()
        .chain(volumes)
        .for_each(|part| context.update(part.as_bytes()));
    let digest = context.finish();
    digest
        .as_ref()
        .iter()
        .take(metadata::LENGTH_OF_HASH / 2)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
