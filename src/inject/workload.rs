//! Where pod templates stand in the documents that people write.
//!
//! Pod, the workloads of `apps` and `batch`, ReplicationController, and lists of them; every other kind passes unchanged.

use serde_json::Value;

use super::{
    Answer, Injector, NamespaceFacts, Owner, PodError, Verdict,
    uninject::{UninjectError, uninject as uninject_pod},
};

/// Lists in lists end here; nobody writes more than one.
const DEEPEST_LIST: usize = 8;

/// A pod template in a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// JSON Pointer (RFC 6901) to it; empty for a pod, which is its own.
    pub pointer: String,
    /// `apiVersion` of the object that holds it.
    pub api_version: String,
    /// Its kind.
    pub kind: String,
    /// Its name, or the beginning of it.
    pub name: String,
    /// Its namespace, where it says one.
    pub namespace: Option<String>,
}

impl Template {
    /// What pods of this template belong to; a pod itself says that in its own fields.
    pub fn owner(&self) -> Option<Owner> {
        (self.kind != "Pod").then(|| Owner::new(&self.api_version, &self.kind, &self.name, None))
    }

    /// The template in its document.
    pub fn pod<'d>(&self, document: &'d Value) -> Option<&'d Value> {
        document.pointer(&self.pointer)
    }
}

/// Every pod template in a document, in order.
pub fn templates(document: &Value) -> Vec<Template> {
    let mut found = Vec::new();
    collect(document, String::new(), None, 0, &mut found);
    found
}

fn collect(
    object: &Value,
    pointer: String,
    listed: Option<(&str, &str)>,
    depth: usize,
    found: &mut Vec<Template>,
) {
    let text = |key: &str| object.get(key).and_then(Value::as_str);
    let (Some(api_version), Some(kind)) = (
        text("apiVersion").or_else(|| Some(listed?.0)),
        text("kind").or_else(|| Some(listed?.1)),
    ) else {
        return;
    };
    if let Some(of) = kind
        .strip_suffix("List")
        .filter(|of| of.is_empty() || template_of(api_version, of).is_some())
    {
        let items = object
            .get("items")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .enumerate();
        for (at, item) in items.filter(|_| depth < DEEPEST_LIST) {
            // Items of a `PodList` do not say their kind.
            let listed = (!of.is_empty()).then_some((api_version, of));
            collect(
                item,
                format!("{pointer}/items/{at}"),
                listed,
                depth + 1,
                found,
            );
        }
        return;
    }
    let Some(template) = template_of(api_version, kind) else {
        return;
    };
    if object.pointer(template).is_some_and(Value::is_object) {
        let metadata = |key: &str| {
            object
                .get("metadata")?
                .get(key)?
                .as_str()
                .filter(|text| !text.is_empty())
        };
        let generated = || metadata("generateName").map(|name| name.trim_end_matches('-'));
        found.push(Template {
            pointer: pointer + template,
            api_version: api_version.to_owned(),
            kind: kind.to_owned(),
            name: metadata("name")
                .or_else(generated)
                .unwrap_or_default()
                .to_owned(),
            namespace: metadata("namespace").map(str::to_owned),
        });
    }
}

