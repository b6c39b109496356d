//! `malha ca`: the state of the certificate authority, and its rotation by hand or by the CronJob.

mod audit;

use std::{collections::BTreeMap, fmt::Write as _, future::Future, path::PathBuf};

use anyhow::Context as _;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    Exit, Failure, Terminal,
    exit::OrExit as _,
    settings::SettingsArgs,
    terminal::{span, table, time_left},
};
use crate::{
    ca::{
        Validity,
        journal::{HomeError, IntermediateState, Journal, JournalHome, Kind, Phase},
        rotation::{CLOCK_TOLERANCE, RotationPolicy, next_elapsed},
    },
    custody::{self, CustodyError, RotateRequest, Ticked},
    identity::SpiffeId,
    k8s::{
        self, Access,
        journal::{SecretHome, Traces},
        world,
    },
    runtime::clock,
    standalone::{Directory, FileHome},
};

/// See and rotate the certificate authority.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Status(Status),
    Rotate(Rotate),
}

/// Show the authorities: what signs, what is trusted, until when, and what happens next.
///
/// With --audit-verify the audit records of a log instead (lines of another kind are passed over): whether one is missing
/// or was changed, and with --issued-to who got which certificate when.
///
/// Exit codes: 0; 1 where there is no authority yet, or where audit records are missing or were changed; 65 where the
/// journal or the log cannot be read; 69 where the cluster does not answer.
#[derive(Debug, clap::Args)]
struct Status {
    #[command(flatten)]
    place: Place,
    /// A log of the control plane (- for standard input), such as `kubectl logs` writes it.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["standalone", "kubeconfig", "context"])]
    audit_verify: Option<String>,
    /// Of these records, the certificates of one identity: spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT.
    #[arg(long, value_name = "ID", requires = "audit_verify")]
    issued_to: Option<SpiffeId>,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// Rotate: with --intermediate the certificate that signs the leaves, which changes no trust and disturbs nobody.
///
/// The root's rotation comes with a later release. Safe beside a running control plane and beside itself: one read, one
/// step, one write, and again where somebody else was first.
///
/// Exit codes: 0 done, or nothing due; 1 refused; 65 where the journal cannot be read; 69 where the cluster does not
/// answer; 75 where every race for a write was lost.
#[derive(Debug, clap::Args)]
struct Rotate {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    settings: SettingsArgs,
    /// The intermediate only.
    #[arg(long)]
    intermediate: bool,
    /// Only what the schedule asks for, as the hourly CronJob does.
    #[arg(long)]
    if_due: bool,
    /// Say what would be done, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// One object.
    Json,
}

/// Where the journal is.
#[derive(Debug, clap::Args)]
struct Place {
    /// The directory of `malha serve --standalone DIR`, instead of a cluster.
    #[arg(long, value_name = "DIR")]
    standalone: Option<PathBuf>,
    /// Kubeconfig of the cluster.
    #[arg(long, value_name = "FILE", conflicts_with = "standalone")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long, value_name = "NAME", conflicts_with = "standalone")]
    context: Option<String>,
    /// The control plane's namespace.
    #[arg(
        short,
        long,
        value_name = "NAME",
        default_value = "malha-system",
        conflicts_with = "standalone"
    )]
    namespace: String,
}

/// Something that is done with a journal, wherever it lives.
trait Act {
    type Answer;
    /// Whether it writes instants into the journal, and so needs a clock that can be believed.
    const WRITES: bool;
    fn on<H: JournalHome>(
        self,
        home: &H,
    ) -> impl Future<Output = Result<Self::Answer, CustodyError>>;
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    match args.verb {
        Verb::Status(args) => status(&args, terminal),
        Verb::Rotate(args) => rotate(&args, terminal),
    }
}

/// The Secret of a cluster's authority.
pub(super) fn secret_home(client: kube::Client, namespace: &str) -> SecretHome {
    let traces = Traces {
        config_map: "malha-ca-root-cert".to_owned(),
        webhook: "malha-injector".to_owned(),
    };
    SecretHome::new(client, namespace, "malha-ca", traces)
}

fn status(args: &Status, terminal: &mut Terminal) -> Result<Exit, Failure> {
    if let Some(file) = &args.audit_verify {
        let issued_to = args.issued_to.as_ref();
        let report = audit::read(file, issued_to)?;
        let text = match args.output {
            Format::Json => format!("{:#}\n", report.to_json(issued_to)),
            Format::Table => report.to_text(issued_to),
        };
        terminal.result(&text)?;
        return Ok(Exit::Done);
    }
    let journal = args.place.act(Load)?;
    let now = clock::system().now();
    let text = match args.output {
        Format::Json => format!("{:#}\n", to_json(&journal, now)),
        Format::Table => to_text(&journal, now),
    };
    terminal.result(&text)?;
    Ok(Exit::Done)
}

