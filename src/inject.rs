//! Decides whether a pod gets a sidecar, and how the pod changes.
//!
//! pod (raw JSON) + the entry that called + settings -> [`Answer`] { verdict, warnings }

pub mod advice;
pub mod capture;
pub mod explain;
pub mod quantity;
pub mod reason;
pub mod select;
pub mod settings;
pub mod uninject;
pub mod workload;

mod again;
mod annotations;
mod gates;
mod lax;
mod metadata;
mod ours;
mod patch;
mod pod;
mod probes;
mod record;
mod resources;
mod sidecar;
mod workload_api;

use std::collections::BTreeMap;

use self::{
    annotations::Wishes,
    gates::Candidate,
    lax::{Slot, write_text},
    ours::Ours,
    patch::{Operations, Pointer},
    pod::{Container, PodView},
    probes::Records,
    record::Record,
    resources::Shares,
    settings::NativeSetting,
    sidecar::{Fragments, Own},
};
pub use metadata::Owner;
pub use reason::{DenyReason, Reason, SkipReason, Warning, WarningCode};
pub use select::Entry;
pub use settings::{InjectSettings, SettingsError};

/// Operator's settings with everything that does not depend on a pod serialised beforehand.
#[derive(Debug)]
pub struct Injector {
    settings: InjectSettings,
    fragments: Fragments,
}

/// What is known about a pod besides the pod.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    /// Which webhook entry selected the pod.
    pub entry: Entry,
    /// The namespace of the request (authoritative; the object's own is often empty).
    pub namespace: &'a str,
    /// Minor version of the oldest kubelet, where a watch of nodes has told it (`Some(33)` for 1.33).
    pub oldest_kubelet: Option<u32>,
}

/// What is known about a namespace, for selection, advice and `explain`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceFacts {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
}

impl NamespaceFacts {
    /// A namespace whose every pod is selected, for when its labels are not known.
    pub fn enabled(name: &str) -> Self {
        let labels = [
            (select::INJECTION, "enabled"),
            (select::NAMESPACE_NAME, name),
        ];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
        Self {
            name: name.to_owned(),
            labels: labels.into_iter().collect(),
        }
    }
}

/// What the webhook may know about the cluster without asking it: watched beforehand, never read on the way.
pub trait ClusterFacts: Send + Sync {
    /// Minor version of the oldest kubelet (`Some(33)` for 1.33); `None` while unknown.
    fn oldest_kubelet(&self) -> Option<u32>;
    /// A namespace's labels, for advice only: no decision about a pod hangs on them.
    fn namespace(&self, name: &str) -> Option<NamespaceFacts>;
}

/// The whole answer for one pod.
#[derive(Debug)]
pub struct Answer {
    /// What happens to the pod.
    pub verdict: Verdict,
    /// What its author should know.
    pub warnings: Vec<Warning>,
}

/// Why no decision about a pod is possible.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// Not UTF-8, of which JSON is made.
    #[error("the pod is not UTF-8")]
    NotUtf8(#[from] std::str::Utf8Error),
    /// Not one JSON value, or a key that is read stands in it twice.
    #[error("the pod is not readable as JSON")]
    NotJson(#[from] serde_json::Error),
}

/// What the webhook answers for one pod.
#[derive(Debug)]
pub enum Verdict {
    /// Operations that only add or replace what is ours.
    Patch(Patch),
    /// The pod goes in as it is.
    Skip(SkipReason),
    /// The author must change something; the message says what.
    Deny(Denial),
}

/// A JSON Patch (RFC 6902), serialised.
#[derive(Debug)]
pub struct Patch {
    /// The operations as a JSON array.
    pub json: Vec<u8>,
    /// `Injected`, or `Reinvoked` where an earlier call's work was completed.
    pub reason: Reason,
}

/// Why a pod is refused, and what its author must change.
#[derive(Debug)]
pub struct Denial {
    /// The code.
    pub reason: DenyReason,
    /// The object, the fault, the way out.
    pub message: String,
}

impl Verdict {
    /// The one code of this decision.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Patch(patch) => patch.reason,
            Self::Skip(reason) => Reason::from(*reason),
            Self::Deny(denial) => Reason::from(denial.reason),
        }
    }
}

