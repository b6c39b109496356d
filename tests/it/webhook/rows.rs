//! The table of bad input, row by row: status, reason, and that each request is counted exactly once.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use malha::inject::Reason;
use malha::tls::Limits;
use malha::webhook;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{NAME, Served, ends, ordinary, pod, reason_of, request};
use crate::support::https::trusting;
use crate::support::review;

#[tokio::test]
async fn a_review_is_answered_with_its_uid_and_without_a_patch_that_is_not_there() {
    let served = Served::start().await;
    let answer = served
        .connect()
        .await
        .post("/inject/ns?timeout=5s", &ordinary("uid-1"))
        .await
        .expect("an answer");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let review = answer.json();
    assert_eq!(review["apiVersion"], "admission.k8s.io/v1");
    assert_eq!(review["kind"], "AdmissionReview");
    assert_eq!(review["response"]["uid"], "uid-1");
    assert_eq!(
        review["response"].get("patch").is_some(),
        review["response"].get("patchType").is_some()
    );
    assert_ne!(review["response"]["status"], json!({}));
}

#[tokio::test]
async fn each_kind_of_bad_request_has_its_status() {
    let served = Served::start().await;
    let body = ordinary("u");
    let typed = |path: &str, headers: &str| {
        request(
            &format!(
                "POST {path} HTTP/1.1\nHost: x\n{headers}\nContent-Length: {}",
                body.len()
            ),
            &body,
        )
    };
    let json = "Content-Type: application/json";
    let cases = [
        (404, typed("/", json)),
        (404, typed("/inject", json)),
        (404, typed("/inject/ns/", json)),
        (404, typed("/inject/../inject/ns", json)),
        (404, typed("/inject/rev/another/ns", json)),
        (404, typed("/inject/rev//ns", json)),
        (404, typed("/inject/rev/%00/ns", json)),
        (404, typed("/quitquitquit", json)),
        (415, typed("/inject/ns", "Accept: */*")),
        (415, typed("/inject/ns", "Content-Type: text/plain")),
        (415, typed("/inject/ns", "Content-Type: application/yaml")),
        (415, typed("/inject/ns", "Content-Type: application/jsonp")),
        (
            415,
            typed("/inject/ns", &format!("{json}\nContent-Encoding: gzip")),
        ),
        (
            415,
            typed(
                "/inject/ns",
                &format!("{json}\nContent-Encoding: identity\nContent-Encoding: gzip"),
            ),
        ),
        (
            200,
            typed("/inject/ns", &format!("{json}\nContent-Encoding: identity")),
        ),
        (
            200,
            typed(
                "/inject/ns",
                "Content-Type: Application/JSON; charset=utf-8",
            ),
        ),
        (200, typed("/inject/pod", json)),
        (200, typed("/inject/rev/default/ns", json)),
        (200, typed("/inject/rev/default/pod", json)),
        (405, request("GET /inject/ns HTTP/1.1\nHost: x", b"")),
        (
            405,
            request("PUT /inject/pod HTTP/1.1\nHost: x\nContent-Length: 0", b""),
        ),
        (
            405,
            request("DELETE /inject/rev/default/ns HTTP/1.1\nHost: x", b""),
        ),
        (404, request("GET / HTTP/1.1\nHost: x", b"")),
    ];
    for (status, bytes) in cases {
        let mut connection = served.connect().await;
        connection.send(&bytes).await.expect("sent");
        let answer = connection.receive().await.expect("an answer");
        let sent = String::from_utf8_lossy(&bytes[..80.min(bytes.len())]).into_owned();
        assert_eq!(answer.status, status, "{sent}");
        if status == 405 {
            assert_eq!(answer.header("allow"), Some("POST"), "{sent}");
        }
    }
    served.is_well().await;
}

