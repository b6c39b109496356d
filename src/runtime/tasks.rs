//! The process's tasks: each has a name and an owner, and the first that ends ends the process by that name.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::future::Future;
use std::time::Duration;

use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Tasks that live as long as the process.
pub struct Tasks {
    stop: CancellationToken,
    running: JoinSet<Result<(), Cause>>,
    names: HashMap<Id, Name>,
}

#[derive(Clone, Copy, Debug)]
struct Name {
    name: &'static str,
    /// It serves the others, and so nobody waits for it.
    attends: bool,
}

type Cause = Box<dyn Error + Send + Sync>;

/// How a task may end: with nothing to say, or with a result.
pub trait Outcome: Send + 'static {
    /// The cause, if it failed.
    fn cause(self) -> Result<(), Cause>;
}

impl Outcome for () {
    fn cause(self) -> Result<(), Cause> {
        Ok(())
    }
}

impl<E: Into<Cause> + Send + 'static> Outcome for Result<(), E> {
    fn cause(self) -> Result<(), Cause> {
        self.map_err(Into::into)
    }
}

/// Why the process ends although nobody asked it to, or did not end cleanly when asked.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A task ended that should have gone on.
    #[error("{name} ended although nobody asked it to")]
    Unasked {
        /// Its name.
        name: &'static str,
    },
    /// A task gave up.
    #[error("{name} failed")]
    Failed {
        /// Its name.
        name: &'static str,
        /// Why.
        source: Cause,
    },
    /// A task panicked; the message is in the log.
    #[error("{name} panicked; this is a bug in malha")]
    Panicked {
        /// Its name.
        name: &'static str,
    },
    /// Told to stop, these did not in time.
    #[error("still busy after {} s: {}", .deadline.as_secs(), .names.join(", "))]
    Late {
        /// Their names.
        names: Vec<&'static str>,
        /// How long they had.
        deadline: Duration,
    },
}

impl Tasks {
    /// None yet. All of them are told to stop by `stop`, and `stop` is cancelled when one of them ends.
    pub fn new(stop: CancellationToken) -> Self {
        Self {
            stop,
            running: JoinSet::new(),
            names: HashMap::new(),
        }
    }

    /// Starts a task that ends by itself when the process is told to stop.
    pub fn own<T: Outcome>(
        &mut self,
        name: &'static str,
        task: impl Future<Output = T> + Send + 'static,
    ) {
        self.start(name, false, task);
    }

    /// Starts a task that serves the others to the very end, such as the admin port: it is dropped after the last of them.
    pub fn attend<T: Outcome>(
        &mut self,
        name: &'static str,
        task: impl Future<Output = T> + Send + 'static,
    ) {
        self.start(name, true, task);
    }

    fn start<T: Outcome>(
        &mut self,
        name: &'static str,
        attends: bool,
        task: impl Future<Output = T> + Send + 'static,
    ) {
        let task = self.running.spawn(async { task.await.cause() });
        self.names.insert(task.id(), Name { name, attends });
    }

    /// Waits for the stop, or for the first task that ends without it; then gives the others `deadline` to end.
    ///
    /// # Errors
    /// The first thing that went wrong. `Ok` means: told to stop, and all have.
    pub async fn run(mut self, deadline: Duration) -> Result<(), TaskError> {
        let first = self.until_the_first_end().await;
        if let Err(error) = &first {
            tracing::error!(error = error as &dyn Error, "stopping");
        }
        self.stop.cancel();
        let last = match timeout(deadline, self.until_all_ended()).await {
            Ok(ended) => ended,
            Err(_) => Err(TaskError::Late {
                names: self.left(),
                deadline,
            }),
        };
        if let Err(error) = &last {
            tracing::error!(error = error as &dyn Error, "not stopped cleanly");
        }
        first.and(last)
    }