impl Default for Injector {
    /// With the embedded settings.
    fn default() -> Self {
        Self::new(InjectSettings::embedded())
    }
}

impl Injector {
    /// Prepares the fragments.
    pub fn new(settings: InjectSettings) -> Self {
        let fragments = Fragments::new(&settings);
        Self {
            settings,
            fragments,
        }
    }

    /// The settings in force.
    pub fn settings(&self) -> &InjectSettings {
        &self.settings
    }

    /// Decides for one pod, given as the raw JSON of `request.object`.
    ///
    /// # Errors
    /// When the bytes are not one JSON value, or a key that we read stands in it twice: the request is at fault, not
    /// the pod.
    pub fn inject(&self, pod: &[u8], call: &Call<'_>) -> Result<Answer, PodError> {
        Ok(self.decide(&PodView::parse(pod)?, call, None))
    }

    /// Decides for the pods of a workload, given its template (`metadata` and `spec`).
    ///
    /// # Errors
    /// As [`Self::inject`].
    pub fn inject_template(
        &self,
        template: &[u8],
        call: &Call<'_>,
        owner: &Owner,
    ) -> Result<Answer, PodError> {
        Ok(self.decide(&PodView::parse(template)?, call, Some(owner)))
    }

    /// What becomes of a pod that is created in this namespace: the API server's selection, then the decision.
    /// `owner` is given for a workload's template.
    ///
    /// # Errors
    /// As [`Self::inject`].
    pub fn rehearse(
        &self,
        pod: &[u8],
        namespace: &NamespaceFacts,
        oldest_kubelet: Option<u32>,
        owner: Option<&Owner>,
    ) -> Result<Answer, PodError> {
        let pod = PodView::parse(pod)?;
        let selection = select::select(namespace, &pod.facts(), &self.settings.revision);
        Ok(match selection.outcome {
            Err(reason) => Answer {
                verdict: Verdict::Skip(reason),
                warnings: Vec::new(),
            },
            Ok(entry) => {
                let call = Call {
                    entry,
                    namespace: &namespace.name,
                    oldest_kubelet,
                };
                self.decide(&pod, &call, owner)
            }
        })
    }

    fn decide(&self, pod: &PodView<'_>, call: &Call<'_>, owner: Option<&Owner>) -> Answer {
        let mut warnings = Vec::new();
        match self.judge(pod, call, &mut warnings) {
            Ok(Judgement::Again { ours, volumes }) => again::complete(self, pod, &ours, &volumes),
            Ok(Judgement::First(accepted)) => {
                let json = self.render(pod, &accepted, owner, &mut warnings);
                let verdict = Verdict::Patch(Patch {
                    json,
                    reason: Reason::Injected,
                });
                Answer { verdict, warnings }
            }
            Err(verdict) => Answer { verdict, warnings },
        }
    }

    /// Every gate in order.
    fn judge<'p, 'a>(
        &'p self,
        pod: &'p PodView<'a>,
        call: &Call<'_>,
        warnings: &mut Vec<Warning>,
    ) -> Result<Judgement<'p, 'a>, Verdict> {
        let candidate = Candidate { pod, call };
        gates::pass(&gates::FIRST, &candidate)?;
        let ours = self.presence(pod)?;
        if let (Some(ours), volumes) = ours {
            return Ok(Judgement::Again { ours, volumes });
        }
        let accepted = self.accept(pod, call, ours.1, warnings)?;
        gates::pass(&gates::LAST, &candidate)?;
        Ok(Judgement::First(accepted))
    }

    /// Rows 18 and 19: what of ours is there already.
    fn presence<'p, 'a>(
        &self,
        pod: &'p PodView<'a>,
    ) -> Result<(Option<Ours<'p, 'a>>, Vec<&'static str>), Denial> {
        let ours = ours::presence(pod)?;
        let volumes = ours::volumes_present(pod, &self.fragments.volumes, ours.is_some())?;
        Ok((ours, volumes))
    }

