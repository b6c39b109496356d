//! SPIFFE identities: the only parser and printer of `spiffe://` strings.
//!
//! trust domain + namespace + service account -> [`SpiffeId`] -> `spiffe://<td>/ns/<ns>/sa/<sa>` -> [`SpiffeId`]
//!
//! Identities are built from validated parts and compared part by part. Nothing here lower-cases, decodes or
//! normalises: a text that is not already in the one printed form is refused, so no two texts are one identity.

use std::{fmt, str::FromStr};

/// The name that all identities of one mesh share, such as `cluster.local`
/// (SPIFFE ID section 2.1: lower case letters, digits, `.`, `-`, `_`; 1 to 255 bytes).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(String);

impl TrustDomain {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `spiffe://<trust domain>`, without a path: the URI that signing certificates carry (X509-SVID section 4.1).
    pub fn uri(&self) -> String {
        format!("{SCHEME}{}", self.0)
    }
}

/// Who a workload is: its service account in its namespace, within a trust domain.
///
/// ```
/// use malha::identity::{SpiffeId, TrustDomain};
/// let mesh: TrustDomain = "cluster.local".parse()?;
/// let id = SpiffeId::new(&mesh, "shop", "web")?;
/// assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
/// assert_eq!(id.to_string().parse(), Ok(id));
/// # Ok::<(), malha::identity::IdentityError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: String,
    service_account: String,
}

impl SpiffeId {
    /// The identity of a service account.
    ///
    /// # Errors
    /// The part that is not a legal Kubernetes name.
    pub fn new(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        Ok(Self {
            trust_domain: trust_domain.clone(),
            namespace: check_namespace(namespace)?.to_owned(),
            service_account: check_service_account(service_account)?.to_owned(),
        })
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The service account.
    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

/// Why a text is not an identity of ours; one variant per rule.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdentityError {
    /// SPIFFE ID section 2.3 asks readers to take ids of up to 2048 bytes; longer ones are refused unread.
    #[error("a SPIFFE id may have up to {MAX_ID_BYTES} bytes, this one has {0}")]
    TooLong(usize),
    /// Upper case counts as another scheme: the canonical form is lower case.
    #[error("{0:?} does not begin with spiffe://")]
    NotSpiffe(String),
    /// Nothing between `spiffe://` and the path.
    #[error("the trust domain is empty; name it as in cluster.local")]
    EmptyTrustDomain,
    /// Longer than 255 bytes.
    #[error("a trust domain may have up to {MAX_TRUST_DOMAIN_BYTES} bytes, this one has {0}")]
    LongTrustDomain(usize),
    /// `user@` before the trust domain.
    #[error("{0:?} holds a user part; a SPIFFE id has none")]
    User(String),
    /// `:port` after the trust domain.
    #[error("{0:?} holds a port; a SPIFFE id has none")]
    Port(String),
    /// A byte outside `[a-z0-9._-]`.
    #[error(
        "{found:?} is not allowed in trust domain {text:?}; allowed are a-z, 0-9, '.', '-' and '_'"
    )]
    TrustDomainCharacter {
        /// The name as it was given.
        text: String,
        /// The first character at fault.
        found: char,
    },
    /// `?query` or `#fragment`.
    #[error("{0:?} holds a query or a fragment; a SPIFFE id has neither")]
    QueryOrFragment(String),
    /// Percent-encoding would give one identity two spellings.
    #[error("{0:?} holds a '%'; a SPIFFE id is never percent-encoded")]
    PercentEncoded(String),
    /// A byte outside `[A-Za-z0-9._-]` in the path (SPIFFE ID section 2.2).
    #[error(
        "{found:?} is not allowed in the path of {text:?}; allowed are letters, digits, '.', '-' and '_'"
    )]
    PathCharacter {
        /// The id as it was given.
        text: String,
        /// The first character at fault.
        found: char,
    },
    /// The id of a whole trust domain, where a workload's is asked for.
    #[error("{0:?} has no path; a workload's id ends with /ns/<namespace>/sa/<service account>")]
    NoPath(String),
    /// A `/` at the end.
    #[error("{0:?} ends with '/'")]
    TrailingSlash(String),
    /// `//` in the path.
    #[error("{0:?} has an empty path segment")]
    EmptySegment(String),
    /// `.` or `..` as a segment.
    #[error("{0:?} has a relative path segment")]
    RelativeSegment(String),
    /// A SPIFFE id, but not of the form that Kubernetes service accounts have.
    #[error("the path of {0:?} is not /ns/<namespace>/sa/<service account>")]
    NotAServiceAccount(String),
    /// Not an RFC 1123 label.
    #[error(
        "{0:?} is not a namespace's name: up to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
    )]
    Namespace(String),
    /// Not an RFC 1123 subdomain.
    #[error(
        "{0:?} is not a service account's name: up to 253 of a-z, 0-9, '-' and '.', each part between dots beginning and ending with a letter or digit"
    )]
    ServiceAccount(String),
}

