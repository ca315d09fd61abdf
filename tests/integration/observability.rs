//! What operators watch the server with speaks only of metrics and label values that the server exposes.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use opamp_server::close::{Cause, CloseReason};
use opamp_server::metrics::Metrics;
use serde_json::Value;

/// What the server tells of its process, under the names that everybody's dashboards know.
const PROCESS: [&str; 5] = [
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_max_fds",
    "process_start_time_seconds",
];
/// Labels that Prometheus adds, with values that are not ours.
const ADDED: [&str; 3] = ["job", "instance", "alertname"];
/// Labels whose values are not listed in the documentation: the version, and the bounds of buckets.
const UNLISTED: [&str; 2] = ["version", "le"];

const DASHBOARD: &str = "deploy/grafana/opamp-server.json";
const ALERTS: &str = "deploy/prometheus/alerts.yml";
const ALERTS_TEST: &str = "deploy/prometheus/alerts_test.yml";
const DOCUMENTATION: &str = "docs/observability.md";
const RUNBOOK: &str = "docs/operations.md";

fn read(path: &str) -> String {
    let full = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(full).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The values of a series' labels.
type Labels = BTreeMap<String, BTreeSet<String>>;

/// Every series of a new server, with all values of its labels: lists are closed, so all are there from the start.
fn series() -> BTreeMap<String, Labels> {
    let mut found: BTreeMap<String, Labels> = BTreeMap::new();
    for line in Metrics::new().render().lines().filter(|line| !line.starts_with('#')) {
        let Some((name, after)) = words(line).next() else { continue };
        let labels = found.entry(name.to_owned()).or_default();
        for (label, value) in matchers(after) {
            labels.entry(label.to_owned()).or_default().insert(value.to_owned());
        }
    }
    for name in PROCESS {
        found.entry(name.to_owned()).or_default();
    }
    found
}

fn is_of_a_word(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '_'
}

/// Each word of a text, with what follows it.
fn words(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let start = rest.find(is_of_a_word)?;
        let word = &rest[start..];
        let end = word.find(|letter| !is_of_a_word(letter)).unwrap_or(word.len());
        let (word, after) = word.split_at(end);
        rest = after;
        Some((word, after))
    })
}

/// The metrics that a text names, each with what follows its name.
fn metrics_in(text: &str) -> impl Iterator<Item = (&str, &str)> {
    words(text).filter(|(word, _)| word.starts_with("opamp_") || word.starts_with("process_"))
}

/// The labels in the braces that `after` begins with, and what each is compared with.
fn matchers(after: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    let Some(mut rest) = after.strip_prefix('{') else { return found };
    while !rest.trim_start().starts_with('}') {
        let quoted = rest.split_once('"').and_then(|(label, tail)| Some((label, tail.split_once('"')?)));
        let Some((label, (value, tail))) = quoted else { panic!("no matchers: {after}") };
        found.push((label.trim_matches(|letter| !is_of_a_word(letter)), value));
        rest = tail;
    }
    found
}

/// The labels by which queries in a text group and join.
fn grouped(text: &str) -> impl Iterator<Item = &str> {
    words(text)
        .filter(|(word, _)| ["by", "on", "without", "ignoring"].contains(word))
        .filter_map(|(_, after)| after.trim_start().strip_prefix('(')?.split_once(')'))
        .flat_map(|(labels, _)| labels.split(','))
        .map(str::trim)
}

fn dashboard() -> Value {
    serde_json::from_str(&read(DASHBOARD)).unwrap()
}

/// All texts in a JSON value.
fn texts<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    found.extend(value.as_str());
    for child in value.as_array().into_iter().flatten() {
        texts(child, found);
    }
    for child in value.as_object().into_iter().flat_map(serde_json::Map::values) {
        texts(child, found);
    }
}

/// Dashboard, rules and their tests, as the texts in which queries stand.
fn watched() -> Vec<(&'static str, String)> {
    let dashboard = dashboard();
    let mut found = Vec::new();
    texts(&dashboard, &mut found);
    let mut all: Vec<_> = found.into_iter().map(|text| (DASHBOARD, text.to_owned())).collect();
    all.extend([ALERTS, ALERTS_TEST].map(|path| (path, read(path))));
    all
}

