//! Text becomes settings once, at the door.
//!
//! flags, environment, file -> [`Layers`] -> [`Settings`], or an error that names the key
//!
//! One table, [`KEYS`], says which keys there are. The flags of `malha serve`, the environment's names, the file's keys
//! and the help text all come from it, so that none of them can know a key that the others do not.

use std::{
    collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration,
};

use jiff::{Span, SpanRelativeTo};

use crate::{
    ca::{
        LeafPolicy,
        rotation::{PolicyError, RotationPolicy},
    },
    caller::NodeProxies,
    identity::TrustDomain,
};

/// What `malha serve` runs with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The name that all identities share.
    pub trust_domain: TrustDomain,
    /// The control plane's own namespace.
    pub namespace: String,
    /// The revision whose pods this control plane injects.
    pub revision: String,
    /// What this cluster is called by agents that say of which one they are.
    pub cluster: String,
    /// Where the admission webhook listens.
    pub webhook_addr: SocketAddr,
    /// Where certificates are signed.
    pub ca_addr: SocketAddr,
    /// Where health and metrics are told, in plain HTTP.
    pub admin_addr: SocketAddr,
    /// Where the CLI's questions are answered, in plain HTTP: on loopback only.
    pub query_addr: SocketAddr,
    /// The cluster's DNS domain.
    pub cluster_domain: String,
    /// The operator's overrides of what is injected.
    pub injector_config: Option<PathBuf>,
    /// Audiences of which a token must name one, exactly.
    pub audiences: Vec<String>,
    /// How tokens are checked.
    pub validation: Validation,
    /// Whether a token must be bound to a living pod.
    pub require_bound_pod: bool,
    /// Who may ask for the certificates of the pods on its node.
    pub node_proxies: NodeProxies,
    /// How long certificates live.
    pub rotation: RotationPolicy,
    /// How long new connections are still taken after the first signal to stop.
    pub drain: Duration,
    /// Log filter, as `RUST_LOG` spells it.
    pub log: String,
}

/// How service-account tokens are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validation {
    /// Offline, and by TokenReview where offline knowledge is not enough.
    Auto,
    /// Offline only.
    Jwks,
    /// By the API server's TokenReview only.
    TokenReview,
}

/// One key: a flag `--name`, an environment variable `MALHA_NAME`, a key `name` of the file.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Lower case with dashes.
    pub name: &'static str,
    /// What a value looks like, for the help text.
    pub value: &'static str,
    /// Used where no layer says anything; empty where the setting may stay unset.
    pub default: &'static str,
    /// One sentence for the help text.
    pub help: &'static str,
}

/// Every key there is, in the order of the help text.
pub const KEYS: &[Key] = &[
    key(
        "trust-domain",
        "NAME",
        "cluster.local",
        "Trust domain of all SPIFFE ids",
    ),
    key(
        "namespace",
        "NAME",
        "malha-system",
        "Namespace of the control plane itself",
    ),
    key(
        "revision",
        "NAME",
        "default",
        "Revision whose pods are injected (label istio.io/rev)",
    ),
    key(
        "cluster",
        "NAME",
        "Kubernetes",
        "Name of this cluster; agents of another one are refused",
    ),
    key(
        "webhook-addr",
        "ADDR",
        "[::]:15017",
        "Where the admission webhook listens (HTTPS)",
    ),
    key(
        "ca-addr",
        "ADDR",
        "[::]:15012",
        "Where certificates are signed (HTTPS)",
    ),
    key(
        "admin-addr",
        "ADDR",
        "[::]:15014",
        "Where /livez, /readyz and /metrics answer (HTTP)",
    ),
    key(
        "query-addr",
        "ADDR",
        "127.0.0.1:15016",
        "Where `malha ps` and `malha config` ask (HTTP, loopback only)",
    ),
    key(
        "cluster-domain",
        "NAME",
        "cluster.local",
        "DNS domain of the cluster's Services",
    ),
    key(
        "injector-config",
        "FILE",
        "",
        "YAML that overrides the defaults of what is injected",
    ),
    key(
        "audiences",
        "LIST",
        "malha-ca",
        "Token audiences that are accepted, separated by commas",
    ),
    key(
        "validation",
        "HOW",
        "auto",
        "How tokens are checked: auto, jwks or tokenreview",
    ),
    key(
        "require-bound-pod",
        "BOOL",
        "true",
        "Refuse tokens that are bound to no pod",
    ),
    key(
        "node-proxies",
        "LIST",
        "",
        "Service accounts (NAMESPACE/NAME) that may ask for the pods on their node, such as istio-system/ztunnel",
    ),
    key(
        "leaf-life",
        "TIME",
        "24h",
        "Life of a workload certificate when none is asked for",
    ),
    key(
        "leaf-life-min",
        "TIME",
        "5m",
        "Shortest life that may be asked for",
    ),
    key(
        "leaf-life-max",
        "TIME",
        "7d",
        "Longest life that may be asked for",
    ),
    key(
        "intermediate-life",
        "TIME",
        "30d",
        "Life of the signing intermediate; rotated at half of it",
    ),
    key("root-life", "TIME", "1825d", "Life of the root certificate"),
    key(
        "drain",
        "TIME",
        "10s",
        "How long connections are still taken after SIGTERM; with 10 s more it must fit into the pod's grace period",
    ),
    key(
        "log",
        "FILTER",
        "info",
        "Log filter, such as info or malha=debug",
    ),
];

