//! Just enough DER to take a signed object apart without losing a byte: definite, minimal lengths and nothing left over.

pub(super) const SEQUENCE: u8 = 0x30;
pub(super) const INTEGER: u8 = 0x02;
pub(super) const BIT_STRING: u8 = 0x03;
pub(super) const OBJECT_IDENTIFIER: u8 = 0x06;
/// The `[0]` around a certificate's version.
pub(super) const VERSION: u8 = 0xa0;

/// One element: its content, the whole of it (tag and length included), and what follows.
pub(super) struct Element<'a> {
    pub(super) content: &'a [u8],
    pub(super) whole: &'a [u8],
    pub(super) rest: &'a [u8],
}

/// Reads the element at the start of `input` where it has the one-byte tag `tag`.
pub(super) fn element(tag: u8, input: &[u8]) -> Option<Element<'_>> {
    let (&found, after_tag) = input.split_first()?;
    let (&first, after_first) = after_tag.split_first()?;
    let (length, after_length) = match first {
        0..=0x7f => (usize::from(first), after_first),
        0x81..=0x84 => long_length(usize::from(first & 0x7f), after_first)?,
        _ => return None,
    };
    let content = after_length.get(..length)?;
    let rest = after_length.get(length..)?;
    let whole = input.get(..input.len() - rest.len())?;
    (found == tag).then_some(Element {
        content,
        whole,
        rest,
    })
}

/// The content of the one element that `input` is.
pub(super) fn only(tag: u8, input: &[u8]) -> Option<&[u8]> {
    let element = element(tag, input)?;
    element.rest.is_empty().then_some(element.content)
}

/// The bytes of a BIT STRING whose length is a multiple of 8.
pub(super) fn octets(bit_string: &[u8]) -> Option<&[u8]> {
    match bit_string.split_first()? {
        (0, octets) => Some(octets),
        _ => None,
    }
}

/// The big-endian magnitude of a positive INTEGER, without the zero that keeps it positive.
pub(super) fn positive(integer: &[u8]) -> Option<&[u8]> {
    match integer {
        [0, rest @ ..] => rest.first().filter(|b| **b >= 0x80).map(|_| rest),
        [first, ..] if *first < 0x80 => Some(integer),
        _ => None,
    }
}

fn long_length(count: usize, input: &[u8]) -> Option<(usize, &[u8])> {
    let bytes = input.get(..count)?;
    let length = bytes
        .iter()
        .fold(0_usize, |length, byte| (length << 8) | usize::from(*byte));
    // Minimal (X.690 10.1): no leading zero, and no long form for what the short one holds.
    let minimal = *bytes.first()? != 0 && length > 0x7f;
    Some((length, input.get(count..)?)).filter(|_| minimal)
}
