//! Writes RFC 6902 operations straight into their JSON text.
//!
//! Values are fragments that are JSON already; pointers are built from tokens and escaped here (RFC 6901 section 3),
//! so that no text of a pod can become structure. Only `add`, `replace`, `remove` and `move` are ever written: the
//! API server patches the very object it sent, so a `test` could only turn a fault of ours into a refused pod.

use std::fmt::{self, Write};

use super::lax::{is_plain, write_text};

/// A list of operations, in the order in which they are applied.
#[derive(Debug, Default)]
pub(super) struct Operations {
    json: String,
}

impl Operations {
    pub(super) fn is_empty(&self) -> bool {
        self.json.is_empty()
    }

    /// Adds a member, inserts an item, or appends one (`-`).
    pub(super) fn add(&mut self, pointer: &Pointer, value: &str) {
        self.begin("add", pointer);
        self.value(value);
    }

    pub(super) fn add_text(&mut self, pointer: &Pointer, text: &str) {
        self.begin("add", pointer);
        self.json.push_str(",\"value\":");
        write_text(text, &mut self.json);
        self.json.push('}');
    }

    pub(super) fn replace(&mut self, pointer: &Pointer, value: &str) {
        self.begin("replace", pointer);
        self.value(value);
    }

    pub(super) fn remove(&mut self, pointer: &Pointer) {
        self.begin("remove", pointer);
        self.json.push('}');
    }

    /// Takes the value at `from` out and adds it at `to`.
    pub(super) fn shift(&mut self, from: &Pointer, to: &Pointer) {
        self.begin("move", to);
        self.json.push_str(",\"from\":\"");
        self.json.push_str(&from.json);
        self.json.push_str("\"}");
    }

    /// The whole patch.
    pub(super) fn into_json(self) -> Vec<u8> {
        let mut json = String::with_capacity(self.json.len() + 2);
        json.push('[');
        json.push_str(&self.json);
        json.push(']');
        json.into_bytes()
    }

    fn begin(&mut self, op: &str, pointer: &Pointer) {
        if !self.json.is_empty() {
            self.json.push(',');
        }
        self.json.push_str("{\"op\":\"");
        self.json.push_str(op);
        self.json.push_str("\",\"path\":\"");
        self.json.push_str(&pointer.json);
        self.json.push('"');
    }

    fn value(&mut self, value: &str) {
        self.json.push_str(",\"value\":");
        self.json.push_str(value);
        self.json.push('}');
    }
}

/// A JSON Pointer (RFC 6901), escaped for JSON as it is built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pointer {
    json: String,
}

impl Pointer {
    pub(super) fn new(tokens: &[&str]) -> Self {
        let mut pointer = Self {
            json: String::with_capacity(64),
        };
        for token in tokens {
            pointer.push(token);
        }
        pointer
    }

    /// One level further down.
    pub(super) fn key(&self, token: &str) -> Self {
        let mut pointer = self.clone();
        pointer.push(token);
        pointer
    }

    pub(super) fn index(&self, index: usize) -> Self {
        let mut pointer = self.clone();
        write!(pointer.json, "/{index}").expect("a string takes everything");
        pointer
    }

    /// Behind the last item.
    pub(super) fn end(&self) -> Self {
        self.key("-")
    }

    fn push(&mut self, token: &str) {
        self.json.push('/');
        if is_plain(token) && !token.contains(['~', '/']) {
            self.json.push_str(token);
            return;
        }
        let escaped = token.replace('~', "~0").replace('/', "~1");
        let quoted = serde_json::to_string(&escaped).expect("a string always serialises");
        let inner = quoted
            .strip_prefix('"')
            .and_then(|rest| rest.strip_suffix('"'));
        self.json
            .push_str(inner.expect("a JSON string stands in quotes"));
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_token_becomes_structure() {
        for (token, json) in [
            ("sidecar.istio.io/inject", "/sidecar.istio.io~1inject"),
            ("a~b", "/a~0b"),
            ("~1", "/~01"),
            ("quote\"back\\slash", "/quote\\\"back\\\\slash"),
            ("line\nfeed", "/line\\nfeed"),
            ("", "/"),
        ] {
            assert_eq!(Pointer::new(&[token]).to_string(), json, "{token:?}");
        }
    }

    #[test]
    fn operations_read_back_as_a_patch() {
        let list = Pointer::new(&["spec", "containers"]);
        let mut operations = Operations::default();
        operations.add(&list.end(), "{\"name\":\"a\"}");
        operations.add_text(&Pointer::new(&["metadata", "labels", "x/y"]), "\"\n");
        operations.shift(&list.index(2), &list.index(0));
        operations.remove(&list.index(1).key("tty"));
        operations.replace(&list.index(1).key("stdin"), "true");
        let patch: json_patch::Patch =
            serde_json::from_slice(&operations.into_json()).expect("a patch");
        let mut pod = serde_json::json!({
            "metadata": {"labels": {}},
            "spec": {"containers": [{"name": "b", "tty": true, "stdin": false}, {"name": "c"}]}
        });
        json_patch::patch(&mut pod, &patch).expect("it applies");
        let wanted = serde_json::json!({
            "metadata": {"labels": {"x/y": "\"\n"}},
            "spec": {"containers": [{"name": "a"}, {"name": "b", "stdin": true}, {"name": "c"}]}
        });
        assert_eq!(pod, wanted);
    }
}
