//! The page on conformance tells the truth: every rule stands on it once, and every test it names exists and bears
//! the rule's id.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The page.
const PAGE: &str = include_str!("../../docs/conformance.md");

/// The ids of the protocol: prefix, digits of the number, and the last number; each series has no gap.
const SERIES: [(&str, usize, u32); 3] = [("S", 3, 144), ("R", 3, 36), ("AMB", 2, 26)];

/// The state of a rule that tests hold.
const COVERED: &str = "covered";

/// The states of the others, which want a reason.
const REASONED: [&str; 3] = ["later", "not applicable", "declined"];

/// A line of the page's tables.
#[derive(Debug)]
struct Rule<'a> {
    id: &'a str,
    fact: &'a str,
    state: &'a str,
    /// Names of tests where it is covered, else the reason.
    last: &'a str,
}

impl<'a> Rule<'a> {
    /// All rules on `page`, in its order.
    fn all(page: &'a str) -> Vec<Self> {
        page.lines().filter_map(Self::read).collect()
    }

    fn read(line: &'a str) -> Option<Self> {
        let cells: Vec<&str> = line.strip_prefix("| ")?.strip_suffix(" |")?.split(" | ").collect();
        let (prefix, number) = cells[0].split_once('-')?;
        let is_id = SERIES.iter().any(|(known, ..)| *known == prefix)
            && number.bytes().all(|byte| byte.is_ascii_digit());
        let (true, &[id, fact, state, last]) = (is_id, cells.as_slice()) else {
            assert!(!is_id, "four cells, not {}: {line}", cells.len());
            return None;
        };
        Some(Self { id, fact, state, last })
    }

    /// The tests that are named; in a covered row there is nothing else.
    fn tests(&self) -> impl Iterator<Item = &'a str> {
        let id = self.id;
        self.last.split(", ").map(move |name| {
            let name = name.strip_prefix('`').and_then(|name| name.strip_suffix('`'));
            name.unwrap_or_else(|| panic!("{id}: the names of tests, in backticks"))
        })
    }
}

/// All ids there are.
fn ids() -> impl Iterator<Item = String> {
    SERIES.into_iter().flat_map(|(prefix, digits, last)| {
        (1..=last).map(move |number| format!("{prefix}-{number:0digits$}"))
    })
}

/// Every test of the library and of this binary: the name a test runner prints, and the doc comment.
fn tests() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut tests = BTreeMap::new();
    // The binaries have tests of their own, which no rule needs.
    read_folder(&root.join("src"), "", &["bin", "main.rs"], &mut tests);
    read_folder(&root.join("tests/integration"), "", &["main.rs"], &mut tests);
    tests
}

fn read_folder(folder: &Path, module: &str, left_out: &[&str], tests: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.unwrap_or_else(|error| panic!("{error}")).path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if left_out.contains(&name) {
            continue;
        }
        if path.is_dir() {
            read_folder(&path, &format!("{module}{name}::"), &[], tests);
        } else if let Some(stem) = name.strip_suffix(".rs") {
            let module = match stem {
                "mod" | "lib" => module.to_owned(),
                _ => format!("{module}{stem}::"),
            };
            let text =
                fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            read_source(&text, &module, tests);
        }
    }
}

/// Adds the tests in a source file; of modules within it only `tests` is known.
fn read_source(text: &str, module: &str, tests: &mut BTreeMap<String, String>) {
    let (mut within, mut comment, mut is_test) = ("", String::new(), false);
    for line in text.lines() {
        if line == "mod tests {" {
            within = "tests::";
        }
        let line = line.trim();
        if let Some(words) = line.strip_prefix("///") {
            comment.push_str(words);
        } else if line.starts_with("#[") {
            is_test |= line == "#[test]" || line.starts_with("#[tokio::test");
        } else {
            let name = line.trim_start_matches("async ").strip_prefix("fn ");
            if let (true, Some((name, _))) = (is_test, name.and_then(|name| name.split_once('('))) {
                tests.insert(format!("{module}{within}{name}"), std::mem::take(&mut comment));
            }
            comment.clear();
            is_test = false;
        }
    }
}

