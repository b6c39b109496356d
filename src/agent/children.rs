//! Child processes of PID 1: those that the agent starts, and those that it inherits.
//!
//! In a container every process that lost its parent becomes a child of PID 1 and stays a zombie until that asks how it
//! ended. So one task asks for whoever has ended, and tells whoever waits.

use std::{
    collections::HashMap,
    fmt, io,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
};

use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// The children of this process.
#[derive(Clone, Debug, Default)]
pub struct Children {
    waiting: Arc<Mutex<HashMap<Pid, oneshot::Sender<Ended>>>>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Killed(Signal),
}

/// A child that runs, or has run.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    end: oneshot::Receiver<Ended>,
}

impl Children {
    /// Has orphans below this process become its children, where it is not PID 1 anyway: processes of a pod may share
    /// their namespace. Before the first child is started, or its orphans are somebody else's.
    pub fn adopt_orphans() {
        if let Err(error) = prctl::set_child_subreaper(true) {
            tracing::debug!(%error, "orphans are left to PID 1");
        }
    }

    /// Starts a program whose end will be told.
    ///
    /// # Errors
    /// What the system says where it cannot be started.
    pub fn start(&self, command: &mut Command) -> io::Result<Child> {
        // Held until the child is known, so that nobody asks for the end of one that is not.
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn()?;
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("Linux's pids are i32"));
        let (ended, end) = oneshot::channel();
        waiting.insert(pid, ended);
        Ok(Child { pid, end })
    }

    /// Reaps for as long as the process lives.
    ///
    /// # Errors
    /// Where the system does not tell of ended children.
    pub async fn reap(self) -> io::Result<()> {
        let mut ended = signal(SignalKind::child())?;
        loop {
            self.reap_those_that_ended();
            ended.recv().await;
        }
    }

    /// Signals come together: one may stand for many children.
    fn reap_those_that_ended(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (pid, how) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Ended::Exited(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Ended::Killed(signal)),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot ask for ended children");
                    return;
                }
            };
            match waiting.remove(&pid) {
                // Who waited may have gone.
                Some(told) => drop(told.send(how)),
                None => tracing::debug!(%pid, %how, "an orphan ended"),
            }
        }
    }
}

impl Child {
    /// Its process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> Ended {
        match (&mut self.end).await {
            Ok(ended) => ended,
            // Only where nobody reaps any more: the process is about to end.
            Err(_) => std::future::pending().await,
        }
    }

    /// Sends a signal; one that has ended meanwhile does not mind.
    pub fn signal(&self, signal: Signal) {
        if let Err(error) = kill(self.pid, signal) {
            tracing::debug!(pid = %self.pid, %signal, %error, "signal not delivered");
        }
    }
}

impl Ended {
    /// What a shell calls it.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Exited(code) => u8::try_from(code).unwrap_or(u8::MAX),
            Self::Killed(signal) => 128_u8.saturating_add(u8::try_from(signal as i32).unwrap_or(0)),
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Killed(signal) => write!(f, "{signal}"),
        }
    }
}
