//! PID 1 of the sidecar: gets the pod's identity, serves it to Envoy, supervises Envoy.

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use malha::{
    agent::{
        admin::Admin,
        dump, log,
        run::{run, told},
        settings::{self, Level, Settings},
        wait,
    },
    clock::Clock,
};

const HELP: &str = "\
malha-agent: the pod's side of the mesh

Usage: malha-agent <command>

Commands:
  run                   Be PID 1 of the sidecar: identity, Envoy, probes, metrics, drain
  wait [--timeout 60s]  Return when the sidecar is ready
  dump                  Print what Envoy holds as JSON, without keys
Options:
  -h, --help            This text
  -V, --version         The version

Settings are environment variables, which the injector writes into the pod.
";

/// Wrong words on the command line.
const USAGE: u8 = 64;
/// Wrong words in the environment.
const CONFIG: u8 = 78;
/// Somebody who should answer does not.
const UNAVAILABLE: u8 = 69;
/// Not yet.
const NOT_READY: u8 = 75;

enum Command {
    Run,
    Wait(Duration),
    Dump,
    Help,
    Version,
}

fn main() -> ExitCode {
    let words: Vec<String> = env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match parse(&words) {
        Ok(command) => act(command),
        Err(fault) => fail(USAGE, &format!("{fault}\nTry: malha-agent --help")),
    }
}

fn parse(words: &[&str]) -> Result<Command, String> {
    match words {
        ["run"] => Ok(Command::Run),
        ["dump"] => Ok(Command::Dump),
        ["wait"] => Ok(Command::Wait(Duration::from_secs(60))),
        ["wait", "--timeout"] => Err("--timeout needs a duration such as 60s".to_owned()),
        ["wait", "--timeout", text] => patience(text),
        ["wait", word] if word.starts_with("--timeout=") => {
            patience(word.trim_start_matches("--timeout="))
        }
        ["-h" | "--help" | "help"] => Ok(Command::Help),
        ["-V" | "--version"] => Ok(Command::Version),
        [] => Err("a command is needed: run, wait or dump".to_owned()),
        [known @ ("run" | "wait" | "dump"), more @ ..] => {
            Err(format!("{known} does not take {:?}", more.join(" ")))
        }
        [other, ..] => Err(format!("{other:?} is no command: run, wait or dump")),
    }
}

fn patience(text: &str) -> Result<Command, String> {
    match settings::duration(text) {
        Some(patience) => Ok(Command::Wait(patience)),
        None => Err(format!(
            "--timeout is {text:?}; a duration such as 60s, 500ms or 2m"
        )),
    }
}

fn act(command: Command) -> ExitCode {
    match command {
        Command::Help => print(HELP),
        Command::Version => print(concat!("malha-agent ", env!("CARGO_PKG_VERSION"), "\n")),
        Command::Run => start(),
        Command::Wait(patience) => {
            let port = match settings::status_port(variable) {
                Ok(port) => port,
                Err(error) => return fail(CONFIG, &error.to_string()),
            };
            match block_on(wait::wait(port, patience)) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(NOT_READY, &error.to_string()),
            }
        }
        Command::Dump => print_dump(),
    }
}

fn start() -> ExitCode {
    let settings = match Settings::read(variable) {
        Ok(settings) => settings,
        Err(error) => {
            log::init(Level::Info);
            return fail(CONFIG, &error.to_string());
        }
    };
    log::init(settings.log.agent);
    if let Err(error) = harden() {
        tracing::warn!(%error, "the process could not give up core dumps and ptrace");
    }
    settings.log();
    match block_on(run(settings, clock())) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "the sidecar ends");
            fail(error.exit_code(), &told(&error))
        }
    }
}

fn print_dump() -> ExitCode {
    let socket = settings::directory(variable).join("admin.sock");
    let admin = Admin::new(&socket);
    let envoys = match block_on(admin.read(dump::QUESTION)) {
        Ok(envoys) => envoys,
        Err(error) => return fail(UNAVAILABLE, &told(&error)),
    };
    match serde_json::from_slice(&envoys) {
        Ok(envoys) => print(&format!("{:#}\n", dump::dump(&envoys))),
        Err(error) => fail(UNAVAILABLE, &format!("Envoy's dump is no JSON: {error}")),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one place where the agent reads the real clock"
)]
fn clock() -> Clock {
    Clock::new(jiff::Timestamp::now)
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("Linux has timers and epoll")
        .block_on(future)
}

/// Neither a core file nor another process of the same user gets at the pod's key.
fn harden() -> Result<(), nix::Error> {
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?;
    nix::sys::prctl::set_dumpable(false)
}

fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(74),
    }
}

fn fail(code: u8, text: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "malha-agent: {text}");
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_mean_nothing_are_named() {
        for (words, want) in [
            (&[][..], "a command is needed: run, wait or dump"),
            (&["ready"], "\"ready\" is no command: run, wait or dump"),
            (&["run", "--fast"], "run does not take \"--fast\""),
            (
                &["wait", "--timeout"],
                "--timeout needs a duration such as 60s",
            ),
            (
                &["wait", "--timeout", "60"],
                "--timeout is \"60\"; a duration such as 60s, 500ms or 2m",
            ),
        ] {
            assert_eq!(parse(words).err().as_deref(), Some(want));
        }
        for words in [
            &["wait", "--timeout", "60s"][..],
            &["wait", "--timeout=60s"],
            &["wait"],
        ] {
            assert!(
                matches!(parse(words), Ok(Command::Wait(patience)) if patience.as_secs() == 60)
            );
        }
    }
}
