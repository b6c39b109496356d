//! `malha uninstall`: what can stop pods from being made goes first, what cannot be made again stays unless asked for.
//!
//! [`rendering`] + what the control plane made -> [`plan`] -> lines; with --apply -> deleted in that order

use std::fmt::Write as _;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ApiResource, ListParams};
use serde_json::{Value, json};

use super::{
    Exit, Failure, Terminal,
    cluster::{self, Answered as _, Cluster, ClusterArgs, PodName, has_sidecar},
    rendering::{self, NAMESPACE, ObjectName},
};

/// Remove the control plane: print what would be deleted, or delete it.
///
/// Webhooks and the admission policy go first, so that pods can be made whatever happens next; then the rest. CRDs with the
/// users' objects, and the namespace with the authority's keys, stay unless --purge. Running sidecars go on until their
/// certificates end; `malha unmesh NAMESPACE --restart` takes them out before.
///
/// Exit codes: 0; 1 where a deletion was refused; 69 where the cluster does not answer.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Only what can stop pods from being made: webhooks and the admission policy. `malha install --apply` puts it back.
    #[arg(long, conflicts_with = "purge")]
    emergency: bool,
    /// Also the CRDs with all objects of their kinds, the namespace with the authority's keys, and every trust bundle.
    #[arg(long)]
    purge: bool,
    /// Delete it; what was deleted is the result.
    #[arg(long)]
    apply: bool,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// One line an object, as it is deleted.
    Table,
    /// One object.
    Json,
}

/// What an uninstall does with an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// First: it can stop pods from being made.
    Unblock,
    /// Then: it can be made again.
    Remove,
    /// Last, and only with --purge: it holds what cannot be made again.
    Purge,
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    cluster::block_on(uninstall(&args, terminal))
}

async fn uninstall(args: &Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let cluster = args.cluster.connect().await?;
    let (mut gone, mut kept) = (Vec::new(), Vec::new());
    let all = [rendering::objects(false), rendering::monitoring()].concat();
    for (step, name) in plan(&all) {
        let goes = match step {
            Step::Unblock => true,
            Step::Remove => !args.emergency,
            Step::Purge => args.purge,
        };
        if args.emergency && !goes {
            continue;
        }
        let (kind, namespace) = (&name.resource, name.namespace.as_deref());
        let found = cluster.object(kind, namespace, &name.name).await;
        if found.answered()?.is_some() {
            if goes { &mut gone } else { &mut kept }.push(name);
        }
    }
    if args.purge {
        gone.extend(trust_bundles(&cluster).await.answered()?);
    }
    for name in &gone {
        if args.apply {
            cluster.delete(name).await?;
        }
        if args.output == Format::Table {
            terminal.result(&format!("{name}\n"))?;
        }
    }
    let carrying = match args.emergency {
        true => Vec::new(),
        false => sidecars(&cluster).await?,
    };
    if args.output == Format::Json {
        let text = to_json(args.apply, &gone, &kept, &carrying);
        terminal.result(&format!("{text:#}\n"))?;
        return Ok(Exit::Done);
    }
    terminal.note(&summary(args, gone.len(), &kept));
    if !carrying.is_empty() {
        terminal.note(&format!(
            "{} pods still carry sidecars, whose certificates nobody renews now; `malha unmesh NAMESPACE --restart` takes them out:",
            carrying.len()
        ));
    }
    for pod in carrying {
        terminal.note(&format!("  {pod}"));
    }
    Ok(Exit::Done)
}

fn to_json(applied: bool, gone: &[ObjectName], kept: &[ObjectName], carrying: &[PodName]) -> Value {
    let names = |objects: &[ObjectName]| -> Vec<_> {
        let names = objects.iter().map(
            |it| json!({ "kind": it.resource.kind, "namespace": it.namespace, "name": it.name }),
        );
        names.collect()
    };
    let carrying: Vec<_> = carrying.iter().map(ToString::to_string).collect();
    json!({
        "apiVersion": "malha/v1", "kind": "Uninstall", "applied": applied,
        "deleted": names(gone), "kept": names(kept), "podsWithSidecar": carrying,
    })
}

