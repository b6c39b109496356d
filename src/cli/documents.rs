//! Manifests in and out: files, directories and standard input become documents, and documents become text again.
//!
//! `-f` -> [`InputArgs::read`] -> [`Document`]s -> (changed or not) -> [`render`]
//!
//! What is read is what `kubectl` would read: YAML 1.1 booleans and octals, duplicate keys refused. What is written
//! reads the same to it: a string that looks like another type is quoted, as a key too. A document that nobody
//! changed is printed as it was, comments and the digits of its numbers included, unless it changes its format.

mod yaml;

use std::{
    fmt, fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use serde_json::Value;

use super::{Exit, Failure, exit::OrExit as _};

/// A manifest set larger than this is no manifest set: the API server takes objects of at most 1.5 MiB.
const INPUT_LIMIT: u64 = 256 << 20;

/// What `-f` names.
#[derive(Debug, clap::Args)]
pub(super) struct InputArgs {
    /// A file, a directory (its *.yaml, *.yml and *.json), or - for standard input; may be repeated.
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Look into the directories below, too.
    #[arg(short = 'R', long)]
    recursive: bool,
}

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// YAML documents.
    Yaml,
    /// JSON, one object after the other.
    Json,
}

/// One object as somebody wrote it.
#[derive(Debug)]
pub(super) struct Document {
    /// Where it begins.
    pub(super) origin: Origin,
    /// The object; always a map with `apiVersion` and `kind`.
    pub(super) value: Value,
    /// The text it was read from and its format, for a document that is printed as it was.
    text: Option<(Format, String)>,
}

/// A line of a file, as an editor would jump to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    /// The file, or `standard input`.
    pub(super) file: String,
    /// Counted from 1.
    pub(super) line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

impl InputArgs {
    /// Every object that `-f` names, in order; at least one.
    ///
    /// # Errors
    /// [`Exit::BadInput`] with the file and line at fault.
    pub(super) fn read(&self) -> Result<Vec<Document>, Failure> {
        self.try_read().or_exit(Exit::BadInput)
    }

    fn try_read(&self) -> anyhow::Result<Vec<Document>> {
        let mut documents = Vec::new();
        for source in self.sources()? {
            documents.extend(parse(&source.text, &source.name)?);
        }
        if documents.is_empty() {
            return Err(anyhow!(
                "{} holds no object; give a manifest with apiVersion and kind",
                self.names()
            ));
        }
        Ok(documents)
    }

    fn sources(&self) -> anyhow::Result<Vec<Source>> {
        if self.files.iter().filter(|file| is_stdin(file)).count() > 1 {
            return Err(anyhow!(
                "-f - is given twice, and standard input can be read only once"
            ));
        }
        let mut sources = Vec::new();
        for path in &self.files {
            if is_stdin(path) {
                sources.push(Source::new("standard input", io::stdin().lock())?);
            } else if path.is_dir() {
                let files = manifests_in(path, self.recursive)?;
                if files.is_empty() {
                    return Err(anyhow!(
                        "directory {} holds no *.yaml, *.yml or *.json{}",
                        path.display(),
                        if self.recursive {
                            ""
                        } else {
                            "; -R looks into directories below, too"
                        }
                    ));
                }
                for file in files {
                    sources.push(Source::open(&file)?);
                }
            } else {
                sources.push(Source::open(path)?);
            }
        }
        Ok(sources)
    }

    fn names(&self) -> String {
        let names: Vec<_> = self
            .files
            .iter()
            .map(|file| {
                if is_stdin(file) {
                    "standard input".to_owned()
                } else {
                    file.display().to_string()
                }
            })
            .collect();
        names.join(", ")
    }
}

/// The text of `documents`. Those for which `changed` is false are printed as they were, where the format allows it.
pub(super) fn render(documents: &[(Document, bool)], format: Format) -> anyhow::Result<String> {
    let mut out = String::new();
    for (document, changed) in documents {
        if format == Format::Yaml && !out.is_empty() {
            out.push_str("---\n");
        }
        match &document.text {
            Some((written, text)) if !changed && *written == format => out.push_str(text),
            _ => out.push_str(&match format {
                Format::Json => serde_json::to_string_pretty(&document.value)?,
                Format::Yaml => yaml::write(&document.value)?,
            }),
        }
        if !out.ends_with('\n') {
            out.push('\n');
        }
    }
    Ok(out)
}

/// A text's documents, each written anew.
pub(super) fn reprint(text: &str) -> anyhow::Result<String> {
    let documents = parse(text, "standard input")?;
    let documents: Vec<_> = documents.into_iter().map(|it| (it, true)).collect();
    render(&documents, Format::Yaml)
}

