//! The properties do not hang on the defaults: they hold under an operator's own settings too.

use malha::inject::{InjectSettings, Injector};
use serde_json::Value;

use super::{
    CHECKS, PODS, answered,
    case::{Case, Subject},
    checked,
    checks::{Quality, quality},
    expected::INIT,
    pod, restricted, setup,
};

/// Those that the settings may not change. (Where the proxy stands and what it is given, they do.)
const ALWAYS: [&str; 14] = [
    "refusal",
    "P4",
    "P5",
    "P6",
    "P7",
    "P8",
    "expansion",
    "P9",
    "P10",
    "P11",
    "P12",
    "P13",
    "P14",
    "P18",
];

/// Some pods of the population under these settings, each with [`ALWAYS`] checked.
fn hold(name: &'static str, settings: &str) -> Vec<Case> {
    let settings = InjectSettings::merged(settings).expect("good settings");
    let subject = Subject::new(name, Injector::new(settings));
    let mut cases = Vec::new();
    for seed in (0..PODS).step_by(9) {
        let case = answered(&subject, setup(seed), pod(seed))
            .unwrap_or_else(|fault| panic!("{name}, seed {seed}: P1: {fault}"));
        for property in ALWAYS {
            let (_, check) = CHECKS
                .iter()
                .find(|(known, _)| *known == property)
                .expect("a check of that name");
            checked(*check, &subject, &case)
                .unwrap_or_else(|fault| panic!("{name}, seed {seed}: {property}: {fault}\n{case}"));
        }
        cases.push(case);
    }
    cases.retain(Case::is_patched);
    assert!(
        cases.len() > 100,
        "{name}: only {} are injected",
        cases.len()
    );
    cases
}

fn init(case: &Case) -> &Value {
    let list = case.after["spec"]["initContainers"]
        .as_array()
        .expect("ours is in it");
    list.iter()
        .find(|container| container["name"] == INIT)
        .expect("ours")
}

#[test]
fn classic_order_by_setting() {
    for case in hold(
        "classic",
        "native: false\nproxy: {holdApplication: false, uid: 2000}\n",
    ) {
        let wish =
            case.before["metadata"]["annotations"]["sidecar.istio.io/nativeSidecar"] == "true";
        let list = if wish { "initContainers" } else { "containers" };
        let list = case.after["spec"][list].as_array().expect("a list");
        let proxy = list
            .iter()
            .find(|container| container["name"] == "malha-proxy")
            .unwrap_or_else(|| panic!("{case}"));
        assert_eq!(proxy["securityContext"]["runAsUser"], 2000, "{case}");
        assert_eq!(proxy["securityContext"]["runAsGroup"], 1337, "{case}");
    }
}

#[test]
fn with_a_redirection_from_outside_the_whole_pod_is_restricted() {
    let settings = "redirect: external\nimage: {pullSecrets: [mirror, registry]}\nmergePrometheus: false\ntlsModeLabel: false\n";
    let mut were = 0;
    for case in hold("external", settings) {
        assert!(
            init(&case)["securityContext"]["capabilities"]
                .get("add")
                .is_none(),
            "{case}"
        );
        if restricted::violations(&case.before, None).is_empty() {
            were += 1;
            let violations = restricted::violations(&case.after, None);
            assert!(violations.is_empty(), "{violations:?}\n{case}");
        }
        let secrets = case.after["spec"]["imagePullSecrets"]
            .as_array()
            .expect("the operator's");
        for wanted in ["mirror", "registry"] {
            assert_eq!(
                secrets
                    .iter()
                    .filter(|secret| secret["name"] == wanted)
                    .count(),
                1,
                "{wanted}: {case}"
            );
        }
    }
    println!("{were} of them were restricted before");
}

#[test]
fn without_default_resources_a_best_effort_pod_stays_one() {
    let nothing = "{requests: {cpu: '', memory: ''}, limits: {cpu: '', memory: ''}}";
    let settings = format!("proxy: {{resources: {nothing}}}\ninit: {{resources: {nothing}}}\n");
    let mut were = 0;
    for case in hold("no resources", &settings) {
        let annotations = &case.before["metadata"]["annotations"];
        let wishes = [
            "proxyCPU",
            "proxyCPULimit",
            "proxyMemory",
            "proxyMemoryLimit",
        ];
        if wishes
            .iter()
            .any(|wish| !annotations[format!("sidecar.istio.io/{wish}")].is_null())
        {
            continue;
        }
        were += usize::from(quality(&case.before) == Quality::BestEffort);
        assert_eq!(quality(&case.after), quality(&case.before), "{case}");
    }
    assert!(were > 5, "only {were} are BestEffort");
}

#[test]
fn without_default_limits_the_pods_own_are_never_outgrown() {
    let settings = "proxy: {resources: {limits: {cpu: '', memory: ''}}}\n";
    let cases = hold("no limits", settings);
    let own = |case: &&Case| case.before["spec"]["resources"]["limits"].is_object();
    assert!(cases.iter().filter(own).count() > 2, "none has its own");
}

#[test]
fn a_mesh_with_a_bundle_of_the_cluster() {
    let settings = "trustBundle: {clusterTrustBundle: malha}\ntoken: {audience: istio-ca, expirationSeconds: 600}\nrevision: canary\n";
    for case in hold("cluster trust bundle", settings) {
        let volumes = case.after["spec"]["volumes"].to_string();
        assert!(
            volumes.contains("clusterTrustBundle") && volumes.contains("istio-ca"),
            "{case}"
        );
    }
}
