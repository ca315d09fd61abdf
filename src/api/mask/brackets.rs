//! What stands in brackets, on one line or many: JSON, and the flow style of YAML, TOML and HCL.

use std::ops::Range;

use super::{Meaning, Pair, Quoted, Scan, is_blank, is_name};

/// How often, in lengths of the text, brackets may be followed in vain; then they count within a line.
const TRIES: usize = 4;

/// An open bracket.
struct Bracket {
    from: usize,
    map: bool,
    secret: bool,
    key: Option<(Meaning, bool)>,
    /// A line has ended since the key.
    fresh: bool,
    pair: Pair,
}

impl Scan<'_> {
    /// Scans from the bracket at `at`, which stands in a line with this `indent`, to the one that
    /// closes it; `None` and no trace if nothing does.
    pub(super) fn brackets(&mut self, at: usize, indent: usize, secret: bool) -> Option<usize> {
        let long = self.futile <= TRIES * self.bytes.len();
        let limit = if long { self.bytes.len() } else { self.line_end(at) };
        let hidden = self.hidden.len();
        match self.within(at..limit, secret, Some(indent)) {
            Ok(after) => Some(after),
            Err(given_up) => {
                self.hidden.truncate(hidden);
                self.futile += given_up.saturating_sub(at);
                None
            }
        }
    }

    /// Scans from the bracket at the start of `range` to the one that closes it; the end of `range` will
    /// do too, unless an `indent` says that it must close, and before a line that is indented less.
    /// `Err` is the place where that became impossible.
    pub(super) fn within(
        &mut self,
        range: Range<usize>,
        secret: bool,
        indent: Option<usize>,
    ) -> Result<usize, usize> {
        let mut open: Vec<Bracket> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let byte = self.bytes[at];
            match byte {
                b'{' | b'[' => {
                    let secret = open.last().map_or(secret, Bracket::hides);
                    open.push(Bracket::new(at, byte == b'{', secret));
                }
                b'}' | b']' => {
                    let from = open.pop().map_or(at, |bracket| bracket.from);
                    let Some(top) = open.last_mut() else { return Ok(at + 1) };
                    if top.means(Meaning::Value) {
                        top.pair.value = Some(from..at + 1);
                    }
                }
                b'\n' | b',' => {
                    if self.dedents(at..at + 1, indent) {
                        return Err(at);
                    }
                    if let Some(top) = open.last_mut() {
                        top.fresh = true;
                        top.key = top.key.filter(|_| byte == b'\n');
                    }
                }
                b'#' | b'/' if self.comment(at, range.end) => {
                    let end = self.line_end(at).min(range.end);
                    self.inline(at..end);
                    at = end;
                    continue;
                }
                b' ' | b'\t' | b'\r' | b':' | b'=' => {}
                _ => {
                    let Some(top) = open.last_mut() else { return Err(at) };
                    at = self.element(at..range.end, top, indent)?;
                    continue;
                }
            }
            at += 1;
        }
        if indent.is_none() { Ok(range.end) } else { Err(range.end) }
    }

    fn comment(&self, at: usize, end: usize) -> bool {
        let apart = at == 0 || self.bytes[at - 1].is_ascii_whitespace();
        apart && (self.bytes[at] == b'#' || (at + 1 < end && self.bytes[at + 1] == b'/'))
    }

    /// Whether a line that begins in `range` is indented less.
    fn dedents(&self, range: Range<usize>, indent: Option<usize>) -> bool {
        let Some(indent) = indent else { return false };
        range.into_iter().filter(|&at| self.bytes[at] == b'\n').any(|at| {
            let blanks = self.bytes[at + 1..].iter().take(indent).take_while(|&&byte| is_blank(byte)).count();
            let next = self.bytes.get(at + 1 + blanks);
            blanks < indent && next.is_some_and(|&next| next != b'\n')
        })
    }

    /// A key or a scalar at the start of `range`; answers where it ends.
    fn element(
        &mut self,
        range: Range<usize>,
        top: &mut Bracket,
        indent: Option<usize>,
    ) -> Result<usize, usize> {
        let Range { start: at, end } = range;
        let quoted = matches!(self.bytes[at], b'"' | b'\'');
        let content = match quoted.then(|| self.quoted_within(at, end)) {
            Some(Some(content)) if self.dedents(content.inner.clone(), indent) => return Err(content.after),
            Some(Some(content)) => content,
            Some(None) if indent.is_some() => return Err(end),
            Some(None) => Quoted { inner: at + 1..end, after: end },
            None => self.plain(at, end, top),
        };
        let next = (content.after..end).find(|&next| !self.bytes[next].is_ascii_whitespace());
        let sign = next.map(|next| self.bytes[next]);
        let key = matches!(sign, Some(b':' | b'=')) && (quoted || next == Some(content.after));
        if let (true, Some(next)) = (key, next) {
            let arrow = self.bytes.get(next + 1) == Some(&b'>');
            top.key = Some((self.meaning(content.inner), sign == Some(b':')));
            top.fresh = false;
            return Ok(next + 1 + usize::from(arrow));
        }
        let after = content.after;
        self.scalar(content.inner, top);
        Ok(after)
    }

    /// An unquoted key or scalar; one that ends at `:` or `=` is a key.
    fn plain(&self, start: usize, end: usize, top: &Bracket) -> Quoted {
        let mut at = start;
        let greedy = top.hides() && top.key.is_some_and(|(_, colon)| !colon);
        let mut tight = top.map && top.key.is_none();
        while at < end {
            match self.bytes[at] {
                b'}' | b']' | b'{' | b'[' | b'\n' => break,
                b',' if !greedy || self.blank_or_end(at + 1, end) => break,
                b':' if at + 1 == end || b" \t\r\n,}]".contains(&self.bytes[at + 1]) => break,
                // `{token:abc}` is no YAML, but is written; only the first colon counts, to stay linear.
                b':' if tight => {
                    tight = false;
                    if matches!(self.bytes[at + 1], b'"' | b'\'') || self.is_secret(start..at) {
                        break;
                    }
                    at += 1;
                }
                b'=' if top.takes_equals() => break,
                b'$' => at = self.reference(at, at + 2, end, is_reference).unwrap_or(at + 1),
                _ => at += 1,
            }
        }
        // A stray sign must not stop the scan.
        Quoted { inner: start..at, after: at.max(start + 1) }
    }

    fn scalar(&mut self, content: Range<usize>, top: &mut Bracket) {
        if top.hides() {
            self.hide(content);
            return;
        }
        self.inline(content.clone());
        if top.means(Meaning::Value) {
            top.pair.value = Some(content);
        } else if top.means(Meaning::Name) && self.is_secret(content) {
            top.pair.named = true;
            if let Some(value) = top.pair.value.take() {
                self.hide(value);
            }
        }
    }
}

impl Bracket {
    fn new(from: usize, map: bool, secret: bool) -> Self {
        Self { from, map, secret, key: None, fresh: true, pair: Pair::default() }
    }

    fn means(&self, meaning: Meaning) -> bool {
        self.key.is_some_and(|(key, _)| key == meaning)
    }

    /// Whether the next value is a secret.
    fn hides(&self) -> bool {
        self.secret || self.means(Meaning::Secret) || (self.pair.named && self.means(Meaning::Value))
    }

    /// Whether `=` can end a key here, and is not a part of a value.
    fn takes_equals(&self) -> bool {
        self.key.is_none_or(|(_, colon)| self.fresh && !colon)
    }
}

/// A byte between the braces of `${…}`.
fn is_reference(byte: u8) -> bool {
    is_name(byte) || matches!(byte, b':' | b'/')
}
