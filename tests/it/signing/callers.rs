//! Every kind of caller meets every fault: the table of answers, gRPC's and HTTP's.

use envoy_types::pb::google::protobuf::{Struct, Value as ProtoValue, value::Kind as ProtoKind};
use malha::proto::istio_ca::IstioCertificateRequest;
use tonic::Code;

use super::{
    grpc::code,
    renewal::{Shows, issued},
    *,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Token,
    Certificate,
    /// A node's proxy, for a pod on its node. Only gRPC has a word for it.
    NodeProxy,
}

/// One who would get its certificate, before something is spoilt.
struct Caller {
    kind: Kind,
    header: Value,
    claims: Value,
    /// In the place of what the claims come to.
    token: Option<Option<String>>,
    leaf: Vec<u8>,
    csr: String,
    seconds: i64,
}

const DAY: i64 = 24 * 3600;

impl Caller {
    fn new(scene: &Scene, kind: Kind) -> Self {
        let id = SpiffeId::new(&mesh(), "prod", "web").unwrap();
        let life = Duration::from_secs(3 * 24 * 3600);
        let leaf = match kind {
            Kind::Certificate => issued(scene, &Profile::Workload(id), life),
            Kind::Token | Kind::NodeProxy => Vec::new(),
        };
        if kind == Kind::NodeProxy {
            scene.cluster.lock().unwrap().node_proxies = "prod/web".parse().unwrap();
        }
        Self {
            kind,
            header: json!({ "alg": "ES256", "kid": "one" }),
            claims: scene.claims(),
            token: None,
            leaf,
            csr: String::from_utf8(csr(p256(), &[])).unwrap(),
            seconds: 3600,
        }
    }

    fn shows(&self, scene: &Scene) -> Shows {
        let signed = || Some(scene.issuer.sign(&self.header, &self.claims));
        Shows {
            token: match (self.kind, &self.token) {
                (Kind::Certificate, _) => None,
                (_, Some(token)) => token.clone(),
                (_, None) => signed(),
            },
            leaf: self.leaf.clone(),
            address: "10.0.0.7".parse().unwrap(),
        }
    }

    fn asks(&self) -> IstioCertificateRequest {
        let kind = Some(ProtoKind::StringValue(WEB.to_owned()));
        let for_a_pod = Struct {
            fields: [("ImpersonatedIdentity".to_owned(), ProtoValue { kind })].into(),
        };
        IstioCertificateRequest {
            csr: self.csr.clone(),
            validity_duration: self.seconds,
            metadata: (self.kind == Kind::NodeProxy).then_some(for_a_pod),
        }
    }
}

