//! A rule set as one batch of nf_tables messages, and back from what the kernel tells.
//!
//! ```text
//! begin, add table, delete table, add table, add chains, add rules, end
//! ```
//!
//! The kernel does all of a batch or nothing. The first addition makes the deletion succeed where there is no table yet,
//! so the same batch installs, replaces and repairs.

use nix::{errno::Errno, sys::socket::SockProtocol};

use super::{
    expression::{self, Expression},
    socket::{Outcome, Socket},
    wire::{self, ACK, APPEND, Attributes, CREATE, DUMP, REQUEST},
};
use crate::redirect::{Chain, Hook, RuleSet, TABLE};

/// `NFNL_SUBSYS_NFTABLES`
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const GET_TABLE: u16 = NEW_TABLE | 1;
const DELETE_TABLE: u16 = NEW_TABLE | 2;
const NEW_CHAIN: u16 = NEW_TABLE | 3;
const GET_CHAIN: u16 = NEW_TABLE | 4;
const NEW_RULE: u16 = NEW_TABLE | 6;
const GET_RULE: u16 = NEW_TABLE | 7;
/// `NFPROTO_INET`
const INET: u8 = 1;
/// `NF_INET_PRE_ROUTING`, `NF_INET_LOCAL_OUT`
const PREROUTING: u32 = 0;
const OUTPUT: u32 = 3;
/// `NF_IP_PRI_NAT_DST`
const PRIORITY: i32 = -100;
/// `NF_ACCEPT`
const ACCEPT: u32 = 1;

/// One message of a batch, and what it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The batch itself.
    Begin,
    /// The table is made or removed.
    Table,
    /// A chain is made; whether it is one of nat.
    Chain { text: String, nat: bool },
    /// A rule is added; whether it redirects.
    Rule { text: String, redirects: bool },
}

/// A batch, and the step of each sequence number.
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    pub(super) steps: Vec<Step>,
}

impl Batch {
    /// The batch that brings the table to exactly these rules.
    pub(super) fn of(rules: &RuleSet) -> Self {
        let mut batch = Self {
            bytes: Vec::new(),
            steps: Vec::new(),
        };
        batch.bound(BATCH_BEGIN);
        let table = || Attributes::default().text(1, TABLE);
        batch.step(Step::Table, NEW_TABLE, CREATE, &table());
        batch.step(Step::Table, DELETE_TABLE, 0, &table());
        batch.step(Step::Table, NEW_TABLE, CREATE, &table());
        for chain in &rules.chains {
            let nat = chain.hook.is_some();
            let text = match chain.hook {
                Some(hook) => format!("chain {} {{ {hook}; }}", chain.name),
                None => format!("chain {}", chain.name),
            };
            let step = Step::Chain { text, nat };
            batch.step(step, NEW_CHAIN, CREATE, &chain_attributes(chain));
        }
        for chain in &rules.chains {
            for rule in &chain.rules {
                let instructions = expression::of_rule(rule);
                let redirects = instructions.contains(&Expression::Redirect);
                let text = format!("{}: {rule}", chain.name);
                let attributes = table()
                    .text(2, chain.name)
                    .nested(4, expression::encode(&instructions));
                let step = Step::Rule { text, redirects };
                batch.step(step, NEW_RULE, CREATE | APPEND, &attributes);
            }
        }
        batch.bound(BATCH_END);
        batch
    }

    /// Sends it. `Err` holds the step that failed.
    pub(super) fn send(&self, socket: &mut Socket) -> Result<Outcome, Errno> {
        let last = u32::try_from(self.steps.len() - 1).expect("few rules");
        // The bounds are not answered when all goes well.
        let asked: Vec<u32> = (1..last).collect();
        socket.transact(&self.bytes, &asked)
    }

    /// What the message with this number is for.
    pub(super) fn step_of(&self, sequence: u32) -> Step {
        let at = usize::try_from(sequence).ok();
        let step = at.and_then(|at| self.steps.get(at));
        step.cloned().unwrap_or(Step::Begin)
    }

    fn step(&mut self, step: Step, kind: u16, flags: u16, attributes: &Attributes) {
        let sequence = u32::try_from(self.steps.len()).expect("few rules");
        let flags = REQUEST | ACK | flags;
        let message = wire::message(kind, flags, sequence, &header(INET, 0), attributes);
        self.bytes.extend(message);
        self.steps.push(step);
    }

