//! What the facts of a check mean: a pure function, one finding or more for each id.
//!
//! [`Facts`] -> [`verdicts`] -> [`Finding`]s with a mark, and a way out for each that is not in order

use std::{collections::BTreeMap, time::Duration};

use jiff::SignedDuration;
use serde_json::Value;

use super::{
    admission::{Outcome, Tried},
    facts::{Facts, Installed, Looked},
    issuance::Issuance,
};
use crate::{
    ca::{bundle::Bundle, rotation::CLOCK_TOLERANCE},
    cli::{
        rendering::{self, ObjectName},
        rollout,
        terminal::Mark,
    },
    inject::{
        NamespaceFacts,
        select::{INJECT, INJECTION, NAMESPACE_NAME, REVISION, is_protected},
    },
};

/// The oldest API server that evaluates everything the manifests say.
const OLDEST_MINOR: u32 = 33;
/// From here on a difference of clocks is worth knowing; beyond [`CLOCK_TOLERANCE`] certificates are not believed.
const NOTABLE_SKEW: Duration = Duration::from_secs(30);

/// Every id there is. Each has its section in docs/codes.md.
#[cfg(test)]
pub(in crate::cli) const IDS: [&str; 14] = [
    "api-version",
    "clock",
    "rights",
    "crds",
    "foreign-webhooks",
    "installed",
    "control-plane",
    "authority",
    "trust-bundles",
    "webhooks",
    "admission-policy",
    "ca-bundle",
    "admission",
    "issuance",
];

/// One line of the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    /// Stable: scripts and alerts name it.
    pub(super) id: &'static str,
    pub(super) mark: Mark,
    pub(super) text: String,
    /// The way out; empty where all is in order.
    pub(super) hint: String,
}

fn pass(id: &'static str, text: impl Into<String>) -> Finding {
    finding(id, Mark::Pass, text, "")
}

fn warn(id: &'static str, text: impl Into<String>, hint: impl Into<String>) -> Finding {
    finding(id, Mark::Warn, text, hint)
}

fn fail(id: &'static str, text: impl Into<String>, hint: impl Into<String>) -> Finding {
    finding(id, Mark::Fail, text, hint)
}

fn finding(
    id: &'static str,
    mark: Mark,
    text: impl Into<String>,
    hint: impl Into<String>,
) -> Finding {
    #[cfg(test)]
    assert!(IDS.contains(&id), "{id}");
    let (text, hint) = (text.into(), hint.into());
    Finding {
        id,
        mark,
        text,
        hint,
    }
}

/// What `judge` makes of a fact; a warning where there is none.
fn looked<T>(
    id: &'static str,
    fact: &Looked<T>,
    judge: impl FnOnce(&T) -> Vec<Finding>,
) -> Vec<Finding> {
    match fact {
        Ok(fact) => judge(fact),
        Err(why) => vec![warn(
            id,
            format!("could not be looked at: {why}"),
            "ask with the rights to read it",
        )],
    }
}

/// What all facts mean, in the order in which a reader wants them: what is below comes first.
pub(super) fn verdicts(facts: &Facts) -> Vec<Finding> {
    let mut all = looked("api-version", &facts.minor, |minor| vec![version(*minor)]);
    all.extend(looked("clock", &facts.skew, |skew| vec![clock(*skew)]));
    if let Some(denied) = &facts.rights {
        all.extend(looked("rights", denied, |denied| vec![rights(denied)]));
    }
    all.extend(looked("crds", &facts.crds, |found| {
        crds(found, facts.installed.is_some())
    }));
    all.extend(looked("foreign-webhooks", &facts.mutating, |found| {
        foreign(found)
    }));
    if let Some(installed) = &facts.installed {
        all.extend(looked("installed", installed, |found| match found {
            None => vec![fail(
                "installed",
                format!("there is no namespace {}", rendering::NAMESPACE),
                "install: malha install --apply",
            )],
            Some(found) => after(found),
        }));
    }
    all
}

fn version(minor: u32) -> Finding {
    let text = format!("the API server is 1.{minor}");
    if minor >= OLDEST_MINOR {
        return pass("api-version", text);
    }
    fail(
        "api-version",
        text,
        format!("upgrade the cluster: Malha needs Kubernetes 1.{OLDEST_MINOR} or later"),
    )
}

