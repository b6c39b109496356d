//! Arrows between rooms point one way: shell -> adapters -> core. Values in, values out, in the core.

use std::{fs, path::Path};

/// Layer by layer, the core first. `lib.rs` shows the same map.
const CORE: &[&str] = &[
    "clock", "identity", "redirect", "inject", "ca", "caller", "mesh", "xds", "config",
];
/// Messages of others' protocols, sent and received by adapters; the core has types of its own.
const DATA: &[&str] = &["proto"];
const ADAPTERS: &[&str] = &[
    "ads",
    "agent",
    "custody",
    "k8s",
    "netlink",
    "signing",
    "standalone",
    "tls",
    "webhook",
];
/// The adapter that others stand on: every connection of ours is TLS 1.3, configured in one place.
const SHARED: &str = "tls";
const SHELL: &[&str] = &["bin", "cli", "runtime"];

/// What the core does not name, and what it takes instead.
const OUTSIDE: &[(&str, &str)] = &[
    ("tokio", "be a plain function; an adapter waits"),
    ("kube", "take the object as a value; `k8s` asks the cluster"),
    (
        "hyper",
        "take the message as a value; an adapter speaks HTTP",
    ),
    (
        "axum",
        "take the message as a value; an adapter speaks HTTP",
    ),
    (
        "std::fs",
        "take the text as a value; an adapter reads files",
    ),
    ("std::env", "take a lookup; `cli` reads the environment"),
    ("std::process", "return the answer; the shell acts on it"),
    ("std::thread", "be a plain function; `runtime` owns tasks"),
    ("std::time::SystemTime", "take `now` as an argument"),
    ("std::time::Instant", "take `now` as an argument"),
    ("jiff::Timestamp::now", "take `now` as an argument"),
    ("Timestamp::now", "take `now` as an argument"),
    ("SystemTime::now", "take `now` as an argument"),
    ("Instant::now", "take `now` as an argument"),
    (
        "TcpStream",
        "take the message as a value; an adapter has sockets",
    ),
    (
        "TcpListener",
        "take the message as a value; an adapter has sockets",
    ),
    (
        "UdpSocket",
        "take the message as a value; an adapter has sockets",
    ),
    (
        "UnixStream",
        "take the message as a value; an adapter has sockets",
    ),
    (
        "ToSocketAddrs",
        "take the address as a value; an adapter resolves names",
    ),
    ("SystemRandom", "take the random bytes as an argument"),
    ("KeyPair::generate", "take the key as an argument"),
];

#[test]
fn arrows_between_rooms_point_to_the_core() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = rust_files(&root.join("src"));
    assert!(files.len() > 20, "only {} files found", files.len());
    let wrong: Vec<_> = files
        .iter()
        .flat_map(|file| {
            let path = file.strip_prefix(root).expect("below the root");
            let text = fs::read_to_string(file).expect("readable");
            wrong_arrows(path.to_str().expect("UTF-8"), &text)
        })
        .collect();
    assert!(
        wrong.is_empty(),
        "arrows that point the wrong way:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn the_crates_map_has_the_same_order() {
    let map = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs"));
    let map = map.expect("readable");
    let rooms: Vec<_> = map
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    let mut shown = rooms.iter().filter(|room| CORE.contains(room));
    assert!(
        CORE.iter().eq(shown.by_ref()),
        "the core in lib.rs: {rooms:?}"
    );
    let layers = rooms.iter().map(|room| layer_of(room) as u8);
    assert!(
        layers.is_sorted(),
        "core, adapters, shell in lib.rs: {rooms:?}"
    );
}

#[test]
fn every_room_stands_on_the_map() {
    for file in rust_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        let path = file
            .strip_prefix(env!("CARGO_MANIFEST_DIR"))
            .expect("below the root")
            .to_str()
            .expect("UTF-8");
        let room = room_of(path);
        let known = room == "lib" || [CORE, DATA, ADAPTERS, SHELL].concat().contains(&room);
        assert!(
            known,
            "{path}: room {room} has no layer; give it one in tests/it/rooms.rs and in lib.rs"
        );
    }
}

