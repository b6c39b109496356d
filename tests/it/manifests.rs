//! What `manifests/` promises, read without a cluster. `tests/cluster/manifests.rs` applies it to one.

use std::{fs, path::Path};

use k8s_openapi::api::{
    admissionregistration::v1::{
        MutatingWebhookConfiguration, ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
        ValidatingWebhookConfiguration,
    },
    apps::v1::Deployment,
    batch::v1::{CronJob, Job},
    core::v1::{ConfigMap, Namespace, Pod, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
};
use malha::{
    config::{Layers, Settings},
    inject::{InjectSettings, select::webhook_entries},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

#[test]
fn every_manifest_holds_only_fields_that_its_type_has() {
    for (file, object) in objects("manifests/base")
        .into_iter()
        .chain(objects("manifests/samples"))
    {
        let kind = text(&object, "/kind").to_owned();
        let read = match kind.as_str() {
            "ClusterRole" => typed::<ClusterRole>(&object),
            "ClusterRoleBinding" => typed::<ClusterRoleBinding>(&object),
            "ConfigMap" => typed::<ConfigMap>(&object),
            "CronJob" => typed::<CronJob>(&object),
            "Deployment" => typed::<Deployment>(&object),
            "Job" => typed::<Job>(&object),
            "MutatingWebhookConfiguration" => typed::<MutatingWebhookConfiguration>(&object),
            "Namespace" => typed::<Namespace>(&object),
            "NetworkPolicy" => typed::<NetworkPolicy>(&object),
            "Pod" => typed::<Pod>(&object),
            "PodDisruptionBudget" => typed::<PodDisruptionBudget>(&object),
            "Role" => typed::<Role>(&object),
            "RoleBinding" => typed::<RoleBinding>(&object),
            "Service" => typed::<Service>(&object),
            "ServiceAccount" => typed::<ServiceAccount>(&object),
            "ValidatingAdmissionPolicy" => typed::<ValidatingAdmissionPolicy>(&object),
            "ValidatingAdmissionPolicyBinding" => {
                typed::<ValidatingAdmissionPolicyBinding>(&object)
            }
            "ValidatingWebhookConfiguration" => typed::<ValidatingWebhookConfiguration>(&object),
            other => panic!("{file}: kind {other} is not known to this test; add it"),
        };
        let read = read.unwrap_or_else(|error| panic!("{file}: {kind}: {error}"));
        if let Some(lost) = first_lost("", &object, &read) {
            panic!("{file}: {kind} has no field {lost}");
        }
    }
}

#[test]
fn a_misspelt_field_is_found() {
    let misspelt = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": { "containers": [{ "name": "a", "imge": "b" }] } });
    let read = typed::<Pod>(&misspelt).expect("readable");
    assert_eq!(
        first_lost("", &misspelt, &read).as_deref(),
        Some("/spec/containers/0/imge")
    );
}

#[test]
fn the_webhook_entries_and_the_policys_bindings_select_what_the_injector_selects() {
    let configuration = only("MutatingWebhookConfiguration");
    let wanted = webhook_entries("default");
    let entries = list(&configuration, "/webhooks");
    assert_eq!(entries.len(), wanted.len());
    let bindings: Vec<_> = all_of("ValidatingAdmissionPolicyBinding");
    assert_eq!(bindings.len(), wanted.len());
    for ((entry, binding), wanted) in entries.iter().zip(&bindings).zip(&wanted) {
        let generated = serde_json::to_value(wanted).expect("plain data");
        for (field, value) in generated.as_object().expect("an object") {
            assert_eq!(&entry[field], value, "{}: {field}", wanted.name);
        }
        assert_eq!(text(entry, "/clientConfig/service/path"), wanted.path);
        assert_eq!(text(entry, "/failurePolicy"), "Fail");
        assert_eq!(text(entry, "/sideEffects"), "None");
        for selector in ["namespaceSelector", "objectSelector"] {
            assert_eq!(
                binding["spec"]["matchResources"][selector], generated[selector],
                "{}: {selector}",
                wanted.name
            );
        }
        assert_eq!(binding["spec"]["policyName"], "malha-sidecar-present");
        assert_eq!(binding["spec"]["validationActions"], json!(["Deny"]));
    }
    let policy = only("ValidatingAdmissionPolicy");
    let conditions = serde_json::to_value(&wanted[0].match_conditions).expect("plain data");
    assert_eq!(policy["spec"]["matchConditions"], conditions);
    assert_eq!(
        policy["spec"]["matchConstraints"]["resourceRules"],
        entries[0]["rules"]
    );
}

#[test]
fn advice_can_neither_change_nor_delay_nor_refuse() {
    for entry in list(&only("ValidatingWebhookConfiguration"), "/webhooks") {
        assert_eq!(text(&entry, "/failurePolicy"), "Ignore");
        assert_eq!(entry["timeoutSeconds"], 1);
        assert_eq!(text(&entry, "/sideEffects"), "None");
        assert_eq!(text(&entry, "/clientConfig/service/path"), "/advise");
    }
}

#[test]
fn nothing_sets_a_ca_bundle() {
    for (file, object) in objects("manifests") {
        assert!(
            !holds_key(&object, "caBundle"),
            "{file}: the control plane owns caBundle"
        );
    }
}

#[test]
fn the_crds_are_what_make_crds_writes() {
    let written: Value = serde_saphyr::from_str(&read("manifests/crds/peerauthentications.yaml"))
        .expect("a manifest");
    let made = serde_json::to_value(malha::mesh::crd::peer_authentication()).expect("JSON");
    assert_eq!(written, made, "run `make crds`");
}

#[path = "../../manifests/monitoring/dashboards.rs"]
mod dashboards;

#[test]
fn the_dashboards_are_what_make_dashboards_writes() {
    let kustomization = read("manifests/monitoring/kustomization.yaml");
    for dashboard in &dashboards::DASHBOARDS {
        let file = format!("dashboards/{}.json", dashboard.name);
        let written = read(&format!("manifests/monitoring/{file}"));
        let made = dashboards::to_text(dashboard);
        assert_eq!(written, made, "run `make dashboards`");
        assert!(kustomization.contains(&file), "{file} is installed");
    }
}

#[test]
fn nobody_is_granted_more_than_is_called() {
    for role in ["ClusterRole", "Role"].into_iter().flat_map(all_of) {
        let name = text(&role, "/metadata/name").to_owned();
        for rule in list(&role, "/rules") {
            let words = |field: &str| -> Vec<String> {
                list(&rule, &format!("/{field}"))
                    .iter()
                    .filter_map(Value::as_str)
                    .map(str::to_owned)
                    .collect()
            };
            let (verbs, resources, names) =
                (words("verbs"), words("resources"), words("resourceNames"));
            for word in words("apiGroups")
                .iter()
                .chain(&verbs)
                .chain(&resources)
                .chain(&words("nonResourceURLs"))
            {
                assert!(!word.contains('*'), "{name}: {rule}");
            }
            for verb in [
                "escalate",
                "bind",
                "impersonate",
                "delete",
                "deletecollection",
            ] {
                assert!(
                    !verbs.iter().any(|granted| granted == verb),
                    "{name}: {verb}: {rule}"
                );
            }
            for resource in [
                "pods/exec",
                "pods/attach",
                "pods/portforward",
                "nodes/proxy",
                "serviceaccounts/token",
            ] {
                assert!(
                    !resources.iter().any(|granted| granted == resource),
                    "{name}: {resource}: {rule}"
                );
            }
            if resources.iter().any(|resource| resource == "secrets") {
                assert_eq!(
                    text(&role, "/kind"),
                    "Role",
                    "Secrets of the whole cluster: {rule}"
                );
                let reads = verbs == ["get", "watch"];
                assert!(
                    names == ["malha-ca"] || (names == ["cacerts"] && reads) || verbs == ["create"],
                    "{name}: any Secret: {rule}"
                );
            }
        }
    }
}

#[test]
fn roles_are_bound_to_accounts_that_exist_and_pods_run_as_one() {
    let accounts: Vec<_> = all_of("ServiceAccount")
        .iter()
        .map(|account| text(account, "/metadata/name").to_owned())
        .collect();
    for binding in ["ClusterRoleBinding", "RoleBinding"]
        .into_iter()
        .flat_map(all_of)
    {
        for subject in list(&binding, "/subjects") {
            assert!(
                accounts
                    .iter()
                    .any(|account| account == text(&subject, "/name")),
                "{subject}"
            );
            assert_eq!(text(&subject, "/namespace"), "malha-system");
        }
    }
    for (name, spec) in pod_specs() {
        assert!(
            accounts
                .iter()
                .any(|account| account == text(&spec, "/serviceAccountName")),
            "{name}"
        );
    }
}

/// What Pod Security `restricted` demands, and more.
#[test]
fn pods_of_the_control_plane_hold_no_privilege() {
    for (name, spec) in pod_specs() {
        assert_eq!(spec["automountServiceAccountToken"], false, "{name}");
        assert_eq!(spec["securityContext"]["runAsNonRoot"], true, "{name}");
        assert_eq!(
            spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault",
            "{name}"
        );
        for container in list(&spec, "/containers") {
            let context = &container["securityContext"];
            assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
            assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
            assert_eq!(
                context["capabilities"],
                json!({ "drop": ["ALL"] }),
                "{name}"
            );
            assert!(
                container["resources"]["requests"]["memory"].is_string(),
                "{name}"
            );
            assert!(
                container["resources"]["limits"]["memory"].is_string(),
                "{name}"
            );
        }
    }
}

#[test]
fn pods_of_the_control_plane_are_out_of_every_webhooks_reach() {
    let templates = [
        only("Deployment").pointer("/spec/template").cloned(),
        only("CronJob")
            .pointer("/spec/jobTemplate/spec/template")
            .cloned(),
    ];
    for template in templates {
        let template = template.expect("a template");
        assert_eq!(
            template["metadata"]["labels"]["malha.io/control-plane"],
            "true"
        );
    }
}

#[test]
fn images_carry_this_release_and_never_latest() {
    let version = env!("CARGO_PKG_VERSION");
    let kustomization = read("manifests/base/kustomization.yaml");
    assert!(
        kustomization.contains(&format!("newTag: {version}\n")),
        "images are not of {version}"
    );
    assert!(kustomization.contains(&format!("app.kubernetes.io/version: {version}\n")));
    let chart = read("manifests/chart/Chart.yaml");
    assert!(chart.contains(&format!("\nversion: {version}\nappVersion: {version}\n")));
    let embedded = InjectSettings::embedded();
    let injector = settings_of("injector.yaml");
    let merged = InjectSettings::merged(&injector).expect("the injector's settings of config.yaml");
    for image in [
        &merged.image.proxy,
        &merged.image.init,
        &embedded.image.proxy,
        &embedded.image.init,
    ] {
        assert!(image.ends_with(&format!(":{version}")), "{image}");
    }
    for (file, text) in files("manifests") {
        assert!(!text.contains(":latest"), "{file}");
    }
}

#[test]
fn the_settings_of_the_config_map_are_read_by_the_program() {
    let layers = Layers::default()
        .with_file(&settings_of("malha.yaml"))
        .expect("keys that exist");
    let settings = Settings::parse(&layers).expect("values that are allowed");
    assert_eq!(
        settings.revision, "default",
        "the webhook entries are of this revision"
    );
    assert_eq!(
        settings.injector_config.as_deref(),
        Some(Path::new("/etc/malha/injector.yaml"))
    );
}

#[test]
fn ports_are_those_that_the_program_listens_on() {
    let settings = Settings::parse(&Layers::default()).expect("defaults");
    let (_, spec) = pod_specs().into_iter().next().expect("the Deployment's");
    let port = |name: &str| {
        let ports = list(&spec, "/containers/0/ports");
        let found = ports
            .iter()
            .find(|port| port["name"] == name)
            .expect("a port of this name");
        found["containerPort"].as_u64()
    };
    for (name, address) in [
        ("webhook", settings.webhook_addr),
        ("ca", settings.ca_addr),
        ("admin", settings.admin_addr),
    ] {
        assert_eq!(port(name), Some(address.port().into()), "{name}");
    }
}

#[test]
fn the_cron_job_runs_a_verb_that_exists() {
    let (_, spec) = pod_specs().into_iter().nth(1).expect("the CronJob's");
    let args = list(&spec, "/containers/0/args");
    assert_eq!(args, ["ca", "rotate", "--intermediate", "--if-due"]);
}

/// The pods of the Deployment and of the CronJob.
fn pod_specs() -> Vec<(&'static str, Value)> {
    [
        ("Deployment", "/spec/template/spec"),
        ("CronJob", "/spec/jobTemplate/spec/template/spec"),
    ]
    .map(|(kind, spec)| (kind, only(kind).pointer(spec).expect("a pod").clone()))
    .to_vec()
}

fn settings_of(key: &str) -> String {
    let config = only("ConfigMap");
    config["data"][key]
        .as_str()
        .unwrap_or_else(|| panic!("config.yaml has no {key}"))
        .to_owned()
}

fn only(kind: &str) -> Value {
    let mut found = all_of(kind);
    assert_eq!(found.len(), 1, "{kind}");
    found.remove(0)
}

fn all_of(kind: &str) -> Vec<Value> {
    let all = objects("manifests/base")
        .into_iter()
        .map(|(_, object)| object);
    all.filter(|object| object["kind"] == kind).collect()
}

/// Every object below a directory with its file; kustomizations, the injector's defaults, the chart and dashboards are none.
fn objects(directory: &str) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for (file, text) in files(directory) {
        if file.ends_with("kustomization.yaml")
            || file.contains("/defaults/")
            || file.contains("/chart/")
            || file.contains("/dashboards/")
        {
            continue;
        }
        let found: Vec<Value> =
            serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(!found.is_empty(), "{file} holds nothing");
        all.extend(found.into_iter().map(|object| (file.clone(), object)));
    }
    all
}

fn files(directory: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut open = vec![root.join(directory)];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                open.push(path);
            } else if path
                .extension()
                .is_some_and(|extension| extension == "yaml")
            {
                let name = path
                    .strip_prefix(root)
                    .expect("below the root")
                    .display()
                    .to_string();
                found.push((name, fs::read_to_string(&path).expect("text")));
            }
        }
    }
    found.sort();
    found
}

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path))
        .expect("a file of the tree")
}