/// One result as a YAML document that reads the same to `kubectl`.
pub(super) fn to_yaml(value: &Value) -> anyhow::Result<String> {
    Ok(yaml::write(value)?)
}

/// A text and where it came from.
struct Source {
    name: String,
    text: String,
}

impl Source {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let file = fs::File::open(path).with_context(|| format!("cannot open {name}"))?;
        Self::new(&name, file)
    }

    fn new(name: &str, reader: impl io::Read) -> anyhow::Result<Self> {
        let mut bytes = Vec::new();
        reader
            .take(INPUT_LIMIT + 1)
            .read_to_end(&mut bytes)
            .with_context(|| format!("cannot read {name}"))?;
        if bytes.len() as u64 > INPUT_LIMIT {
            return Err(anyhow!(
                "{name} is larger than {} MiB, which no manifest is",
                INPUT_LIMIT >> 20
            ));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            anyhow!(
                "{name} is not text: byte {} is not UTF-8",
                error.utf8_error().valid_up_to()
            )
        })?;
        // Editors on Windows put a byte order mark there.
        let text = text
            .strip_prefix('\u{feff}')
            .map_or_else(|| text.clone(), str::to_owned);
        Ok(Self {
            name: name.to_owned(),
            text,
        })
    }
}

fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// The manifests of a directory by name, as `kubectl -f DIR` takes them; files first, then what is below.
fn manifests_in(directory: &Path, recursive: bool) -> anyhow::Result<Vec<PathBuf>> {
    let mut entries: Vec<PathBuf> = fs::read_dir(directory)
        .and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.path()))
                .collect()
        })
        .with_context(|| format!("cannot list directory {}", directory.display()))?;
    entries.sort();
    let (directories, files): (Vec<_>, Vec<_>) =
        entries.into_iter().partition(|path| path.is_dir());
    let mut found: Vec<_> = files
        .into_iter()
        .filter(|path| {
            path.extension()
                .and_then(|extension| extension.to_str())
                .is_some_and(|extension| ["yaml", "yml", "json"].contains(&extension))
        })
        .collect();
    if recursive {
        for below in directories {
            found.extend(manifests_in(&below, true)?);
        }
    }
    Ok(found)
}

fn parse(text: &str, file: &str) -> anyhow::Result<Vec<Document>> {
    let begins_like_json = text.trim_start().starts_with(['{', '[']);
    if begins_like_json && let Ok(documents) = parse_json(text, file) {
        return Ok(documents);
    }
    // A flow map is YAML, too, and the YAML reader's errors name the line.
    yaml::split(text)
        .into_iter()
        .filter_map(|chunk| parse_yaml(chunk, file).transpose())
        .collect()
}

/// JSON objects one after the other, as `kubectl get -o json` and `jq` write them.
fn parse_json(text: &str, file: &str) -> anyhow::Result<Vec<Document>> {
    let mut documents = Vec::new();
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<yaml::Unique>();
    loop {
        let end_of_last = stream.byte_offset();
        let Some(next) = stream.next() else { break };
        let value = next?.0;
        let rest = &text[end_of_last..stream.byte_offset()];
        let own = rest.trim_start();
        let begin = end_of_last + rest.len() - own.len();
        let line = 1 + text[..begin].matches('\n').count();
        let origin = Origin {
            file: file.to_owned(),
            line,
        };
        let own = (Format::Json, own.to_owned());
        documents.push(Document::new(origin, value, Some(own))?);
    }
    Ok(documents)
}

fn parse_yaml(chunk: yaml::Chunk<'_>, file: &str) -> anyhow::Result<Option<Document>> {
    let origin = Origin {
        file: file.to_owned(),
        line: chunk.first_line,
    };
    let Some(value) = yaml::read(&chunk).map_err(|fault| anyhow!("{file}:{fault}"))? else {
        return Ok(None);
    };
    let text = chunk.verbatim().map(|text| (Format::Yaml, text));
    Document::new(origin, value, text).map(Some)
}

impl Document {
    /// What is wrong with this document, with its place.
    pub(super) fn fault(&self, fault: impl Into<anyhow::Error>) -> anyhow::Error {
        fault.into().context(self.origin.to_string())
    }

    fn new(origin: Origin, value: Value, text: Option<(Format, String)>) -> anyhow::Result<Self> {
        let field = |name: &str| {
            value
                .get(name)
                .and_then(Value::as_str)
                .is_some_and(|text| !text.is_empty())
        };
        if !value.is_object() {
            return Err(anyhow!(
                "{origin}: is {}, not an object with apiVersion and kind",
                name_of_type(&value)
            ));
        }
        for name in ["apiVersion", "kind"] {
            if !field(name) {
                return Err(anyhow!(
                    "{origin}: has no {name}, so it is no Kubernetes object"
                ));
            }
        }
        Ok(Self {
            origin,
            value,
            text,
        })
    }
}

