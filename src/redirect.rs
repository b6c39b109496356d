//! Which of a pod's traffic goes through its proxy, and the packet filter's rules that make it so.
//!
//! ```text
//! JSON argument -> Redirection -> RuleSet (data) -> netlink
//! ```
//!
//! [`Redirection`] is the one argument of `malha-init`: the injector writes it, `malha-init` reads it. [`RuleSet`] is
//! what it means: tables, chains and rules as values that print as `nft list` does.

mod argument;
mod build;
mod fate;
mod rules;
mod values;

pub use argument::ArgumentError;
pub use fate::{Connection, Fate, Place};
pub use rules::{
    Act, Chain, Families, Family, Hook, INBOUND, Match, OUTPUT, PREROUTING, Rule, RuleSet, Side,
    TABLE,
};
pub use values::{Cidr, Include, Interface, PortRange, ValueError};

use serde::Serialize;

/// The group by which the redirection tells the proxy's own traffic.
pub const PROXY_GID: u32 = 1337;
/// Everything that enters the pod goes here.
pub const INBOUND_PORT: u16 = 15006;
/// Everything that leaves the pod goes here.
pub const OUTBOUND_PORT: u16 = 15001;

/// What is redirected and what is not.
///
/// The words are those of Istio's `traffic.sidecar.istio.io` annotations and mean the same, with one difference: an
/// excluded port stays excluded where the included ones are listed by name. (Istio then ignores the exclusion; ours
/// always holds the agent's own ports, which must never be captured.)
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Redirection {
    /// Processes of this group are the proxy; the user may differ.
    pub proxy_gid: u32,
    /// The proxy's port for what enters the pod.
    pub inbound_port: u16,
    /// The proxy's port for what leaves it.
    pub outbound_port: u16,
    /// Ports whose inbound traffic is captured.
    pub include_inbound_ports: Include<u16>,
    /// Ports whose inbound traffic is not.
    pub exclude_inbound_ports: Vec<u16>,
    /// Ports whose outbound traffic is captured whatever its address.
    pub include_outbound_ports: Include<u16>,
    /// Ports whose outbound traffic is not captured.
    pub exclude_outbound_ports: Vec<u16>,
    /// Addresses to which outbound traffic is captured.
    #[serde(rename = "includeOutboundIPRanges")]
    pub include_outbound_ip_ranges: Include<Cidr>,
    /// Addresses to which it is not.
    #[serde(rename = "excludeOutboundIPRanges")]
    pub exclude_outbound_ip_ranges: Vec<Cidr>,
    /// Interfaces of the pod that are left alone.
    pub exclude_interfaces: Vec<Interface>,
    /// Users whose outbound traffic is not captured.
    pub exclude_outbound_uids: Vec<u32>,
}

impl Redirection {
    /// Reads the JSON argument of `malha-init`.
    ///
    /// Every key must be there and none may be unknown: an argument of another release is refused, because rules that
    /// leave a wish out would send traffic past the mesh, or into it, without a word.
    ///
    /// # Errors
    /// The first key that is missing, unknown or has a value that cannot be.
    pub fn parse(argument: &str) -> Result<Self, ArgumentError> {
        argument::parse(argument)
    }

    /// Writes the JSON argument of `malha-init`.
    pub fn to_argument(&self) -> String {
        serde_json::to_string(self).expect("numbers and names always serialise")
    }

    /// The rules that redirect so, for the families that the pod has.
    pub fn rule_set(&self, families: Families) -> RuleSet {
        build::rule_set(self, families)
    }
}
