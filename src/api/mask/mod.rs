//! Secrets out of effective configs, before anybody sees them.
//!
//! Agents report files in whatever format they use, so the text is scanned, not parsed: line by line
//! as YAML, TOML and `key = value` files are written, and by brackets where a value opens one. What
//! stands under a key with a secret's name is replaced by `***`, and so are user info in URLs and
//! private keys; every other byte stays. Where a text is ambiguous, rather too much is masked than
//! too little. It promises never to panic and to take time linear in the text.

mod brackets;
mod inline;
mod lines;

use std::ops::Range;

use serde_json::Value;

use lines::Lines;

const MASK: &str = "***";

/// What makes a key's name a secret's, in lower case and without punctuation.
const SECRET_NAMES: [&str; 13] = [
    "password",
    "passwd",
    "passphrase",
    "token",
    "secret",
    "apikey",
    "authorization",
    "credential",
    "privatekey",
    "accesskey",
    "cookie",
    "clientkey",
    "keypem",
];

/// Masks the bodies of a stored document `{"<file>": {"body" or "body_base64": …, "content_type": …}}`.
pub(super) fn mask_value(document: &mut Value) {
    let Value::Object(files) = document else { return };
    for file in files.values_mut() {
        if let Some(Value::String(body)) = file.get_mut("body") {
            *body = mask(body);
        }
        if let Some(body) = file.get_mut("body_base64") {
            *body = Value::from(MASK);
        }
    }
}

/// The text with its secrets replaced by `***`. References such as `${env:NAME}` stay.
pub(super) fn mask(text: &str) -> String {
    let mut scan =
        Scan { text, bytes: text.as_bytes(), hidden: Vec::new(), lines: Lines::default(), futile: 0 };
    let mut at = 0;
    while at < text.len() {
        at = scan.line(at);
    }
    scan.urls();
    scan.private_keys();
    scan.finish()
}

/// What a key's name says about its value.
#[derive(Clone, Copy, Default, PartialEq)]
enum Meaning {
    #[default]
    Plain,
    Secret,
    /// `name: authorization`: what the `value` beside it is.
    Name,
    /// `value: …`: a secret where the name beside it is one.
    Value,
}

/// One map: whether the name beside its `value` is a secret's, and the value, if it came first.
#[derive(Default)]
struct Pair {
    named: bool,
    value: Option<Range<usize>>,
}

struct Scan<'a> {
    text: &'a str,
    bytes: &'a [u8],
    hidden: Vec<Range<usize>>,
    lines: Lines,
    /// How many bytes were scanned for brackets that nothing closed.
    futile: usize,
}

/// A scalar: its content, and where it ends with its closing quote.
struct Quoted {
    inner: Range<usize>,
    after: usize,
}