    /// Row 20: what the annotations ask for can be done.
    fn accept<'p>(
        &'p self,
        pod: &'p PodView<'_>,
        call: &Call<'_>,
        volumes: Vec<&'static str>,
        warnings: &mut Vec<Warning>,
    ) -> Result<Accepted<'p>, Denial> {
        let wishes = annotations::read(
            pod.annotations(),
            &pod.init_names(),
            &self.settings,
            warnings,
        )?;
        let shares = resources::shares(pod, &wishes, &self.settings)?;
        Ok(Accepted {
            native: is_native(pod, wishes.native, call.oldest_kubelet),
            wishes,
            shares,
            volumes,
        })
    }

    /// Writes the patch of a pod that passed every gate.
    fn render(
        &self,
        pod: &PodView<'_>,
        accepted: &Accepted<'_>,
        owner: Option<&Owner>,
        warnings: &mut Vec<Warning>,
    ) -> Vec<u8> {
        let Accepted {
            wishes,
            shares,
            native,
            volumes,
        } = accepted;
        let mut operations = Operations::default();
        let mut record = Record {
            volumes: volumes.iter().map(|&name| name.to_owned()).collect(),
            ..Record::default()
        };
        let users: Vec<_> = pod.init_containers().iter().collect();
        let ahead = match native {
            true => ahead_of_us(users.iter().copied(), &wishes.run_before),
            false => users.len(),
        };
        warn_of_classic_order(pod, *native, warnings);
        let records = self.hand_over(pod, wishes, ahead, &mut record, &mut operations, warnings);
        let pull_secrets = self.missing_pull_secrets(pod, &mut record);
        resources::pad_pod(pod, shares, &mut record, &mut operations);
        let mut additions = metadata::additions(pod, wishes, &self.settings, &mut record);

        let derived;
        let owner = match owner {
            Some(owner) => owner,
            None => {
                derived = Owner::of_pod(pod);
                &derived
            }
        };
        let proxy = self.fragments.proxy(
            wishes,
            *native,
            shares,
            &Own {
                app_containers: &app_containers(pod),
                log: &sidecar::log_levels(wishes),
                owner: &owner.path(),
                ports: &app_ports(pod),
                probes: &probes::to_json(&records),
                prometheus: &additions.prometheus,
                restore: &record.to_json(),
                workload: &owner.name,
            },
        );
        let init = self.fragments.init(
            &wishes.capture.to_argument(&ports_ahead(pod, ahead)),
            shares,
        );

        self.add_containers(
            pod,
            *native,
            wishes.hold,
            ahead,
            [&init, &proxy],
            &mut operations,
        );
        self.add_volumes(pod, volumes, &mut operations);
        append(pod, "imagePullSecrets", &pull_secrets, &mut operations);
        if record
            .annotations
            .iter()
            .any(|key| key == annotations::STATUS)
        {
            let hash = hash_of([&init, &proxy], &self.fragments.volumes);
            let status = metadata::status(&self.settings, &hash, *native, &record);
            additions.annotations.insert(annotations::STATUS, status);
        }
        metadata::write(pod, &additions, &mut operations);
        operations.into_json()
    }

    /// Probes go to the agent, and the Workload API to containers that ask for it.
    fn hand_over(
        &self,
        pod: &PodView<'_>,
        wishes: &Wishes<'_>,
        ahead: usize,
        record: &mut Record,
        operations: &mut Operations,
        warnings: &mut Vec<Warning>,
    ) -> Records {
        let mut records = Records::new();
        let mut raw = false;
        for (container, pointer) in behind_the_proxy(pod, ahead) {
            if wishes.rewrite_probes {
                probes::rewrite(container, &pointer, &mut records, operations, warnings);
            } else {
                raw |= probes::has_networked(container);
            }
            if wishes.workload_api {
                workload_api::offer(container, &pointer, record, operations);
            }
        }
        if raw {
            warnings.push(Warning::new(
                WarningCode::ProbesNotRewritten,
                format_args!(
                    "probes stay as they are ({}); strict mutual TLS refuses them",
                    annotations::REWRITE_PROBES
                ),
            ));
        }
        records
    }

    fn add_containers(
        &self,
        pod: &PodView<'_>,
        native: bool,
        hold: bool,
        ahead: usize,
        [init, proxy]: [&str; 2],
        operations: &mut Operations,
    ) {
        let inits = Pointer::new(&["spec", "initContainers"]);
        let none = pod
            .spec
            .present()
            .is_none_or(|spec| spec.init_containers.is_missing());
        match (native, none) {
            (true, true) => operations.add(&inits, &format!("[{init},{proxy}]")),
            (false, true) => operations.add(&inits, &format!("[{init}]")),
            (true, false) => {
                operations.add(&inits.index(ahead), init);
                operations.add(&inits.index(ahead + 1), proxy);
            }
            (false, false) => operations.add(&inits.end(), init),
        }
        if !native {
            let containers = Pointer::new(&["spec", "containers"]);
            let at = if hold {
                containers.index(0)
            } else {
                containers.end()
            };
            operations.add(&at, proxy);
        }
    }

    /// The volumes of ours that are not `present`.
    fn add_volumes(&self, pod: &PodView<'_>, present: &[&str], operations: &mut Operations) {
        let missing = self
            .fragments
            .volumes
            .iter()
            .filter(|(name, _)| !present.contains(name));
        let missing: Vec<&str> = missing.map(|(_, json)| json.as_str()).collect();
        append(pod, "volumes", &missing, operations);
    }

    fn missing_pull_secrets(&self, pod: &PodView<'_>, record: &mut Record) -> Vec<String> {
        let there = pod
            .spec
            .present()
            .map_or(&[][..], |spec| spec.pull_secrets.items());
        let named = |name: &str| {
            there
                .iter()
                .filter_map(Slot::present)
                .any(|secret| secret.name.text() == Some(name))
        };
        let wanted = self
            .settings
            .image
            .pull_secrets
            .iter()
            .filter(|name| !named(name));
        let missing: Vec<String> = wanted.cloned().collect();
        record.pull_secrets.clone_from(&missing);
        let item = |name: &String| {
            let mut json = String::from("{\"name\":");
            write_text(name, &mut json);
            json.push('}');
            json
        };
        missing.iter().map(item).collect()
    }
}

