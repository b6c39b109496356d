//! The properties of every output, each a check of one case: input pod x = `case.before`, output y = `case.after`.
//!
//! A check says in words what does not hold. Those that call the injector again get it as the [`Subject`].

use std::collections::{BTreeMap, BTreeSet};

use malha::{
    inject::{Reason, SkipReason, WarningCode},
    redirect::Redirection,
};
use serde_json::{Map, Value, json};

use super::{
    case::{Case, Outcome, Subject},
    expected::{
        self, Expected, Fate, INIT, PROXY, VOLUMES, annotation, containers, handlers, list,
    },
    quantity::nano,
    restricted, strict,
};
use crate::{dice::Dice, pods};

pub(crate) type Check = fn(&Subject, &Case) -> Result<(), String>;

/// Fails with a formatted sentence unless the condition holds.
macro_rules! hold {
    ($condition:expr, $($words:tt)+) => {
        if !$condition {
            return Err(format!($($words)+));
        }
    };
}

/// The decision is that of the table, row by row.
pub(crate) fn decided(_: &Subject, case: &Case) -> Result<(), String> {
    if is_ours(&case.before) {
        return Ok(());
    }
    let expected = expected::decision(&case.before, case.setup);
    let agrees = match (&expected, &case.outcome) {
        (Expected::Skip(wanted), Outcome::Skipped(reason)) => wanted == reason,
        (Expected::Deny(wanted), Outcome::Denied { reason, .. }) => wanted.contains(reason),
        (Expected::Patch, Outcome::Patched { reason, .. }) => *reason == Reason::Injected,
        _ => false,
    };
    hold!(
        agrees,
        "expected {expected:?}, got {:?}",
        brief(&case.outcome)
    );
    Ok(())
}

/// A refusal says what to change, in words that fit into a terminal and hide nothing.
pub(crate) fn refusals_help(_: &Subject, case: &Case) -> Result<(), String> {
    if let Outcome::Denied { message, .. } = &case.outcome {
        hold!(message.len() > 20, "too short to help: {message:?}");
        hold!(
            !message.chars().any(char::is_control),
            "control characters in {message:?}"
        );
        hold!(message.chars().count() <= 1024, "too long: {message:?}");
    }
    Ok(())
}

/// Warnings are given when and only when there is something to say, in at most 120 characters.
pub(crate) fn warnings_are_told(_: &Subject, case: &Case) -> Result<(), String> {
    for (code, text) in &case.warnings {
        hold!(
            text.chars().count() <= 120,
            "{code} is over 120 characters: {text:?}"
        );
        hold!(
            !text.chars().any(char::is_control),
            "{code} holds control characters: {text:?}"
        );
    }
    if !case.is_patched() || is_ours(&case.before) {
        return Ok(());
    }
    let handlers = handlers(&case.before, &case.after);
    let any = |fate: Fate| handlers.iter().any(|handler| handler.fate == fate);
    let ignored = pods::IGNORED
        .iter()
        .any(|(key, _)| annotation(&case.before, key).is_some())
        || annotation(&case.before, "malha.io/status").is_some();
    let native = expected::native(&case.before, case.setup);
    let ends = !matches!(
        case.before["spec"]["restartPolicy"].as_str(),
        None | Some("Always")
    );
    let inits = list(&case.before["spec"]["initContainers"])
        .next()
        .is_some();
    let unknown = [
        "sidecar.istio.io/proxyCpu",
        "malha.io/hold-aplication",
        "traffic.sidecar.istio.io/excludeOutboundPort",
    ]
    .iter()
    .any(|key| annotation(&case.before, key).is_some());
    for (code, wanted) in [
        (WarningCode::ProbePortUnresolved, any(Fate::Unresolved)),
        (WarningCode::ProbeHostExternal, any(Fate::External)),
        (WarningCode::AnnotationIgnored, ignored),
        (WarningCode::AnnotationUnknown, unknown),
        (WarningCode::ClassicJob, !native && ends),
        (WarningCode::ClassicInitNetwork, !native && inits),
    ] {
        hold!(
            case.warned(code) == wanted,
            "warning {code}: expected {wanted}, got {:?}",
            case.warnings
        );
    }
    Ok(())
}

