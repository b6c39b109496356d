//! A trust bundle: a set of root certificates. Compared as a set of DER, so that order, blanks, comments and a missing
//! last newline never matter.

use std::collections::BTreeSet;

use crate::ca::{KeyId, certificate, pem};

/// The set of roots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bundle(BTreeSet<Vec<u8>>);

impl Bundle {
    /// Reads the `CERTIFICATE` blocks of a PEM text. What is around them is a comment.
    ///
    /// # Errors
    /// No certificate, a broken block, a block that is something else: nothing of the text is used then.
    pub fn parse_pem(text: &[u8]) -> Result<Self, BundleError> {
        let read = pem::parse(text)?;
        if read.blocks.is_empty() {
            return Err(BundleError::Empty);
        }
        let mut roots = BTreeSet::new();
        for (block, number) in read.blocks.into_iter().zip(1_usize..) {
            if block.label != "CERTIFICATE" {
                return Err(BundleError::Label(number));
            }
            certificate::key_id(&block.der).map_err(|fault| BundleError::Certificate {
                number,
                fault: fault.to_string(),
            })?;
            roots.insert(block.der);
        }
        Ok(Self(roots))
    }

    /// PEM, sorted by subject key id: every replica writes the same bytes. Ends with a newline.
    pub fn to_pem(&self) -> String {
        let mut sorted: Vec<(KeyId, &Vec<u8>)> = self
            .0
            .iter()
            .map(|der| {
                let id = certificate::key_id(der).expect("every certificate in it was parsed");
                (id, der)
            })
            .collect();
        sorted.sort();
        sorted
            .into_iter()
            .map(|(_, der)| pem::encode("CERTIFICATE", der))
            .collect()
    }

    /// The certificates, DER.
    pub fn certificates(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(Vec::as_slice)
    }

    /// How many roots it holds.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is trusted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Of certificates that were parsed.
    pub(super) fn of<'a>(roots: impl Iterator<Item = &'a certificate::CaCertificate>) -> Self {
        Self(roots.map(|root| root.der().to_owned()).collect())
    }
}

/// Why a text is not a bundle.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BundleError {
    /// Not PEM.
    #[error(transparent)]
    Pem(#[from] pem::PemError),
    /// No certificate in it.
    #[error("holds no CERTIFICATE block")]
    Empty,
    /// A key or a request, which have no business in a bundle.
    #[error("block {0} is not a CERTIFICATE")]
    Label(usize),
    /// Not X.509.
    #[error("block {number} is not a certificate: {fault}")]
    Certificate {
        /// Counted from 1.
        number: usize,
        /// What is wrong.
        fault: String,
    },
}
