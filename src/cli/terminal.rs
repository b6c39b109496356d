//! Where a verb writes: standard output for the result, standard error for everything else.
//!
//! Colour follows the terminal, `NO_COLOR` and `CLICOLOR_FORCE`; the marks follow the locale. A reader that goes away
//! (`malha inject -f big.yaml | head`) ends the verb in silence.

use std::io::{self, IsTerminal as _, Write};

use anstyle::{AnsiColor, Style};
use jiff::Timestamp;

use super::{Exit, Failure};
use crate::ca::Validity;

/// Standard output and standard error, with the terminal's manners.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    utf8: bool,
}

/// How a line of a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// `√`: in order.
    Pass,
    /// `‼`: worth knowing.
    Warn,
    /// `×`: not so.
    Fail,
}

impl Terminal {
    /// Looks at the environment once.
    pub fn detect() -> Self {
        Self {
            utf8: locale_is_utf8(|name| std::env::var(name).ok()),
        }
    }

    /// Writes data as it is: every byte counts, U+007F in a string included.
    ///
    /// # Errors
    /// [`Exit::Done`] where the reader has gone away, [`Exit::Internal`] where the disk is full.
    pub fn result(&mut self, text: &str) -> Result<(), Failure> {
        written(io::stdout().lock(), text)
    }

    /// Writes a result for people. `text` may carry ANSI styles: they are dropped where nobody sees them.
    ///
    /// # Errors
    /// As [`Terminal::result`].
    pub fn styled(&mut self, text: &str) -> Result<(), Failure> {
        written(anstream::stdout().lock(), text)
    }

    /// Writes one line for a human to standard error.
    pub fn note(&mut self, line: &str) {
        // Nobody is left to be told about a standard error that is closed.
        let _ = writeln!(anstream::stderr(), "{line}");
    }

    /// Says what is being waited for, to whoever sits at a terminal.
    pub(super) fn progress(&mut self, line: &str) {
        if io::stderr().is_terminal() {
            self.note(line);
        }
    }

    /// The mark, coloured; `ok`, `!`, `x` where the locale is not UTF-8.
    pub(super) fn mark(&self, mark: Mark) -> String {
        let (utf8, ascii, colour) = match mark {
            Mark::Pass => ("√", "ok", AnsiColor::Green),
            Mark::Warn => ("‼", "!", AnsiColor::Yellow),
            Mark::Fail => ("×", "x", AnsiColor::Red),
        };
        paint(colour.on_default(), if self.utf8 { utf8 } else { ascii })
    }

    /// Says what went wrong, if anything did, and gives the exit code.
    pub fn finish(&mut self, end: Result<Exit, Failure>) -> Exit {
        match end {
            Ok(exit) => exit,
            Err(Failure {
                exit: Exit::Done, ..
            }) => Exit::Done,
            Err(Failure { exit, error }) => {
                let label = paint(AnsiColor::Red.on_default().bold(), "error:");
                self.note(&format!("{label} {}", whole(&error)));
                exit
            }
        }
    }
}

fn written(mut out: impl Write, text: &str) -> Result<(), Failure> {
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| {
            let exit = match error.kind() {
                io::ErrorKind::BrokenPipe => Exit::Done,
                _ => Exit::Internal,
            };
            exit.because(
                anyhow::Error::new(error).context("cannot write the result to standard output"),
            )
        })
}

/// An error and its causes in one line. A cause that an error before it has already quoted is not said again.
pub(super) fn whole(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |said, cause| {
        let cause = cause.to_string();
        match said.as_str() {
            "" => cause,
            _ if said.contains(&cause) => said,
            _ => format!("{said}: {cause}"),
        }
    })
}

/// `text` in a style, which [`Terminal::styled`] and [`Terminal::note`] drop where it is not wanted.
pub(super) fn paint(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// Rows as columns, the first row being the head: no borders, three spaces between, nothing at the end of a line.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table.trim_fmt() + "\n"
}

/// What is left of a certificate's life: `29 d 3 h`, `expired 2 h 5 min ago`.
pub(super) fn time_left(validity: Validity, now: Timestamp) -> String {
    let Validity {
        not_before,
        not_after,
    } = validity;
    if now < not_before {
        format!("begins in {}", span(now, not_before))
    } else if now > not_after {
        format!("expired {} ago", span(not_after, now))
    } else {
        span(now, not_after)
    }
}

/// The time between two instants in its two largest units.
pub(super) fn span(from: Timestamp, to: Timestamp) -> String {
    let seconds = to.duration_since(from).as_secs().unsigned_abs();
    let units = [
        (365 * 86_400, "y"),
        (86_400, "d"),
        (3_600, "h"),
        (60, "min"),
        (1, "s"),
    ];
    let mut rest = seconds;
    let parts: Vec<_> = units
        .iter()
        .map(|(size, unit)| {
            let count = rest / size;
            rest %= size;
            (count, unit)
        })
        .skip_while(|(count, _)| *count == 0)
        .take(2)
        .filter(|(count, _)| *count > 0)
        .map(|(count, unit)| format!("{count} {unit}"))
        .collect();
    if parts.is_empty() {
        "0 s".to_owned()
    } else {
        parts.join(" ")
    }
}

/// The first of these three that is set and not empty decides (POSIX locale order).
fn locale_is_utf8(variable: impl Fn(&str) -> Option<String>) -> bool {
    ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .filter_map(variable)
        .find(|value| !value.is_empty())
        .is_some_and(|value| {
            let value = value.to_ascii_lowercase();
            value.contains("utf-8") || value.contains("utf8")
        })
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::{locale_is_utf8, span, table};

    #[test]
    fn spans_are_told_in_their_two_largest_units() {
        let from = Timestamp::UNIX_EPOCH;
        for (seconds, want) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min"),
            (3_661, "1 h 1 min"),
            (86_399, "23 h 59 min"),
            (86_400, "1 d"),
            (90_061, "1 d 1 h"),
            (5 * 365 * 86_400, "5 y"),
            (366 * 86_400, "1 y 1 d"),
        ] {
            let to = Timestamp::from_second(seconds).expect("in range");
            assert_eq!(span(from, to), want);
        }
    }

    #[test]
    fn tables_have_no_borders_and_no_blanks_at_the_end_of_a_line() {
        let rows = [["NAME", "LEFT"], ["a", "1 h"], ["longer", ""]]
            .map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&rows), "NAME     LEFT\na        1 h\nlonger\n");
    }

    #[test]
    fn the_first_locale_variable_that_is_set_decides() {
        let cases: &[(&[(&str, &str)], bool)] = &[
            (&[], false),
            (&[("LANG", "C")], false),
            (&[("LANG", "en_US.UTF-8")], true),
            (&[("LANG", "de_DE.utf8")], true),
            (&[("LC_ALL", ""), ("LANG", "C.UTF-8")], true),
            (&[("LC_ALL", "C"), ("LANG", "C.UTF-8")], false),
            (&[("LC_CTYPE", "C.UTF-8"), ("LANG", "C")], true),
        ];
        for (variables, want) in cases {
            let lookup = |name: &str| {
                variables
                    .iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| (*value).to_owned())
            };
            assert_eq!(locale_is_utf8(lookup), *want, "{variables:?}");
        }
    }
}