/// P3: exactly one proxy, where the order says.
pub(crate) fn p03_one_proxy_in_its_place(_: &Subject, case: &Case) -> Result<(), String> {
    if !case.is_patched() {
        return Ok(());
    }
    let names = |field: &str| -> Vec<&str> {
        list(&case.after["spec"][field])
            .map(|container| container["name"].as_str().unwrap_or(""))
            .collect()
    };
    let (inits, apps) = (names("initContainers"), names("containers"));
    let count = |name: &str| {
        inits
            .iter()
            .chain(&apps)
            .filter(|other| **other == name)
            .count()
    };
    hold!(
        count(PROXY) == 1,
        "{} containers are named {PROXY}",
        count(PROXY)
    );
    hold!(
        count(INIT) == 1,
        "{} containers are named {INIT}",
        count(INIT)
    );
    let redirected = inits
        .iter()
        .position(|name| *name == INIT)
        .ok_or("malha-init is no init container")?;
    let arguments = &case.after["spec"]["initContainers"][redirected]["args"];
    let argument = list(arguments).last().and_then(Value::as_str).unwrap_or("");
    if !is_ours(&case.before) {
        let read = Redirection::parse(argument);
        let settings = read.map_err(|error| format!("{INIT} cannot read {argument}: {error}"))?;
        let written = settings.to_argument();
        hold!(written == argument, "{argument} is read as {written}");
    }
    let native = inits.iter().position(|name| *name == PROXY);
    if !is_ours(&case.before) {
        let wanted = expected::native(&case.before, case.setup);
        hold!(
            native.is_some() == wanted,
            "native order: expected {wanted}"
        );
    }
    match native {
        Some(at) => {
            hold!(
                at == redirected + 1,
                "{PROXY} at {at} is not right after {INIT} at {redirected}"
            );
            let proxy = &case.after["spec"]["initContainers"][at];
            hold!(
                proxy["restartPolicy"] == "Always",
                "restartPolicy {}",
                proxy["restartPolicy"]
            );
            if !is_ours(&case.before) {
                let wanted = ahead(&case.before);
                hold!(
                    inits[..redirected] == wanted[..],
                    "ahead of us: {:?}, not {wanted:?}",
                    &inits[..redirected]
                );
            }
        }
        None => {
            hold!(
                redirected + 1 == inits.len(),
                "{INIT} is not the last init container: {inits:?}"
            );
            let at = apps
                .iter()
                .position(|name| *name == PROXY)
                .ok_or("no proxy")?;
            let proxy = &case.after["spec"]["containers"][at];
            let hold = annotation(&case.before, "malha.io/hold-application") != Some("false");
            let wanted = if hold { 0 } else { apps.len() - 1 };
            hold!(at == wanted, "{PROXY} at {at} of {apps:?}, not at {wanted}");
            let waits = !proxy["lifecycle"]["postStart"].is_null();
            hold!(
                waits == hold,
                "postStart {}",
                proxy["lifecycle"]["postStart"]
            );
            hold!(
                proxy["restartPolicy"].is_null(),
                "restartPolicy of a container"
            );
        }
    }
    Ok(())
}

/// Init containers up to the last one that `malha.io/run-before` names.
fn ahead(pod: &Value) -> Vec<&str> {
    let wanted: Vec<&str> = annotation(pod, "malha.io/run-before")
        .unwrap_or("")
        .split(',')
        .collect();
    let names: Vec<&str> = list(&pod["spec"]["initContainers"])
        .map(|container| container["name"].as_str().unwrap_or(""))
        .collect();
    let end = names
        .iter()
        .rposition(|name| wanted.contains(name))
        .map_or(0, |last| last + 1);
    names[..end].to_vec()
}

/// P4: the user's containers are all there, in their order, as they were but for rewritten handlers and, where asked
/// for, the Workload API.
pub(crate) fn p04_user_containers_are_kept(_: &Subject, case: &Case) -> Result<(), String> {
    let handlers = handlers(&case.before, &case.after);
    let workload_api =
        annotation(&case.before, "malha.io/workload-api") == Some("true") && case.is_patched();
    for field in ["initContainers", "containers"] {
        let (before, after) = (users(&case.before, field), users(&case.after, field));
        hold!(
            before.len() == after.len(),
            "{field}: {} of the user's before, {} after",
            before.len(),
            after.len()
        );
        for (before, after) in before.into_iter().zip(after) {
            let name = before["name"].as_str().unwrap_or("");
            let mut restored = after.clone();
            for handler in handlers.iter().filter(|handler| handler.container == name) {
                if let Fate::Rewritten { path, .. } = &handler.fate {
                    rewritten_form(handler.value, at(after, handler.place), path)?;
                    *at_mut(&mut restored, handler.place) = handler.value.clone();
                }
            }
            if workload_api {
                let asked = field == "containers";
                let had = without_workload_api(&mut restored, before);
                hold!(
                    had || !asked,
                    "{name} has no Workload API although it was asked for"
                );
                hold!(
                    normal(&restored) == normal(before),
                    "{name} changed:\n{before}\n{after}"
                );
            } else {
                hold!(restored == *before, "{name} changed:\n{before}\n{after}");
            }
        }
    }
    Ok(())
}

/// The agent's handler in place of the user's.
fn rewritten_form(before: &Value, after: &Value, path: &str) -> Result<(), String> {
    let get = &after["httpGet"];
    hold!(get["path"] == *path, "rewritten to {get}, not to {path}");
    hold!(get["port"] == 15020, "rewritten to port {}", get["port"]);
    hold!(
        get["scheme"] == "HTTP",
        "rewritten with scheme {}",
        get["scheme"]
    );
    hold!(get.get("host").is_none(), "a host is left: {get}");
    hold!(
        after.get("tcpSocket").is_none() && after.get("grpc").is_none(),
        "a second handler is left: {after}"
    );
    let headers = normal(&before["httpGet"]["httpHeaders"]);
    hold!(
        normal(&get["httpHeaders"]) == headers,
        "headers changed: {get}"
    );
    Ok(())
}

