//! libFuzzer over one target: `MALHA_FUZZ=jwks fuzz CORPUS.. -max_total_time=60`. `make fuzz` runs them all.
#![no_main]

use std::sync::LazyLock;

mod targets;

static TARGET: LazyLock<targets::Target> = LazyLock::new(|| {
    let wanted = std::env::var("MALHA_FUZZ").unwrap_or_default();
    let found = targets::TARGETS.iter().find(|(name, _)| *name == wanted);
    found
        .unwrap_or_else(|| {
            panic!("MALHA_FUZZ is {wanted:?}, which is no target: see fuzz/targets.rs")
        })
        .1
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| TARGET(input));