struct Load;

impl Act for Load {
    type Answer = Journal;
    const WRITES: bool = false;

    async fn on<H: JournalHome>(self, home: &H) -> Result<Journal, CustodyError> {
        match home.load().await? {
            Some(stored) => Ok(stored.journal),
            None => Err(custody::missing(home).await),
        }
    }
}

fn rotate(args: &Rotate, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let settings = args.settings.read(BTreeMap::new())?;
    let turn = Turn {
        policy: settings.rotation,
        request: RotateRequest {
            intermediate: args.intermediate,
            if_due: args.if_due,
            dry_run: args.dry_run,
        },
    };
    let Ticked { done, next, .. } = args.place.act(turn)?;
    let now = clock::system().now();
    let text = match args.output {
        Format::Json => {
            let report = json!({
                "apiVersion": "malha/v1",
                "kind": "RotationReport",
                "dryRun": args.dry_run,
                "done": done.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "next": next,
            });
            format!("{report:#}\n")
        }
        Format::Table => {
            let mut text = String::new();
            if args.dry_run {
                text.push_str("dry run: nothing was written; this would be done:\n");
            }
            for done in &done {
                let _ = writeln!(text, "{done}");
            }
            if done.is_empty() {
                text.push_str("nothing is due\n");
            }
            let _ = writeln!(text, "next: {next}, in {}", span(now, next));
            text
        }
    };
    terminal.result(&text)?;
    Ok(Exit::Done)
}

struct Turn {
    policy: RotationPolicy,
    request: RotateRequest,
}

impl Act for Turn {
    type Answer = Ticked;
    const WRITES: bool = true;

    async fn on<H: JournalHome>(self, home: &H) -> Result<Ticked, CustodyError> {
        custody::rotate(home, &self.policy, self.request, &clock::system()).await
    }
}

impl Place {
    fn act<A: Act>(&self, act: A) -> Result<A::Answer, Failure> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the async runtime")
            .or_exit(Exit::Internal)?
            .block_on(self.act_there(act))
    }

    async fn act_there<A: Act>(&self, act: A) -> Result<A::Answer, Failure> {
        let acted = if let Some(directory) = &self.standalone {
            let directory = Directory::open_existing(directory).or_exit(Exit::BadInput)?;
            act.on(&FileHome::new(directory)).await
        } else {
            let access = Access {
                kubeconfig: self.kubeconfig.clone(),
                context: self.context.clone(),
            };
            let client = k8s::connect(&access).await.or_exit(Exit::Unreachable)?;
            if A::WRITES {
                believe_clock(&client).await?;
            }
            act.on(&secret_home(client, &self.namespace)).await
        };
        acted.map_err(|error| exit_of(&error).because(error))
    }
}