/// A pod that was not stopped.
enum Judgement<'p, 'a> {
    /// Nothing of ours is there yet.
    First(Accepted<'p>),
    /// An earlier call injected it; some volumes of ours are there.
    Again {
        ours: Ours<'p, 'a>,
        volumes: Vec<&'static str>,
    },
}

/// What a pod gets.
struct Accepted<'p> {
    wishes: Wishes<'p>,
    shares: Shares,
    native: bool,
    /// Volumes of ours that the pod has already.
    volumes: Vec<&'static str>,
}

impl From<Denial> for Verdict {
    fn from(denial: Denial) -> Self {
        Self::Deny(denial)
    }
}

/// The oldest minor version whose kubelets start native sidecars by default (KEP-753: beta), so that pods that end can.
const NATIVE_FOR_JOBS: u32 = 29;
/// The one in which they are stable.
const NATIVE_FOR_ALL: u32 = 33;

fn is_native(pod: &PodView<'_>, setting: NativeSetting, oldest_kubelet: Option<u32>) -> bool {
    let needed = if ends(pod) {
        NATIVE_FOR_JOBS
    } else {
        NATIVE_FOR_ALL
    };
    match setting {
        NativeSetting::True => true,
        NativeSetting::False => false,
        NativeSetting::Auto => oldest_kubelet.is_none_or(|minor| minor >= needed),
    }
}

/// The pod is done when its containers are; a sidecar among them would keep it for ever.
fn ends(pod: &PodView<'_>) -> bool {
    let policy = pod
        .spec
        .present()
        .and_then(|spec| spec.restart_policy.text());
    policy.is_some_and(|policy| policy != "Always")
}

fn warn_of_classic_order(pod: &PodView<'_>, native: bool, warnings: &mut Vec<Warning>) {
    if native {
        return;
    }
    if ends(pod) {
        warnings.push(Warning::new(
            WarningCode::ClassicJob,
            format_args!(
                "the pod never completes: its sidecar is no native one ({})",
                annotations::NATIVE_SIDECAR
            ),
        ));
    }
    let names: Vec<_> = pod
        .init_containers()
        .iter()
        .filter_map(Slot::present)
        .filter_map(Container::name)
        .collect();
    if !names.is_empty() {
        warnings.push(Warning::new(
            WarningCode::ClassicInitNetwork,
            format_args!(
                "outside the mesh, before the sidecar: {}",
                names.join(", ").escape_debug()
            ),
        ));
    }
}

