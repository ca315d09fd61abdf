//! The text line by line, as YAML, TOML, properties and environment files are written: a key, a sign,
//! a value, and what is indented below it.

use std::ops::Range;

use super::{Meaning, Pair, Quoted, Scan, is_blank, is_name, is_secret_name};

/// A key that was found: its name, where its value begins, and whether `:` or `=` stands between.
struct Key {
    name: Range<usize>,
    value: usize,
    colon: bool,
}

/// A map of the line-wise formats: its keys stand in this column.
struct Level {
    column: usize,
    pair: Pair,
    /// The value of the pair may go on in the lines below.
    open: bool,
}

/// What the lines before say about the next one.
#[derive(Default)]
pub(super) struct Lines {
    /// Deeper lines are the rest of a secret scalar whose key stands in this column.
    scalar: Option<Scalar>,
    /// Deeper lines are the map or list of a secret key that stands in this column.
    below: Option<usize>,
    /// The line before ended with a backslash after a secret.
    continued: bool,
    /// The section (`[name]`), and whether it has a secret's name.
    section: Option<bool>,
    /// YAML's `? key`, with a secret's name.
    explicit: bool,
    /// Indentation of the present line.
    indent: usize,
    /// The open maps, innermost last.
    levels: Vec<Level>,
    /// A `"` or `'` was found that nothing closes; from then on such a text ends in its line.
    quotes_open: [bool; 2],
}

struct Scalar {
    column: usize,
    colon: bool,
}

