//! One source, several forms: what kustomize renders, what is committed, what `malha install` prints and what the chart
//! gives are the same objects. No cluster is started; kubectl and helm only render.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::rig::{self, programs::Programs};

/// What an installation consists of, and how it is asked for.
struct Form {
    /// Renderings and the kustomizations behind them.
    renderings: &'static [(&'static str, &'static str)],
    /// Of `malha install`.
    flags: &'static [&'static str],
    /// Of helm.
    values: &'static [&'static str],
}

const BASE: (&str, &str) = ("manifests/install.yaml", "manifests/base");
const HA: (&str, &str) = ("manifests/install-ha.yaml", "manifests/overlays/ha");
const MONITORING: (&str, &str) = ("manifests/monitoring.yaml", "manifests/monitoring");

const FORMS: [Form; 3] = [
    Form {
        renderings: &[BASE],
        flags: &[],
        values: &[],
    },
    Form {
        renderings: &[HA],
        flags: &["--ha"],
        values: &["--set", "ha=true"],
    },
    Form {
        renderings: &[BASE, MONITORING],
        flags: &["--monitoring"],
        values: &["--set", "monitoring=true"],
    },
];

#[test]
fn every_form_gives_the_same_objects() {
    let Some(programs) = rig::programs_or_skip() else {
        return;
    };
    for Form {
        renderings,
        flags,
        values,
    } in FORMS
    {
        let committed = renderings.iter().map(|(rendering, kustomization)| {
            let committed = std::fs::read_to_string(tree(rendering)).expect(rendering);
            let rendered = kustomize(&programs, kustomization);
            let (head, rest) = committed.split_once('\n').expect("a line");
            assert!(head.starts_with("# Written by `make manifests`"), "{head}");
            assert_eq!(rest, rendered, "{rendering}: run `make manifests`");
            committed
        });
        let committed = committed.collect::<Vec<_>>().join("---\n");
        let wanted = comparable(&committed);
        assert!(wanted.len() > 20, "{flags:?}: {} objects", wanted.len());
        assert_eq!(malha(&[flags, &["-o", "yaml"]].concat()), committed);
        let list: Value =
            serde_json::from_str(&malha(&[flags, &["-o", "json"]].concat())).expect("JSON");
        let listed = list["items"]
            .as_array()
            .expect("a list")
            .iter()
            .map(Value::to_string);
        same(
            &comparable(&listed.collect::<Vec<_>>().join("\n---\n")),
            &wanted,
            "-o json",
        );
        let charted = helm(&programs, values).expect("the chart renders");
        same(&comparable(&charted), &wanted, "the chart");
        assert_eq!(
            helm(&programs, values).expect("again"),
            charted,
            "rendered twice"
        );
    }
}

#[test]
fn each_value_of_the_chart_arrives_and_others_are_refused() {
    let Some(programs) = rig::programs_or_skip() else {
        return;
    };
    let set = |values: &[&str]| {
        let flags: Vec<_> = values.iter().flat_map(|value| ["--set", *value]).collect();
        helm(&programs, &flags)
    };
    let rendered = set(&[
        "images.malha=registry.example.com/malha:1",
        "images.proxy=registry.example.com/malha-proxy:1",
        "config.malha.trust-domain=example.org",
        "config.injector.proxy.logLevel=info",
        "podSpecOverrides.nodeSelector.pool=mesh",
    ])
    .expect("values that there are");
    let objects = comparable(&rendered);
    let object = |name: &str| objects.get(name).unwrap_or_else(|| panic!("no {name}"));
    let pod = &object("Deployment malha-system/malha")["spec"]["template"]["spec"];
    assert_eq!(pod["nodeSelector"], json!({ "pool": "mesh" }));
    let job = &object("CronJob malha-system/malha-ca-rotate")["spec"]["jobTemplate"]["spec"];
    for pod in [pod, &job["template"]["spec"]] {
        assert_eq!(
            pod["containers"][0]["image"],
            "registry.example.com/malha:1"
        );
    }
    let config = &object("ConfigMap malha-system/malha-config")["data"];
    let settings = |key: &str| -> Value {
        serde_saphyr::from_str(config[key].as_str().expect("text")).expect("YAML")
    };
    assert_eq!(
        settings("malha.yaml"),
        json!({
            "trust-domain": "example.org", "revision": "default", "injector-config": "/etc/malha/injector.yaml",
        })
    );
    assert_eq!(
        settings("injector.yaml"),
        json!({
            "image": { "proxy": "registry.example.com/malha-proxy:1" }, "proxy": { "logLevel": "info" },
        })
    );
    let mut lint = Command::new(programs.path("helm"));
    let linted = output(
        lint.arg("lint")
            .arg("--strict")
            .arg(tree("manifests/chart")),
    );
    assert!(linted.is_ok(), "{linted:?}");
    for wrong in ["replicas=3", "images.envoy=x", "config.other=1", "ha=yes"] {
        let refused = set(&[wrong]).expect_err(wrong);
        assert!(
            refused.contains("additional properties") || refused.contains("want boolean"),
            "{wrong}: {refused}"
        );
    }
}

