//! The mesh as a directory of manifests tells it: what `kubectl apply` would take, in `DIR/mesh/*.yaml`.
//!
//! files -> objects -> what differs from the last look -> [`Batch`]
//!
//! The system tells of changes, and every two seconds it is looked anyway: some file systems tell nothing. A file that
//! cannot be read, also because somebody is just writing it, is named with what is wrong, and what it said before stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use notify::{RecursiveMode, Watcher as _};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::{
    sync::mpsc,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::Directory;
use crate::mesh::{Batch, Event, ObjectName, istio, kubernetes};

/// Between two looks where the system tells nothing.
const LOOK: Duration = Duration::from_secs(2);

/// A larger file is no manifest.
const LARGEST: u64 = 16 << 20;

/// Tells `feed` of what the directory holds, until `stop`.
pub async fn follow(directory: Directory, feed: mpsc::Sender<Batch>, stop: CancellationToken) {
    let path = directory.path().join("mesh");
    if let Err(error) = fs::create_dir(&path)
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        tracing::error!(path = %path.display(), %error, "cannot make the directory of the mesh's manifests");
    }
    let (tell, mut told) = mpsc::channel(1);
    let watching = watch(&path, tell);
    if let Err(error) = &watching {
        tracing::warn!(path = %path.display(), %error, "changes are not told by the system; looking every 2 s");
    }
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut files, mut whole) = (Files::default(), true);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
            Some(()) = told.recv() => {}
        }
        let looking = path.clone();
        let looked = spawn_blocking(move || {
            let events = files.look(&looking);
            (files, events)
        });
        let Ok((looked, events)) = looked.await else {
            tracing::error!("reading the mesh's manifests panicked; what is known stays");
            return stop.cancelled().await;
        };
        files = looked;
        if (whole || !events.is_empty()) && feed.send(Batch { events, whole }).await.is_err() {
            return stop.cancelled().await;
        }
        whole = false;
    }
}

