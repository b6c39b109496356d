//! Tokens for callers of a mesh that has no API server to make them.
//!
//! They look like Kubernetes' own, but for the pod they are not bound to, and go through the same checks.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use aws_lc_rs::{digest, rand};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{
    Directory, DirectoryError,
    files::{self, Access},
};
use crate::{
    caller::{Authenticate, Caller, CallerError, Denial, KeySet, Shown, TokenPolicy, verify},
    identity::{IdentityError, SpiffeId, TrustDomain},
};

/// What the tokens are for.
pub const AUDIENCE: &str = "malha-ca";

/// The longest life of a token. Whoever holds one is the service account for as long.
pub const MAX_TOKEN_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

/// Makes tokens with the key of a directory.
pub struct TokenMaker {
    signing: EncodingKey,
    public: PublicKey,
    trust_domain: TrustDomain,
}

impl TokenMaker {
    /// Reads the directory's key, and makes it where there is none.
    ///
    /// # Errors
    /// The system's, or a file that is no key.
    pub fn open(directory: &Directory, trust_domain: TrustDomain) -> Result<Self, DirectoryError> {
        let key = load_or_make(directory)?;
        Ok(Self {
            signing: EncodingKey::from_ec_der(&Zeroizing::new(key.serialize_der())),
            public: PublicKey::of(&key),
            trust_domain,
        })
    }

    /// A token with which a caller is this service account for `life`.
    ///
    /// # Errors
    /// Names that are none, a life outside of one second to [`MAX_TOKEN_LIFE`].
    pub fn mint(
        &self,
        namespace: &str,
        service_account: &str,
        life: Duration,
        now: Timestamp,
    ) -> Result<String, MintError> {
        SpiffeId::new(&self.trust_domain, namespace, service_account)?;
        if !(Duration::from_secs(1)..=MAX_TOKEN_LIFE).contains(&life) {
            return Err(MintError::Life(life));
        }
        let expires = now
            .checked_add(SignedDuration::from_secs(life.as_secs().cast_signed()))
            .map_err(|_| MintError::Life(life))?;
        let mut id = [0; 16];
        rand::fill(&mut id).map_err(|_| MintError::Randomness)?;
        let claims = json!({
            "iss": self.public.issuer(),
            "aud": [AUDIENCE],
            "sub": format!("system:serviceaccount:{namespace}:{service_account}"),
            "iat": now.as_second(),
            "nbf": now.as_second(),
            "exp": expires.as_second(),
            "jti": URL_SAFE_NO_PAD.encode(id),
            "kubernetes.io": {
                "namespace": namespace,
                // nobody makes service accounts anew here, so the name says it all
                "serviceaccount": { "name": service_account, "uid": service_account },
            },
        });
        let header = Header {
            kid: Some(self.public.id.clone()),
            ..Header::new(Algorithm::ES256)
        };
        jsonwebtoken::encode(&header, &claims, &self.signing).map_err(MintError::Sign)
    }
}

