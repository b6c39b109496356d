//! The real `malha` as a child process: started, listened to, signalled, and gone when the test ends.

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A running `malha`. Dropped: killed and reaped; in a failing test its output is shown first.
pub(crate) struct Program {
    child: Child,
    output: Arc<(Mutex<Output>, Condvar)>,
}

#[derive(Default)]
struct Output {
    lines: Vec<String>,
    open_pipes: usize,
}

impl Program {
    /// Starts `malha ARGS` with an empty environment but `PATH` and `HOME`.
    pub(crate) fn malha(args: &[&str]) -> Self {
        Self::malha_in(Path::new("."), args, &[])
    }

    /// The same in a directory and with variables.
    pub(crate) fn malha_in(directory: &Path, args: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::start(env!("CARGO_BIN_EXE_malha"), directory, args, variables)
    }

    /// Starts `malha-agent ARGS` with these variables, `PATH` and `HOME`.
    pub(crate) fn agent(args: &[&str], variables: &[(&str, &str)]) -> Self {
        let program = env!("CARGO_BIN_EXE_malha-agent");
        Self::start(program, Path::new("."), args, variables)
    }

    fn start(program: &str, directory: &Path, args: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(program);
        command.args(args).current_dir(directory).env_clear();
        for name in ["PATH", "HOME"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        let mut child = command
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let output = Arc::new((
            Mutex::new(Output {
                lines: Vec::new(),
                open_pipes: 2,
            }),
            Condvar::new(),
        ));
        collect(child.stdout.take().expect("piped"), &output);
        collect(child.stderr.take().expect("piped"), &output);
        Self { child, output }
    }

    /// The process id, for `/proc`.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The first line (of either stream) that holds `text`; fails when none comes `within` that time.
    pub(crate) fn wait_for(&self, text: &str, within: Duration) -> String {
        let deadline = Instant::now() + within;
        let (lock, changed) = &*self.output;
        let mut output = lock.lock().expect("no reader panics");
        loop {
            if let Some(line) = output.lines.iter().find(|line| line.contains(text)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || output.open_pipes == 0 {
                let said = output.lines.join("\n");
                drop(output);
                panic!("malha did not say {text:?} within {within:?}; it said:\n{said}");
            }
            output = changed
                .wait_timeout(output, left)
                .expect("no reader panics")
                .0;
        }
    }

    /// Everything said so far.
    pub(crate) fn said(&self) -> String {
        self.output
            .0
            .lock()
            .expect("no reader panics")
            .lines
            .join("\n")
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid fits");
        kill(Pid::from_raw(pid), signal).expect("our child is there until it is reaped");
    }

    /// Ends it at once.
    pub(crate) fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for the end, and for what was said until then: a pipe may hold words of a process that is gone. One that
    /// a grandchild keeps open is not waited for beyond a second.
    pub(crate) fn wait(&mut self, within: Duration) -> ExitStatus {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().expect("our child can be waited for") {
                let (lock, changed) = &*self.output;
                let output = lock.lock().expect("no reader panics");
                drop(
                    changed.wait_timeout_while(output, Duration::from_secs(1), |output| {
                        output.open_pipes > 0
                    }),
                );
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "malha did not end within {within:?}; it said:\n{}",
                self.said()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("-- malha (pid {}) said --\n{}\n--", self.pid(), self.said());
        }
        self.end();
    }
}

fn collect(pipe: impl Read + Send + 'static, output: &Arc<(Mutex<Output>, Condvar)>) {
    let output = Arc::clone(output);
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            output
                .0
                .lock()
                .expect("no waiter panics while it holds this")
                .lines
                .push(line);
            output.1.notify_all();
        }
        output
            .0
            .lock()
            .expect("no waiter panics while it holds this")
            .open_pipes -= 1;
        output.1.notify_all();
    });
}