const fn key(
    name: &'static str,
    value: &'static str,
    default: &'static str,
    help: &'static str,
) -> Key {
    Key {
        name,
        value,
        default,
        help,
    }
}

impl Key {
    /// The environment variable of this key.
    pub fn env(&self) -> String {
        format!("MALHA_{}", self.name.replace('-', "_").to_uppercase())
    }
}

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A flag of the command line.
    Flag,
    /// An environment variable.
    Environment,
    /// The settings file.
    File,
    /// The table of this file.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flag => "flag",
            Self::Environment => "environment",
            Self::File => "file",
            Self::Default => "default",
        })
    }
}

/// The texts of all keys, the most specific first.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// By the key's name.
    pub flags: BTreeMap<String, String>,
    /// By the key's name (not the variable's).
    pub environment: BTreeMap<String, String>,
    /// By the key's name.
    pub file: BTreeMap<String, String>,
    /// By the key's name: what takes the place of the table's default.
    pub defaults: BTreeMap<String, String>,
}

impl Layers {
    /// Reads the settings file: a flat YAML map; a list may be written as one.
    ///
    /// # Errors
    /// Not YAML, not a map, or a key that does not exist (the nearest existing one is named).
    pub fn with_file(mut self, text: &str) -> Result<Self, ConfigError> {
        let read: Option<BTreeMap<String, serde_json::Value>> =
            serde_saphyr::from_str(text).map_err(|e| ConfigError::NotYaml(e.to_string()))?;
        for (name, value) in read.unwrap_or_default() {
            if !KEYS.iter().any(|key| key.name == name) {
                return Err(ConfigError::UnknownKey {
                    nearest: nearest(&name),
                    name,
                });
            }
            self.file.insert(name, scalar(&value));
        }
        Ok(self)
    }

    /// Reads the variables of all keys.
    pub fn with_environment(mut self, lookup: impl Fn(&str) -> Option<String>) -> Self {
        self.environment.extend(
            KEYS.iter()
                .filter_map(|key| Some((key.name.to_owned(), lookup(&key.env())?))),
        );
        self
    }

    /// Puts other defaults into the place of the table's.
    pub fn with_defaults(mut self, defaults: &[(&str, &str)]) -> Self {
        let owned = |&(name, text): &(&str, &str)| (name.to_owned(), text.to_owned());
        self.defaults.extend(defaults.iter().map(owned));
        self
    }

    /// The text in force for a key, and who said it.
    pub fn text(&self, key: &Key) -> (&str, Source) {
        let layers = [
            (&self.flags, Source::Flag),
            (&self.environment, Source::Environment),
            (&self.file, Source::File),
            (&self.defaults, Source::Default),
        ];
        layers
            .into_iter()
            .find_map(|(layer, source)| Some((layer.get(key.name)?.as_str(), source)))
            .unwrap_or((key.default, Source::Default))
    }

    /// Every key with its text and source: the one log line of the effective settings. No key holds a secret.
    pub fn effective(&self) -> impl Iterator<Item = (&'static str, &str, Source)> {
        KEYS.iter().map(|key| {
            let (text, source) = self.text(key);
            (key.name, text, source)
        })
    }