/// Takes away what the Workload API needs; whether it was there.
fn without_workload_api(container: &mut Value, before: &Value) -> bool {
    let mut had = false;
    if let Some(mounts) = container["volumeMounts"].as_array_mut() {
        let count = mounts.len();
        mounts.retain(|mount| {
            !(mount["mountPath"] == "/run/malha/workload" && mount["readOnly"] == true)
        });
        had = mounts.len() + 1 == count;
    }
    let own = list(&before["env"]).any(|variable| variable["name"] == "SPIFFE_ENDPOINT_SOCKET");
    if !own && let Some(variables) = container["env"].as_array_mut() {
        let count = variables.len();
        variables.retain(|variable| variable["name"] != "SPIFFE_ENDPOINT_SOCKET");
        had &= variables.len() + 1 == count;
    }
    had
}

/// P5: what says how often and how patiently a probe is run stays; its timeout does not shrink.
pub(crate) fn p05_timing_of_probes_is_kept(_: &Subject, case: &Case) -> Result<(), String> {
    for handler in handlers(&case.before, &case.after) {
        let Some(container) =
            containers(&case.after).find(|other| other["name"] == handler.container)
        else {
            return Err(format!("{} is gone", handler.container));
        };
        let after = at(container, handler.place);
        let timing = |value: &Value| -> Map<String, Value> {
            let mut fields = value.as_object().cloned().unwrap_or_default();
            fields.retain(|key, _| {
                !["httpGet", "tcpSocket", "grpc", "exec", "timeoutSeconds"].contains(&key.as_str())
            });
            fields
        };
        hold!(
            timing(handler.value) == timing(after),
            "{} {:?}: {} became {after}",
            handler.container,
            handler.place,
            handler.value
        );
        let timeout = |value: &Value| value["timeoutSeconds"].as_i64().unwrap_or(1);
        hold!(
            timeout(after) >= timeout(handler.value),
            "{} {:?}: a shorter timeout: {after}",
            handler.container,
            handler.place
        );
    }
    Ok(())
}

/// P6: each rewritten handler has exactly one record, with a numeric port; no other record exists.
pub(crate) fn p06_every_rewritten_handler_is_recorded(
    _: &Subject,
    case: &Case,
) -> Result<(), String> {
    if !case.is_patched() {
        return Ok(());
    }
    let record = record(&case.after)?;
    let mut paths = BTreeSet::new();
    for handler in handlers(&case.before, &case.after) {
        let Fate::Rewritten { path, port } = handler.fate else {
            continue;
        };
        let entry = record
            .get(&path)
            .ok_or_else(|| format!("no record of {path} in {record:?}"))?;
        let kind = ["httpGet", "tcpSocket", "grpc"]
            .into_iter()
            .find(|kind| handler.value[*kind].is_object());
        let kind = kind.expect("it was rewritten");
        let (original, recorded) = (&handler.value[kind], &entry[kind]);
        hold!(
            recorded["port"] == port,
            "{path} is recorded with port {}, not {port}: {entry}",
            recorded["port"]
        );
        for field in ["path", "scheme", "httpHeaders", "service"] {
            hold!(
                normal(&recorded[field]) == normal(&original[field]),
                "{path}: {field} is recorded as {}, it was {}",
                recorded[field],
                original[field]
            );
        }
        paths.insert(path);
    }
    if is_ours(&case.before) {
        paths.extend(self::record(&case.before)?.into_keys());
    }
    let recorded: BTreeSet<String> = record.into_keys().collect();
    hold!(
        recorded == paths,
        "recorded {recorded:?}, rewritten {paths:?}"
    );
    Ok(())
}

/// The originals that the agent is told, by path.
pub(crate) fn record(pod: &Value) -> Result<BTreeMap<String, Value>, String> {
    let proxy = containers(pod)
        .find(|container| container["name"] == PROXY)
        .ok_or("no proxy")?;
    let variable = list(&proxy["env"]).find(|variable| variable["name"] == "MALHA_PROBES");
    let text = variable
        .and_then(|variable| variable["value"].as_str())
        .unwrap_or("{}");
    match strict::parse(text)? {
        Value::Object(fields) => Ok(fields.into_iter().collect()),
        other => Err(format!("MALHA_PROBES is {other}")),
    }
}