/// Where an object of this kind has its template. The version of the group does not matter: it stands in one place in
/// all of them.
fn template_of(api_version: &str, kind: &str) -> Option<&'static str> {
    let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
    match (group, kind) {
        ("", "Pod") => Some(""),
        ("", "ReplicationController")
        | ("apps", "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet")
        | ("batch", "Job") => Some("/spec/template"),
        ("batch", "CronJob") => Some("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

/// What is known besides the documents.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Namespaces with their labels; in one that is not here every pod is taken to be selected.
    pub namespaces: Vec<NamespaceFacts>,
    /// The namespace of objects that say none.
    pub default_namespace: String,
    /// Minor version of the oldest kubelet.
    pub oldest_kubelet: Option<u32>,
}

impl Surroundings {
    /// The namespace in which the template's pods would be.
    pub fn namespace_of(&self, template: &Template) -> NamespaceFacts {
        let name = template
            .namespace
            .as_deref()
            .unwrap_or(&self.default_namespace);
        let known = self
            .namespaces
            .iter()
            .find(|namespace| namespace.name == name);
        known
            .cloned()
            .unwrap_or_else(|| NamespaceFacts::enabled(name))
    }
}

/// What happened to one template.
#[derive(Debug)]
pub struct Outcome {
    /// Which.
    pub template: Template,
    /// The namespace it was judged in.
    pub namespace: String,
    /// The answer, as the webhook would give it.
    pub answer: Answer,
}

/// Injects every template in a document, in place, as the webhook would inject its pods.
///
/// # Errors
/// When a template is not readable as a pod; the document is then unchanged from there on.
pub fn inject(
    injector: &Injector,
    document: &mut Value,
    surroundings: &Surroundings,
) -> Result<Vec<Outcome>, PodError> {
    let mut outcomes = Vec::new();
    for template in templates(document) {
        let namespace = surroundings.namespace_of(&template);
        let Some(pod) = document.pointer_mut(&template.pointer) else {
            continue;
        };
        let answer = injector.rehearse(
            pod.to_string().as_bytes(),
            &namespace,
            surroundings.oldest_kubelet,
            template.owner().as_ref(),
        )?;
        if let Verdict::Patch(patch) = &answer.verdict {
            let operations: json_patch::Patch = serde_json::from_slice(&patch.json)
                .expect("a patch of ours is one; every test applies it");
            json_patch::patch(pod, &operations)
                .expect("a patch of ours applies; every test applies it");
        }
        outcomes.push(Outcome {
            template,
            namespace: namespace.name,
            answer,
        });
    }
    Ok(outcomes)
}

/// Takes the injection of every template in a document back, in place; how many were.
///
/// # Errors
/// When a sidecar's own records are unreadable; its template is untouched.
pub fn uninject(document: &mut Value) -> Result<usize, UninjectError> {
    let mut restored = 0;
    for template in templates(document) {
        if let Some(pod) = document.pointer_mut(&template.pointer) {
            restored += usize::from(uninject_pod(pod)?);
        }
    }
    Ok(restored)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pointers(document: &Value) -> Vec<String> {
        templates(document)
            .into_iter()
            .map(|template| template.pointer)
            .collect()
    }

    #[test]
    fn each_kind_has_its_template_in_its_place() {
        let template = json!({"spec": {"containers": [{"name": "app"}]}});
        let workload = |api: &str, kind: &str| json!({"apiVersion": api, "kind": kind, "spec": {"template": template}});
        for (api, kind) in [
            ("v1", "ReplicationController"),
            ("apps/v1", "Deployment"),
            ("apps/v1", "StatefulSet"),
            ("apps/v1", "DaemonSet"),
            ("apps/v1", "ReplicaSet"),
            ("batch/v1", "Job"),
        ] {
            assert_eq!(pointers(&workload(api, kind)), ["/spec/template"], "{kind}");
        }
        assert_eq!(
            pointers(&json!({"apiVersion": "v1", "kind": "Pod", "spec": {}})),
            [""]
        );
        let cron = json!({"apiVersion": "batch/v1", "kind": "CronJob", "spec": {"jobTemplate": {"spec": {"template": template}}}});
        assert_eq!(pointers(&cron), ["/spec/jobTemplate/spec/template"]);
        for (api, kind) in [
            ("v1", "Service"),
            ("serving.knative.dev/v1", "Deployment"),
            ("v1", "Deployment"),
        ] {
            assert!(templates(&workload(api, kind)).is_empty(), "{api} {kind}");
        }
    }

    #[test]
    fn lists_are_walked_and_their_items_may_leave_their_kind_out() {
        let pod = json!({"metadata": {"name": "a"}, "spec": {}});
        let list = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Service", "spec": {}},
            {"apiVersion": "v1", "kind": "PodList", "items": [pod]},
            {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "b"}, "spec": {"template": {}}},
            pod,
        ]});
        assert_eq!(
            pointers(&list),
            ["/items/1/items/0", "/items/2/spec/template"]
        );
    }

    #[test]
    fn a_job_of_a_cron_job_belongs_to_it() {
        let owner = |kind: &str, name: &str, hash| Owner::new("batch/v1", kind, name, hash).path();
        assert_eq!(
            owner("Job", "backup-29387520", None),
            "batch/v1/CronJob/backup"
        );
        assert_eq!(owner("Job", "backup-v2", None), "batch/v1/Job/backup-v2");
        assert_eq!(
            owner("ReplicaSet", "web-5d4f8", Some("5d4f8")),
            "batch/v1/Deployment/web"
        );
        assert_eq!(
            owner("ReplicaSet", "web-5d4f8", None),
            "batch/v1/ReplicaSet/web-5d4f8"
        );
        assert_eq!(
            owner("ReplicaSet", "5d4f8", Some("5d4f8")),
            "batch/v1/ReplicaSet/5d4f8"
        );
    }
}
