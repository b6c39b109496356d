//! How much memory the process may use.

use std::fs;

/// What the control group of this process grants, in bytes; `None` where there is no limit to be read.
///
/// In a container the group is mounted as the root of its hierarchy; elsewhere it lies where `/proc/self/cgroup` says.
pub fn limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    files(&groups)
        .iter()
        .find_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok())
}

/// Where the limit may stand: of version 2 (`max` where there is none), of version 1; each in the group, then in the root.
fn files(groups: &str) -> Vec<String> {
    let group = |of: &str| {
        let path = groups.lines().find_map(|line| line.split_once(of));
        path.map_or("", |(_, path)| path.trim_end_matches('/'))
    };
    let (second, first) = (group("0::"), group(":memory:"));
    let mut files = vec![
        format!("/sys/fs/cgroup{second}/memory.max"),
        "/sys/fs/cgroup/memory.max".to_owned(),
        format!("/sys/fs/cgroup/memory{first}/memory.limit_in_bytes"),
        "/sys/fs/cgroup/memory/memory.limit_in_bytes".to_owned(),
    ];
    files.dedup();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_looked_for_in_the_group_and_then_in_what_a_container_is_shown() {
        let first = "8:cpu,cpuacct:/\n7:memory:/kubepods/pod1/c\n1:name=systemd:/\n";
        assert_eq!(
            files(first)[1..],
            [
                "/sys/fs/cgroup/memory/kubepods/pod1/c/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            ]
        );
        let second = "0::/malha.slice/one\n";
        assert_eq!(
            files(second)[..2],
            [
                "/sys/fs/cgroup/malha.slice/one/memory.max",
                "/sys/fs/cgroup/memory.max",
            ]
        );
        assert_eq!(
            files("0::/\n"),
            [
                "/sys/fs/cgroup/memory.max",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            ]
        );
    }
}