/// P7: nothing of the user's is replaced, but the scrape annotations and the merged list for the autoscaler.
pub(crate) fn p07_nothing_of_the_users_is_replaced(_: &Subject, case: &Case) -> Result<(), String> {
    let (x, y) = (&case.before, &case.after);
    let scrapes = annotation(x, "prometheus.io/scrape") != Some("false")
        && annotation(x, "prometheus.istio.io/merge-metrics") != Some("false");
    const EVICT: &str = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes";
    for (field, ours) in [
        ("labels", &["malha.io/", "security.istio.io/tlsMode"][..]),
        (
            "annotations",
            &[
                "malha.io/",
                "kubectl.kubernetes.io/default-",
                "prometheus.io/",
                EVICT,
            ],
        ),
    ] {
        let texts = |pod: &Value| {
            pod["metadata"][field]
                .as_object()
                .cloned()
                .unwrap_or_default()
        };
        let (before, after) = (texts(x), texts(y));
        for (key, value) in &before {
            let now = after
                .get(key)
                .ok_or_else(|| format!("{field} {key:?} is gone"))?;
            let replaced = match key.as_str() {
                "prometheus.io/scrape"
                | "prometheus.io/port"
                | "prometheus.io/path"
                | "prometheus.io/scheme" => scrapes,
                EVICT => {
                    let names = |value: &Value| -> Vec<String> {
                        value
                            .as_str()
                            .unwrap_or("")
                            .split(',')
                            .map(str::to_owned)
                            .filter(|name| !name.is_empty())
                            .collect()
                    };
                    let (had, has) = (names(value), names(now));
                    hold!(has.starts_with(&had), "{EVICT}: {had:?} became {has:?}");
                    hold!(
                        has.iter().collect::<BTreeSet<_>>().len() == has.len(),
                        "{EVICT}: twice in {has:?}"
                    );
                    true
                }
                _ => false,
            };
            hold!(
                replaced || now == value,
                "{field} {key:?}: {value} became {now}"
            );
        }
        for key in after.keys().filter(|key| !before.contains_key(*key)) {
            hold!(
                ours.iter().any(|prefix| key.starts_with(prefix)),
                "{field} {key:?} is not ours to add"
            );
        }
    }
    without(x, y, &["metadata", "spec"], "pod")?;
    without(
        &x["metadata"],
        &y["metadata"],
        &["labels", "annotations"],
        "metadata",
    )?;
    let lists = [
        "containers",
        "initContainers",
        "volumes",
        "imagePullSecrets",
        "resources",
    ];
    without(&x["spec"], &y["spec"], &lists, "spec")?;
    let volumes = |pod: &Value| -> Vec<Value> {
        list(&pod["spec"]["volumes"])
            .filter(|volume| !VOLUMES.iter().any(|name| volume["name"] == *name))
            .cloned()
            .collect()
    };
    hold!(
        volumes(x) == volumes(y),
        "volumes changed: {:?} became {:?}",
        volumes(x),
        volumes(y)
    );
    let secrets =
        |pod: &Value| -> Vec<Value> { list(&pod["spec"]["imagePullSecrets"]).cloned().collect() };
    hold!(
        secrets(y).starts_with(&secrets(x)),
        "imagePullSecrets changed"
    );
    Ok(())
}

/// Equal but for `fields`.
fn without(x: &Value, y: &Value, fields: &[&str], what: &str) -> Result<(), String> {
    let rest = |value: &Value| -> Map<String, Value> {
        let mut rest = value.as_object().cloned().unwrap_or_default();
        rest.retain(|key, _| !fields.contains(&key.as_str()));
        rest
    };
    hold!(
        rest(x) == rest(y),
        "{what} changed outside of what is ours:\n{:?}\n{:?}",
        rest(x),
        rest(y)
    );
    Ok(())
}

/// P8: names are unique, mounts resolve, ports do not collide.
pub(crate) fn p08_names_mounts_and_ports_fit(_: &Subject, case: &Case) -> Result<(), String> {
    if !case.is_patched() {
        return Ok(());
    }
    let y = &case.after;
    unique(
        containers(y).filter_map(|container| container["name"].as_str()),
        "container names",
    )?;
    unique(
        list(&y["spec"]["volumes"]).filter_map(|volume| volume["name"].as_str()),
        "volume names",
    )?;
    let volumes: BTreeSet<&str> = list(&y["spec"]["volumes"])
        .filter_map(|volume| volume["name"].as_str())
        .collect();
    for container in containers(y) {
        let name = &container["name"];
        let ours = name == PROXY || name == INIT;
        unique(
            list(&container["volumeMounts"]).filter_map(|mount| mount["mountPath"].as_str()),
            "mount paths",
        )?;
        for mount in list(&container["volumeMounts"]) {
            let volume = mount["name"].as_str().unwrap_or("");
            hold!(
                volumes.contains(volume),
                "{name} mounts {volume:?}, which is no volume"
            );
        }
        if ours {
            let names: Vec<&str> = list(&container["env"])
                .filter_map(|variable| variable["name"].as_str())
                .collect();
            unique(names.iter().copied(), "environment variables")?;
            hold!(names.is_sorted(), "env of {name} is not sorted: {names:?}");
        }
        for port in list(&container["ports"]) {
            let label = port["name"].as_str().unwrap_or("");
            hold!(
                label.len() <= 15,
                "{name}: port name {label:?} is over 15 characters"
            );
            let taken = pods::OUR_PORTS
                .iter()
                .any(|ours| port["containerPort"] == *ours);
            hold!(name == PROXY || !taken, "{name} has a port of ours: {port}");
        }
    }
    Ok(())
}

fn unique<'a>(names: impl Iterator<Item = &'a str>, what: &str) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for name in names {
        hold!(seen.insert(name), "{what}: {name:?} stands twice");
    }
    Ok(())
}

/// The kubelet expands `$(NAME)` and `$$` in values, commands and arguments: in ours, written by users or not, it finds
/// nothing to expand.
pub(crate) fn nothing_of_ours_is_expanded(_: &Subject, case: &Case) -> Result<(), String> {
    for container in
        containers(&case.after).filter(|one| one["name"] == PROXY || one["name"] == INIT)
    {
        let values = list(&container["env"]).map(|variable| &variable["value"]);
        let words = ["command", "args"]
            .into_iter()
            .flat_map(|field| list(&container[field]));
        for text in values.chain(words).filter_map(Value::as_str) {
            hold!(
                !text.contains("$(") && !text.contains("$$"),
                "the kubelet would change {text:?}"
            );
        }
    }
    Ok(())
}

