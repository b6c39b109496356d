//! What one pod costs: from the pod's JSON to the serialised patch.

use std::{hint::black_box, time::Duration};

use malha::inject::{Call, Entry, InjectSettings, Injector, Verdict};

use crate::{Bench, clock, pods};

pub(crate) fn run(bench: &Bench) {
    let injector = Injector::new(InjectSettings::default());
    let call = Call {
        entry: Entry::Namespace,
        namespace: "shop",
        oldest_kubelet: Some(34),
    };
    for (name, pod) in [
        ("inject_cpu_2kb", pods::of_size(2_048)),
        ("inject_cpu_10kb", pods::of_size(10_240)),
        ("inject_cpu_100kb", pods::of_size(102_400)),
        ("inject_cpu_2000env", pods::with_variables(2_000)),
    ] {
        if !bench.wants(&[name]) {
            continue;
        }
        let bytes = pod.to_string().into_bytes();
        let ask = || {
            injector
                .inject(black_box(&bytes), &call)
                .expect("a pod is readable")
        };
        let Verdict::Patch(patch) = ask().verdict else {
            panic!("the pod of {name} is not injected");
        };
        let rounds = clock::micros_per_call(7, bench.round(Duration::from_millis(300)), || {
            black_box(ask());
        });
        let how = format!(
            "thread CPU of Injector::inject, pod of {} bytes, patch of {} bytes",
            bytes.len(),
            patch.json.len()
        );
        bench.figure(name, &rounds, "us", &how);
    }
}
