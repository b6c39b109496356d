//! CPU clocks, rounds and the machine they ran on.

use std::{fmt, fs, time::Duration};

use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};

/// CPU time of this thread so far.
pub(crate) fn thread() -> Duration {
    read(ClockId::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU time of another process so far, all its threads together.
pub(crate) fn process(pid: u32) -> Duration {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid fits"));
    read(clock_getcpuclockid(pid).expect("the process runs"))
}

fn read(clock: ClockId) -> Duration {
    TimeSpec::into(clock_gettime(clock).expect("the kernel has CPU clocks"))
}

/// What the same measurement gave several times.
#[derive(Default)]
pub(crate) struct Rounds(Vec<f64>);

impl Rounds {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    pub(crate) fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }
}

impl fmt::Display for Rounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(least), Some(most)) = (self.0.first(), self.0.last()) else {
            return f.write_str("no rounds");
        };
        write!(
            f,
            "median of {} rounds, {} to {}",
            self.0.len(),
            readable(*least),
            readable(*most)
        )
    }
}

/// CPU microseconds of one call: `rounds` times as many calls as fit into `each`, after one such round to warm up.
pub(crate) fn micros_per_call(rounds: usize, each: Duration, mut call: impl FnMut()) -> Rounds {
    let mut calls = 1_u32;
    loop {
        let spent = timed(calls, &mut call);
        if spent >= each / 4 {
            calls = (f64::from(calls) * each.as_secs_f64() / spent.as_secs_f64()).ceil() as u32;
            break;
        }
        calls *= 2;
    }
    let mut measured = Rounds::default();
    for _ in 0..rounds {
        measured.push(timed(calls, &mut call).as_secs_f64() * 1e6 / f64::from(calls));
    }
    measured
}

/// CPU time of so many calls.
pub(crate) fn timed(calls: u32, call: &mut impl FnMut()) -> Duration {
    let start = thread();
    for _ in 0..calls {
        call();
    }
    thread() - start
}

/// Three digits that count.
pub(crate) fn readable(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Memory in use.
pub(crate) fn resident_mib(pid: u32) -> f64 {
    status(pid, "VmRSS:").expect("the process runs")
}

/// Memory in use at most since the process began; `None` where it is gone.
pub(crate) fn peak_mib(pid: u32) -> Option<f64> {
    status(pid, "VmHWM:")
}

/// A line of `/proc/PID/status` that counts KiB, in MiB.
fn status(pid: u32, name: &str) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(name))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}

/// Processor, cores, kernel.
pub(crate) fn machine() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("an unnamed processor", |(_, name)| name);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let busy = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!(
        "{model}, {cores} cores, Linux {}, load average before {}",
        kernel.trim(),
        busy.split(' ').next().unwrap_or("unknown")
    )
}
