//! Where a verb writes: standard output for the result, standard error for everything else.
//!
//! Colour follows the terminal, `NO_COLOR` and `CLICOLOR_FORCE`; the marks follow the locale. A reader that goes away
//! (`malha inject -f big.yaml | head`) ends the verb in silence.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};

use super::{Exit, Failure};

/// Standard output and standard error, with the terminal's manners.
#[derive(Debug)]
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

    /// Writes the result. `text` may carry ANSI styles: they are dropped where nobody sees them.
    ///
    /// # Errors
    /// [`Exit::Done`] where the reader has gone away, [`Exit::BadInput`]'s neighbour `70` where the disk is full.
    pub fn result(&mut self, text: &str) -> Result<(), Failure> {
        let mut out = anstream::stdout().lock();
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

    /// Writes one line for a human to standard error.
    pub fn note(&mut self, line: &str) {
        // Nobody is left to be told about a standard error that is closed.
        let _ = writeln!(anstream::stderr(), "{line}");
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
                self.note(&format!("{label} {error:#}"));
                exit
            }
        }
    }
}

/// `text` in a style, which [`Terminal::result`] and [`Terminal::note`] drop where it is not wanted.
pub(super) fn paint(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
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
    use super::locale_is_utf8;

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
