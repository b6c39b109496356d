//! `malha doc`: what an alert, a check or a code means and what to do, from the page that travels with the program.
//!
//! `docs/codes.md` -> [`Section`]s by heading -> one of them, or their names

use std::fmt::Write as _;

use anyhow::anyhow;

use super::{Exit, Failure, Terminal};

/// Say what an alert, a check or a code means, and what to do.
///
/// The same as docs/codes.md of this version, without a network.
///
/// Exit codes: 0; 65 where there is no such word.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The word, such as MalhaDown, ca-bundle or TokenExpired; without it, all are listed.
    word: Option<String>,
}

const PAGE: &str = include_str!("../../docs/codes.md");

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let Some(word) = args.word else {
        terminal.result(&list())?;
        return Ok(Exit::Done);
    };
    let mut sections = sections();
    let found = sections.find(|section| section.word.eq_ignore_ascii_case(&word));
    let found = found.ok_or_else(|| {
        Exit::BadInput.because(anyhow!(
            "there is no alert, check or code {word:?}; `malha doc` lists all"
        ))
    })?;
    terminal.result(&format!("{}\n\n{}\n", found.word, found.text))?;
    Ok(Exit::Done)
}

/// What stands between two headings.
struct Section {
    /// The heading above, such as `Alerts`.
    group: &'static str,
    word: &'static str,
    text: &'static str,
}

fn sections() -> impl Iterator<Item = Section> {
    let groups = PAGE.split("\n## ").skip(1);
    groups.flat_map(|text| {
        let mut parts = text.split("\n### ");
        let head = parts.next().unwrap_or_default();
        let group = head.lines().next().unwrap_or_default();
        parts.map(move |part| {
            let (word, text) = part.split_once('\n').unwrap_or((part, ""));
            Section {
                group,
                word,
                text: text.trim(),
            }
        })
    })
}

fn list() -> String {
    let mut text = String::new();
    let mut group = "";
    for section in sections() {
        if section.group != group {
            group = section.group;
            let gap = if text.is_empty() { "" } else { "\n" };
            let _ = writeln!(text, "{gap}{group}");
        }
        let _ = writeln!(text, "  {}", section.word);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use serde_json::Value;

    use super::*;
    use crate::{
        cli::check,
        inject::{Reason, WarningCode},
    };

    #[test]
    fn every_word_has_its_section_and_no_section_is_stale() {
        let mut words: BTreeSet<String> = alerts();
        words.extend(check::IDS.map(str::to_owned));
        words.extend(Reason::ALL.iter().map(ToString::to_string));
        words.extend(WarningCode::ALL.iter().map(ToString::to_string));
        words.extend(codes());
        let written: Vec<_> = sections().map(|section| section.word.to_owned()).collect();
        let unique: BTreeSet<_> = written.iter().cloned().collect();
        assert_eq!(unique.len(), written.len(), "a section twice");
        assert_eq!(words, unique);
        for section in sections() {
            assert!(section.text.len() > 20, "{}", section.word);
        }
    }

    fn alerts() -> BTreeSet<String> {
        let rules = include_str!("../../manifests/monitoring/alerts.yaml");
        let rules: Value = serde_saphyr::from_str(rules).expect("YAML");
        let groups = rules["spec"]["groups"].as_array().expect("groups").iter();
        let rules = groups.flat_map(|group| group["rules"].as_array().expect("rules"));
        let name = |rule: &Value| {
            let name = rule["alert"].as_str().expect("a name").to_owned();
            let runbook = format!("malha doc {name}");
            assert_eq!(rule["annotations"]["runbook"], *runbook, "{name}");
            name
        };
        rules.map(name).collect()
    }

    /// What each `fn code` in the sources answers: errors carry data and so have no list of themselves.
    fn codes() -> BTreeSet<String> {
        let mut codes = BTreeSet::new();
        let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).expect("a directory") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    directories.push(path);
                } else if path.extension().is_some_and(|end| end == "rs") {
                    codes.extend(answers(&fs::read_to_string(&path).expect("a file")));
                }
            }
        }
        assert!(codes.len() > 30, "{codes:?}");
        codes
    }

    fn answers(source: &str) -> Vec<String> {
        let functions = source.split("fn code(").skip(1);
        let functions = functions.filter_map(|rest| {
            let (signature, rest) = rest.split_once('{')?;
            let (body, _) = rest.split_once("\n    }\n")?;
            let answers = signature.contains("self") && signature.contains("&'static str");
            answers.then_some(body)
        });
        let literals = functions.flat_map(|body| body.split('"').skip(1).step_by(2));
        literals.map(str::to_owned).collect()
    }
}
