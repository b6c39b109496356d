//! The response of an AdmissionReview, written by hand.
//!
//! A typed response would write the patch as a list of numbers and a `status: {}` that means nothing. Here `patch` and
//! `patchType` stand together or not at all, and a refusal always says code, reason and message.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use crate::inject::{Answer, Reason, SkipReason, Verdict, Warning};

/// What the API server is told about a pod.
pub(super) fn admission(uid: &str, answer: &Answer) -> Vec<u8> {
    let warned: usize = answer.warnings.iter().map(|one| one.text.len() + 8).sum();
    match &answer.verdict {
        Verdict::Patch(patch) => {
            let encoded = patch.json.len().div_ceil(3) * 4;
            let mut response = Response::begin(uid, true, encoded + warned);
            response.patch(&patch.json, encoded);
            response.end(patch.reason, &answer.warnings)
        }
        Verdict::Skip(reason) => {
            Response::begin(uid, true, warned).end(Reason::from(*reason), &answer.warnings)
        }
        Verdict::Deny(denial) => {
            let reason = Reason::from(denial.reason);
            let mut response = Response::begin(uid, false, denial.message.len() + warned);
            response.status(reason, &denial.message);
            response.end(reason, &answer.warnings)
        }
    }
}

/// A pod, or what was taken for one, goes in as it is.
pub(super) fn skip(uid: &str, reason: SkipReason) -> Vec<u8> {
    Response::begin(uid, true, 0).end(Reason::from(reason), &[])
}

/// A workload goes in, with words for its author.
pub(super) fn advice(uid: &str, warnings: &[String]) -> Vec<u8> {
    let mut response = Response::begin(uid, true, 128 * warnings.len());
    response.warnings(warnings.iter().map(String::as_str));
    response.close()
}

/// Longer warnings may be cut by the API server; see `AdmissionResponse` in k8s.io/api/admission/v1.
const WARNING_CHARS: usize = 120;

/// A client prints each of them, and the API server drops those over 4 KiB in all.
const WARNINGS: usize = 20;

struct Response(Vec<u8>);

impl Response {
    fn begin(uid: &str, allowed: bool, room: usize) -> Self {
        let mut response = Self(Vec::with_capacity(256 + uid.len() + room));
        response.raw(
            r#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","response":{"uid":"#,
        );
        response.value(uid);
        response.raw(r#","allowed":"#);
        response.value(&allowed);
        response
    }

    fn patch(&mut self, json: &[u8], encoded: usize) {
        self.raw(r#","patchType":"JSONPatch","patch":""#);
        let start = self.0.len();
        self.0.resize(start + encoded, 0);
        let place = self.0.get_mut(start..).unwrap_or_default();
        STANDARD
            .encode_slice(json, place)
            .expect("there is room for four characters per three bytes");
        self.raw("\"");
    }

    /// 400, never 409 or 429: clients take those for something that another try may mend.
    fn status(&mut self, reason: Reason, message: &str) {
        self.raw(r#","status":{"status":"Failure","code":400,"reason":"#);
        self.value(reason.as_str());
        self.raw(r#","message":"#);
        self.value(message);
        self.raw("}");
    }

    fn end(mut self, reason: Reason, warnings: &[Warning]) -> Vec<u8> {
        self.raw(r#","auditAnnotations":{"reason":"#);
        self.value(reason.as_str());
        self.raw("}");
        self.warnings(warnings.iter().map(|one| one.text.as_str()));
        self.close()
    }

    fn warnings<'w>(&mut self, warnings: impl Iterator<Item = &'w str>) {
        let mut texts: Vec<_> = warnings.map(cut).collect();
        if texts.is_empty() {
            return;
        }
        let more = format!(
            "{} more warnings are not shown",
            texts.len().saturating_sub(WARNINGS - 1)
        );
        if texts.len() > WARNINGS {
            texts.truncate(WARNINGS - 1);
            texts.push(&more);
        }
        self.raw(r#","warnings":"#);
        self.value(&texts);
    }

    fn close(mut self) -> Vec<u8> {
        self.raw("}}");
        self.0
    }

    fn raw(&mut self, json: &str) {
        self.0.extend_from_slice(json.as_bytes());
    }

    fn value<T: Serialize + ?Sized>(&mut self, value: &T) {
        serde_json::to_writer(&mut self.0, value)
            .expect("strings, flags and lists of strings are always JSON");
    }
}

fn cut(text: &str) -> &str {
    match text.char_indices().nth(WARNING_CHARS) {
        Some((end, _)) => text.get(..end).unwrap_or(text),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::inject::{Denial, DenyReason, Patch, WarningCode};

    fn read(answer: &[u8]) -> Value {
        serde_json::from_slice(answer).expect("an answer is JSON")
    }

    fn warning(text: &str) -> Warning {
        Warning {
            code: WarningCode::AnnotationUnknown,
            text: text.to_owned(),
        }
    }

    #[test]
    fn a_patch_comes_in_base64_and_with_its_type() {
        for length in 0..10 {
            let patch = vec![b'x'; length];
            let answer = Answer {
                verdict: Verdict::Patch(Patch {
                    json: patch.clone(),
                    reason: Reason::Injected,
                }),
                warnings: Vec::new(),
            };
            let read = read(&admission("u\"1", &answer));
            assert_eq!(
                read,
                json!({
                    "apiVersion": "admission.k8s.io/v1",
                    "kind": "AdmissionReview",
                    "response": {
                        "uid": "u\"1",
                        "allowed": true,
                        "patchType": "JSONPatch",
                        "patch": STANDARD.encode(&patch),
                        "auditAnnotations": {"reason": "Injected"},
                    },
                })
            );
        }
    }

    #[test]
    fn a_pod_that_goes_in_as_it_is_gets_neither_patch_nor_status() {
        assert_eq!(
            read(&skip("u", SkipReason::NotAPodCreate))["response"],
            json!({"uid": "u", "allowed": true, "auditAnnotations": {"reason": "NotAPodCreate"}})
        );
    }

    #[test]
    fn a_refusal_says_code_reason_and_message() {
        let answer = Answer {
            verdict: Verdict::Deny(Denial {
                reason: DenyReason::PortConflict,
                message: "container \"a\": port 15001\nis ours".to_owned(),
            }),
            warnings: vec![warning("one")],
        };
        assert_eq!(
            read(&admission("u", &answer))["response"],
            json!({
                "uid": "u",
                "allowed": false,
                "status": {
                    "status": "Failure",
                    "code": 400,
                    "reason": "PortConflict",
                    "message": "container \"a\": port 15001\nis ours",
                },
                "auditAnnotations": {"reason": "PortConflict"},
                "warnings": ["one"],
            })
        );
    }

    #[test]
    fn warnings_are_short_and_few() {
        let long = "é".repeat(500);
        let many = vec![long; 50];
        let read = read(&advice("u", &many));
        let shown = read["response"]["warnings"].as_array().expect("a list");
        assert_eq!(shown.len(), WARNINGS);
        assert_eq!(shown[0], Value::from("é".repeat(WARNING_CHARS)));
        assert_eq!(shown[WARNINGS - 1], "31 more warnings are not shown");
    }

    #[test]
    fn advice_without_words_says_nothing() {
        assert_eq!(
            read(&advice("u", &[]))["response"],
            json!({"uid": "u", "allowed": true})
        );
    }
}
