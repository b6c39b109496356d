//! `malha explain`: gate by gate, why a pod is or is not injected, and what its ports accept.

mod inbound;
mod live;

use std::{collections::BTreeMap, fmt::Write as _};

use anstyle::Style;
use anyhow::anyhow;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use self::{
    inbound::{Captured, Inbound, Rules},
    live::{Live, Target},
};
use super::{
    Exit, Failure, Terminal, cluster,
    documents::{Document, InputArgs},
    exit::OrExit as _,
    mesh::MeshArgs,
    terminal::{Mark, paint, span, table},
};
use crate::{
    identity::{SpiffeId, TrustDomain},
    inject::{
        Injector, NamespaceFacts, Reason,
        explain::{Explanation, explain},
        uninject::uninject,
        workload::{Surroundings, Template, templates},
    },
    runtime::clock,
};

/// Say gate by gate why a pod gets a sidecar, or why not, and what each of its ports accepts.
///
/// Name an object of the cluster (POD, or KIND/NAME such as deploy/web, ns/shop), or give manifests with -f. With -f give
/// the namespace, too: without it every pod is taken to be selected, or as --namespace-labels says; what ports accept is
/// told where PeerAuthentications are given. `malha doc CODE` says more about a code.
///
/// Exit codes: 0 whatever the verdict; 2 with --strict where a pod is not injected; 65 where the object is not there, or
/// the input holds no pod or workload; 69 where the cluster does not answer.
#[derive(Debug, clap::Args)]
#[command(mut_arg("files", |arg| arg
    .required(false)
    .required_unless_present("object")
    .conflicts_with_all(["object", "kubeconfig", "context"])))]
pub(super) struct Args {
    /// An object of the cluster: a pod, or KIND/NAME.
    #[arg(value_name = "POD|KIND/NAME", value_parser = live::parse_target)]
    object: Option<Target>,
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    place: cluster::ControlPlaneArgs,
    #[command(flatten)]
    mesh: MeshArgs,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// End with 2 where a pod is not injected.
    #[arg(long)]
    strict: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// A line for each gate.
    Table,
    /// One object.
    Json,
}

/// What is explained, and all that bears on it.
struct Scene {
    found: Vec<Found>,
    injector: Injector,
    surroundings: Surroundings,
    /// `None` where nothing may be said about ports.
    rules: Option<Rules>,
    certificates: BTreeMap<(String, String), Timestamp>,
    /// The objects are a cluster's.
    live: bool,
}

/// An object and where it was found.
struct Found {
    origin: String,
    value: Value,
}

/// One pod or template, and its way.
struct Subject {
    origin: String,
    template: Template,
    namespace: NamespaceFacts,
    /// The namespace's labels are an assumption.
    assumed: bool,
    way: Explanation,
    /// Of a cluster's pod: whether the sidecar is in it.
    sidecar: Option<bool>,
    identity: Option<String>,
    /// Until when the pod's certificate is good.
    certificate: Option<Timestamp>,
    inbound: Option<Inbound>,
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let scene = match &args.object {
        None => Scene::of_documents(&args)?,
        Some(target) => {
            let namespace = args.mesh.named_namespace();
            let look = live::look(&args.place, namespace, target);
            Scene::of_cluster(&args, cluster::block_on(look)?, terminal)?
        }
    };
    let subjects = scene.subjects()?;
    if subjects.is_empty() {
        return Err(Exit::BadInput.because(anyhow!(
            "the input holds no pod and no workload with a pod template"
        )));
    }
    for finding in scene.rules.iter().flat_map(|rules| &rules.findings) {
        terminal.note(&format!("warning: {finding}"));
    }
    match args.output {
        Format::Json => {
            let items: Vec<_> = subjects.iter().map(Subject::to_json).collect();
            let list =
                json!({ "apiVersion": "malha/v1", "kind": "ExplanationList", "items": items });
            terminal.result(&format!("{list:#}\n"))?;
        }
        Format::Table => {
            let now = clock::system().now();
            let texts: Vec<_> = subjects
                .iter()
                .map(|subject| subject.text(terminal, now))
                .collect();
            terminal.styled(&texts.join("\n"))?;
        }
    }
    let all_meshed = subjects.iter().all(Subject::is_meshed);
    Ok(if args.strict && !all_meshed {
        Exit::Warned
    } else {
        Exit::Done
    })
}

