//! What the control plane may do, and that it does nothing else.
//!
//! Every test that runs a control plane compares its calls with these rules when it ends (see
//! [`outside::ControlPlane`]); here is what the rules must not hold, and that the comparison can fail.

use crate::rig::grants::Grants;
use crate::rig::{Cluster, Setup, outside};

#[tokio::test(flavor = "multi_thread")]
async fn the_grants_hold_no_forbidden_verb_and_a_call_beside_them_is_noticed() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    outside::apply_base(&cluster).await;
    let grants = Grants::of(&cluster, outside::NAMESPACE)
        .await
        .expect("rules of RBAC");
    assert!(
        !grants.rules().is_empty(),
        "manifests/base grants something"
    );

    for granted in grants.rules() {
        let rule = &granted.rule;
        let resources = rule.resources.clone().unwrap_or_default();
        let everything = [
            &rule.verbs,
            &resources,
            &rule.api_groups.clone().unwrap_or_default(),
        ];
        assert!(
            everything
                .iter()
                .all(|list| !list.iter().any(|word| word == "*")),
            "a star: {granted:?}"
        );
        let paths = rule.non_resource_urls.clone().unwrap_or_default();
        assert!(
            paths.is_empty() || rule.verbs == ["get"],
            "writes to a path: {granted:?}"
        );
        assert!(
            !paths.iter().any(|path| path.contains('*')),
            "any path: {granted:?}"
        );
        for verb in ["escalate", "bind", "impersonate", "deletecollection"] {
            assert!(
                !rule.verbs.iter().any(|granted| granted == verb),
                "{verb}: {granted:?}"
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
                "{resource}: {granted:?}"
            );
        }
        if resources.iter().any(|resource| resource == "secrets") {
            assert_eq!(
                granted.namespace.as_deref(),
                Some(outside::NAMESPACE),
                "Secrets elsewhere: {granted:?}"
            );
            let named = rule
                .resource_names
                .as_ref()
                .is_some_and(|names| !names.is_empty());
            assert!(
                named || rule.verbs == ["create"],
                "any Secret but its own: {granted:?}"
            );
        }
        let writes = ["update", "patch", "delete"];
        if granted.namespace.is_none()
            && rule
                .verbs
                .iter()
                .any(|verb| writes.contains(&verb.as_str()))
        {
            let named = rule
                .resource_names
                .as_ref()
                .is_some_and(|names| !names.is_empty());
            let events = resources == ["events"];
            // what became of a user's object: its status, and never what it says
            let status = resources
                .iter()
                .all(|resource| resource.ends_with("/status"));
            assert!(
                named || events || (status && rule.verbs == ["patch"]),
                "writes anything of a kind in the whole cluster: {granted:?}"
            );
        }
    }

    let malha = cluster
        .service_account(outside::NAMESPACE, outside::NAME)
        .await;
    let granted = cluster
        .kubectl_as(&malha, ["get", "pods", "-A"], None)
        .await;
    assert!(granted.status.success(), "{granted:?}");
    assert_eq!(
        grants.surplus_calls(),
        Vec::<String>::new(),
        "granted calls are no surplus"
    );
    for beside in [
        ["get", "secrets", "-A"],
        ["delete", "namespace", "default"],
        ["get", "secrets", "-nmalha-system"],
    ] {
        let refused = cluster.kubectl_as(&malha, beside, None).await;
        assert!(!refused.status.success(), "{beside:?} is refused");
        assert_eq!(grants.surplus_calls().len(), 1, "{beside:?} is noticed");
    }
}