/// P9, as far as types can tell: what was a pod still is one. (The API server's own word is asked in the cluster tests.)
pub(crate) fn p09_a_pod_stays_a_pod(_: &Subject, case: &Case) -> Result<(), String> {
    use k8s_openapi::api::core::v1::Pod;
    if serde_json::from_value::<Pod>(case.before.clone()).is_ok() {
        serde_json::from_value::<Pod>(case.after.clone())
            .map_err(|fault| format!("no longer a pod: {fault}"))?;
        let level = |pod: &'_ Value| pod["spec"]["resources"].clone();
        no_request_outgrows_its_limit(&level(&case.before), &level(&case.after))?;
    }
    Ok(())
}

/// P10: a second call finds nothing to do.
pub(crate) fn p10_a_second_call_changes_nothing(
    subject: &Subject,
    case: &Case,
) -> Result<(), String> {
    if !case.is_patched() {
        return Ok(());
    }
    let again = Case::run(subject, case.setup, case.after.clone())?;
    let skipped = again.outcome == Outcome::Skipped(SkipReason::AlreadyInjected);
    hold!(
        skipped,
        "the second call answered {:?}",
        brief(&again.outcome)
    );
    Ok(())
}

/// P11: what other webhooks insert between two calls is completed, and P3 to P9 hold for the whole.
pub(crate) fn p11_containers_inserted_later_are_completed(
    subject: &Subject,
    case: &Case,
) -> Result<(), String> {
    if !case.is_patched() || is_ours(&case.before) {
        return Ok(());
    }
    // another choice for each pod, and the same for the same pod
    let seed = case.before.to_string().bytes().fold(7, |seed: u64, byte| {
        seed.wrapping_mul(31).wrapping_add(byte.into())
    });
    let mut dice = Dice::new(seed);
    let mut between = case.clone();
    let inserted = insert_foreign(&mut dice, &mut between);
    let again = Case::run(subject, case.setup, between.after.clone())
        .map_err(|fault| format!("{fault} (after {inserted})"))?;
    // as if the pod had come with the foreign containers, and one call had done it all
    let whole = Case {
        before: between.before,
        outcome: case.outcome.clone(),
        warnings: case.warnings.clone(),
        after: again.after.clone(),
        setup: case.setup,
    };
    let outcome = brief(&again.outcome);
    for (name, check) in WHOLE {
        check(subject, &whole)
            .map_err(|fault| format!("{name}: {fault} (after {inserted}, {outcome})"))?;
    }
    p10_a_second_call_changes_nothing(subject, &whole)
        .map_err(|fault| format!("{fault} (after {inserted})"))?;
    Ok(())
}

const WHOLE: [(&str, Check); 6] = [
    ("P3", p03_after_reinvocation),
    ("P4", p04_user_containers_are_kept),
    ("P5", p05_timing_of_probes_is_kept),
    ("P6", p06_every_rewritten_handler_is_recorded),
    ("P7", p07_nothing_of_the_users_is_replaced),
    ("P8", p08_names_mounts_and_ports_fit),
];

/// P3 where others may stand ahead of us: ours are one each, and next to each other or last and first.
fn p03_after_reinvocation(_: &Subject, case: &Case) -> Result<(), String> {
    let names = |field: &str| -> Vec<&str> {
        list(&case.after["spec"][field])
            .map(|container| container["name"].as_str().unwrap_or(""))
            .collect()
    };
    let (inits, apps) = (names("initContainers"), names("containers"));
    let count = |name: &str| {
        inits
            .iter()
            .chain(&apps)
            .filter(|other| **other == name)
            .count()
    };
    hold!(count(PROXY) == 1 && count(INIT) == 1, "{inits:?} {apps:?}");
    let redirected = inits
        .iter()
        .position(|name| *name == INIT)
        .ok_or("malha-init is no init container")?;
    match inits.iter().position(|name| *name == PROXY) {
        Some(at) => hold!(at == redirected + 1, "not one after the other: {inits:?}"),
        None => hold!(
            redirected + 1 == inits.len(),
            "{INIT} is not the last: {inits:?}"
        ),
    }
    Ok(())
}

/// What another webhook may do between two calls of ours: containers with probes, anywhere; the same goes into `before`,
/// so that it is one of the user's. Says what was done.
fn insert_foreign(dice: &mut Dice, case: &mut Case) -> String {
    let mut said = Vec::new();
    for number in 0..1 + dice.below(3) {
        let name = format!("foreign-{number}");
        let sidecar = dice.chance(60);
        let mut container = json!({
            "name": name, "image": "foreign:1", "ports": [{"name": "web", "containerPort": 7000 + number}],
            "env": [{"name": "MALHA_PROBES", "value": "{}"}],
        });
        if sidecar || dice.chance(50) {
            container["readinessProbe"] = dice
                .pick(&[
                    json!({"httpGet": {"port": "web", "path": "/r"}, "periodSeconds": 3}),
                    json!({"tcpSocket": {"port": 7000}}),
                    json!({"exec": {"command": ["true"]}}),
                ])
                .clone();
        }
        let field = if sidecar {
            "initContainers"
        } else {
            "containers"
        };
        if sidecar {
            container["restartPolicy"] = json!("Always");
        }
        let list = case.after["spec"][field]
            .as_array_mut()
            .expect("ours are in it");
        let at = match dice.below(3) {
            0 => 0,
            1 => list.len(),
            _ => dice.below(list.len() + 1),
        };
        said.push(format!("{name} at {at} of {field}"));
        // the same place among the user's own
        let own = list[..at]
            .iter()
            .filter(|other| other["name"] != PROXY && other["name"] != INIT)
            .count();
        list.insert(at, container.clone());
        match case.before["spec"][field].as_array_mut() {
            Some(list) => list.insert(own, container),
            None => case.before["spec"][field] = json!([container]),
        }
    }
    said.join(", ")
}

