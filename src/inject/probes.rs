//! Probes and lifecycle handlers that the kubelet sends over the network, handed to the agent.
//!
//! The kubelet dials the pod from outside the mesh and would be refused where mutual TLS is strict. Its handler is
//! replaced by one that the agent serves; the original goes to the agent, which repeats it inside the pod.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::IpAddr,
};

use serde_json::value::RawValue;

use super::{
    capture::{AGENT_PORT, STATUS_PORT},
    lax::{
        Fields, Lax, Raw, Slot, Table, Text, write_canonical, write_text, write_text_unexpanded,
    },
    patch::{Operations, Pointer},
    pod::{Container, Handlers, Lifecycle},
    reason::{Warning, WarningCode},
};

/// Original handlers as JSON, by the path at which the agent serves them: the value of `MALHA_PROBES`.
#[derive(Debug, Default)]
pub(super) struct Records {
    by_path: BTreeMap<String, String>,
    /// Paths that this call has recorded.
    fresh: BTreeSet<String>,
}

impl Records {
    /// What an earlier call recorded.
    pub(super) fn of_earlier_call(records: &BTreeMap<String, Box<RawValue>>) -> Self {
        let canonical = |raw: &RawValue| {
            let mut json = String::new();
            write_canonical(Raw(raw), &mut json);
            json
        };
        let by_path = records
            .iter()
            .map(|(path, raw)| (path.clone(), canonical(raw)));
        Self {
            by_path: by_path.collect(),
            ..Self::default()
        }
    }

    pub(super) fn have_grown(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// The value of the variable.
    pub(super) fn to_json(&self) -> String {
        let mut json = String::from("{");
        for (path, record) in &self.by_path {
            if json.len() > 1 {
                json.push(',');
            }
            write_text(path, &mut json);
            json.push(':');
            json.push_str(record);
        }
        json.push('}');
        json
    }

    /// The handler is the agent's already, or stands in a second container of one name, which is refused anyway. One
    /// that another webhook has written over ours since is neither.
    fn is_settled(&self, path: &str, networked: &Networked<'_>) -> bool {
        let is_agents = || {
            let port = networked.fields.read::<i64>("port");
            let at = networked.fields.read::<Text<'_>>("path");
            port.present() == Some(&AGENT_PORT.into()) && at.text() == Some(path)
        };
        self.fresh.contains(path) || (self.by_path.contains_key(path) && is_agents())
    }

    fn insert(&mut self, path: String, record: String) {
        self.fresh.insert(path.clone());
        self.by_path.insert(path, record);
    }
}

/// Where a handler stands in a container, and what the agent calls it.
struct Site {
    tokens: &'static [&'static str],
    route: &'static str,
    name: &'static str,
    handlers: for<'a> fn(&Container<'a>) -> Slot<Handlers<'a>>,
    /// Only `httpGet` is sent over the network; the kubelet never runs a lifecycle `tcpSocket`.
    lifecycle: bool,
}

const SITES: [Site; 5] = [
    Site {
        tokens: &["livenessProbe"],
        route: "app-health",
        name: "livez",
        handlers: |container| container.liveness.read(),
        lifecycle: false,
    },
    Site {
        tokens: &["readinessProbe"],
        route: "app-health",
        name: "readyz",
        handlers: |container| container.readiness.read(),
        lifecycle: false,
    },
    Site {
        tokens: &["startupProbe"],
        route: "app-health",
        name: "startupz",
        handlers: |container| container.startup.read(),
        lifecycle: false,
    },
    Site {
        tokens: &["lifecycle", "postStart"],
        route: "app-lifecycle",
        name: "poststart",
        handlers: |container| lifecycle(container).post_start,
        lifecycle: true,
    },
    Site {
        tokens: &["lifecycle", "preStop"],
        route: "app-lifecycle",
        name: "prestop",
        handlers: |container| lifecycle(container).pre_stop,
        lifecycle: true,
    },
];

fn lifecycle<'a>(container: &Container<'a>) -> Lifecycle<'a> {
    container
        .lifecycle
        .read()
        .into_present()
        .unwrap_or_default()
}

/// A handler that the kubelet sends over the network.
struct Networked<'a> {
    kind: &'static str,
    fields: Fields<'a>,
    timeout_seconds: Option<i64>,
}

/// A port as Kubernetes lets one write it.
#[derive(Debug)]
enum Port<'a> {
    Number(i64),
    Name(Text<'a>),
}

