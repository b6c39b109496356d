//! The annotations that a pod's author may write, read into what they wish for.
//!
//! No value is ever copied into structure: each is read into a type, and an odd one is refused with what is allowed.

use std::{borrow::Cow, collections::BTreeSet};

use super::{
    Denial,
    capture::{Capture, List, decimal},
    quantity::Quantity,
    reason::{DenyReason, Warning, WarningCode},
    select,
    settings::{ImageSettings, InjectSettings, NativeSetting},
};

/// The longest value that is read.
const LONGEST_VALUE: usize = 4 * 1024;
/// How many unknown annotations are named; the API server cuts all warnings together at 4 KiB.
const MOST_UNKNOWN_NAMED: usize = 8;

pub(super) const NATIVE_SIDECAR: &str = "sidecar.istio.io/nativeSidecar";
pub(super) const REWRITE_PROBES: &str = "sidecar.istio.io/rewriteAppHTTPProbers";
pub(super) const MERGE_METRICS: &str = "prometheus.istio.io/merge-metrics";
pub(super) const HOLD_APPLICATION: &str = "malha.io/hold-application";
pub(super) const WORKLOAD_API: &str = "malha.io/workload-api";
pub(super) const RUN_BEFORE: &str = "malha.io/run-before";
pub(super) const PROXY_IMAGE: &str = "malha.io/proxy-image";
/// Written by us, read by people only.
pub(super) const STATUS: &str = "malha.io/status";

/// What the annotations of one pod ask for, the settings where they ask for nothing.
#[derive(Clone, Debug)]
pub(super) struct Wishes<'a> {
    pub(super) native: NativeSetting,
    pub(super) rewrite_probes: bool,
    pub(super) cpu_request: Option<Quantity>,
    pub(super) cpu_limit: Option<Quantity>,
    pub(super) memory_request: Option<Quantity>,
    pub(super) memory_limit: Option<Quantity>,
    pub(super) log_level: Cow<'a, str>,
    pub(super) agent_log_level: Cow<'a, str>,
    pub(super) component_log_level: Cow<'a, str>,
    pub(super) initial_delay_seconds: u32,
    pub(super) period_seconds: u32,
    pub(super) failure_threshold: u32,
    pub(super) capture: Capture,
    pub(super) merge_prometheus: bool,
    pub(super) hold: bool,
    pub(super) workload_api: bool,
    pub(super) run_before: BTreeSet<&'a str>,
    pub(super) proxy_image: Cow<'a, str>,
}

impl<'a> Wishes<'a> {
    /// What a pod without annotations gets.
    pub(super) fn of_settings(settings: &'a InjectSettings) -> Self {
        let proxy = &settings.proxy;
        Self {
            native: settings.native,
            rewrite_probes: true,
            cpu_request: None,
            cpu_limit: None,
            memory_request: None,
            memory_limit: None,
            log_level: Cow::Borrowed(&proxy.log_level),
            agent_log_level: Cow::Borrowed(&proxy.agent_log_level),
            component_log_level: Cow::Borrowed(""),
            initial_delay_seconds: proxy.readiness.initial_delay_seconds,
            period_seconds: proxy.readiness.period_seconds,
            failure_threshold: proxy.readiness.failure_threshold,
            capture: settings.capture.clone(),
            merge_prometheus: settings.merge_prometheus,
            hold: proxy.hold_application,
            workload_api: false,
            run_before: BTreeSet::new(),
            proxy_image: Cow::Borrowed(&settings.image.proxy),
        }
    }
}