/// P12: pods that are not ours to touch get no patch and a reason, and their warnings do not claim otherwise.
pub(crate) fn p12_strangers_are_left_alone(_: &Subject, case: &Case) -> Result<(), String> {
    let x = &case.before;
    let foreign = containers(x).any(|container| {
        container["name"] == "istio-proxy" || container["name"] == "linkerd-proxy"
    });
    let out = x["metadata"]["labels"]["sidecar.istio.io/inject"] == "false";
    if x["spec"]["hostNetwork"] == true || foreign || out {
        hold!(
            matches!(case.outcome, Outcome::Skipped(_)),
            "{:?}",
            brief(&case.outcome)
        );
        hold!(case.before == case.after, "changed all the same");
    }
    Ok(())
}

/// P13: every field of x is in y, known or not.
pub(crate) fn p13_unknown_fields_survive(_: &Subject, case: &Case) -> Result<(), String> {
    let record = if case.is_patched() {
        record(&case.after)?
    } else {
        BTreeMap::new()
    };
    let mut before = case.before.clone();
    for handler in handlers(&case.before, &case.after) {
        let Fate::Rewritten { path, .. } = &handler.fate else {
            continue;
        };
        // the handler itself has moved: its members, unknown ones included, are in the record
        for kind in ["httpGet", "tcpSocket", "grpc"] {
            let fields = handler.value[kind].as_object().into_iter().flatten();
            for (key, value) in fields.filter(|(key, value)| {
                !["port", "host", "httpHeaders"].contains(&key.as_str()) && !value.is_null()
            }) {
                let recorded = &record
                    .get(path)
                    .ok_or_else(|| format!("no record of {path}"))?[kind][key];
                hold!(
                    normal(recorded) == normal(value),
                    "{path}: {kind}.{key:?} {value} is lost: {recorded}"
                );
            }
        }
        for container in ["initContainers", "containers"].iter().flat_map(|field| {
            let position = list(&case.before["spec"][*field])
                .position(|other| other["name"] == handler.container);
            position.map(|index| (*field, index))
        }) {
            let (field, index) = container;
            let holder = at_mut(&mut before["spec"][field][index], handler.place);
            for kind in ["httpGet", "tcpSocket", "grpc"] {
                holder.as_object_mut().expect("a handler").remove(kind);
            }
        }
    }
    survives("", &before, &case.after)
}

fn survives(path: &str, before: &Value, after: &Value) -> Result<(), String> {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            for (key, value) in before {
                let here = format!("{path}/{key}");
                let Some(now) = after.get(key) else {
                    return Err(format!("{here} is gone"));
                };
                let replaced = here.starts_with("/metadata/annotations/")
                    || here.starts_with("/spec/resources/");
                if !replaced || !now.is_string() {
                    survives(&here, value, now)?;
                }
            }
            Ok(())
        }
        (Value::Array(before), Value::Array(after)) => {
            let mut rest = after.iter();
            for (index, item) in before.iter().enumerate() {
                let found = rest.any(|other| match item["name"].as_str() {
                    Some(name) => other["name"] == name && survives("", item, other).is_ok(),
                    None => survives("", item, other).is_ok(),
                });
                hold!(found, "{path}/{index} is gone, changed or moved: {item}");
            }
            Ok(())
        }
        (Value::Null, _) => Ok(()),
        (before, after) => {
            hold!(before == after, "{path}: {before} became {after}");
            Ok(())
        }
    }
}

/// P14: neither the order of keys nor null in place of nothing makes a difference.
pub(crate) fn p14_key_order_and_nulls_do_not_matter(
    subject: &Subject,
    case: &Case,
) -> Result<(), String> {
    let mut shuffled = case.before.clone();
    pods::shuffle_keys(&mut Dice::new(7), &mut shuffled);
    let again = Case::run(subject, case.setup, shuffled)?;
    hold!(
        again.after == case.after,
        "other key order, other pod:\n{}\n{}",
        case.after,
        again.after
    );
    hold!(
        brief(&again.outcome) == brief(&case.outcome),
        "other key order, other answer: {:?}",
        again.outcome
    );
    let again = Case::run(subject, case.setup, without_nulls(&case.before))?;
    let (with, without) = (without_nulls(&case.after), without_nulls(&again.after));
    hold!(
        with == without,
        "null and absent differ:\n{with}\n{without}"
    );
    hold!(
        brief(&again.outcome) == brief(&case.outcome),
        "absent for null, other answer: {:?}",
        again.outcome
    );
    Ok(())
}

fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(_, field)| !field.is_null());
            Value::Object(
                kept.map(|(key, field)| (key.clone(), without_nulls(field)))
                    .collect(),
            )
        }
        Value::Array(items) => Value::Array(items.iter().map(without_nulls).collect()),
        other => other.clone(),
    }
}

/// P15: the pod keeps its class of service, and its own resources hold the proxy too.
pub(crate) fn p15_quality_of_service_is_kept(_: &Subject, case: &Case) -> Result<(), String> {
    if !case.is_patched() {
        return Ok(());
    }
    let (x, y) = (&case.before, &case.after);
    let wishes = [
        "proxyCPU",
        "proxyCPULimit",
        "proxyMemory",
        "proxyMemoryLimit",
    ]
    .iter()
    .any(|name| annotation(x, &format!("sidecar.istio.io/{name}")).is_some());
    let (had, has) = (quality(x), quality(y));
    if had == Quality::Guaranteed && !wishes {
        hold!(
            has == Quality::Guaranteed,
            "a Guaranteed pod became {has:?}"
        );
    }
    if had == Quality::Burstable {
        hold!(has == Quality::Burstable, "a Burstable pod became {has:?}");
    }
    let proxy = containers(y)
        .find(|container| container["name"] == PROXY)
        .ok_or("no proxy")?;
    let init = containers(y)
        .find(|container| container["name"] == INIT)
        .ok_or("no init")?;
    for kind in ["requests", "limits"] {
        for resource in ["cpu", "memory"] {
            let amount = |value: &Value| nano(&quantity_text(&value[kind][resource]));
            // A request is defaulted to the limit, and a limit is raised by a request that has none.
            let share = |value: &Value| {
                let other = if kind == "limits" {
                    "requests"
                } else {
                    "limits"
                };
                let own = [kind, other].map(|kind| &value["resources"][kind][resource]);
                nano(
                    &own.into_iter()
                        .find(|own| !own.is_null())
                        .map_or_else(|| "0".into(), quantity_text),
                )
            };
            let before = &x["spec"]["resources"];
            if before[kind][resource].is_null() {
                let added = &y["spec"]["resources"][kind][resource];
                if kind == "requests" && is_defaulted_to_the_limit(x, resource) {
                    continue; // the class is compared above
                }
                hold!(
                    added.is_null(),
                    "spec.resources.{kind}.{resource} was not there, now {added}"
                );
                continue;
            }
            let ours = share(proxy).max(share(init));
            let own = amount(before);
            let (Some(own), Some(ours)) = (own, ours) else {
                continue;
            };
            let wanted = own + ours;
            let has = amount(&y["spec"]["resources"]);
            hold!(
                has == Some(wanted),
                "spec.resources.{kind}.{resource}: {has:?} billionths, not {wanted}"
            );
        }
    }
    no_request_outgrows_its_limit(&x["spec"]["resources"], &y["spec"]["resources"])?;
    for container in [
        proxy,
        containers(y)
            .find(|container| container["name"] == INIT)
            .ok_or("no init")?,
    ] {
        for resource in ["cpu", "memory"] {
            let amount = |kind: &str| {
                container["resources"][kind][resource]
                    .as_str()
                    .and_then(nano)
            };
            if let (Some(request), Some(limit)) = (amount("requests"), amount("limits")) {
                hold!(
                    request <= limit,
                    "{}: request over limit: {}",
                    container["name"],
                    container["resources"]
                );
            }
        }
    }
    Ok(())
}

/// The pod's request is its limit, because no container asks for the resource.
fn is_defaulted_to_the_limit(pod: &Value, resource: &str) -> bool {
    let asks = |resources: &Value| {
        let has = |kind: &str| !resources[kind][resource].is_null();
        has("requests") || has("limits")
    };
    let own = &pod["spec"]["resources"];
    !own["limits"][resource].is_null()
        && own["requests"][resource].is_null()
        && !containers(pod).any(|container| asks(&container["resources"]))
}

/// Of the pod's own resources, where the pod's author kept to it: the API server refuses any other.
pub(crate) fn no_request_outgrows_its_limit(before: &Value, after: &Value) -> Result<(), String> {
    for resource in ["cpu", "memory"] {
        let kept = |level: &Value| {
            let amount = |kind: &str| nano(&quantity_text(&level[kind][resource]));
            level["limits"][resource].is_null() || amount("requests") <= amount("limits")
        };
        hold!(
            !kept(before) || kept(after),
            "spec.resources: {resource} request over limit: {after}"
        );
    }
    Ok(())
}

