//! Golden pods: `tests/golden/inject/<case>/{pod,settings,want}.yaml`. `settings` may be absent; `want` is the pod after
//! the patch, or the verdict of one that is not patched. `SNAPSHOTS=overwrite` rewrites `want`; read the difference.

use std::{
    fs,
    path::{Path, PathBuf},
};

use malha::inject::{Call, Entry, InjectSettings, Injector, Verdict};
use serde_json::{Value, json};

#[test]
fn each_golden_pod_comes_out_as_it_is_written() {
    let cases = cases();
    assert!(cases.len() >= 8, "the golden pods are gone");
    let failed: Vec<String> = cases.iter().filter_map(|case| check(case).err()).collect();
    assert!(
        failed.is_empty(),
        "{}\nSNAPSHOTS=overwrite rewrites them",
        failed.join("\n")
    );
}

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/inject");
    let entries = fs::read_dir(folder).expect("the folder of golden pods");
    let mut cases: Vec<_> = entries.map(|entry| entry.expect("a case").path()).collect();
    cases.sort();
    cases
}

fn check(case: &Path) -> Result<(), String> {
    let pod = read(&case.join("pod.yaml"));
    let settings = fs::read_to_string(case.join("settings.yaml")).unwrap_or_default();
    let settings = InjectSettings::merged(&settings).expect("good settings");
    let got = outcome(&Injector::new(settings), pod);
    let file = case.join("want.yaml");
    if std::env::var("SNAPSHOTS").is_ok_and(|value| value == "overwrite") {
        let text = serde_saphyr::to_string(&got).expect("it is YAML");
        fs::write(&file, text).expect("a writable tree");
    }
    match file.exists() && read(&file) == got {
        true => Ok(()),
        false => Err(format!("{}: got {got:#}", file.display())),
    }
}

fn outcome(injector: &Injector, mut pod: Value) -> Value {
    let call = Call {
        entry: Entry::Namespace,
        namespace: "shop",
        oldest_kubelet: None,
    };
    let answer = injector
        .inject(pod.to_string().as_bytes(), &call)
        .expect("a readable pod");
    match answer.verdict {
        Verdict::Patch(patch) => {
            let operations: json_patch::Patch =
                serde_json::from_slice(&patch.json).expect("a patch");
            json_patch::patch(&mut pod, &operations).expect("it applies");
            pod
        }
        Verdict::Skip(reason) => json!({"skipped": reason.as_str()}),
        Verdict::Deny(denial) => {
            json!({"refused": denial.reason.as_str(), "message": denial.message})
        }
    }
}

fn read(file: &Path) -> Value {
    let text =
        fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}