/// Why no token was made.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    /// Not the name of a namespace or service account.
    #[error(transparent)]
    Name(#[from] IdentityError),
    /// Too short or too long.
    #[error("a token may live from 1 second to 24 hours, not {} seconds", .0.as_secs())]
    Life(Duration),
    /// The system has none.
    #[error("the system's random generator failed")]
    Randomness,
    /// A fault of ours.
    #[error("cannot sign the token")]
    Sign(#[source] jsonwebtoken::errors::Error),
}

/// Knows the callers by the tokens of [`TokenMaker`].
pub struct LocalTokens {
    directory: Directory,
    trust_domain: TrustDomain,
    known: ArcSwap<Known>,
    /// Held while the key is read again: a thousand strange tokens at once are one reading.
    reading: tokio::sync::Mutex<()>,
}

struct Known {
    keys: KeySet,
    policy: TokenPolicy,
    read_at: Instant,
}

/// A token of a strange key is no reason to read the file more often.
const REREAD: Duration = Duration::from_secs(1);

impl LocalTokens {
    /// The tokens of this directory's key, which is made where there is none.
    ///
    /// # Errors
    /// The system's, or a file that is no key.
    pub fn open(directory: &Directory, trust_domain: TrustDomain) -> Result<Self, DirectoryError> {
        let known = ArcSwap::from_pointee(Known::read(directory)?);
        Ok(Self {
            directory: directory.clone(),
            trust_domain,
            known,
            reading: tokio::sync::Mutex::default(),
        })
    }

    async fn read_again(&self) -> Result<Known, CallerError> {
        let directory = self.directory.clone();
        match tokio::task::spawn_blocking(move || Known::read(&directory)).await {
            Ok(Ok(known)) => Ok(known),
            Ok(Err(e)) => Err(CallerError::VerifierUnavailable(e.to_string())),
            Err(e) => Err(CallerError::VerifierUnavailable(e.to_string())),
        }
    }

    fn check(&self, known: &Known, token: &str, now: Timestamp) -> Result<Caller, CallerError> {
        verify(token, &known.keys, &known.policy, now)?.into_caller(&self.trust_domain)
    }
}

impl Authenticate for LocalTokens {
    async fn authenticate(&self, token: &str, now: Timestamp) -> Result<Caller, Denial> {
        let known = self.known.load_full();
        let checked = self.check(&known, token, now);
        // the key file may have been removed and made anew since it was read
        let strange = matches!(
            checked,
            Err(CallerError::UnknownKey(_) | CallerError::UnknownIssuer(_))
        );
        if !strange || known.read_at.elapsed() < REREAD {
            return Ok(checked?);
        }
        let Ok(_reading) = self.reading.try_lock() else {
            return Ok(checked?);
        };
        let anew = Arc::new(self.read_again().await?);
        self.known.store(Arc::clone(&anew));
        Ok(self.check(&anew, token, now)?)
    }

    /// There are no pods here that could be gone.
    fn renew(
        &self,
        shown: Shown,
        _address: Option<IpAddr>,
        _now: Timestamp,
    ) -> Result<Caller, CallerError> {
        Ok(shown.into_caller())
    }
}

impl Known {
    fn read(directory: &Directory) -> Result<Self, DirectoryError> {
        let key = load_or_make(directory)?;
        let public = PublicKey::of(&key);
        let jwks = public.jwks().to_string();
        let keys = KeySet::parse(jwks.as_bytes()).map_err(|e| DirectoryError::BadTokenKey {
            path: directory.token_key(),
            fault: e.to_string(),
        })?;
        let policy = TokenPolicy {
            issuer: public.issuer(),
            audiences: vec![AUDIENCE.to_owned()],
            require_bound_pod: false,
        };
        Ok(Self {
            keys,
            policy,
            read_at: Instant::now(),
        })
    }
}

/// What others may know of the key.
struct PublicKey {
    id: String,
    x: String,
    y: String,
}

impl PublicKey {
    fn of(key: &rcgen::KeyPair) -> Self {
        // an uncompressed point (SEC 1 2.3.3): 0x04, then two coordinates of 32 bytes
        let coordinates = key.public_key_raw().get(1..).unwrap_or_default();
        let (x, y) = coordinates.split_at(coordinates.len() / 2);
        let (x, y) = (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y));
        // RFC 7638 3.2: these members, in this order
        let canonical = format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#);
        let thumbprint = digest::digest(&digest::SHA256, canonical.as_bytes());
        Self {
            id: URL_SAFE_NO_PAD.encode(thumbprint),
            x,
            y,
        }
    }

    /// Differs from directory to directory, so a token that was sent to the wrong one says so.
    fn issuer(&self) -> String {
        format!("https://malha.local/{}", self.id)
    }

    fn jwks(&self) -> Value {
        json!({ "keys": [{
            "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256",
            "kid": self.id, "x": self.x, "y": self.y,
        }] })
    }
}

/// Wiped when dropped: by itself a `KeyPair` is not.
type Key = Zeroizing<rcgen::KeyPair>;

fn load_or_make(directory: &Directory) -> Result<Key, DirectoryError> {
    let path = directory.token_key();
    if let Some(text) = files::read_secret(&path)? {
        return parse_key(directory, &text);
    }
    let held = directory.lock()?;
    // somebody else's turn may have come first
    if let Some(text) = files::read_secret(&path)? {
        return parse_key(directory, &text);
    }
    let made = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
        .map_err(|e| bad_key(directory, &e))?;
    let pem = Zeroizing::new(made.serialize_pem());
    files::replace(&path, pem.as_bytes(), Access::Secret, &held)?;
    Ok(Zeroizing::new(made))
}

fn parse_key(directory: &Directory, text: &[u8]) -> Result<Key, DirectoryError> {
    let text = str::from_utf8(text).map_err(|e| bad_key(directory, &e))?;
    rcgen::KeyPair::from_pem_and_sign_algo(text, &rcgen::PKCS_ECDSA_P256_SHA256)
        .map(Zeroizing::new)
        .map_err(|e| bad_key(directory, &e))
}

fn bad_key(directory: &Directory, fault: &dyn std::fmt::Display) -> DirectoryError {
    DirectoryError::BadTokenKey {
        path: directory.token_key(),
        fault: fault.to_string(),
    }
}