#[tokio::test]
async fn what_is_no_review_is_a_bad_request() {
    let served = Served::start().await;
    let good = || review::of_pod("u", "shop", &pod());
    let with = |pointer: &str, value: Value| {
        let mut review = good();
        *review.pointer_mut(pointer).expect("there") = value;
        review.to_string().into_bytes()
    };
    let deep = |levels: usize| {
        let nested = format!("{}1{}", "[".repeat(levels), "]".repeat(levels));
        good()
            .to_string()
            .replacen("\"web:1\"", &nested, 1)
            .into_bytes()
    };
    let twice = |key: &str| {
        good()
            .to_string()
            .replacen(key, &format!("{key},{key}"), 1)
            .into_bytes()
    };
    let mut bom = b"\xef\xbb\xbf".to_vec();
    bom.extend(ordinary("u"));
    let mut latin = ordinary("u");
    let place = latin.windows(5).position(|five| five == b"web:1");
    latin[place.expect("there")] = 0xe9;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("aaaaaa", b"aaaaaa".to_vec()),
        ("{}", b"{}".to_vec()),
        ("null", b"null".to_vec()),
        ("a list", b"[]".to_vec()),
        ("cut off", ordinary("u")[..500].to_vec()),
        ("two", [ordinary("u"), ordinary("u")].concat()),
        ("BOM", bom),
        ("Latin-1", latin),
        (
            "UTF-16",
            ordinary("u").iter().flat_map(|byte| [*byte, 0]).collect(),
        ),
        ("depth", deep(200)),
        ("great depth", deep(1_000_000)),
        ("a million open brackets", vec![b'['; 3_000_000]),
        ("no request", with("/request", Value::Null)),
        ("request of another kind", with("/request", json!("x"))),
        (
            "request as a long string",
            with("/request", json!("x\n".repeat(1 << 20))),
        ),
        ("request as a list", with("/request", json!(["u"]))),
        ("no uid", with("/request/uid", Value::Null)),
        ("empty uid", with("/request/uid", json!(""))),
        ("uid as a number", with("/request/uid", json!(7))),
        ("kind", with("/kind", json!("AdmissionReviews"))),
        ("no kind", with("/kind", Value::Null)),
        (
            "v1beta1",
            with("/apiVersion", json!("admission.k8s.io/v1beta1")),
        ),
        ("v2", with("/apiVersion", json!("admission.k8s.io/v2"))),
        ("uid twice", twice("\"uid\":\"u\"")),
        ("kind twice", twice("\"kind\":\"AdmissionReview\"")),
        ("namespace twice", twice("\"namespace\":\"shop\"")),
        ("dryRun twice", twice("\"dryRun\":false")),
        (
            "a pod's name twice",
            twice("\"generateName\":\"web-6d4cf56db6-\""),
        ),
        (
            "a pod's restartPolicy twice",
            twice("\"restartPolicy\":\"Always\""),
        ),
    ];
    let mut connection = served.connect().await;
    let sent = cases.len() as u64;
    for (name, body) in cases {
        let answer = connection
            .post("/inject/ns", &body)
            .await
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, 400, "{name}: {text}");
        assert!(text.starts_with("BadRequest: "), "{name}: {text}");
        assert_eq!(text.lines().count(), 1, "{name}: {text}");
        assert!(text.len() < 1_000, "{name}: {} bytes", text.len());
    }
    assert_eq!(served.counts(), [(Reason::BadRequest, sent)]);
}

#[tokio::test]
async fn what_is_not_the_creation_of_a_pod_goes_in_as_it_is() {
    let served = Served::start().await;
    let changes = [
        ("/request/operation", json!("UPDATE")),
        ("/request/operation", json!("DELETE")),
        ("/request/operation", json!("")),
        ("/request/resource/resource", json!("deployments")),
        ("/request/resource/group", json!("apps")),
        ("/request/resource/version", json!("v2")),
        ("/request/resource", Value::Null),
    ];
    let mut connection = served.connect().await;
    for (pointer, value) in changes {
        let mut review = review::of_pod("u", "shop", &pod());
        *review.pointer_mut(pointer).expect("there") = value;
        let answer = connection
            .post("/inject/ns", review.to_string().as_bytes())
            .await
            .expect("an answer");
        assert_eq!(
            answer.json()["response"],
            json!({"uid": "u", "allowed": true, "auditAnnotations": {"reason": "NotAPodCreate"}}),
            "{pointer}"
        );
    }
    let mut review = review::of_pod("u", "shop", &pod());
    review["request"]["subResource"] = json!("ephemeralcontainers");
    let answer = connection
        .post("/inject/ns", review.to_string().as_bytes())
        .await
        .expect("an answer");
    assert_eq!(reason_of(&answer), "NotAPodCreate");
    assert_eq!(served.counts(), [(Reason::NotAPodCreate, 8)]);
}

