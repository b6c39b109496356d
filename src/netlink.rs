//! Brings the kernel's packet filter to a rule set, and compares it with one.
//!
//! ```text
//! RuleSet -> one nf_tables batch -> kernel -> read back -> compare
//! ```
//!
//! Everything is said over netlink sockets in safe code; no program is run. A connection that exists keeps its course:
//! only the first packet of a connection meets the rules.

mod capability;
mod expression;
mod loopback;
mod nft;
mod socket;
mod trial;
mod wire;

pub use capability::{Capability, Why, net_admin};
pub use trial::{Trial, trials};

use std::{fs, io, net::UdpSocket};

use nix::errno::Errno;

use self::{
    nft::{Batch, Found, FoundChain, Step},
    socket::Outcome,
};
use crate::redirect::{Chain, Families, Family, RuleSet, TABLE};

/// Why the rules could not be installed or read.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel does not let this process.
    #[error(
        "the kernel does not let this process {act}: it needs CAP_NET_ADMIN in the pod's network namespace"
    )]
    Permission {
        /// What it would not do.
        act: String,
        /// The kernel's word.
        source: io::Error,
    },
    /// The kernel lacks a feature.
    #[error("the kernel refused `{act}`: {feature}")]
    Kernel {
        /// The table, chain or rule.
        act: String,
        /// What it must have.
        feature: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
    /// The kernel did it, and yet it is not there.
    #[error(
        "the kernel accepted the rules, but they differ at once ({0}); does another program change table inet malha?"
    )]
    Unstable(Difference),
}

/// What the kernel holds other than the rules that are wanted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// There is no table.
    #[error("table inet {TABLE} is missing")]
    NoTable,
    /// The table is switched off.
    #[error("table inet {TABLE} is dormant, none of its rules is in force")]
    Dormant,
    /// A chain is not there.
    #[error("chain {0} is missing")]
    NoChain(String),
    /// A chain of somebody else.
    #[error("chain {0} does not belong there")]
    OtherChain(String),
    /// A chain hangs in another place, or has another policy.
    #[error("chain {0} is not `{1}; policy accept;`")]
    OtherHook(String, String),
    /// A rule is missing or altered, or another stands before it.
    #[error("in chain {chain} rule {number} is not `{rule}`")]
    OtherRule {
        /// The chain.
        chain: String,
        /// The place, from 1.
        number: usize,
        /// What should be there.
        rule: String,
    },
    /// Rules beyond the last.
    #[error("chain {chain} has {found} rules instead of {wanted}")]
    MoreRules {
        /// The chain.
        chain: String,
        /// How many there are.
        found: usize,
        /// How many there should be.
        wanted: usize,
    },
    /// `lo` has no address for what the proxy passes on.
    #[error(
        "interface lo does not have the address {0}, from which the proxy passes connections on"
    )]
    NoAddress(std::net::IpAddr),
}

/// The families that this network namespace has.
///
/// IPv4 is there if the kernel makes sockets of it. IPv6 needs an address too: where it is switched off by sysctl the
/// kernel still makes sockets, but no interface has one, not even `lo`.
pub fn families() -> Families {
    let addresses = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    Families {
        v4: UdpSocket::bind(("0.0.0.0", 0)).is_ok(),
        v6: !addresses.trim().is_empty(),
    }
}

/// Installs the rules, whatever was in the table before, and reads them back.
///
/// # Errors
/// Nothing was changed in the packet filter, unless it is [`NetlinkError::Unstable`].
pub fn install(rules: &RuleSet, families: Families) -> Result<(), NetlinkError> {
    if families.v6 {
        let address = Family::V6.passed_on();
        loopback::add(address).map_err(|errno| no_address(address, errno))?;
    }
    let opened = nft::open().map_err(|errno| cannot_read(errno, "talk to the packet filter"))?;
    let (mut socket, batch) = (opened, Batch::of(rules));
    let sent = batch.send(&mut socket);
    match sent.map_err(|errno| refused(&Step::Begin, errno))? {
        Outcome::Refused(sequence, errno) => Err(refused(&batch.step_of(sequence), errno)),
        // Lost answers lose nothing: what is read back decides.
        Outcome::Done | Outcome::Unknown => match check(rules, families)? {
            None => Ok(()),
            Some(difference) => Err(NetlinkError::Unstable(difference)),
        },
    }
}

/// Compares what the kernel holds with the rules, instruction by instruction; `None` if they are the same.
///
/// # Errors
/// The kernel does not let its rules be read.
pub fn check(rules: &RuleSet, families: Families) -> Result<Option<Difference>, NetlinkError> {
    const ACT: &str = "read its packet filter";
    // A socket of its own: the other may still hold answers.
    let mut socket = nft::open().map_err(|errno| cannot_read(errno, ACT))?;
    let found = nft::read(&mut socket).map_err(|errno| cannot_read(errno, ACT))?;
    Ok(difference(rules, &found).or_else(|| missing_address(families)))
}

