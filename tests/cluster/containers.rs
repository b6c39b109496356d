//! The containers of a namespace's pods as the machine sees them: processes in cgroups and networks of their own.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use crate::node::{Namespace, Node};

/// A container that runs.
pub(crate) struct Container {
    pub(crate) pod: String,
    pub(crate) name: String,
    /// Its cgroup, of the controller that counts processor time where each has a hierarchy of its own.
    cgroup: PathBuf,
}

/// Every container that runs in a namespace.
pub(crate) async fn of(node: &Node, namespace: &Namespace) -> Vec<Container> {
    let pods = namespace.kubectl(&["get", "pods", "-o", "json"]).await;
    let pods: Value = serde_json::from_str(&pods).expect("JSON");
    let root = node.kubeconfig().with_file_name("cgroup");
    let root = std::fs::read_to_string(root).expect("a cluster's cgroup");
    let unified = Path::new("/sys/fs/cgroup").join(root.trim());
    let root = match unified.exists() {
        true => unified,
        false => Path::new("/sys/fs/cgroup/cpuacct").join(root.trim()),
    };
    let mut found = Vec::new();
    for pod in pods["items"].as_array().into_iter().flatten() {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        for list in ["initContainerStatuses", "containerStatuses"] {
            for status in pod["status"][list].as_array().into_iter().flatten() {
                let id = status["containerID"].as_str().unwrap_or_default();
                let id = id.trim_start_matches("containerd://");
                // An init container that has ended has none.
                if let Some(cgroup) = below(&root, id) {
                    found.push(Container {
                        pod: name.to_owned(),
                        name: status["name"].as_str().unwrap_or_default().to_owned(),
                        cgroup,
                    });
                }
            }
        }
    }
    found
}

/// The one of this name in this pod.
pub(crate) fn find<'c>(containers: &'c [Container], pod: &str, name: &str) -> &'c Container {
    let mut all = containers.iter();
    let found = all.find(|container| container.pod == pod && container.name == name);
    found.unwrap_or_else(|| panic!("{name} of {pod} runs"))
}

/// The directory of this name, however deep.
fn below(directory: &Path, name: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(directory).ok()?.flatten();
    let mut directories = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir());
    directories.find_map(|path| match path.ends_with(name) {
        true => Some(path),
        false => below(&path, name),
    })
}

impl Container {
    /// Its processes, by the numbers that they have on this machine.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let listed = std::fs::read_to_string(self.cgroup.join("cgroup.procs"));
        let listed = listed.unwrap_or_default();
        listed
            .lines()
            .filter_map(|line| line.parse().ok())
            .collect()
    }

    /// The process that runs this program.
    pub(crate) fn pid_of(&self, program: &str) -> Option<u32> {
        self.pids().into_iter().find(|pid| comm(*pid) == program)
    }

    /// What its processes have spent.
    pub(crate) fn cpu(&self) -> Duration {
        // Two hierarchies of the kernel: one directory for each controller, or one for all.
        if let Ok(usage) = std::fs::read_to_string(self.cgroup.join("cpuacct.usage")) {
            return Duration::from_nanos(usage.trim().parse().expect("nanoseconds"));
        }
        let stat = std::fs::read_to_string(self.cgroup.join("cpu.stat"));
        let stat = stat.expect("the cgroup is there");
        let mut lines = stat.lines();
        let usage = lines.find_map(|line| line.strip_prefix("usage_usec "));
        let usage = usage.expect("the kernel counts").parse();
        Duration::from_micros(usage.expect("microseconds"))
    }

    /// The pod's network, which stays what it is for as long as this is held.
    pub(crate) fn network(&self) -> File {
        let pids = self.pids();
        let pid = pids.first().expect("the container runs");
        File::open(format!("/proc/{pid}/ns/net")).expect("the pod's network")
    }
}

/// The name of a process's program, as the kernel cuts it.
pub(crate) fn comm(pid: u32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    name.unwrap_or_default().trim().to_owned()
}

/// Puts this thread into a pod's network for the rest of its life.
pub(crate) fn enter(network: &File) {
    setns(network, CloneFlags::CLONE_NEWNET).expect("entering the pod's network");
}