#[tokio::test]
async fn a_review_without_an_object_is_an_invalid_pod() {
    let served = Served::start().await;
    let mut review = review::of_pod("u", "shop", &Value::Null);
    let mut connection = served.connect().await;
    for _ in 0..2 {
        let answer = connection
            .post("/inject/ns", review.to_string().as_bytes())
            .await
            .expect("an answer");
        assert_eq!(
            answer.json()["response"],
            json!({"uid": "u", "allowed": true, "auditAnnotations": {"reason": "InvalidPod"}})
        );
        review["request"]
            .as_object_mut()
            .expect("an object")
            .remove("object");
    }
    assert_eq!(served.counts(), [(Reason::InvalidPod, 2)]);
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_before_it_is_read() {
    let served = Served::start().await;
    let declared = 6 * 1024 * 1024 + 1;
    let head = format!(
        "POST /inject/ns HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {declared}"
    );
    // None of it sent, all of it sent.
    for body in [Vec::new(), vec![b' '; declared]] {
        let mut connection = served.connect().await;
        connection
            .send(&request(&head, &body))
            .await
            .expect("the whole body may be sent");
        let answer = connection.receive().await.expect("an answer");
        assert_eq!(answer.status, 413);
        assert_eq!(answer.header("connection"), Some("close"));
    }
    assert_eq!(served.counts(), [(Reason::BadRequest, 2)]);
}

#[tokio::test]
async fn a_body_of_unknown_length_is_counted_while_it_comes() {
    let served = Served::start().await;
    let head = "POST /inject/ns HTTP/1.1\nHost: x\nContent-Type: application/json\nTransfer-Encoding: chunked";
    let chunk = [b"100000\r\n".as_slice(), &vec![b' '; 0x10_0000], b"\r\n"].concat();

    let mut connection = served.connect().await;
    let body = [chunk.repeat(7).as_slice(), b"0\r\n\r\n"].concat();
    connection.send(&request(head, &body)).await.expect("sent");
    assert_eq!(connection.receive().await.expect("an answer").status, 413);

    // Spaces before a review are JSON, and just under the limit is read.
    let mut connection = served.connect().await;
    let review = ordinary("u");
    let last = [
        format!("{:x}\r\n", review.len()).as_bytes(),
        &review,
        b"\r\n",
    ]
    .concat();
    let body = [chunk.repeat(5).as_slice(), &last, b"0\r\n\r\n"].concat();
    connection.send(&request(head, &body)).await.expect("sent");
    assert_eq!(connection.receive().await.expect("an answer").status, 200);
}

#[tokio::test]
async fn a_review_of_six_mebibytes_is_answered() {
    let served = Served::start().await;
    let mut review = ordinary("u");
    review.resize(6 * 1024 * 1024, b' ');
    let answer = served
        .connect()
        .await
        .post("/inject/ns", &review)
        .await
        .expect("an answer");
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn too_much_in_flight_is_told_as_such_and_passes() {
    let bodies = webhook::Limits {
        in_flight_bytes: 1 << 20,
        ..webhook::Limits::default()
    };
    let served = Served::with(Limits::default(), bodies).await;
    let half = vec![b' '; 600_000];
    let head =
        "POST /inject/ns HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 700000";
    let mut first = served.connect().await;
    first.send(&request(head, &half)).await.expect("sent");
    let mut second = served.connect().await;
    second.send(&request(head, &half)).await.expect("sent");
    // One of them found no room; which one is the scheduler's choice.
    let refused = tokio::select! {
        answer = first.receive() => answer,
        answer = second.receive() => answer,
    }
    .expect("an answer");
    assert_eq!(refused.status, 503);
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert!(refused.body.starts_with(b"Overloaded: "));
    assert_eq!(served.counts(), [(Reason::Overloaded, 1)]);
    drop((first, second));
    served.is_well().await;
}

#[tokio::test]
async fn a_body_that_had_its_time_makes_way_for_others() {
    let bodies = webhook::Limits {
        in_flight_bytes: 1 << 20,
        ..webhook::Limits::default()
    };
    let served = Served::with(Limits::default(), bodies).await;
    let head = "POST /inject/ns HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 1048576";
    let mut stalled = served.connect().await;
    stalled
        .send(&request(head, &vec![b' '; 1_040_000]))
        .await
        .expect("sent");
    let mut large = ordinary("large");
    large.resize(100_000, b' ');
    // At first there is room, then there is none, and after a second there is again.
    let mut statuses = Vec::new();
    while !statuses.ends_with(&[503, 200]) {
        assert!(statuses.len() < 1_000, "the stalled body never makes way");
        let answer = served.connect().await.post("/inject/ns", &large).await;
        statuses.push(answer.expect("an answer").status);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(stalled.receive().await.expect("an answer").status, 503);
}

#[tokio::test]
async fn a_slow_body_is_given_up() {
    let bodies = webhook::Limits {
        body: Duration::from_millis(200),
        ..webhook::Limits::default()
    };
    let served = Served::with(Limits::default(), bodies).await;
    let mut connection = served.connect().await;
    let head =
        "POST /inject/ns HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 100";
    connection.send(&request(head, b"{")).await.expect("sent");
    let answer = connection.receive().await.expect("an answer");
    assert_eq!(answer.status, 408);
    assert!(
        connection.receive().await.is_err(),
        "the connection is closed"
    );
    assert_eq!(served.counts(), [(Reason::BadRequest, 1)]);
}

#[tokio::test]
async fn a_panic_is_our_fault_and_not_the_pods() {
    let served = Served::start().await;
    let mut connection = served.connect().await;
    served.faulty.store(true, Ordering::Relaxed);
    for size in [0, 300_000] {
        let mut body = ordinary("u");
        body.resize(body.len().max(size), b' ');
        let answer = connection
            .post("/inject/ns", &body)
            .await
            .expect("an answer");
        assert_eq!(answer.status, 500);
        assert!(answer.body.starts_with(b"Internal: "));
    }
    served.faulty.store(false, Ordering::Relaxed);
    let answer = connection
        .post("/inject/ns", &ordinary("u"))
        .await
        .expect("the connection goes on");
    assert_eq!(answer.status, 200);
    assert_eq!(served.metrics.count(Reason::Internal), 2);
}

#[tokio::test]
async fn every_request_is_counted_once() {
    let served = Served::start().await;
    let mut connection = served.connect().await;
    let mut sent = 0;
    for round in 0..20 {
        let mut update = review::of_pod("u", "shop", &pod());
        update["request"]["operation"] = json!("UPDATE");
        update["request"]["dryRun"] = json!(round % 2 == 0);
        for body in [
            ordinary("u"),
            b"{}".to_vec(),
            update.to_string().into_bytes(),
        ] {
            connection
                .post("/inject/ns", &body)
                .await
                .expect("an answer");
            sent += 1;
        }
    }
    let counted: u64 = served.counts().iter().map(|(_, count)| count).sum();
    assert_eq!(counted, sent);
}

#[tokio::test]
async fn a_peer_that_makes_us_wait_is_closed() {
    let limits = Limits {
        handshake: Duration::from_millis(300),
        head: Duration::from_millis(300),
        idle: Duration::from_millis(600),
        ..Limits::default()
    };
    let served = Served::with(limits, webhook::Limits::default()).await;
    let patience = Duration::from_secs(30);

    let mut silent = TcpStream::connect(served.addr).await.expect("connected");
    assert!(timeout(patience, ends(&mut silent)).await.expect("closed"));

    let mut halfway = TcpStream::connect(served.addr).await.expect("connected");
    halfway.write_all(&[22, 3, 1, 2, 0, 1]).await.expect("sent");
    assert!(timeout(patience, ends(&mut halfway)).await.expect("closed"));

    let mut without_a_request = tls(&served).await;
    assert!(
        timeout(patience, ends(&mut without_a_request))
            .await
            .expect("closed")
    );

    let mut with_half_a_head = tls(&served).await;
    with_half_a_head
        .write_all(b"POST /inject/ns HTTP/1.1\r\nHos")
        .await
        .expect("sent");
    assert!(
        timeout(patience, ends(&mut with_half_a_head))
            .await
            .expect("closed")
    );

    // Another one a second would go on for ever if the clock began anew with each byte.
    let mut trickling = tls(&served).await;
    let trickle = async {
        while trickling.write_all(b"P").await.is_ok() && trickling.flush().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(patience, trickle).await.expect("closed");

    let mut idle = served.connect().await;
    idle.post("/inject/ns", &ordinary("u"))
        .await
        .expect("an answer");
    let closed = timeout(patience, idle.receive()).await.expect("closed");
    assert!(closed.is_err());
}

#[tokio::test]
async fn a_head_over_its_limit_is_refused() {
    let served = Served::start().await;
    let long = "x".repeat(17 * 1024);
    for head in [
        format!("GET /inject/ns HTTP/1.1\nHost: x\nX-Long: {long}"),
        format!("GET /{long} HTTP/1.1\nHost: x"),
    ] {
        let mut connection = served.connect().await;
        connection.send(&request(&head, b"")).await.expect("sent");
        match connection.receive().await {
            Ok(answer) => assert!((400..500).contains(&answer.status), "{}", answer.status),
            Err(_) => continue,
        }
        assert!(
            connection.receive().await.is_err(),
            "the connection is closed"
        );
    }
    let many: String = (0..200).map(|n| format!("\nX-{n}: y")).collect();
    let mut connection = served.connect().await;
    let head = format!("GET /inject/ns HTTP/1.1\nHost: x{many}");
    connection.send(&request(&head, b"")).await.expect("sent");
    let refused = connection.receive().await;
    assert!(refused.is_err() || refused.is_ok_and(|answer| answer.status == 431));
    served.is_well().await;
}

#[tokio::test]
async fn old_tls_and_http2_are_not_spoken() {
    let served = Served::start().await;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(served.root.clone().into()).expect("a root");
    let old = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .expect("the provider speaks TLS 1.2")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let refused = shake(&served, old).await.expect_err("TLS 1.2 is refused");
    assert!(refused.to_string().contains("ProtocolVersion"), "{refused}");

    let mut h2 = (*trusting([served.root.as_slice()])).clone();
    h2.alpn_protocols = vec![b"h2".to_vec()];
    let refused = shake(&served, h2).await.expect_err("h2 alone is refused");
    assert!(
        refused.to_string().contains("NoApplicationProtocol"),
        "{refused}"
    );

    let mut both = (*trusting([served.root.as_slice()])).clone();
    both.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    assert_eq!(
        shake(&served, both).await.expect("a handshake"),
        Some(b"http/1.1".to_vec())
    );

    let mut none = (*trusting([served.root.as_slice()])).clone();
    none.alpn_protocols = Vec::new();
    assert_eq!(shake(&served, none).await.expect("a handshake"), None);
}

#[tokio::test]
async fn a_client_that_closes_its_half_gets_its_answer() {
    let served = Served::start().await;
    let body = ordinary("u");
    let head = format!(
        "POST /inject/ns HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {}",
        body.len()
    );
    let mut stream = tls(&served).await;
    stream
        .write_all(&request(&head, &body))
        .await
        .expect("sent");
    stream.shutdown().await.expect("half closed");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer");
    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"));
}

#[tokio::test]
async fn requests_that_are_sent_ahead_are_answered_in_their_order() {
    let served = Served::start().await;
    let mut ahead = Vec::new();
    for number in 0..50 {
        let body = ordinary(&format!("u-{number}"));
        let head = format!(
            "POST /inject/ns HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {}",
            body.len()
        );
        ahead.extend(request(&head, &body));
    }
    let mut connection = served.connect().await;
    connection.send(&ahead).await.expect("sent");
    for number in 0..50 {
        let answer = connection.receive().await.expect("an answer");
        assert_eq!(
            answer.json()["response"]["uid"],
            format!("u-{number}").as_str()
        );
    }
}

async fn tls(served: &Served) -> tokio_rustls::client::TlsStream<TcpStream> {
    let tcp = TcpStream::connect(served.addr).await.expect("connected");
    TlsConnector::from(trusting([served.root.as_slice()]))
        .connect(ServerName::try_from(NAME).expect("a name"), tcp)
        .await
        .expect("a handshake")
}

/// The protocol that is agreed on.
async fn shake(served: &Served, config: ClientConfig) -> std::io::Result<Option<Vec<u8>>> {
    let tcp = TcpStream::connect(served.addr).await?;
    let mut stream = TlsConnector::from(Arc::new(config))
        .connect(ServerName::try_from(NAME).expect("a name"), tcp)
        .await?;
    let agreed = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
    // A server that refuses says so in answer to the client's last flight.
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .await?;
    stream.read_exact(&mut [0; 12]).await?;
    Ok(agreed)
}

#[tokio::test]
async fn advice_warns_and_never_refuses() {
    let served = Served::start().await;
    let deployment = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web"},
        "spec": {"template": {
            "metadata": {"annotations": {"sidecar.istio.io/injekt": "true"}},
            "spec": {"containers": [{"name": "web", "image": "web:1"}]},
        }},
    });
    let ask = async |namespace: &str, object: &Value| {
        let mut review = review::of_pod("u", namespace, object);
        review["request"]["resource"] =
            json!({"group": "apps", "version": "v1", "resource": "deployments"});
        let answer = served
            .connect()
            .await
            .post("/advise?timeout=1s", review.to_string().as_bytes())
            .await
            .expect("an answer");
        assert_eq!(answer.status, 200);
        let response = answer.json()["response"].clone();
        assert_eq!(response["allowed"], true);
        assert!(response.get("patch").is_none());
        response["warnings"].clone()
    };
    let words = ask("meshed", &deployment).await.to_string();
    assert!(words.contains("AnnotationUnknown"), "{words}");
    assert_eq!(ask("nowhere", &deployment).await, Value::Null);
    for odd in [
        Value::Null,
        json!([]),
        json!({}),
        json!({"kind": "Deployment", "spec": 7}),
    ] {
        assert_eq!(ask("meshed", &odd).await, Value::Null, "{odd}");
    }
    assert_eq!(served.counts(), []);
}

#[tokio::test]
async fn a_pod_that_pod_security_will_refuse_is_patched_with_a_warning() {
    let served = Served::start().await;
    let ask = async |namespace: &str| {
        let review = review::of_pod("u", namespace, &pod()).to_string();
        let answer = served
            .connect()
            .await
            .post("/inject/ns", review.as_bytes())
            .await
            .expect("an answer");
        assert_eq!(reason_of(&answer), "Injected");
        answer.json()["response"]["warnings"].to_string()
    };
    assert!(ask("strict").await.contains("PodSecurityForbidsInit"));
    assert!(!ask("meshed").await.contains("PodSecurityForbidsInit"));
}

#[tokio::test]
async fn a_pod_near_the_limit_of_the_store_is_patched_with_a_warning() {
    let served = Served::start().await;
    let mut large = pod();
    large["metadata"]["annotations"] = json!({"note": "x".repeat(1 << 20)});
    let review = review::of_pod("u", "shop", &large).to_string();
    let answer = served
        .connect()
        .await
        .post("/inject/ns", review.as_bytes())
        .await
        .expect("an answer");
    assert_eq!(reason_of(&answer), "Injected");
    let warnings = answer.json()["response"]["warnings"].to_string();
    assert!(warnings.contains("LargePod"), "{warnings}");
}