fn clock(skew: SignedDuration) -> Finding {
    let seconds = skew.as_secs();
    let direction = if seconds < 0 { "behind" } else { "ahead of" };
    let text = format!(
        "the API server's clock is {} s {direction} this machine's",
        seconds.unsigned_abs()
    );
    let hint = "set both clocks by NTP: certificates are good from and until an instant that all must agree on";
    match skew.unsigned_abs() {
        skew if skew <= NOTABLE_SKEW => pass("clock", text),
        skew if skew <= CLOCK_TOLERANCE => warn("clock", text, hint),
        _ => fail("clock", text, hint),
    }
}

fn rights(denied: &[String]) -> Finding {
    if denied.is_empty() {
        return pass("rights", "everything may be applied");
    }
    fail(
        "rights",
        format!("you may not {}", denied.join(", ")),
        "install with the rights of a cluster administrator",
    )
}

/// The kinds that the mesh is told by, and to whom they belong: Istio has some of the same names.
fn crds(found: &[Value], must_be_there: bool) -> Vec<Finding> {
    let wanted = rendering::objects(false);
    let wanted = wanted
        .iter()
        .filter(|object| object["kind"] == "CustomResourceDefinition");
    let judge = |wanted: &Value| {
        let name = name_of(wanted);
        match found.iter().find(|found| name_of(found) == name) {
            None if must_be_there => fail(
                "crds",
                format!("there is no CustomResourceDefinition {name}"),
                "apply it again: malha install --apply",
            ),
            None => pass("crds", format!("{name} is not there yet")),
            Some(found) => crd(name, found),
        }
    };
    wanted.map(judge).collect()
}

fn crd(name: &str, found: &Value) -> Finding {
    let label = |key: &str| found["metadata"]["labels"][key].as_str();
    let mut versions = found["spec"]["versions"].as_array().into_iter().flatten();
    let served = versions.any(|version| version["name"] == "v1" && version["served"] == true);
    if !served {
        return fail(
            "crds",
            format!("{name} does not serve version v1, which the control plane watches"),
            "bring whoever owns it up to date, or apply ours: malha install --apply --force",
        );
    }
    if label("app.kubernetes.io/part-of") == Some("malha") {
        return pass("crds", format!("{name} is ours"));
    }
    let mut labels = [
        "app.kubernetes.io/part-of",
        "helm.sh/chart",
        "app",
        "release",
    ]
    .iter();
    let owner = labels.find_map(|key| label(key)).unwrap_or("somebody else");
    warn(
        "crds",
        format!("{name} belongs to {owner}"),
        "it serves what is needed; malha install --apply names the fields in dispute, and --force takes them over",
    )
}

/// Other webhooks that see the pods of the mesh. One that asks for Istio's labels too is a second injector.
fn foreign(configurations: &[Value]) -> Vec<Finding> {
    let mut rivals = Vec::new();
    let mut others = Vec::new();
    for configuration in configurations {
        let name = name_of(configuration);
        if name == "malha-injector" {
            continue;
        }
        for webhook in list(configuration, "/webhooks").filter(|webhook| sees_our_pods(webhook)) {
            let webhook_name = webhook["name"].as_str().unwrap_or_default();
            let both = format!("{name} ({webhook_name})");
            if asks_for_our_labels(webhook) {
                rivals.push(both);
            } else {
                others.push(both);
            }
        }
    }
    if !rivals.is_empty() {
        return vec![fail(
            "foreign-webhooks",
            format!(
                "another injector answers for the same labels: {}",
                rivals.join(", ")
            ),
            "a pod gets one sidecar: remove that configuration, or give one of both a revision (istio.io/rev) of its own",
        )];
    }
    let text = match others.as_slice() {
        [] => "no other webhook sees the same pods".to_owned(),
        others => format!(
            "no other injector; also asked about the same pods: {}",
            others.join(", ")
        ),
    };
    vec![pass("foreign-webhooks", text)]
}

fn sees_our_pods(webhook: &Value) -> bool {
    let pods = list(webhook, "/rules").any(|rule| {
        let has = |field: &str, words: &[&str]| {
            let mut listed = list(rule, field);
            listed.any(|word| word.as_str().is_some_and(|word| words.contains(&word)))
        };
        has("/apiGroups", &["", "*"])
            && has("/resources", &["pods", "*", "*/*"])
            && has("/operations", &["CREATE", "*"])
    });
    let labels = BTreeMap::from([(INJECTION, "enabled"), (NAMESPACE_NAME, "shop")]);
    pods && matches(&webhook["namespaceSelector"], &labels)
        && matches(&webhook["objectSelector"], &BTreeMap::new())
}

