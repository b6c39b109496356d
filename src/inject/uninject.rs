//! Takes an injection back: `uninject(inject(x)) = x`, absent, null and empty being equal.
//!
//! What is ours is known by its containers. What else was changed is read from the environment of the sidecar, which
//! only counts when both containers are there; an annotation that claims an injection changes nothing.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{capture::AGENT_PORT, metadata::SCRAPE_US, ours, probes, record::Record};

/// Why a pod that was injected cannot be taken back.
#[derive(Debug, thiserror::Error)]
pub enum UninjectError {
    /// A variable in which the sidecar keeps what was changed.
    #[error(
        "{variable} of container malha-proxy is unreadable, so nothing was changed; restore the pod from its source"
    )]
    Unreadable {
        /// Its name.
        variable: &'static str,
        /// Why, where it is there at all.
        source: Option<serde_json::Error>,
    },
}

/// Restores one pod or pod template; `false` if it holds no injection of ours, and then it is untouched.
///
/// # Errors
/// When the sidecar's own records are unreadable; the pod is untouched.
pub fn uninject(pod: &mut Value) -> Result<bool, UninjectError> {
    let Some(spec) = pod.get("spec") else {
        return Ok(false);
    };
    let Some(proxy) = sidecar(spec) else {
        return Ok(false);
    };
    let originals: BTreeMap<String, Value> = variable(proxy, ours::PROBES_VARIABLE)?;
    let prometheus: Option<BTreeMap<String, String>> = variable(proxy, ours::PROMETHEUS_VARIABLE)?;
    let record: Record = variable(proxy, ours::RESTORE_VARIABLE)?;
    if let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) {
        restore_spec(spec, &originals, &record);
    }
    if let Some(metadata) = pod.get_mut("metadata").and_then(Value::as_object_mut) {
        restore_metadata(metadata, prometheus.as_ref(), &record);
        if metadata.is_empty()
            && let Some(pod) = pod.as_object_mut()
        {
            pod.shift_remove("metadata");
        }
    }
    Ok(true)
}

/// The sidecar of a pod that holds both of our containers.
fn sidecar(spec: &Value) -> Option<&Value> {
    let named = |list: &str, name: &str| {
        let list = spec.get(list)?.as_array()?;
        list.iter().find(|container| is_named(container, name))
    };
    named("initContainers", ours::INIT)?;
    let native = named("initContainers", ours::PROXY);
    native.or_else(|| named("containers", ours::PROXY))
}

fn is_named(item: &Value, name: &str) -> bool {
    item.get("name").and_then(Value::as_str) == Some(name)
}

fn variable<T: serde::de::DeserializeOwned>(
    proxy: &Value,
    name: &'static str,
) -> Result<T, UninjectError> {
    let variables = proxy
        .get("env")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let found = variables
        .filter(|variable| is_named(variable, name))
        .find_map(|variable| variable.get("value")?.as_str());
    let text = found.ok_or(UninjectError::Unreadable {
        variable: name,
        source: None,
    })?;
    serde_json::from_str(text).map_err(|source| UninjectError::Unreadable {
        variable: name,
        source: Some(source),
    })
}

fn restore_spec(
    spec: &mut Map<String, Value>,
    originals: &BTreeMap<String, Value>,
    record: &Record,
) {
    for list in ["initContainers", "containers"] {
        retain(spec, list, |container| {
            !is_named(container, ours::INIT) && !is_named(container, ours::PROXY)
        });
        for container in spec
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            restore_handlers(container, originals);
            restore_workload_api(container, record);
        }
    }
    retain(spec, "volumes", |volume| {
        let ours = ours::VOLUMES.iter().find(|name| is_named(volume, name));
        ours.is_none_or(|name| record.volumes.iter().any(|kept| kept == name))
    });
    retain(spec, "imagePullSecrets", |secret| {
        !record
            .pull_secrets
            .iter()
            .any(|name| is_named(secret, name))
    });
    for (side, amounts) in &record.resources {
        let own = spec.get_mut("resources").and_then(Value::as_object_mut);
        if let Some(own) = own {
            restore_amounts(own, side, amounts);
        }
    }
}