    fn bound(&mut self, kind: u16) {
        let sequence = u32::try_from(self.steps.len()).expect("few rules");
        let none = Attributes::default();
        let message = wire::message(kind, REQUEST, sequence, &header(0, SUBSYSTEM), &none);
        self.bytes.extend(message);
        self.steps.push(Step::Begin);
    }
}

/// `struct nfgenmsg`
fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn chain_attributes(chain: &Chain) -> Attributes {
    let named = Attributes::default().text(1, TABLE).text(3, chain.name);
    let Some(hook) = chain.hook else {
        return named;
    };
    let place = Attributes::default()
        .number(1, number_of(hook))
        .number(2, PRIORITY as u32);
    named.nested(4, place).number(5, ACCEPT).text(7, "nat")
}

fn number_of(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => PREROUTING,
        Hook::Output => OUTPUT,
    }
}

/// What the kernel holds under the name of our table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// The table is there.
    pub(super) table: bool,
    /// It is switched off (flag `dormant`).
    pub(super) dormant: bool,
    /// Its chains in their order.
    pub(super) chains: Vec<FoundChain>,
}

/// A chain that was read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct FoundChain {
    pub(super) name: String,
    /// Type, hook, priority and policy, as far as it is called by the kernel itself.
    pub(super) hook: Option<(String, u32, i32, u32)>,
    pub(super) rules: Vec<Vec<Expression>>,
}

/// The hook that a chain of ours has.
pub(super) fn wanted_hook(hook: Hook) -> (String, u32, i32, u32) {
    ("nat".to_owned(), number_of(hook), PRIORITY, ACCEPT)
}

/// Reads the table as it is now.
pub(super) fn read(socket: &mut Socket) -> Result<Found, Errno> {
    let ours = |body: &[u8], kind| wire::text(body, kind) == Some(TABLE);
    let mut found = Found::default();
    for table in ask(socket, GET_TABLE, NEW_TABLE)? {
        if ours(&table, 1) {
            found.table = true;
            found.dormant = wire::number(&table, 2).is_some_and(|flags| flags & 1 != 0);
        }
    }
    for chain in ask(socket, GET_CHAIN, NEW_CHAIN)? {
        if ours(&chain, 1) {
            found.chains.push(FoundChain {
                name: wire::text(&chain, 3).unwrap_or_default().to_owned(),
                hook: hook_of(&chain),
                rules: Vec::new(),
            });
        }
    }
    for rule in ask(socket, GET_RULE, NEW_RULE)? {
        let name = wire::text(&rule, 2).unwrap_or_default();
        let chain = found.chains.iter_mut().find(|chain| chain.name == name);
        if let Some(chain) = chain.filter(|_| ours(&rule, 1)) {
            let instructions = wire::attribute(&rule, 4).unwrap_or_default();
            chain.rules.push(expression::decode(instructions));
        }
    }
    Ok(found)
}

fn hook_of(chain: &[u8]) -> Option<(String, u32, i32, u32)> {
    let place = wire::attribute(chain, 4)?;
    let kind = wire::text(chain, 7).unwrap_or_default().to_owned();
    let priority = wire::number(place, 2)?.cast_signed();
    Some((
        kind,
        wire::number(place, 1)?,
        priority,
        wire::number(chain, 5)?,
    ))
}

/// Every object of family inet of a kind: what follows the two headers.
fn ask(socket: &mut Socket, get: u16, new: u16) -> Result<Vec<Vec<u8>>, Errno> {
    let none = Attributes::default();
    let question = wire::message(get, REQUEST | DUMP, 0, &header(INET, 0), &none);
    let objects = socket.dump(&question)?.into_iter();
    let bodies = objects.filter(|(kind, body)| *kind == new && body.first() == Some(&INET));
    Ok(bodies
        .filter_map(|(_, body)| body.get(4..).map(<[u8]>::to_vec))
        .collect())
}

/// The protocol of the packet filter.
pub(super) fn open() -> Result<Socket, Errno> {
    Socket::open(SockProtocol::NetlinkNetFilter)
}
