//! The registry of metrics, and what is known of the process itself.

use std::fmt::Error;
use std::fs;

use jiff::Timestamp;
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::sys::time::TimeValLike;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::runtime::{memory, telemetry};

/// A registry that knows the build and the process; rooms add what they count. `started` is now.
pub fn registry(started: Timestamp) -> Registry {
    let mut registry = Registry::default();
    registry.register(
        "malha_build",
        "What is running",
        Info::new(vec![
            ("version", env!("CARGO_PKG_VERSION")),
            (
                "revision",
                option_env!("MALHA_REVISION").unwrap_or("unknown"),
            ),
        ]),
    );
    registry.register_collector(Box::new(Process { started }));
    registry
}

/// Read anew at each scrape, from files of the kernel that only tell of ourselves.
#[derive(Debug)]
struct Process {
    started: Timestamp,
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut gauge = |name, help, value: Option<f64>| match value {
            Some(value) => {
                let gauge = ConstGauge::new(value);
                let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
                gauge.encode(metric)
            }
            None => Ok(()),
        };
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        gauge(
            "process_resident_memory_bytes",
            "Resident memory",
            kib(&status, "VmRSS:"),
        )?;
        gauge(
            "process_virtual_memory_bytes",
            "Virtual memory",
            kib(&status, "VmSize:"),
        )?;
        gauge("process_threads", "Threads", number(&status, "Threads:"))?;
        gauge(
            "process_open_fds",
            "Open file descriptors",
            fs::read_dir("/proc/self/fd")
                .ok()
                .map(|open| open.count() as f64),
        )?;
        gauge(
            "process_max_fds",
            "File descriptors that may be open",
            getrlimit(Resource::RLIMIT_NOFILE)
                .ok()
                .map(|(soft, _)| soft as f64),
        )?;
        gauge(
            "process_start_time_seconds",
            "Start, in seconds since 1970",
            Some(self.started.as_duration().as_secs_f64()),
        )?;
        gauge(
            "malha_memory_limit_bytes",
            "What the control group grants",
            memory::limit().map(|bytes| bytes as f64),
        )?;
        let mut counter = |name, help, value: f64| {
            let counter = ConstCounter::new(value);
            let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(metric)
        };
        counter(
            "malha_log_lines_lost",
            "Log lines that nobody read in time",
            telemetry::lines_lost() as f64,
        )?;
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let micros =
                usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
            counter(
                "process_cpu_seconds",
                "Processor time, user and system",
                micros as f64 / 1e6,
            )?;
        }
        Ok(())
    }
}

/// A line of `/proc/self/status` such as `VmRSS:      1234 kB`, in bytes.
fn kib(status: &str, key: &str) -> Option<f64> {
    number(status, key).map(|kib| kib * 1024.0)
}

fn number(status: &str, key: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn the_process_is_told_in_the_names_that_dashboards_know() {
        let mut text = String::new();
        encode(&mut text, &registry(Timestamp::UNIX_EPOCH)).expect("writing to a string");
        for name in [
            "malha_build_info{version=\"",
            "process_resident_memory_bytes ",
            "process_virtual_memory_bytes ",
            "process_cpu_seconds_total ",
            "process_open_fds ",
            "process_max_fds ",
            "process_threads ",
            "process_start_time_seconds 0.0",
        ] {
            assert!(text.contains(&format!("\n{name}")), "{name} in\n{text}");
        }
    }

    #[test]
    fn a_line_of_the_status_file_is_read_in_bytes() {
        let status = "Name:\tmalha\nVmRSS:\t    2048 kB\nThreads:\t7\n";
        assert_eq!(kib(status, "VmRSS:"), Some(2_097_152.0));
        assert_eq!(number(status, "Threads:"), Some(7.0));
        assert_eq!(kib(status, "VmSwap:"), None);
    }
}