/// The panels of a dashboard, those inside of rows included.
fn panels(value: &Value) -> Vec<&Value> {
    let mut found = Vec::new();
    for panel in value["panels"].as_array().into_iter().flatten() {
        found.push(panel);
        found.extend(panels(panel));
    }
    found
}

/// The alert rules: name and text of each.
fn alerts(text: &str) -> Vec<(&str, &str)> {
    text.split("- alert: ").skip(1).map(|rule| rule.split_once('\n').unwrap()).collect()
}

/// The anchor of an alert: `OpampServerDown` is explained at `opamp-server-down`.
fn kebab(name: &str) -> String {
    let mut kebab = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !kebab.is_empty() {
            kebab.push('-');
        }
        kebab.extend(letter.to_lowercase());
    }
    kebab
}

/// The anchor that a heading gets: lower case, blanks as dashes, other signs dropped.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
    heading.chars().filter(|letter| letter.is_alphanumeric() || "-_".contains(*letter)).collect()
}

#[test]
fn every_metric_that_is_watched_is_exposed() {
    let series = series();
    let mut counted = 0;
    for (path, text) in watched() {
        for (name, _) in metrics_in(&text) {
            counted += 1;
            assert!(series.contains_key(name), "{path}: {name} is not exposed");
        }
    }
    assert!(counted > 100, "the files were read: {counted}");
}

#[test]
fn every_label_that_is_matched_has_such_a_value() {
    let series = series();
    let mut counted = 0;
    for (path, text) in watched().into_iter().chain([(DOCUMENTATION, read(DOCUMENTATION))]) {
        for (name, after) in metrics_in(&text) {
            for (label, value) in matchers(after) {
                if ADDED.contains(&label) {
                    continue;
                }
                let values = series.get(name).and_then(|labels| labels.get(label));
                let Some(values) = values else { panic!("{path}: {name} has no label {label}") };
                for value in value.split('|') {
                    counted += 1;
                    assert!(values.contains(value), "{path}: {label} of {name} is never {value}");
                }
            }
        }
    }
    assert!(counted > 20, "the files were read: {counted}");
}

#[test]
fn queries_group_by_labels_that_exist() {
    let series = series();
    let known: BTreeSet<&str> =
        series.values().flat_map(BTreeMap::keys).map(String::as_str).chain(ADDED).collect();
    let watched = watched();
    let used: Vec<&str> = watched.iter().flat_map(|(_, text)| grouped(text)).collect();
    assert!(used.len() > 20, "the files were read: {used:?}");
    for label in used {
        assert!(known.contains(label), "no metric has a label {label}");
    }
}

#[test]
fn every_metric_that_is_exposed_is_documented() {
    let (documentation, series) = (read(DOCUMENTATION), series());
    let documented: BTreeSet<&str> = metrics_in(&documentation).map(|(name, _)| name).collect();
    for name in Metrics::NAMES.iter().chain(&PROCESS) {
        assert!(documented.contains(name), "{DOCUMENTATION} does not name {name}");
    }
    for name in documented {
        assert!(series.contains_key(name) || Metrics::NAMES.contains(&name), "{name} is not exposed");
    }
    for (name, labels) in &series {
        for (label, values) in labels.iter().filter(|(label, _)| !UNLISTED.contains(&label.as_str())) {
            for value in values {
                let listed = documentation.contains(&format!("`{value}`"));
                assert!(listed, "{DOCUMENTATION} does not list {label} {value} of {name}");
            }
        }
    }
}

#[test]
fn every_metric_that_is_exposed_is_on_the_dashboard() {
    let dashboard = dashboard();
    let mut found = Vec::new();
    texts(&dashboard, &mut found);
    let shown: BTreeSet<&str> =
        found.iter().flat_map(|text| metrics_in(text)).map(|(name, _)| name).collect();
    for name in Metrics::NAMES.iter().chain(&PROCESS) {
        let parts = ["", "_bucket", "_sum"].map(|part| format!("{name}{part}"));
        assert!(parts.iter().any(|part| shown.contains(part.as_str())), "no panel shows {name}");
    }
}

