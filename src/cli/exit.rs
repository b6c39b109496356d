//! How a verb ends.

use std::process::ExitCode;

/// The exit code of a verb. The numbers from 64 on are those of `sysexits.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: done.
    Done,
    /// 1: a check failed, or an object was denied.
    Refused,
    /// 2: only warnings, and `--strict` was given.
    Warned,
    /// 64: the command line is wrong.
    Usage,
    /// 65: input cannot be read, or is not what it claims to be.
    BadInput,
    /// 69: the cluster or the control plane is not reachable.
    Unreachable,
    /// 70: a fault of our own.
    Internal,
    /// 75: every try of a write was lost to another writer.
    LostRaces,
}

impl Exit {
    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Refused => 1,
            Self::Warned => 2,
            Self::Usage => 64,
            Self::BadInput => 65,
            Self::Unreachable => 69,
            Self::Internal => 70,
            Self::LostRaces => 75,
        }
    }

    /// A failure that ends with this code: `Exit::BadInput.because(error)`.
    pub fn because(self, error: impl Into<anyhow::Error>) -> Failure {
        Failure {
            exit: self,
            error: error.into(),
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Why a verb could not do its work. The error's text names the object, the act, the reason and what to try.
#[derive(Debug)]
pub struct Failure {
    /// The code to end with.
    pub exit: Exit,
    /// What to tell the reader; its sources are printed after it.
    pub error: anyhow::Error,
}

/// Gives an error the code that a verb ends with.
pub(super) trait OrExit<T> {
    /// `result`, or a [`Failure`] with this code.
    fn or_exit(self, exit: Exit) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> OrExit<T> for Result<T, E> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure> {
        self.map_err(|error| exit.because(error))
    }
}