/// True where a test says that it holds the rule `id`: in its doc comment or in its name.
fn bears(name: &str, comment: &str, id: &str) -> bool {
    let function = name.rsplit("::").next().unwrap_or_default();
    let slug = id.to_lowercase().replace('-', "_");
    let in_name = function.match_indices(&slug).any(|(at, _)| {
        let (before, after) = (&function[..at], &function[at + slug.len()..]);
        (before.is_empty() || before.ends_with('_')) && (after.is_empty() || after.starts_with('_'))
    });
    in_name || comment.contains(id)
}

/// Every rule, recommendation and ambiguity of the protocol stands on the page, once, and in order.
#[test]
fn every_rule_is_listed_once() {
    let listed: Vec<&str> = Rule::all(PAGE).iter().map(|rule| rule.id).collect();
    assert_eq!(listed, ids().collect::<Vec<_>>());
}

/// Every rule says what it is about and has a state; what is not covered has a reason.
#[test]
fn every_rule_has_a_state_and_a_reason() {
    for rule in Rule::all(PAGE) {
        assert!(!rule.fact.is_empty() && !rule.last.is_empty(), "{rule:?}");
        if rule.state == COVERED {
            assert!(rule.tests().count() > 0, "{rule:?}");
        } else {
            assert!(REASONED.contains(&rule.state), "{rule:?}");
            assert!(rule.last.contains(' '), "a reason is a sentence: {rule:?}");
        }
    }
}

/// Every test the page names exists, under the name a test runner prints, and bears the rule's id.
#[test]
fn every_named_test_exists_and_bears_the_rule() {
    let tests = tests();
    let mut wrong = Vec::new();
    for rule in Rule::all(PAGE).iter().filter(|rule| rule.state == COVERED) {
        let mut named: Vec<&str> = rule.tests().collect();
        for name in &named {
            match tests.get(*name) {
                None => wrong.push(format!("{}: there is no test {name}", rule.id)),
                Some(comment) if !bears(name, comment, rule.id) => {
                    wrong.push(format!("{}: {name} does not bear that id", rule.id));
                }
                Some(_) => {}
            }
        }
        let all = named.len();
        named.sort_unstable();
        named.dedup();
        if named.len() < all {
            wrong.push(format!("{}: a test is named twice", rule.id));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The numbers in the page's introduction are those of its tables.
#[test]
fn the_introduction_counts_right() {
    let rules = Rule::all(PAGE);
    let count =
        |state: &str| rules.iter().filter(|rule| rule.id.starts_with("S-") && rule.state == state).count();
    let words: Vec<&str> = PAGE.split_whitespace().collect();
    let text = words.join(" ");
    for sentence in [
        format!("Of 144 rules {} are covered, {} come later", count(COVERED), count("later")),
        format!("{} do not apply.", count("not applicable")),
    ] {
        assert!(text.contains(&sentence), "the page does not say: {sentence}");
    }
}

/// The tests are found in their modules, with their comments, and nothing else is taken for one.
#[test]
fn tests_are_found_with_name_and_comment() {
    let source = "/// S-001: one.\n/// More.\n#[tokio::test(flavor = \"x\")]\nasync fn one() {}\n\nfn none() {}\n\n\
                  mod tests {\n    #[test]\n    fn two_s_002() {}\n    /// S-003\n    fn helper() {}\n}\n";
    let mut tests = BTreeMap::new();
    read_source(source, "a::b::", &mut tests);
    let found: Vec<_> = tests.iter().map(|(name, comment)| (name.as_str(), comment.as_str())).collect();
    assert_eq!(found, [("a::b::one", " S-001: one. More."), ("a::b::tests::two_s_002", "")]);
    assert!(bears("a::one", " S-001: one", "S-001") && bears("a::two_s_002", "", "S-002"));
    assert!(!bears("s_001::one", "", "S-001"), "a module is no test");
    assert!(!bears("a::s_0011", "", "S-001") && !bears("a::cs_001", "", "S-001"));
}
