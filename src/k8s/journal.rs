//! The journal's home in the cluster: one Secret, changed only by compare-and-swap on its `resourceVersion`.
//!
//! [`Journal`] <-> `data["journal.json"]` of Secret `malha-ca`, type `malha.io/ca-journal`;
//! Secret `cacerts` -> [`Files`], an operator's own issuer, which is only read
//!
//! The API server keeps replicas apart: of two that create the Secret, or replace the same version of it, one is told 409.

use std::{collections::BTreeMap, future::Future};

use k8s_openapi::{
    ByteString,
    api::{
        admissionregistration::v1::MutatingWebhookConfiguration,
        core::v1::{ConfigMap, Secret},
    },
};
use kube::{
    Api, Client, ResourceExt,
    api::{ObjectMeta, PartialObjectMeta, PostParams},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use zeroize::{Zeroize, Zeroizing};

use super::{ApiError, ask, follow::Follow};
use crate::ca::{
    bundle::Bundle,
    journal::{HomeError, Journal, JournalHome, Stored},
    plugged::{CA_CERT, CA_KEY, CERT_CHAIN, Files, ROOT_CERT},
};

/// The key of the Secret's `data` that holds the journal.
pub const JOURNAL_KEY: &str = "journal.json";

/// The Secret's type: nothing else in a cluster reads or writes secrets of this type.
pub const JOURNAL_TYPE: &str = "malha.io/ca-journal";

/// The Secret with an operator's own issuer, where Istio's users have it.
pub const PLUGGED: &str = "cacerts";

/// On what an authority writes into other namespaces: the namespace of its journal.
pub const AUTHORITY: &str = "malha.io/authority";

/// Where else an earlier life of this authority would have left a trace.
#[derive(Clone, Debug)]
pub struct Traces {
    /// The ConfigMap with the trust bundle, in the journal's namespace. One that another authority wrote there
    /// ([`AUTHORITY`]) is no trace of this one.
    pub config_map: String,
    /// The MutatingWebhookConfiguration whose `caBundle` the authority fills.
    pub webhook: String,
}

/// The Secret that holds the journal.
#[derive(Clone, Debug)]
pub struct SecretHome {
    secrets: Api<Secret>,
    /// The same without its content: who only listens for a change needs no keys in memory.
    metadata: Api<PartialObjectMeta<Secret>>,
    config_maps: Api<ConfigMap>,
    webhooks: Api<MutatingWebhookConfiguration>,
    namespace: String,
    name: String,
    title: String,
    traces: Traces,
}

impl SecretHome {
    /// The Secret `name` in `namespace`; nothing is read yet.
    pub fn new(client: Client, namespace: &str, name: &str, traces: Traces) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), namespace),
            metadata: Api::namespaced(client.clone(), namespace),
            config_maps: Api::namespaced(client.clone(), namespace),
            webhooks: Api::all(client),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            title: format!("Secret {namespace}/{name}"),
            traces,
        }
    }

    /// The `resourceVersion` of the Secret as it is heard of, `None` while there is none; and the future that listens,
    /// until `stop`. Whoever holds a journal reads it again when this changes.
    pub fn changes(
        &self,
        stop: CancellationToken,
    ) -> (
        watch::Receiver<Option<String>>,
        impl Future<Output = ()> + Send + use<>,
    ) {
        self.versions(&self.name, stop)
    }

    /// The same of the Secret [`PLUGGED`].
    pub fn plugged_changes(
        &self,
        stop: CancellationToken,
    ) -> (
        watch::Receiver<Option<String>>,
        impl Future<Output = ()> + Send + use<>,
    ) {
        self.versions(PLUGGED, stop)
    }

    fn versions(
        &self,
        name: &str,
        stop: CancellationToken,
    ) -> (
        watch::Receiver<Option<String>>,
        impl Future<Output = ()> + Send + use<>,
    ) {
        let (tell, told) = watch::channel(None);
        let follow = Follow::new(self.metadata.clone(), name);
        (told, async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = listen(follow, tell) => {}
            }
        })
    }

    fn unreachable(&self, source: ApiError) -> HomeError {
        HomeError::Unreachable {
            home: self.title.clone(),
            source: source.into(),
        }
    }

    fn conflict(&self) -> HomeError {
        HomeError::Conflict {
            home: self.title.clone(),
        }
    }

    fn unreadable(&self, fault: String) -> HomeError {
        HomeError::Unreadable {
            home: self.title.clone(),
            fault,
        }
    }

    fn parse(&self, mut secret: Secret) -> Result<Stored, HomeError> {
        let text = secret
            .data
            .as_mut()
            .and_then(|data| data.remove(JOURNAL_KEY));
        let Some(ByteString(text)) = text else {
            return Err(self.unreadable(format!("it has no key {JOURNAL_KEY}")));
        };
        let text = Zeroizing::new(text);
        let journal = Journal::from_json(&text).map_err(|e| self.unreadable(e.to_string()))?;
        let Some(version) = secret.metadata.resource_version else {
            return Err(self.unreadable("it has no resourceVersion".to_owned()));
        };
        Ok(Stored { journal, version })
    }

    /// What is written, read back from the API server's answer and compared: a journal that came back other than it was
    /// sent (a mutating webhook, a bug) is not used.
    fn read_back(&self, answer: Secret, sent: &Journal) -> Result<Stored, HomeError> {
        let stored = self.parse(answer)?;
        if stored.journal != *sent {
            return Err(self.unreadable("it came back other than it was written".to_owned()));
        }
        Ok(stored)
    }

    fn fresh(&self, journal: &Journal) -> Secret {
        let labels = [
            ("app.kubernetes.io/name", "malha"),
            ("app.kubernetes.io/part-of", "malha"),
            ("app.kubernetes.io/component", "ca-journal"),
        ];
        Secret {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                labels: Some(owned(labels)),
                ..ObjectMeta::default()
            },
            type_: Some(JOURNAL_TYPE.to_owned()),
            data: Some(BTreeMap::from([(
                JOURNAL_KEY.to_owned(),
                ByteString(journal.to_json().to_vec()),
            )])),
            ..Secret::default()
        }
    }
}