/// A number is as good as a string; what is absent is nothing.
fn quantity_text(value: &Value) -> String {
    match value {
        Value::Number(number) => number.to_string(),
        other => other.as_str().unwrap_or("0").to_owned(),
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Quality {
    Guaranteed,
    Burstable,
    BestEffort,
}

/// As `k8s.io/component-helpers/.../qos` computes it: init containers count, zero does not.
pub(crate) fn quality(pod: &Value) -> Quality {
    let level = &pod["spec"]["resources"];
    let amount = |resources: &Value, kind: &str, resource: &str| {
        nano(&quantity_text(&resources[kind][resource])).unwrap_or(0)
    };
    let holders: Vec<&Value> = if level["requests"].is_object() || level["limits"].is_object() {
        vec![level]
    } else {
        containers(pod)
            .map(|container| &container["resources"])
            .collect()
    };
    let (mut any, mut all) = (false, true);
    for resources in holders {
        for resource in ["cpu", "memory"] {
            let limit = amount(resources, "limits", resource);
            let request = match amount(resources, "requests", resource) {
                0 if resources["requests"][resource].is_null() => limit,
                request => request,
            };
            any |= limit > 0 || request > 0;
            all &= limit > 0 && request == limit;
        }
    }
    match (any, all) {
        (false, _) => Quality::BestEffort,
        (true, true) => Quality::Guaranteed,
        (true, false) => Quality::Burstable,
    }
}

/// P16: the sidecar is `restricted` by itself, and nothing but the redirection keeps the pod from it.
pub(crate) fn p16_only_the_redirection_needs_a_right(
    _: &Subject,
    case: &Case,
) -> Result<(), String> {
    if !case.is_patched() {
        return Ok(());
    }
    let proxy = containers(&case.after)
        .find(|container| container["name"] == PROXY)
        .ok_or("no proxy")?;
    let ours: Vec<&Value> = list(&case.after["spec"]["volumes"])
        .filter(|volume| VOLUMES.iter().any(|name| volume["name"] == *name))
        .collect();
    let alone = json!({"spec": {"containers": [proxy], "volumes": ours}});
    let violations = restricted::violations(&alone, None);
    hold!(violations.is_empty(), "the sidecar alone: {violations:?}");
    if restricted::violations(&case.before, None).is_empty() {
        let violations = restricted::violations(&case.after, Some(INIT));
        hold!(
            violations.is_empty(),
            "a restricted pod no longer is: {violations:?}"
        );
    }
    let init = containers(&case.after)
        .find(|container| container["name"] == INIT)
        .ok_or("no init")?;
    let context = &init["securityContext"];
    hold!(
        context["capabilities"]["add"] == json!(["NET_ADMIN"]),
        "{INIT} adds {}",
        context["capabilities"]["add"]
    );
    let mut as_if = init.clone();
    as_if["securityContext"]["capabilities"]["add"] = Value::Null;
    let alone = json!({"spec": {"containers": [as_if]}});
    let violations = restricted::violations(&alone, None);
    hold!(
        violations.is_empty(),
        "{INIT} but for NET_ADMIN: {violations:?}"
    );
    Ok(())
}

/// P18: taking it back gives the pod as it was, as data.
pub(crate) fn p18_uninject_restores_the_pod(subject: &Subject, case: &Case) -> Result<(), String> {
    if is_ours(&case.before) {
        return Ok(());
    }
    let back = (subject.uninject)(case.after.clone())?;
    hold!(
        normal(&back) == normal(&case.before),
        "came back as\n{back}\nit was\n{}",
        case.before
    );
    Ok(())
}

/// P19: equal input, equal bytes.
pub(crate) fn p19_equal_input_gives_equal_bytes(
    subject: &Subject,
    case: &Case,
) -> Result<(), String> {
    let again = Case::run(subject, case.setup, case.before.clone())?;
    hold!(
        again.outcome == case.outcome,
        "first {:?}\nthen {:?}",
        case.outcome,
        again.outcome
    );
    hold!(
        again.warnings == case.warnings,
        "first {:?}\nthen {:?}",
        case.warnings,
        again.warnings
    );
    Ok(())
}

// -- what the checks share --

/// Both of ours are in it: an earlier call's work.
fn is_ours(pod: &Value) -> bool {
    [PROXY, INIT]
        .iter()
        .all(|name| containers(pod).any(|container| container["name"] == *name))
}

fn users<'a>(pod: &'a Value, field: &str) -> Vec<&'a Value> {
    list(&pod["spec"][field])
        .filter(|container| container["name"] != PROXY && container["name"] != INIT)
        .collect()
}

fn at<'a>(container: &'a Value, place: &[&str]) -> &'a Value {
    place.iter().fold(container, |inner, step| &inner[*step])
}

fn at_mut<'a>(container: &'a mut Value, place: &[&str]) -> &'a mut Value {
    place
        .iter()
        .fold(container, |inner, step| &mut inner[*step])
}

/// The word of an outcome, without a patch's bytes.
pub(crate) fn brief(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Patched { reason, .. } => reason.to_string(),
        Outcome::Skipped(reason) => format!("skip {reason}"),
        Outcome::Denied { reason, message } => format!("deny {reason}: {message}"),
    }
}

/// Without what Kubernetes takes for nothing: null, `{}`, `[]`.
pub(crate) fn normal(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept: Map<String, Value> = fields
                .iter()
                .map(|(key, field)| (key.clone(), normal(field)))
                .filter(|(_, field)| !field.is_null())
                .collect();
            if kept.is_empty() {
                Value::Null
            } else {
                Value::Object(kept)
            }
        }
        Value::Array(items) if items.is_empty() => Value::Null,
        Value::Array(items) => Value::Array(items.iter().map(normal).collect()),
        other => other.clone(),
    }
}
