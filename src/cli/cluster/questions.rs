//! What a check asks the API server about itself and about the one who asks.

use anyhow::{Context as _, anyhow};
use jiff::{SignedDuration, Timestamp, fmt::rfc2822};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::{
    Api,
    api::{ApiResource, PostParams},
    client::Body,
};
use serde_json::Value;

use super::{Cluster, ask};

impl Cluster {
    /// The client, for what has an adapter of its own.
    pub(in crate::cli) fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// The API server's minor version, and how far its clock is ahead of this machine's, which says `now`.
    ///
    /// # Errors
    /// It does not answer, or not as an API server does.
    pub(in crate::cli) async fn version(
        &self,
        now: impl Fn() -> Timestamp,
    ) -> anyhow::Result<(u32, anyhow::Result<SignedDuration>)> {
        let request = hyper::Request::get("/version").body(Body::empty())?;
        let response = ask(self.client.send(request))
            .await
            .context("cannot ask the API server for its version")?;
        let skew = skew(&response, now());
        let body = response.into_body().collect_bytes().await;
        let body = body.context("the API server's version breaks off")?;
        let version: Value = serde_json::from_slice(&body)
            .context("what answers at /version is not an API server")?;
        // Some distributions say `33+`.
        let minor = version["minor"].as_str().unwrap_or_default();
        let minor = minor.trim_end_matches(|c: char| !c.is_ascii_digit());
        let minor = minor.parse().map_err(|_| {
            anyhow!("what answers at /version is not an API server: it says {version}")
        })?;
        Ok((minor, skew))
    }

    /// Whether the one who asks may do this.
    ///
    /// # Errors
    /// The API server does not answer.
    pub(in crate::cli) async fn may(
        &self,
        verb: &str,
        resource: &ApiResource,
        namespace: Option<&str>,
    ) -> anyhow::Result<bool> {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    group: Some(resource.group.clone()),
                    resource: Some(resource.plural.clone()),
                    verb: Some(verb.to_owned()),
                    namespace: namespace.map(str::to_owned),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let reviews: Api<SelfSubjectAccessReview> = Api::all(self.client.clone());
        let answer = ask(reviews.create(&PostParams::default(), &review))
            .await
            .context("cannot ask the API server for your rights")?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }
}

/// The `Date` header against our clock. It tells whole seconds, so half of one is added.
fn skew<T>(response: &hyper::Response<T>, now: Timestamp) -> anyhow::Result<SignedDuration> {
    let date = response
        .headers()
        .get(hyper::header::DATE)
        .context("the API server's answer has no Date")?;
    let date = date.to_str().context("the API server's Date is no text")?;
    let told = rfc2822::parse(date).context("the API server's Date is none")?;
    let told = told.timestamp() + SignedDuration::from_millis(500);
    Ok(told.duration_since(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_of_an_answer_tells_how_far_the_clocks_are_apart() {
        let now: Timestamp = "2026-11-29T06:00:00Z".parse().expect("an instant");
        let at = |date: &str| {
            let response = hyper::Response::builder().header("date", date);
            skew(&response.body(()).expect("a response"), now)
        };
        let ahead = at("Sun, 29 Nov 2026 06:10:00 GMT").expect("a date");
        assert_eq!(ahead.as_secs(), 600);
        let behind = at("Sun, 29 Nov 2026 05:59:00 GMT").expect("a date");
        assert_eq!(behind.as_secs(), -59);
        assert!(at("yesterday").is_err());
    }
}
