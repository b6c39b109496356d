//! What watches Malha: every alert is silent, fires and clears, by Prometheus' own tool; and what rules and dashboards ask
//! for is there when a real scrape is asked.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::rig;

#[test]
fn each_alert_is_silent_fires_and_clears() {
    let promtool = match promtool() {
        Ok(promtool) => promtool,
        Err(why) => {
            assert!(!rig::in_ci(), "{why}");
            return rig::skip(&why);
        }
    };
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect(name);
    // What the operator hands to Prometheus; JSON is YAML.
    let groups = json!({ "groups": rules()["spec"]["groups"] });
    write("alerts.yaml", &groups.to_string());
    let fixtures = read("tests/cluster/alerts.test.yaml");
    write("alerts.test.yaml", &fixtures);
    write("panels.yaml", &panels_as_rules().to_string());
    for args in [
        &[
            "check",
            "rules",
            "--lint-fatal",
            "alerts.yaml",
            "panels.yaml",
        ][..],
        &["test", "rules", "alerts.test.yaml"],
    ] {
        let output = Command::new(&promtool)
            .args(args)
            .current_dir(dir.path())
            .output()
            .expect("promtool runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "promtool {args:?}: {said}");
    }
    let fixtures: Value = serde_saphyr::from_str(&fixtures).expect("YAML");
    let mut told: BTreeMap<&str, String> = BTreeMap::new();
    for fixture in list(&fixtures["tests"]) {
        for check in list(&fixture["alert_rule_test"]) {
            let fires = check["exp_alerts"].is_array();
            let told = told.entry(word(&check["alertname"])).or_default();
            told.push(if fires { 'f' } else { 's' });
        }
    }
    let alerts: BTreeSet<&str> = told.keys().copied().collect();
    let rules = rules();
    let named: BTreeSet<&str> = all_rules(&rules).map(|rule| word(&rule["alert"])).collect();
    assert_eq!(alerts, named);
    for (alert, told) in told {
        let whole = told.starts_with('s') && told.contains('f') && told.ends_with('s');
        assert!(whole, "{alert} is not silent, fires and clears: {told}");
    }
}

/// Grafana reads no query before somebody looks at it; Prometheus reads each rule.
fn panels_as_rules() -> Value {
    let queries = dashboards().into_iter().enumerate();
    let rules = queries.map(|(number, query)| {
        let query = query.replace("$__rate_interval", "5m");
        json!({ "record": format!("panel:{number}"), "expr": query })
    });
    json!({ "groups": [{ "name": "panels", "rules": rules.collect::<Vec<_>>() }] })
}

fn promtool() -> Result<PathBuf, String> {
    let build = tree("tests/cluster/programs/promtool/build");
    let output = Command::new(build).arg("--where").output();
    let output = output.map_err(|error| error.to_string())?;
    if output.status.success() {
        let path = String::from_utf8_lossy(&output.stdout);
        Ok(PathBuf::from(path.trim()))
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        Err(said.trim().to_owned())
    }
}

/// What rules and dashboards ask for of those series that `theirs` picks by name, and that no sample of `scrapes` has:
/// names, and labels of names.
pub(crate) fn missing(scrapes: &[String], theirs: impl Fn(&str) -> bool) -> Vec<String> {
    let mut there: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let lines = scrapes.iter().flat_map(|text| text.lines());
    for line in lines.filter(|line| !line.starts_with('#')) {
        let (name, rest) = line.split_once(['{', ' ']).unwrap_or((line, ""));
        let labels = there.entry(name).or_default();
        labels.extend(rest.split("=\"").filter_map(last_name));
    }
    let mut missing = Vec::new();
    for (name, asked) in named() {
        if !theirs(&name) {
            continue;
        }
        match there.get(name.as_str()) {
            None => missing.push(name),
            Some(labels) => {
                let absent = asked
                    .iter()
                    .filter(|label| !labels.contains(label.as_str()));
                missing.extend(absent.map(|label| format!("{name}{{{label}}}")));
            }
        }
    }
    missing
}

/// The series that rules and dashboards name, with the labels that they select by. What Prometheus itself adds
/// (namespace, pod, job) is left out.
fn named() -> BTreeMap<String, BTreeSet<String>> {
    let mut expressions: Vec<String> = Vec::new();
    let rules = rules();
    expressions.extend(all_rules(&rules).map(|rule| word(&rule["expr"]).to_owned()));
    expressions.extend(dashboards());
    assert!(expressions.len() > 50, "{expressions:?}");
    let mut named: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for expression in &expressions {
        for (name, labels) in series(expression) {
            named.entry(name).or_default().extend(labels);
        }
    }
    named
}

/// The queries of all dashboards.
fn dashboards() -> Vec<String> {
    let mut queries = Vec::new();
    for name in ["injector", "authority", "data-plane"] {
        let text = read(&format!("manifests/monitoring/dashboards/{name}.json"));
        let dashboard: Value = serde_json::from_str(&text).expect("JSON");
        for panel in list(&dashboard["panels"]) {
            let targets = panel["targets"].as_array().into_iter().flatten();
            queries.extend(targets.map(|target| word(&target["expr"]).to_owned()));
        }
    }
    queries
}

/// The series of an expression: names that are no functions, operators or labels to group by.
fn series(expression: &str) -> Vec<(String, Vec<String>)> {
    const OURS: [&str; 5] = ["malha_", "envoy_", "istio_", "process_", "apiserver_"];
    let mut found = Vec::new();
    for prefix in OURS {
        for (at, _) in expression.match_indices(prefix) {
            let before = expression[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || "_\"".contains(c)) {
                continue;
            }
            let rest = &expression[at..];
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            let (name, rest) = rest.split_at(end.unwrap_or(rest.len()));
            let selector = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
            let selector = selector.map_or("", |(selector, _)| selector);
            let labels = selector.split(',').filter_map(|matcher| {
                let label = matcher.split(['=', '!']).next()?.trim();
                let added = ["", "namespace", "pod", "job"].contains(&label);
                (!added).then(|| label.to_owned())
            });
            found.push((name.to_owned(), labels.collect()));
        }
    }
    found
}

/// `reason` of `result="error",reason`.
fn last_name(text: &str) -> Option<&str> {
    let name = text.rsplit(['{', ',', '"', ' ']).next()?;
    (!name.is_empty()).then_some(name)
}

#[test]
fn series_and_their_labels_are_found_in_expressions() {
    let found = series(
        r#"sum by (le, envoy) (rate(malha_a_bucket{x="1",y!~"2..",pod="z"}[5m])) / malha_b > 0"#,
    );
    let want = [
        (
            "malha_a_bucket".to_owned(),
            vec!["x".to_owned(), "y".to_owned()],
        ),
        ("malha_b".to_owned(), Vec::new()),
    ];
    assert_eq!(found, want);
    let scrapes = ["malha_up{a=\"x y\",b=\"\"} 1\n".to_owned()];
    let all = missing(&scrapes, |name| name == "malha_leader");
    assert_eq!(all, ["malha_leader"]);
}

fn rules() -> Value {
    serde_saphyr::from_str(&read("manifests/monitoring/alerts.yaml")).expect("YAML")
}

fn all_rules(rules: &Value) -> impl Iterator<Item = &Value> {
    let groups = list(&rules["spec"]["groups"]).iter();
    groups.flat_map(|group| list(&group["rules"]))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn word(value: &Value) -> &str {
    value.as_str().expect("text")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(tree(path)).expect(path)
}

fn tree(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