/// How many of the user's init containers stay ahead of ours: up to the last that is named.
fn ahead_of_us<'c, 'a: 'c>(
    users: impl Iterator<Item = &'c Slot<Container<'a>>>,
    run_before: &[&str],
) -> usize {
    let named = |slot: &Slot<Container<'_>>| {
        slot.present()
            .and_then(Container::name)
            .is_some_and(|name| run_before.contains(&name))
    };
    users
        .enumerate()
        .filter(|(_, slot)| named(slot))
        .last()
        .map_or(0, |(at, _)| at + 1)
}

/// The containers that start after the proxy and stay, each with where it stands.
fn behind_the_proxy<'p, 'a>(
    pod: &'p PodView<'a>,
    ahead: usize,
) -> impl Iterator<Item = (&'p Container<'a>, Pointer)> {
    let inits = Pointer::new(&["spec", "initContainers"]);
    let containers = Pointer::new(&["spec", "containers"]);
    let sidecars = pod.init_containers().iter().enumerate().skip(ahead);
    let sidecars = sidecars.filter_map(move |(at, slot)| Some((slot.present()?, inits.index(at))));
    let sidecars = sidecars.filter(|(container, _)| container.is_native_sidecar());
    let containers = pod
        .containers()
        .iter()
        .enumerate()
        .filter_map(move |(at, slot)| Some((slot.present()?, containers.index(at))));
    sidecars.chain(containers)
}

/// Ports that the kubelet dials itself in native sidecars ahead of ours: their start-up probes must pass before the
/// agent runs.
fn ports_ahead(pod: &PodView<'_>, ahead: usize) -> Vec<u16> {
    let first = pod
        .init_containers()
        .iter()
        .take(ahead)
        .filter_map(Slot::present);
    first
        .filter(|container| container.is_native_sidecar())
        .flat_map(probes::probed_ports)
        .collect()
}

/// Appends to a list of the pod's; one that is not there is written whole.
fn append<T: AsRef<str>>(pod: &PodView<'_>, list: &str, items: &[T], operations: &mut Operations) {
    if items.is_empty() {
        return;
    }
    let missing = pod.spec.present().is_none_or(|spec| match list {
        "volumes" => spec.volumes.is_missing(),
        _ => spec.pull_secrets.is_missing(),
    });
    let pointer = Pointer::new(&["spec", list]);
    if missing {
        let items: Vec<&str> = items.iter().map(AsRef::as_ref).collect();
        operations.add(&pointer, &format!("[{}]", items.join(",")));
    } else {
        let end = pointer.end();
        items
            .iter()
            .for_each(|item| operations.add(&end, item.as_ref()));
    }
}

/// The value of `MALHA_APP_CONTAINERS`.
fn app_containers(pod: &PodView<'_>) -> String {
    let names: Vec<&str> = pod
        .containers()
        .iter()
        .filter_map(Slot::present)
        .filter_map(Container::name)
        .collect();
    serde_json::to_string(&names).expect("strings always serialise")
}

/// The value of `MALHA_PORTS`: what the application says it listens on.
fn app_ports(pod: &PodView<'_>) -> String {
    #[derive(serde::Serialize)]
    #[serde(rename_all = "camelCase")]
    struct AppPort<'p> {
        container_port: u16,
        #[serde(skip_serializing_if = "Option::is_none")]
        name: Option<&'p str>,
        protocol: &'p str,
    }
    let containers = pod.containers().iter().filter_map(Slot::present);
    let ports = containers.flat_map(Container::ports).filter_map(|port| {
        Some(AppPort {
            container_port: u16::try_from(*port.number.present()?)
                .ok()
                .filter(|port| *port != 0)?,
            name: port.name.text(),
            protocol: port.protocol.text().unwrap_or("TCP"),
        })
    });
    serde_json::to_string(&ports.collect::<Vec<_>>()).expect("numbers and strings always serialise")
}

/// Tells two injections apart: the first half of SHA-256 over all that was added.
fn hash_of(containers: [&str; 2], volumes: &[(&'static str, String)]) -> String {
    use aws_lc_rs::digest::{Context, SHA256};
    let mut context = Context::new(&SHA256);
    for part in containers
        .into_iter()
        .chain(volumes.iter().map(|(_, json)| json.as_str()))
    {
        context.update(part.as_bytes());
    }
    let digest = context.finish();
    digest
        .as_ref()
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests;
