//! YAML as `kubectl` understands it.
//!
//! `kubectl` reads YAML 1.1 (`yes` is true, `0755` is 493). So does [`read`]; and [`write()`] quotes every string that
//! YAML 1.1 or 1.2 would take for something else.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, SeqAccess, Visitor},
    ser::{SerializeMap as _, SerializeSeq as _},
};
use serde_json::{Map, Number, Value};

/// One document of a stream.
pub(super) struct Chunk<'a> {
    text: &'a str,
    /// The line of the file it begins at, counted from 1.
    pub(super) first_line: usize,
}

/// What is wrong with a chunk, and in which line of the file; prints as `LINE: fault`.
#[derive(Debug)]
pub(super) struct Fault {
    line: usize,
    text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.text)
    }
}

/// Splits a stream at its `---` and `...` lines. Neither can stand at the start of a line inside a scalar, block or
/// quoted (YAML 1.2.2, rule `c-forbidden`), so lines are enough.
pub(super) fn split(text: &str) -> Vec<Chunk<'_>> {
    let mut chunks = Vec::new();
    let (mut begin, mut first_line, mut offset) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let next = offset + line.len();
        if let Some(marker) = marker(line)
            && !is_only_directives(&text[begin..offset])
        {
            chunks.push(Chunk {
                text: &text[begin..offset],
                first_line,
            });
            // `--- {a: 1}` begins its document in the same line.
            (begin, first_line) = if marker.ends_its_line {
                (next, index + 2)
            } else {
                (offset, index + 1)
            };
        }
        offset = next;
    }
    chunks.push(Chunk {
        text: &text[begin..],
        first_line,
    });
    chunks
}

/// The object in a chunk; `None` where there is only white space and comments.
pub(super) fn read(chunk: &Chunk<'_>) -> Result<Option<Value>, Fault> {
    let has_content = chunk.text.lines().any(|line| {
        let line = line.trim_start();
        !line.is_empty() && !line.starts_with('#') && line.trim_end() != "---"
    });
    if !has_content {
        return Ok(None);
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: 128, max_nodes: 10_000_000, max_events: 40_000_000 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
        legacy_octal_numbers: true,
        with_snippet: false,
        emit_comments: false,
    };
    match serde_saphyr::from_str_with_options::<Unique>(chunk.text, options) {
        Ok(Unique(Value::Null)) => Ok(None),
        Ok(Unique(value)) => Ok(Some(value)),
        Err(error) => Err(Fault {
            line: chunk.first_line
                + error.location().map_or(0, |at| {
                    usize::try_from(at.line()).unwrap_or(1).saturating_sub(1)
                }),
            text: without_place(&error.render_with_formatter(&serde_saphyr::UserMessageFormatter)),
        }),
    }
}

/// The library counts lines from the start of the chunk; ours count from the start of the file and stand in front.
fn without_place(said: &str) -> String {
    let end = said
        .rfind(" at line ")
        .or_else(|| said.find("line ").filter(|&at| at == 0))
        .unwrap_or(said.len());
    let text = said[..end].trim();
    if text.is_empty() {
        said.to_owned()
    } else {
        text.to_owned()
    }
}

/// The text of an object. Block style, two spaces, lists not indented: `kubectl`'s own look.
pub(super) fn write(value: &Value) -> Result<String, serde_saphyr::SerializeError> {
    let options = serde_saphyr::ser_options! { folded_wrap_chars: usize::MAX };
    serde_saphyr::to_string_with_options(&Plain(value), options)
}

impl Chunk<'_> {
    /// The text to print for a document that nobody changed; none where it would not stand between two `---`.
    pub(super) fn verbatim(&self) -> Option<String> {
        let has_own_markers = self
            .text
            .lines()
            .any(|line| marker(line).is_some() || line.starts_with('%'));
        (!has_own_markers).then(|| self.text.to_owned())
    }
}

struct Marker {
    ends_its_line: bool,
}

fn marker(line: &str) -> Option<Marker> {
    let rest = line
        .strip_prefix("---")
        .or_else(|| line.strip_prefix("..."))?;
    let ends_its_line = rest.trim().is_empty();
    (ends_its_line || rest.starts_with([' ', '\t'])).then_some(Marker { ends_its_line })
}

/// `%YAML 1.2` belongs to the document after the next `---`.
fn is_only_directives(text: &str) -> bool {
    let mut lines = text
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
        .peekable();
    lines.peek().is_some() && lines.all(|line| line.starts_with('%'))
}

/// A value whose maps hold no key twice.
pub(super) struct Unique(pub(super) Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Self)
    }
}

struct UniqueVisitor;

