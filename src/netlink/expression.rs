//! A rule as the kernel knows it: small instructions on registers, each loads, compares or acts.

use std::net::IpAddr;

use super::wire::{self, Attributes};
use crate::redirect::{Act, Family, Match, Rule, Side};

/// The register that all instructions share: 16 bytes, enough for an IPv6 address or an interface's name.
const REGISTER: u32 = 1;
const VERDICT_REGISTER: u32 = 0;
const VERDICT_GOTO: u32 = -4_i32 as u32;
const VERDICT_RETURN: u32 = -5_i32 as u32;
const TCP: u8 = 6;
/// `lo` is the first interface of every network namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
/// The kernel compares names in whole (`IFNAMSIZ`).
const NAME: usize = 16;

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expression {
    /// What the kernel knows of a packet, by its key.
    Meta(Meta),
    /// Bytes of the packet.
    Payload {
        base: Base,
        offset: u32,
        length: u32,
    },
    /// Keeps the bits of the mask.
    Mask(Vec<u8>),
    /// Goes on only if the register is so.
    Compare(Comparison, Vec<u8>),
    /// Puts a port into the register.
    Port(u16),
    /// Sends the connection to the port in the register.
    Redirect,
    /// Ends the chain.
    Return,
    /// Goes on in another chain.
    Goto(String),
    /// An instruction that no rule of ours has.
    Foreign(String),
}

/// `enum nft_meta_keys`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Meta {
    OutIndex = 5,
    InName = 6,
    OutName = 7,
    User = 10,
    Group = 11,
    Family = 15,
    Protocol = 16,
}

/// `enum nft_payload_bases`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Base {
    Network = 1,
    Transport = 2,
}

/// `enum nft_cmp_ops`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Comparison {
    Equal = 0,
    Unequal = 1,
    AtMost = 3,
    AtLeast = 5,
}

const METAS: [Meta; 7] = [
    Meta::OutIndex,
    Meta::InName,
    Meta::OutName,
    Meta::User,
    Meta::Group,
    Meta::Family,
    Meta::Protocol,
];
const BASES: [Base; 2] = [Base::Network, Base::Transport];
const COMPARISONS: [Comparison; 4] = [
    Comparison::Equal,
    Comparison::Unequal,
    Comparison::AtMost,
    Comparison::AtLeast,
];

/// The instructions of a rule.
pub(super) fn of_rule(rule: &Rule) -> Vec<Expression> {
    let mut out = Vec::new();
    for matched in &rule.matches {
        of_match(matched, &mut out);
    }
    match rule.act {
        Act::Return => out.push(Expression::Return),
        Act::Goto(chain) => out.push(Expression::Goto(chain.to_owned())),
        Act::Redirect(port) => out.extend([Expression::Port(port), Expression::Redirect]),
    }
    out
}

fn of_match(matched: &Match, out: &mut Vec<Expression>) {
    use Comparison::{AtLeast, AtMost, Equal, Unequal};
    let mut meta = |key, comparison, value: &[u8]| {
        out.push(Expression::Meta(key));
        out.push(Expression::Compare(comparison, value.to_vec()));
    };
    match matched {
        Match::NotTcp => meta(Meta::Protocol, Unequal, &[TCP]),
        Match::Tcp => meta(Meta::Protocol, Equal, &[TCP]),
        Match::Family(family) => out.extend(is_of(*family)),
        Match::In(name) => meta(Meta::InName, Equal, &padded(name.as_str())),
        Match::Out(name) => meta(Meta::OutName, Equal, &padded(name.as_str())),
        // Numbers of the kernel's own are in the machine's order, unlike what comes from the wire.
        Match::OutLoopback => meta(Meta::OutIndex, Equal, &LOOPBACK.to_ne_bytes()),
        Match::Group(gid) => meta(Meta::Group, Equal, &gid.to_ne_bytes()),
        Match::User(uid) => meta(Meta::User, Equal, &uid.to_ne_bytes()),
        Match::Address {
            side,
            range,
            within,
        } => {
            let family = Family::of(range.network());
            let told = out.windows(2).any(|pair| *pair == is_of(family));
            if !told {
                out.extend(is_of(family));
            }
            let (load, mut network) = (address(*side, family), octets(range.network()));
            let comparison = if *within { Equal } else { Unequal };
            // Whole bytes are loaded and compared alone, as `nft` does, so that `--check` knows rules that went through it.
            if range.bits().is_multiple_of(8) {
                network.truncate(usize::from(range.bits() / 8));
                out.push(load(network.len()));
            } else {
                out.push(load(network.len()));
                out.push(Expression::Mask(mask(range.bits(), network.len())));
            }
            out.push(Expression::Compare(comparison, network));
        }
        Match::Port(range) => {
            // All that comes here is TCP; said again, `nft list` calls the bytes a port.
            meta(Meta::Protocol, Equal, &[TCP]);
            out.push(Expression::Payload {
                base: Base::Transport,
                offset: 2,
                length: 2,
            });
            let (first, last) = (range.first.to_be_bytes(), range.last.to_be_bytes());
            match first == last {
                true => out.push(Expression::Compare(Equal, first.to_vec())),
                false => out.extend([
                    Expression::Compare(AtLeast, first.to_vec()),
                    Expression::Compare(AtMost, last.to_vec()),
                ]),
            }
        }
    }
}