    async fn until_the_first_end(&mut self) -> Result<(), TaskError> {
        let ended = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Ok(()),
            Some(ended) = self.running.join_next_with_id() => ended,
        };
        let (name, end) = self.name_and_end(ended);
        // It may have heard the stop before we did.
        if end.is_ok() && !self.stop.is_cancelled() {
            return Err(TaskError::Unasked { name });
        }
        end
    }

    async fn until_all_ended(&mut self) -> Result<(), TaskError> {
        let mut result = Ok(());
        while !self.left().is_empty() {
            let ended = self
                .running
                .join_next_with_id()
                .await
                .expect("a name is kept as long as its task runs");
            let (_, end) = self.name_and_end(ended);
            result = result.and(end);
        }
        result
    }

    /// Those that are waited for, in the alphabet's order.
    fn left(&self) -> Vec<&'static str> {
        let mut left: Vec<_> = self
            .names
            .values()
            .filter(|name| !name.attends)
            .map(|name| name.name)
            .collect();
        left.sort_unstable();
        left
    }

    fn name_and_end(
        &mut self,
        ended: Result<(Id, Result<(), Cause>), JoinError>,
    ) -> (&'static str, Result<(), TaskError>) {
        let id = match &ended {
            Ok((id, _)) => *id,
            Err(error) => error.id(),
        };
        let Name { name, .. } = self
            .names
            .remove(&id)
            .expect("every task is named when it is started");
        let end = match ended {
            Ok((_, Ok(()))) => Ok(()),
            Ok((_, Err(source))) => Err(TaskError::Failed { name, source }),
            Err(_) => Err(TaskError::Panicked { name }),
        };
        (name, end)
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names.values()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn told_to_stop_all_end_and_nothing_went_wrong() {
        let stop = CancellationToken::new();
        let mut tasks = Tasks::new(stop.clone());
        tasks.own("webhook", stop.clone().cancelled_owned());
        tasks.own("lease", stop.clone().cancelled_owned());
        stop.cancel();
        tasks.run(DEADLINE).await.expect("a clean end");
    }

    #[tokio::test]
    async fn the_first_unasked_end_stops_the_others_and_is_named() {
        let stop = CancellationToken::new();
        let mut tasks = Tasks::new(stop.clone());
        tasks.own("webhook", stop.clone().cancelled_owned());
        tasks.own("lease", async {});
        let error = tasks.run(DEADLINE).await.expect_err("the lease ended");
        assert_eq!(error.to_string(), "lease ended although nobody asked it to");
        assert!(stop.is_cancelled());
    }

    #[tokio::test]
    async fn a_failure_keeps_its_cause() {
        let mut tasks = Tasks::new(CancellationToken::new());
        tasks.own("journal", async { Err::<(), _>("the disk is full") });
        let error = tasks.run(DEADLINE).await.expect_err("the journal failed");
        assert_eq!(error.to_string(), "journal failed");
        assert_eq!(
            error.source().map(ToString::to_string).as_deref(),
            Some("the disk is full")
        );
    }

    #[tokio::test]
    async fn a_panic_ends_the_process_by_name() {
        let mut tasks = Tasks::new(CancellationToken::new());
        tasks.own("informers", async {
            if let Some(message) = Some("on purpose") {
                panic!("{message}");
            }
        });
        let error = tasks.run(DEADLINE).await.expect_err("a panic");
        assert_eq!(
            error.to_string(),
            "informers panicked; this is a bug in malha"
        );
    }

    #[tokio::test]
    async fn who_does_not_end_in_time_is_named_and_left_behind() {
        let stop = CancellationToken::new();
        let mut tasks = Tasks::new(stop.clone());
        tasks.own("webhook", stop.clone().cancelled_owned());
        tasks.own("lease", pending::<()>());
        stop.cancel();
        let error = tasks
            .run(Duration::ZERO)
            .await
            .expect_err("the lease hangs");
        assert_eq!(error.to_string(), "still busy after 0 s: lease");
    }

    #[tokio::test]
    async fn nobody_waits_for_a_task_that_attends_but_its_end_is_noticed() {
        let stop = CancellationToken::new();
        let mut tasks = Tasks::new(stop.clone());
        tasks.attend("admin", pending::<()>());
        tasks.own("webhook", stop.clone().cancelled_owned());
        stop.cancel();
        tasks.run(DEADLINE).await.expect("a clean end");

        let mut tasks = Tasks::new(CancellationToken::new());
        tasks.attend("admin", async {});
        tasks.run(DEADLINE).await.expect_err("the admin port ended");
    }
}