#[test]
fn every_panel_says_what_to_do_and_has_a_number_of_its_own() {
    let dashboard = dashboard();
    assert!(dashboard["schemaVersion"].as_u64().is_some_and(|version| version >= 39));
    let panels = panels(&dashboard);
    assert!(panels.len() > 20, "the panels were found");
    let mut numbers = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert!(numbers.insert(panel["id"].as_u64().unwrap()), "the number of {title:?} is taken");
        let description = panel["description"].as_str().unwrap_or_default();
        assert!(description.len() > 40, "{title:?} does not say what it shows and what to do");
    }
}

/// The two panels of ends tell whose they are, and no reason is missing.
#[test]
fn every_reason_of_an_end_is_shown_with_whose_end_it_is() {
    let dashboard = dashboard();
    let mut found = Vec::new();
    texts(&dashboard, &mut found);
    let mut shown = BTreeSet::new();
    for text in found {
        let mut causes: Vec<Cause> = Vec::new();
        for (_, after) in metrics_in(text).filter(|(name, _)| *name == "opamp_connections_ended_total") {
            let matchers = matchers(after);
            let reasons = matchers.iter().filter(|(label, _)| *label == "reason");
            for word in reasons.flat_map(|(_, words)| words.split('|')) {
                causes.extend(CloseReason::from_label(word).map(CloseReason::cause));
                shown.insert(word);
            }
        }
        assert!(causes.windows(2).all(|pair| pair[0] == pair[1]), "both sides' ends in {text}");
    }
    for reason in CloseReason::ALL {
        assert!(shown.contains(reason.label()), "no panel shows {reason}");
    }
}

#[test]
fn every_alert_says_what_to_do_and_points_into_the_runbook() {
    let (rules, documentation, runbook) = (read(ALERTS), read(DOCUMENTATION), read(RUNBOOK));
    let anchors: BTreeSet<String> =
        runbook.lines().filter(|line| line.starts_with('#')).map(anchor).collect();
    let alerts = alerts(&rules);
    assert!(alerts.len() > 5, "the rules were found");
    let names: BTreeSet<&str> = alerts.iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), alerts.len(), "each name once");
    for (name, rule) in alerts {
        for part in ["expr: ", "severity: ", "summary: ", "description: "] {
            assert!(rule.contains(part), "{name} has no {part}");
        }
        let anchor = kebab(name);
        assert!(rule.contains(&format!("runbook_url: {RUNBOOK}#{anchor}\n")), "{name} points elsewhere");
        let explained = anchors.contains(&anchor) || runbook.contains(&format!("id=\"{anchor}\""));
        assert!(explained, "{RUNBOOK} has no heading {anchor}");
        assert!(documentation.contains(&format!("`{name}`")), "{DOCUMENTATION} does not list {name}");
    }
}

/// What is published without a token is published to this machine alone, and the image opens nothing by itself.
#[test]
fn the_first_look_is_for_this_machine_only() {
    let compose = read("docker-compose.yml");
    let ports = compose.lines().map(str::trim).filter(|line| {
        let port = line.strip_prefix("- \"").and_then(|rest| rest.strip_suffix('"'));
        port.is_some_and(|port| port.contains(':') && port.ends_with(|letter: char| letter.is_ascii_digit()))
    });
    let ports: Vec<&str> = ports.collect();
    assert!(ports.len() >= 5, "the ports were found: {ports:?}");
    for port in ports {
        assert!(port.starts_with("- \"127.0.0.1:"), "{port}");
    }
    let image = read("Dockerfile");
    let commands = image.lines().filter(|line| !line.trim_start().starts_with('#'));
    for line in commands {
        assert!(!line.to_lowercase().contains("allow_anonymous"), "{line}");
    }
}

#[test]
fn selectors_and_groups_are_found() {
    let query = r#"sum by (job, le) (rate(opamp_x_total{job="$job", kind=~"a|b"}[5m])) / process_y > 0.5"#;
    let found: Vec<_> = metrics_in(query).map(|(name, after)| (name, matchers(after))).collect();
    assert_eq!(found, [("opamp_x_total", vec![("job", "$job"), ("kind", "a|b")]), ("process_y", Vec::new())]);
    assert_eq!(grouped(query).collect::<Vec<_>>(), ["job", "le"]);
    assert_eq!(kebab("OpampServerDown"), "opamp-server-down");
    assert_eq!(anchor("### opamp-server-down"), "opamp-server-down");
}
