//! What stands in the midst of a text: assignments, URLs and private keys.

use std::ops::Range;

use super::{Scan, is_blank, is_name};

impl Scan<'_> {
    /// Hides secrets in the midst of a text: `--token=abc`, `"token": "abc"`, `Authorization: Basic abc`.
    pub(super) fn inline(&mut self, range: Range<usize>) {
        let mut from = range.start;
        let mut at = range.start;
        while at < range.end {
            let sign = self.bytes[at];
            if matches!(sign, b'=' | b':' | b'>') {
                let next = self.bytes.get(at + 1).copied().filter(|_| at + 1 < range.end);
                let found = self.assigns(sign, next, from..at) && self.is_secret(self.word_before(from..at));
                at += 1;
                if found {
                    at = self.inline_value(sign, at..range.end);
                }
                from = at;
            } else {
                at += 1;
            }
        }
    }

    fn assigns(&self, sign: u8, next: Option<u8>, before: Range<usize>) -> bool {
        let last = self.bytes[before.clone()].last();
        match sign {
            b'=' => !matches!(next, Some(b'=' | b'~')) && !matches!(last, Some(b'=' | b'!' | b'<' | b'~')),
            b':' => {
                next.is_some_and(|next| is_blank(next) || matches!(next, b'"' | b'\'' | b'\\'))
                    || matches!(last, Some(b'"' | b'\''))
            }
            // `<password>abc</password>`
            _ => {
                let word = self.word_before(before.clone());
                word.end == before.end && word.start > before.start && self.bytes[word.start - 1] == b'<'
            }
        }
    }

    /// The name that ends `range`, without its quotes.
    fn word_before(&self, range: Range<usize>) -> Range<usize> {
        let back = |end: usize, part: fn(u8) -> bool| {
            (range.start..end).rev().find(|&at| !part(self.bytes[at])).map_or(range.start, |at| at + 1)
        };
        let end = back(back(range.end, is_blank), |byte| matches!(byte, b'"' | b'\'' | b'\\'));
        back(end, is_name)..end
    }

    /// Hides the value of a secret at the start of `range`; answers where it ends.
    fn inline_value(&mut self, sign: u8, range: Range<usize>) -> usize {
        let arrow = sign == b'=' && self.bytes.get(range.start) == Some(&b'>');
        let start = self.skip_blanks(range.start + usize::from(arrow), range.end);
        let slashes = (start..range.end).take_while(|&at| self.bytes[at] == b'\\').count();
        let quote = self.bytes.get(start + slashes).filter(|&&byte| matches!(byte, b'"' | b'\''));
        let (start, end) = match (sign, quote) {
            (b'>', _) => {
                let end = self.find(start..range.end, |byte| byte == b'<');
                let closes = self.bytes[end..range.end].starts_with(b"</");
                (if closes { start } else { end }, end)
            }
            (_, Some(_)) if start + slashes < range.end => {
                let inner = start + slashes + 1;
                (inner, self.nested_closing(start + slashes, slashes, range.end).unwrap_or(range.end))
            }
            (b'=', _) => {
                let ends = |byte| is_blank(byte) || matches!(byte, b'"' | b'\'' | b'&' | b';' | b'\n');
                (start, self.find(start..range.end, ends))
            }
            _ => (start, range.end),
        };
        self.hide(start..end);
        end
    }

    /// The end of a text whose opening quote at `at` has `slashes` backslashes before it.
    fn nested_closing(&self, at: usize, slashes: usize, end: usize) -> Option<usize> {
        if slashes == 0 {
            return self.quoted_within(at, end).map(|content| content.inner.end);
        }
        let mut run = 0;
        for close in at + 1..end {
            if self.bytes[close] == self.bytes[at] && run == slashes {
                return Some(close - run);
            }
            run = if self.bytes[close] == b'\\' { run + 1 } else { 0 };
        }
        None
    }

    /// Hides user info in URLs.
    pub(super) fn urls(&mut self) {
        let mut at = 0;
        while at < self.bytes.len() {
            let rest = &self.bytes[at..];
            let start = if rest.starts_with(b"://") {
                at + 3
            } else if rest.starts_with(b":\\/\\/") {
                at + 5
            } else {
                at += 1;
                continue;
            };
            at = self.url(start);
        }
    }

    /// A password may hold a `/`, `?` or `#` that should have been escaped, so what stands where the
    /// port should and is none is taken for the start of a password.
    fn url(&mut self, start: usize) -> usize {
        let rest = start..self.bytes.len();
        let ends = |byte: u8| byte.is_ascii_whitespace() || b"/?#\"'<>`\\".contains(&byte);
        let mut end = self.find(rest.clone(), ends);
        let authority = self.text.get(start..end).unwrap_or_default();
        let port = authority.rsplit_once(':').map_or("", |(_, port)| port);
        let odd = !authority.contains('@') && !authority.contains("${") && !authority.starts_with('[');
        if odd && port.bytes().any(|byte| !byte.is_ascii_digit()) {
            let ends = |byte: u8| byte.is_ascii_whitespace() || matches!(byte, b'"' | b'<');
            let stop = |&at: &usize| ends(self.bytes[at]) || self.bytes[at..].starts_with(b"://");
            end = (end..rest.end).find(stop).unwrap_or(rest.end);
        }
        let authority = self.text.get(start..end).unwrap_or_default();
        if let Some((info, _)) = authority.rsplit_once('@') {
            let info = start..start + info.len();
            if self.between_references(info.clone()).iter().any(|part| self.bytes[part.clone()] != *b":") {
                self.hidden.push(info);
            }
        }
        end
    }

    /// Hides the body of every private key.
    pub(super) fn private_keys(&mut self) {
        const BEGIN: &str = "PRIVATE KEY-----";
        let mut from = 0;
        while let Some(found) = self.text[from..].find(BEGIN) {
            let head = self.text[from..from + found].rsplit('\n').next().unwrap_or_default();
            let start = from + found + BEGIN.len();
            from = start;
            if head.contains("-----BEGIN ") {
                from = self.text[start..].find("-----END").map_or(self.text.len(), |end| start + end);
                self.hide(start..from);
            }
        }
    }
}
