//! `malha install`: the manifests that travel with the program, printed or applied.
//!
//! [`rendering`] -> text; with --apply -> server-side apply -> the Deployment ready -> a pod in a dry run, a certificate

use std::{io::IsTerminal as _, time::Duration};

use anyhow::{Context as _, anyhow};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::ApiResource;
use serde_json::{Value, json};

use super::{
    Exit, Failure, Terminal,
    check::{
        admission,
        issuance::{Issuance, try_a_certificate},
        trusted_by_the_journal,
    },
    cluster::{self, Answered as _, Cluster, ClusterArgs},
    documents,
    exit::OrExit as _,
    rendering::{self, ObjectName},
    rollout,
    terminal::Mark,
};
use crate::config::parse_duration;

/// Install the control plane: print what would be applied, or apply it.
///
/// The objects are those of manifests/install.yaml of this version. --apply needs the rights of a cluster administrator:
/// it applies them server-side under its own field manager, waits until the control plane is ready, has the API server try
/// a pod (a dry run, nothing is stored) and the authority issue a certificate. Applying again upgrades in place.
///
/// Exit codes: 0; 1 where an object was refused, the control plane did not become ready, the pod got no sidecar, or no
/// certificate was issued; 69 where the cluster does not answer.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Three replicas that never share a node, instead of two that prefer not to.
    #[arg(long)]
    ha: bool,
    /// Alerts, scraping and dashboards too: those of manifests/monitoring.yaml. Needs the Prometheus operator.
    #[arg(long)]
    monitoring: bool,
    /// Where the three images are pulled from, such as registry.example.com/mesh; without it they must be on the nodes.
    #[arg(long, value_name = "REGISTRY", value_parser = parse_registry)]
    image_registry: Option<String>,
    /// How the objects are written.
    #[arg(short, long, value_enum, default_value_t = Format::Yaml, conflicts_with = "apply")]
    output: Format,
    /// Apply them; the names of what was applied are the result.
    #[arg(long)]
    apply: bool,
    /// Take over fields that somebody else manages, such as what `kubectl edit` changed.
    #[arg(long, requires = "apply")]
    force: bool,
    /// How long the control plane may take to become ready, and then to be reached.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration, requires = "apply")]
    timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// As `kubectl apply -f -` takes it.
    Yaml,
    /// One List.
    Json,
    /// KIND/NAME, one a line.
    Name,
}

/// A registry, and perhaps a path in it: no scheme, no tag, no slash at the end.
fn parse_registry(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._:/".contains(c);
    let whole = text.split('/').all(|part| !part.is_empty());
    if whole && text.chars().all(legal) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "{text:?} is not a registry such as registry.example.com/mesh"
        ))
    }
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let mut objects = rendering::objects(args.ha);
    if args.monitoring {
        objects.extend(rendering::monitoring());
    }
    if let Some(registry) = &args.image_registry {
        rendering::pull_from(registry, &mut objects);
    }
    if args.apply {
        return cluster::block_on(apply(&args, &objects, terminal));
    }
    let text = match args.output {
        Format::Yaml if args.image_registry.is_none() => match args.monitoring {
            false => rendering::text(args.ha).to_owned(),
            true => [rendering::text(args.ha), rendering::monitoring_text()].join("---\n"),
        },
        Format::Yaml => {
            let documents: anyhow::Result<Vec<_>> =
                objects.iter().map(documents::to_yaml).collect();
            documents.or_exit(Exit::Internal)?.join("---\n")
        }
        Format::Json => {
            let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
            format!("{list:#}\n")
        }
        Format::Name => objects
            .iter()
            .map(|object| ObjectName::of(object).as_kubectl() + "\n")
            .collect(),
    };
    terminal.result(&text)?;
    if std::io::stdout().is_terminal() {
        terminal.note("nothing was applied; --apply does it");
    }
    Ok(Exit::Done)
}

async fn apply(args: &Args, objects: &[Value], terminal: &mut Terminal) -> Result<Exit, Failure> {
    let cluster = args.cluster.connect().await?;
    if args.monitoring {
        operator(&cluster).await?;
    }
    for object in objects {
        let name = ObjectName::of(object);
        cluster.apply(&name, object, args.force).await?;
        terminal.result(&format!("{}\n", name.as_kubectl()))?;
    }
    terminal.progress("waiting for the control plane");
    let deployment = ObjectName::new(
        ("apps", "v1", "Deployment"),
        Some(rendering::NAMESPACE),
        "malha",
    );
    rollout::finished(&cluster, &deployment, args.timeout).await?;
    terminal.progress("having the API server try a pod");
    verify(&cluster, args.timeout, terminal).await
}

/// Refuses before anything is applied where the kinds of the monitoring are not known.
async fn operator(cluster: &Cluster) -> Result<(), Failure> {
    for name in ["podmonitors", "prometheusrules"] {
        let crd = ApiResource::erase::<CustomResourceDefinition>(&());
        let name = format!("{name}.monitoring.coreos.com");
        let found = cluster.object(&crd, None, &name).await;
        if found.answered()?.is_none() {
            return Err(Exit::Refused.because(anyhow!(
                "there is no CustomResourceDefinition {name}, so nothing was applied; install the Prometheus operator \
                 first, or leave out --monitoring"
            )));
        }
    }
    Ok(())
}

/// Has the API server try a pod until it gets its sidecar, for ready replicas are not reached yet: the API server and the
/// nodes hear of them a moment later. Then a certificate.
async fn verify(
    cluster: &Cluster,
    patience: Duration,
    terminal: &mut Terminal,
) -> Result<Exit, Failure> {
    let closer = |failure: Failure| {
        let error = anyhow!("{:#}; `malha check` looks closer", failure.error);
        failure.exit.because(error)
    };
    cluster
        .until("a pod in a dry run", patience, || async {
            Ok(admission::try_a_pod(cluster).await?.fault())
        })
        .await
        .map_err(closer)?;
    let mark = terminal.mark(Mark::Pass);
    terminal.note(&format!("{mark} a pod in a dry run got its sidecar"));
    terminal.progress("having the authority issue a certificate");
    cluster
        .until("a certificate", patience, || async {
            let bundle = trusted_by_the_journal(cluster).await?;
            let bundle = bundle.context("there is no authority yet")?;
            Ok(match try_a_certificate(cluster, &bundle).await? {
                Issuance::Issued(_) => None,
                Issuance::NobodyAsked => Some("no replica is ready".to_owned()),
                Issuance::Refused(why) => Some(why),
            })
        })
        .await
        .map_err(closer)?;
    terminal.note(&format!(
        "{mark} the authority issued a certificate; `malha mesh NAMESPACE --restart` brings a namespace in"
    ));
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_has_no_scheme_and_no_loose_ends() {
        for right in ["registry.example.com", "localhost:5000/mesh", "a.b/c/d"] {
            assert!(parse_registry(right).is_ok(), "{right}");
        }
        for wrong in ["", "https://a.b", "a.b/", "/a", "a b", "A.b"] {
            assert!(parse_registry(wrong).is_err(), "{wrong}");
        }
    }
}
