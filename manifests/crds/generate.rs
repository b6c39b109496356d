//! `make crds`: the CustomResourceDefinitions, written from the types of `malha::mesh` to `manifests/crds/`.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use malha::mesh::crd;

fn main() -> Result<()> {
    let path = Path::new("manifests/crds/peerauthentications.yaml");
    fs::write(path, text()?).context("run this from the root of the tree")?;
    println!("{}", path.display());
    Ok(())
}

fn text() -> Result<String> {
    let definition = serde_json::to_value(crd::peer_authentication())?;
    let yaml = serde_saphyr::to_string(&definition)?;
    Ok(format!(
        "# Written by `make crds` from src/mesh/crd.rs.\n{yaml}"
    ))
}