    fn parsed<T: FromStr>(&self, name: &str, allowed: &'static str) -> Result<T, ConfigError>
    where
        T::Err: fmt::Display,
    {
        self.parsed_with(name, allowed, |text| {
            text.parse().map_err(|e: T::Err| e.to_string())
        })
    }

    fn parsed_with<T>(
        &self,
        name: &str,
        allowed: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        let key = KEYS
            .iter()
            .find(|key| key.name == name)
            .expect("the table holds every key");
        let (text, origin) = self.text(key);
        parse(text).map_err(|fault| ConfigError::Invalid {
            key: key.name,
            origin,
            value: text.escape_debug().take(64).collect(),
            fault,
            allowed,
        })
    }
}

impl Settings {
    /// Parses and checks everything; what depends on two keys is checked here too.
    ///
    /// # Errors
    /// The first key that is wrong, with its source, its value and what is allowed.
    pub fn parse(layers: &Layers) -> Result<Self, ConfigError> {
        const ADDR: &str =
            "IP:PORT, such as [::]:15017 for every address, or 0.0.0.0:15017 for those of IPv4";
        let duration = |name| {
            layers.parsed_with(
                name,
                "a time such as 90s, 5m, 24h or 7d, above zero",
                parse_duration,
            )
        };
        let label = |name| layers.parsed_with(name, "a DNS label (RFC 1123)", parse_label);
        let settings = Self {
            trust_domain: layers.parsed(
                "trust-domain",
                "1 to 255 of a-z 0-9 . - _ (SPIFFE ID section 2.1)",
            )?,
            namespace: label("namespace")?,
            revision: label("revision")?,
            cluster: layers.parsed("cluster", "a name")?,
            webhook_addr: layers.parsed("webhook-addr", ADDR)?,
            ca_addr: layers.parsed("ca-addr", ADDR)?,
            admin_addr: layers.parsed("admin-addr", ADDR)?,
            query_addr: layers.parsed_with(
                "query-addr",
                "a loopback IP and a port, such as 127.0.0.1:15016 or [::1]:15016",
                parse_loopback,
            )?,
            cluster_domain: layers.parsed_with(
                "cluster-domain",
                "a DNS name such as cluster.local",
                parse_domain,
            )?,
            injector_config: layers.parsed_with("injector-config", "a file's path", |text| {
                Ok(Some(text)
                    .filter(|text| !text.is_empty())
                    .map(PathBuf::from))
            })?,
            audiences: layers.parsed_with("audiences", "names separated by commas", parse_list)?,
            validation: layers.parsed("validation", "auto, jwks or tokenreview")?,
            require_bound_pod: layers.parsed("require-bound-pod", "true or false")?,
            node_proxies: layers.parsed(
                "node-proxies",
                "NAMESPACE/SERVICEACCOUNT separated by commas, or nothing",
            )?,
            rotation: RotationPolicy {
                root_life: duration("root-life")?,
                intermediate_life: duration("intermediate-life")?,
                leaf: LeafPolicy {
                    default: duration("leaf-life")?,
                    min: duration("leaf-life-min")?,
                    max: duration("leaf-life-max")?,
                },
            },
            drain: layers.parsed_with("drain", "a time up to 5m", |text| {
                let drain = parse_duration(text)?;
                let bound = Duration::from_secs(300);
                if drain <= bound {
                    Ok(drain)
                } else {
                    Err("is longer than 5m".to_owned())
                }
            })?,
            log: layers.parsed("log", "a tracing filter")?,
        };
        settings.rotation.check()?;
        Ok(settings)
    }
}

impl FromStr for Validation {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "jwks" => Ok(Self::Jwks),
            "tokenreview" => Ok(Self::TokenReview),
            _ => Err("no such way"),
        }
    }
}

impl fmt::Display for Validation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Jwks => "jwks",
            Self::TokenReview => "tokenreview",
        })
    }
}

/// A time with units, as kubectl and systemd spell it: `90s`, `1h30m`, `7d` (a day is 24 hours).
///
/// # Errors
/// What is wrong with the text.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let span: Span = text.parse().map_err(|e: jiff::Error| e.to_string())?;
    let signed = span
        .to_duration(SpanRelativeTo::days_are_24_hours())
        .map_err(|e| e.to_string())?;
    match Duration::try_from(signed) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("is not above zero".to_owned()),
    }
}

fn parse_label(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match text {
        "" => Err("is empty".to_owned()),
        _ if text.len() > 63 => Err("is longer than 63 characters".to_owned()),
        _ if !text.chars().all(legal) => Err("holds a character outside a-z 0-9 -".to_owned()),
        _ if text.starts_with('-') || text.ends_with('-') => {
            Err("begins or ends with -".to_owned())
        }
        _ => Ok(text.to_owned()),
    }
}

/// What answers there tells who is connected and what each is told.
fn parse_loopback(text: &str) -> Result<SocketAddr, String> {
    let addr: SocketAddr = text
        .parse()
        .map_err(|e: std::net::AddrParseError| e.to_string())?;
    match addr.ip().is_loopback() {
        true => Ok(addr),
        false => Err("is not a loopback address".to_owned()),
    }
}

fn parse_domain(text: &str) -> Result<String, String> {
    text.split('.')
        .try_for_each(|label| parse_label(label).map(drop))?;
    Ok(text.to_owned())
}

