//! The script that builds the cluster's programs, with a Go that only pretends.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A cache of its own, and a directory with a `go` that counts its runs and writes what is asked for.
struct Pretence(tempfile::TempDir);

impl Pretence {
    /// `go` writes the beginning of the program, does `then`, and writes the end.
    fn with_go_that(then: &str) -> Self {
        let pretence = Self(tempfile::tempdir().expect("a directory"));
        let script = format!(
            "#!/bin/sh\nwhile [ \"$1\" != -o ]; do shift; done\necho x >>{}/runs\n\
             printf '#!/bin/sh\\n' >\"$2\"; chmod +x \"$2\"; {then}; echo : >>\"$2\"\n",
            pretence.path().display()
        );
        let go = pretence.path().join("bin/go");
        std::fs::create_dir(go.parent().expect("bin")).expect("bin");
        std::fs::write(&go, script).expect("go");
        std::fs::set_permissions(&go, PermissionsExt::from_mode(0o755)).expect("go may be run");
        pretence
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn build(&self, args: &[&str]) -> Command {
        let path = std::env::var("PATH").unwrap_or_default();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/programs/build");
        let mut command = Command::new(script);
        command
            .args(args)
            .env("PATH", format!("{}/bin:{path}", self.path().display()))
            .env("XDG_CACHE_HOME", self.path())
            .env_remove("KUBEBUILDER_ASSETS");
        command
    }

    fn runs_of_go(&self) -> usize {
        let runs = std::fs::read_to_string(self.path().join("runs"));
        runs.map_or(0, |runs| runs.lines().count())
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn programs_are_built_once_and_found_at_once() {
    let pretence = Pretence::with_go_that(":");
    let before = pretence
        .build(&["--where", "cluster"])
        .output()
        .expect("it runs");
    assert!(
        !before.status.success() && text(&before).contains("run 'make rig'"),
        "{before:?}"
    );

    let first = pretence.build(&["cluster"]).output().expect("it runs");
    assert!(first.status.success(), "{first:?}");
    let lines = String::from_utf8_lossy(&first.stdout).into_owned();
    let names: Vec<_> = lines
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(
        names,
        [
            "etcd",
            "kube-apiserver",
            "kube-controller-manager",
            "kubectl",
            "helm"
        ]
    );
    for args in [&["cluster"][..], &["--where", "cluster"]] {
        let again = pretence.build(args).output().expect("it runs");
        assert_eq!(
            (again.status.success(), &again.stdout),
            (true, &first.stdout),
            "{again:?}"
        );
    }
    assert_eq!(pretence.runs_of_go(), 5, "one run a program");
}

#[test]
fn a_node_needs_more_than_a_cluster_without_one() {
    let pretence = Pretence::with_go_that(":");
    let cluster = pretence.build(&["cluster"]).output().expect("it runs");
    assert!(cluster.status.success(), "{cluster:?}");
    let node = pretence.build(&["--where"]).output().expect("it runs");
    assert!(
        !node.status.success() && text(&node).contains("missing: kube-scheduler kubelet"),
        "{node:?}"
    );
}

#[test]
fn a_build_that_is_killed_leaves_no_half_a_program() {
    let pretence = Pretence::with_go_that("sleep 60");
    let mut build = pretence.build(&[]);
    build
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    let mut build = build.spawn().expect("it runs");
    let start = Instant::now();
    while pretence.runs_of_go() == 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "go was not run");
        std::thread::sleep(Duration::from_millis(10));
    }
    let group = i32::try_from(build.id()).expect("a process id");
    kill(Pid::from_raw(-group), Signal::SIGKILL).expect("SIGKILL for it and its children");
    build.wait().expect("it is gone");

    let after = pretence
        .build(&["--where", "cluster"])
        .output()
        .expect("it runs");
    assert!(
        text(&after).contains("missing: etcd kube-apiserver"),
        "{after:?}"
    );
    let healthy = Pretence::with_go_that(":");
    let again = healthy
        .build(&["cluster"])
        .env("XDG_CACHE_HOME", pretence.path())
        .output()
        .expect("it runs");
    assert!(
        again.status.success(),
        "the next build is not in the way of the first: {again:?}"
    );
}

#[test]
fn programs_of_envtest_are_taken_where_they_are() {
    let pretence = Pretence::with_go_that(":");
    let assets = pretence.path().join("bin");
    std::fs::copy(assets.join("go"), assets.join("kube-apiserver")).expect("an asset");
    let build = pretence
        .build(&["cluster"])
        .env("KUBEBUILDER_ASSETS", &assets)
        .output()
        .expect("it runs");
    let line = format!("kube-apiserver {}/kube-apiserver\n", assets.display());
    assert!(text(&build).contains(&line), "{build:?}");
    assert_eq!(pretence.runs_of_go(), 4, "the others are built");
}
