//! Expositions of several sources as one that a scraper accepts.
//!
//! line of a source -> line of the answer, or nothing
//!
//! Prometheus' text format wants each family once. A family that an earlier source has is left out of a later one, and
//! so is what is no metric at all. OpenMetrics becomes text: its suffixes move into the family's name, its exemplars,
//! units and end mark go.

use std::collections::HashSet;

/// How a source writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Prometheus' text format.
    Text,
    /// The same, by Envoy: what it counts for the mesh is given Istio's names.
    Envoy,
    /// OpenMetrics.
    OpenMetrics,
}

/// Families that sources so far have told of.
#[derive(Debug, Default)]
pub struct Merged {
    taken: HashSet<String>,
}

/// One source while it is read.
#[derive(Debug)]
pub struct Source<'m> {
    merged: &'m mut Merged,
    dialect: Dialect,
    own: HashSet<String>,
    /// Waits for the type, which decides the name.
    help: Option<(String, String)>,
    /// Samples that follow are this family's.
    family: Option<Family>,
    ended: bool,
    dropped: u64,
    connected: Option<bool>,
}

#[derive(Debug)]
struct Family {
    /// As the source calls it, without the suffix of a counter.
    name: String,
    /// Another source has it.
    taken: bool,
}

/// What a family's samples may add to its name.
const SUFFIXES: [&str; 7] = [
    "_total", "_bucket", "_sum", "_count", "_info", "_gcount", "_gsum",
];
/// Names in Envoy begin so where the control plane has it count requests.
const OURS: &str = "envoy_malha_";
const ISTIOS: &str = "istio_";
const CONNECTED: &str = "envoy_control_plane_connected_state";

impl Merged {
    /// Begins with a source.
    pub fn source(&mut self, dialect: Dialect) -> Source<'_> {
        Source {
            merged: self,
            dialect,
            own: HashSet::new(),
            help: None,
            family: None,
            ended: false,
            dropped: 0,
            connected: None,
        }
    }
}

