//! Asks the cluster for the facts of a check. What may not be read is a fact too; only an API server that does not answer
//! ends the check.

use std::{collections::BTreeMap, future::Future};

use anyhow::Context as _;
use futures::future::try_join_all;
use k8s_openapi::api::{
    admissionregistration::v1::MutatingWebhookConfiguration,
    apps::v1::Deployment,
    core::v1::{ConfigMap, Namespace, Pod},
};
use kube::api::{ApiResource, ListParams};
use serde_json::Value;

use super::{
    admission::try_a_pod,
    facts::{Facts, Installed, Looked},
    issuance::{Issuance, try_a_certificate},
};
use crate::{
    ca::{bundle::Bundle, journal::JournalHome as _},
    cli::{
        Failure, ca,
        cluster::{Answered as _, CONTROL_PLANE, Cluster},
        mesh::namespace_facts,
        rendering::{self, NAMESPACE, ObjectName},
        terminal::whole,
    },
    inject::NamespaceFacts,
    k8s::trust_bundle,
    runtime::clock,
};

/// Looks at everything once.
///
/// # Errors
/// [`Exit::Unreachable`](crate::cli::Exit::Unreachable) where the API server does not answer.
pub(super) async fn look(cluster: &Cluster, before: bool) -> Result<Facts, Failure> {
    let clock = clock::system();
    let version = cluster.version(|| clock.now()).await;
    let (minor, skew) = version.answered()?;
    let mutating = ApiResource::erase::<MutatingWebhookConfiguration>(&());
    let (mutating, crds, rights, installed) = tokio::join!(
        fact(cluster.objects(&mutating, None)),
        fact(find(cluster, "CustomResourceDefinition")),
        async {
            match before {
                true => Some(fact(denied(cluster)).await),
                false => None,
            }
        },
        async {
            match before {
                true => None,
                false => Some(fact(installed(cluster)).await),
            }
        },
    );
    Ok(Facts {
        minor: Ok(minor),
        skew: skew.map_err(|why| whole(&why)),
        mutating,
        crds,
        rights,
        installed,
    })
}

async fn fact<T>(look: impl Future<Output = anyhow::Result<T>>) -> Looked<T> {
    look.await.map_err(|why| whole(&why))
}

/// The objects of a kind that are installed, as far as they are there.
async fn find(cluster: &Cluster, kind: &str) -> anyhow::Result<Vec<Value>> {
    let names: Vec<_> = rendering::objects(false)
        .iter()
        .map(ObjectName::of)
        .filter(|name| name.resource.kind == kind)
        .collect();
    let objects = names
        .iter()
        .map(|name| cluster.object(&name.resource, name.namespace.as_deref(), &name.name));
    Ok(try_join_all(objects).await?.into_iter().flatten().collect())
}

/// What an install needs and the one who asks may not.
async fn denied(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let mut asked: Vec<ObjectName> = Vec::new();
    for name in rendering::objects(false).iter().map(ObjectName::of) {
        if !asked.iter().any(|known| known.resource == name.resource) {
            asked.push(name);
        }
    }
    let mut denied = Vec::new();
    for name in &asked {
        for verb in ["create", "patch"] {
            let namespace = name.namespace.as_deref();
            if !cluster.may(verb, &name.resource, namespace).await? {
                denied.push(format!("{verb} {}", name.resource.plural));
            }
        }
    }
    Ok(denied)
}

async fn installed(cluster: &Cluster) -> anyhow::Result<Option<Installed>> {
    let namespaces = ApiResource::erase::<Namespace>(&());
    let there = cluster.object(&namespaces, None, NAMESPACE).await?;
    if there.is_none() {
        return Ok(None);
    }
    let (deployments, pods) = (
        ApiResource::erase::<Deployment>(&()),
        ApiResource::erase::<Pod>(&()),
    );
    let ours = ListParams::default().labels(CONTROL_PLANE);
    let (deployment, pods, namespaces, trusted, bundle, guards, tried) = tokio::join!(
        fact(cluster.object(&deployments, Some(NAMESPACE), "malha")),
        fact(cluster.objects_that(&pods, Some(NAMESPACE), &ours)),
        fact(living(cluster)),
        fact(trusted(cluster)),
        fact(bundle(cluster)),
        fact(guards(cluster)),
        fact(try_a_pod(cluster)),
    );
    let issued = match &bundle {
        Ok(Some(bundle)) => fact(try_a_certificate(cluster, bundle)).await,
        _ => Ok(Issuance::NobodyAsked),
    };
    Ok(Some(Installed {
        deployment,
        pods,
        namespaces,
        trusted,
        bundle,
        guards,
        tried,
        issued,
    }))
}

/// The namespaces that are not going away.
async fn living(cluster: &Cluster) -> anyhow::Result<Vec<NamespaceFacts>> {
    let resource = ApiResource::erase::<Namespace>(&());
    let all = cluster.objects(&resource, None).await?;
    all.iter()
        .filter(|namespace| namespace["status"]["phase"] != "Terminating")
        .map(namespace_facts)
        .collect()
}

/// The trust bundle of each namespace that has one.
async fn trusted(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, String>> {
    let resource = ApiResource::erase::<ConfigMap>(&());
    let named = ListParams::default().fields("metadata.name=malha-ca-root-cert");
    let all = cluster.objects_that(&resource, None, &named).await?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(all
        .iter()
        .map(|it| {
            (
                text(&it["metadata"]["namespace"]),
                text(&it["data"][trust_bundle::KEY]),
            )
        })
        .collect())
}

/// What the authority's journal trusts; `None` where there is no journal.
///
/// # Errors
/// It cannot be read.
pub(in crate::cli) async fn bundle(cluster: &Cluster) -> anyhow::Result<Option<Bundle>> {
    let home = ca::secret_home(cluster.client(), NAMESPACE);
    let stored = home.load().await.context("the authority's journal")?;
    Ok(stored.map(|stored| stored.journal.bundle()))
}

/// Everything that decides about pods besides the injector itself.
async fn guards(cluster: &Cluster) -> anyhow::Result<Vec<Value>> {
    let mut all = Vec::new();
    for kind in [
        "MutatingWebhookConfiguration",
        "ValidatingWebhookConfiguration",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    ] {
        all.extend(find(cluster, kind).await?);
    }
    Ok(all)
}
