//! The rig itself: what every other test here leans on.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::rig::{self, Cluster, Setup, TokenOf, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn controllers_make_the_pods_of_a_deployment_and_kubectl_reads_them() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("rig", &[]).await;
    let args = [
        "create",
        "deployment",
        "web",
        "--image=example.com/web:1",
        "--replicas=2",
        "-n",
        &namespace,
    ];
    let output = cluster.kubectl(args, None).await;
    assert!(output.status.success(), "{output:?}");
    let pods: Api<Pod> = Api::namespaced(cluster.client().await, &namespace);
    eventually(Duration::from_secs(10), "two pods", || async {
        let list = pods
            .list(&ListParams::default())
            .await
            .map_err(|error| error.to_string())?;
        if list.items.len() == 2 {
            Ok(())
        } else {
            Err(format!("{} pods", list.items.len()))
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_names_its_account_and_rbac_applies_to_it() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("rig", &[]).await;
    let kubeconfig = cluster.service_account(&namespace, "default").await;
    let output = cluster
        .kubectl_as(
            &kubeconfig,
            [
                "auth",
                "whoami",
                "-o",
                "jsonpath={.status.userInfo.username}",
            ],
            None,
        )
        .await;
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("system:serviceaccount:{namespace}:default"),
        "{output:?}"
    );
    let pods: Api<Pod> = Api::namespaced(rig::client(&kubeconfig).await, &namespace);
    let refused = pods
        .list(&ListParams::default())
        .await
        .expect_err("nothing is granted");
    assert!(
        matches!(&refused, kube::Error::Api(status) if status.code == 403),
        "{refused:?}"
    );
    let missing = cluster
        .try_token(
            &namespace,
            "default",
            &TokenOf::Pod("gone"),
            &["malha-ca"],
            600,
        )
        .await;
    assert!(
        missing.is_err(),
        "a token bound to a pod that does not exist"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_outlives_the_death_of_its_api_server() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let namespace = cluster.namespace("kept", &[]).await;
    cluster.api_server().kill();
    cluster.api_server().start().expect("it starts again");
    cluster.api_server_ready().await.expect("it is ready again");
    let output = cluster
        .kubectl(["get", "namespace", &namespace], None)
        .await;
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_component_that_does_not_start_is_shown_by_the_end_of_its_log() {
    let Some(programs) = rig::programs_or_skip() else {
        return;
    };
    let setup = Setup {
        api_server: vec!["--no-such-flag".to_owned()],
        ..Setup::default()
    };
    let start = Instant::now();
    let Err(error) = Cluster::start_with(setup, programs).await else {
        panic!("an API server with a flag that it does not know");
    };
    let said = format!("{error:#}");
    assert!(said.contains("kube-apiserver has ended"), "{said}");
    assert!(
        said.contains("unknown flag: --no-such-flag"),
        "the log is in it: {said}"
    );
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "nobody waits for what has ended"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_a_cluster_whose_test_was_killed() {
    if rig::programs_or_skip().is_none() {
        return;
    }
    let mut test = Command::new(std::env::current_exe().expect("this test binary"))
        .args([
            "--ignored",
            "--exact",
            "--nocapture",
            "rig_holds::hold_a_cluster_until_killed",
        ])
        .env_remove("MALHA_RIG_KEEP")
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test binary starts");
    let lines = BufReader::new(test.stdout.take().expect("stdout is piped")).lines();
    let held = lines
        .map_while(Result::ok)
        .find_map(|line| line.split_once("holding ").map(|(_, held)| held.to_owned()))
        .expect("the other test holds a cluster");
    let (group, dir) = held.split_once(' ').expect("a group and a directory");
    let group = Pid::from_raw(-group.parse::<i32>().expect("a process group"));
    assert!(
        Path::new(dir).is_dir() && kill(group, None).is_ok(),
        "it runs: {held}"
    );

    test.kill().expect("SIGKILL");
    test.wait().expect("it is gone");

    eventually(Duration::from_secs(5), "the end of its cluster", || async {
        // Those that are dead but not yet reaped by PID 1 still count as members, so look at what they do.
        let alive = members_alive(-group.as_raw());
        match (alive, Path::new(dir).exists()) {
            (0, false) => Ok(()),
            (alive, dir) => Err(format!("{alive} processes alive, directory there: {dir}")),
        }
    })
    .await;
}

/// Not a test: what [`nothing_is_left_of_a_cluster_whose_test_was_killed`] kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "runs inside nothing_is_left_of_a_cluster_whose_test_was_killed, and until it is killed"]
async fn hold_a_cluster_until_killed() {
    let cluster = Cluster::start(Setup::default())
        .await
        .expect("programs are built");
    println!(
        "holding {} {}",
        cluster.janitor().group(),
        cluster.dir().display()
    );
    std::future::pending::<()>().await;
}

/// How many processes of a group have not ended (`/proc/PID/stat`: pid (name) state ppid pgrp ..).
fn members_alive(group: i32) -> usize {
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    processes
        .filter_map(|process| std::fs::read_to_string(process.path().join("stat")).ok())
        .filter(|stat| {
            let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            let mut fields = after_name.split_whitespace();
            let state = fields.next();
            state != Some("Z") && fields.nth(1) == Some(group.to_string().as_str())
        })
        .count()
}