/// Why one value is not taken.
pub(super) enum Fault {
    /// It is no value of this annotation; the words say what is.
    Invalid(&'static str),
    /// It is one, but cannot be honoured here; the words say why.
    Unsupported(&'static str),
}

type Setter = for<'a> fn(&mut Wishes<'a>, &'a str) -> Result<(), Fault>;

/// What we do with an annotation.
pub(super) enum Effect {
    /// Read it.
    Set(Setter),
    /// Refuse it: to ignore it would change traffic or security.
    Unsupported(&'static str),
    /// Accept it without effect; the words name the substitute.
    Ignored(&'static str),
    /// Known, and looked at elsewhere or not at all.
    Known,
}

const TRUE_FALSE: &str = "true or false";
const QUANTITY: &str = "a quantity of 0 or more, such as 100m or 128Mi";
const LEVEL: &str = "trace, debug, info, warning, error, critical or off";
const COMPONENT_LEVELS: &str = "a list of component:level, such as upstream:debug";
const LEVEL_OR_COMPONENTS: &str = "a level such as info, or a list of component:level";
const PORTS: &str = "a list of ports 1 to 65535";
const PORTS_OR_ALL: &str = "* or a list of ports 1 to 65535";
const CIDRS: &str = "a list of CIDRs such as 10.0.0.0/8";
const CIDRS_OR_ALL: &str = "* or a list of CIDRs such as 10.0.0.0/8";
const INTERFACES: &str = "a list of interface names of at most 15 characters";
const UIDS: &str = "a list of user ids";
const FROM_ZERO: &str = "an integer 0 to 3600";
const FROM_ONE: &str = "an integer 1 to 3600";
const NAMES: &str = "names of init containers of this pod";
const IMAGE: &str = "an image in a registry that the operator allows (image.allowed)";

/// Every annotation that we know, and what it does. Keys that end in `*` stand for all that begin so.
pub(super) const KNOWN: &[(&str, Effect)] = &[
    (select::INJECT, Effect::Known),
    (
        NATIVE_SIDECAR,
        Effect::Set(|w, v| {
            w.native = if boolean(v)? {
                NativeSetting::True
            } else {
                NativeSetting::False
            };
            Ok(())
        }),
    ),
    (
        REWRITE_PROBES,
        Effect::Set(|w, v| set(&mut w.rewrite_probes, boolean(v)?)),
    ),
    (
        "sidecar.istio.io/proxyCPU",
        Effect::Set(|w, v| set(&mut w.cpu_request, Some(quantity(v)?))),
    ),
    (
        "sidecar.istio.io/proxyCPULimit",
        Effect::Set(|w, v| set(&mut w.cpu_limit, Some(quantity(v)?))),
    ),
    (
        "sidecar.istio.io/proxyMemory",
        Effect::Set(|w, v| set(&mut w.memory_request, Some(quantity(v)?))),
    ),
    (
        "sidecar.istio.io/proxyMemoryLimit",
        Effect::Set(|w, v| set(&mut w.memory_limit, Some(quantity(v)?))),
    ),
    (
        "sidecar.istio.io/logLevel",
        Effect::Set(|w, v| {
            allow(is_level(v), LEVEL)?;
            set(&mut w.log_level, v.into())
        }),
    ),
    (
        "sidecar.istio.io/agentLogLevel",
        Effect::Set(|w, v| {
            allow(is_level(v) || are_component_levels(v), LEVEL_OR_COMPONENTS)?;
            set(&mut w.agent_log_level, v.into())
        }),
    ),
    (
        "sidecar.istio.io/componentLogLevel",
        Effect::Set(|w, v| {
            allow(v.is_empty() || are_component_levels(v), COMPONENT_LEVELS)?;
            set(&mut w.component_log_level, v.into())
        }),
    ),
    (
        "sidecar.istio.io/interceptionMode",
        Effect::Set(|_, v| match v {
            "REDIRECT" => Ok(()),
            "TPROXY" | "NONE" => Err(Fault::Unsupported("only REDIRECT captures traffic here")),
            _ => Err(Fault::Invalid("REDIRECT")),
        }),
    ),
    (
        "readiness.status.sidecar.istio.io/initialDelaySeconds",
        Effect::Set(|w, v| set(&mut w.initial_delay_seconds, seconds(v, 0, FROM_ZERO)?)),
    ),
    (
        "readiness.status.sidecar.istio.io/periodSeconds",
        Effect::Set(|w, v| set(&mut w.period_seconds, seconds(v, 1, FROM_ONE)?)),
    ),
    (
        "readiness.status.sidecar.istio.io/failureThreshold",
        Effect::Set(|w, v| set(&mut w.failure_threshold, seconds(v, 1, FROM_ONE)?)),
    ),
    (
        "traffic.sidecar.istio.io/includeInboundPorts",
        Effect::Set(|w, v| set(&mut w.capture.include_inbound_ports, list(v, PORTS_OR_ALL)?)),
    ),
    (
        "traffic.sidecar.istio.io/excludeInboundPorts",
        Effect::Set(|w, v| set(&mut w.capture.exclude_inbound_ports, list(v, PORTS)?)),
    ),
    (
        "traffic.sidecar.istio.io/includeOutboundPorts",
        Effect::Set(|w, v| {
            set(
                &mut w.capture.include_outbound_ports,
                list(v, PORTS_OR_ALL)?,
            )
        }),
    ),
    (
        "traffic.sidecar.istio.io/excludeOutboundPorts",
        Effect::Set(|w, v| set(&mut w.capture.exclude_outbound_ports, list(v, PORTS)?)),
    ),
    (
        "traffic.sidecar.istio.io/includeOutboundIPRanges",
        Effect::Set(|w, v| {
            set(
                &mut w.capture.include_outbound_ip_ranges,
                list(v, CIDRS_OR_ALL)?,
            )
        }),
    ),
    (
        "traffic.sidecar.istio.io/excludeOutboundIPRanges",
        Effect::Set(|w, v| set(&mut w.capture.exclude_outbound_ip_ranges, list(v, CIDRS)?)),
    ),
    (
        "traffic.sidecar.istio.io/excludeInterfaces",
        Effect::Set(|w, v| set(&mut w.capture.exclude_interfaces, list(v, INTERFACES)?)),
    ),
    (
        "malha.io/exclude-outbound-uids",
        Effect::Set(|w, v| set(&mut w.capture.exclude_outbound_uids, list(v, UIDS)?)),
    ),
    (
        MERGE_METRICS,
        Effect::Set(|w, v| set(&mut w.merge_prometheus, boolean(v)?)),
    ),
    (
        HOLD_APPLICATION,
        Effect::Set(|w, v| set(&mut w.hold, boolean(v)?)),
    ),
    (
        WORKLOAD_API,
        Effect::Set(|w, v| set(&mut w.workload_api, boolean(v)?)),
    ),
    (
        RUN_BEFORE,
        Effect::Set(|w, v| set(&mut w.run_before, names(v))),
    ),
    (
        PROXY_IMAGE,
        Effect::Set(|w, v| set(&mut w.proxy_image, v.into())),
    ),
    (
        "inject.istio.io/templates",
        Effect::Set(|_, v| match v {
            "sidecar" => Ok(()),
            _ => Err(Fault::Unsupported(
                "there are no templates here; only `sidecar` is accepted",
            )),
        }),
    ),
    (
        "sidecar.istio.io/bootstrapOverride",
        Effect::Unsupported("Envoy's bootstrap is the agent's"),
    ),
    (
        "sidecar.istio.io/userVolume",
        Effect::Unsupported("the sidecar takes no volumes of the pod's"),
    ),
    (
        "sidecar.istio.io/userVolumeMount",
        Effect::Unsupported("the sidecar takes no volumes of the pod's"),
    ),
    (
        "sidecar.istio.io/discoveryAddress",
        Effect::Unsupported("the control plane is the one that injects"),
    ),
    (
        "traffic.sidecar.istio.io/kubevirtInterfaces",
        Effect::Unsupported("virtual machines' interfaces are not captured"),
    ),
    (
        "istio.io/reroute-virtual-interfaces",
        Effect::Unsupported("virtual machines' interfaces are not captured"),
    ),
    (
        "sidecar.istio.io/proxyImage",
        Effect::Ignored("use malha.io/proxy-image"),
    ),
    (
        "sidecar.istio.io/proxyImageType",
        Effect::Ignored("use malha.io/proxy-image"),
    ),
    (
        "sidecar.istio.io/controlPlaneAuthPolicy",
        Effect::Ignored("it is always mutual TLS"),
    ),
    (
        "sidecar.istio.io/enableCoreDump",
        Effect::Ignored("the sidecar leaves no core dumps"),
    ),
    (
        "sidecar.istio.io/extraStatTags",
        Effect::Ignored("use a Telemetry resource"),
    ),
    (
        "sidecar.istio.io/stats*",
        Effect::Ignored("use a Telemetry resource"),
    ),
    ("sidecar.istio.io/status", Effect::Known),
    (
        "status.sidecar.istio.io/port",
        Effect::Ignored("readiness is always on port 15021"),
    ),
    (
        "proxy.istio.io/config",
        Effect::Ignored("use sidecar.istio.io/ and malha.io/ annotations"),
    ),
    (
        "proxy.istio.io/overrides",
        Effect::Ignored("use the proxyCPU and proxyMemory annotations"),
    ),
    (
        STATUS,
        Effect::Ignored("it is only ever written; yours stays and is not read"),
    ),
];

/// Prefixes under which an unknown key is likely a slip.
const OUR_PREFIXES: [&str; 3] = [
    "sidecar.istio.io/",
    "traffic.sidecar.istio.io/",
    "malha.io/",
];

/// Reads every annotation, in order of their keys.
///
/// # Errors
/// The first one that is invalid or cannot be honoured.
pub(super) fn read<'a>(
    annotations: impl Iterator<Item = (&'a str, &'a str)>,
    init_names: &BTreeSet<&str>,
    settings: &'a InjectSettings,
    warnings: &mut Vec<Warning>,
) -> Result<Wishes<'a>, Denial> {
    let mut wishes = Wishes::of_settings(settings);
    let mut unknown = Vec::new();
    for (key, value) in annotations {
        match effect(key) {
            Some(Effect::Set(_)) if value.len() > LONGEST_VALUE => {
                return Err(invalid(key, value, "at most 4096 bytes"));
            }
            Some(Effect::Set(setter)) => {
                setter(&mut wishes, value).map_err(|fault| refusal(key, value, &fault))?
            }
            Some(Effect::Unsupported(why)) => {
                return Err(refusal(key, value, &Fault::Unsupported(why)));
            }
            Some(Effect::Ignored(substitute)) => warnings.push(Warning::new(
                WarningCode::AnnotationIgnored,
                format_args!("annotation {key} has no effect here: {substitute}"),
            )),
            Some(Effect::Known) => {}
            None if OUR_PREFIXES.iter().any(|prefix| key.starts_with(prefix)) => unknown.push(key),
            None => {}
        }
    }
    warn_of_unknown(&unknown, warnings);
    checked_against_pod(wishes, init_names, &settings.image)
}

/// What two annotations can only be checked for together with the pod or the settings.
fn checked_against_pod<'a>(
    wishes: Wishes<'a>,
    init_names: &BTreeSet<&str>,
    image: &ImageSettings,
) -> Result<Wishes<'a>, Denial> {
    if let Some(name) = wishes
        .run_before
        .iter()
        .find(|name| !init_names.contains(*name))
    {
        return Err(invalid(RUN_BEFORE, name, NAMES));
    }
    if !is_allowed_image(&wishes.proxy_image, image) {
        return Err(invalid(PROXY_IMAGE, &wishes.proxy_image, IMAGE));
    }
    Ok(wishes)
}