/// A future instant in the journal would stop every replica, so a clock that is far from the API server's writes nothing.
/// Where the API server does not answer, the journal cannot be read either, and that error has the better words.
async fn believe_clock(client: &kube::Client) -> Result<(), Failure> {
    match world::clock_skew(client, &clock::system()).await {
        Ok(Some(ahead)) if ahead.unsigned_abs() > CLOCK_TOLERANCE => {
            let seconds = ahead.as_secs();
            Err(Exit::Refused.because(anyhow::anyhow!(
                "ClockJump: this clock is {seconds} s ahead of the API server's; nothing was written; set it right and try again"
            )))
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

fn exit_of(error: &CustodyError) -> Exit {
    match error {
        CustodyError::Home(HomeError::Unreachable { .. }) => Exit::Unreachable,
        CustodyError::Home(HomeError::Unreadable { .. }) | CustodyError::Unusable(_) => {
            Exit::BadInput
        }
        CustodyError::Home(HomeError::Conflict { .. }) | CustodyError::LostRaces(_) => {
            Exit::LostRaces
        }
        CustodyError::NoJournal
        | CustodyError::JournalLost
        | CustodyError::OtherTrustDomain { .. }
        | CustodyError::Foreign { .. }
        | CustodyError::Superseded { .. }
        | CustodyError::Refused(_)
        | CustodyError::RootByHand => Exit::Refused,
        CustodyError::Plugged(_) => Exit::BadInput,
        CustodyError::Policy(_) => Exit::Usage,
        CustodyError::Dice => Exit::Internal,
    }
}

/// One certificate of the authority.
struct Row {
    kind: &'static str,
    id: String,
    state: &'static str,
    validity: Validity,
}

/// Roots with their intermediates below them, in the order they were made.
fn rows(journal: &Journal) -> Vec<Row> {
    let mut rows = Vec::new();
    for authority in journal.authorities() {
        rows.push(Row {
            kind: match authority.kind {
                Kind::Root => "root",
                Kind::Plugged => "plugged root",
            },
            id: authority.id().to_string(),
            state: phase(authority.phase),
            validity: authority.certificate.validity(),
        });
        rows.extend(authority.intermediates.iter().map(|intermediate| Row {
            kind: "intermediate",
            id: intermediate.certificate.id().to_string(),
            state: state(intermediate.state),
            validity: intermediate.certificate.validity(),
        }));
    }
    rows
}

/// When the intermediate is, or should be, replaced next; at once where there is none.
fn next(journal: &Journal, now: Timestamp) -> Timestamp {
    let active = journal.active().intermediate(IntermediateState::Active);
    active.map_or(now, |active| active.certificate.validity().half())
}

fn to_text(journal: &Journal, now: Timestamp) -> String {
    let head = ["KIND", "KEY ID", "STATE", "NOT AFTER", "LEFT"]
        .map(str::to_owned)
        .to_vec();
    let rows = rows(journal).into_iter().map(|row| {
        vec![
            row.kind.to_owned(),
            row.id,
            row.state.to_owned(),
            row.validity.not_after.to_string(),
            time_left(row.validity, now),
        ]
    });
    let table = table(&std::iter::once(head).chain(rows).collect::<Vec<_>>());
    let due = |at: Timestamp| match at <= now {
        true => "due now".to_owned(),
        false => format!("{at}, in {}", span(now, at)),
    };
    let mut text = format!(
        "trust domain {}, generation {}, epoch {}\n{table}",
        journal.trust_domain(),
        journal.generation(),
        journal.epoch(),
    );
    let _ = match journal.active().kind {
        Kind::Root => writeln!(
            text,
            "next rotation of the intermediate: {}",
            due(next(journal, now))
        ),
        Kind::Plugged => writeln!(
            text,
            "the issuer is plugged in; the next one belongs into the Secret cacerts before {}",
            next(journal, now)
        ),
    };
    if let Some(at) = next_elapsed(journal) {
        let _ = writeln!(text, "next step of the roots' rotation: {}", due(at));
    }
    text
}

fn to_json(journal: &Journal, now: Timestamp) -> Value {
    let authorities: Vec<_> = journal
        .authorities()
        .iter()
        .map(|authority| {
            let intermediates: Vec<_> = authority
                .intermediates
                .iter()
                .map(|intermediate| {
                    json!({
                        "keyId": intermediate.certificate.id().to_string(),
                        "state": state(intermediate.state),
                        "notBefore": intermediate.certificate.validity().not_before,
                        "notAfter": intermediate.certificate.validity().not_after,
                    })
                })
                .collect();
            json!({
                "keyId": authority.id().to_string(),
                "kind": authority.kind,
                "phase": phase(authority.phase),
                "notBefore": authority.certificate.validity().not_before,
                "notAfter": authority.certificate.validity().not_after,
                "preparedAt": authority.prepared_at,
                "publishedAt": authority.published_at,
                "activatedAt": authority.activated_at,
                "drainUntil": authority.drain_until,
                "retiredAt": authority.retired_at,
                "tainted": authority.tainted,
                "intermediates": intermediates,
            })
        })
        .collect();
    json!({
        "apiVersion": "malha/v1",
        "kind": "AuthorityStatus",
        "trustDomain": journal.trust_domain().to_string(),
        "generation": journal.generation(),
        "epoch": journal.epoch(),
        "longestLeafSeconds": journal.longest_leaf().as_secs(),
        "authorities": authorities,
        "nextRotation": { "of": "intermediate", "at": next(journal, now) },
        "nextRootStep": next_elapsed(journal),
    })
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepared => "prepared",
        Phase::Published => "published",
        Phase::Active => "active",
        Phase::Draining => "draining",
        Phase::Retired => "retired",
    }
}

fn state(state: IntermediateState) -> &'static str {
    match state {
        IntermediateState::Next => "next",
        IntermediateState::Active => "active",
        IntermediateState::Past => "past",
    }
}