fn asks_for_our_labels(webhook: &Value) -> bool {
    ["namespaceSelector", "objectSelector"]
        .iter()
        .any(|selector| {
            let selector = webhook[selector].to_string();
            [INJECTION, REVISION, INJECT]
                .iter()
                .any(|label| selector.contains(&format!("{label:?}")))
        })
}

/// A LabelSelector as the API server reads it; an absent one matches everything.
fn matches(selector: &Value, labels: &BTreeMap<&str, &str>) -> bool {
    let equal = selector["matchLabels"].as_object().into_iter().flatten();
    let mut equal = equal.map(|(key, value)| labels.get(key.as_str()).copied() == value.as_str());
    let mut expressions = list(selector, "/matchExpressions").map(|expression| {
        let key = expression["key"].as_str().unwrap_or_default();
        let value = labels.get(key);
        let listed = list(expression, "/values").any(|listed| listed.as_str() == value.copied());
        match expression["operator"].as_str() {
            Some("In") => value.is_some() && listed,
            Some("NotIn") => value.is_none() || !listed,
            Some("Exists") => value.is_some(),
            Some("DoesNotExist") => value.is_none(),
            _ => false,
        }
    });
    equal.all(|holds| holds) && expressions.all(|holds| holds)
}

fn after(found: &Installed) -> Vec<Finding> {
    let mut all = looked("control-plane", &found.deployment, |deployment| {
        vec![control_plane(deployment.as_ref(), &found.pods)]
    });
    all.extend(looked("authority", &found.bundle, |bundle| {
        vec![authority(bundle.as_ref())]
    }));
    let bundle = found.bundle.as_ref().ok().and_then(Option::as_ref);
    all.extend(looked("trust-bundles", &found.trusted, |trusted| {
        looked("trust-bundles", &found.namespaces, |namespaces| {
            vec![trust_bundles(namespaces, trusted, bundle)]
        })
    }));
    all.extend(looked("webhooks", &found.guards, |guards| {
        as_installed(guards)
    }));
    if let (Ok(guards), Some(bundle)) = (&found.guards, bundle) {
        all.push(ca_bundle(guards, bundle));
    }
    all.extend(looked("admission", &found.tried, |tried| {
        vec![admission(tried)]
    }));
    all.extend(looked("issuance", &found.issued, issuance));
    all
}

fn control_plane(deployment: Option<&Value>, pods: &Looked<Vec<Value>>) -> Finding {
    let id = "control-plane";
    let Some(deployment) = deployment else {
        return fail(
            id,
            format!("there is no Deployment {}/malha", rendering::NAMESPACE),
            "install: malha install --apply",
        );
    };
    let number = |pointer: &str, absent: u64| {
        let value = deployment.pointer(pointer).and_then(Value::as_u64);
        value.unwrap_or(absent)
    };
    let wanted = number("/spec/replicas", 1);
    let ready = number("/status/availableReplicas", 0);
    let mut why: Vec<String> = pods.iter().flatten().filter_map(why_not_ready).collect();
    why.dedup();
    let mut text = format!("{ready} of {wanted} replicas are available");
    for why in &why {
        text.push_str(&format!("; {why}"));
    }
    let hint = format!(
        "kubectl -n {0} describe pods, and kubectl -n {0} logs deployment/malha",
        rendering::NAMESPACE
    );
    match ready {
        0 => fail(id, text, hint),
        _ if ready < wanted || rollout::left(deployment).is_some() => warn(id, text, hint),
        1 => warn(
            id,
            "the one replica is available; while it restarts, no pod of the mesh can be made",
            "kubectl -n malha-system scale deployment/malha --replicas 2",
        ),
        _ => pass(id, text),
    }
}

/// `pod malha-1: ImagePullBackOff`, `pod malha-1: Unschedulable: no nodes available`.
fn why_not_ready(pod: &Value) -> Option<String> {
    let name = name_of(pod);
    let waiting = list(pod, "/status/containerStatuses")
        .find_map(|status| status["state"]["waiting"]["reason"].as_str());
    if let Some(reason) = waiting {
        return Some(format!("pod {name}: {reason}"));
    }
    let mut conditions = list(pod, "/status/conditions");
    let scheduled = conditions.find(|condition| condition["type"] == "PodScheduled")?;
    (scheduled["status"] == "False").then(|| {
        let word = |field: &str| scheduled[field].as_str().unwrap_or_default();
        format!("pod {name}: {}: {}", word("reason"), word("message"))
    })
}

