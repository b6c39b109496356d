//! `malha-init` as the kubelet starts it, and as it should not.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use super::scene::{Namespace, text};

pub(super) const INIT: &str = env!("CARGO_BIN_EXE_malha-init");

/// How a run ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) code: Option<i32>,
    /// Standard error.
    pub(super) said: String,
}

impl Ended {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            said: text(&output.stderr),
        }
    }

    /// It must have ended so, and have said this.
    #[track_caller]
    pub(super) fn must(self, code: i32, words: &str) -> Self {
        assert_eq!(self.code, Some(code), "{}", self.said);
        assert!(
            self.said.contains(words),
            "{words:?} is not in {}",
            self.said
        );
        self
    }
}

/// As root, which has every capability.
pub(super) fn init(namespace: &Namespace, arguments: &[&str]) -> Ended {
    let output = namespace.command(INIT).args(arguments).output();
    Ended::of(output.expect("nsenter starts"))
}

/// As root, on what looks to it like a kernel without the packet filter.
pub(super) fn without_netfilter(namespace: &Namespace, arguments: &[&str]) -> Ended {
    let output = namespace
        .command("python3")
        .args(["-c", include_str!("without_netfilter.py"), INIT])
        .args(arguments)
        .output();
    Ended::of(output.expect("nsenter starts"))
}

/// A copy of the program with a file capability, as in the image.
pub(super) struct Image {
    directory: tempfile::TempDir,
}

impl Image {
    pub(super) fn with(capability: Option<&str>) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let everybody = fs::Permissions::from_mode(0o755);
        fs::set_permissions(directory.path(), everybody).expect("it is ours");
        let image = Self { directory };
        fs::copy(INIT, image.program()).expect("a copy");
        if let Some(capability) = capability {
            let set = Command::new("setcap")
                .arg(capability)
                .arg(image.program())
                .status();
            let status = set.expect("setcap starts");
            assert!(status.success(), "setcap {capability}");
        }
        image
    }

    fn program(&self) -> PathBuf {
        self.directory.path().join("malha-init")
    }

    /// As the injector's security context has it: uid and gid 65534, `drop: [ALL]`, `allowPrivilegeEscalation: false`,
    /// and of capabilities what is said.
    pub(super) fn run(&self, namespace: &Namespace, held: Held, arguments: &[&str]) -> Ended {
        let (dropped, permitted) = match held {
            Held::NetAdmin => (
                "cap_net_raw,cap_sys_admin,cap_dac_override",
                "cap_net_admin=p",
            ),
            Held::Nothing => ("cap_net_admin,cap_net_raw,cap_sys_admin", "="),
        };
        let output = namespace
            .command("capsh")
            .arg(format!("--drop={dropped}"))
            .args(["--keep=1", "--gid=65534", "--uid=65534"])
            .arg(format!("--caps={permitted}"))
            .arg("--no-new-privs")
            .arg(format!("--shell={}", shown(&self.program())))
            .arg("--")
            .args(arguments)
            .output();
        Ended::of(output.expect("capsh starts"))
    }
}

/// What a container was given.
#[derive(Clone, Copy)]
pub(super) enum Held {
    /// `add: [NET_ADMIN]`
    NetAdmin,
    /// `drop: [ALL]` alone.
    Nothing,
}

fn shown(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