/// `NFPROTO_IPV4`, `NFPROTO_IPV6`
fn number_of(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

fn is_of(family: Family) -> [Expression; 2] {
    let number = vec![number_of(family)];
    [
        Expression::Meta(Meta::Family),
        Expression::Compare(Comparison::Equal, number),
    ]
}

/// Loads the first bytes of an address from where it stands in the header (RFC 791 3.1, RFC 8200 3).
fn address(side: Side, family: Family) -> impl Fn(usize) -> Expression {
    let offset = match (family, side) {
        (Family::V4, Side::Source) => 12,
        (Family::V4, Side::Destination) => 16,
        (Family::V6, Side::Source) => 8,
        (Family::V6, Side::Destination) => 24,
    };
    move |bytes| Expression::Payload {
        base: Base::Network,
        offset,
        length: u32::try_from(bytes).expect("at most 16"),
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn mask(bits: u8, bytes: usize) -> Vec<u8> {
    let kept = |byte: usize| usize::from(bits).saturating_sub(byte * 8).min(8);
    (0..bytes)
        .map(|byte| !(0xff_u16 >> kept(byte)) as u8)
        .collect()
}

fn padded(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(NAME, 0);
    bytes
}

/// The list of instructions, for `NFTA_RULE_EXPRESSIONS`.
pub(super) fn encode(expressions: &[Expression]) -> Attributes {
    expressions
        .iter()
        .fold(Attributes::default(), |list, expression| {
            let (name, data) = expression.encode();
            let element = Attributes::default().text(1, name).nested(2, data);
            list.nested(1, element)
        })
}

/// What the kernel says a rule's instructions are.
pub(super) fn decode(list: &[u8]) -> Vec<Expression> {
    wire::attributes(list)
        .map(|(_, element)| Expression::decode(element))
        .collect()
}

impl Expression {
    /// The name of the kernel's module, and the attributes that it takes.
    fn encode(&self) -> (&str, Attributes) {
        let new = Attributes::default;
        let value = |bytes: &[u8]| new().bytes(1, bytes);
        let verdict = |code, chain: Option<&str>| {
            let verdict = new().number(1, code);
            let verdict = match chain {
                Some(chain) => verdict.text(2, chain),
                None => verdict,
            };
            let data = new().nested(2, verdict);
            new().number(1, VERDICT_REGISTER).nested(2, data)
        };
        match self {
            Self::Meta(key) => ("meta", new().number(1, REGISTER).number(2, *key as u32)),
            Self::Payload {
                base,
                offset,
                length,
            } => {
                let place = new().number(1, REGISTER).number(2, *base as u32);
                ("payload", place.number(3, *offset).number(4, *length))
            }
            Self::Mask(mask) => {
                let length = u32::try_from(mask.len()).expect("an address");
                let registers = new().number(1, REGISTER).number(2, REGISTER);
                let kept = registers.number(3, length).nested(4, value(mask));
                ("bitwise", kept.nested(5, value(&vec![0; mask.len()])))
            }
            Self::Compare(comparison, bytes) => {
                let operation = new().number(1, REGISTER).number(2, *comparison as u32);
                ("cmp", operation.nested(3, value(bytes)))
            }
            Self::Port(port) => {
                let register = new().number(1, REGISTER);
                ("immediate", register.nested(2, value(&port.to_be_bytes())))
            }
            Self::Redirect => ("redir", new().number(1, REGISTER)),
            Self::Return => ("immediate", verdict(VERDICT_RETURN, None)),
            Self::Goto(chain) => ("immediate", verdict(VERDICT_GOTO, Some(chain))),
            Self::Foreign(name) => (name, new()),
        }
    }

    fn decode(element: &[u8]) -> Self {
        let name = wire::text(element, 1).unwrap_or_default();
        let data = wire::attribute(element, 2).unwrap_or_default();
        Self::known(name, data).unwrap_or_else(|| Self::Foreign(name.to_owned()))
    }

    /// `None` for whatever differs from what [`Expression::encode`] writes, another register included.
    fn known(name: &str, data: &[u8]) -> Option<Self> {
        let register = |kind| wire::number(data, kind).filter(|register| *register == REGISTER);
        let value = |kind| wire::attribute(wire::attribute(data, kind)?, 1).map(<[u8]>::to_vec);
        match name {
            "meta" => {
                register(1)?;
                let key = wire::number(data, 2)?;
                let known = METAS.into_iter().find(|meta| *meta as u32 == key);
                known.map(Self::Meta)
            }
            "payload" => {
                register(1)?;
                let base = wire::number(data, 2)?;
                Some(Self::Payload {
                    base: BASES.into_iter().find(|known| *known as u32 == base)?,
                    offset: wire::number(data, 3)?,
                    length: wire::number(data, 4)?,
                })
            }
            "bitwise" => {
                register(1)?;
                register(2)?;
                let unflipped = value(5)?.iter().all(|byte| *byte == 0);
                let plain = wire::number(data, 6).is_none_or(|operation| operation == 0);
                (unflipped && plain).then(|| value(4))?.map(Self::Mask)
            }
            "cmp" => {
                register(1)?;
                let operation = wire::number(data, 2)?;
                let mut known = COMPARISONS.into_iter();
                let comparison = known.find(|known| *known as u32 == operation)?;
                Some(Self::Compare(comparison, value(3)?))
            }
            "immediate" if wire::number(data, 1) == Some(VERDICT_REGISTER) => {
                let verdict = wire::attribute(wire::attribute(data, 2)?, 2)?;
                match wire::number(verdict, 1)? {
                    VERDICT_RETURN => Some(Self::Return),
                    VERDICT_GOTO => Some(Self::Goto(wire::text(verdict, 2)?.to_owned())),
                    _ => None,
                }
            }
            "immediate" => {
                register(1)?;
                let port: [u8; 2] = value(2)?.try_into().ok()?;
                Some(Self::Port(u16::from_be_bytes(port)))
            }
            "redir" => {
                register(1)?;
                // The kernel adds the end of the range, which is its start, and `NF_NAT_RANGE_PROTO_SPECIFIED`.
                let one = wire::number(data, 2).is_none_or(|end| end == REGISTER);
                let plain = wire::number(data, 3).is_none_or(|flags| flags & !2 == 0);
                (one && plain).then_some(Self::Redirect)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_is_read_back_as_it_was_written() {
        let all = [
            Expression::Meta(Meta::Group),
            Expression::Payload {
                base: Base::Network,
                offset: 24,
                length: 16,
            },
            Expression::Mask(vec![0xff, 0xf0, 0, 0]),
            Expression::Compare(Comparison::Unequal, vec![127, 0, 0, 0]),
            Expression::Port(15006),
            Expression::Redirect,
            Expression::Return,
            Expression::Goto("inbound".to_owned()),
        ];
        let message = wire::message(0, 0, 0, &[], &encode(&all));
        assert_eq!(decode(&message[16..]), all);
    }

    #[test]
    fn masks_keep_the_first_bits() {
        assert_eq!(mask(8, 4), [255, 0, 0, 0]);
        assert_eq!(mask(12, 4), [255, 240, 0, 0]);
        assert_eq!(mask(31, 4), [255, 255, 255, 254]);
        assert_eq!(mask(1, 4), [128, 0, 0, 0]);
        assert_eq!(mask(64, 16), [[255; 8], [0; 8]].concat());
    }
}
