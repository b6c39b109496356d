//! A herd: when a partition heals, 10,000 agents ask within one second, and the control plane may use 256 MiB.

use std::time::{Duration, Instant};

use tokio::{
    task::JoinSet,
    time::{sleep, sleep_until, timeout},
};

use crate::{
    Bench,
    clock::{self, Rounds},
    serve::{Memory, Server, generator, percentile},
    sign::{Asked, Clients, Signer},
};

const ROUNDS: usize = 5;
const AGENTS: usize = 10_000;
const MEMORY: u64 = 256 << 20;
/// In which they all ask for the first time.
const WITHIN: Duration = Duration::from_secs(1);
/// What one try of an agent may take, and the pauses between its tries: as `src/agent/identity` has them.
const DEADLINE: Duration = Duration::from_secs(10);
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Who is not served by then is lost.
const PATIENCE: Duration = Duration::from_secs(180);

pub(crate) fn run(bench: &Bench) {
    let figures = [
        "herd_served",
        "herd_p99",
        "herd_tries",
        "herd_lost",
        "herd_memory",
    ];
    if !bench.wants(&figures) {
        return;
    }
    let memory = match Memory::of(MEMORY) {
        Ok(memory) => memory,
        Err(error) => {
            println!(
                "# herd_*: not measured, memory cannot be limited here (it takes root): {error}"
            );
            return;
        }
    };
    let runtime = generator();
    let mut told = [(); 5].map(|()| Rounds::default());
    for _ in 0..ROUNDS {
        let directory = tempfile::tempdir().expect("a directory");
        let server = Server::start_within(&memory, directory.path());
        let mut clients = Clients::of(&server, directory.path());
        let herd = runtime.block_on(herd(&mut clients));
        let peak = clock::peak_mib(server.pid()).expect("it was not killed");
        let figures = herd.figures().into_iter().chain([peak]);
        for (rounds, figure) in told.iter_mut().zip(figures) {
            rounds.push(figure);
        }
    }
    let how = [
        (
            "s",
            format!(
                "{AGENTS} agents ask within {} s, each over a connection of its own and again after a pause where it failed: until the last has its certificate",
                WITHIN.as_secs()
            ),
        ),
        (
            "s",
            "of these, from the instant of an agent's first try".to_owned(),
        ),
        ("tries", "by agent, on average".to_owned()),
        (
            "agents",
            format!("not served after {} s", PATIENCE.as_secs()),
        ),
        (
            "MiB",
            format!(
                "the control plane's resident memory at most; it is killed at {}",
                MEMORY >> 20
            ),
        ),
    ];
    for ((name, rounds), (unit, how)) in figures.iter().zip(&told).zip(&how) {
        bench.figure(name, rounds, unit, how);
    }
}

/// What became of one.
struct Herd {
    /// Of those that were served, sorted.
    took: Vec<Duration>,
    tries: usize,
    all: Duration,
}

impl Herd {
    fn figures(&self) -> [f64; 4] {
        [
            self.all.as_secs_f64(),
            percentile(&self.took, 0.99) / 1e3,
            self.tries as f64 / AGENTS as f64,
            (AGENTS - self.took.len()) as f64,
        ]
    }
}

async fn herd(clients: &mut Clients) -> Herd {
    let start = Instant::now();
    let mut agents = JoinSet::new();
    for number in 0..AGENTS {
        let first = start + WITHIN.mul_f64(number as f64 / AGENTS as f64);
        let agent = Agent {
            signer: clients.signer.clone(),
            asked: clients.next(),
            // spread evenly, and alike in every run
            dice: (number as f64 * 0.618_034).fract(),
        };
        agents.spawn(async move {
            sleep_until(first.into()).await;
            let (served, tries) = agent.until_served().await;
            (served.then(|| first.elapsed()), tries)
        });
    }
    let told = agents.join_all().await;
    let mut took: Vec<_> = told.iter().filter_map(|(took, _)| *took).collect();
    took.sort_unstable();
    Herd {
        took,
        tries: told.iter().map(|(_, tries)| tries).sum(),
        all: start.elapsed(),
    }
}

struct Agent {
    signer: Signer,
    asked: Asked,
    dice: f64,
}

impl Agent {
    /// Whether it was, and how often it asked.
    async fn until_served(&self) -> (bool, usize) {
        let mut tries = 0;
        let mut pause = PAUSES.0;
        let asking = async {
            loop {
                tries += 1;
                let served = timeout(DEADLINE, self.signer.serves(self.asked.clone())).await;
                if served == Ok(true) {
                    return;
                }
                sleep(pause.mul_f64(0.5 + 0.5 * self.dice)).await;
                pause = (pause * 2).min(PAUSES.1);
            }
        };
        let served = timeout(PATIENCE, asking).await.is_ok();
        (served, tries)
    }
}
