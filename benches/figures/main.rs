//! `make bench`: the figures of the README, one line each, `bench <name> <value> <unit>`, after a line that says how it
//! was made.
//!
//! ```text
//! make bench                     all of them (about ten minutes after the build)
//! make bench ARGS=inject         those whose name contains a word
//! make bench ARGS=--quick        short rounds: is it still in order of magnitude?
//! ```
//!
//! CPU time comes from the clocks of threads and processes, never from a wall clock on shared cores. What does not
//! take minutes is the median of at least five rounds, with the range beside it.

mod clock;
#[path = "../../tests/support/delta.rs"]
mod delta;
mod failing;
mod herd;
mod inject;
mod issue;
mod load;
mod mesh;
mod pods;
mod serve;
mod sign;

use std::time::Duration;

use crate::clock::Rounds;

/// What is asked for on the command line.
struct Bench {
    words: Vec<String>,
    quick: bool,
}

impl Bench {
    fn wants(&self, names: &[&str]) -> bool {
        self.words.is_empty()
            || self
                .words
                .iter()
                .any(|word| names.iter().any(|name| name.contains(word.as_str())))
    }

    /// How long a round lasts.
    fn round(&self, full: Duration) -> Duration {
        if self.quick { full / 10 } else { full }
    }

    /// Prints one figure.
    fn figure(&self, name: &str, rounds: &Rounds, unit: &str, how: &str) {
        println!("# {name}: {how}; {rounds}");
        println!("bench {name} {} {unit}", clock::readable(rounds.median()));
    }
}

fn main() {
    // cargo passes `--bench`
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let bench = Bench {
        quick: arguments.iter().any(|argument| argument == "--quick"),
        words: arguments
            .into_iter()
            .filter(|argument| !argument.starts_with('-'))
            .collect(),
    };
    println!("# {}", clock::machine());
    if cfg!(debug_assertions) {
        println!("# a build without optimisation: these figures mean nothing");
    }
    inject::run(&bench);
    issue::run(&bench);
    serve::run(&bench);
    sign::run(&bench);
    herd::run(&bench);
    failing::run(&bench);
    mesh::run(&bench);
}