impl JournalHome for SecretHome {
    async fn load(&self) -> Result<Option<Stored>, HomeError> {
        let secret = ask(self.secrets.get_opt(&self.name)).await;
        let secret = secret.map_err(|error| self.unreachable(error))?;
        secret.map(|secret| self.parse(secret)).transpose()
    }

    async fn create(&self, journal: &Journal) -> Result<Stored, HomeError> {
        let mut fresh = self.fresh(journal);
        let created = ask(self.secrets.create(&PostParams::default(), &fresh)).await;
        wipe(&mut fresh);
        match created {
            Ok(secret) => self.read_back(secret, journal),
            Err(error) if error.code() == Some(409) => Err(self.conflict()),
            Err(error) => Err(self.unreachable(error)),
        }
    }

    /// Everything else in the Secret (labels, annotations, other keys) stays as it is, so it is read once more; the write
    /// is against the version that was seen, whatever was read.
    async fn replace(&self, seen: &str, journal: &Journal) -> Result<Stored, HomeError> {
        let current = ask(self.secrets.get_opt(&self.name)).await;
        let Some(mut secret) = current.map_err(|error| self.unreachable(error))? else {
            return Err(self.conflict());
        };
        if secret.metadata.resource_version.as_deref() != Some(seen) {
            return Err(self.conflict());
        }
        wipe(&mut secret);
        let text = ByteString(journal.to_json().to_vec());
        let data = secret.data.get_or_insert_default();
        data.insert(JOURNAL_KEY.to_owned(), text);
        let params = PostParams::default();
        let replaced = ask(self.secrets.replace(&self.name, &params, &secret)).await;
        wipe(&mut secret);
        match replaced {
            Ok(secret) => self.read_back(secret, journal),
            Err(error) if matches!(error.code(), Some(404 | 409)) => Err(self.conflict()),
            Err(error) => Err(self.unreachable(error)),
        }
    }

    async fn has_earlier_life(&self) -> Result<bool, HomeError> {
        let unreachable = |error| self.unreachable(error);
        let published = ask(self.config_maps.get_metadata_opt(&self.traces.config_map)).await;
        if let Some(published) = published.map_err(unreachable)? {
            let writer = published.annotations().get(AUTHORITY);
            if writer.is_none_or(|writer| *writer == self.namespace) {
                return Ok(true);
            }
        }
        let webhook = ask(self.webhooks.get_opt(&self.traces.webhook)).await;
        let webhooks = webhook.map_err(unreachable)?.and_then(|it| it.webhooks);
        // a blank, or a placeholder that some installers write, is no trace: a certificate is
        Ok(webhooks.unwrap_or_default().iter().any(|entry| {
            let bundle = entry.client_config.ca_bundle.as_ref();
            bundle.is_some_and(|ByteString(pem)| Bundle::parse_pem(pem).is_ok())
        }))
    }

    async fn plugged(&self) -> Result<Option<Files>, HomeError> {
        let found = ask(self.secrets.get_opt(PLUGGED)).await;
        let found = found.map_err(|source| HomeError::Unreachable {
            home: format!("Secret {}/{PLUGGED}", self.namespace),
            source: source.into(),
        })?;
        Ok(found.map(|secret| {
            let mut data = secret.data.unwrap_or_default();
            let mut take = |name| data.remove(name).map(|ByteString(text)| text);
            Files {
                ca_cert: take(CA_CERT),
                ca_key: take(CA_KEY).map(Zeroizing::new),
                cert_chain: take(CERT_CHAIN),
                root_cert: take(ROOT_CERT),
            }
        }))
    }
}

/// Overwrites the keys in our copy. What the HTTP client makes of it on the way is out of our hands.
fn wipe(secret: &mut Secret) {
    let journal = secret
        .data
        .as_mut()
        .and_then(|data| data.get_mut(JOURNAL_KEY));
    if let Some(ByteString(text)) = journal {
        text.zeroize();
    }
}

async fn listen(
    mut follow: Follow<PartialObjectMeta<Secret>>,
    tell: watch::Sender<Option<String>>,
) {
    loop {
        let secret = follow.next().await;
        let version = secret.and_then(|secret| secret.metadata.resource_version);
        tell.send_if_modified(|told| {
            let changed = *told != version;
            *told = version;
            changed
        });
    }
}

fn owned<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}