/// 2^53: up to here a float holds every integer. `1e2` means the integer, and `kubectl` sends 100; an integer field of
/// the API would refuse 100.0.
const EXACT: f64 = 9_007_199_254_740_992.0;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }
    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        if value.fract() == 0.0 && value.abs() <= EXACT {
            return Ok(Value::from(value as i64));
        }
        Number::from_f64(value).map(Value::Number).ok_or_else(|| {
            E::custom("a number that JSON does not have (infinite, or not a number)")
        })
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::from(value))
    }
    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let Unique(value) = entries.next_value()?;
            if map.contains_key(&key) {
                return Err(serde::de::Error::custom(format!("duplicate key {key:?}")));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// A value on its way out. The library quotes values that YAML 1.1 would misread, but keys by YAML 1.2 alone: a
/// ConfigMap's key `y` would reach the API server as `true`.
struct Plain<'a>(&'a Value);

impl Serialize for Plain<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Array(items) => {
                let mut list = serializer.serialize_seq(Some(items.len()))?;
                for item in items {
                    list.serialize_element(&Plain(item))?;
                }
                list.end()
            }
            Value::Object(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for (key, value) in entries {
                    if is_plain_key(key) {
                        map.serialize_entry(key, &Plain(value))?;
                    } else {
                        map.serialize_entry(&serde_saphyr::DoubleQuoted(key), &Plain(value))?;
                    }
                }
                map.end()
            }
            scalar => scalar.serialize(serializer),
        }
    }
}

