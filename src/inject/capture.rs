//! Which traffic of a pod is redirected through its proxy: the one argument of `malha-init`.

use std::collections::BTreeSet;

use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::Value;

use crate::redirect::{
    Cidr, INBOUND_PORT, Include, Interface, OUTBOUND_PORT, PROXY_GID, Redirection,
};

/// The agent: probes and merged metrics.
pub const AGENT_PORT: u16 = 15020;
/// The proxy's readiness.
pub const STATUS_PORT: u16 = 15021;
/// Envoy's own metrics.
pub const ENVOY_METRICS_PORT: u16 = 15090;
/// Never captured inbound: the kubelet and Prometheus dial these from outside the mesh.
const NEVER_INBOUND: [u16; 3] = [AGENT_PORT, STATUS_PORT, ENVOY_METRICS_PORT];
/// Ports that no container of the application may have.
pub const OUR_PORTS: [u16; 5] = [
    OUTBOUND_PORT,
    INBOUND_PORT,
    AGENT_PORT,
    STATUS_PORT,
    ENVOY_METRICS_PORT,
];

/// The capture settings, by default and as a pod's annotations change them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Capture {
    /// Ports whose inbound traffic is captured.
    #[serde(deserialize_with = "text::<_, Include<u16>>")]
    pub include_inbound_ports: Include<u16>,
    /// Ports whose inbound traffic is not.
    #[serde(deserialize_with = "text::<_, Vec<u16>>")]
    pub exclude_inbound_ports: Vec<u16>,
    /// Ports whose outbound traffic is captured whatever its address.
    #[serde(deserialize_with = "text::<_, Include<u16>>")]
    pub include_outbound_ports: Include<u16>,
    /// Ports whose outbound traffic is not captured.
    #[serde(deserialize_with = "text::<_, Vec<u16>>")]
    pub exclude_outbound_ports: Vec<u16>,
    /// Addresses to which outbound traffic is captured.
    #[serde(
        rename = "includeOutboundIPRanges",
        deserialize_with = "text::<_, Include<Cidr>>"
    )]
    pub include_outbound_ip_ranges: Include<Cidr>,
    /// Addresses to which it is not.
    #[serde(
        rename = "excludeOutboundIPRanges",
        deserialize_with = "text::<_, Vec<Cidr>>"
    )]
    pub exclude_outbound_ip_ranges: Vec<Cidr>,
    /// Interfaces of the pod that are left alone.
    #[serde(deserialize_with = "text::<_, Vec<Interface>>")]
    pub exclude_interfaces: Vec<Interface>,
    /// Users whose outbound traffic is not captured.
    #[serde(default, skip_deserializing)]
    pub exclude_outbound_uids: Vec<u32>,
}

impl Capture {
    /// The argument of `malha-init`: one JSON document. `probed` are ports that the kubelet dials before the agent is
    /// there to answer for them.
    pub(super) fn to_argument(&self, probed: &[u16]) -> String {
        let mut exclude_inbound_ports = self.exclude_inbound_ports.clone();
        exclude_inbound_ports.extend(NEVER_INBOUND.iter().chain(probed));
        exclude_inbound_ports.sort_unstable();
        exclude_inbound_ports.dedup();
        let wanted = self.clone();
        let redirection = Redirection {
            proxy_gid: PROXY_GID,
            inbound_port: INBOUND_PORT,
            outbound_port: OUTBOUND_PORT,
            include_inbound_ports: wanted.include_inbound_ports,
            exclude_inbound_ports,
            include_outbound_ports: wanted.include_outbound_ports,
            exclude_outbound_ports: wanted.exclude_outbound_ports,
            include_outbound_ip_ranges: wanted.include_outbound_ip_ranges,
            exclude_outbound_ip_ranges: wanted.exclude_outbound_ip_ranges,
            exclude_interfaces: wanted.exclude_interfaces,
            exclude_outbound_uids: wanted.exclude_outbound_uids,
        };
        redirection.to_argument()
    }
}

/// The argument of an earlier call with more ports excluded inbound; `None` if they are already, or if it is not ours.
pub(super) fn with_probed(argument: &str, probed: &[u16]) -> Option<String> {
    let mut argument: Value = serde_json::from_str(argument).ok()?;
    let excluded = argument.get_mut("excludeInboundPorts")?.as_array_mut()?;
    let mut ports: BTreeSet<u64> = excluded.iter().map(Value::as_u64).collect::<Option<_>>()?;
    let before = ports.len();
    ports.extend(probed.iter().copied().map(u64::from));
    if ports.len() == before {
        return None;
    }
    *excluded = ports.into_iter().map(Value::from).collect();
    Some(argument.to_string())
}

/// One item of a comma-separated list.
pub(super) trait Item: Sized {
    fn parse(text: &str) -> Option<Self>;
}

/// A whole value: a list, or a list that may be `*`.
pub(super) trait List: Sized {
    fn parse(text: &str) -> Option<Self>;
}

impl<T: Item> List for Vec<T> {
    fn parse(text: &str) -> Option<Self> {
        match text.trim_matches(' ') {
            "" => Some(Self::new()),
            items => items
                .split(',')
                .map(|item| T::parse(item.trim_matches(' ')))
                .collect(),
        }
    }
}

impl<T: Item> List for Include<T> {
    fn parse(text: &str) -> Option<Self> {
        match text.trim_matches(' ') {
            "*" => Some(Self::All),
            items => Vec::parse(items).map(Self::Only),
        }
    }
}

impl Item for u16 {
    fn parse(text: &str) -> Option<Self> {
        decimal(text).filter(|port: &Self| *port != 0)
    }
}

/// A uid; the highest number means "none" to the kernel.
impl Item for u32 {
    fn parse(text: &str) -> Option<Self> {
        decimal(text).filter(|uid| *uid != Self::MAX)
    }
}

/// A number without a sign, which `FromStr` alone would accept.
pub(super) fn decimal<N: std::str::FromStr>(text: &str) -> Option<N> {
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())?
}

impl Item for Cidr {
    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl Item for Interface {
    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

/// Settings are written as annotations are.
fn text<'de, D: Deserializer<'de>, L: List>(deserializer: D) -> Result<L, D::Error> {
    let text = String::deserialize(deserializer)?;
    L::parse(&text).ok_or_else(|| de::Error::custom(format_args!("{text:?} is not such a list")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_take_what_their_annotation_allows_and_nothing_else() {
        let ports = |text| Vec::<u16>::parse(text);
        assert_eq!(ports(""), Some(vec![]));
        assert_eq!(ports(" 80, 8080 "), Some(vec![80, 8080]));
        for bad in [
            "*", "0", "65536", "+80", "-1", "80,", ",", "80;81", "http", "8 0", "80\n",
        ] {
            assert_eq!(ports(bad), None, "{bad:?}");
        }
        assert_eq!(Include::<u16>::parse("*"), Some(Include::All));
        assert_eq!(Include::<u16>::parse("80,*"), None);
        assert_eq!(
            Vec::<u32>::parse("0,4294967294"),
            Some(vec![0, u32::MAX - 1])
        );
        assert_eq!(Vec::<u32>::parse("4294967295"), None);
    }
}