/// What is known about an annotation.
pub(super) fn effect(key: &str) -> Option<&'static Effect> {
    let found = KNOWN
        .iter()
        .find(|(known, _)| match known.strip_suffix('*') {
            Some(prefix) => key.starts_with(prefix),
            None => *known == key,
        });
    found.map(|(_, effect)| effect)
}

/// Some annotation or label of this name would be looked at.
pub(super) fn is_read(key: &str) -> bool {
    effect(key).is_some() || OUR_PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

/// The init containers that stay ahead of ours, for a pod whose annotations were judged before.
pub(super) fn names(value: &str) -> BTreeSet<&str> {
    value
        .split(',')
        .map(|name| name.trim_matches(' '))
        .filter(|name| !name.is_empty())
        .collect()
}

fn refusal(key: &str, value: &str, fault: &Fault) -> Denial {
    match fault {
        Fault::Invalid(allowed) => invalid(key, value, allowed),
        Fault::Unsupported(why) => Denial {
            reason: DenyReason::UnsupportedAnnotation,
            message: format!(
                "annotation {key} is {} and cannot be honoured: {why}; remove it",
                shown(value)
            ),
        },
    }
}

pub(super) fn invalid(key: &str, value: &str, allowed: &str) -> Denial {
    Denial {
        reason: DenyReason::InvalidAnnotation,
        message: format!("annotation {key} is {}; allowed: {allowed}", shown(value)),
    }
}

/// A value of a stranger's, escaped and cut at 64 characters.
pub(super) fn shown(value: &str) -> String {
    let mut escaped = value.escape_debug();
    let head: String = escaped.by_ref().take(64).collect();
    let rest = if escaped.next().is_some() { "..." } else { "" };
    format!("\"{head}{rest}\"")
}

fn warn_of_unknown(keys: &[&str], warnings: &mut Vec<Warning>) {
    for key in keys.iter().take(MOST_UNKNOWN_NAMED) {
        warnings.push(Warning::new(
            WarningCode::AnnotationUnknown,
            format_args!("did you mean {}? unknown: {}", nearest(key), shown(key)),
        ));
    }
    if let Some(more) = keys
        .len()
        .checked_sub(MOST_UNKNOWN_NAMED)
        .filter(|more| *more > 0)
    {
        warnings.push(Warning::new(
            WarningCode::AnnotationUnknown,
            format_args!("{more} more annotations are unknown"),
        ));
    }
}

/// The known annotation with the fewest differences.
fn nearest(key: &str) -> &'static str {
    let key: String = key.chars().take(80).collect();
    let known = KNOWN
        .iter()
        .map(|(known, _)| *known)
        .filter(|known| !known.ends_with('*'));
    known
        .min_by_key(|known| distance(&key, known))
        .unwrap_or_default()
}