const SCHEME: &str = "spiffe://";
const MAX_ID_BYTES: usize = 2048;
const MAX_TRUST_DOMAIN_BYTES: usize = 255;

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        if text.is_empty() {
            return Err(IdentityError::EmptyTrustDomain);
        }
        if text.len() > MAX_TRUST_DOMAIN_BYTES {
            return Err(IdentityError::LongTrustDomain(text.len()));
        }
        let allowed =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
        match text.chars().find(|c| !allowed(*c)) {
            None => Ok(Self(text.to_owned())),
            Some('@') => Err(IdentityError::User(text.to_owned())),
            Some(':') => Err(IdentityError::Port(text.to_owned())),
            Some('%') => Err(IdentityError::PercentEncoded(text.to_owned())),
            Some(found) => Err(IdentityError::TrustDomainCharacter {
                text: text.to_owned(),
                found,
            }),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{SCHEME}{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        if text.len() > MAX_ID_BYTES {
            return Err(IdentityError::TooLong(text.len()));
        }
        let owned = || text.to_owned();
        let Some(rest) = text.strip_prefix(SCHEME) else {
            return Err(IdentityError::NotSpiffe(owned()));
        };
        if rest.contains(['?', '#']) {
            return Err(IdentityError::QueryOrFragment(owned()));
        }
        let Some((authority, path)) = rest.split_once('/') else {
            rest.parse::<TrustDomain>()?;
            return Err(IdentityError::NoPath(owned()));
        };
        let trust_domain: TrustDomain = authority.parse()?;
        check_path(text, path)?;
        let mut segments = path.split('/');
        match (
            segments.next(),
            segments.next(),
            segments.next(),
            segments.next(),
            segments.next(),
        ) {
            (Some("ns"), Some(namespace), Some("sa"), Some(account), None) => {
                Self::new(&trust_domain, namespace, account)
            }
            _ => Err(IdentityError::NotAServiceAccount(owned())),
        }
    }
}

