//! The injector against its specification: every property holds for every generated pod, and each check is shown to
//! fail when the property does not hold ([`corruptions`]).
//!
//! A failure prints the seed, the property, and the smallest pod found that still fails.

mod adversarial;
mod annotations;
mod case;
mod checks;
mod contents;
mod corruptions;
mod expected;
mod other_settings;
mod quantity;
mod restricted;
mod shrink;
mod strict;
mod ways_in;

use std::{
    collections::BTreeMap,
    panic::{self, AssertUnwindSafe},
    sync::LazyLock,
};

use malha::inject::{Entry, InjectSettings, Injector, uninject};
use serde_json::Value;

use self::{
    case::{Case, Outcome, Setup, Subject},
    checks::Check,
};
use crate::pods::{self, Mode};

/// Seeds 0 to this, each a pod; every third is one that the API server's validation accepts.
const PODS: u64 = 1_500;

static SUBJECT: LazyLock<Subject> = LazyLock::new(|| Subject::new("injector", injector()));

/// Every pod with what the injector made of it, or what P1 says against it. Made once for all tests.
static POPULATION: LazyLock<Vec<(u64, Result<Case, String>)>> = LazyLock::new(|| {
    (0..PODS)
        .map(|seed| (seed, answered(&SUBJECT, setup(seed), pod(seed))))
        .collect()
});

fn injector() -> Injector {
    Injector::new(InjectSettings::default())
}

fn pod(seed: u64) -> Value {
    pods::pod(
        seed,
        if seed.is_multiple_of(3) {
            Mode::Valid
        } else {
            Mode::Anything
        },
    )
}

fn setup(seed: u64) -> Setup {
    Setup {
        entry: Entry::ALL[(seed % 4) as usize],
        namespace: if seed.is_multiple_of(97) {
            "kube-system"
        } else {
            "shop"
        },
        oldest_kubelet: [None, Some(34), Some(33), Some(32), Some(29), Some(28)]
            [(seed % 6) as usize],
    }
}

/// A panic is an answer too, and a wrong one.
fn answered(subject: &Subject, setup: Setup, pod: Value) -> Result<Case, String> {
    panic::catch_unwind(AssertUnwindSafe(|| Case::run(subject, setup, pod)))
        .unwrap_or_else(|_| Err("the injector panicked".into()))
}

fn checked(check: Check, subject: &Subject, case: &Case) -> Result<(), String> {
    panic::catch_unwind(AssertUnwindSafe(|| check(subject, case)))
        .unwrap_or_else(|_| Err("the check panicked, or the injector under it".into()))
}

fn holds_for_every_pod(property: &str, check: Check) {
    let mut failures = Vec::new();
    for (seed, case) in POPULATION.iter() {
        let Ok(case) = case else {
            continue; // P1's
        };
        if let Err(fault) = checked(check, &SUBJECT, case) {
            failures.push((*seed, fault));
        }
    }
    report(property, &failures, |pod, setup| {
        answered(&SUBJECT, setup, pod.clone()).and_then(|case| checked(check, &SUBJECT, &case))
    });
}

/// Shows the first failure, small, and how many there are.
fn report(
    property: &str,
    failures: &[(u64, String)],
    again: impl Fn(&Value, Setup) -> Result<(), String>,
) {
    let Some((seed, fault)) = failures.first() else {
        return;
    };
    let setup = setup(*seed);
    // the same kind of fault: the words before the first colon
    let kind = |fault: &str| {
        fault
            .split([':', '"', '\n'])
            .next()
            .unwrap_or("")
            .to_owned()
    };
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let small = shrink::shrink(pod(*seed), |pod| {
        again(pod, setup).is_err_and(|other| kind(&other) == kind(fault))
    });
    panic::set_hook(hook);
    let case = answered(&SUBJECT, setup, small.clone());
    let shown = case.map_or_else(|fault| fault, |case| case.to_string());
    let mut kinds = BTreeMap::<String, (usize, u64)>::new();
    for (seed, fault) in failures {
        kinds.entry(kind(fault)).or_insert((0, *seed)).0 += 1;
    }
    let mut kinds: Vec<_> = kinds.into_iter().collect();
    kinds.sort_by_key(|(_, (count, _))| std::cmp::Reverse(*count));
    kinds.truncate(8);
    panic!(
        "{property} fails for {} of {PODS} pods {kinds:?}; the first is seed {seed}:\n{fault}\nsmallest pod that fails alike:\n{small}\n{shown}\n{}",
        failures.len(),
        again(&small, setup).expect_err("it was kept because it fails"),
    );
}

/// `malha uninject` as a function.
fn uninjected(mut pod: Value) -> Result<Value, String> {
    uninject::uninject(&mut pod)
        .map(|_| pod)
        .map_err(|fault| fault.to_string())
}