fn authority(bundle: Option<&Bundle>) -> Finding {
    match bundle {
        Some(bundle) => pass(
            "authority",
            format!("the journal is there; {} root(s) are trusted", bundle.len()),
        ),
        None => fail(
            "authority",
            format!(
                "there is no Secret {}/malha-ca: nothing signs",
                rendering::NAMESPACE
            ),
            "the first leader makes it: see control-plane; where it was deleted, restore it from a backup, because a new root locks out every running pod",
        ),
    }
}

fn trust_bundles(
    namespaces: &[NamespaceFacts],
    trusted: &BTreeMap<String, String>,
    bundle: Option<&Bundle>,
) -> Finding {
    let id = "trust-bundles";
    let home = rendering::NAMESPACE;
    let must = namespaces
        .iter()
        .map(|namespace| namespace.name.as_str())
        .filter(|name| *name == home || !is_protected(name));
    let (mut count, mut absent, mut other) = (0, Vec::new(), Vec::new());
    for namespace in must {
        count += 1;
        match (trusted.get(namespace), bundle) {
            (None, _) => absent.push(namespace),
            (Some(pem), Some(bundle))
                if Bundle::parse_pem(pem.as_bytes()).as_ref() != Ok(bundle) =>
            {
                other.push(namespace);
            }
            _ => {}
        }
    }
    let hint = "the leader writes them within seconds: see control-plane, and the log of its pods for the namespace's name";
    if !absent.is_empty() {
        let text = format!(
            "ConfigMap malha-ca-root-cert is not in {}: pods there wait for it",
            some_of(&absent)
        );
        return fail(id, text, hint);
    }
    if !other.is_empty() {
        let text = format!(
            "ConfigMap malha-ca-root-cert does not hold the authority's roots in {}: pods there trust somebody else",
            some_of(&other)
        );
        return fail(id, text, hint);
    }
    pass(id, format!("{count} namespaces hold malha-ca-root-cert"))
}

/// Whether what brings pods to the injector, or refuses them without it, is what was installed.
fn as_installed(guards: &[Value]) -> Vec<Finding> {
    let mut all = Vec::new();
    for (id, kinds) in GUARDS {
        let mut faults: Vec<Finding> = Vec::new();
        for wanted in rendering::objects(false) {
            let name = ObjectName::of(&wanted);
            if !kinds.contains(&name.resource.kind.as_str()) {
                continue;
            }
            let same = |found: &&Value| {
                found["kind"] == wanted["kind"] && name_of(found) == name_of(&wanted)
            };
            match guards.iter().find(same) {
                None => faults.push(fail(
                    id,
                    format!("{name} is gone"),
                    "put it back: malha install --apply",
                )),
                Some(found) => faults.extend(edited(id, &name, &wanted, found)),
            }
        }
        if faults.is_empty() {
            faults.push(pass(id, "as installed"));
        }
        all.extend(faults);
    }
    all
}

/// Ids and the kinds of the rendering that they look after.
const GUARDS: [(&str, &[&str]); 2] = [
    (
        "webhooks",
        &[
            "MutatingWebhookConfiguration",
            "ValidatingWebhookConfiguration",
        ],
    ),
    (
        "admission-policy",
        &[
            "ValidatingAdmissionPolicy",
            "ValidatingAdmissionPolicyBinding",
        ],
    ),
];

fn edited(id: &'static str, name: &ObjectName, wanted: &Value, found: &Value) -> Option<Finding> {
    let label = "/metadata/labels/app.kubernetes.io~1version";
    let version = |object: &Value| object.pointer(label).cloned().unwrap_or_default();
    if version(wanted) != version(found) {
        return Some(warn(
            id,
            format!(
                "{name} is of version {}, and this program of {}",
                version(found),
                version(wanted)
            ),
            "check with the program of the installed version, or upgrade: malha install --apply",
        ));
    }
    let difference = ["webhooks", "spec"]
        .iter()
        .find_map(|part| first_difference(part, &wanted[part], &found[part]))?;
    Some(warn(
        id,
        format!("{name} was edited: {difference}"),
        "put it back: malha install --apply --force",
    ))
}

/// The first field of `wanted` that is something else in `found`. What only `found` has is a default, or written by the
/// control plane.
fn first_difference(at: &str, wanted: &Value, found: &Value) -> Option<String> {
    match (wanted, found) {
        (Value::Object(wanted), Value::Object(found)) => wanted.iter().find_map(|(key, wanted)| {
            let found = found.get(key).unwrap_or(&Value::Null);
            first_difference(&format!("{at}.{key}"), wanted, found)
        }),
        (Value::Array(wanted), Value::Array(found)) if wanted.len() == found.len() => {
            let mut pairs = wanted.iter().zip(found).enumerate();
            pairs.find_map(|(index, (wanted, found))| {
                let named = wanted["name"].as_str();
                let place = named.map_or_else(|| index.to_string(), str::to_owned);
                first_difference(&format!("{at}[{place}]"), wanted, found)
            })
        }
        _ if wanted == found => None,
        _ => Some(format!(
            "{at} is {}, and was {}",
            brief(found),
            brief(wanted)
        )),
    }
}