fn watch(path: &Path, tell: mpsc::Sender<()>) -> notify::Result<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |told: notify::Result<notify::Event>| {
        // reading is no change
        if told.is_ok_and(|event| !event.kind.is_access()) {
            // one that waits already will do
            let _ = tell.try_send(());
        }
    })?;
    watcher.watch(path, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

/// What is known of the directory.
#[derive(Debug, Default)]
struct Files {
    by_path: BTreeMap<PathBuf, File>,
    told: BTreeMap<Key, Value>,
}

#[derive(Debug, Default)]
struct File {
    stamp: Option<(SystemTime, u64)>,
    /// What it said when it could be read last.
    objects: Vec<(Key, Value)>,
}

/// Kind and name.
type Key = (&'static str, ObjectName);

/// What a file may hold, and how it is read.
const KINDS: [(&str, &str); 5] = [
    ("Namespace", "v1"),
    ("Service", "v1"),
    ("EndpointSlice", "discovery.k8s.io/v1"),
    ("Pod", "v1"),
    ("PeerAuthentication", "security.istio.io/v1"),
];

impl Files {
    /// Reads what changed; what that means for the mesh.
    fn look(&mut self, directory: &Path) -> Vec<Event> {
        let Ok(present) = manifests(directory) else {
            tracing::warn!(path = %directory.display(), "cannot be listed; what is known stays");
            return Vec::new();
        };
        let gone = |path: &PathBuf| !present.contains_key(path);
        let mut changed = self.by_path.keys().any(gone);
        self.by_path.retain(|path, _| !gone(path));
        for (path, stamp) in present {
            let file = self.by_path.entry(path.clone()).or_default();
            if file.stamp == Some(stamp) {
                continue;
            }
            file.stamp = Some(stamp);
            match read(&path) {
                Ok(objects) => {
                    file.objects = objects;
                    changed = true;
                }
                Err(fault) => {
                    tracing::error!(path = %path.display(), fault, "a manifest of the mesh cannot be used; what it said before stays");
                }
            }
        }
        match changed {
            true => self.tell(),
            false => Vec::new(),
        }
    }

    fn tell(&mut self) -> Vec<Event> {
        let mut now: BTreeMap<Key, Value> = BTreeMap::new();
        for (path, file) in &self.by_path {
            for (key, object) in &file.objects {
                if now.contains_key(key) {
                    tracing::warn!(path = %path.display(), kind = key.0, name = %key.1, "stands in an earlier file, too; that one counts");
                } else {
                    now.insert(key.clone(), object.clone());
                }
            }
        }
        let names: BTreeSet<&Key> = self.told.keys().chain(now.keys()).collect();
        let differs = |key: &&&Key| self.told.get(**key) != now.get(**key);
        let events = names
            .iter()
            .filter(differs)
            .map(|key| match now.get(*key) {
                Some(object) => event(key, object).unwrap_or_else(|| gone(key)),
                None => gone(key),
            })
            .collect();
        self.told = now;
        events
    }
}

fn manifests(directory: &Path) -> io::Result<BTreeMap<PathBuf, (SystemTime, u64)>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let is_manifest = path
            .extension()
            .is_some_and(|it| it == "yaml" || it == "yml" || it == "json");
        // one that is being replaced may be gone by now
        if is_manifest && let Ok(about) = fs::metadata(&path) {
            let changed = about.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            found.insert(path, (changed, about.len()));
        }
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<(Key, Value)>, String> {
    let size = fs::metadata(path).map_err(|e| e.to_string())?.len();
    if size > LARGEST {
        return Err(format!("has {size} bytes; up to {LARGEST} are read"));
    }
    parse(&fs::read_to_string(path).map_err(|e| e.to_string())?)
}

/// All objects of a file, each checked as far as that it can be read.
fn parse(text: &str) -> Result<Vec<(Key, Value)>, String> {
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| error.to_string())?;
    let mut objects = Vec::new();
    for (number, document) in (1..).zip(documents) {
        let is_list = document.get("kind").and_then(Value::as_str) == Some("List");
        let items = match document {
            Value::Null => continue,
            Value::Object(mut list) if is_list => match list.remove("items") {
                Some(Value::Array(items)) => items,
                _ => return Err(format!("document {number}: a List without items")),
            },
            other => vec![other],
        };
        for item in items {
            let read = object(item).map_err(|fault| format!("document {number}: {fault}"))?;
            objects.push(read);
        }
    }
    Ok(objects)
}

fn object(value: Value) -> Result<(Key, Value), String> {
    let Value::Object(mut object) = value else {
        return Err("is not an object".to_owned());
    };
    let kind = object
        .get("kind")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let version = object.get("apiVersion").and_then(Value::as_str);
    let version = version.unwrap_or_default();
    let known = KINDS.iter().find(|(known, served)| {
        let beta = *known == "PeerAuthentication" && version == "security.istio.io/v1beta1";
        *known == kind && (*served == version || beta)
    });
    let Some((kind, _)) = known else {
        let kinds = KINDS.map(|(kind, version)| format!("{kind} ({version})"));
        return Err(format!(
            "{version} {kind:?} is not read here; there are {}",
            kinds.join(", ")
        ));
    };
    let key = (*kind, name(kind, &mut object)?);
    let object = Value::Object(object);
    check(kind, &object).map_err(|error| format!("{kind} {}: {error}", key.1))?;
    Ok((key, object))
}

/// Where no namespace is said it is `default`, as for kubectl.
fn name(kind: &str, object: &mut Map<String, Value>) -> Result<ObjectName, String> {
    let Some(Value::Object(metadata)) = object.get_mut("metadata") else {
        return Err(format!("a {kind} without metadata"));
    };
    let name = metadata.get("name").and_then(Value::as_str);
    let name = name.ok_or_else(|| format!("a {kind} without metadata.name"))?;
    if kind == "Namespace" {
        return Ok(ObjectName::new("", name));
    }
    let name = name.to_owned();
    let namespace = metadata
        .entry("namespace")
        .or_insert_with(|| "default".into())
        .as_str()
        .ok_or_else(|| format!("{kind} {name}: metadata.namespace is no text"))?;
    Ok(ObjectName::new(namespace, &name))
}

fn check(kind: &str, object: &Value) -> Result<(), serde_json::Error> {
    use k8s_openapi::api::{core::v1, discovery::v1::EndpointSlice};
    match kind {
        "Namespace" => parsed::<v1::Namespace>(object).map(drop),
        "Service" => parsed::<v1::Service>(object).map(drop),
        "EndpointSlice" => parsed::<EndpointSlice>(object).map(drop),
        "Pod" => parsed::<v1::Pod>(object).map(drop),
        _ => Ok(()),
    }
}

fn parsed<T: DeserializeOwned>(object: &Value) -> Result<T, serde_json::Error> {
    T::deserialize(object)
}

/// What an object says; `None` where it says nothing to the mesh.
fn event((kind, name): &Key, object: &Value) -> Option<Event> {
    Some(match *kind {
        "Namespace" => {
            let (name, namespace) = kubernetes::namespace(&parsed(object).ok()?)?;
            Event::Namespace(name, Some(namespace))
        }
        "Service" => {
            let (name, service) = kubernetes::service(&parsed(object).ok()?)?;
            Event::Service(name, Some(service))
        }
        "EndpointSlice" => {
            let (name, slice) = kubernetes::slice(&parsed(object).ok()?)?;
            Event::Slice(name, Some(slice))
        }
        "Pod" => {
            let (name, workload) = kubernetes::workload(&parsed(object).ok()?)?;
            Event::Workload(name, Some(workload))
        }
        _ => {
            let (policy, findings) = istio::peer_authentication(object);
            for finding in findings {
                tracing::warn!(object = %name, code = finding.reason.code(), path = finding.path, text = finding.text, "PeerAuthentication");
            }
            Event::PeerAuthentication(name.clone(), Some(policy?))
        }
    })
}

fn gone((kind, name): &Key) -> Event {
    let name = name.clone();
    match *kind {
        "Namespace" => Event::Namespace(name.name, None),
        "Service" => Event::Service(name, None),
        "EndpointSlice" => Event::Slice(name, None),
        "Pod" => Event::Workload(name, None),
        _ => Event::PeerAuthentication(name, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.0.0.1, ports: [{port: 80, name: http}]}
";

    fn put(directory: &Path, file: &str, text: &str) {
        fs::write(directory.join(file), text).expect("a writable directory");
    }

    fn said(events: &[Event]) -> Vec<String> {
        let one = |event: &Event| match event {
            Event::Service(name, there) => {
                format!("{}{name}", if there.is_some() { "+" } else { "-" })
            }
            other => format!("{other:?}"),
        };
        events.iter().map(one).collect()
    }

    #[test]
    fn what_files_say_is_told_once_and_taken_back_with_them() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut files = Files::default();
        assert_eq!(said(&files.look(directory.path())), [""; 0]);
        put(directory.path(), "web.yaml", SERVICE);
        put(directory.path(), "notes.txt", "not read");
        assert_eq!(said(&files.look(directory.path())), ["+shop/web"]);
        assert_eq!(said(&files.look(directory.path())), [""; 0]);

        // the same object in a later file counts once the first is gone
        put(
            directory.path(),
            "zzz.yaml",
            &SERVICE.replace("10.0.0.1", "10.0.0.2"),
        );
        assert_eq!(said(&files.look(directory.path())), [""; 0]);
        fs::remove_file(directory.path().join("web.yaml")).expect("it is there");
        assert_eq!(said(&files.look(directory.path())), ["+shop/web"]);
        fs::remove_file(directory.path().join("zzz.yaml")).expect("it is there");
        assert_eq!(said(&files.look(directory.path())), ["-shop/web"]);
    }

    #[test]
    fn a_bad_file_leaves_what_it_said_before() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut files = Files::default();
        put(directory.path(), "web.yaml", SERVICE);
        files.look(directory.path());
        for bad in [
            "kind: [",
            "kind: Deployment\napiVersion: apps/v1\nmetadata: {name: x}\n",
            "just prose",
        ] {
            put(directory.path(), "web.yaml", bad);
            assert_eq!(said(&files.look(directory.path())), [""; 0], "{bad}");
        }
        put(directory.path(), "web.yaml", "");
        assert_eq!(said(&files.look(directory.path())), ["-shop/web"]);
    }

    #[test]
    fn a_fault_is_told_with_its_document_and_its_object() {
        for (text, want) in [
            (
                format!("{SERVICE}---\nkind: Pod\napiVersion: v1\n"),
                "document 2: a Pod without metadata",
            ),
            (
                "kind: Service\napiVersion: v1\nmetadata: {name: web}\nspec: {ports: 7}\n"
                    .to_owned(),
                "document 1: Service default/web: ",
            ),
            (
                "kind: Deployment\napiVersion: apps/v1\n".to_owned(),
                "document 1: apps/v1 \"Deployment\" is not read here; there are ",
            ),
            (
                "apiVersion: v1\nkind: List\n".to_owned(),
                "document 1: a List without items",
            ),
        ] {
            let fault = parse(&text).expect_err("faulty");
            assert!(fault.starts_with(want), "{fault}");
        }
        let list = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n";
        assert_eq!(parse(list).expect("readable").len(), 1);
    }
}