impl Source<'_> {
    /// Takes one line, without its end; what becomes of it is appended to `out`.
    pub fn line(&mut self, line: &str, out: &mut String) {
        let line = line.trim_end();
        if line.is_empty() || self.ended {
            return;
        }
        match line.strip_prefix('#') {
            Some(comment) => self.comment(comment, out),
            None => self.sample(line, out),
        }
    }

    /// Ends it; the next source may have none of its families.
    pub fn end(self) -> Summary {
        let (dropped, connected) = (self.dropped, self.connected);
        self.merged.taken.extend(self.own);
        Summary { dropped, connected }
    }

    fn comment(&mut self, comment: &str, out: &mut String) {
        let mut words = comment.trim_start().splitn(3, [' ', '\t']);
        match (words.next(), words.next(), words.next()) {
            (Some("EOF"), None, _) if self.dialect == Dialect::OpenMetrics => self.ended = true,
            (Some("HELP"), Some(name), text) if is_name(name) => {
                self.help = Some((name.to_owned(), text.unwrap_or_default().to_owned()));
            }
            (Some("TYPE"), Some(name), Some(kind)) if is_name(name) => {
                self.kind(name, kind.trim(), out);
            }
            _ => {}
        }
    }

    fn kind(&mut self, name: &str, kind: &str, out: &mut String) {
        let (kind, suffix) = match (self.dialect, kind) {
            (Dialect::OpenMetrics, "counter") => ("counter", "_total"),
            (Dialect::OpenMetrics, "info") => ("gauge", "_info"),
            (Dialect::OpenMetrics, "stateset") => ("gauge", ""),
            (_, "counter" | "gauge" | "histogram" | "summary") => (kind, ""),
            _ => ("untyped", ""),
        };
        let bare = name.strip_suffix(suffix).unwrap_or(name);
        let family = self.renamed(&format!("{bare}{suffix}"));
        let help = self.help.take().filter(|(of, _)| of == name);
        let taken = self.is_taken(&family);
        if taken {
            self.dropped += 1;
        } else if self.own.insert(family.clone()) {
            if let Some((_, text)) = help {
                push(out, &["# HELP ", &family, " ", &text]);
            }
            push(out, &["# TYPE ", &family, " ", kind]);
        }
        self.family = Some(Family {
            name: self.renamed(bare),
            taken,
        });
    }

    fn sample(&mut self, line: &str, out: &mut String) {
        let end = line.find(['{', ' ', '\t']).unwrap_or(line.len());
        let (name, rest) = line.split_at(end);
        let tail = self.tail(rest);
        let (true, Some(tail)) = (is_name(name), tail) else {
            self.dropped += 1;
            return;
        };
        if self.dialect == Dialect::Envoy && name == CONNECTED {
            self.connected = Some(tail.trim_end().ends_with(" 1"));
        }
        let name = self.renamed(name);
        if self.dialect == Dialect::OpenMetrics && name.ends_with("_created") {
            return;
        }
        if self.belongs_to_another(&name) {
            self.dropped += 1;
            return;
        }
        push(out, &[&name, &tail]);
    }

    fn belongs_to_another(&mut self, name: &str) -> bool {
        let of_family = |family: &Family| {
            let rest = name.strip_prefix(family.name.as_str())?;
            (rest.is_empty() || SUFFIXES.contains(&rest)).then_some(family.taken)
        };
        if let Some(taken) = self.family.as_ref().and_then(of_family) {
            return taken;
        }
        // A family without a type.
        self.family = None;
        if self.is_taken(name) {
            return true;
        }
        self.own.insert(name.to_owned());
        false
    }

    fn is_taken(&self, family: &str) -> bool {
        let taken = &self.merged.taken;
        let parts = || {
            SUFFIXES
                .iter()
                .filter_map(|suffix| family.strip_suffix(suffix))
        };
        !taken.is_empty() && (taken.contains(family) || parts().any(|bare| taken.contains(bare)))
    }

    fn renamed(&self, name: &str) -> String {
        match name.strip_prefix(OURS) {
            Some(rest) if self.dialect == Dialect::Envoy => format!("{ISTIOS}{rest}"),
            _ => name.to_owned(),
        }
    }

    /// Labels, value and time, if they are such.
    fn tail(&self, rest: &str) -> Option<String> {
        let (labels, figures) = split_labels(rest)?;
        let figures = match self.dialect {
            Dialect::OpenMetrics => figures.split('#').next().unwrap_or_default(),
            _ => figures,
        };
        let mut words = figures.split_whitespace();
        let value = words.next().filter(|value| is_number(value))?;
        let time = match (words.next(), self.dialect) {
            (None, _) => None,
            // Seconds there, milliseconds here.
            (Some(seconds), Dialect::OpenMetrics) => {
                Some(format!("{:.0}", seconds.parse::<f64>().ok()? * 1000.0))
            }
            (Some(time), _) => Some(time.parse::<i64>().ok()?.to_string()),
        };
        if words.next().is_some() {
            return None;
        }
        let mut tail = String::with_capacity(rest.len());
        tail.push_str(labels);
        tail.push(' ');
        tail.push_str(value);
        if let Some(time) = time {
            tail.push(' ');
            tail.push_str(&time);
        }
        Some(tail)
    }
}

/// What a source had besides its metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Lines that were left out.
    pub dropped: u64,
    /// Whether Envoy hears the control plane, where the source is Envoy.
    pub connected: Option<bool>,
}

fn push(out: &mut String, parts: &[&str]) {
    parts.iter().for_each(|part| out.push_str(part));
    out.push('\n');
}

fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic() || first == b'_' || first == b':')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':')
}

fn is_number(text: &str) -> bool {
    text.parse::<f64>().is_ok()
}

