//! Who may know whom: the sources are read and held to what the crate's documentation says.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules from the bottom; each may know those of the groups before its own, and no others.
const ORDER: [&[&str]; 15] = [
    &["proto", "clock", "close", "config", "site", "burden", "lanes"],
    &["agent", "wire"],
    &["incidents"],
    &["store"],
    &["metrics", "timeline"],
    &["outage", "peers"],
    &["sight"],
    &["pulse", "anchor"],
    &["history"],
    &["heartbeat", "sweep", "retention", "lease"],
    &["session"],
    &["safety"],
    &["orders", "transport"],
    &["api"],
    &["server", "healthcheck"],
];

/// What a module must not know although it stands above it.
const STRANGERS: [(&str, &[&str]); 3] = [
    (
        "api",
        &[
            "history",
            "heartbeat",
            "sweep",
            "retention",
            "sight",
            "session",
            "orders",
            "transport",
            "wire",
            "proto",
            "close",
        ],
    ),
    ("orders", &["heartbeat", "sweep", "retention", "wire", "proto", "agent"]),
    ("transport", &["sweep", "retention", "orders"]),
];

/// Where a crate may be spoken: folders end with a slash.
const FOREIGN: [(&str, &[&str]); 6] = [
    ("sqlx", &["store/"]),
    ("axum", &["api/", "server.rs"]),
    ("hyper", &["transport/", "healthcheck.rs"]),
    ("hyper_util", &["transport/", "healthcheck.rs"]),
    ("tokio_tungstenite", &["transport/"]),
    ("prost", &["proto.rs", "wire/", "agent/", "transport/websocket/tests.rs"]),
];

struct Source {
    /// The path below `src`.
    path: String,
    /// The text without comments.
    code: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let code = without_comments(&fs::read_to_string(&path).unwrap());
                let path = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
                found.push(Source { path, code });
            }
        }
    }
    found.sort_by(|left, right| left.path.cmp(&right.path));
    found
}

fn without_comments(text: &str) -> String {
    let code = text.lines().map(|line| match line.split_once("//") {
        // A URL in a text is no comment.
        Some((code, _)) if !code.ends_with(':') => code,
        _ => line,
    });
    code.collect::<Vec<_>>().join("\n")
}

/// The top-level module of a file of the library; none for `lib.rs` and the binaries.
fn module(path: &str) -> Option<&str> {
    let first = path.split('/').next()?.trim_end_matches(".rs");
    (!["lib", "main", "bin"].contains(&first)).then_some(first)
}

/// The names that follow `prefix` directly, or as members of the braces that follow it.
fn named_after<'a>(code: &'a str, prefix: &str) -> Vec<&'a str> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        if code[..at].ends_with(|before: char| before.is_alphanumeric() || "_:".contains(before)) {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        match rest.strip_prefix('{') {
            None => names.extend(identifier(rest)),
            Some(group) => {
                let mut depth = 0;
                let mut fresh = true;
                for (at, letter) in group.char_indices() {
                    match letter {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => fresh = true,
                        _ if fresh && !letter.is_whitespace() => {
                            names.extend(identifier(&group[at..]));
                            fresh = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    names
}

fn identifier(text: &str) -> Option<&str> {
    let end = text.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(text.len());
    (end > 0).then_some(&text[..end])
}

fn rank(module: &str) -> Option<usize> {
    ORDER.iter().position(|group| group.contains(&module))
}

#[test]
fn every_module_has_its_place() {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let declared = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    let mut declared: Vec<&str> = declared.collect();
    let mut placed: Vec<&str> = ORDER.iter().copied().flatten().copied().collect();
    declared.sort_unstable();
    placed.sort_unstable();
    assert_eq!(declared, placed, "a new module is given its place in ORDER and in the crate's documentation");
}

#[test]
fn a_module_knows_only_those_below_it() {
    let mut strangers: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let sources = sources();
    let mut links = 0;
    for source in &sources {
        let Some(own) = module(&source.path) else { continue };
        let place = rank(own).unwrap_or_else(|| panic!("{own} has no place"));
        let excluded = STRANGERS.iter().find(|(name, _)| *name == own).map_or(&[][..], |(_, names)| names);
        for known in named_after(&source.code, "crate::") {
            let Some(other) = rank(known) else { panic!("{}: crate::{known} is no module", source.path) };
            links += 1;
            if known != own && (other >= place || excluded.contains(&known)) {
                strangers.entry(own).or_default().push(format!("{} knows {known}", source.path));
            }
        }
        assert!(!source.code.contains("opamp_server::"), "{} speaks of its own crate", source.path);
    }
    assert!(links > 50, "the sources were read");
    assert!(strangers.is_empty(), "{strangers:#?}");
}

#[test]
fn a_file_of_the_crates_root_does_not_reach_its_siblings_through_super() {
    for source in sources() {
        let Some(_) = module(&source.path).filter(|_| !source.path.contains('/')) else { continue };
        for line in source.code.lines().filter(|line| !line.starts_with(' ')) {
            assert!(!line.contains("super::"), "{}: {line}", source.path);
        }
    }
}

#[test]
fn foreign_crates_are_spoken_where_they_belong() {
    let mut strangers = Vec::new();
    let mut spoken: BTreeMap<&str, usize> = BTreeMap::new();
    for source in sources() {
        if module(&source.path).is_none() {
            continue;
        }
        for (foreign, homes) in FOREIGN {
            if named_after(&source.code, &format!("{foreign}::")).is_empty() {
                continue;
            }
            *spoken.entry(foreign).or_default() += 1;
            let at_home = homes
                .iter()
                .any(|home| source.path == *home || (home.ends_with('/') && source.path.starts_with(home)));
            if !at_home {
                strangers.push(format!("{} speaks {foreign}", source.path));
            }
        }
    }
    assert!(strangers.is_empty(), "{strangers:#?}");
    assert_eq!(spoken.len(), FOREIGN.len(), "each is spoken somewhere: {spoken:?}");
}

#[test]
fn what_an_agent_is_stays_pure() {
    for source in sources() {
        let pure = ["agent", "wire", "incidents"].contains(&module(&source.path).unwrap_or_default());
        for word in ["async ", "tokio::", ".await", "std::net", "std::fs", "Instant::now", "clock::Clock"] {
            assert!(!(pure && source.code.contains(word)), "{} says {word:?}", source.path);
        }
    }
}

#[test]
fn the_swarm_knows_the_server_only_through_its_messages() {
    let swarm: Vec<Source> =
        sources().into_iter().filter(|source| source.path.starts_with("bin/opamp-swarm/")).collect();
    assert!(!swarm.is_empty());
    for source in swarm {
        for known in named_after(&source.code, "opamp_server::") {
            assert_eq!(known, "proto", "{} knows opamp_server::{known}", source.path);
        }
    }
}

#[test]
fn names_are_found_behind_a_path_and_in_braces() {
    let code = "use crate::store::{Store};\nuse crate::{api::{self, x}, clock};\nlet x = crate::wire::y(); mycrate::z";
    assert_eq!(named_after(code, "crate::"), ["store", "api", "clock", "wire"]);
}
