//! Whose bearer token is this: decided offline against the API server's published keys, or by asking it.
//!
//! ```text
//! token -> verify (JWKS) -> bind (World) -> Caller
//!             │ another issuer's   │ lists not there yet, pod not seen yet
//!             └────────┬───────────┘
//!                 TokenReview -> Caller
//! ```
//!
//! The checks themselves are [`caller`](crate::caller)'s; this room holds the keys, asks, and decides who decides.
//! A failed question is [`CallerError::VerifierUnavailable`], never a refusal of the caller.

mod budget;
mod keys;

use std::{fmt, future::Future, net::IpAddr, str::FromStr, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::{Api, Client, api::PostParams};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use self::{budget::Budget, keys::Keys};
use super::{
    ask_within,
    world::{Pod, World},
};
use crate::{
    caller::{
        Authenticate, Caller, CallerError, Denial, Liveness, MAX_TOKEN, NodeProxies,
        NotImpersonated, PodFact, Shown, TokenPolicy, alive, bind, impersonate, review, verify,
    },
    clock::Clock,
    identity::{SpiffeId, TrustDomain},
};

/// How long the API server may be silent before what is known of the cluster counts as old.
const STALE_AFTER: Duration = Duration::from_secs(30);

/// How long callers are still authenticated by what was last known while the API server is silent. No replica can have
/// retired an authority within that time, for its draining lasts longer.
const STALE_GRACE: Duration = Duration::from_secs(24 * 3600);

/// How long one question about a token may take: whoever sent it waits, and gives up after some 10 s.
const PATIENCE: Duration = Duration::from_secs(4);

/// Who checks tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Validation {
    /// Offline where that decides it, else by TokenReview.
    #[default]
    Auto,
    /// Offline only: what that cannot decide is refused as unavailable.
    Jwks,
    /// Always the API server.
    TokenReview,
}

impl fmt::Display for Validation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Jwks => "jwks",
            Self::TokenReview => "tokenreview",
        })
    }
}

impl FromStr for Validation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "jwks" => Ok(Self::Jwks),
            "tokenreview" => Ok(Self::TokenReview),
            _ => Err(format!("{text:?} is none of auto, jwks, tokenreview")),
        }
    }
}

/// What tokens must be like, and who checks them.
#[derive(Clone, Debug)]
pub struct Options {
    /// The trust domain of the identities.
    pub trust_domain: TrustDomain,
    /// A token must be for one of these.
    pub audiences: Vec<String>,
    /// Whether a token that is bound to no pod is refused.
    pub require_bound_pod: bool,
    /// Who checks.
    pub validation: Validation,
    /// Who may ask for the pods on its node.
    pub node_proxies: NodeProxies,
    /// Whose identities nobody may ask for: the control plane's namespace.
    pub own_namespace: String,
}

/// Checks service-account tokens of the cluster.
#[derive(Clone)]
pub struct ClusterTokens {
    client: Client,
    world: Arc<World>,
    keys: Arc<Keys>,
    reviews: Arc<Budget>,
    options: Options,
}

impl ClusterTokens {
    /// Nothing is asked yet; [`Self::follow`] fetches the keys, or the first caller does.
    pub fn new(client: Client, world: Arc<World>, options: Options) -> Self {
        Self {
            keys: Arc::new(Keys::new(client.clone())),
            reviews: Arc::default(),
            client,
            world,
            options,
        }
    }