/// Levenshtein's distance, case apart.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<u8> = b.bytes().map(|c| c.to_ascii_lowercase()).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.bytes().map(|c| c.to_ascii_lowercase()).enumerate() {
        let mut diagonal = i;
        let mut previous = i + 1;
        for (right, cell) in b.iter().zip(row.iter_mut().skip(1)) {
            let substituted = diagonal + usize::from(left != *right);
            diagonal = *cell;
            previous = substituted.min(previous + 1).min(diagonal + 1);
            *cell = previous;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

fn set<T>(field: &mut T, value: T) -> Result<(), Fault> {
    *field = value;
    Ok(())
}

fn allow(condition: bool, allowed: &'static str) -> Result<(), Fault> {
    if condition {
        Ok(())
    } else {
        Err(Fault::Invalid(allowed))
    }
}

fn boolean(value: &str) -> Result<bool, Fault> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(Fault::Invalid(TRUE_FALSE)),
    }
}

fn quantity(value: &str) -> Result<Quantity, Fault> {
    let quantity = Quantity::parse(value).filter(|quantity| !quantity.is_negative());
    quantity.ok_or(Fault::Invalid(QUANTITY))
}

fn seconds(value: &str, least: u32, allowed: &'static str) -> Result<u32, Fault> {
    let seconds = decimal(value).filter(|seconds| (least..=3600).contains(seconds));
    seconds.ok_or(Fault::Invalid(allowed))
}

