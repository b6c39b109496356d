//! `make certs`: development certificates from the control plane's own profiles, written to `certs/dev/`.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use anyhow::{Context, Result, anyhow};
use malha::{
    ca::{
        Authority, KeyedChain, LeafPolicy, Serial,
        journal::IntermediateState,
        key::SecretKey,
        pem,
        profile::Profile,
        rotation::{RotationPolicy, first},
    },
    identity::{SpiffeId, TrustDomain},
    runtime::clock::system,
};
use zeroize::Zeroizing;

fn main() -> Result<()> {
    let domain = std::env::args().nth(1);
    let domain: TrustDomain = domain.as_deref().unwrap_or("cluster.local").parse()?;
    let now = system().now();
    let (root_key, intermediate_key) = (new_key()?, new_key()?);
    let dice = [roll()?, roll()?];
    let policy = RotationPolicy::default();
    let (journal, _) = first(&domain, root_key, intermediate_key, dice, now, &policy)?;
    let authority = Authority::from_journal(&journal, &LeafPolicy::default())?;
    let intermediate = journal
        .active()
        .intermediate(IntermediateState::Active)
        .ok_or_else(|| anyhow!("a new journal has an intermediate"))?;

    let directory = Path::new("certs/dev");
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .context("certs/dev: run this from the root of the tree")?;
    let write = |name: &str, text: &str| write(&directory.join(name), text);
    write("root.pem", &authority.bundle().to_pem())?;
    write(
        "intermediate.pem",
        &pem::encode("CERTIFICATE", intermediate.certificate.der()),
    )?;
    let hosts = ["malha.malha-system.svc", "malha.malha-system", "localhost"];
    let dns_names = |hosts: &[&str]| hosts.iter().map(|host| (*host).to_owned()).collect();
    let profiles = [
        (
            "webhook",
            Profile::Webhook {
                dns_names: dns_names(&[hosts[0], hosts[2]]),
            },
        ),
        (
            "control-plane",
            Profile::ControlPlane {
                id: SpiffeId::new(&domain, "malha-system", "malha")?,
                dns_names: dns_names(&hosts),
            },
        ),
        (
            "workload",
            Profile::Workload(SpiffeId::new(&domain, "default", "default")?),
        ),
    ];
    for (name, profile) in profiles {
        let key = new_key()?;
        let life = policy.leaf.default;
        let serial = Serial::random(roll()?);
        let issued = authority.issue(&key.public_key(), &profile, life, serial, now)?;
        let keyed = KeyedChain::new(issued, &key);
        let chain: String = keyed
            .chain
            .iter()
            .map(|der| pem::encode("CERTIFICATE", der))
            .collect();
        write(&format!("{name}.pem"), &chain)?;
        write(
            &format!("{name}-key.pem"),
            &Zeroizing::new(pem::encode("PRIVATE KEY", &keyed.key)),
        )?;
        println!("certs/dev/{name}.pem: until {}", keyed.validity.not_after);
    }
    println!(
        "trust certs/dev/root.pem; try: openssl verify -x509_strict -CAfile certs/dev/root.pem -untrusted certs/dev/intermediate.pem certs/dev/workload.pem"
    );
    Ok(())
}

/// Anew, so that the mode is ours even where a file of another one was.
fn write(path: &Path, text: &str) -> Result<()> {
    let describe = || path.display().to_string();
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(describe);
        }
        _ => {}
    }
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(describe)?;
    file.write_all(text.as_bytes()).with_context(describe)
}

fn new_key() -> Result<SecretKey> {
    let pair = rcgen::KeyPair::generate()?;
    Ok(SecretKey::from_pkcs8(Zeroizing::new(pair.serialize_der()))?)
}

fn roll() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| anyhow!("no random bytes"))?;
    Ok(bytes)
}