fn parse_list(text: &str) -> Result<Vec<String>, String> {
    let names: Vec<String> = text
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect();
    if names.is_empty() {
        Err("is empty".to_owned())
    } else {
        Ok(names)
    }
}

/// A YAML value as the text a flag would have; a list becomes its items joined by commas.
fn scalar(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Array(items) => items.iter().map(scalar).collect::<Vec<_>>().join(","),
        serde_json::Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn nearest(name: &str) -> &'static str {
    let shared = |key: &Key| {
        key.name
            .chars()
            .zip(name.chars())
            .take_while(|(a, b)| a == b)
            .count()
    };
    KEYS.iter()
        .max_by_key(|key| shared(key))
        .map_or("", |key| key.name)
}

/// Why a text is not a setting.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The file.
    #[error("the settings file is not a flat YAML map: {0}")]
    NotYaml(String),
    /// A key that does not exist.
    #[error("the settings file holds {name:?}, which is no key of ours; did you mean {nearest:?}?")]
    UnknownKey {
        /// As written.
        name: String,
        /// The nearest key.
        nearest: &'static str,
    },
    /// A value that does not parse.
    #[error("{key} (from the {origin}) is {value:?}: {fault}; allowed: {allowed}")]
    Invalid {
        /// The key's name.
        key: &'static str,
        /// Who said it.
        origin: Source,
        /// The value, escaped and cut.
        value: String,
        /// What is wrong with it.
        fault: String,
        /// What would be right.
        allowed: &'static str,
    },
    /// Lives that do not fit into one another.
    #[error("the lifetimes do not fit together: {0}")]
    Lives(#[from] PolicyError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(flags: &[(&str, &str)]) -> Layers {
        let flags = flags
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        Layers {
            flags,
            ..Layers::default()
        }
    }

    #[test]
    fn the_defaults_are_valid() {
        let settings = Settings::parse(&Layers::default()).unwrap();
        assert_eq!(settings.trust_domain.as_str(), "cluster.local");
        assert_eq!(
            settings.rotation.leaf.default,
            Duration::from_secs(24 * 3600)
        );
        assert_eq!(settings.injector_config, None);
    }

    #[test]
    fn a_flag_beats_the_environment_beats_the_file_beats_the_default() {
        let mut all = layers(&[("drain", "1s")])
            .with_environment(|name| (name == "MALHA_DRAIN").then(|| "2s".to_owned()))
            .with_file("drain: 3s\n")
            .unwrap();
        let mut seen = vec![];
        for _ in 0..4 {
            seen.push(Settings::parse(&all).unwrap().drain.as_secs());
            if all.flags.remove("drain").is_none() && all.environment.remove("drain").is_none() {
                all.file.remove("drain");
            }
        }
        assert_eq!(seen, [1, 2, 3, 10]);
    }

    #[test]
    fn an_error_names_key_source_value_and_what_is_allowed() {
        for (key, value, fragment) in [
            (
                "trust-domain",
                "Cluster.Local",
                "trust-domain (from the flag) is \"Cluster.Local\"",
            ),
            ("webhook-addr", "15017", "IP:PORT"),
            ("validation", "none", "auto, jwks or tokenreview"),
            ("leaf-life", "-1h", "above zero"),
            ("drain", "6m", "longer than 5m"),
            ("leaf-life", "soon", "a time such as"),
            ("namespace", "a/b", "DNS label"),
            ("audiences", " , ", "is empty"),
            ("leaf-life", "8d", "the lifetimes do not fit together"),
            (
                "intermediate-life",
                "10d",
                "the lifetimes do not fit together",
            ),
            ("root-life", "59d", "the lifetimes do not fit together"),
        ] {
            let error = Settings::parse(&layers(&[(key, value)]))
                .unwrap_err()
                .to_string();
            assert!(error.contains(fragment), "{key}={value}: {error}");
        }
    }

    #[test]
    fn the_file_takes_lists_and_numbers_and_refuses_unknown_keys() {
        let file = Layers::default()
            .with_file("audiences: [malha-ca, istio-ca]\n")
            .unwrap();
        assert_eq!(
            Settings::parse(&file).unwrap().audiences,
            ["malha-ca", "istio-ca"]
        );
        let error = Layers::default()
            .with_file("trust-domian: x\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("\"trust-domain\""), "{error}");
        assert!(Layers::default().with_file("").is_ok());
        assert!(Layers::default().with_file("- a\n").is_err());
    }

    #[test]
    fn every_way_of_validation_round_trips() {
        for way in [Validation::Auto, Validation::Jwks, Validation::TokenReview] {
            assert_eq!(way.to_string().parse(), Ok(way));
        }
    }
}