struct Row {
    fault: &'static str,
    /// Whom it can befall.
    kinds: &'static [Kind],
    /// When all begins.
    start: i64,
    limits: fn(&mut Limits),
    spoil: fn(&Scene, &mut Caller),
    want: (u16, Code, &'static str),
}

const ALL: &[Kind] = &[Kind::Token, Kind::Certificate, Kind::NodeProxy];
const WITH_TOKEN: &[Kind] = &[Kind::Token, Kind::NodeProxy];

fn row(
    fault: &'static str,
    kinds: &'static [Kind],
    spoil: fn(&Scene, &mut Caller),
    want: (u16, Code, &'static str),
) -> Row {
    Row {
        fault,
        kinds,
        start: 0,
        limits: |_| {},
        spoil,
        want,
    }
}

fn limited(fault: &'static str, limits: fn(&mut Limits), code: &'static str) -> Row {
    Row {
        limits,
        ..row(fault, ALL, |_, _| {}, (429, Code::ResourceExhausted, code))
    }
}

/// `ca.md` (c).
fn table() -> Vec<Row> {
    let unknown = |code| (401, Code::Unauthenticated, code);
    let invalid = |code| (400, Code::InvalidArgument, code);
    let away = |code| (503, Code::Unavailable, code);
    vec![
        row("none", ALL, |_, _| {}, (201, Code::Ok, "")),
        row(
            "no credential",
            WITH_TOKEN,
            |_, c| c.token = Some(None),
            unknown("NoCredential"),
        ),
        row(
            "not ours",
            WITH_TOKEN,
            |_, c| c.token = Some(Some("x".into())),
            unknown("TokenInvalid"),
        ),
        row(
            "not ours",
            &[Kind::Certificate],
            |_, c| c.leaf = vec![0x30, 0],
            unknown("CertificateInvalid"),
        ),
        row(
            "bad signature",
            WITH_TOKEN,
            |_, c| {
                let forger = TokenIssuer(rcgen::KeyPair::generate().unwrap());
                c.token = Some(Some(forger.sign(&c.header, &c.claims)));
            },
            unknown("TokenInvalid"),
        ),
        row(
            "wrong audience",
            WITH_TOKEN,
            |_, c| c.claims["aud"] = json!(["api"]),
            unknown("AudienceMismatch"),
        ),
        row(
            "unknown issuer",
            WITH_TOKEN,
            |_, c| c.claims["iss"] = json!("https://other"),
            unknown("UnknownIssuer"),
        ),
        row(
            "expired",
            WITH_TOKEN,
            |s, _| s.later(3600 + 60),
            unknown("TokenExpired"),
        ),
        row(
            "expired",
            &[Kind::Certificate],
            |s, _| s.later(3 * DAY + 1),
            unknown("CertificateInvalid"),
        ),
        row(
            "not yet valid",
            WITH_TOKEN,
            |_, c| c.claims["nbf"] = json!(c.claims["nbf"].as_i64().unwrap() + 61),
            unknown("TokenNotYetValid"),
        ),
        row(
            "no bound pod",
            WITH_TOKEN,
            |_, c| c.claims["kubernetes.io"]["pod"] = Value::Null,
            unknown("NotBound"),
        ),
        row(
            "identities differ",
            WITH_TOKEN,
            |_, c| c.claims["sub"] = json!("system:serviceaccount:prod:db"),
            unknown("IdentityConflict"),
        ),
        row(
            "identities differ",
            &[Kind::Certificate],
            |s, _| {
                let address = "10.0.0.7".parse().unwrap();
                s.cluster.lock().unwrap().stranger = Some((address, "db"));
            },
            unknown("IdentityConflict"),
        ),
        row(
            "pod gone",
            ALL,
            |s, _| s.cluster.lock().unwrap().pod = None,
            unknown("CallerGone"),
        ),
        row(
            "account gone",
            ALL,
            |s, _| s.cluster.lock().unwrap().account = None,
            unknown("CallerGone"),
        ),
        row(
            "account made anew",
            WITH_TOKEN,
            |s, _| s.cluster.lock().unwrap().account = Some("sa-2".into()),
            unknown("CallerGone"),
        ),
        row(
            "namespace terminating",
            ALL,
            |s, _| s.cluster.lock().unwrap().terminating = true,
            unknown("CallerGone"),
        ),
        row(
            "not on the list",
            &[Kind::NodeProxy],
            |s, _| s.cluster.lock().unwrap().node_proxies = NodeProxies::default(),
            unknown("ImpersonationRefused"),
        ),
        row(
            "no CSR",
            ALL,
            |_, c| c.csr = "hello".into(),
            invalid("InvalidPem"),
        ),
        row(
            "too short a life",
            ALL,
            |_, c| c.seconds = 299,
            invalid("TtlOutOfRange"),
        ),
        row(
            "too long a life",
            ALL,
            |_, c| c.seconds = 7 * DAY + 1,
            invalid("TtlOutOfRange"),
        ),
        limited(
            "too often",
            |limits| {
                let rate = Rate {
                    per_second: 1,
                    burst: 0,
                };
                (limits.per_pod, limits.per_account) = (rate, rate);
                limits.per_node = rate;
            },
            "RateLimited",
        ),
        limited("no place", |limits| limits.entries = 0, "QueueFull"),
        row(
            "lists not there",
            ALL,
            |s, _| s.cluster.lock().unwrap().synced = false,
            away("VerifierUnavailable"),
        ),
        row(
            "review fails",
            WITH_TOKEN,
            |s, _| s.cluster.lock().unwrap().review = Review::Fails,
            away("VerifierUnavailable"),
        ),
        row(
            "journal not read",
            ALL,
            |s, c| {
                s.later(DAY + 60);
                c.claims = s.claims();
            },
            away("JournalStale"),
        ),
        row(
            "clock insane",
            ALL,
            |s, _| s.gate.set(Some(Fault::ClockJump("it jumped".into()))),
            away("ClockJump"),
        ),
        Row {
            start: 29 * DAY,
            ..row(
                "issuer near its end",
                ALL,
                |s, c| {
                    s.later(DAY - 60);
                    c.claims = s.claims();
                },
                away("IssuerExpiring"),
            )
        },
        row("draining", ALL, |s, _| s.gate.drain(), away("Draining")),
    ]
}

#[tokio::test]
async fn each_kind_of_caller_gets_the_answer_of_each_fault() {
    for row in table() {
        for &kind in row.kinds {
            let mut limits = no_rates();
            (row.limits)(&mut limits);
            let scene = Scene::with(limits).await;
            scene.later(row.start);
            scene.custody.refresh().await.unwrap();
            let mut caller = Caller::new(&scene, kind);
            (row.spoil)(&scene, &mut caller);
            let case = format!("{}, {kind:?}", row.fault);
            let (http, grpc, want) = row.want;
            let shows = caller.shows(&scene);
            match scene.over_grpc(&shows, caller.asks()).await {
                Ok(_) => assert_eq!(grpc, Code::Ok, "{case}"),
                Err(status) => {
                    assert_eq!((status.code(), code(&status)), (grpc, want), "{case}");
                }
            }
            if kind != Kind::NodeProxy {
                let answer = scene.over_http(&shows, &caller.asks()).await;
                let told = answer.json()["code"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned();
                assert_eq!((answer.status.as_u16(), &*told), (http, want), "{case}");
                let comes_back = !answer.header(header::RETRY_AFTER).is_empty();
                assert_eq!(comes_back, matches!(http, 429 | 503), "{case}");
            }
        }
    }
}
