//! Generated pods through a real API server: what comes back is what the programs give offline, it is valid whenever the
//! pod was, and a second admission changes nothing.

use kube::api::{Api, DynamicObject};
use serde_json::{Value, json};

use crate::generator::{Mode, pod as generated};
use crate::rig::pods::{MESH, as_sent, assert_equal, comparable, dry_run, malha, raw_pods};
use crate::rig::{self, outside};

/// How many pods the API server sees.
const SAMPLE: usize = 200;

/// A pod that the API server accepts and the injector patches or leaves alone.
struct Admitted {
    seed: u64,
    /// As the API server has it before any webhook: validated, defaults filled in.
    before: Value,
    /// As it would be stored.
    online: Value,
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_api_server_stores_is_what_malha_inject_prints_and_a_second_admission_changes_nothing()
 {
    let Some(plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let meshed = cluster.namespace("generated", MESH).await;
    // Disabled, not unlabelled: some of the pods carry a label that would select them by itself.
    let plain = cluster
        .namespace("generated-plain", &[("istio-injection", "disabled")])
        .await;
    let client = cluster.client().await;
    let (through_us, past_us) = (raw_pods(&client, &meshed), raw_pods(&client, &plain));

    let (mut admitted, mut denied, mut invalid) = (Vec::new(), Vec::new(), 0);
    for seed in 0.. {
        if admitted.len() + denied.len() == SAMPLE {
            break;
        }
        let before = match seen(&past_us, &generated(seed, Mode::Valid)).await {
            Ok(before) => as_sent(before),
            Err(refused) => {
                invalid += 1;
                assert!(
                    invalid < SAMPLE,
                    "the generator makes few valid pods; the last: {refused}"
                );
                continue;
            }
        };
        match seen(&through_us, &before).await {
            Ok(online) => admitted.push(Admitted {
                seed,
                before,
                online,
            }),
            Err(refused) => match refused.split_once("injector.malha.io\" denied the request: ") {
                Some((_, words)) => denied.push((seed, before, words.to_owned())),
                None => panic!("seed {seed}: valid before, invalid after us: {refused}"),
            },
        }
    }
    assert!(
        admitted.len() > SAMPLE / 2,
        "{} of {SAMPLE} were admitted: this proves little",
        admitted.len()
    );

    let offline = |pods: Vec<&Value>| {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": pods });
        let config = plane.injector_config();
        let config = config.to_str().expect("UTF-8").to_owned();
        let meshed = meshed.clone();
        async move {
            let args = [
                "inject",
                "-n",
                &meshed,
                "--injector-config",
                &config,
                "-f",
                "-",
                "-o",
                "json",
            ];
            malha(&args, &list.to_string()).await
        }
    };
    let printed = offline(admitted.iter().map(|pod| &pod.before).collect()).await;
    let printed: Value = serde_json::from_slice(&printed.stdout).unwrap_or_else(|error| {
        panic!(
            "malha inject: {error}: {}",
            String::from_utf8_lossy(&printed.stderr)
        )
    });
    let printed = printed["items"].as_array().expect("a List");
    assert_eq!(printed.len(), admitted.len(), "one pod out for each pod in");
    let mut patched = 0;
    for (
        Admitted {
            seed,
            before,
            online,
        },
        offline,
    ) in admitted.into_iter().zip(printed)
    {
        // The offline pod goes through the API server too, past no webhook, for its defaults to be filled in.
        let offline = seen(&past_us, offline).await.unwrap_or_else(|refused| {
            panic!("seed {seed}: malha inject makes a pod that the API server refuses: {refused}")
        });
        let again = seen(&through_us, &as_sent(online.clone()))
            .await
            .unwrap_or_else(|refused| {
                panic!("seed {seed}: a second admission refuses it: {refused}")
            });
        let online = comparable(online);
        assert_equal(
            &online,
            &comparable(offline),
            &format!("seed {seed}: online and offline differ"),
        );
        assert_equal(
            &comparable(again),
            &online,
            &format!("seed {seed}: a second admission changes it"),
        );
        patched += usize::from(online != comparable(before));
    }
    assert!(
        patched > SAMPLE / 2,
        "only {patched} of {SAMPLE} were patched: this proves little"
    );

    for (seed, before, words) in &denied {
        let output = offline(vec![before]).await;
        assert_eq!(
            output.status.code(),
            Some(1),
            "seed {seed}: denied online ({words}), offline: {output:?}"
        );
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            said.contains(words.as_str()),
            "seed {seed}: online {words:?}, offline {said:?}"
        );
    }
}

/// Sends a pod as a dry run, unknown fields and all: the answer is what would be stored, or the refusal's words.
async fn seen(pods: &Api<DynamicObject>, pod: &Value) -> Result<Value, String> {
    let mut pod = pod.clone();
    if let Some(metadata) = pod["metadata"].as_object_mut() {
        metadata.remove("namespace");
    }
    dry_run(pods, &pod)
        .await
        .map_err(|status| status.message.clone())
}