impl<'a> Lax<'a> for Port<'a> {
    fn integer(value: i64) -> Option<Self> {
        Some(Self::Number(value))
    }
    fn text(text: Cow<'a, str>) -> Option<Self> {
        Some(Self::Name(text))
    }
}

/// Rewrites the handlers of one container, which stands at `pointer`, and records the originals.
pub(super) fn rewrite(
    container: &Container<'_>,
    pointer: &Pointer,
    records: &mut Records,
    operations: &mut Operations,
    warnings: &mut Vec<Warning>,
) {
    let Some(name) = container.name() else {
        return;
    };
    for site in &SITES {
        let Some(networked) = networked(container, site) else {
            continue;
        };
        let path = path(site, name);
        if records.is_settled(&path, &networked) {
            continue;
        }
        match target(container, &networked) {
            Ok(port) => {
                let original = record(&networked, port);
                let at = site
                    .tokens
                    .iter()
                    .fold(pointer.clone(), |at, token| at.key(token));
                replace(&networked, &at, &path, operations);
                records.insert(path, original);
            }
            Err(fault) => warnings.push(fault.warning(name, site)),
        }
    }
}

/// Whether anything of the container's would be rewritten.
pub(super) fn has_networked(container: &Container<'_>) -> bool {
    SITES
        .iter()
        .any(|site| networked(container, site).is_some())
}

/// The ports that the kubelet dials in this container itself.
pub(super) fn probed_ports(container: &Container<'_>) -> Vec<u16> {
    let networked = SITES.iter().filter_map(|site| networked(container, site));
    networked
        .filter_map(|networked| resolve(container, &networked.fields).ok())
        .collect()
}

/// The one handler, if it goes over the network. Two handlers are refused by the API server in better words.
fn networked<'a>(container: &Container<'a>, site: &Site) -> Option<Networked<'a>> {
    let handlers = (site.handlers)(container).into_present()?;
    let timeout_seconds = handlers.timeout_seconds.present().copied();
    let there = [
        ("httpGet", handlers.http_get),
        ("tcpSocket", handlers.tcp_socket),
        ("grpc", handlers.grpc),
    ];
    let mut networked = there
        .into_iter()
        .filter_map(|(kind, fields)| Some((kind, fields.into_present()?)));
    let (kind, fields) = networked.next()?;
    let alone = networked.next().is_none() && handlers.exec.is_none() && handlers.sleep.is_none();
    let sent = alone && (!site.lifecycle || kind == "httpGet");
    sent.then_some(Networked {
        kind,
        fields,
        timeout_seconds,
    })
}

/// Why a handler stays as it is.
enum Fault {
    PortUnresolved,
    PortIsOurs(u16),
    HostExternal,
}

impl Fault {
    fn warning(&self, container: &str, site: &Site) -> Warning {
        let handler = site.tokens.last().copied().unwrap_or_default();
        let container = super::annotations::shown(container);
        match self {
            Self::PortUnresolved => Warning::new(
                WarningCode::ProbePortUnresolved,
                format_args!(
                    "{handler} of {container} stays as it is: its port is no port of the container"
                ),
            ),
            Self::PortIsOurs(port) => Warning::new(
                WarningCode::ProbePortUnresolved,
                format_args!(
                    "{handler} of {container} stays as it is: port {port} is the sidecar's own"
                ),
            ),
            Self::HostExternal => Warning::new(
                WarningCode::ProbeHostExternal,
                format_args!("{handler} of {container} stays as it is: it dials another host"),
            ),
        }
    }
}

/// The port inside the pod that the handler dials.
fn target(container: &Container<'_>, networked: &Networked<'_>) -> Result<u16, Fault> {
    if networked.kind != "grpc" && !dials_the_pod(&networked.fields) {
        return Err(Fault::HostExternal);
    }
    match resolve(container, &networked.fields)? {
        port @ (AGENT_PORT | STATUS_PORT) => Err(Fault::PortIsOurs(port)),
        port => Ok(port),
    }
}

fn resolve(container: &Container<'_>, fields: &Fields<'_>) -> Result<u16, Fault> {
    let number = match fields.read::<Port<'_>>("port") {
        Slot::Present(Port::Number(number)) => Some(number),
        Slot::Present(Port::Name(name)) => {
            let named = container
                .ports()
                .find(|port| port.name.text() == Some(&name));
            named.and_then(|port| port.number.present().copied())
        }
        Slot::Missing | Slot::Odd => None,
    };
    let port = number.and_then(|number| u16::try_from(number).ok());
    port.filter(|port| *port != 0).ok_or(Fault::PortUnresolved)
}

