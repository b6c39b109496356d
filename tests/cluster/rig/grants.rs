//! What the control plane may do, and what it did: RBAC's rules against the API server's audit log.

use std::collections::BTreeSet;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::rbac::v1::{
    ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject,
};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use serde_json::Value;

use super::Cluster;

/// The rules that bind the ServiceAccounts of one namespace, and the audit log to hold against them.
pub(crate) struct Grants {
    rules: Vec<Rule>,
    namespace: String,
    log: PathBuf,
    /// How much of the log was compared already: each call is looked at once, by whichever test ends next.
    read: Mutex<u64>,
}

/// One rule and where it holds (`None`: everywhere).
#[derive(Debug)]
pub(crate) struct Rule {
    /// The namespace, for a rule of a RoleBinding.
    pub(crate) namespace: Option<String>,
    /// Verbs, groups, resources, names.
    pub(crate) rule: PolicyRule,
}

/// One call of a ServiceAccount, in RBAC's words.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Call {
    user: String,
    verb: String,
    group: String,
    /// With the subresource behind a slash; a path of the API server where there is no resource.
    resource: String,
    namespace: String,
    name: String,
}

impl Grants {
    /// Reads what is granted to the ServiceAccounts of `namespace`, by whatever binding.
    pub(crate) async fn of(cluster: &Cluster, namespace: &str) -> kube::Result<Self> {
        let client = cluster.client().await;
        let all = ListParams::default();
        let mut rules = Vec::new();
        for binding in Api::<ClusterRoleBinding>::all(client.clone())
            .list(&all)
            .await?
        {
            if binds(binding.subjects.as_deref(), namespace) {
                rules.extend(rules_of(&client, &binding.role_ref, None).await?);
            }
        }
        for binding in Api::<RoleBinding>::all(client.clone()).list(&all).await? {
            if binds(binding.subjects.as_deref(), namespace) {
                rules.extend(rules_of(&client, &binding.role_ref, binding.namespace()).await?);
            }
        }
        Ok(Self {
            rules,
            namespace: namespace.to_owned(),
            log: cluster.audit_log(),
            read: Mutex::new(0),
        })
    }

    /// Everything that is granted.
    pub(crate) fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The calls since the last look that no rule covers; empty is good. What the API server answered is not asked: in
    /// its first moments it refuses what is granted, too, because it has not read its own rules yet.
    pub(crate) fn surplus_calls(&self) -> Vec<String> {
        let calls: BTreeSet<_> = self
            .new_events()
            .iter()
            .filter_map(|event| self.call(event))
            .collect();
        calls
            .iter()
            .filter(|call| !self.rules.iter().any(|rule| rule.allows(call)))
            .map(|call| format!("{call:?}"))
            .collect()
    }

    fn new_events(&self) -> Vec<Value> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        let mut log = std::fs::File::open(&self.log).expect("the API server writes an audit log");
        log.seek(SeekFrom::Start(*read))
            .expect("the audit log only grows");
        log.read_to_string(&mut text)
            .expect("the audit log is text");
        // The last line may be half written.
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        *read += whole.len() as u64;
        whole
            .lines()
            .map(|line| serde_json::from_str(line).expect("a line of the audit log"))
            .collect()
    }

    /// The call of an event, if one of our accounts made it.
    fn call(&self, event: &Value) -> Option<Call> {
        let user = event["user"]["username"].as_str()?;
        let account = user
            .strip_prefix("system:serviceaccount:")?
            .strip_prefix(&self.namespace)?;
        if !matches!(account, ":malha" | ":malha-ca-rotate") {
            return None;
        }
        let object = &event["objectRef"];
        let text = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
        let resource = match (object.is_object(), object["subresource"].as_str()) {
            (false, _) => {
                let uri = event["requestURI"].as_str()?;
                uri.split_once('?').map_or(uri, |(path, _)| path).to_owned()
            }
            (true, None) => text("resource"),
            (true, Some(subresource)) => format!("{}/{subresource}", text("resource")),
        };
        Some(Call {
            user: user.to_owned(),
            verb: event["verb"].as_str()?.to_owned(),
            group: text("apiGroup"),
            resource,
            namespace: text("namespace"),
            name: text("name"),
        })
    }
}

impl Rule {
    fn allows(&self, call: &Call) -> bool {
        let has = |list: &Option<Vec<String>>, wanted: &String| {
            list.as_ref().is_some_and(|list| list.contains(wanted))
        };
        let names = self
            .rule
            .resource_names
            .as_ref()
            .filter(|names| !names.is_empty());
        let resource = has(&self.rule.api_groups, &call.group)
            && has(&self.rule.resources, &call.resource)
            && names.is_none_or(|names| names.contains(&call.name));
        self.namespace
            .as_ref()
            .is_none_or(|namespace| *namespace == call.namespace)
            && self.rule.verbs.contains(&call.verb)
            && (resource || has(&self.rule.non_resource_urls, &call.resource))
    }
}

fn binds(subjects: Option<&[Subject]>, namespace: &str) -> bool {
    subjects.unwrap_or_default().iter().any(|subject| {
        subject.kind == "ServiceAccount" && subject.namespace.as_deref() == Some(namespace)
    })
}

async fn rules_of(
    client: &Client,
    role: &RoleRef,
    namespace: Option<String>,
) -> kube::Result<Vec<Rule>> {
    let rules = match (role.kind.as_str(), &namespace) {
        ("Role", Some(namespace)) => {
            Api::<Role>::namespaced(client.clone(), namespace)
                .get(&role.name)
                .await?
                .rules
        }
        _ => {
            Api::<ClusterRole>::all(client.clone())
                .get(&role.name)
                .await?
                .rules
        }
    };
    let rules = rules.unwrap_or_default().into_iter();
    Ok(rules
        .map(|rule| Rule {
            namespace: namespace.clone(),
            rule,
        })
        .collect())
}