fn name_of_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "plain text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What YAML 1.1 resolves to another type than a string, roughly: words and whatever begins like a number.
    pub(super) fn looks_like_yaml_1_1(text: &str) -> bool {
        let words = [
            "y", "n", "yes", "no", "on", "off", "true", "false", "null", "~", "",
        ];
        words.iter().any(|word| text.eq_ignore_ascii_case(word))
            || text
                .strip_prefix(['+', '-', '.'])
                .unwrap_or(text)
                .starts_with(|c: char| c.is_ascii_digit())
    }

    fn documents(text: &str) -> Vec<Document> {
        parse(text, "pod.yaml").expect("readable")
    }

    #[test]
    fn a_document_that_nobody_changed_is_printed_as_it_was() {
        let text = "# ours\napiVersion:  v1\nkind: 'Pod' # odd\n---\napiVersion: v1\nkind: Service";
        let rendered: Vec<_> = documents(text)
            .into_iter()
            .map(|document| (document, false))
            .collect();
        assert_eq!(
            render(&rendered, Format::Yaml).expect("writable"),
            format!("{text}\n")
        );
    }

    #[test]
    fn json_streams_are_read_with_their_lines() {
        let found = documents(
            "{\"apiVersion\": \"v1\",\n \"kind\": \"Pod\"}\n{\"apiVersion\": \"v1\", \"kind\": \"List\"}",
        );
        let lines: Vec<_> = found.iter().map(|document| document.origin.line).collect();
        assert_eq!(lines, [1, 3]);
    }

    #[test]
    fn numbers_stay_as_they_were_written_where_nobody_changed_the_document() {
        let text = "{\"apiVersion\":\"v1\", \"kind\":\"A\", \"x\":1e2, \"y\":1.10}\n{\n  \"apiVersion\": \"v1\", \"kind\": \"B\",\n  \"x\": 123456789012345678901234\n}";
        let render_as = |changed: bool, format| {
            let documents = documents(text).into_iter().map(|one| (one, changed));
            render(&documents.collect::<Vec<_>>(), format).expect("writable")
        };
        assert_eq!(render_as(false, Format::Json), format!("{text}\n"));
        assert_eq!(
            render_as(false, Format::Yaml),
            render_as(true, Format::Yaml)
        );
        assert!(render_as(true, Format::Json).contains("\"x\": 100,"));
    }

    /// `priority: 100.0` does not decode into an integer of the API's.
    #[test]
    fn an_integer_is_read_as_one_however_it_is_written() {
        let cases = [
            ("1e2", "100"),
            ("100.0", "100"),
            ("-2.50e1", "-25"),
            ("0.0", "0"),
            ("9007199254740992.0", "9007199254740992"),
            ("-9007199254740992.0", "-9007199254740992"),
            ("1.5", "1.5"),
            // beyond what a float holds exactly, no digit is made up
            ("9007199254740994.0", "9007199254740994.0"),
            ("1e30", "1e+30"),
            ("18446744073709551615", "18446744073709551615"),
        ];
        for (text, want) in cases {
            for manifest in [
                format!("{{\"apiVersion\":\"v1\",\"kind\":\"A\",\"x\":{text}}}"),
                format!("apiVersion: v1\nkind: A\nx: {text}\n"),
            ] {
                let found = documents(&manifest);
                assert_eq!(found[0].value["x"].to_string(), want, "{manifest}");
            }
        }
    }

    #[test]
    fn what_is_no_object_is_refused_with_its_place() {
        let cases = [
            ("hello", "pod.yaml:1: is plain text"),
            ("- a\n- b\n", "pod.yaml:1: is a list"),
            ("a: 1\n", "pod.yaml:1: has no apiVersion"),
            (
                "apiVersion: v1\nkind: Pod\n---\napiVersion: v1\n",
                "pod.yaml:4: has no kind",
            ),
            ("apiVersion: v1\nkind: [Pod]\n", "pod.yaml:1: has no kind"),
            (
                "{\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"kind\": \"Pod\"}",
                "duplicate",
            ),
            ("a: \"\u{0}\"", "pod.yaml:1:"),
        ];
        for (text, want) in cases {
            let said = parse(text, "pod.yaml").expect_err(text).to_string();
            assert!(said.contains(want), "{text}: {said}");
        }
    }
}
