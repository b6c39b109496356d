//! One of several replicas leads, and each knows when it does not.

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client, api::PostParams};
use malha::{
    k8s::lease::{self, Candidate, Claim, hold},
    runtime::clock,
};
use tokio_util::sync::CancellationToken;

use crate::rig::{self, Cluster, Setup, eventually};

/// Longer than a Lease stands without renewal, plus one look.
const TAKE_OVER: Duration = Duration::from_secs(25);

struct Replica {
    claim: Claim,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

fn replica(client: Client, namespace: &str, lease: &str, identity: &str) -> Replica {
    let stop = CancellationToken::new();
    let (claim, holding) = hold(
        client,
        candidate(namespace, lease, identity),
        clock::system(),
        lease::Metrics::default(),
        stop.clone(),
    );
    let task = tokio::spawn(holding);
    Replica { claim, stop, task }
}

fn candidate(namespace: &str, lease: &str, identity: &str) -> Candidate {
    Candidate {
        namespace: namespace.to_owned(),
        name: lease.to_owned(),
        identity: identity.to_owned(),
    }
}

async fn leads(replica: &Replica, within: Duration) {
    eventually(within, "this replica leads", || async {
        let (stands, told) = (replica.claim.stands(), *replica.claim.watch().borrow());
        (stands && told)
            .then_some(())
            .ok_or_else(|| format!("stands {stands}, told {told}"))
    })
    .await;
}

async fn holder(cluster: &Cluster, namespace: &str, lease: &str) -> (Option<String>, Option<i32>) {
    let leases: Api<Lease> = Api::namespaced(cluster.client().await, namespace);
    let spec = leases.get(lease).await.expect("the Lease").spec;
    let spec = spec.expect("a Lease has a spec");
    (spec.holder_identity, spec.lease_transitions)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_ten_replicas_one_leads_and_hands_over_when_it_stops() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("lease", &[]).await;
    let mut replicas = Vec::new();
    for number in 0..10 {
        let client = cluster.client().await;
        replicas.push(replica(
            client,
            &namespace,
            "malha-leader",
            &format!("r{number}"),
        ));
    }
    let leading = || -> Vec<usize> {
        let all = replicas.iter().enumerate();
        all.filter(|(_, replica)| replica.claim.stands())
            .map(|(index, _)| index)
            .collect()
    };
    let first = eventually(Duration::from_secs(10), "one leader", || async {
        match leading()[..] {
            [one] => Ok(one),
            ref all => Err(format!("{all:?} lead")),
        }
    })
    .await;
    for _ in 0..50 {
        assert_eq!(
            leading(),
            [first],
            "nobody else, and no gap while it renews"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    let since = Instant::now();
    replicas[first].stop.cancel();
    let second = eventually(Duration::from_secs(10), "another leader", || async {
        match leading()[..] {
            [one] if one != first => Ok(one),
            ref all => Err(format!("{all:?} lead")),
        }
    })
    .await;
    assert!(
        since.elapsed() < Duration::from_secs(8),
        "a Lease that was given up is taken at the next look: {:?}",
        since.elapsed()
    );
    assert_eq!(
        holder(cluster, &namespace, "malha-leader").await,
        (Some(format!("r{second}")), Some(2))
    );
    for replica in &replicas {
        replica.stop.cancel();
    }
    for replica in replicas {
        replica.task.await.expect("a future that ends on stop");
        assert!(!replica.claim.stands());
    }
    let (holder, _) = holder(cluster, &namespace, "malha-leader").await;
    assert_eq!(holder, None, "the last one gives it up, too");
}

/// A leader that dies without a word is followed after the Lease's time, not sooner.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_leader_is_followed_when_its_time_is_over() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("lease", &[]).await;
    let first = replica(cluster.client().await, &namespace, "malha-leader", "first");
    leads(&first, Duration::from_secs(10)).await;
    let second = replica(cluster.client().await, &namespace, "malha-leader", "second");
    tokio::time::sleep(Duration::from_secs(3)).await;
    first.task.abort();
    let died = Instant::now();
    eventually(
        Duration::from_secs(1),
        "a claim ends with its task",
        || async {
            (!first.claim.stands())
                .then_some(())
                .ok_or_else(String::new)
        },
    )
    .await;
    leads(&second, TAKE_OVER).await;
    assert!(
        died.elapsed() > Duration::from_secs(12),
        "taken over after {:?}: before a paused leader would have known",
        died.elapsed()
    );
}

/// A process that is stopped (SIGSTOP, a frozen VM) runs nothing, also not the task that would notice. Here the whole
/// runtime of the leader is kept busy for longer than a Lease lasts.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_leader_finds_its_claim_over_before_it_acts() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("lease", &[]).await;
    let (tell_claim, told_claim) = mpsc::channel();
    let (pause, paused) = mpsc::channel::<Duration>();
    let kubeconfig = cluster.admin_kubeconfig();
    let candidate = candidate(&namespace, "malha-leader", "paused");
    let leader = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let client = rig::client(&kubeconfig).await;
            let stop = CancellationToken::new();
            let (claim, holding) = hold(
                client,
                candidate,
                clock::system(),
                lease::Metrics::default(),
                stop.clone(),
            );
            let holding = tokio::spawn(holding);
            tell_claim.send(claim.clone()).expect("the test listens");
            loop {
                if let Ok(pause) = paused.try_recv() {
                    std::thread::sleep(pause);
                    // the first thing that runs after the pause: the claim is over although nobody was told yet
                    assert!(!claim.stands(), "an ex-leader must know before it acts");
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let mut told = claim.watch();
            tokio::time::timeout(Duration::from_secs(10), told.wait_for(|leads| !leads))
                .await
                .expect("told that it leads no longer")
                .expect("the holder lives");
            stop.cancel();
            holding.await.expect("a future that ends on stop");
        });
    });
    let claim: Claim = told_claim.recv().expect("a claim");
    eventually(Duration::from_secs(10), "the first leads", || async {
        claim.stands().then_some(()).ok_or_else(String::new)
    })
    .await;
    let second = replica(cluster.client().await, &namespace, "malha-leader", "second");
    tokio::time::sleep(Duration::from_secs(3)).await;

    pause.send(TAKE_OVER).expect("the leader listens");
    let mut overlapped = 0;
    let start = Instant::now();
    while !second.claim.stands() && start.elapsed() < TAKE_OVER {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(
        second.claim.stands(),
        "the second took over while the first was paused"
    );
    overlapped += usize::from(claim.stands());
    assert_eq!(overlapped, 0, "two claims stood at one time");
    leader.join().expect("the paused leader's assertions hold");
    assert!(second.claim.stands());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_of_any_shape_is_taken_or_waited_for_and_kills_nobody() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("lease", &[]).await;
    let leases: Api<Lease> = Api::namespaced(cluster.client().await, &namespace);
    let odd = [
        ("no-spec", serde_json::json!({})),
        (
            "no-holder",
            serde_json::json!({"spec": {"leaseDurationSeconds": 2147483647}}),
        ),
        (
            "empty-holder",
            serde_json::json!({"spec": {"holderIdentity": ""}}),
        ),
        (
            "no-times",
            serde_json::json!({"spec": {"holderIdentity": "somebody", "leaseDurationSeconds": 1}}),
        ),
        (
            "far-future",
            serde_json::json!({"spec": {"holderIdentity": "somebody", "leaseDurationSeconds": 1, "leaseTransitions": 2147483647,
                "renewTime": "9999-12-30T00:00:00.000000Z"}}),
        ),
    ];
    for (name, mut lease) in odd {
        lease["metadata"] = serde_json::json!({"name": name, "annotations": {"kept": "yes"}});
        let lease: Lease = serde_json::from_value(lease).expect("a Lease");
        leases
            .create(&PostParams::default(), &lease)
            .await
            .expect(name);
        let replica = replica(cluster.client().await, &namespace, name, "me");
        leads(&replica, Duration::from_secs(10)).await;
        let taken = leases.get(name).await.expect(name);
        let kept = taken
            .metadata
            .annotations
            .and_then(|all| all.get("kept").cloned());
        assert_eq!(
            kept.as_deref(),
            Some("yes"),
            "{name}: what others wrote stays"
        );
        replica.stop.cancel();
        replica.task.await.expect("a future that ends on stop");
    }
}

/// An API server that is frozen answers nobody and closes no connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_api_server_ends_the_claim_in_time_and_is_outlived() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let namespace = cluster.namespace("lease", &[]).await;
    let leader = replica(cluster.client().await, &namespace, "malha-leader", "first");
    leads(&leader, Duration::from_secs(10)).await;

    cluster.api_server().pause().expect("frozen");
    let frozen = Instant::now();
    let mut told = leader.claim.watch();
    tokio::time::timeout(Duration::from_secs(12), told.wait_for(|leads| !leads))
        .await
        .expect("told before anybody could take over")
        .expect("the holder lives");
    assert!(!leader.claim.stands());
    assert!(
        frozen.elapsed() > Duration::from_secs(4),
        "one slow answer is no reason to give up"
    );

    cluster.api_server().resume().expect("thawed");
    leads(&leader, Duration::from_secs(10)).await;
    leader.stop.cancel();
    leader.task.await.expect("a future that ends on stop");
}
