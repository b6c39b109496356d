//! What is committed under `src/proto/` is what `make proto` writes.

use std::{fs, path::Path};

#[path = "../../proto/generate.rs"]
#[expect(dead_code, reason = "its main is for `make proto`")]
mod generate;

#[test]
fn the_generated_messages_are_no_older_than_their_proto_files() {
    let fresh = generate::generate().expect("the .proto files compile");
    assert!(!fresh.is_empty());
    for (path, text) in fresh {
        let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join(&path);
        let committed = fs::read_to_string(committed).unwrap_or_default();
        assert!(
            committed == text,
            "{path} is stale: run make proto and commit it"
        );
    }
}