impl Scan<'_> {
    /// Hides `range` line by line, but for blanks at both ends and references.
    fn hide(&mut self, range: Range<usize>) {
        let mut start = range.start;
        while start < range.end {
            let end = self.find(start..range.end, |byte| byte == b'\n');
            let parts = self.between_references(start..end);
            self.hidden.extend(parts);
            start = end + 1;
        }
    }

    /// What `range`, a line, holds beside blanks and references such as `${env:NAME}`.
    fn between_references(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut parts = Vec::new();
        let mut from = range.start;
        let mut at = range.start;
        let name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        while at < range.end {
            let name_from = at + if self.bytes[at..].starts_with(b"${env:") { 6 } else { 2 };
            match self.reference(at, name_from, range.end, name) {
                Some(after) => {
                    parts.push(from..at);
                    (from, at) = (after, after);
                }
                None => at += 1,
            }
        }
        parts.push(from..range.end);
        parts.into_iter().map(|part| self.trimmed(part)).filter(|part| !part.is_empty()).collect()
    }

    /// The end of `${…}` at `at`, if all from `name` to the brace are bytes of a `part`.
    fn reference(&self, at: usize, name: usize, end: usize, part: fn(u8) -> bool) -> Option<usize> {
        if !self.bytes[at..end].starts_with(b"${") {
            return None;
        }
        let close = (name..end).find(|&at| !part(self.bytes[at]))?;
        (close > name && self.bytes[close] == b'}').then_some(close + 1)
    }

    /// A quoted text that starts at `at` and ends before `end`.
    fn quoted_within(&self, at: usize, end: usize) -> Option<Quoted> {
        let quote = self.bytes[at];
        let triple = [quote; 3];
        if self.bytes[at..end].starts_with(&triple)
            && let Some(close) = self.bytes[at + 3..end].windows(3).position(|window| window == triple)
        {
            return Some(Quoted { inner: at + 3..at + 3 + close, after: at + 6 + close });
        }
        let mut close = at + 1;
        while close < end {
            let doubled = quote == b'\'' && close + 1 < end && self.bytes[close + 1] == quote;
            match self.bytes[close] {
                b'\\' if quote == b'"' => close += 2,
                byte if byte == quote && !doubled => {
                    return Some(Quoted { inner: at + 1..close, after: close + 1 });
                }
                byte if byte == quote => close += 2,
                _ => close += 1,
            }
        }
        None
    }

    fn meaning(&self, name: Range<usize>) -> Meaning {
        let name = self.text.get(name).unwrap_or_default();
        match plain_name(name).as_str() {
            "name" | "key" | "header" | "headername" => Meaning::Name,
            "value" | "values" | "headervalue" => Meaning::Value,
            _ if is_secret_name(name) => Meaning::Secret,
            _ => Meaning::Plain,
        }
    }

    fn is_secret(&self, name: Range<usize>) -> bool {
        self.text.get(name).is_some_and(is_secret_name)
    }

    fn trimmed(&self, range: Range<usize>) -> Range<usize> {
        let text = self.text.get(range.clone()).unwrap_or_default();
        let start = range.start + (text.len() - text.trim_start().len());
        start..start + text.trim().len()
    }

    fn line_end(&self, at: usize) -> usize {
        self.find(at..self.bytes.len(), |byte| byte == b'\n')
    }

    fn skip_blanks(&self, at: usize, end: usize) -> usize {
        self.find(at..end, |byte| !is_blank(byte))
    }

    fn blank_or_end(&self, at: usize, end: usize) -> bool {
        at >= end || is_blank(self.bytes[at]) || self.bytes[at] == b'\n'
    }

    fn find(&self, range: Range<usize>, found: impl Fn(u8) -> bool) -> usize {
        let end = range.end;
        range.into_iter().find(|&at| found(self.bytes[at])).unwrap_or(end)
    }

    /// The text with everything hidden replaced.
    fn finish(mut self) -> String {
        self.hidden.sort_unstable_by_key(|range| range.start);
        let mut masked = String::with_capacity(self.text.len());
        let mut end = None;
        for range in self.hidden {
            if end.is_none_or(|end| range.start > end) {
                masked.push_str(self.text.get(end.unwrap_or(0)..range.start).unwrap_or_default());
                masked.push_str(MASK);
            }
            end = end.max(Some(range.end));
        }
        masked.push_str(self.text.get(end.unwrap_or(0)..).unwrap_or_default());
        masked
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r')
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.')
}

/// The letters and digits of a name, in lower case.
fn plain_name(name: &str) -> String {
    name.bytes().filter(u8::is_ascii_alphanumeric).map(|byte| char::from(byte.to_ascii_lowercase())).collect()
}

/// Whether a name is a secret's. `token_file` and `key_path` hold the place of one.
fn is_secret_name(name: &str) -> bool {
    let name = plain_name(name);
    let place =
        ["file", "filename", "path"].iter().any(|end| name.ends_with(end)) && !name.ends_with("profile");
    !place && SECRET_NAMES.iter().any(|secret| name.contains(secret))
}

#[cfg(test)]
mod tests;