    /// Keeps the keys fresh, until `stop`.
    pub fn follow(
        &self,
        clock: Clock,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + Send + use<> {
        let keys = self.keys.clone();
        async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = keys.follow(clock) => {}
            }
        }
    }

    /// Offline first; then, where that leaves it open, by asking.
    async fn decide(&self, token: &str, now: Timestamp) -> Result<Caller, Denial> {
        let offline = match self.check(token, now).await {
            Err(error) if self.options.validation == Validation::Auto && undecided(&error) => error,
            decided => return decided.map_err(Denial::from),
        };
        debug!(%offline, "asking the API server about a token");
        let reviewed = self.ask(token, now).await;
        reviewed.map_err(|error| Denial::by_review(sharper(offline, error)))
    }

    async fn check(&self, token: &str, now: Timestamp) -> Result<Caller, CallerError> {
        let stale = self.staleness()?;
        let mut published = self.keys.published(now).await?;
        let mut verified = verify(token, &published.keys, &self.policy(&published.issuer), now);
        if let Err(CallerError::UnknownKey(_)) = &verified
            && let Some(newer) = self.keys.newer_than(&published, now).await
        {
            published = newer;
            verified = verify(token, &published.keys, &self.policy(&published.issuer), now);
        }
        let mut caller = bind(verified?, &*self.world, &self.options.trust_domain, now)?;
        caller.stale = stale;
        Ok(caller)
    }

    /// Whether what is known of the cluster is old; an error where it is too old to go by.
    fn staleness(&self) -> Result<bool, CallerError> {
        let silence = self.world.silence();
        if silence.is_some_and(|silence| silence > STALE_GRACE) {
            return Err(CallerError::VerifierUnavailable(
                "the API server has been silent for more than 24 hours".to_owned(),
            ));
        }
        Ok(silence.is_none_or(|silence| silence > STALE_AFTER))
    }

    async fn ask(&self, token: &str, now: Timestamp) -> Result<Caller, CallerError> {
        // what the API server would call a bad question is a bad token
        if token.is_empty() || token.len() > MAX_TOKEN {
            let fault = "it is empty, or longer than 16 KiB";
            return Err(CallerError::TokenInvalid(fault.to_owned()));
        }
        let unavailable = |fault: String| CallerError::VerifierUnavailable(fault);
        let _turn = self
            .reviews
            .take(now)
            .await
            .map_err(|busy| unavailable(busy.to_string()))?;
        let question = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(self.options.audiences.clone()),
            },
            ..TokenReview::default()
        };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let params = PostParams::default();
        let answer = ask_within(PATIENCE, reviews.create(&params, &question)).await;
        let answer = answer.map_err(|error| unavailable(error.to_string()))?;
        let status = answer.status.unwrap_or_default();
        review(&status, &self.policy(""), &self.options.trust_domain)
    }

    fn policy(&self, issuer: &str) -> TokenPolicy {
        TokenPolicy {
            issuer: issuer.to_owned(),
            audiences: self.options.audiences.clone(),
            require_bound_pod: self.options.require_bound_pod,
        }
    }
}

impl Authenticate for ClusterTokens {
    async fn authenticate(&self, token: &str, now: Timestamp) -> Result<Caller, Denial> {
        match self.options.validation {
            Validation::Auto | Validation::Jwks => self.decide(token, now).await,
            Validation::TokenReview => self.ask(token, now).await.map_err(Denial::by_review),
        }
    }

    fn renew(
        &self,
        shown: Shown,
        address: Option<IpAddr>,
        now: Timestamp,
    ) -> Result<Caller, CallerError> {
        let stale = self.staleness()?;
        let caller = alive(shown, address, &*self.world, now)?;
        Ok(Caller { stale, ..caller })
    }

    fn is_node_proxy(&self, caller: &Caller) -> bool {
        self.options.node_proxies.list(&caller.identity)
    }

    fn impersonate(
        &self,
        caller: &Caller,
        target: &str,
        now: Timestamp,
    ) -> Result<SpiffeId, NotImpersonated> {
        let options = &self.options;
        let (allowed, own) = (&options.node_proxies, &options.own_namespace);
        impersonate(caller, target, allowed, own, &*self.world, now)
    }
}