/// All that an installation may have left, in the order in which it is deleted.
fn plan(objects: &[Value]) -> Vec<(Step, ObjectName)> {
    let mut all: Vec<_> = objects
        .iter()
        .map(ObjectName::of)
        .map(|name| (step(&name), name))
        .collect();
    let lease = ("coordination.k8s.io", "v1", "Lease");
    let lease = ObjectName::new(lease, Some(NAMESPACE), "malha-leader");
    all.push((Step::Remove, lease));
    // Stable: bindings stay behind the policy that they bind, and pods before what they mount.
    all.sort_by_key(|(step, name)| (*step, order(&name.resource.kind)));
    all
}

fn step(name: &ObjectName) -> Step {
    match name.resource.kind.as_str() {
        "MutatingWebhookConfiguration"
        | "ValidatingWebhookConfiguration"
        | "ValidatingAdmissionPolicy"
        | "ValidatingAdmissionPolicyBinding" => Step::Unblock,
        "CustomResourceDefinition" | "Namespace" => Step::Purge,
        _ => Step::Remove,
    }
}

/// Among equals: bindings make a policy act, and who still runs would write back what is deleted under it.
fn order(kind: &str) -> u8 {
    match kind {
        "MutatingWebhookConfiguration" | "Deployment" | "CronJob" => 0,
        "ValidatingAdmissionPolicyBinding" => 1,
        "Namespace" => 3,
        _ => 2,
    }
}

/// The trust bundles outside the control plane's namespace, which goes as a whole.
async fn trust_bundles(cluster: &Cluster) -> anyhow::Result<Vec<ObjectName>> {
    let resource = ApiResource::erase::<ConfigMap>(&());
    let named = ListParams::default().fields("metadata.name=malha-ca-root-cert");
    let found = cluster.objects_that(&resource, None, &named).await?;
    let names = found.iter().map(ObjectName::of);
    Ok(names
        .filter(|name| name.namespace.as_deref() != Some(NAMESPACE))
        .collect())
}

fn summary(args: &Args, gone: usize, kept: &[ObjectName]) -> String {
    let mut text = match (args.apply, gone) {
        (_, 0) => "nothing of an installation is there".to_owned(),
        (true, _) => format!("{gone} objects were deleted"),
        (false, _) => format!("{gone} objects would be deleted, in this order; --apply does it"),
    };
    if !kept.is_empty() {
        let kept: Vec<_> = kept.iter().map(ToString::to_string).collect();
        let _ = write!(
            text,
            "; kept without --purge: {}, and what is in them",
            kept.join(", ")
        );
    }
    text
}

/// The pods that still carry a sidecar, for their certificates will end.
async fn sidecars(cluster: &Cluster) -> Result<Vec<PodName>, Failure> {
    let pods = cluster.pods(None).await.answered()?;
    let carrying = pods.iter().filter(|pod| has_sidecar(pod));
    Ok(carrying.map(PodName::of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_stop_pods_goes_first_and_what_cannot_be_made_again_last() {
        let plan = plan(&rendering::objects(false));
        let place = |name: &str| {
            let found = plan.iter().position(|(_, it)| it.to_string() == name);
            found.unwrap_or_else(|| panic!("no {name}"))
        };
        assert_eq!(place("MutatingWebhookConfiguration malha-injector"), 0);
        for (earlier, later) in [
            (
                "ValidatingAdmissionPolicyBinding malha-sidecar-present-pod",
                "ValidatingAdmissionPolicy malha-sidecar-present",
            ),
            (
                "ValidatingAdmissionPolicy malha-sidecar-present",
                "Deployment malha-system/malha",
            ),
            ("Deployment malha-system/malha", "ClusterRole malha"),
            (
                "Lease malha-system/malha-leader",
                "CustomResourceDefinition peerauthentications.security.istio.io",
            ),
        ] {
            assert!(place(earlier) < place(later), "{earlier}, {later}");
        }
        assert_eq!(place("Namespace malha-system"), plan.len() - 1);
        assert!(plan.is_sorted_by_key(|(step, _)| *step));
    }
}
