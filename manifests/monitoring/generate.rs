//! `make dashboards`: what Grafana imports, written from `dashboards.rs` to `manifests/monitoring/dashboards/`.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};

mod dashboards;

fn main() -> Result<()> {
    for dashboard in &dashboards::DASHBOARDS {
        let path = PathBuf::from(format!(
            "manifests/monitoring/dashboards/{}.json",
            dashboard.name
        ));
        fs::write(&path, dashboards::to_text(dashboard))
            .context("run this from the root of the tree")?;
        println!("{}", path.display());
    }
    Ok(())
}
