//! Mutations that any target can use: of bytes, and of protobuf as a tree of fields.

use fastrand::Rng;

/// Numbers at which things tend to break.
const NUMBERS: [u64; 20] = [
    0,
    1,
    2,
    7,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x3fff,
    0x4000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX - 1,
    u64::MAX,
];

/// Texts at which things tend to break.
const TEXTS: [&[u8]; 20] = [
    b"",
    b"\0",
    b"a\0b",
    b"\xff",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\xf4\x8f\xbf\xbf",
    "\u{feff}\u{202e}".as_bytes(),
    b"service.name",
    b"host.name",
    b"groups",
    b"agent.groups",
    b"clients_count",
    b"opamp.ephemeral",
    b"k8s.pod.uid",
    b"a, ,b,,c",
    b"'; DROP TABLE agents; --",
    b"\\u0000",
    b"{\"a\":",
    b"TRUE",
];

/// A number that is often one of those at which things break.
pub(crate) fn number(rng: &mut Rng) -> u64 {
    match rng.u8(0..4) {
        0 => rng.u64(0..32),
        1 => rng.u64(..) >> rng.u32(0..64),
        _ => NUMBERS[rng.usize(0..NUMBERS.len())].wrapping_add(rng.u64(0..3)).wrapping_sub(1),
    }
}

/// A varint of `value`, now and then written longer than it must be.
pub(crate) fn varint(value: u64, out: &mut Vec<u8>) {
    let mut left = value;
    while left > 0x7f {
        out.push(left.to_le_bytes()[0] | 0x80);
        left >>= 7;
    }
    out.push(left.to_le_bytes()[0]);
}

/// The varint at the front of `bytes` and its length.
pub(crate) fn read_varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0_u64;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f).checked_shl(u32::try_from(7 * index).ok()?).unwrap_or_default();
        if byte & 0x80 == 0 {
            return Some((value, index + 1));
        }
    }
    None
}

/// A range of at most `longest` places within `length`.
fn range(rng: &mut Rng, length: usize, longest: usize) -> std::ops::Range<usize> {
    let start = rng.usize(0..=length);
    let end = (start + rng.usize(0..=longest)).min(length);
    start..end
}

/// One mutation that knows nothing of what the bytes mean.
pub(crate) fn bytes(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let mut out = input.to_vec();
    match rng.u8(0..11) {
        0 | 1 if !out.is_empty() => {
            let at = rng.usize(0..out.len());
            out[at] ^= 1 << rng.u8(0..8);
        }
        2 if !out.is_empty() => {
            let at = rng.usize(0..out.len());
            out[at] = rng.u8(..);
        }
        3 => {
            let part = range(rng, out.len(), 16);
            out.drain(part);
        }
        4 => {
            let (part, at) = (range(rng, out.len(), 32), rng.usize(0..=out.len()));
            let copy = out[part].to_vec();
            out.splice(at..at, copy);
        }
        5 => {
            let (part, at) = (range(rng, other.len(), 64), rng.usize(0..=out.len()));
            out.splice(at..at, other[part].iter().copied());
        }
        6 => {
            // The front of one, the back of the other.
            let (cut, from) = (rng.usize(0..=out.len()), rng.usize(0..=other.len()));
            out.truncate(cut);
            out.extend(&other[from..]);
        }
        7 => {
            let at = rng.usize(0..=out.len());
            let mut inserted = Vec::new();
            varint(number(rng), &mut inserted);
            let until = if rng.bool() { at } else { (at + 1).min(out.len()) };
            out.splice(at..until, inserted);
        }
        8 => {
            let at = rng.usize(0..=out.len());
            out.splice(at..at, TEXTS[rng.usize(0..TEXTS.len())].iter().copied());
        }
        9 => out.truncate(rng.usize(0..=input.len())),
        _ => {
            let at = rng.usize(0..=out.len());
            let inserted: Vec<u8> = (0..rng.usize(1..8)).map(|_| rng.u8(..)).collect();
            out.splice(at..at, inserted);
        }
    }
    out
}

/// A field as it lies on the wire.
#[derive(Clone, Debug)]
struct Field {
    number: u64,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Varint(u64),
    Fixed(Vec<u8>),
    Bytes(Vec<u8>),
    Message(Vec<Field>),
    /// Bytes whose announced length is a lie.
    Lie(u64, Vec<u8>),
    Group(bool),
}

/// The fields of a message; none where the bytes are none.
fn fields(mut bytes: &[u8], depth: usize) -> Option<Vec<Field>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (tag, taken) = read_varint(bytes)?;
        bytes = &bytes[taken..];
        let content = match tag & 7 {
            0 => {
                let (value, taken) = read_varint(bytes)?;
                bytes = &bytes[taken..];
                Content::Varint(value)
            }
            kind @ (1 | 5) => {
                let (fixed, rest) = bytes.split_at_checked(if kind == 1 { 8 } else { 4 })?;
                bytes = rest;
                Content::Fixed(fixed.to_vec())
            }
            2 => {
                let (length, taken) = read_varint(bytes)?;
                let (content, rest) = bytes[taken..].split_at_checked(usize::try_from(length).ok()?)?;
                bytes = rest;
                match fields(content, depth.checked_sub(1)?) {
                    Some(inner) if !inner.is_empty() => Content::Message(inner),
                    _ => Content::Bytes(content.to_vec()),
                }
            }
            3 => Content::Group(true),
            4 => Content::Group(false),
            _ => return None,
        };
        if tag >> 3 == 0 {
            return None;
        }
        found.push(Field { number: tag >> 3, content });
    }
    Some(found)
}

