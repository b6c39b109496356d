//! SIGTERM and SIGINT: the first asks everyone to stop, the second wins.

use std::fmt;
use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The process's ear for signals.
pub struct Shutdown {
    terminate: Signal,
    interrupt: Signal,
    stop: CancellationToken,
}

/// A signal that asks the process to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// SIGTERM.
    Terminate,
    /// SIGINT.
    Interrupt,
}

impl Shutdown {
    /// Takes both signals over; from here on neither ends the process by itself.
    ///
    /// # Errors
    /// Where the system refuses the handlers.
    pub fn install() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            stop: CancellationToken::new(),
        })
    }

    /// What everyone watches; cancelled by the first signal, or by whoever wants the process to end.
    pub fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Cancels the token at the first signal and returns at the second one, where nothing is waited for any more:
    /// race it against [`Tasks::run`](crate::runtime::tasks::Tasks::run).
    pub async fn second(mut self) -> Ended {
        let first = self.next().await;
        tracing::info!(signal = %first, "stopping; a second signal ends the process at once");
        self.stop.cancel();
        let second = self.next().await;
        tracing::warn!(signal = %second, "second signal: ending at once");
        second
    }

    async fn next(&mut self) -> Ended {
        tokio::select! {
            _ = self.terminate.recv() => Ended::Terminate,
            _ = self.interrupt.recv() => Ended::Interrupt,
        }
    }
}

impl Ended {
    /// What a shell calls a process that ended by this signal.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Terminate => 128 + 15,
            Self::Interrupt => 128 + 2,
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
        })
    }
}