/// No host, or one that can only mean the pod.
fn dials_the_pod(fields: &Fields<'_>) -> bool {
    match fields.read::<Text<'_>>("host") {
        Slot::Missing => true,
        Slot::Odd => false,
        Slot::Present(host) => {
            let address = host
                .trim_start_matches('[')
                .trim_end_matches(']')
                .parse::<IpAddr>();
            host.is_empty()
                || host == "localhost"
                || address.is_ok_and(|address| address.is_loopback())
        }
    }
}

/// `/app-health/<container>/livez` and the like.
fn path(site: &Site, container: &str) -> String {
    format!("/{}/{}/{}", site.route, encoded(container), site.name)
}

/// A container's name as one element of a path, so that no odd name makes two paths equal.
pub(super) fn encoded(container: &str) -> String {
    let mut element = String::with_capacity(container.len());
    for byte in container.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            element.push(char::from(byte));
        } else {
            write!(element, "%{byte:02X}").expect("a string takes everything");
        }
    }
    element
}

/// `{"httpGet": <as it was, its port a number>, "named": <its port's name>, "timeoutSeconds": ..}`.
fn record(networked: &Networked<'_>, port: u16) -> String {
    let mut json = String::with_capacity(96);
    json.push('{');
    write_text(networked.kind, &mut json);
    json.push(':');
    write_fields(
        &networked.fields,
        &[("port", port.to_string())],
        &[],
        &mut json,
    );
    if let Slot::Present(Port::Name(name)) = networked.fields.read("port") {
        json.push_str(",\"named\":");
        write_text_unexpanded(&name, &mut json);
    }
    if let Some(seconds) = networked.timeout_seconds {
        write!(json, ",\"timeoutSeconds\":{seconds}").expect("a string takes everything");
    }
    json.push('}');
    json
}

/// The new handler keeps the headers, and any field that we do not know; it loses the host, which Pod Security forbids.
fn replace(networked: &Networked<'_>, handlers: &Pointer, path: &str, operations: &mut Operations) {
    let mut written_path = String::new();
    write_text(path, &mut written_path);
    let ours = [
        ("path", written_path),
        ("port", AGENT_PORT.to_string()),
        ("scheme", "\"HTTP\"".to_owned()),
    ];
    let mut json = String::with_capacity(96);
    if networked.kind == "httpGet" {
        write_fields(&networked.fields, &ours, &["host"], &mut json);
        operations.replace(&handlers.key("httpGet"), &json);
    } else {
        write_fields(&Table::default(), &ours, &[], &mut json);
        operations.remove(&handlers.key(networked.kind));
        operations.add(&handlers.key("httpGet"), &json);
    }
}

/// Writes `fields` with some values put in and some keys left out, sorted by key.
fn write_fields(fields: &Fields<'_>, with: &[(&str, String)], without: &[&str], out: &mut String) {
    let mut all: BTreeMap<&str, Cow<'_, str>> = BTreeMap::new();
    for (key, raw) in fields.iter().filter(|(key, _)| !without.contains(key)) {
        let mut value = String::new();
        write_canonical(*raw, &mut value);
        all.insert(key, Cow::Owned(value));
    }
    all.extend(
        with.iter()
            .map(|(key, value)| (*key, Cow::Borrowed(value.as_str()))),
    );
    out.push('{');
    for (at, (key, value)) in all.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        write_text_unexpanded(key, out);
        out.push(':');
        out.push_str(value);
    }
    out.push('}');
}

/// Reads one record back: the kind of handler, and its fields as they stood in the pod.
pub(super) fn original(record: &serde_json::Value) -> Option<(&'static str, serde_json::Value)> {
    let kind = ["httpGet", "tcpSocket", "grpc"]
        .into_iter()
        .find(|kind| record.get(kind).is_some())?;
    let mut fields = record.get(kind)?.clone();
    if let Some(name) = record.get("named") {
        fields
            .as_object_mut()?
            .insert("port".to_owned(), name.clone());
    }
    Some((kind, fields))
}

/// Where in a container the handler stands that is served at `path`, and the container's name, still encoded.
pub(super) fn site_of(path: &str) -> Option<(&'static [&'static str], &str)> {
    let (rest, name) = path.rsplit_once('/')?;
    let (route, container) = rest.strip_prefix('/')?.split_once('/')?;
    let site = SITES
        .iter()
        .find(|site| site.name == name && site.route == route)?;
    Some((site.tokens, container))
}
