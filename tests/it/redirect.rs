//! The redirection: what settings become which rules, and what a real kernel does with them.

mod golden;
mod kernel;
mod programs;
mod rules;
mod scene;

use malha::redirect::Redirection;
use serde_json::{Value, json};

/// The settings that the injector writes for a pod without annotations, with some keys changed.
fn settings(changes: &Value) -> Redirection {
    Redirection::parse(&argument(changes)).expect("good settings")
}

fn argument(changes: &Value) -> String {
    let mut settings = json!({
        "proxyGid": 1337, "inboundPort": 15006, "outboundPort": 15001,
        "includeInboundPorts": "*", "excludeInboundPorts": [15020, 15021, 15090],
        "includeOutboundPorts": [], "excludeOutboundPorts": [],
        "includeOutboundIPRanges": "*", "excludeOutboundIPRanges": [],
        "excludeInterfaces": [], "excludeOutboundUids": [],
    });
    for (key, value) in changes.as_object().into_iter().flatten() {
        settings[key] = value.clone();
    }
    settings.to_string()
}
