//! Which traffic of a pod is redirected through its proxy: the one argument of `malha-init`.

use std::{collections::BTreeSet, net::IpAddr};

use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::Value;

/// The group by which the redirection tells the proxy's own traffic.
pub const PROXY_GID: i64 = 1337;
/// Everything that enters the pod goes here.
pub const INBOUND_PORT: u16 = 15006;
/// Everything that leaves the pod goes here.
pub const OUTBOUND_PORT: u16 = 15001;
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

/// Everything, or what a list names (an empty list names nothing).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Include<T> {
    /// `*`.
    All,
    /// The list.
    Only(Vec<T>),
}

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
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Argument<'a> {
            proxy_gid: i64,
            inbound_port: u16,
            outbound_port: u16,
            #[serde(flatten)]
            capture: &'a Capture,
        }
        let mut capture = self.clone();
        capture
            .exclude_inbound_ports
            .extend(NEVER_INBOUND.iter().chain(probed));
        capture.exclude_inbound_ports.sort_unstable();
        capture.exclude_inbound_ports.dedup();
        let argument = Argument {
            proxy_gid: PROXY_GID,
            inbound_port: INBOUND_PORT,
            outbound_port: OUTBOUND_PORT,
            capture: &capture,
        };
        serde_json::to_string(&argument).expect("numbers and names always serialise")
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

/// A range of addresses, written as its network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cidr(String);

impl Item for Cidr {
    fn parse(text: &str) -> Option<Self> {
        let (address, bits) = text.split_once('/')?;
        let bits: u32 = decimal(bits)?;
        let network: IpAddr = match address.parse().ok()? {
            IpAddr::V4(v4) if bits <= 32 => {
                let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
                IpAddr::V4((u32::from(v4) & mask).into())
            }
            IpAddr::V6(v6) if bits <= 128 => {
                let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
                IpAddr::V6((u128::from(v6) & mask).into())
            }
            _ => return None,
        };
        Some(Self(format!("{network}/{bits}")))
    }
}

/// The name of a network interface: at most 15 characters (`IFNAMSIZ` counts a NUL), and none that would need quoting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface(String);

impl Item for Interface {
    fn parse(text: &str) -> Option<Self> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-@+:".contains(&b);
        let named = (1..=15).contains(&text.len()) && text != "." && text != "..";
        (named && text.bytes().all(legal)).then(|| Self(text.to_owned()))
    }
}

impl<T: Serialize> Serialize for Include<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All => serializer.serialize_str("*"),
            Self::Only(items) => items.serialize(serializer),
        }
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

    #[test]
    fn ranges_are_written_as_their_network() {
        let cidr = |text| <Cidr as Item>::parse(text).map(|cidr| cidr.0);
        assert_eq!(cidr("10.1.2.3/8").as_deref(), Some("10.0.0.0/8"));
        assert_eq!(cidr("0.0.0.0/0").as_deref(), Some("0.0.0.0/0"));
        assert_eq!(cidr("10.1.2.3/32").as_deref(), Some("10.1.2.3/32"));
        assert_eq!(cidr("fd00::1/64").as_deref(), Some("fd00::/64"));
        assert_eq!(cidr("::/0").as_deref(), Some("::/0"));
        for bad in [
            "10.0.0.0",
            "10.0.0.0/33",
            "10.0.0/8",
            "::/129",
            "10.0.0.0/+8",
            "/8",
            "10.0.0.0/",
            "fe80::1%eth0/64",
        ] {
            assert_eq!(cidr(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn interfaces_are_names_of_at_most_fifteen_characters() {
        let interface = |text| <Interface as Item>::parse(text).is_some();
        assert!(interface("eth0") && interface("veth1234567890a"));
        for bad in ["", ".", "..", "veth1234567890ab", "a/b", "a b", "a'b", "é"] {
            assert!(!interface(bad), "{bad:?}");
        }
    }
}