/// Binding to it is the proof that it is there.
fn missing_address(families: Families) -> Option<Difference> {
    let address = Family::V6.passed_on();
    let missing = families.v6 && UdpSocket::bind((address, 0)).is_err();
    missing.then_some(Difference::NoAddress(address))
}

fn difference(wanted: &RuleSet, found: &Found) -> Option<Difference> {
    if !found.table {
        return Some(Difference::NoTable);
    }
    if found.dormant {
        return Some(Difference::Dormant);
    }
    let known = |found: &&FoundChain| wanted.chains.iter().any(|chain| chain.name == found.name);
    if let Some(other) = found.chains.iter().find(|chain| !known(chain)) {
        return Some(Difference::OtherChain(other.name.clone()));
    }
    wanted.chains.iter().find_map(|chain| {
        match found.chains.iter().find(|found| found.name == chain.name) {
            Some(found) => chain_difference(chain, found),
            None => Some(Difference::NoChain(chain.name.to_owned())),
        }
    })
}

fn chain_difference(wanted: &Chain, found: &FoundChain) -> Option<Difference> {
    let name = || wanted.name.to_owned();
    if wanted.hook.map(nft::wanted_hook) != found.hook {
        let hook = wanted.hook.map(|hook| hook.to_string());
        let hook = hook.unwrap_or_else(|| "entered by other chains only".to_owned());
        return Some(Difference::OtherHook(name(), hook));
    }
    for (at, rule) in wanted.rules.iter().enumerate() {
        if found.rules.get(at) != Some(&expression::of_rule(rule)) {
            return Some(Difference::OtherRule {
                chain: name(),
                number: at + 1,
                rule: rule.to_string(),
            });
        }
    }
    (found.rules.len() > wanted.rules.len()).then(|| Difference::MoreRules {
        chain: name(),
        found: found.rules.len(),
        wanted: wanted.rules.len(),
    })
}

/// What the kernel's refusal of one message means.
fn refused(step: &Step, errno: Errno) -> NetlinkError {
    let act = match step {
        Step::Begin => "start a transaction".to_owned(),
        Step::Table => format!("table inet {TABLE}"),
        Step::Chain { text, .. } | Step::Rule { text, .. } => text.clone(),
    };
    if matches!(errno, Errno::EPERM | Errno::EACCES) {
        return NetlinkError::Permission {
            act: format!("change its packet filter (`{act}`)"),
            source: socket::io(errno),
        };
    }
    NetlinkError::Kernel {
        act,
        feature: feature(step, errno),
        source: socket::io(errno),
    }
}

/// The feature whose absence is told by such an error at such a step.
fn feature(step: &Step, errno: Errno) -> &'static str {
    let absent = matches!(
        errno,
        Errno::EOPNOTSUPP | Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EPROTONOSUPPORT
    );
    match step {
        _ if errno == Errno::ENOMEM => "the node or the container's memory limit is exhausted",
        _ if errno == Errno::EMSGSIZE || errno == Errno::ENOBUFS => {
            "there are more rules than fit into net.core.wmem_max; shorten the lists of ports and ranges"
        }
        Step::Begin if absent => "it needs nf_tables (CONFIG_NF_TABLES; module nf_tables)",
        Step::Table if absent => {
            "it needs Linux 5.2 or later with CONFIG_NF_TABLES_INET; older kernels cannot translate addresses in a table for both families"
        }
        Step::Chain { nat: true, .. } if absent => {
            "it needs Linux 5.2 or later with CONFIG_NFT_NAT and CONFIG_NF_NAT (module nft_chain_nat); older kernels cannot translate addresses in a table for both families"
        }
        Step::Rule {
            redirects: true, ..
        } if absent => "it needs CONFIG_NFT_REDIR (module nft_redir)",
        _ => "is this a kernel with nf_tables, Linux 5.2 or later?",
    }
}

fn cannot_read(errno: Errno, act: &str) -> NetlinkError {
    let source = socket::io(errno);
    match errno {
        Errno::EPERM | Errno::EACCES => NetlinkError::Permission {
            act: act.to_owned(),
            source,
        },
        _ => NetlinkError::Kernel {
            act: act.to_owned(),
            feature: match errno {
                Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT => {
                    "it needs CONFIG_NETFILTER_NETLINK and CONFIG_NF_TABLES"
                }
                Errno::EAGAIN => "it did not answer within 5 s",
                _ => feature(&Step::Begin, errno),
            },
            source,
        },
    }
}

