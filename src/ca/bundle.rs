//! A trust bundle: a set of root certificates. Compared as a set of DER, so that order, blanks, comments and a missing
//! last newline never matter.

use std::collections::BTreeSet;

/// The set of roots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bundle(BTreeSet<Vec<u8>>);

impl Bundle {
    /// The certificates, DER.
    pub fn certificates(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(Vec::as_slice)
    }
    /// Reads the `CERTIFICATE` blocks of a PEM text.
    pub fn parse_pem(_text: &[u8]) -> Result<Self, BundleError> {
        unimplemented!()
    }
    /// PEM, sorted by subject key id: every replica writes the same bytes. Ends with a newline.
    pub fn to_pem(&self) -> String {
        unimplemented!()
    }
}

/// Why a text is not a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// No certificate in it.
    #[error("holds no CERTIFICATE block")]
    Empty,
}
