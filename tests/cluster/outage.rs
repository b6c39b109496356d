//! What happens to pods while the control plane, its webhook configuration, or the API server is gone.

use std::time::Duration;

use serde_json::{Value, json};

use crate::authority::{ca_bundle, certificate, csr};
use crate::rig::pods::{INIT, MESH, PROXY, create, dry_run, merge, names, pod, raw_pods};
use crate::rig::{Cluster, Setup, TokenOf, eventually, outside};

const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn r08_r09_without_a_control_plane_only_pods_of_the_mesh_are_refused_and_it_comes_back_by_itself()
 {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let Some(plane) = outside::ControlPlane::install(&cluster, 2).await else {
        return;
    };
    let meshed = cluster.namespace("meshed", MESH).await;
    let plain = cluster.namespace("plain", &[]).await;
    let stored = create(&cluster, &meshed, &pod("before"))
        .await
        .expect("all is well");
    assert_eq!(names(&stored, "initContainers"), [INIT, PROXY]);

    let mut injected = 0.0;
    for replica in plane.replicas() {
        let counter = "malha_injector_admission_requests_total";
        injected += replica.counted(counter, "reason=\"Injected\"").await;
    }
    assert_eq!(
        injected, 1.0,
        "one pod was injected, by one of the two, and counted once"
    );

    // SIGKILL, so that nobody says goodbye, and at once a look: the endpoints still stand.
    for replica in plane.replicas() {
        replica.process().kill();
    }
    refused_by_the_webhook(&cluster, &meshed).await;
    for replica in plane.replicas() {
        replica.publish(&cluster, false).await;
    }
    refused_by_the_webhook(&cluster, &meshed).await;
    everything_else_is_untouched(&cluster, &meshed, &plain).await;

    // A Deployment that is made now waits, and its author finds the reason in its events.
    let output = cluster
        .kubectl(
            [
                "create",
                "deployment",
                "patient",
                "--image=example.com/app:1",
                "-n",
                &meshed,
            ],
            None,
        )
        .await;
    assert!(output.status.success(), "{output:?}");
    let events = [
        "get",
        "events",
        "-n",
        &meshed,
        "-o",
        "jsonpath={.items[*].message}",
    ];
    eventually(PATIENCE, "the reason in an event", || async {
        let output = cluster.kubectl(events, None).await;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if said.contains("namespace.injector.malha.io") {
            Ok(())
        } else {
            Err(said)
        }
    })
    .await;

    // The API server restarts while nobody can answer its webhook: nothing that it needs hangs on us.
    cluster.api_server().kill();
    for replica in plane.replicas() {
        // A missing API server is waited for.
        replica.process().start().expect("it starts again");
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for replica in plane.replicas() {
        replica
            .process()
            .check()
            .expect("it waits for the API server and does not exit");
    }
    cluster.api_server().start().expect("it starts again");
    cluster
        .api_server_ready()
        .await
        .expect("the API server is back");
    everything_else_is_untouched(&cluster, &meshed, &plain).await;

    for replica in plane.replicas() {
        replica.ready().await;
        replica.publish(&cluster, true).await;
    }
    eventually(PATIENCE, "admissions after the outage", || async {
        create(&cluster, &meshed, &pod("after"))
            .await
            .map_err(|status| status.message.clone())
    })
    .await;
    let pods = [
        "get",
        "pods",
        "-n",
        &meshed,
        "-l",
        "app=patient",
        "-o",
        "json",
    ];
    let patient = eventually(PATIENCE, "the waiting Deployment's pod", || async {
        let output = cluster.kubectl(pods, None).await;
        let list: Value =
            serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
        list["items"]
            .as_array()
            .and_then(|pods| pods.first().cloned())
            .ok_or_else(|| "no pod yet".to_owned())
    })
    .await;
    assert_eq!(
        names(&patient, "initContainers"),
        [INIT, PROXY],
        "nobody had to restart anything"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn r08_without_its_webhook_configuration_no_plain_pod_gets_into_the_mesh() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    outside::apply_base(&cluster).await;
    let meshed = cluster.namespace("meshed", MESH).await;
    let plain = cluster.namespace("plain", &[]).await;

    // Made to fail open, or gone: the API server's own policy answers in both cases, and in the same words.
    let entries = [
        "patch",
        "mutatingwebhookconfiguration",
        "malha-injector",
        "--type=json",
        "-p",
    ];
    let ignore: Vec<_> = (0..4)
        .map(|entry| json!({ "op": "replace", "path": format!("/webhooks/{entry}/failurePolicy"), "value": "Ignore" }))
        .collect();
    let ignore = Value::from(ignore).to_string();
    let output = cluster
        .kubectl(entries.iter().copied().chain([ignore.as_str()]), None)
        .await;
    assert!(output.status.success(), "{output:?}");
    refused_by_the_policy(&cluster, &meshed).await;
    let gone = ["delete", "mutatingwebhookconfiguration", "malha-injector"];
    assert!(cluster.kubectl(gone, None).await.status.success());
    refused_by_the_policy(&cluster, &meshed).await;

    everything_else_is_untouched(&cluster, &meshed, &plain).await;
    let client = cluster.client().await;
    let (in_mesh, outside_mesh) = (raw_pods(&client, &meshed), raw_pods(&client, &plain));
    for number in 0..200 {
        let pod = pod(&format!("pod-{number}"));
        let meshed = dry_run(&in_mesh, &pod).await;
        assert!(meshed.is_err(), "plain pod {number} got into the mesh");
        let plain = dry_run(&outside_mesh, &pod).await;
        assert!(
            plain.is_ok(),
            "pod {number} was denied outside the mesh: {plain:?}"
        );
    }

    // A pod that says that it has a sidecar, and has one, is let in: the policy looks at containers only.
    let mut complete = pod("complete");
    complete["spec"]["initContainers"] =
        json!([{ "name": PROXY, "image": "example.com/proxy:1", "restartPolicy": "Always" }]);
    create(&cluster, &meshed, &complete)
        .await
        .expect("it has the sidecar");
}

#[tokio::test(flavor = "multi_thread")]
async fn r10_replicas_that_are_told_to_stop_answer_until_nobody_calls_them() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let Some(plane) = outside::ControlPlane::install(&cluster, 2).await else {
        return;
    };
    let meshed = cluster.namespace("meshed", MESH).await;
    let rolling = async {
        for replica in plane.replicas() {
            // The kubelet's order: SIGTERM at once, and the endpoint goes when the probe or the deletion is noticed.
            let ended = replica
                .process()
                .terminate(Duration::from_secs(40))
                .await
                .expect("it ends by itself");
            assert!(ended.success(), "{ended}: {}", replica.process().tail(20));
            replica.process().start().expect("it starts again");
            replica.ready().await;
            // The other one goes only when this one is back, as a rolling update does it.
            eventually(PATIENCE, "the endpoint is back", || async {
                replica.readyz().await
            })
            .await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    };
    let client = cluster.client().await;
    let pods = raw_pods(&client, &meshed);
    let admitting = async {
        for number in 0_u32.. {
            let admitted = dry_run(&pods, &pod(&format!("pod-{number}"))).await;
            let stored =
                admitted.unwrap_or_else(|refused| panic!("admission {number}: {refused:?}"));
            assert_eq!(
                names(&stored, "initContainers"),
                [INIT, PROXY],
                "admission {number}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = rolling => {}
        () = admitting => unreachable!("it goes on until the replicas have been replaced"),
        () = plane.follow_readiness(&cluster) => unreachable!("it never ends"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r13_a_leader_that_was_frozen_does_not_go_on_leading() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let Some(plane) = outside::ControlPlane::install(&cluster, 2).await else {
        return;
    };
    let frozen = plane.leader(&cluster).await.expect("one of them leads");
    frozen.process().pause().expect("SIGSTOP");
    frozen.publish(&cluster, false).await;
    let successor = eventually(PATIENCE, "another leader", || async {
        match plane.leader(&cluster).await {
            Some(leader) if leader.webhook != frozen.webhook => Ok(leader),
            _ => Err("the frozen one still holds the lease".to_owned()),
        }
    })
    .await;
    let repaired = async || {
        let now = super::authority::ca_bundles(&cluster).await;
        if now.iter().all(|bundle| !bundle.is_empty()) {
            Ok(())
        } else {
            Err(format!("{now:?}"))
        }
    };
    let delete = ["delete", "mutatingwebhookconfiguration", "malha-injector"];
    assert!(cluster.kubectl(delete, None).await.status.success());
    outside::apply_base(&cluster).await;
    eventually(PATIENCE, "the new leader acts", repaired).await;

    frozen.process().resume().expect("SIGCONT");
    frozen.ready().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let leader = plane.leader(&cluster).await.expect("one leads");
    assert_eq!(leader.webhook, successor.webhook, "the old one follows");
    repaired().await.expect("and undoes nothing");
}

/// Refused because nobody answers the webhook, in words that name it.
/// For longer than what is known counts as fresh: whoever is known gets its certificate, and the record says by what.
#[tokio::test(flavor = "multi_thread")]
async fn while_the_api_server_is_away_known_pods_get_certificates_and_the_record_says_stale() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let Some(plane) = outside::ControlPlane::install(&cluster, 1).await else {
        return;
    };
    let replica = plane.replicas().first().expect("one");
    let dir = tempfile::tempdir().expect("a directory");
    let bundle = dir.path().join("bundle.pem");
    std::fs::write(&bundle, ca_bundle(&cluster).await).expect("a file");
    let namespace = cluster.namespace("meshed", MESH).await;
    create(&cluster, &namespace, &pod("known"))
        .await
        .expect("a meshed pod");
    let known = TokenOf::Pod("known");
    let token = cluster
        .token(&namespace, "default", &known, &["malha-ca"], 3600)
        .await;
    let last_record = || -> Value {
        let said = replica.process().output();
        let mut records = said.lines().rev().filter_map(|line| {
            let record: Value = serde_json::from_str(line).ok()?;
            (record["target"] == "audit").then_some(record)
        });
        records.next().unwrap_or_default()
    };
    let recorded = async |stale: bool| {
        eventually(
            Duration::from_secs(120),
            "a certificate, and its record",
            || async {
                // not more often than a pod may ask
                tokio::time::sleep(Duration::from_secs(1)).await;
                let csr = csr(dir.path()).await;
                let (status, answer) = certificate(replica, &bundle, &token, &csr).await;
                assert_eq!(status, 201, "{answer:#}");
                let record = last_record();
                match record["stale"].as_bool().unwrap_or_default() == stale {
                    true => Ok(record),
                    false => Err(record.to_string()),
                }
            },
        )
        .await
    };
    let fresh = recorded(false).await;
    assert_eq!(fresh["pod"]["name"], "known");
    cluster.api_server().kill();
    let stale = recorded(true).await;
    assert_eq!(
        (&stale["code"], &stale["method"]),
        (&json!("New"), &json!("jwks"))
    );
    let verdict = malha::signing::verify_chain(
        replica
            .process()
            .output()
            .lines()
            .filter(|line| line.starts_with("{\"target\":\"audit\"")),
    );
    assert!(verdict.is_ok_and(|records| records > 1), "the chain holds");
    cluster.api_server().start().expect("it starts again");
    cluster.api_server_ready().await.expect("it is back");
    recorded(false).await;
}

async fn refused_by_the_webhook(cluster: &Cluster, meshed: &str) {
    let refused = create(cluster, meshed, &pod("refused"))
        .await
        .expect_err("a pod of the mesh");
    assert_eq!(
        refused.code, 500,
        "our fault, not the author's: {refused:?}"
    );
    for word in ["failed calling webhook", "namespace.injector.malha.io"] {
        assert!(
            refused.message.contains(word),
            "{word}: {}",
            refused.message
        );
    }
}

/// Refused by the ValidatingAdmissionPolicy, in words that help. Policies take effect a moment after they are written.
async fn refused_by_the_policy(cluster: &Cluster, meshed: &str) {
    let pods = raw_pods(&cluster.client().await, meshed);
    let refused = eventually(PATIENCE, "the policy's refusal", || async {
        match dry_run(&pods, &pod("refused")).await {
            Ok(_) => Err("a plain pod was let in".to_owned()),
            Err(refused) if refused.message.contains("malha-sidecar-present") => Ok(refused),
            Err(refused) => Err(refused.message.clone()),
        }
    })
    .await;
    for word in [PROXY, "malha-injector", "sidecar.istio.io/inject"] {
        assert!(
            refused.message.contains(word),
            "{word}: {}",
            refused.message
        );
    }
}

/// Pods that are none of the mesh's business can be created, whatever state the control plane is in.
async fn everything_else_is_untouched(cluster: &Cluster, meshed: &str, plain: &str) {
    let mut opted_out = pod("opted-out");
    opted_out["metadata"]["labels"] = json!({ "sidecar.istio.io/inject": "false" });
    let mut host_network = pod("host-network");
    merge(&mut host_network["spec"], json!({ "hostNetwork": true }));
    let client = cluster.client().await;
    for (namespace, pod) in [
        (plain, pod("plain")),
        (meshed, opted_out),
        (meshed, host_network),
        ("kube-system", pod("system")),
        ("default", pod("default")),
    ] {
        let name = pod["metadata"]["name"].clone();
        let created = dry_run(&raw_pods(&client, namespace), &pod).await;
        assert!(created.is_ok(), "{name} in {namespace}: {created:?}");
    }
    control_plane_pods_are_made_again(cluster).await;
}

/// The control plane's own Deployment replaces its pods, and its CronJob can run.
async fn control_plane_pods_are_made_again(cluster: &Cluster) {
    let list = [
        "get",
        "pods",
        "-n",
        outside::NAMESPACE,
        "-l",
        "malha.io/control-plane=true",
        "-o",
        "name",
    ];
    let ours = async || -> Result<Vec<String>, String> {
        let output = cluster.kubectl(list, None).await;
        let names = String::from_utf8_lossy(&output.stdout);
        let mut names: Vec<_> = names.lines().map(str::to_owned).collect();
        names.sort();
        if names.len() >= 2 {
            Ok(names)
        } else {
            Err(format!("{names:?}"))
        }
    };
    let before = eventually(PATIENCE, "the Deployment's pods", ours).await;
    let delete = [
        "delete",
        "-n",
        outside::NAMESPACE,
        "--wait=false",
        "--now",
        before[0].as_str(),
    ];
    let output = cluster.kubectl(delete, None).await;
    assert!(output.status.success(), "{output:?}");
    eventually(PATIENCE, "a new pod of the control plane", || async {
        let now = ours().await?;
        if now.iter().any(|name| !before.contains(name)) {
            Ok(())
        } else {
            Err(format!("{now:?}"))
        }
    })
    .await;
    let job = format!("rotate-{}", cluster.next());
    let run = [
        "create",
        "job",
        &job,
        "--from=cronjob/malha-ca-rotate",
        "-n",
        outside::NAMESPACE,
    ];
    let output = cluster.kubectl(run, None).await;
    assert!(output.status.success(), "{output:?}");
    let selector = format!("job-name={job}");
    let pods = [
        "get",
        "pods",
        "-n",
        outside::NAMESPACE,
        "-l",
        selector.as_str(),
        "-o",
        "name",
    ];
    eventually(PATIENCE, "the pod of the rotation's Job", || async {
        let output = cluster.kubectl(pods, None).await;
        if output.stdout.is_empty() {
            Err(format!("{output:?}"))
        } else {
            Ok(())
        }
    })
    .await;
}
