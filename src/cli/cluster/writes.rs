//! What the verbs write, each with the operator's own rights.

use std::{future::Future, time::Duration};

use anyhow::{Context as _, anyhow};
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{Pod, ServiceAccount},
};
use kube::Api;
use kube::api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::{Answered as _, Cluster, ask, to_value};
use crate::{
    cli::{Exit, Failure, rendering::ObjectName},
    k8s::ApiError,
};

/// The name under which the API server records what `malha install` wrote.
const FIELD_MANAGER: &str = "malha-install";

impl Cluster {
    /// Server-side apply of a whole object.
    ///
    /// # Errors
    /// [`Exit::Refused`] with the API server's words, which name every field that somebody else manages and who;
    /// [`Exit::Unreachable`] where it did not answer.
    pub(in crate::cli) async fn apply(
        &self,
        name: &ObjectName,
        object: &Value,
        force: bool,
    ) -> Result<(), Failure> {
        let mut params = PatchParams::apply(FIELD_MANAGER);
        params.force = force;
        let api = self.dynamic(&name.resource, name.namespace.as_deref());
        let patch = Patch::Apply(object);
        let answer = ask(api.patch(&name.name, &params, &patch)).await;
        let disputed = matches!(&answer, Err(ApiError::Refused(kube::Error::Api(status))) if status.code == 409);
        written(answer, || match disputed {
            true => format!("{name} was not applied (--force takes over what others manage)"),
            false => format!("{name} was not applied"),
        })
        .map(drop)
    }

    /// JSON merge patch (RFC 7386).
    ///
    /// # Errors
    /// As [`Cluster::apply`].
    pub(in crate::cli) async fn merge(
        &self,
        name: &ObjectName,
        patch: &Value,
    ) -> Result<(), Failure> {
        let api = self.dynamic(&name.resource, name.namespace.as_deref());
        let patch = Patch::Merge(patch);
        let answer = ask(api.patch(&name.name, &PatchParams::default(), &patch)).await;
        written(answer, || format!("{name} was not changed")).map(drop)
    }

    /// Deletes an object; one that is not there is as good as deleted.
    ///
    /// # Errors
    /// As [`Cluster::apply`].
    pub(in crate::cli) async fn delete(&self, name: &ObjectName) -> Result<(), Failure> {
        let api = self.dynamic(&name.resource, name.namespace.as_deref());
        match ask(api.delete(&name.name, &DeleteParams::default())).await {
            Err(ApiError::Refused(kube::Error::Api(status))) if status.code == 404 => Ok(()),
            answer => written(answer, || format!("{name} was not deleted")).map(drop),
        }
    }

    /// What the API server would store of a new object, every webhook and policy included; nothing is stored.
    ///
    /// # Errors
    /// The API server's refusal, or that it did not answer.
    pub(in crate::cli) async fn dry_run(
        &self,
        resource: &ApiResource,
        namespace: &str,
        object: &Value,
    ) -> Result<Value, ApiError> {
        let params = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        let object: DynamicObject = serde_json::from_value(object.clone())
            .map_err(kube::Error::SerdeError)
            .map_err(ApiError::Refused)?;
        let api = self.dynamic(resource, Some(namespace));
        // A webhook may take up to 30 s until the API server gives up on it.
        let answer = timeout(DRY_RUN_PATIENCE, api.create(&params, &object)).await;
        let stored = answer
            .map_err(|_| ApiError::Silent(DRY_RUN_PATIENCE))?
            .map_err(ApiError::Refused)?;
        Ok(to_value(stored, resource).unwrap_or_else(|_| json!({})))
    }

    /// A token of a pod's service account, bound to the pod, for ten minutes: the shortest that there is.
    ///
    /// # Errors
    /// The API server refuses, or does not answer.
    pub(in crate::cli) async fn token_of(
        &self,
        pod: &Pod,
        audience: &str,
    ) -> anyhow::Result<String> {
        let spec = pod.spec.as_ref();
        let account = spec.and_then(|spec| spec.service_account_name.as_deref());
        let account = account.unwrap_or("default");
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: vec![audience.to_owned()],
                expiration_seconds: Some(600),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: pod.metadata.name.clone(),
                    uid: pod.metadata.uid.clone(),
                }),
            },
            ..TokenRequest::default()
        };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let how = PostParams::default();
        let answer = ask(accounts.create_token_request(account, &how, &request)).await;
        let answer = answer.with_context(|| {
            format!("cannot have a token made for service account {namespace}/{account}")
        })?;
        let status = answer.status.context("a token request without an answer")?;
        Ok(status.token)
    }

    /// Asks again until `look` finds nothing left to wait for; its last word otherwise.
    ///
    /// # Errors
    /// [`Exit::Refused`] when `patience` is over.
    pub(in crate::cli) async fn until<F>(
        &self,
        what: &str,
        patience: Duration,
        mut look: impl FnMut() -> F,
    ) -> Result<(), Failure>
    where
        F: Future<Output = anyhow::Result<Option<String>>>,
    {
        let deadline = Instant::now() + patience;
        loop {
            let left = match look().await {
                Ok(None) => return Ok(()),
                Ok(Some(left)) => left,
                // One answer that is missing is no reason to give up before the time is over.
                Err(why) => format!("{why:#}"),
            };
            if Instant::now() > deadline {
                return Err(Exit::Refused.because(anyhow!(
                    "{what}: not within {} s: {left}",
                    patience.as_secs()
                )));
            }
            sleep(Duration::from_millis(500)).await;
        }
    }
}

/// Longer than the longest timeout of a webhook.
const DRY_RUN_PATIENCE: Duration = Duration::from_secs(35);

fn written<T>(answer: Result<T, ApiError>, what: impl FnOnce() -> String) -> Result<T, Failure> {
    answer.with_context(what).answered()
}