#[test]
fn planted_wrong_arrows_are_found() {
    let cases: &[(&str, &str, &[&str])] = &[
        (
            "src/inject/sidecar.rs",
            "\n\nuse crate::k8s::World;",
            &["src/inject/sidecar.rs:3: core room inject uses adapter k8s; pass the value in"],
        ),
        (
            "src/inject.rs",
            "use super::k8s;",
            &["src/inject.rs:1: core room inject uses adapter k8s; pass the value in"],
        ),
        (
            "src/inject/a/b.rs",
            "super::super::super::cli::main()",
            &["src/inject/a/b.rs:1: core room inject uses shell room cli; pass the value in"],
        ),
        (
            "src/ca.rs",
            "use crate::{\n    identity::SpiffeId,\n    tls::{self, Bound},\n};",
            &["src/ca.rs:3: core room ca uses adapter tls; pass the value in"],
        ),
        (
            "src/identity.rs",
            "use crate::ca::Authority;",
            &[
                "src/identity.rs:1: core room identity uses core room ca; move what both need into the upper one",
            ],
        ),
        (
            "src/webhook.rs",
            "fn f() { crate::signing::f() }",
            &["src/webhook.rs:1: adapter webhook uses adapter signing; let cli join them"],
        ),
        (
            "src/webhook.rs",
            "use crate::runtime::tasks;",
            &["src/webhook.rs:1: adapter webhook uses shell room runtime; let cli join them"],
        ),
        (
            "src/runtime/tasks.rs",
            "use crate::cli;",
            &["src/runtime/tasks.rs:1: shell room runtime uses shell room cli; let cli join them"],
        ),
        (
            "src/ca.rs",
            "use std::{fs, io};",
            &[
                "src/ca.rs:1: core room ca names std::fs; take the text as a value; an adapter reads files",
            ],
        ),
        (
            "src/ca.rs",
            "let now = Timestamp::now();",
            &["src/ca.rs:1: core room ca names Timestamp::now; take `now` as an argument"],
        ),
        (
            "src/ca.rs",
            "use std::{\n time::{Duration, SystemTime}};",
            &["src/ca.rs:2: core room ca names std::time::SystemTime; take `now` as an argument"],
        ),
        (
            "src/inject.rs",
            "async fn f() { tokio::time::sleep(x).await }",
            &[
                "src/inject.rs:1: core room inject names tokio; be a plain function; an adapter waits",
            ],
        ),
        (
            "src/ca.rs",
            "use crate::proto::workload;",
            &["src/ca.rs:1: core room ca uses data room proto; pass the value in"],
        ),
        (
            "src/tls.rs",
            "use crate::signing::Signing;",
            &["src/tls.rs:1: adapter tls uses adapter signing; let cli join them"],
        ),
        // and what is right
        ("src/agent/identity/dial.rs", "use crate::tls;", &[]),
        (
            "src/inject.rs",
            "use crate::identity::SpiffeId; // not crate::k8s",
            &[],
        ),
        (
            "src/inject.rs",
            "/// As [`crate::webhook`] calls it.\nuse super::identity;",
            &[],
        ),
        (
            "src/inject.rs",
            "#[cfg(test)]\nmod tests { use crate::k8s; }",
            &[],
        ),
        (
            "src/inject/sidecar.rs",
            "use super::patch; use k8s_openapi::api;",
            &[],
        ),
        (
            "src/webhook.rs",
            "use crate::{inject::Injector, webhook::limits};",
            &[],
        ),
        (
            "src/cli/serve.rs",
            "use crate::{k8s, runtime, standalone};",
            &[],
        ),
        ("src/signing/grpc.rs", "use crate::proto::istio_ca;", &[]),
        (
            "src/ca.rs",
            "use std::{collections::BTreeMap, time::Duration}; struct Kube; let kubelet = 1;",
            &[],
        ),
    ];
    for (path, text, want) in cases {
        assert_eq!(&wrong_arrows(path, text), want, "{path}: {text}");
    }
}

