//! The programs of the pod link what they need and nothing of the control plane's: each is in every pod.

use std::{collections::BTreeSet, process::Command};

/// The crates that a program links, by name.
fn crates(features: &[&str]) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "--quiet", "--edges=normal"])
        .args(["--prefix=none", "--format={p}", "--no-default-features"])
        .args(features)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let lines = String::from_utf8(output.stdout).expect("names");
    let names = lines
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    names.map(str::to_owned).collect()
}

#[test]
fn malha_init_links_a_handful() {
    let crates = crates(&[]);
    let unwanted = [
        "tokio",
        "kube",
        "rustls",
        "aws-lc-rs",
        "clap",
        "hyper",
        "tracing",
    ];
    assert!(
        unwanted.iter().all(|name| !crates.contains(*name)),
        "{crates:?}"
    );
    assert!(crates.contains("nix") && crates.len() <= 30, "{crates:?}");
}

#[test]
fn malha_agent_links_nothing_of_the_control_plane() {
    let crates = crates(&["--features=agent"]);
    let unwanted = [
        "kube",
        "kube-client",
        "k8s-openapi",
        "json-patch",
        "clap",
        "serde-saphyr",
    ];
    let found: Vec<_> = unwanted
        .iter()
        .filter(|name| crates.contains(**name))
        .collect();
    assert!(found.is_empty(), "{found:?}");
    assert!(crates.contains("tokio"), "{crates:?}");
}
