//! Processes of a test: started with a log of their own, stopped and restarted at will, and gone when the test is.
//!
//! A test process can end without running a single destructor (SIGKILL, an abort, `exit` of the test harness with a
//! `static` still alive). So every process is put into one process group that belongs to a small shell, and that shell
//! waits for the end of a pipe whose other end only this test process holds. When the pipe closes, for whatever
//! reason, the shell kills its group and removes the directory.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The shell that ends everything of one cluster when this process is gone.
pub(crate) struct Janitor {
    shell: Child,
    /// Closing it is the signal.
    _alive: ChildStdin,
}

impl Janitor {
    /// Starts the shell for what will live in `dir`. With `MALHA_RIG_KEEP` set, logs and keys are left for reading.
    pub(crate) fn hire(dir: &Path) -> Result<Self> {
        // The shell leads the group, and SIGKILL for the group would end it before it has removed anything; so
        // the work is done from a session of its own (`setsid` forks for the leader of a group).
        let script = r#"read -r _; exec setsid sh -c 'kill -s KILL -- "-$1"; [ -n "$3" ] || rm -rf -- "$2"' sh "$$" "$1" "$2""#;
        let mut shell = Command::new("/bin/sh")
            .args(["-c", script, "janitor"])
            .arg(dir)
            .arg(if keep() { "keep" } else { "" })
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start /bin/sh")?;
        let alive = shell.stdin.take().context("stdin of the janitor")?;
        Ok(Self {
            shell,
            _alive: alive,
        })
    }

    /// The process group that ends with this test process.
    pub(crate) fn group(&self) -> i32 {
        i32::try_from(self.shell.id()).expect("the kernel's process ids are i32")
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        // The shell is in the group too: nothing of a cluster that is dropped outlives this line.
        let _ = kill(Pid::from_raw(-self.group()), Signal::SIGKILL);
        let _ = self.shell.wait();
    }
}

/// Whether the directories of finished clusters are left in place.
pub(crate) fn keep() -> bool {
    std::env::var_os("MALHA_RIG_KEEP").is_some_and(|value| !value.is_empty())
}

/// One program with its arguments; it can be started again after it was stopped.
pub(crate) struct Process {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    log: PathBuf,
    group: i32,
    child: Mutex<Option<Child>>,
}

impl Process {
    /// A process that is not started yet. Its output goes to `NAME.log` in `logs`.
    pub(crate) fn new(name: &str, program: &Path, logs: &Path, janitor: &Janitor) -> Self {
        Self {
            name: name.to_owned(),
            program: program.to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            log: logs.join(format!("{name}.log")),
            group: janitor.group(),
            child: Mutex::new(None),
        }
    }

    /// Adds arguments.
    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of its environment.
    pub(crate) fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// What it is called.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Starts it, or starts it again after it has ended. The log goes on where it was.
    pub(crate) fn start(&self) -> Result<()> {
        let mut child = self.child();
        if let Some(running) = child.as_mut()
            && running.try_wait()?.is_none()
        {
            bail!("{} is running already", self.name);
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        let started = Command::new(&self.program)
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(self.group)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        *child = Some(started);
        Ok(())
    }

    /// Its process id while it runs.
    pub(crate) fn id(&self) -> Option<u32> {
        let mut child = self.child();
        let running = child.as_mut()?;
        matches!(running.try_wait(), Ok(None)).then(|| running.id())
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&self) -> Option<ExitStatus> {
        self.child().as_mut()?.try_wait().ok().flatten()
    }

    /// An error with the end of the log if it is not running.
    pub(crate) fn check(&self) -> Result<()> {
        match self.ended() {
            None => Ok(()),
            Some(status) => bail!(
                "{} has ended ({status}); the end of its log:\n{}",
                self.name,
                self.tail(30)
            ),
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(&self) {
        if let Some(mut child) = self.child().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and waits until it has ended.
    ///
    /// # Errors
    /// It was still there after `patience`; it is killed then.
    pub(crate) async fn terminate(&self, patience: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            if Instant::now() > deadline {
                self.kill();
                bail!(
                    "{} was still there {patience:?} after SIGTERM; the end of its log:\n{}",
                    self.name,
                    self.tail(30)
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Freezes it: connections stay open and nobody answers.
    pub(crate) fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets it go on after [`Process::pause`].
    pub(crate) fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let id = self
            .id()
            .with_context(|| format!("{} is not running", self.name))?;
        // Nobody reaps it between the two lines: only we can, and we hold `self`.
        kill(Pid::from_raw(i32::try_from(id)?), signal)?;
        Ok(())
    }

    /// Its whole output so far.
    pub(crate) fn output(&self) -> String {
        std::fs::read(&self.log)
            .map(|log| String::from_utf8_lossy(&log).into_owned())
            .unwrap_or_default()
    }

    /// The last lines of its output.
    pub(crate) fn tail(&self, lines: usize) -> String {
        let output = self.output();
        let lines: Vec<_> = output.lines().rev().take(lines).collect();
        lines
            .into_iter()
            .rev()
            .map(|line| format!("    {line}\n"))
            .collect()
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