impl Scene {
    fn of_documents(args: &Args) -> Result<Self, Failure> {
        let documents = args.input.read()?;
        let injector = args.mesh.injector()?;
        let surroundings = args.mesh.surroundings(&documents)?;
        let rules = Rules::of(
            documents.iter().map(|document| &document.value),
            args.mesh.namespace(),
            &args.place.system_namespace,
        );
        let found = |document: Document| Found {
            origin: document.origin.to_string(),
            value: document.value,
        };
        Ok(Self {
            found: documents.into_iter().map(found).collect(),
            injector,
            surroundings,
            rules: Some(rules).filter(|rules| !rules.silent),
            certificates: BTreeMap::new(),
            live: false,
        })
    }

    fn of_cluster(args: &Args, live: Live, terminal: &mut Terminal) -> Result<Self, Failure> {
        for note in &live.notes {
            terminal.note(&format!("warning: {note}"));
        }
        let namespace = live.namespace.name.clone();
        let found = |value| Found {
            origin: "in the cluster".to_owned(),
            value,
        };
        Ok(Self {
            found: live.objects.into_iter().map(found).collect(),
            injector: args.mesh.injector_of(live.written.as_ref())?,
            rules: live
                .rules
                .map(|rules| Rules::of(&rules, &namespace, &args.place.system_namespace)),
            surroundings: Surroundings {
                namespaces: vec![live.namespace],
                default_namespace: namespace,
                oldest_kubelet: args.mesh.oldest_kubelet().or(live.oldest_kubelet),
            },
            certificates: live.certificates,
            live: true,
        })
    }

    fn subjects(&self) -> Result<Vec<Subject>, Failure> {
        let mut subjects = Vec::new();
        for found in &self.found {
            for template in templates(&found.value) {
                let subject = self
                    .subject(found, template)
                    .map_err(|fault| fault.context(found.origin.clone()))
                    .or_exit(Exit::BadInput)?;
                subjects.push(subject);
            }
        }
        Ok(subjects)
    }

    fn subject(&self, found: &Found, template: Template) -> anyhow::Result<Subject> {
        let namespace = self.surroundings.namespace_of(&template);
        let pod = template.pod(&found.value).unwrap_or(&Value::Null);
        let sidecar = (self.live && template.kind == "Pod").then(|| live::carries_sidecar(pod));
        let mut asked = pod.clone();
        if sidecar == Some(true) {
            // The gates are asked about the pod that its author made. One that cannot be taken back is asked as it is.
            let _ = uninject(&mut asked);
        }
        let way = explain(
            &self.injector,
            asked.to_string().as_bytes(),
            &namespace,
            self.surroundings.oldest_kubelet,
            template.owner().as_ref(),
        )?;
        let mut subject = Subject {
            origin: found.origin.clone(),
            assumed: !self.knows(&namespace),
            way,
            sidecar,
            identity: None,
            certificate: None,
            inbound: None,
            template,
            namespace,
        };
        if subject.is_meshed() {
            self.add_mesh(&mut subject, pod);
        }
        Ok(subject)
    }

    fn knows(&self, namespace: &NamespaceFacts) -> bool {
        let mut known = self.surroundings.namespaces.iter();
        known.any(|known| known.name == namespace.name)
    }

    /// What holds for a pod because it is in the mesh.
    fn add_mesh(&self, subject: &mut Subject, pod: &Value) {
        let Some(typed) = subject.typed(pod) else {
            return;
        };
        let account = typed
            .spec
            .as_ref()
            .and_then(|spec| spec.service_account_name.as_deref());
        let account = account
            .filter(|account| !account.is_empty())
            .unwrap_or("default");
        if self.live {
            let domain = self.injector.settings().trust_domain.parse::<TrustDomain>();
            let id = domain
                .ok()
                .and_then(|domain| SpiffeId::new(&domain, &subject.namespace.name, account).ok());
            subject.identity = id.map(|id| id.to_string());
            let name = (
                subject.namespace.name.clone(),
                subject.template.name.clone(),
            );
            subject.certificate = self.certificates.get(&name).copied();
        }
        if let Some(rules) = &self.rules {
            let would_be = || subject.way.capture.as_ref().map(Captured::of);
            let captured = Captured::by_init(pod).or_else(would_be);
            subject.inbound = captured.and_then(|captured| rules.inbound(&typed, captured));
        }
    }
}

/// Whether the pod has its sidecar in the end.
fn is_meshed(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Injected | Reason::Reinvoked | Reason::AlreadyInjected
    )
}

impl Subject {
    /// The sidecar is in it, or would be.
    fn is_meshed(&self) -> bool {
        self.sidecar.unwrap_or_else(|| is_meshed(self.way.reason))
    }