#[test]
fn helm_keeps_what_cannot_be_made_again_and_writes_no_ca_bundle() {
    let Some(programs) = rig::programs_or_skip() else {
        return;
    };
    let rendered = helm(&programs, &[]).expect("the chart renders");
    assert!(!rendered.contains("caBundle"));
    assert!(!rendered.contains("managed-by: kustomize"));
    let kept: Vec<_> = documents(&rendered)
        .into_iter()
        .filter(|object| object["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep")
        .map(|object| name(&object))
        .collect();
    assert_eq!(
        kept,
        [
            "Namespace malha-system",
            "CustomResourceDefinition peerauthentications.security.istio.io"
        ]
    );
}

/// Objects by name, without what a form says about itself.
fn comparable(text: &str) -> BTreeMap<String, Value> {
    let documents = documents(text);
    let count = documents.len();
    let objects: BTreeMap<_, _> = documents
        .into_iter()
        .map(|mut object| {
            forget_the_form(&mut object);
            forget_the_namespace(&mut object);
            (name(&object), object)
        })
        .collect();
    assert_eq!(objects.len(), count, "two objects of one name");
    objects
}

fn documents(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).expect("YAML")
}

fn name(object: &Value) -> String {
    let kind = object["kind"].as_str().expect("a kind");
    let name = object["metadata"]["name"].as_str().expect("a name");
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{kind} {namespace}/{name}"),
        None => format!("{kind} {name}"),
    }
}

/// Drops `helm.sh/*` and `app.kubernetes.io/managed-by`, wherever labels and annotations are.
fn forget_the_form(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| {
                !key.starts_with("helm.sh/") && key != "app.kubernetes.io/managed-by"
            });
            map.values_mut().for_each(forget_the_form);
            // where nothing else was in it
            map.retain(|key, value| key != "annotations" || *value != json!({}));
        }
        Value::Array(items) => items.iter_mut().for_each(forget_the_form),
        _ => {}
    }
}

/// kustomize writes a namespace into these objects of the cluster, which nobody reads.
fn forget_the_namespace(object: &mut Value) {
    let kind = object["kind"].as_str().unwrap_or_default();
    if kind.starts_with("ValidatingAdmissionPolicy")
        && let Some(metadata) = object["metadata"].as_object_mut()
    {
        metadata.shift_remove("namespace");
    }
}

fn same(found: &BTreeMap<String, Value>, wanted: &BTreeMap<String, Value>, form: &str) {
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        wanted.keys().collect::<Vec<_>>(),
        "{form}"
    );
    for (name, wanted) in wanted {
        assert_eq!(&found[name], wanted, "{form}: {name}");
    }
}

fn kustomize(programs: &Programs, directory: &str) -> String {
    let mut kubectl = Command::new(programs.path("kubectl"));
    kubectl.arg("kustomize").arg(tree(directory));
    output(&mut kubectl).expect("kustomize renders")
}

fn malha(args: &[&str]) -> String {
    let mut malha = Command::new(env!("CARGO_BIN_EXE_malha"));
    output(malha.arg("install").args(args)).expect("malha prints")
}

fn helm(programs: &Programs, args: &[&str]) -> Result<String, String> {
    let mut helm = Command::new(programs.path("helm"));
    helm.args(["template", "malha", "--namespace", "malha-system"])
        .args(args)
        .arg(tree("manifests/chart"));
    output(&mut helm)
}

/// What a program prints; what it says instead where it fails.
fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().expect("it runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    if output.status.success() {
        Ok(text(output.stdout))
    } else {
        Err(text(output.stderr))
    }
}

fn tree(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
