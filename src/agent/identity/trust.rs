//! Which roots are trusted now, of what three voices say: the mounted file, the answer to a CSR, and the control plane's
//! push.
//!
//! They say the same thing at different times: a push is there in milliseconds, an answer once in half a leaf's life, a
//! mounted ConfigMap a minute or more after it changed. So each is heard when it *changes its mind*, and while the push
//! is attended nothing else counts: a file that lags behind would otherwise bring back, for a minute, the root that was
//! just taken out.

use std::fmt;

use crate::ca::{
    bundle::{Bundle, BundleError},
    certificate::{CaCertificate, CertificateError},
};

/// Who says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Voice {
    /// The file that the kubelet mounts.
    File,
    /// The last element of a certificate answer.
    Answer,
    /// The control plane's subscription.
    Push,
}

/// The trust set, and what each voice said last.
#[derive(Clone, Debug, Default)]
pub(super) struct Trust {
    current: Bundle,
    said: [Bundle; 3],
    attended: bool,
}

impl Trust {
    /// The roots that are trusted now; empty before anybody has spoken.
    pub(super) fn bundle(&self) -> &Bundle {
        &self.current
    }

    /// Takes in what a voice says: true where the trust set is another one now. An empty bundle is no voice's: it is not
    /// heard.
    pub(super) fn hear(&mut self, voice: Voice, bundle: Bundle) -> bool {
        if bundle.is_empty() {
            return false;
        }
        let news = self.said[voice as usize] != bundle;
        let counts = voice == Voice::Push || (news && !self.attended);
        let changes = counts && self.current != bundle;
        if changes {
            self.current = bundle.clone();
        }
        self.said[voice as usize] = bundle;
        changes
    }

    /// What the trust set would be after that.
    pub(super) fn after(&self, voice: Voice, bundle: Bundle) -> Bundle {
        let mut trust = self.clone();
        trust.hear(voice, bundle);
        trust.current
    }

    /// Whether the push can be heard: while it can, no other voice counts.
    pub(super) fn attend(&mut self, attended: bool) {
        self.attended = attended;
    }
}

impl fmt::Display for Voice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Answer => "answer",
            Self::Push => "push",
        })
    }
}

/// Reads a bundle as strictly as peers would have to: every block a certificate that may sign others and signed itself.
///
/// # Errors
/// Nothing of the text is used then.
pub(super) fn read_roots(text: &[u8]) -> Result<Bundle, RootsError> {
    let bundle = Bundle::parse_pem(text)?;
    for root in bundle.certificates() {
        if !CaCertificate::parse(root)?.is_root() {
            return Err(RootsError::Intermediate);
        }
    }
    Ok(bundle)
}

/// Why a text is not the mesh's roots.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RootsError {
    /// No bundle at all.
    #[error("the trust bundle {0}")]
    Bundle(#[from] BundleError),
    /// A leaf, or worse.
    #[error("the trust bundle holds what is no root: {0}")]
    Root(#[from] CertificateError),
    /// Envoy takes no anchor that another one signed, so nobody shall.
    #[error("the trust bundle holds what is no root: a certificate that another one signed")]
    Intermediate,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::{
        Serial, pem,
        rotation::RotationPolicy,
        tests::support::{HOUR, at, authority, founded, new_key, roll, workload},
    };

    #[test]
    fn whoever_changes_its_mind_is_heard() {
        let (a, b) = (root(), root());
        let mut trust = Trust::default();
        assert!(trust.hear(Voice::File, a.clone()));
        assert!(!trust.hear(Voice::Answer, a.clone()));
        assert!(trust.hear(Voice::Answer, b.clone()));
        // the file lags behind; it has not changed its mind
        assert!(!trust.hear(Voice::File, a.clone()));
        assert_eq!(*trust.bundle(), b);
        assert!(!trust.hear(Voice::File, b.clone()));
        // the control plane is gone for good, and somebody made a new one: only the file can tell
        assert!(trust.hear(Voice::File, a.clone()));
        assert_eq!(*trust.bundle(), a);
    }

    #[test]
    fn while_the_push_is_attended_a_lagging_file_brings_no_root_back() {
        let (a, b) = (root(), root());
        let both = joined(&a, &b);
        let mut trust = Trust::default();
        trust.hear(Voice::File, a.clone());
        trust.attend(true);
        assert!(trust.hear(Voice::Push, both.clone()));
        assert!(trust.hear(Voice::Push, b.clone()));
        assert!(!trust.hear(Voice::File, both));
        assert!(!trust.hear(Voice::Answer, a.clone()));
        assert_eq!(*trust.bundle(), b);
        // and when the push falls silent, what was said meanwhile is old
        trust.attend(false);
        assert!(!trust.hear(Voice::Answer, a.clone()));
        assert_eq!(*trust.bundle(), b);
        assert!(trust.hear(Voice::File, a));
    }

    #[test]
    fn an_empty_bundle_replaces_nothing() {
        let a = root();
        let mut trust = Trust::default();
        trust.hear(Voice::File, a.clone());
        for voice in [Voice::File, Voice::Answer, Voice::Push] {
            assert!(!trust.hear(voice, Bundle::default()));
        }
        assert_eq!(*trust.bundle(), a);
        assert_eq!(trust.after(Voice::Answer, Bundle::default()), a);
    }

    #[test]
    fn a_leaf_a_key_and_an_empty_text_are_no_roots() {
        let now = at("2026-11-22T10:00:00Z");
        let authority = authority(&founded(now, &RotationPolicy::default()));
        let key = new_key();
        let dice = Serial::random(roll());
        let leaf = authority
            .issue(&key.public_key(), &workload("a", "b"), HOUR, dice, now)
            .expect("issued");
        let good = authority.bundle().to_pem();
        let leaf = pem::encode("CERTIFICATE", &leaf.chain[0]);
        assert_eq!(read_roots(good.as_bytes()).as_ref(), Ok(authority.bundle()));
        for (text, part) in [
            (
                format!("{good}{leaf}"),
                "no root: a certificate is not a CA's",
            ),
            (
                format!("{good}{}", pem::encode("PRIVATE KEY", key.pkcs8())),
                "block 2 is not a CERTIFICATE",
            ),
            (String::new(), "holds no CERTIFICATE block"),
            (good.replace("-----END", "-----AND"), "has no END line"),
        ] {
            let fault = read_roots(text.as_bytes()).expect_err(part).to_string();
            assert!(fault.contains(part), "{fault}");
        }
    }

    fn root() -> Bundle {
        let now = at("2026-11-22T10:00:00Z");
        founded(now, &RotationPolicy::default()).bundle()
    }

    fn joined(a: &Bundle, b: &Bundle) -> Bundle {
        read_roots((a.to_pem() + &b.to_pem()).as_bytes()).expect("two roots")
    }
}