impl Liveness for World {
    fn synced(&self) -> bool {
        Self::synced(self)
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodFact> {
        self.find_pod(namespace, name).as_ref().map(fact)
    }

    fn pods_of(&self, namespace: &str, account: &str) -> Vec<PodFact> {
        let mut pods = Vec::new();
        self.each_pod_in(namespace, |pod| {
            if *pod.service_account == *account {
                pods.push(fact(pod));
            }
        });
        pods
    }

    fn pod_at(&self, address: IpAddr) -> Option<(String, String)> {
        let address = address.to_canonical();
        let mut found = None;
        self.each_namespace(|namespace, pods| {
            let mut here = pods.filter(|(_, pod)| {
                !pod.host_network && !pod.finished && pod.addresses.contains(&address)
            });
            if let Some((_, pod)) = here.next() {
                found = Some((
                    namespace.to_owned(),
                    pod.service_account.as_ref().to_owned(),
                ));
            }
        });
        found
    }

    fn service_account(&self, namespace: &str, name: &str) -> Option<String> {
        let uid = self.find_service_account(namespace, name);
        uid.map(|uid| uid.as_ref().to_owned())
    }

    fn namespace_terminating(&self, namespace: &str) -> bool {
        self.find_namespace(namespace)
            .is_some_and(|namespace| namespace.terminating)
    }
}

fn fact(pod: &Pod) -> PodFact {
    PodFact {
        uid: pod.uid.as_ref().to_owned(),
        service_account: pod.service_account.as_ref().to_owned(),
        node: pod.node.as_deref().map(str::to_owned),
        deletion: pod.deletion,
        finished: pod.finished,
    }
}

/// The API server only says that a token is no good; where our own check has a word for it, that is the better one.
fn sharper(offline: CallerError, reviewed: CallerError) -> CallerError {
    match (&offline, &reviewed) {
        (
            CallerError::CallerGone(_) | CallerError::UnknownIssuer(_),
            CallerError::TokenInvalid(_),
        ) => offline,
        _ => reviewed,
    }
}

/// Whether the API server may know better than our own checks did.
fn undecided(error: &CallerError) -> bool {
    match error {
        CallerError::VerifierUnavailable(_)
        | CallerError::UnknownIssuer(_)
        | CallerError::UnknownKey(_) => true,
        CallerError::CallerGone(gone) => gone.may_be_lag(),
        CallerError::NoCredential
        | CallerError::TokenInvalid(_)
        | CallerError::AudienceMismatch { .. }
        | CallerError::TokenExpired { .. }
        | CallerError::TokenNotYetValid { .. }
        | CallerError::UnknownCluster(_)
        | CallerError::NotBound
        | CallerError::IdentityConflict(_)
        | CallerError::CertificateInvalid(_)
        | CallerError::Denied(_)
        | CallerError::RenewalNeedsToken { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caller::Gone;

    #[test]
    fn validation_round_trips_through_its_text() {
        for validation in [Validation::Auto, Validation::Jwks, Validation::TokenReview] {
            assert_eq!(validation.to_string().parse(), Ok(validation));
        }
        let error = "JWKS".parse::<Validation>().expect_err("another case");
        assert_eq!(error, "\"JWKS\" is none of auto, jwks, tokenreview");
    }

    #[test]
    fn only_what_the_api_server_may_know_better_is_asked() {
        let pod = || "p".to_owned();
        let open = [
            CallerError::VerifierUnavailable(String::new()),
            CallerError::UnknownIssuer("https://elsewhere".to_owned()),
            CallerError::UnknownKey("k".to_owned()),
            CallerError::CallerGone(Gone::PodUnknown(pod())),
            CallerError::CallerGone(Gone::ServiceAccountUnknown(pod())),
        ];
        assert!(open.iter().all(undecided));
        let decided = [
            CallerError::TokenInvalid("alg none".to_owned()),
            CallerError::NotBound,
            CallerError::CallerGone(Gone::PodReplaced(pod())),
            CallerError::CallerGone(Gone::PodDeleted(pod())),
            CallerError::CallerGone(Gone::ServiceAccountReplaced(pod())),
        ];
        assert!(!decided.iter().any(undecided));
    }

    #[test]
    fn our_own_word_stays_when_the_api_server_only_says_no() {
        let gone = CallerError::CallerGone(Gone::PodUnknown("p".to_owned()));
        let no = CallerError::TokenInvalid("the API server refuses it".to_owned());
        let away = CallerError::VerifierUnavailable("timeout".to_owned());
        assert_eq!(sharper(gone.clone(), no.clone()), gone);
        assert_eq!(
            sharper(gone, away.clone()),
            away,
            "nobody was refused by anybody"
        );
        let foreign = CallerError::UnknownIssuer("https://elsewhere".to_owned());
        assert_eq!(sharper(foreign.clone(), no.clone()), foreign);
        let broken = CallerError::UnknownKey("k".to_owned());
        assert_eq!(sharper(broken, no.clone()), no);
    }
}
