//! PEM (RFC 7468), strictly: every block must be whole; text around blocks is reported, never guessed at.
//!
//! text -> [`parse`] -> blocks; DER -> [`encode`] -> text

use base64::{Engine, engine::general_purpose::STANDARD};

/// One `-----BEGIN label-----` block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// What stands after `BEGIN`.
    pub label: String,
    /// The decoded content.
    pub der: Vec<u8>,
}

/// What a text holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blocks {
    /// In the order of the text.
    pub blocks: Vec<Block>,
    /// Whether anything but blanks stands after the last block.
    pub text_after: bool,
}

/// Reads every block of a text. Lines outside of blocks are comments.
///
/// # Errors
/// A block that is not whole. Nothing of the text is used then.
pub fn parse(text: &[u8]) -> Result<Blocks, PemError> {
    let mut read = Blocks::default();
    let mut lines = text.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
    while let Some(line) = lines.next() {
        if let Some(label) = marker(line, b"-----BEGIN ") {
            read.blocks.push(body(label, &mut lines)?);
            read.text_after = false;
        } else if marker(line, b"-----END ").is_some() {
            return Err(PemError::EndWithoutBegin);
        } else if !line.is_empty() {
            read.text_after = true;
        }
    }
    Ok(read)
}

/// A block with 64 characters a line; ends with a newline.
pub fn encode(label: &str, der: &[u8]) -> String {
    let base64 = STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    let mut rest = base64.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(LINE));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

/// Why a text is not PEM.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PemError {
    /// `END` first.
    #[error("has an END line without a BEGIN line")]
    EndWithoutBegin,
    /// The text ends inside a block, or another begins.
    #[error("block {0} has no END line")]
    NotClosed(String),
    /// `BEGIN x` is closed by `END y`.
    #[error("block {0} is closed as another")]
    Mismatch(String),
    /// A label that is not text.
    #[error("a BEGIN line names no readable label")]
    Label,
    /// Not base64 (RFC 4648 section 4), headers included.
    #[error("block {0} is not base64")]
    Base64(String),
}

const LINE: usize = 64;

fn body<'a>(label: &[u8], lines: &mut impl Iterator<Item = &'a [u8]>) -> Result<Block, PemError> {
    let label = std::str::from_utf8(label)
        .ok()
        .filter(|l| l.bytes().all(|b| (b' '..=b'~').contains(&b)) && !l.is_empty())
        .ok_or(PemError::Label)?
        .to_owned();
    let mut base64 = Vec::new();
    for line in lines {
        if let Some(end) = marker(line, b"-----END ") {
            if end != label.as_bytes() {
                return Err(PemError::Mismatch(label));
            }
            return match STANDARD.decode(&base64) {
                Ok(der) => Ok(Block { label, der }),
                Err(_) => Err(PemError::Base64(label)),
            };
        }
        if line.starts_with(b"-----") {
            break;
        }
        base64.extend_from_slice(line);
    }
    Err(PemError::NotClosed(label))
}

/// What stands between `start` and the five dashes that end a marker line.
fn marker<'a>(line: &'a [u8], start: &[u8]) -> Option<&'a [u8]> {
    line.strip_prefix(start)?.strip_suffix(b"-----")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::*;

    #[test]
    fn broken_blocks_are_refused_as_a_whole() {
        use PemError as E;
        let whole = encode("X", b"abc");
        let table = [
            ("-----END X-----\n".to_owned(), E::EndWithoutBegin),
            ("-----BEGIN X-----\nYWJj\n".into(), E::NotClosed("X".into())),
            (
                format!("-----BEGIN Y-----\nYWJj\n{whole}"),
                E::NotClosed("Y".into()),
            ),
            (
                "-----BEGIN X-----\nYWJj\n-----END Y-----\n".into(),
                E::Mismatch("X".into()),
            ),
            (
                "-----BEGIN X-----\nYW!j\n-----END X-----\n".into(),
                E::Base64("X".into()),
            ),
            (
                "-----BEGIN X-----\nProc-Type: 4,ENCRYPTED\n\nYWJj\n-----END X-----\n".into(),
                E::Base64("X".into()),
            ),
            (
                "-----BEGIN X-----\nYWJ\n-----END X-----\n".into(),
                E::Base64("X".into()),
            ),
            (
                "-----BEGIN \u{1}-----\n-----END \u{1}-----\n".into(),
                E::Label,
            ),
        ];
        for (text, error) in table {
            assert_eq!(parse(text.as_bytes()), Err(error), "{text}");
        }
    }

    #[test]
    fn comments_blanks_and_line_ends_do_not_matter_but_text_after_is_told() {
        let block = Block {
            label: "X".into(),
            der: vec![7; 100],
        };
        let text = encode("X", &block.der);
        for (form, text_after) in [
            (text.clone(), false),
            (text.trim_end().to_owned(), false),
            (text.replace('\n', "\r\n"), false),
            (format!("# comment\n\n{text}\n \n"), false),
            (format!("{text}trailing"), true),
        ] {
            let read = parse(form.as_bytes()).expect("whole blocks");
            assert_eq!(read.blocks, std::slice::from_ref(&block));
            assert_eq!(read.text_after, text_after, "{form}");
        }
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_back(der in proptest::collection::vec(any::<u8>(), 0..300)) {
            let read = parse(encode("CERTIFICATE", &der).as_bytes()).expect("our own text");
            prop_assert_eq!(read.blocks, vec![Block { label: "CERTIFICATE".into(), der }]);
        }

        #[test]
        fn no_bytes_panic(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&text);
        }
    }
}
