//! The request of an AdmissionReview, read where it lies in the body.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::str;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, de};
use serde_json::value::RawValue;

use crate::webhook::refusal::Refusal;

/// `request` of an AdmissionReview of version `admission.k8s.io/v1`.
#[derive(Debug)]
pub(super) struct Review<'a> {
    pub(super) uid: Text<'a>,
    pub(super) namespace: Text<'a>,
    pub(super) name: Text<'a>,
    pub(super) dry_run: bool,
    /// The object's JSON, byte for byte as it was sent. `None` where it is absent or null.
    pub(super) object: Option<&'a str>,
    resource: Resource<'a>,
    sub_resource: Text<'a>,
    operation: Text<'a>,
}

/// Deeper than any object that Kubernetes has a type for.
const DEPTH: usize = 128;

/// A uid is echoed and logged; those of Kubernetes have 36 bytes.
const UID_BYTES: usize = 256;

impl<'a> Review<'a> {
    /// Reads a body, of which nothing is known yet.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, Refusal> {
        let text = str::from_utf8(body)
            .map_err(|_| Refusal::unreadable("the body is not UTF-8, of which JSON is made"))?;
        if is_deeper_than(DEPTH, body) {
            return Err(Refusal::unreadable(format!(
                "the body is nested deeper than {DEPTH}"
            )));
        }
        let Object(envelope): Object<Envelope<'_>> =
            serde_json::from_str(text).map_err(|error| Refusal::bad_request(&error))?;
        if *envelope.api_version != *"admission.k8s.io/v1" || *envelope.kind != *"AdmissionReview" {
            return Err(Refusal::unreadable(
                "the body is no AdmissionReview of admission.k8s.io/v1",
            ));
        }
        let Some(Object(request)) = envelope.request else {
            return Err(Refusal::unreadable("the review holds no request"));
        };
        if request.uid.is_empty() || request.uid.len() > UID_BYTES {
            return Err(Refusal::unreadable("the request has no uid"));
        }
        Ok(Self {
            uid: request.uid,
            namespace: request.namespace,
            name: request.name,
            dry_run: request.dry_run.unwrap_or_default(),
            object: request
                .object
                .map(RawValue::get)
                .filter(|json| *json != "null"),
            resource: request.resource.unwrap_or_default().0,
            sub_resource: request.sub_resource,
            operation: request.operation,
        })
    }

    /// Whether this is what the webhook is registered for.
    pub(super) fn creates_a_pod(&self) -> bool {
        let Resource {
            group,
            version,
            resource,
        } = &self.resource;
        group.is_empty()
            && **version == *"v1"
            && **resource == *"pods"
            && self.sub_resource.is_empty()
            && *self.operation == *"CREATE"
    }

    /// What the object calls itself: a pod of a controller has no name yet, but the beginning of one.
    pub(super) fn object_name(&self) -> Option<Cow<'a, str>> {
        if !self.name.is_empty() {
            return Some(self.name.0.clone());
        }
        let mut names = Names::default();
        // The object's first keys are read and no more; what makes it end early is not an error.
        let _ = serde_json::Deserializer::from_str(self.object?)
            .deserialize_map(UntilMetadata(&mut names));
        [names.name, names.generate_name]
            .into_iter()
            .find(|name| !name.is_empty())
            .map(|name| name.0)
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope<'a> {
    #[serde(borrow, default)]
    api_version: Text<'a>,
    #[serde(borrow, default)]
    kind: Text<'a>,
    #[serde(borrow, default)]
    request: Option<Object<Request<'a>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    #[serde(borrow, default)]
    uid: Text<'a>,
    #[serde(borrow, default)]
    resource: Option<Object<Resource<'a>>>,
    #[serde(borrow, default)]
    sub_resource: Text<'a>,
    #[serde(borrow, default)]
    operation: Text<'a>,
    #[serde(borrow, default)]
    namespace: Text<'a>,
    #[serde(borrow, default)]
    name: Text<'a>,
    #[serde(default)]
    dry_run: Option<bool>,
    #[serde(borrow, default)]
    object: Option<&'a RawValue>,
}

#[derive(Debug, Default, Deserialize)]
struct Resource<'a> {
    #[serde(borrow, default)]
    group: Text<'a>,
    #[serde(borrow, default)]
    version: Text<'a>,
    #[serde(borrow, default)]
    resource: Text<'a>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Names<'a> {
    #[serde(borrow, default)]
    name: Text<'a>,
    #[serde(borrow, default)]
    generate_name: Text<'a>,
}

/// Fields by name. Serde would also take a list of them in their order, and so would take for a review what is none.
#[derive(Debug, Default)]
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsObject<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for AsObject<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }

        deserializer.deserialize_map(AsObject(PhantomData))
    }
}

/// A string that is borrowed unless it holds escapes; null and absent are empty.
#[derive(Debug, Default)]
pub(super) struct Text<'a>(Cow<'a, str>);

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsText<'a>(PhantomData<&'a ()>);

        impl<'de: 'a, 'a> Visitor<'de> for AsText<'a> {
            type Value = Text<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Text<'a>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text<'a>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }

            fn visit_unit<E: de::Error>(self) -> Result<Text<'a>, E> {
                Ok(Text::default())
            }
        }

        deserializer.deserialize_any(AsText(PhantomData))
    }
}

/// Reads an object's keys up to `metadata`, and stops there: what follows may be a megabyte.
struct UntilMetadata<'n, 'a>(&'n mut Names<'a>);