impl Scan<'_> {
    /// Scans the line at `at` and whatever it opens; answers where the next line starts.
    pub(super) fn line(&mut self, at: usize) -> usize {
        let end = self.line_end(at);
        let start = self.skip_blanks(at, end);
        if start == end {
            return end + 1;
        }
        let indent = start - at;
        self.lines.indent = indent;
        if self.rest_of_scalar(start, indent, end) {
            return end + 1;
        }
        let (start, item) = self.skip_dashes(start, end);
        if self.lines.below.is_some_and(|below| indent < below || (indent == below && !item)) {
            self.lines.below = None;
        }
        let inside = self.lines.below.is_some();
        let column = start - at;
        if start == end || (!item && !inside && self.heading(start, end)) {
            return end + 1;
        }
        if !inside && matches!(self.bytes[start], b'{' | b'[') {
            return self.open(start);
        }
        if let Some(key) = self.key(start, end, !inside) {
            return self.entry(&key, at, column, item, inside);
        }
        if inside {
            return self.secret(start, indent, true);
        }
        let word = (start..end).find(|&at| is_blank(self.bytes[at])).unwrap_or(end);
        if self.lines.section.is_some() && self.is_secret(start..word) {
            self.hide(word..end);
        } else {
            self.scalar_line(start, end);
        }
        end + 1
    }

    /// A scalar that is no secret, to the end of its line.
    fn scalar_line(&mut self, start: usize, end: usize) {
        let quoted = start < end && matches!(self.bytes[start], b'"' | b'\'');
        let mut rest = start;
        if let Some(content) = quoted.then(|| self.quoted_within(start, end)).flatten() {
            self.inline(content.inner);
            rest = content.after;
        }
        self.inline(rest..end);
    }

    /// Hides the line where it goes on with a secret that began above.
    fn rest_of_scalar(&mut self, start: usize, column: usize, end: usize) -> bool {
        let deeper = match &self.lines.scalar {
            Some(scalar) if column > scalar.column => scalar.colon || !self.looks_like_entry(start, end),
            Some(_) | None => false,
        };
        let goes_on = self.lines.continued || deeper;
        if goes_on {
            self.hide(start..end);
            self.lines.continued = self.lines.continued && self.continues(end);
        } else {
            self.lines.scalar = None;
        }
        goes_on
    }

    /// `name = value`, and not the padding of base64.
    fn looks_like_entry(&self, start: usize, end: usize) -> bool {
        let line = &self.bytes[start..end];
        let name = line.iter().take_while(|&&byte| is_name(byte)).count();
        let mut rest = line[name..].iter().filter(|&&byte| !is_blank(byte));
        name > 0 && rest.next() == Some(&b'=') && !matches!(rest.next(), Some(b'=') | None)
    }

    fn skip_dashes(&self, mut start: usize, end: usize) -> (usize, bool) {
        let first = start;
        while start < end && self.bytes[start] == b'-' && self.blank_or_end(start + 1, end) {
            start = self.skip_blanks(start + 1, end);
        }
        (start, start > first)
    }

    /// `[section]`, `[[section]]` and `? key`.
    fn heading(&mut self, start: usize, end: usize) -> bool {
        let line = self.text.get(start..end).unwrap_or_default().trim_end();
        if let Some(name) = line.strip_prefix("? ") {
            self.lines.explicit = is_secret_name(name);
            return true;
        }
        let line = line.split_once('#').map_or(line, |(line, _)| line.trim_end());
        let heading = line.starts_with('[') && line.ends_with(']') && !line.contains([',', '{', ':', '=']);
        if heading {
            self.lines.section = Some(is_secret_name(line));
            self.lines.levels.clear();
        }
        heading
    }

    /// The key of the line, if it has one. Within a secret, `=` may be a part of it.
    fn key(&self, start: usize, end: usize, equals: bool) -> Option<Key> {
        let mut at = start;
        let mut tight = false;
        while at < end {
            let next = self.bytes.get(at + 1).copied().filter(|_| at + 1 < end);
            match self.bytes[at] {
                b'"' | b'\'' if at == start || self.bytes[at - 1] == b'.' => {
                    let Some(Quoted { inner, after }) = self.quoted_within(at, end) else {
                        if !equals && at == start {
                            return None;
                        }
                        at += 1;
                        continue;
                    };
                    let sign = self.skip_blanks(after, end);
                    match self.bytes.get(sign).filter(|_| sign < end) {
                        Some(b':') => {
                            return Some(Key { name: start..inner.end, value: sign + 1, colon: true });
                        }
                        Some(b'=') if equals => {
                            return Some(Key { name: start..inner.end, value: sign + 1, colon: false });
                        }
                        Some(b'.') => at = after - 1,
                        Some(_) | None if at == start => return None,
                        Some(_) | None => {}
                    }
                }
                b'#' if at == start || is_blank(self.bytes[at - 1]) => return None,
                b'=' if equals => {
                    let arrow = usize::from(next == Some(b'>'));
                    let plain = !self.bytes[start..at].iter().any(|byte| b"(){}<>,;|&".contains(byte));
                    return plain.then_some(Key { name: start..at, value: at + 1 + arrow, colon: false });
                }
                b':' if next.is_none_or(is_blank) => {
                    return Some(Key { name: start..at, value: at + 1, colon: true });
                }
                // `password:abc` of properties; only the first one is looked at, to stay linear.
                b':' if !tight && !matches!(next, Some(b':' | b'=' | b'/')) => {
                    tight = true;
                    if self.is_secret(start..at) {
                        return Some(Key { name: start..at, value: at + 1, colon: true });
                    }
                }
                _ => {}
            }
            at += 1;
        }
        None
    }

    /// Scans the value of a key; answers where the next line starts.
    fn entry(&mut self, key: &Key, line: usize, column: usize, item: bool, inside: bool) -> usize {
        let end = self.line_end(key.value);
        let value = self.skip_blanks(key.value, end);
        let explicit = std::mem::take(&mut self.lines.explicit) && key.name.is_empty();
        let meaning = self.meaning(key.name.clone());
        let named = self.level(column, item, line).is_some_and(|level| level.pair.named);
        let in_section = self.lines.section == Some(true) && !key.colon;
        let secret = inside || explicit || in_section || meaning == Meaning::Secret;
        if secret || (named && meaning == Meaning::Value) {
            return self.secret(value, column, key.colon);
        }
        if value < end && matches!(self.bytes[value], b'{' | b'[') {
            if meaning == Meaning::Value {
                self.remember(value..end, true);
            }
            return self.open(value);
        }
        self.scalar_line(value, end);
        if meaning == Meaning::Value {
            self.remember(value..end, true);
        } else if meaning == Meaning::Name && self.is_secret(value..end) {
            self.name_pair();
        }
        end + 1
    }

    /// Makes the map in `column` the innermost one.
    fn level(&mut self, column: usize, item: bool, line: usize) -> Option<&mut Level> {
        while let Some(top) = self.lines.levels.last()
            && (top.column > column || (item && top.column == column))
        {
            self.lines.levels.pop();
        }
        if self.lines.levels.last().is_none_or(|top| top.column < column) {
            self.lines.levels.push(Level { column, pair: Pair::default(), open: false });
        }
        let level = self.lines.levels.last_mut()?;
        if std::mem::take(&mut level.open)
            && let Some(value) = &mut level.pair.value
        {
            value.end = line;
        }
        Some(level)
    }

    fn remember(&mut self, value: Range<usize>, open: bool) {
        if let Some(level) = self.lines.levels.last_mut() {
            level.pair.value = Some(value);
            level.open = open;
        }
    }

    fn name_pair(&mut self) {
        if let Some(level) = self.lines.levels.last_mut() {
            level.pair.named = true;
            if let Some(value) = level.pair.value.take() {
                self.hide(value);
            }
        }
    }

    /// Hides the value at `value` of a key in `column`; answers where the next line starts.
    fn secret(&mut self, value: usize, column: usize, colon: bool) -> usize {
        let end = self.line_end(value);
        let text = self.text.get(value..end).unwrap_or_default().trim_end();
        if text.is_empty() || text.starts_with('#') && colon {
            self.hide(value..end);
            self.go_below(column, colon);
            return end + 1;
        }
        if colon && is_block_indicator(text) {
            self.lines.scalar = Some(Scalar { column, colon });
            return end + 1;
        }
        match self.bytes[value] {
            b'"' | b'\'' => {
                if let Some(content) = self.quoted(value) {
                    let after = content.after;
                    self.hide(content.inner);
                    return self.after_secret(after);
                }
            }
            b'{' | b'[' => {
                if let Some(after) = self.brackets(value, self.lines.indent, true) {
                    return self.after_secret(after);
                }
                self.go_below(column, true);
                if text.bytes().all(|byte| matches!(byte, b'{' | b'[' | b' ')) {
                    return end + 1;
                }
            }
            _ => {}
        }
        self.hide(value..end);
        self.lines.continued = self.continues(end);
        self.lines.scalar = self.lines.below.is_none().then_some(Scalar { column, colon });
        end + 1
    }

    fn go_below(&mut self, column: usize, colon: bool) {
        if colon && self.lines.below.is_none() {
            self.lines.below = Some(column);
        }
    }

    /// What follows a quoted or bracketed secret in its line belongs to it, unless it cannot.
    fn after_secret(&mut self, after: usize) -> usize {
        let end = self.line_end(after);
        let rest = self.skip_blanks(after, end);
        let apart = rest > after && self.bytes.get(rest) == Some(&b'#');
        if rest < end && (apart || matches!(self.bytes[rest], b',' | b';' | b'}' | b']' | b')')) {
            self.inline(rest..end);
        } else {
            self.hide(rest..end);
        }
        end + 1
    }

    /// Scans the bracket at `at`; answers where the next line starts.
    fn open(&mut self, at: usize) -> usize {
        let after = self.brackets(at, self.lines.indent, false).unwrap_or_else(|| {
            let end = self.line_end(at);
            self.within(at..end, false, None).unwrap_or(end)
        });
        let end = self.line_end(after);
        self.inline(after..end);
        end + 1
    }

    /// A quoted text that starts at `at` and may end in a later line.
    fn quoted(&mut self, at: usize) -> Option<Quoted> {
        let kind = usize::from(self.bytes[at] == b'\'');
        let limit = if self.lines.quotes_open[kind] { self.line_end(at) } else { self.bytes.len() };
        let content = self.quoted_within(at, limit);
        self.lines.quotes_open[kind] |= content.is_none();
        content
    }

    fn continues(&self, end: usize) -> bool {
        let end = if end > 0 && self.bytes[end - 1] == b'\r' { end - 1 } else { end };
        self.bytes[..end].iter().rev().take_while(|&&byte| byte == b'\\').count() % 2 == 1
    }
}

/// `|`, `>-`, `|2+ # comment`: the lines below are one text.
fn is_block_indicator(value: &str) -> bool {
    let Some(rest) = value.strip_prefix(['|', '>']) else { return false };
    let rest = rest.trim_start_matches(|sign: char| sign.is_ascii_digit() || matches!(sign, '+' | '-'));
    rest.trim_start().is_empty() || (rest.starts_with(' ') && rest.trim_start().starts_with('#'))
}
