//! Prometheus' text exposition format, as far as one family of metrics asks.
//!
//! text + which names -> [`Sample`]s. Strict: a line that cannot be read is a fault with its number, since a sample that
//! is silently left out makes a rate that is silently wrong.

use std::collections::BTreeMap;

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) value: f64,
}

/// A line that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the metrics: {fault}")]
pub(super) struct Fault {
    line: usize,
    fault: &'static str,
}

/// The samples whose name is `wanted`; other lines are not looked at.
pub(super) fn samples(text: &str, wanted: impl Fn(&str) -> bool) -> Result<Vec<Sample>, Fault> {
    let lines = (1..).zip(text.lines());
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines
        .filter(|(_, line)| wanted(line.split(['{', ' ', '\t']).next().unwrap_or_default()))
        .map(|(number, line)| {
            sample(line).map_err(|fault| Fault {
                line: number,
                fault,
            })
        })
        .collect()
}

fn sample(line: &str) -> Result<Sample, &'static str> {
    let end = line.find(['{', ' ', '\t']).ok_or("no value")?;
    let (name, rest) = line.split_at(end);
    if name.is_empty() {
        return Err("no name");
    }
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    // A timestamp may follow the value.
    let value = rest.split_whitespace().next().ok_or("no value")?;
    Ok(Sample {
        name: name.to_owned(),
        labels,
        value: value.parse().map_err(|_| "a value that is no number")?,
    })
}

/// What stands between the braces, and what follows them.
fn labels(mut rest: &str) -> Result<(BTreeMap<String, String>, &str), &'static str> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([' ', ',']);
        if let Some(after) = rest.strip_prefix('}') {
            return Ok((labels, after));
        }
        let (name, after) = rest.split_once('=').ok_or("a label without a value")?;
        let quoted = after
            .trim_start()
            .strip_prefix('"')
            .ok_or("a label whose value is not quoted")?;
        let (value, after) = unquote(quoted)?;
        labels.insert(name.trim().to_owned(), value);
        rest = after;
    }
}

/// To the closing quote, with `\\`, `\"` and `\n` resolved.
fn unquote(text: &str) -> Result<(String, &str), &'static str> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, c @ ('\\' | '"'))) => value.push(c),
                _ => return Err("an escape that is none"),
            },
            c => value.push(c),
        }
    }
    Err("a label whose value does not end")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str) -> Result<Vec<Sample>, Fault> {
        samples(text, |_| true)
    }

    #[test]
    fn names_labels_and_values_are_read() {
        let text = "\
# HELP a Something.
# TYPE a counter

a{x=\"1\",y=\"q\\\"\\\\\\n}\",} 3 1700000000000
b 2.5e3
c{} +Inf
";
        let read = all(text).expect("an exposition");
        assert_eq!(read[0].labels["x"], "1");
        assert_eq!(read[0].labels["y"], "q\"\\\n}");
        assert_eq!(read[0].value, 3.0);
        assert_eq!((read[1].name.as_str(), read[1].value), ("b", 2500.0));
        assert_eq!(read[2].value, f64::INFINITY);
    }

    #[test]
    fn only_wanted_lines_are_looked_at() {
        let text = "broken{\nistio_requests_total 1\n";
        let read = samples(text, |name| name.starts_with("istio_")).expect("one sample");
        assert_eq!(read.len(), 1);
    }

    #[test]
    fn a_line_that_cannot_be_read_is_named() {
        for (text, want) in [
            ("a\n", "line 1 of the metrics: no value"),
            ("a 1\na{x=\"1\"}\n", "line 2 of the metrics: no value"),
            (
                "a{x=1} 1\n",
                "line 1 of the metrics: a label whose value is not quoted",
            ),
            ("a{x} 1\n", "line 1 of the metrics: a label without a value"),
            (
                "a{x=\"1} 1\n",
                "line 1 of the metrics: a label whose value does not end",
            ),
            (
                "a{x=\"\\q\"} 1\n",
                "line 1 of the metrics: an escape that is none",
            ),
            (
                "a one\n",
                "line 1 of the metrics: a value that is no number",
            ),
            ("{x=\"1\"} 1\n", "line 1 of the metrics: no name"),
        ] {
            assert_eq!(all(text).expect_err(text).to_string(), want);
        }
    }
}