/// The arrows of one file that point the wrong way, as a compiler would print them.
fn wrong_arrows(path: &str, text: &str) -> Vec<String> {
    let room = room_of(path);
    let from = layer_of(room);
    let mut wrong = Vec::new();
    for (line, to) in arrows(path, text) {
        let place = |of: &str| CORE.iter().position(|&core| core == of);
        let way_out = match (from, layer_of(&to)) {
            _ if to == room => continue,
            (Layer::Core, Layer::Core) if place(&to) < place(room) => continue,
            (Layer::Core, Layer::Core) => "move what both need into the upper one",
            (Layer::Core, _) => "pass the value in",
            (_, Layer::Core) | (Layer::Shell, Layer::Adapter) => continue,
            (Layer::Adapter, Layer::Adapter) if to == SHARED => continue,
            (Layer::Adapter | Layer::Shell, Layer::Data) => continue,
            (Layer::Shell, Layer::Shell) if room != "runtime" => continue,
            (Layer::Data, _) => "keep messages plain",
            (Layer::Adapter | Layer::Shell, _) => "let cli join them",
        };
        wrong.push(format!(
            "{path}:{line}: {} uses {}; {way_out}",
            called(room),
            called(&to)
        ));
    }
    if from == Layer::Core {
        for (line, name) in paths(text) {
            let named = |outside: &str| {
                name == outside
                    || name.starts_with(&format!("{outside}::"))
                    || name.ends_with(&format!("::{outside}"))
            };
            if let Some((outside, way_out)) = OUTSIDE.iter().find(|(outside, _)| named(outside)) {
                wrong.push(format!(
                    "{path}:{line}: {} names {outside}; {way_out}",
                    called(room)
                ));
            }
        }
    }
    wrong.dedup();
    wrong
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Core,
    Data,
    Adapter,
    Shell,
}

fn layer_of(room: &str) -> Layer {
    if CORE.contains(&room) {
        Layer::Core
    } else if DATA.contains(&room) {
        Layer::Data
    } else if ADAPTERS.contains(&room) {
        Layer::Adapter
    } else {
        Layer::Shell
    }
}

fn called(room: &str) -> String {
    match layer_of(room) {
        Layer::Core => format!("core room {room}"),
        Layer::Data => format!("data room {room}"),
        Layer::Adapter => format!("adapter {room}"),
        Layer::Shell => format!("shell room {room}"),
    }
}

/// `src/ca.rs` and `src/ca/csr.rs` are of room `ca`.
fn room_of(path: &str) -> &str {
    let below = path.strip_prefix("src/").expect("below src");
    below
        .split('/')
        .next()
        .expect("not empty")
        .trim_end_matches(".rs")
}

/// The rooms that a file uses, each with its line.
fn arrows(path: &str, text: &str) -> Vec<(usize, String)> {
    // In `src/ca.rs` one `super` is the crate, in `src/ca/csr.rs` two.
    let depth = path.trim_end_matches(".rs").split('/').count() - 1;
    let to_the_crate = "super::".repeat(depth);
    paths(text)
        .into_iter()
        .filter_map(|(line, name)| {
            let rest = ["crate::", "malha::", to_the_crate.as_str()]
                .iter()
                .find_map(|prefix| name.strip_prefix(prefix))?;
            let room = rest.split("::").next()?;
            [CORE, DATA, ADAPTERS, SHELL]
                .concat()
                .contains(&room)
                .then(|| (line, room.to_owned()))
        })
        .collect()
}

/// Every path of two or more parts outside comments and tests, with its line; `a::{b, c::d}` gives `a::b` and `a::c::d`.
/// A first part alone (`tokio` in `use {tokio};`) is not one: nothing can be reached through it.
fn paths(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let (mut line, mut current, mut groups) = (1, String::new(), Vec::new());
    let code = code_of(text);
    let mut rest = code.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            c if c.is_alphanumeric() || c == '_' => current.push(c),
            ':' if rest.peek() == Some(&':') => {
                rest.next();
                current.push_str("::");
            }
            '{' if current.ends_with("::") => groups.push(std::mem::take(&mut current)),
            _ => {
                if !current.is_empty() {
                    let whole = groups.concat() + &std::mem::take(&mut current);
                    if whole.contains("::") {
                        found.push((line, whole));
                    }
                }
                match c {
                    '\n' => line += 1,
                    '}' => drop(groups.pop()),
                    // A block inside an import group does not exist; elsewhere groups are empty.
                    '{' if !groups.is_empty() => groups.push(String::new()),
                    _ => {}
                }
            }
        }
    }
    found
}

/// The text up to its tests, with comments blanked.
fn code_of(text: &str) -> String {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let without_comments = code
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    without_comments.map(|line| format!("{line}\n")).collect()
}

fn rust_files(directory: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        let is_test = path
            .file_stem()
            .is_some_and(|stem| stem == "tests" || stem == "testing");
        if path.is_dir() && !is_test {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") && !is_test {
            found.push(path);
        }
    }
    found.sort();
    found
}