fn brief(value: &Value) -> String {
    match value {
        Value::Null => "not set".to_owned(),
        Value::Array(items) => format!("a list of {}", items.len()),
        value => value.to_string(),
    }
}

fn ca_bundle(guards: &[Value], bundle: &Bundle) -> Finding {
    let id = "ca-bundle";
    let entries = guards.iter().flat_map(|guard| list(guard, "/webhooks"));
    let (mut count, mut wrong) = (0, Vec::new());
    for entry in entries {
        count += 1;
        let name = entry["name"].as_str().unwrap_or_default();
        let Some(encoded) = entry["clientConfig"]["caBundle"].as_str() else {
            wrong.push(format!("{name} (empty)"));
            continue;
        };
        match decoded(encoded) {
            Some(live) if live == *bundle => {}
            Some(_) => wrong.push(format!("{name} (another's)")),
            None => wrong.push(format!("{name} (unreadable)")),
        }
    }
    if wrong.is_empty() {
        return pass(id, format!("{count} webhooks trust the authority's roots"));
    }
    let wrong: Vec<_> = wrong.iter().map(String::as_str).collect();
    fail(
        id,
        format!(
            "the caBundle of {} is not the authority's: the API server does not believe the webhook",
            some_of(&wrong)
        ),
        "the leader writes it back within seconds: see control-plane; whoever else writes that field must stop",
    )
}

fn decoded(encoded: &str) -> Option<Bundle> {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    let pem = BASE64_STANDARD.decode(encoded).ok()?;
    Bundle::parse_pem(&pem).ok()
}

fn admission(tried: &Tried) -> Finding {
    let id = "admission";
    let Some(fault) = tried.fault() else {
        let namespace = &tried.namespace;
        return pass(
            id,
            format!("a pod in a dry run got its sidecar in namespace {namespace}"),
        );
    };
    fail(id, fault, way_out(&tried.outcome))
}

/// Nothing where nobody was asked: another id says why.
fn issuance(issued: &Issuance) -> Vec<Finding> {
    let id = "issuance";
    match issued {
        Issuance::NobodyAsked => Vec::new(),
        Issuance::Issued(identity) => {
            vec![pass(id, format!("a certificate was issued for {identity}"))]
        }
        Issuance::Refused(why) => vec![fail(
            id,
            format!("no certificate is issued: {why}"),
            "a code in the text is explained by `malha doc CODE`; else see control-plane, and the log of its pods",
        )],
    }
}

fn way_out(outcome: &Outcome) -> &'static str {
    let words = match outcome {
        Outcome::Injected => return "",
        Outcome::Plain | Outcome::Unasked => {
            return "see webhooks and admission-policy: malha install --apply puts them back";
        }
        Outcome::Refused(_) => {
            return "what refuses it stands in the text: try another namespace, or allow there what a sidecar needs";
        }
        Outcome::Uncalled(words) => words,
    };
    let says = |any: &[&str]| any.iter().any(|one| words.contains(one));
    if says(&["x509", "certificate"]) {
        "the API server does not believe the webhook's certificate: see ca-bundle and clock"
    } else if says(&["no endpoints", "connection refused"]) {
        "nobody listens: see control-plane; if its pods are ready, something answers for TCP 15017 in their place"
    } else if says(&["not found", "no such host"]) {
        "Service malha-system/malha is not as installed: malha install --apply puts it back"
    } else if says(&[
        "deadline",
        "timeout",
        "timed out",
        "did not answer",
        "no route",
        "unreachable",
    ]) {
        "something drops what the API server sends: let it reach TCP 15017 of the control plane's pods (a firewall between API server and nodes, a NetworkPolicy)"
    } else {
        "see control-plane, and the log of the API server"
    }
}

fn some_of(names: &[&str]) -> String {
    match names.len() {
        0..=5 => names.join(", "),
        count => format!("{} and {} more", names[..3].join(", "), count - 3),
    }
}

fn name_of(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

fn list<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    let list = value.pointer(pointer).and_then(Value::as_array);
    list.into_iter().flatten()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