#[test]
fn p01_the_patch_applies_strictly() {
    let failures: Vec<(u64, String)> = POPULATION
        .iter()
        .filter_map(|(seed, case)| case.as_ref().err().map(|fault| (*seed, fault.clone())))
        .collect();
    report("P1", &failures, |pod, setup| {
        answered(&SUBJECT, setup, pod.clone()).map(drop)
    });
}

macro_rules! properties {
    ($($test:ident: $name:literal = $check:ident;)*) => {
        /// By their names, for the table of corruptions.
        const CHECKS: &[(&str, Check)] = &[$(($name, checks::$check),)*];
        $(#[test]
        fn $test() {
            holds_for_every_pod($name, checks::$check);
        })*
    };
}

properties! {
    the_decision_is_that_of_the_table: "decision" = decided;
    a_refusal_helps: "refusal" = refusals_help;
    warnings_are_told_when_there_is_something_to_say: "warnings" = warnings_are_told;
    p03_there_is_one_proxy_in_its_place: "P3" = p03_one_proxy_in_its_place;
    p04_user_containers_are_kept: "P4" = p04_user_containers_are_kept;
    p05_timing_of_probes_is_kept: "P5" = p05_timing_of_probes_is_kept;
    p06_every_rewritten_handler_is_recorded: "P6" = p06_every_rewritten_handler_is_recorded;
    p07_nothing_of_the_users_is_replaced: "P7" = p07_nothing_of_the_users_is_replaced;
    p08_names_mounts_and_ports_fit: "P8" = p08_names_mounts_and_ports_fit;
    nothing_of_ours_is_expanded_by_the_kubelet: "expansion" = nothing_of_ours_is_expanded;
    p09_a_pod_stays_a_pod: "P9" = p09_a_pod_stays_a_pod;
    p10_a_second_call_changes_nothing: "P10" = p10_a_second_call_changes_nothing;
    p11_containers_inserted_later_are_completed: "P11" = p11_containers_inserted_later_are_completed;
    p12_strangers_are_left_alone: "P12" = p12_strangers_are_left_alone;
    p13_unknown_fields_survive: "P13" = p13_unknown_fields_survive;
    p14_key_order_and_nulls_do_not_matter: "P14" = p14_key_order_and_nulls_do_not_matter;
    p15_quality_of_service_is_kept: "P15" = p15_quality_of_service_is_kept;
    p16_only_the_redirection_needs_a_right: "P16" = p16_only_the_redirection_needs_a_right;
    p18_uninject_restores_the_pod: "P18" = p18_uninject_restores_the_pod;
    p19_equal_input_gives_equal_bytes: "P19" = p19_equal_input_gives_equal_bytes;
}

/// A population without a case for a property would prove nothing about it.
#[test]
fn the_pods_meet_every_decision() {
    let mut met = BTreeMap::<String, usize>::new();
    for (_, case) in POPULATION.iter() {
        let Ok(case) = case else {
            continue;
        };
        let word = match &case.outcome {
            Outcome::Patched { reason, .. } => reason.as_str(),
            Outcome::Skipped(reason) => reason.as_str(),
            Outcome::Denied { reason, .. } => reason.as_str(),
        };
        *met.entry(word.to_owned()).or_default() += 1;
        for (code, _) in &case.warnings {
            *met.entry(code.as_str().to_owned()).or_default() += 1;
        }
        for handler in expected::handlers(&case.before, &case.after) {
            let fate = match handler.fate {
                expected::Fate::Rewritten { .. } => "rewritten",
                expected::Fate::Left => "left",
                expected::Fate::Unresolved => "unresolved",
                expected::Fate::External => "external",
            };
            *met.entry(fate.to_owned()).or_default() += 1;
        }
    }
    for (word, least) in [
        ("Injected", 900),
        ("HostNetwork", 10),
        ("MirrorPod", 3),
        ("OptedOutByLabel", 1),
        ("OptedOutByAnnotation", 3),
        ("ProtectedNamespace", 10),
        ("WindowsPod", 10),
        ("ForeignSidecar", 5),
        ("InvalidInjectValue", 10),
        ("InvalidAnnotation", 20),
        ("UnsupportedAnnotation", 10),
        ("NameConflict", 10),
        ("AppUsesProxyGid", 10),
        ("PortConflict", 5),
        ("ClassicJob", 10),
        ("ClassicInitNetwork", 50),
        ("AnnotationIgnored", 30),
        ("AnnotationUnknown", 20),
        ("ProbePortUnresolved", 50),
        ("ProbeHostExternal", 50),
        ("ProbesNotRewritten", 5),
        ("rewritten", 500),
        ("left", 500),
    ] {
        let count = met.get(word).copied().unwrap_or(0);
        assert!(
            count >= least,
            "{word}: {count} of at least {least}; all: {met:?}"
        );
    }
}