/// Amounts that somebody has removed since stay away.
fn restore_amounts(own: &mut Map<String, Value>, side: &str, originals: &BTreeMap<String, Value>) {
    let Some(amounts) = own.get_mut(side).and_then(Value::as_object_mut) else {
        return;
    };
    for (key, original) in originals {
        match original {
            Value::Null => drop(amounts.shift_remove(key)),
            original => {
                if let Some(amount) = amounts.get_mut(key) {
                    amount.clone_from(original);
                }
            }
        }
    }
    if amounts.is_empty() {
        own.shift_remove(side);
    }
}

fn restore_handlers(container: &mut Value, originals: &BTreeMap<String, Value>) {
    let Some(name) = container
        .get("name")
        .and_then(Value::as_str)
        .map(probes::encoded)
    else {
        return;
    };
    for (path, record) in originals {
        let Some((tokens, _)) = probes::site_of(path).filter(|(_, container)| *container == name)
        else {
            continue;
        };
        let handlers = tokens
            .iter()
            .try_fold(&mut *container, |at, token| at.get_mut(token));
        let Some(handlers) = handlers
            .and_then(Value::as_object_mut)
            .filter(|handlers| is_agents(handlers, path))
        else {
            continue;
        };
        if let Some((kind, original)) = probes::original(record) {
            handlers.shift_remove("httpGet");
            handlers.insert(kind.to_owned(), original);
        }
    }
}

/// The handler is still the one that we wrote.
fn is_agents(handlers: &Map<String, Value>, path: &str) -> bool {
    handlers.get("httpGet").is_some_and(|http| {
        http.get("port").and_then(Value::as_u64) == Some(AGENT_PORT.into())
            && http.get("path").and_then(Value::as_str) == Some(path)
    })
}

fn restore_workload_api(container: &mut Value, record: &Record) {
    let Some(name) = container
        .get("name")
        .and_then(Value::as_str)
        .map(str::to_owned)
    else {
        return;
    };
    let Some(container) = container.as_object_mut() else {
        return;
    };
    if record.mounts.contains(&name) {
        retain(container, "volumeMounts", |mount| {
            let path = mount.get("mountPath").and_then(Value::as_str);
            !(is_named(mount, ours::RUN_VOLUME) && path == Some(ours::WORKLOAD_API_DIRECTORY))
        });
    }
    if record.sockets.contains(&name) {
        retain(container, "env", |variable| {
            !is_named(variable, ours::WORKLOAD_API_VARIABLE)
        });
    }
}

fn restore_metadata(
    metadata: &mut Map<String, Value>,
    prometheus: Option<&BTreeMap<String, String>>,
    record: &Record,
) {
    if let Some(labels) = metadata.get_mut("labels").and_then(Value::as_object_mut) {
        for key in &record.labels {
            labels.shift_remove(key);
        }
    }
    if let Some(annotations) = metadata
        .get_mut("annotations")
        .and_then(Value::as_object_mut)
    {
        for key in &record.annotations {
            annotations.shift_remove(key);
        }
        for (key, text) in &record.replaced {
            annotations.insert(key.clone(), Value::String(text.clone()));
        }
        if let Some(own) = prometheus {
            restore_prometheus(annotations, own);
        }
    }
    for map in ["labels", "annotations"] {
        if metadata
            .get(map)
            .and_then(Value::as_object)
            .is_some_and(Map::is_empty)
        {
            metadata.shift_remove(map);
        }
    }
}

fn restore_prometheus(annotations: &mut Map<String, Value>, own: &BTreeMap<String, String>) {
    for (name, key, ours) in SCRAPE_US {
        if annotations.get(key).and_then(Value::as_str) != Some(ours) {
            continue; // somebody has changed it since
        }
        match own.get(name) {
            Some(theirs) => annotations.insert(key.to_owned(), Value::String(theirs.clone())),
            None => annotations.shift_remove(key),
        };
    }
}

/// Keeps some items of a list; a list that becomes empty goes.
fn retain(object: &mut Map<String, Value>, list: &str, keep: impl Fn(&Value) -> bool) {
    let Some(items) = object.get_mut(list).and_then(Value::as_array_mut) else {
        return;
    };
    let before = items.len();
    items.retain(keep);
    if items.is_empty() && before > 0 {
        object.shift_remove(list);
    }
}
