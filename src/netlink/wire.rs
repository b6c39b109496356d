//! Netlink's messages and attributes as bytes: a header, then attributes of type, length and value, each padded to four
//! bytes. Headers are in the machine's order; what a value's order is, its protocol says.

/// Asks for an answer to this message: zero, or the number of an error.
pub(super) const ACK: u16 = 0x4;
/// A message to the kernel.
pub(super) const REQUEST: u16 = 0x1;
/// Everything of a kind.
pub(super) const DUMP: u16 = 0x300;
/// Makes what is not there.
pub(super) const CREATE: u16 = 0x400;
/// Fails if it is there.
pub(super) const EXCLUSIVE: u16 = 0x200;
/// After what is there.
pub(super) const APPEND: u16 = 0x800;

/// The answer to a message.
const ERROR: u16 = 2;
/// The end of a dump.
const DONE: u16 = 3;
/// Something changed while it was dumped.
const DUMP_INTERRUPTED: u16 = 0x10;
const HEADER: usize = 16;
const NESTED: u16 = 0x8000;
/// The two flags of an attribute's type: nested, and network order.
const TYPE: u16 = 0x3fff;

/// Attributes in the making.
#[derive(Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    /// One more, as bytes.
    pub(super) fn bytes(self, kind: u16, value: &[u8]) -> Self {
        self.put(kind, value)
    }

    /// One more, as text that ends in a zero.
    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.put(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// One more, as a number in network order, as nearly all of nf_tables' are.
    pub(super) fn number(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_be_bytes())
    }

    /// One more that holds attributes itself.
    pub(super) fn nested(self, kind: u16, inner: Self) -> Self {
        self.put(kind | NESTED, &inner.0)
    }

    fn put(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).expect("a rule is far below 64 KiB");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

/// A message; `fixed` is what its protocol puts before the attributes.
pub(super) fn message(
    kind: u16,
    flags: u16,
    sequence: u32,
    fixed: &[u8],
    attributes: &Attributes,
) -> Vec<u8> {
    let length = HEADER + fixed.len() + attributes.0.len();
    let length = u32::try_from(length).expect("a message is far below 4 GiB");
    let mut out = Vec::new();
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend([0; 4]); // the port, which the kernel fills in
    out.extend(fixed);
    out.extend(&attributes.0);
    out
}

/// What the kernel answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply<'a> {
    /// The message that this answers.
    pub(super) sequence: u32,
    /// What it says.
    pub(super) says: Says<'a>,
}

/// The kinds of answers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Says<'a> {
    /// Done.
    Ok,
    /// Not done: the number of the error.
    Failed(i32),
    /// One object of a dump: its type, and what follows the header.
    Object(u16, &'a [u8]),
    /// That was all of the dump.
    Done,
    /// The dump mixes old and new; ask again.
    Interrupted,
}

/// The answers of one datagram; ends at the first that is cut off.
pub(super) fn replies(mut datagram: &[u8]) -> impl Iterator<Item = Reply<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(at(datagram, 0)?);
        let length = usize::try_from(length).ok()?;
        let message = datagram.get(..length)?;
        let body = message.get(HEADER..)?;
        let next = length.next_multiple_of(4).min(datagram.len());
        datagram = &datagram[next..];
        Some(Reply {
            sequence: u32::from_ne_bytes(at(message, 8)?),
            says: says(message, body)?,
        })
    })
}

fn says<'a>(message: &'a [u8], body: &'a [u8]) -> Option<Says<'a>> {
    let kind = u16::from_ne_bytes(at(message, 4)?);
    let flags = u16::from_ne_bytes(at(message, 6)?);
    let error = || Some(i32::from_ne_bytes(at(body, 0)?));
    Some(match kind {
        ERROR | DONE => match error() {
            Some(0) | None if kind == DONE => Says::Done,
            Some(0) => Says::Ok,
            Some(error) => Says::Failed(error.checked_neg()?),
            None => return None,
        },
        _ if flags & DUMP_INTERRUPTED != 0 => Says::Interrupted,
        _ => Says::Object(kind, body),
    })
}

/// Attributes that were read: their types without flags, and their values.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(at(bytes, 0)?));
        let kind = u16::from_ne_bytes(at(bytes, 2)?) & TYPE;
        let value = bytes.get(4..length)?;
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
        Some((kind, value))
    })
}

/// The value of one attribute.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(of, value)| (of == kind).then_some(value))
}

/// A number in network order.
pub(super) fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(attribute(bytes, kind)?.try_into().ok()?))
}

/// Text up to its zero.
pub(super) fn text(bytes: &[u8], kind: u16) -> Option<&str> {
    let value = attribute(bytes, kind)?;
    std::str::from_utf8(value.split(|byte| *byte == 0).next()?).ok()
}

fn at<const N: usize>(bytes: &[u8], from: usize) -> Option<[u8; N]> {
    bytes.get(from..from + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_read_back() {
        let inner = Attributes::default().number(1, 7);
        let bytes = Attributes::default()
            .text(1, "malha")
            .nested(2, inner)
            .bytes(3, &[9])
            .0;
        assert_eq!(bytes.len(), 12 + 12 + 8);
        assert_eq!(text(&bytes, 1), Some("malha"));
        assert_eq!(number(attribute(&bytes, 2).expect("nested"), 1), Some(7));
        assert_eq!(attribute(&bytes, 3), Some(&[9][..]));
        assert_eq!(attribute(&bytes, 4), None);
    }

    #[test]
    fn answers_are_told_apart_and_cut_ones_end_the_reading() {
        let answer =
            |kind, error: i32| message(kind, 0, 5, &error.to_ne_bytes(), &Attributes::default());
        let object = message(0xa00, 0, 6, &[1, 0, 0, 0], &Attributes::default());
        let interrupted = message(0xa00, 0x10, 6, &[1, 0, 0, 0], &Attributes::default());
        let all = [
            answer(ERROR, 0),
            answer(ERROR, -95),
            object,
            interrupted,
            answer(DONE, 0),
        ]
        .concat();
        let read: Vec<_> = replies(&all).map(|reply| reply.says).collect();
        let want = [
            Says::Ok,
            Says::Failed(95),
            Says::Object(0xa00, &[1, 0, 0, 0]),
            Says::Interrupted,
            Says::Done,
        ];
        assert_eq!(read, want);
        for cut in 0..all.len() {
            assert!(replies(&all[..cut]).count() < 5, "cut at {cut}");
        }
        assert_eq!(replies(&[0; 64]).count(), 0, "a length of nothing");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reading_fail_or_last(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
            short in 0_u8..24,
        ) {
            let mut bytes = bytes;
            if let Some(length) = bytes.first_mut() {
                *length = short;
            }
            proptest::prop_assert!(attributes(&bytes).count() <= bytes.len() / 4 + 1);
            proptest::prop_assert!(replies(&bytes).count() <= bytes.len() / HEADER);
            super::super::expression::decode(&bytes);
        }
    }
}