/// SPIFFE ID section 2.2, in the order in which a reader would notice.
fn check_path(text: &str, path: &str) -> Result<(), IdentityError> {
    let owned = || text.to_owned();
    if path.is_empty() || path.ends_with('/') {
        return Err(IdentityError::TrailingSlash(owned()));
    }
    for segment in path.split('/') {
        match segment {
            "" => return Err(IdentityError::EmptySegment(owned())),
            "." | ".." => return Err(IdentityError::RelativeSegment(owned())),
            _ => {}
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        match segment.chars().find(|c| !allowed(*c)) {
            None => {}
            Some('%') => return Err(IdentityError::PercentEncoded(owned())),
            Some(found) => {
                return Err(IdentityError::PathCharacter {
                    text: owned(),
                    found,
                });
            }
        }
    }
    Ok(())
}

fn check_namespace(name: &str) -> Result<&str, IdentityError> {
    if name.len() <= 63 && is_label(name) {
        Ok(name)
    } else {
        Err(IdentityError::Namespace(name.to_owned()))
    }
}

/// Kubernetes bounds a subdomain as a whole (253 bytes), not its labels.
fn check_service_account(name: &str) -> Result<&str, IdentityError> {
    if name.len() <= 253 && name.split('.').all(is_label) {
        Ok(name)
    } else {
        Err(IdentityError::ServiceAccount(name.to_owned()))
    }
}

fn is_label(label: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = label.as_bytes();
    edge(bytes.first())
        && edge(bytes.last())
        && bytes
            .iter()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, proptest};

    use super::*;

    fn parse(text: &str) -> Result<SpiffeId, IdentityError> {
        text.parse()
    }

    #[test]
    fn the_printed_form_is_the_only_form() {
        let id = parse("spiffe://cluster.local/ns/shop/sa/web.v2").expect("the usual form");
        assert_eq!(id.trust_domain().as_str(), "cluster.local");
        assert_eq!(id.namespace(), "shop");
        assert_eq!(id.service_account(), "web.v2");
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/web.v2");
        assert_eq!(id.trust_domain().uri(), "spiffe://cluster.local");
    }

    #[test]
    fn each_broken_rule_has_its_own_error() {
        use IdentityError as E;
        let long_domain = format!("spiffe://{}/ns/a/sa/b", "d".repeat(256));
        let long_id = format!("spiffe://d/ns/a/sa/{}", "b".repeat(2048));
        type Fault = fn(&E) -> bool;
        let table: &[(&str, Fault)] = &[
            ("", |e| matches!(e, E::NotSpiffe(_))),
            ("https://d/ns/a/sa/b", |e| matches!(e, E::NotSpiffe(_))),
            ("SPIFFE://d/ns/a/sa/b", |e| matches!(e, E::NotSpiffe(_))),
            (" spiffe://d/ns/a/sa/b", |e| matches!(e, E::NotSpiffe(_))),
            ("spiffe:/d/ns/a/sa/b", |e| matches!(e, E::NotSpiffe(_))),
            ("spiffe:///ns/a/sa/b", |e| matches!(e, E::EmptyTrustDomain)),
            ("spiffe://", |e| matches!(e, E::EmptyTrustDomain)),
            (&long_domain, |e| matches!(e, E::LongTrustDomain(256))),
            (&long_id, |e| matches!(e, E::TooLong(2067))),
            ("spiffe://me@d/ns/a/sa/b", |e| matches!(e, E::User(_))),
            ("spiffe://d:443/ns/a/sa/b", |e| matches!(e, E::Port(_))),
            ("spiffe://D/ns/a/sa/b", |e| {
                matches!(e, E::TrustDomainCharacter { found: 'D', .. })
            }),
            ("spiffe://exämple/ns/a/sa/b", |e| {
                matches!(e, E::TrustDomainCharacter { found: 'ä', .. })
            }),
            ("spiffe://d%2e/ns/a/sa/b", |e| {
                matches!(e, E::PercentEncoded(_))
            }),
            ("spiffe://d", |e| matches!(e, E::NoPath(_))),
            ("spiffe://d/", |e| matches!(e, E::TrailingSlash(_))),
            ("spiffe://d/ns/a/sa/b/", |e| {
                matches!(e, E::TrailingSlash(_))
            }),
            ("spiffe://d//ns/a/sa/b", |e| matches!(e, E::EmptySegment(_))),
            ("spiffe://d/ns//sa/b", |e| matches!(e, E::EmptySegment(_))),
            ("spiffe://d/ns/a/sa/..", |e| {
                matches!(e, E::RelativeSegment(_))
            }),
            ("spiffe://d/ns/./sa/b", |e| {
                matches!(e, E::RelativeSegment(_))
            }),
            ("spiffe://d/ns/a/../sa/b", |e| {
                matches!(e, E::RelativeSegment(_))
            }),
            ("spiffe://d/ns/%2e%2e/sa/b", |e| {
                matches!(e, E::PercentEncoded(_))
            }),
            ("spiffe://d/ns/a/sa/b?x=1", |e| {
                matches!(e, E::QueryOrFragment(_))
            }),
            ("spiffe://d/ns/a/sa/b#x", |e| {
                matches!(e, E::QueryOrFragment(_))
            }),
            ("spiffe://d/ns/a/sa/b\n", |e| {
                matches!(e, E::PathCharacter { found: '\n', .. })
            }),
            ("spiffe://d/ns/a/sa/b\0", |e| {
                matches!(e, E::PathCharacter { found: '\0', .. })
            }),
            ("spiffe://d/ns/a/sa/ｂ", |e| {
                matches!(e, E::PathCharacter { .. })
            }),
            ("spiffe://d/ns/a/sa/b/c", |e| {
                matches!(e, E::NotAServiceAccount(_))
            }),
            ("spiffe://d/ns/a/sa", |e| {
                matches!(e, E::NotAServiceAccount(_))
            }),
            ("spiffe://d/sa/a/ns/b", |e| {
                matches!(e, E::NotAServiceAccount(_))
            }),
            ("spiffe://d/NS/a/sa/b", |e| {
                matches!(e, E::NotAServiceAccount(_))
            }),
            ("spiffe://d/ns/A/sa/b", |e| matches!(e, E::Namespace(_))),
            ("spiffe://d/ns/a.b/sa/b", |e| matches!(e, E::Namespace(_))),
            ("spiffe://d/ns/-a/sa/b", |e| matches!(e, E::Namespace(_))),
            ("spiffe://d/ns/a_b/sa/b", |e| matches!(e, E::Namespace(_))),
            ("spiffe://d/ns/a/sa/b..c", |e| {
                matches!(e, E::ServiceAccount(_))
            }),
            ("spiffe://d/ns/a/sa/b.", |e| {
                matches!(e, E::ServiceAccount(_))
            }),
            ("spiffe://d/ns/a/sa/b-", |e| {
                matches!(e, E::ServiceAccount(_))
            }),
        ];
        for (text, is_expected) in table {
            let error = parse(text).expect_err(text);
            assert!(is_expected(&error), "{text:?} gave {error:?}");
        }
    }

    #[test]
    fn parts_cannot_smuggle_a_second_identity() {
        let mesh: TrustDomain = "d".parse().expect("a legal trust domain");
        for namespace in ["", "a/sa/x", "..", "a\n", "A", &"a".repeat(64)] {
            assert!(
                SpiffeId::new(&mesh, namespace, "b").is_err(),
                "{namespace:?}"
            );
        }
        for account in ["", "b/..", "b/sa/c", "b%2f", ".", &"b".repeat(254)] {
            assert!(SpiffeId::new(&mesh, "a", account).is_err(), "{account:?}");
        }
        assert!(SpiffeId::new(&mesh, &"a".repeat(63), &"b".repeat(253)).is_ok());
    }

    #[test]
    fn names_with_dots_and_dashes_never_match_each_other() {
        let mesh: TrustDomain = "d".parse().expect("a legal trust domain");
        let names = ["a-b", "a.b", "aab", "ab", "a--b", "a-.b"];
        for (i, left) in names.iter().enumerate() {
            for (j, right) in names.iter().enumerate() {
                let (Ok(x), Ok(y)) = (
                    SpiffeId::new(&mesh, "n", left),
                    SpiffeId::new(&mesh, "n", right),
                ) else {
                    continue;
                };
                assert_eq!(x == y, i == j, "{left} and {right}");
            }
        }
    }

    fn label() -> impl Strategy<Value = String> {
        "[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?"
    }

    proptest! {
        #[test]
        fn parsing_what_was_printed_gives_it_back(
            domain in "[a-z0-9._-]{1,255}",
            namespace in label(),
            account in proptest::collection::vec(label(), 1..5),
        ) {
            let id = SpiffeId::new(&domain.parse().expect("legal"), &namespace, &account.join("."))
                .expect("legal");
            prop_assert_eq!(parse(&id.to_string()), Ok(id));
        }

        #[test]
        fn whatever_is_accepted_prints_as_it_was_read(text in any::<String>()) {
            if let Ok(id) = parse(&text) {
                prop_assert_eq!(id.to_string(), text);
            }
        }

        #[test]
        fn near_misses_of_the_form_never_panic_and_never_normalise(
            text in "spiffe://[a-zA-Z0-9.%:@_/-]{0,12}(/ns/[a-zA-Z0-9./%-]{0,8})?(/sa/[a-z0-9./%-]{0,8})?"
        ) {
            if let Ok(id) = parse(&text) {
                prop_assert!(id.to_string() == text);
            }
        }
    }
}