fn no_address(address: std::net::IpAddr, errno: Errno) -> NetlinkError {
    let act = format!("ip address add {address} dev lo");
    let source = socket::io(errno);
    match errno {
        Errno::EPERM => NetlinkError::Permission { act, source },
        _ => NetlinkError::Kernel {
            act,
            feature: "the pod has IPv6, so lo must have it: set net.ipv6.conf.lo.disable_ipv6 to 0, or net.ipv6.conf.all.disable_ipv6 to 1",
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redirect::Redirection;

    fn rules() -> RuleSet {
        let settings = Redirection {
            proxy_gid: 1337,
            inbound_port: 15006,
            outbound_port: 15001,
            include_inbound_ports: crate::redirect::Include::All,
            exclude_inbound_ports: vec![15021],
            include_outbound_ports: crate::redirect::Include::All,
            exclude_outbound_ports: vec![],
            include_outbound_ip_ranges: crate::redirect::Include::All,
            exclude_outbound_ip_ranges: vec![],
            exclude_interfaces: vec![],
            exclude_outbound_uids: vec![],
        };
        settings.rule_set(Families::BOTH)
    }

    /// What is said when the kernel refuses the first message that is for a step like this.
    fn said(errno: Errno, is_it: impl Fn(&Step) -> bool) -> String {
        let batch = Batch::of(&rules());
        let at = batch.steps.iter().position(is_it).expect("there is one");
        let step = batch.step_of(u32::try_from(at).expect("few"));
        refused(&step, errno).to_string()
    }

    #[test]
    fn a_kernel_without_a_feature_is_told_by_rule_and_feature() {
        // Linux before 5.2 has no nat in tables of family inet: EOPNOTSUPP; without the module the type is unknown: ENOENT.
        for errno in [Errno::EOPNOTSUPP, Errno::ENOENT] {
            assert_eq!(
                said(errno, |step| matches!(step, Step::Chain { nat: true, .. })),
                "the kernel refused `chain prerouting { type nat hook prerouting priority dstnat; }`: it needs Linux 5.2 \
                 or later with CONFIG_NFT_NAT and CONFIG_NF_NAT (module nft_chain_nat); older kernels cannot translate \
                 addresses in a table for both families"
            );
        }
        let redirects = |step: &Step| {
            matches!(
                step,
                Step::Rule {
                    redirects: true,
                    ..
                }
            )
        };
        assert_eq!(
            said(Errno::ENOENT, redirects),
            "the kernel refused `inbound: meta l4proto tcp redirect to :15006`: it needs CONFIG_NFT_REDIR (module nft_redir)"
        );
        assert_eq!(
            said(Errno::EOPNOTSUPP, |step| *step == Step::Begin),
            "the kernel refused `start a transaction`: it needs nf_tables (CONFIG_NF_TABLES; module nf_tables)"
        );
        let inet = said(Errno::EAFNOSUPPORT, |step| *step == Step::Table);
        assert!(inet.contains("CONFIG_NF_TABLES_INET"), "{inet}");
        assert!(
            cannot_read(Errno::EPROTONOSUPPORT, "x")
                .to_string()
                .contains("CONFIG_NETFILTER_NETLINK")
        );
    }

    #[test]
    fn a_refusal_for_want_of_a_right_says_which() {
        for error in [
            refused(&Step::Begin, Errno::EPERM),
            cannot_read(Errno::EPERM, "read its packet filter"),
            no_address(Family::V6.passed_on(), Errno::EPERM),
        ] {
            assert!(matches!(error, NetlinkError::Permission { .. }));
            assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
        }
    }

    #[test]
    fn each_message_of_a_batch_has_its_number_and_its_step() {
        let batch = Batch::of(&rules());
        let (mut rest, mut numbers) = (batch.bytes.as_slice(), Vec::new());
        while let [a, b, c, d, _, _, _, _, e, f, g, h, ..] = *rest {
            numbers.push(u32::from_ne_bytes([e, f, g, h]));
            let length = u32::from_ne_bytes([a, b, c, d]);
            rest = &rest[usize::try_from(length).expect("few bytes")..];
        }
        let wanted: Vec<_> = (0..).take(batch.steps.len()).collect();
        assert_eq!(numbers, wanted);
        let rules: usize = rules().chains.iter().map(|chain| chain.rules.len()).sum();
        assert_eq!(batch.steps.len(), 1 + 3 + 3 + rules + 1);
    }

    #[test]
    fn what_the_kernel_lacks_or_has_besides_is_a_difference() {
        let rules = rules();
        assert_eq!(
            difference(&rules, &Found::default()),
            Some(Difference::NoTable)
        );
        let chain = |chain: &Chain| FoundChain {
            name: chain.name.to_owned(),
            hook: chain.hook.map(nft::wanted_hook),
            rules: chain.rules.iter().map(expression::of_rule).collect(),
        };
        let whole = || Found {
            table: true,
            dormant: false,
            chains: rules.chains.iter().map(chain).collect(),
        };
        assert_eq!(difference(&rules, &whole()), None);
        // Each single rule that is gone is noticed.
        for (at, wanted) in rules.chains.iter().enumerate() {
            for rule in 0..wanted.rules.len() {
                let mut found = whole();
                found.chains[at].rules.remove(rule);
                assert!(difference(&rules, &found).is_some(), "{wanted} {rule}");
            }
            let mut found = whole();
            found.chains.remove(at);
            let missing = Difference::NoChain(wanted.name.to_owned());
            assert_eq!(difference(&rules, &found), Some(missing));
        }
    }
}