fn write(fields: &[Field], out: &mut Vec<u8>) {
    for Field { number, content } in fields {
        let tag = |kind: u64| number << 3 | kind;
        match content {
            Content::Varint(value) => {
                varint(tag(0), out);
                varint(*value, out);
            }
            Content::Fixed(fixed) => {
                varint(tag(if fixed.len() == 8 { 1 } else { 5 }), out);
                out.extend(fixed);
            }
            Content::Bytes(bytes) => {
                varint(tag(2), out);
                varint(bytes.len() as u64, out);
                out.extend(bytes);
            }
            Content::Lie(length, bytes) => {
                varint(tag(2), out);
                varint(*length, out);
                out.extend(bytes);
            }
            Content::Message(inner) => {
                let mut bytes = Vec::new();
                write(inner, &mut bytes);
                varint(tag(2), out);
                varint(bytes.len() as u64, out);
                out.extend(bytes);
            }
            Content::Group(begins) => varint(tag(if *begins { 3 } else { 4 }), out),
        }
    }
}

/// One mutation of a protobuf message as a tree; of its bytes where it is none.
pub(crate) fn message(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let Some(mut tree) = fields(input, 100).filter(|_| rng.u8(0..10) > 0) else {
        return bytes(rng, input, other);
    };
    let donor = fields(other, 100).unwrap_or_default();
    let list = descend(rng, &mut tree);
    mutate_list(rng, list, &donor);
    let mut out = Vec::new();
    write(&tree, &mut out);
    out
}

/// The fields of a random message in the tree.
fn descend<'a>(rng: &mut Rng, mut list: &'a mut Vec<Field>) -> &'a mut Vec<Field> {
    loop {
        let inner: Vec<usize> =
            (0..list.len()).filter(|at| matches!(&list[*at].content, Content::Message(_))).collect();
        if inner.is_empty() || rng.u8(0..4) == 0 {
            return list;
        }
        let at = inner[rng.usize(0..inner.len())];
        let Content::Message(inner) = &mut list[at].content else {
            unreachable!("only messages were picked")
        };
        list = inner;
    }
}

fn mutate_list(rng: &mut Rng, list: &mut Vec<Field>, donor: &[Field]) {
    if list.is_empty() || rng.u8(0..8) == 0 {
        let at = rng.usize(0..=list.len());
        if let Some(field) = graft(rng, donor) {
            list.insert(at, field);
        }
        return;
    }
    let at = rng.usize(0..list.len());
    match rng.u8(0..16) {
        0 => {
            list.remove(at);
        }
        1 => {
            let (copy, to) = (list[at].clone(), rng.usize(0..=list.len()));
            list.insert(to, copy);
        }
        2 => {
            let to = rng.usize(0..list.len());
            list.swap(at, to);
        }
        3 => list[at].number = if rng.bool() { rng.u64(1..16) } else { number(rng).max(1) & 0x1fff_ffff },
        4 => list[at].content = Content::Varint(number(rng)),
        5 => {
            list[at].content =
                Content::Fixed(number(rng).to_le_bytes()[..if rng.bool() { 4 } else { 8 }].to_vec());
        }
        6 => list[at].content = Content::Bytes(TEXTS[rng.usize(0..TEXTS.len())].to_vec()),
        7 => {
            // As long as what is cut off, or a little longer.
            let length = rng.usize(250..260);
            let letter = ["a", "é", "\u{10ffff}", "\0"][rng.usize(0..4)];
            list[at].content = Content::Bytes(letter.repeat(length).into_bytes());
        }
        8 => {
            let mut inner = Vec::new();
            write(&list[at..=at], &mut inner);
            list[at].content = Content::Lie(number(rng), inner);
        }
        9 => {
            // Deeper, by a few levels or by very many.
            let levels = if rng.u8(0..8) == 0 { rng.usize(1..120) } else { rng.usize(1..4) };
            let numbers = [rng.u64(1..8), rng.u64(1..8), rng.u64(1..8)];
            for level in 0..levels {
                let inner = list[at].clone();
                list[at] = Field { number: numbers[level % 3], content: Content::Message(vec![inner]) };
            }
        }
        10 => {
            // Once more, many times.
            let copies = if rng.u8(0..32) == 0 { rng.usize(100..3_000) } else { rng.usize(2..40) };
            let copy = list[at].clone();
            let mut size = Vec::new();
            write(std::slice::from_ref(&copy), &mut size);
            // No more of them than an input holds: a tree takes far more memory than its bytes.
            let copies = copies.min((64 << 10) / size.len().max(1));
            list.splice(at..at, std::iter::repeat_n(copy, copies));
        }
        11 => {
            let inner = list[at].clone();
            list[at].content = Content::Message(vec![inner]);
        }
        12 => {
            if let Some(field) = graft(rng, donor) {
                list[at].content = field.content;
            }
        }
        13 => list.insert(at, Field { number: rng.u64(1..20), content: Content::Group(rng.bool()) }),
        14 => {
            if let Content::Varint(value) = &mut list[at].content {
                *value = if rng.bool() { value.wrapping_add(1) } else { *value ^ 1 << rng.u8(0..64) };
            } else if let Content::Bytes(text) = &mut list[at].content {
                *text = bytes(rng, text, b"\0");
            }
        }
        _ => rng.shuffle(list),
    }
}

/// A random field of a tree.
fn graft(rng: &mut Rng, mut tree: &[Field]) -> Option<Field> {
    loop {
        let field = rng.choice(tree)?;
        let Content::Message(inner) = &field.content else { return Some(field.clone()) };
        if rng.u8(0..3) == 0 {
            return Some(field.clone());
        }
        tree = inner;
    }
}