fn list<L: List>(value: &str, allowed: &'static str) -> Result<L, Fault> {
    L::parse(value).ok_or(Fault::Invalid(allowed))
}

pub(super) fn is_level(value: &str) -> bool {
    [
        "trace", "debug", "info", "warning", "error", "critical", "off",
    ]
    .contains(&value)
}

pub(super) fn are_component_levels(value: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-' || b == b'.';
    value.split(',').all(|item| match item.split_once(':') {
        Some((component, level)) => {
            !component.is_empty() && component.bytes().all(legal) && is_level(level)
        }
        None => false,
    })
}

/// The image of the settings, another version of it, or one under an allowed prefix; by whole path elements, so that
/// `registry.io/mesh` does not allow `registry.io/meshes/x`.
fn is_allowed_image(image: &str, settings: &ImageSettings) -> bool {
    if image == settings.proxy {
        return true;
    }
    let Some(repository) = repository(image) else {
        return false;
    };
    let own = self::repository(&settings.proxy);
    let under = |prefix: &str| {
        let prefix = prefix.trim_end_matches('/');
        let rest = repository.strip_prefix(prefix);
        !prefix.is_empty() && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    own == Some(repository) || settings.allowed.iter().any(|prefix| under(prefix))
}

/// The reference without tag and digest; `None` if it is no image reference.
fn repository(image: &str) -> Option<&str> {
    let (name, digest) = image
        .split_once('@')
        .map_or((image, None), |(name, digest)| (name, Some(digest)));
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if let Some(digest) = digest {
        let sum = digest.strip_prefix("sha256:")?;
        (sum.len() == 64 && sum.bytes().all(hex)).then_some(())?;
    }
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let colon = name.get(last..)?.find(':').map(|at| last + at);
    let (repository, tag) = colon.map_or((name, None), |at| {
        (name.get(..at).unwrap_or(""), name.get(at + 1..))
    });
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if let Some(tag) = tag {
        ((1..=128).contains(&tag.len()) && tag.bytes().all(legal)).then_some(())?;
    }
    let port = |b: u8| b == b':';
    let mut elements = repository.split('/').enumerate();
    elements
        .all(|(at, element)| {
            let legal = |b: u8| legal(b) || (at == 0 && port(b));
            !element.is_empty() && !element.starts_with('.') && element.bytes().all(legal)
        })
        .then_some(repository)
}