impl<'de> Visitor<'de> for UntilMetadata<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Text<'de>>()? {
            if *key == *"metadata" {
                let Object(names) = map.next_value()?;
                *self.0 = names;
                return Err(de::Error::invalid_value(Unexpected::Map, &"no more"));
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

/// Whether brackets outside of strings are nested deeper than `limit`. Says nothing about whether it is JSON.
///
/// What we skip is skipped without recursion, so depth could not hurt us; but an object that nobody else reads is not to
/// be admitted by us.
fn is_deeper_than(limit: usize, json: &[u8]) -> bool {
    let mut depth = 0_usize;
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => skip_string(&mut bytes),
            b'{' | b'[' => {
                depth += 1;
                if depth > limit {
                    return true;
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

fn skip_string(bytes: &mut std::slice::Iter<'_, u8>) {
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => return,
            b'\\' => {
                bytes.next();
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn review(request: &str) -> String {
        format!(
            r#"{{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{request}}}"#
        )
    }

    #[test]
    fn a_request_is_read_and_the_rest_is_skipped() {
        let body = review(
            r#"{"uid":"u-1","kind":{"group":"","version":"v1","kind":"Pod"},"resource":{"group":"","version":"v1","resource":"pods"},
            "requestKind":null,"name":"","namespace":"shop","operation":"CREATE","userInfo":{"username":"x"},"dryRun":true,
            "object":{"kind":"Pod","metadata":{"generateName":"web-\u00e9-","labels":{"name":"no"}},"spec":{}},"options":null}"#,
        );
        let review = Review::parse(body.as_bytes()).expect("a good review");
        assert_eq!(&*review.uid, "u-1");
        assert_eq!(&*review.namespace, "shop");
        assert!(review.dry_run);
        assert!(review.creates_a_pod());
        assert_eq!(review.object_name().as_deref(), Some("web-é-"));
        assert!(
            review
                .object
                .is_some_and(|pod| pod.starts_with(r#"{"kind":"Pod","metadata""#))
        );
    }

    #[test]
    fn only_the_creation_of_a_pod_is_one() {
        let cases = [
            (
                r#""resource":{"version":"v1","resource":"pods"},"operation":"CREATE""#,
                true,
            ),
            (
                r#""resource":{"version":"v1","resource":"pods"},"operation":"UPDATE""#,
                false,
            ),
            (
                r#""resource":{"version":"v1","resource":"pods"},"operation":"CREATE","subResource":"exec""#,
                false,
            ),
            (
                r#""resource":{"version":"v1","resource":"pods"},"operation":"CREATE","subResource":"""#,
                true,
            ),
            (
                r#""resource":{"version":"v1","resource":"pods"},"operation":"CREATE","subResource":null"#,
                true,
            ),
            (
                r#""resource":{"group":"apps","version":"v1","resource":"deployments"},"operation":"CREATE""#,
                false,
            ),
            (r#""operation":"CREATE""#, false),
        ];
        for (fields, expected) in cases {
            let body = review(&format!(r#"{{"uid":"u",{fields}}}"#));
            let review = Review::parse(body.as_bytes()).expect(fields);
            assert_eq!(review.creates_a_pod(), expected, "{fields}");
        }
    }

    #[test]
    fn what_is_no_review_is_refused_with_words() {
        let deep = format!("{}{}", "[".repeat(129), "]".repeat(129));
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (b"".to_vec(), "EOF"),
            (b"aaaaaa".to_vec(), "expected value"),
            (b"{}".to_vec(), "no AdmissionReview"),
            (b"[]".to_vec(), "expected an object"),
            (
                br#"["admission.k8s.io/v1","AdmissionReview",{"uid":"a"}]"#.to_vec(),
                "expected an object",
            ),
            (review(r#"["a"]"#).into_bytes(), "expected an object"),
            (b"null".to_vec(), "invalid type"),
            (b"\xef\xbb\xbf{}".to_vec(), "expected value"),
            (b"{\"kind\":\"\xff\"}".to_vec(), "not UTF-8"),
            (deep.into_bytes(), "deeper than 128"),
            (review("null").into_bytes(), "no request"),
            (review("{}").into_bytes(), "no uid"),
            (review(r#"{"uid":""}"#).into_bytes(), "no uid"),
            (review(r#"{"uid":7}"#).into_bytes(), "expected a string"),
            (
                review(r#"{"uid":"a","uid":"b"}"#).into_bytes(),
                "duplicate field `uid`",
            ),
            (
                review(r#"{"uid":"a"}"#)
                    .replace("v1", "v1beta1")
                    .into_bytes(),
                "no AdmissionReview of",
            ),
            (
                review(r#"{"uid":"a"}"#)
                    .replace("AdmissionReview", "Pod")
                    .into_bytes(),
                "no AdmissionReview of",
            ),
            (
                format!("{} x", review(r#"{"uid":"a"}"#)).into_bytes(),
                "trailing",
            ),
        ];
        for (body, words) in cases {
            let refusal = Review::parse(&body).expect_err(words);
            assert!(
                refusal.message().contains(words),
                "{words}: {}",
                refusal.message()
            );
        }
    }

    #[test]
    fn brackets_in_strings_are_not_depth() {
        let string = format!("{{\"a\":\"\\\"{}\"}}", "[".repeat(500));
        assert!(!is_deeper_than(2, string.as_bytes()));
        assert!(!is_deeper_than(2, b"[[]][[]]"));
        assert!(is_deeper_than(2, b"[[[]]]"));
    }
}