/// What is left of an object in its type.
fn typed<T: DeserializeOwned + Serialize>(object: &Value) -> Result<Value, serde_json::Error> {
    serde_json::to_value(serde_json::from_value::<T>(object.clone())?)
}

/// The first field of `given` that `read` does not have.
fn first_lost(at: &str, given: &Value, read: &Value) -> Option<String> {
    match (given, read) {
        (Value::Object(given), Value::Object(read)) => given.iter().find_map(|(key, value)| {
            let at = format!("{at}/{key}");
            match read.get(key) {
                Some(read) => first_lost(&at, value, read),
                // Types leave empty collections and nulls out.
                None if value.is_null() || *value == json!({}) || *value == json!([]) => None,
                None => Some(at),
            }
        }),
        (Value::Array(given), Value::Array(read)) => given
            .iter()
            .zip(read)
            .enumerate()
            .find_map(|(index, (given, read))| first_lost(&format!("{at}/{index}"), given, read)),
        _ => None,
    }
}

fn holds_key(value: &Value, key: &str) -> bool {
    match value {
        Value::Object(map) => {
            map.contains_key(key) || map.values().any(|value| holds_key(value, key))
        }
        Value::Array(items) => items.iter().any(|value| holds_key(value, key)),
        _ => false,
    }
}

fn list(value: &Value, pointer: &str) -> Vec<Value> {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default()
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}