/// The labels with their braces, and what follows; quotes may hold anything.
fn split_labels(rest: &str) -> Option<(&str, &str)> {
    if !rest.starts_with('{') {
        return Some(("", rest));
    }
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in rest.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return rest.split_at_checked(at + 1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(sources: &[(Dialect, &str)]) -> (String, Vec<Summary>) {
        let mut out = String::new();
        let mut merged = Merged::default();
        let mut summaries = Vec::new();
        for (dialect, text) in sources {
            let mut source = merged.source(*dialect);
            text.lines().for_each(|line| source.line(line, &mut out));
            summaries.push(source.end());
        }
        (out, summaries)
    }

    #[test]
    fn what_envoy_counts_for_the_mesh_is_given_istios_names() {
        let envoy = "\
# TYPE envoy_malha_requests_total counter
envoy_malha_requests_total{reporter=\"source\",response_code=\"200\"} 3

# TYPE envoy_malha_request_duration_milliseconds histogram
envoy_malha_request_duration_milliseconds_bucket{reporter=\"source\",le=\"0.5\"} 1
envoy_malha_request_duration_milliseconds_sum{reporter=\"source\"} 2.5
envoy_malha_request_duration_milliseconds_count{reporter=\"source\"} 3
# TYPE envoy_control_plane_connected_state gauge
envoy_control_plane_connected_state{} 1
";
        let (out, summaries) = merged(&[(Dialect::Envoy, envoy)]);
        let want = "\
# TYPE istio_requests_total counter
istio_requests_total{reporter=\"source\",response_code=\"200\"} 3
# TYPE istio_request_duration_milliseconds histogram
istio_request_duration_milliseconds_bucket{reporter=\"source\",le=\"0.5\"} 1
istio_request_duration_milliseconds_sum{reporter=\"source\"} 2.5
istio_request_duration_milliseconds_count{reporter=\"source\"} 3
# TYPE envoy_control_plane_connected_state gauge
envoy_control_plane_connected_state{} 1
";
        assert_eq!(out, want);
        assert_eq!(
            summaries,
            [Summary {
                dropped: 0,
                connected: Some(true)
            }]
        );
    }

    #[test]
    fn a_family_stands_once_whoever_tells_of_it() {
        let cases: &[(&str, &str, &str, &str, u64)] = &[
            (
                "a second source's family of the same name goes",
                "# TYPE up gauge\nup 1\n",
                "# HELP up Theirs\n# TYPE up gauge\nup 2\n# TYPE other gauge\nother 3\n",
                "# TYPE up gauge\nup 1\n# TYPE other gauge\nother 3\n",
                2,
            ),
            (
                "also without a type",
                "up 1\n",
                "up 2\nother 3\n",
                "up 1\nother 3\n",
                1,
            ),
            (
                "also parts of a histogram",
                "# TYPE h histogram\nh_sum 1\nh_count 1\n",
                "h_sum 2\n",
                "# TYPE h histogram\nh_sum 1\nh_count 1\n",
                1,
            ),
            (
                "one source's second TYPE and HELP go, its samples stay",
                "# HELP a First\n# TYPE a gauge\na{x=\"1\"} 1\n# HELP a First\n# TYPE a gauge\na{x=\"2\"} 1\n",
                "",
                "# HELP a First\n# TYPE a gauge\na{x=\"1\"} 1\na{x=\"2\"} 1\n",
                0,
            ),
        ];
        for (name, first, second, want, dropped) in cases {
            let (out, summaries) = merged(&[(Dialect::Text, first), (Dialect::Text, second)]);
            assert_eq!(&out, want, "{name}");
            assert_eq!(summaries[1].dropped, *dropped, "{name}");
        }
    }

    #[test]
    fn open_metrics_becomes_text() {
        let app = "\
# HELP requests Requests.
# TYPE requests counter
# UNIT requests requests
requests_total{code=\"2}0\"} 3 1700000000.5 # {trace_id=\"a\"} 1 1700000000
requests_created{code=\"2}0\"} 1699999999
# TYPE build info
build_info{version=\"1\"} 1
# TYPE strange unknown
strange 2
# TYPE size histogram
size_bucket{le=\"+Inf\"} 1 # {trace_id=\"b # }\"} 0.5
size_count 1
# EOF
late 1
";
        let want = "\
# HELP requests_total Requests.
# TYPE requests_total counter
requests_total{code=\"2}0\"} 3 1700000000500
# TYPE build_info gauge
build_info{version=\"1\"} 1
# TYPE strange untyped
strange 2
# TYPE size histogram
size_bucket{le=\"+Inf\"} 1
size_count 1
";
        assert_eq!(merged(&[(Dialect::OpenMetrics, app)]).0, want);
    }

    #[test]
    fn what_is_no_metric_is_left_out() {
        for line in [
            "<html>",
            "name",
            "name value",
            "name{a=\"b\" 1",
            "name 1 2 3",
            "1name 1",
            "{\"utf8.name\"} 1",
            "name 1 soon",
        ] {
            let (out, summaries) = merged(&[(Dialect::Text, line)]);
            assert_eq!(out, "", "{line}");
            assert_eq!(summaries[0].dropped, 1, "{line}");
        }
        for line in ["name NaN", "name +Inf 17", "a:b{x=\"\\\"}\",y=\"#\"} 1e9"] {
            assert_eq!(merged(&[(Dialect::Text, line)]).0, format!("{line}\n"));
        }
    }
}