    /// The pod as a typed object that says its name and namespace.
    fn typed(&self, pod: &Value) -> Option<Pod> {
        let mut typed: Pod = serde_json::from_value(pod.clone()).ok()?;
        typed.metadata.namespace = Some(self.namespace.name.clone());
        let name = &mut typed.metadata.name;
        name.get_or_insert_with(|| self.template.name.clone());
        Some(typed)
    }

    fn text(&self, terminal: &Terminal, now: Timestamp) -> String {
        let Self {
            origin,
            template,
            namespace,
            way,
            ..
        } = self;
        let bold = Style::new().bold();
        let title = format!("{} {}/{}", template.kind, namespace.name, template.name);
        let mut text = format!("{} ({})\n", paint(bold, &title), origin);
        let longest = way
            .gates
            .iter()
            .map(|gate| gate.question.chars().count())
            .max()
            .unwrap_or(0);
        for gate in &way.gates {
            let mark = terminal.mark(if gate.passed { Mark::Pass } else { Mark::Fail });
            // Which entry matched, and by which selector, has a line of its own.
            let saw = gate.saw.replace(
                "; matched ",
                "
      matched ",
            );
            let line = format!("  {mark} {:longest$}   {saw}", gate.question);
            let _ = writeln!(text, "{}", line.trim_end());
        }
        let _ = writeln!(text, "verdict: {}", paint(bold, &self.verdict()));
        if let Some(message) = &way.message {
            let _ = writeln!(text, "why: {message}");
        }
        if let Some(fix) = way.fix {
            let _ = writeln!(text, "fix: {fix}");
        }
        for warning in &way.warnings {
            let _ = writeln!(text, "{} {}", terminal.mark(Mark::Warn), warning.text);
        }
        for note in &way.notes {
            let _ = writeln!(text, "note: {note}");
        }
        if self.assumed {
            let _ = writeln!(
                text,
                "note: namespace {} is not among the input, and is taken to be labelled istio-injection=enabled",
                namespace.name
            );
        }
        self.write_mesh(now, &mut text);
        text
    }

    fn write_mesh(&self, now: Timestamp, text: &mut String) {
        match (self.sidecar, is_meshed(self.way.reason)) {
            (Some(true), true) => text.push_str("sidecar: in the pod\n"),
            (Some(true), false) => text.push_str(
                "sidecar: in the pod since it was created; the verdict is about a pod that is created now\n",
            ),
            (Some(false), true) => text.push_str(
                "sidecar: not in the pod, which was created before this verdict held; delete it, and its successor has one\n",
            ),
            (Some(false), false) | (None, _) => {}
        }
        if let Some(identity) = &self.identity {
            let _ = writeln!(text, "identity: {identity}");
        }
        if let Some(end) = self.certificate {
            let left = match now < end {
                true => format!("{} left", span(now, end)),
                false => format!("expired {} ago", span(end, now)),
            };
            let _ = writeln!(text, "certificate: good until {end}, {left}");
        }
        if let Some(inbound) = &self.inbound {
            text.push_str("what comes in, by port of the pod:\n");
            for line in table(&inbound.rows()).lines() {
                let _ = writeln!(text, "  {line}");
            }
        }
    }

    fn verdict(&self) -> String {
        format!("{}: {}", self.result(), self.way.reason)
    }

    fn result(&self) -> &'static str {
        match (is_meshed(self.way.reason), &self.way.message) {
            (true, _) => "injected",
            (false, Some(_)) => "denied",
            (false, None) => "skipped",
        }
    }

    fn to_json(&self) -> Value {
        let Self {
            origin,
            template,
            namespace,
            assumed,
            way,
            sidecar,
            identity,
            certificate,
            inbound,
        } = self;
        let warnings: Vec<_> = way
            .warnings
            .iter()
            .map(|warning| json!({ "code": warning.code.as_str(), "text": warning.text }))
            .collect();
        json!({
            "object": {
                "apiVersion": template.api_version,
                "kind": template.kind,
                "namespace": namespace.name,
                "name": template.name,
                "origin": origin,
            },
            "namespaceLabels": namespace.labels,
            "namespaceAssumed": assumed,
            "gates": way.gates,
            "result": self.result(),
            "reason": way.reason.as_str(),
            "message": way.message,
            "fix": way.fix,
            "warnings": warnings,
            "notes": way.notes,
            "sidecar": sidecar,
            "identity": identity,
            "certificateNotAfter": certificate,
            "mtls": inbound.as_ref().map(Inbound::to_json),
        })
    }
}