/// Letters and what names are made of, and no word or number that a YAML reader may take for another type.
fn is_plain_key(key: &str) -> bool {
    const WORDS: [&str; 11] = [
        "y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf",
    ];
    key.starts_with(|first: char| first.is_ascii_alphabetic())
        && key
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
        && !WORDS.iter().any(|word| key.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read_one(text: &str) -> Value {
        let mut chunks = split(text);
        assert_eq!(chunks.len(), 1, "{text}");
        let chunk = chunks.pop().expect("one chunk");
        read(&chunk).expect("readable").expect("not empty")
    }

    #[test]
    fn scalars_are_read_as_kubectl_reads_them() {
        let cases = [
            ("yes", json!(true)),
            ("On", json!(true)),
            ("n", json!(false)),
            ("0755", json!(493)),
            ("0o17", json!(15)),
            ("0x1F", json!(31)),
            ("1_000", json!(1000)),
            ("1e3", json!(1000)),
            ("18446744073709551615", json!(u64::MAX)),
            ("-9223372036854775808", json!(i64::MIN)),
            ("~", Value::Null),
            ("", Value::Null),
            ("'yes'", json!("yes")),
            ("\"0755\"", json!("0755")),
            ("1.10", json!(1.1)),
            ("2001-12-14", json!("2001-12-14")),
            ("12:30:45", json!("12:30:45")),
            ("09", json!(9)),
            ("1.2.3", json!("1.2.3")),
            ("100m", json!("100m")),
            ("!!str 17", json!("17")),
        ];
        for (text, want) in cases {
            let read = read_one(&format!("a: {text}\n"));
            assert_eq!(read, json!({ "a": want }), "{text}");
        }
    }

    /// Strings that YAML 1.1 or 1.2 takes for something else, in the positions of a value, a key and a list item.
    #[test]
    fn strings_that_look_like_other_types_are_quoted() {
        for text in [
            "yes",
            "Yes",
            "NO",
            "on",
            "off",
            "y",
            "N",
            "true",
            "False",
            "null",
            "~",
            "",
            "0755",
            "0o17",
            "0x1f",
            "0b1",
            "1_000",
            "1e3",
            "1.",
            ".5",
            "-1",
            "+1",
            ".inf",
            "-.INF",
            ".nan",
            "NaN",
            "inf",
            "2001-12-14",
            "2001-12-14t21:59:43.10-05:00",
            "12:30",
            "190:20:30",
            "<<",
            "=",
            "-",
            "---",
            "...",
            "--- a",
            "# a",
            "a # b",
            "a: b",
            "a:",
            "? a",
            "- a",
            "[a]",
            "{a",
            "*a",
            "&a",
            "!a",
            "|",
            ">",
            "%a",
            "@a",
            "`a",
            "'a'",
            "\"a\"",
            " a",
            "a ",
            "\ta",
            "a\tb",
            "09",
            "1__0",
            "0x_1",
            "é",
            "\u{85}",
            "\u{2028}",
            "\u{feff}",
            "\u{7f}",
            "\0",
            "\u{1f}",
            "\u{10ffff}",
            "a\nb",
            "a\nb\n",
            "a\n\n",
            "\na",
            " a\nb",
            "a\n b",
            "\n",
            "a\r\nb",
            "a \nb",
            "---\na",
            "a\n---\nb",
            "\t\n",
            "a\n\tb",
            "#\na",
        ] {
            for value in [
                json!({ "a": text }),
                json!({ text: "a" }),
                json!({ "a": [text] }),
                json!({ text: { text: [[text], { text: text }] } }),
            ] {
                let written = write(&value).expect("writable");
                assert_eq!(
                    read_one(&written),
                    value,
                    "{text:?} was written as\n{written}"
                );
            }
            // and as YAML 1.1 has them
            let written = write(&json!({ text: text })).expect("writable");
            if super::super::tests::looks_like_yaml_1_1(text) {
                assert!(
                    written.starts_with(['"', '\'']),
                    "{text:?} as a key was written as\n{written}"
                );
                assert!(
                    written.trim_end().ends_with(['"', '\'']),
                    "{text:?} as a value was written as\n{written}"
                );
            }
        }
    }

    #[test]
    fn multi_line_strings_are_written_as_blocks() {
        let written = write(&json!({ "data": { "run.sh": "#!/bin/sh\nset -e\necho done\n" } }))
            .expect("writable");
        assert_eq!(
            written,
            "data:\n  run.sh: |\n    #!/bin/sh\n    set -e\n    echo done\n"
        );
    }

    #[test]
    fn long_lines_are_not_folded() {
        let line = "word ".repeat(60);
        let written = write(&json!({ "a": line.trim_end() })).expect("writable");
        assert_eq!(written.lines().count(), 1, "{written}");
    }

    #[test]
    fn key_order_stays() {
        let text = "z: 1\na: 2\nm:\n- b: 1\n  a: 2\n";
        assert_eq!(write(&read_one(text)).expect("writable"), text);
    }

    #[test]
    fn anchors_and_merge_keys_are_expanded() {
        let value = read_one("a: &x\n  b: 1\nc: *x\nd:\n  <<: *x\n  e: 2\n");
        assert_eq!(
            value,
            json!({ "a": { "b": 1 }, "c": { "b": 1 }, "d": { "b": 1, "e": 2 } })
        );
    }

    #[test]
    fn faults_name_the_line_of_the_file() {
        let cases = [
            ("a: 1\n---\nb: 1\nb: 2\n", "4:", "duplicate"),
            ("a: 1\n---\nb: [1\n", "", ""),
            ("# a\n\n---\na: 'open\n", "", ""),
            ("a: .nan\n", "1:", ""),
        ];
        for (text, line, word) in cases {
            let faults: Vec<_> = split(text)
                .iter()
                .filter_map(|chunk| read(chunk).err())
                .collect();
            let [fault] = faults.as_slice() else {
                panic!("{text}: {faults:?}")
            };
            let said = fault.to_string();
            assert!(
                said.starts_with(line) && said.contains(word),
                "{text}: {said}"
            );
        }
    }

    #[test]
    fn a_stream_is_split_where_documents_begin() {
        let cases: &[(&str, &[(usize, &str)])] = &[
            ("a: 1\n", &[(1, "a: 1\n")]),
            ("a: 1", &[(1, "a: 1")]),
            ("---\na: 1\n", &[(1, ""), (2, "a: 1\n")]),
            ("a: 1\n---\nb: 1\n", &[(1, "a: 1\n"), (3, "b: 1\n")]),
            (
                "a: 1\r\n---\r\nb: 1\r\n",
                &[(1, "a: 1\r\n"), (3, "b: 1\r\n")],
            ),
            (
                "a: 1\n--- # c\nb: 1\n",
                &[(1, "a: 1\n"), (2, "--- # c\nb: 1\n")],
            ),
            ("a: |\n  ---\n  b\n", &[(1, "a: |\n  ---\n  b\n")]),
            ("---a: 1\n", &[(1, "---a: 1\n")]),
            (
                "a: 1\n...\n---\nb: 1\n",
                &[(1, "a: 1\n"), (3, ""), (4, "b: 1\n")],
            ),
            ("%YAML 1.2\n---\na: 1\n", &[(1, "%YAML 1.2\n---\na: 1\n")]),
        ];
        for (text, want) in cases {
            let got: Vec<_> = split(text)
                .iter()
                .map(|chunk| (chunk.first_line, chunk.text))
                .collect();
            assert_eq!(&got, want, "{text:?}");
        }
    }

    #[test]
    fn alias_bombs_are_refused() {
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let before = level - 1;
            bomb.push_str(&format!(
                "a{level}: &a{level} [{}]\n",
                [format!("*a{before}"), String::new()].join(", ").repeat(9)
            ));
        }
        assert!(read(&split(&bomb)[0]).is_err());
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let text = prop_oneof![
            any::<String>(),
            "[ -~\n\t]{0,12}",
            "[0-9_:.eExob+-]{0,8}",
            "[a-z0-9.-]{1,10}",
            "[-#:? \n]{0,6}",
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            (-1.0e300..1.0e300f64).prop_map(Value::from),
            text.clone().prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 40, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec((text.clone(), inner), 0..5)
                    .prop_map(|entries| Value::Object(entries.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_reads_the_same(value in any_value()) {
            let value = json!({ "apiVersion": value });
            let written = write(&value).expect("writable");
            let chunks = split(&written);
            prop_assert_eq!(chunks.len(), 1, "{}", &written);
            let back = read(&chunks[0]).map_err(|fault| TestCaseError::fail(format!("{fault}\n{written}")))?;
            prop_assert_eq!(back, Some(value), "{}", written);
        }

        #[test]
        fn no_text_ends_the_process(text in any::<String>()) {
            for chunk in split(&text) {
                let _ = read(&chunk);
            }
        }
    }
}
