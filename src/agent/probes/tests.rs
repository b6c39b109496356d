use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::{
    Request, Response,
    body::{Frame, Incoming},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
};
use tokio_rustls::TlsAcceptor;

use super::*;

const POD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

/// Answers every connection with bytes; what was asked comes back.
async fn canned(answers: Vec<String>) -> (u16, mpsc::Receiver<String>) {
    let listener = TcpListener::bind((POD, 0)).await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let (heard, requests) = mpsc::channel(16);
    tokio::spawn(async move {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut request = vec![0; 4096];
            let read = stream.read(&mut request).await.expect("a request");
            request.truncate(read);
            let request = String::from_utf8(request).expect("ASCII");
            heard.send(request).await.expect("the test listens");
            let answer = answer.replace("PORT", &port.to_string());
            stream.write_all(answer.as_bytes()).await.expect("sent");
        }
    });
    (port, requests)
}

fn reply(head: &str) -> String {
    format!("HTTP/1.1 {head}\r\ncontent-length: 2\r\n\r\nok")
}

fn probe(json: &str) -> Probe {
    serde_json::from_str(json).expect(json)
}

async fn run(json: &str) -> Result<u16, String> {
    let answer = probe(json).run(POD, &Asker::default()).await;
    answer
        .map(|it| it.status)
        .map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_status_comes_back_as_the_application_gave_it() {
    for (head, want) in [
        ("200 OK", 200),
        ("204 No Content", 204),
        ("404 Not Found", 404),
        ("503 Service Unavailable", 503),
        // Whoever redirects elsewhere answers: to the kubelet that is health.
        ("302 Found\r\nlocation: https://login.example/", 200),
        (
            "307 Temporary Redirect\r\nlocation: http://127.0.0.2:PORT/x",
            200,
        ),
        // Without a place to go it is an answer like any other.
        ("304 Not Modified", 304),
        ("301 Moved Permanently", 301),
    ] {
        let (port, _heard) = canned(vec![reply(head)]).await;
        let got = run(&format!(r#"{{"httpGet":{{"port":{port}}}}}"#)).await;
        assert_eq!(got, Ok(want), "{head}");
    }
}

#[tokio::test]
async fn a_redirect_to_the_pod_is_followed_to_its_end() {
    let (port, mut heard) = canned(vec![
        reply("302 Found\r\nlocation: /b"),
        reply("307 Temporary Redirect\r\nlocation: http://127.0.0.1:PORT/c"),
        reply("500 Internal Server Error"),
    ])
    .await;
    let headers = r#"[{"name":"Host","value":"shop.example"},{"name":"X-Probe","value":"1"}]"#;
    let got = run(&format!(
        r#"{{"httpGet":{{"path":"/a","port":{port},"httpHeaders":{headers}}}}}"#
    ))
    .await;
    assert_eq!(got, Ok(500));
    for (path, host) in [
        ("/a", "shop.example"),
        ("/b", "shop.example"),
        ("/c", &format!("127.0.0.1:{port}")),
    ] {
        let request = heard.recv().await.expect("a request").to_ascii_lowercase();
        assert!(
            request.starts_with(&format!("get {path} http/1.1\r\n")),
            "{request}"
        );
        assert!(
            request.contains(&format!("\r\nhost: {host}\r\n")),
            "{request}"
        );
        assert!(request.contains("\r\nx-probe: 1\r\n"), "{request}");
    }
}

#[tokio::test]
async fn a_redirect_in_a_circle_ends_after_ten() {
    let (port, _heard) = canned(vec![reply("302 Found\r\nlocation: /"); 11]).await;
    let got = run(&format!(r#"{{"httpGet":{{"port":{port}}}}}"#)).await;
    assert_eq!(got, Err("stopped after 10 redirects".to_owned()));
}

#[tokio::test]
async fn headers_are_the_authors_and_else_the_kubelets() {
    let asker = Asker {
        user_agent: Some("kube-probe/1.36".to_owned()),
    };
    let of_author = r#"[{"name":"User-Agent","value":"mine"},{"name":"Accept","value":""},{"name":"A","value":"1"},{"name":"A","value":"2"}]"#;
    for (headers, there, missing) in [
        (
            "null",
            &[
                "user-agent: kube-probe/1.36",
                "accept: */*",
                "connection: close",
            ][..],
            &["x-"][..],
        ),
        (
            of_author,
            &["user-agent: mine", "a: 1", "a: 2"],
            &["accept:", "kube-probe"],
        ),
    ] {
        let (port, mut heard) = canned(vec![reply("200 OK")]).await;
        let json = format!(r#"{{"httpGet":{{"port":{port},"httpHeaders":{headers}}}}}"#);
        let answer = probe(&json).run(POD, &asker).await.expect("an answer");
        assert_eq!((answer.status, answer.body), (200, Bytes::from("ok")));
        let request = heard.recv().await.expect("a request").to_ascii_lowercase();
        assert!(
            request.contains(&format!("\r\nhost: 127.0.0.1:{port}\r\n")),
            "{request}"
        );
        for line in there {
            assert!(
                request.contains(&format!("\r\n{line}\r\n")),
                "{line}: {request}"
            );
        }
        for text in missing {
            assert!(!request.contains(text), "{text}: {request}");
        }
    }
}

#[tokio::test]
async fn of_a_long_body_ten_kibibytes_are_read() {
    let body = "x".repeat(1 << 20);
    let (port, _heard) = canned(vec![format!(
        "HTTP/1.1 500 No\r\ncontent-length: {}\r\ncontent-type: text/x\r\n\r\n{body}",
        body.len()
    )])
    .await;
    let json = format!(r#"{{"httpGet":{{"port":{port}}},"timeoutSeconds":5}}"#);
    let answer = probe(&json)
        .run(POD, &Asker::default())
        .await
        .expect("an answer");
    assert_eq!(answer.status, 500);
    assert_eq!(answer.body.len(), 10 << 10);
    assert_eq!(answer.content_type.as_deref(), Some("text/x"));
}

#[tokio::test]
async fn who_refuses_hangs_or_speaks_nonsense_fails_with_words_that_help() {
    let gone = {
        let listener = TcpListener::bind((POD, 0)).await.expect("a port");
        listener.local_addr().expect("bound").port()
    };
    // The kernel accepts; nobody answers.
    let silent = TcpListener::bind((POD, 0)).await.expect("a port");
    let silent = (silent.local_addr().expect("bound").port(), silent).0;
    let hanging = TcpListener::bind((POD, 0)).await.expect("a port");
    let hangs = hanging.local_addr().expect("bound").port();
    let (nonsense, _heard) = canned(vec!["+OK pop3\r\n\r\n".to_owned()]).await;
    for (json, want) in [
        (
            format!(r#"{{"httpGet":{{"port":{gone}}}}}"#),
            "refuses connections",
        ),
        (
            format!(r#"{{"tcpSocket":{{"port":{gone}}}}}"#),
            "refuses connections",
        ),
        (
            format!(r#"{{"grpc":{{"port":{silent}}}}}"#),
            "refuses connections",
        ),
        (
            format!(r#"{{"httpGet":{{"port":{hangs}}}}}"#),
            "did not answer within 1 s",
        ),
        (
            format!(r#"{{"grpc":{{"port":{hangs}}}}}"#),
            "did not answer within 1 s",
        ),
        (
            format!(r#"{{"httpGet":{{"port":{nonsense}}}}}"#),
            "broke off",
        ),
        (
            format!(
                r#"{{"httpGet":{{"port":{gone},"httpHeaders":[{{"name":"a b","value":""}}]}}}}"#
            ),
            "cannot be asked for",
        ),
    ] {
        let error = run(&json).await.expect_err(&json);
        assert!(error.contains(want), "{json}: {error}");
    }
    let accepted = run(&format!(r#"{{"tcpSocket":{{"port":{hangs}}}}}"#)).await;
    assert_eq!(accepted, Ok(200));
}

#[tokio::test]
async fn any_certificate_will_do_and_so_will_tls_1_2() {
    use rustls::version::{TLS12, TLS13};
    let (v1, v3) = (0, 2);
    for (version, x509) in [(&TLS12, v3), (&TLS12, v1), (&TLS13, v3), (&TLS13, v1)] {
        let made = rcgen::generate_simple_self_signed(["elsewhere.example".to_owned()]);
        let made = made.expect("a certificate");
        let mut certificate = made.cert.der().to_vec();
        let found = certificate
            .windows(5)
            .position(|it| *it == [0xa0, 3, 2, 1, v3]);
        certificate[found.expect("its version") + 4] = x509;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let key = provider.key_provider.load_private_key(key).expect("a key");
        let pair = CertifiedKey::new(vec![certificate.into()], key);
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .expect("a version")
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(pair)));
        let listener = TcpListener::bind((POD, 0)).await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.expect("a connection");
            let stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await;
            let service = service_fn(|_| async {
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("secure"))))
            });
            http1::Builder::new()
                .serve_connection(TokioIo::new(stream.expect("TLS")), service)
                .await
        });
        let got = run(&format!(
            r#"{{"httpGet":{{"port":{port},"scheme":"HTTPS"}},"timeoutSeconds":5}}"#
        ))
        .await;
        assert_eq!(got, Ok(200), "{version:?}, {x509}");
    }
    let (plain, _heard) = canned(vec![reply("200 OK")]).await;
    let error = run(&format!(
        r#"{{"httpGet":{{"port":{plain},"scheme":"HTTPS"}}}}"#
    ))
    .await;
    assert!(error.expect_err("no TLS").contains("there is no TLS"));
}

/// A health service whose answers are `(status, trailers)` by the name that was asked for.
async fn health() -> u16 {
    let listener = TcpListener::bind((POD, 0)).await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            tokio::spawn(
                http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service_fn(answer)),
            );
        }
    });
    port
}

async fn answer(
    request: Request<Incoming>,
) -> Result<Response<http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>>, Infallible> {
    assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
    assert_eq!(request.headers()["content-type"], "application/grpc");
    assert_eq!(request.headers()["te"], "trailers");
    let body = request.into_body().collect().await.expect("a message");
    let message = body.to_bytes();
    let service = std::str::from_utf8(message.get(7..).unwrap_or_default()).expect("a name");
    let (status, code) = match service {
        "" => (1_u8, "0"),
        "down" => (2, "0"),
        "unknown" => (0, "5"),
        other => panic!("{other:?}"),
    };
    let mut trailers = hyper::HeaderMap::new();
    trailers.insert("grpc-status", code.parse().expect("a code"));
    let frames = [
        Frame::data(Bytes::from(vec![0, 0, 0, 0, 2, 8, status])),
        Frame::trailers(trailers),
    ];
    let frames = tokio_stream::iter(frames.map(Ok::<_, Infallible>));
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    let kind = "application/grpc".parse().expect("a type");
    response.headers_mut().insert("content-type", kind);
    Ok(response)
}

#[tokio::test]
async fn grpc_health_is_serving_or_it_is_not() {
    let port = health().await;
    let ask = async |service: &str| {
        run(&format!(
            r#"{{"grpc":{{"port":{port},"service":{service}}},"timeoutSeconds":5}}"#
        ))
        .await
    };
    assert_eq!(ask("null").await, Ok(200));
    assert_eq!(ask("\"\"").await, Ok(200));
    for (service, want) in [("\"down\"", "NOT_SERVING"), ("\"unknown\"", "code 5")] {
        let error = ask(service).await.expect_err(service);
        assert!(error.contains(want), "{service}: {error}");
    }
}

#[tokio::test]
async fn a_lifecycle_handler_may_take_longer_than_a_probe() {
    let listener = TcpListener::bind((POD, 0)).await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let mut request = [0; 1024];
        let _ = stream.read(&mut request).await;
        tokio::time::sleep(Duration::from_millis(1200)).await;
        stream.write_all(reply("200 OK").as_bytes()).await
    });
    let handler = probe(&format!(r#"{{"httpGet":{{"port":{port}}}}}"#));
    let answer = handler.run_unbounded(POD, &Asker::default()).await;
    assert_eq!(answer.expect("patience").status, 200);
}

#[test]
fn records_are_those_that_the_injector_writes() {
    let probes: Probes = serde_json::from_str(
        r#"{"/app-health/a/livez":{"httpGet":{"path":"/h","port":8080,"scheme":"HTTPS","host":""},"named":"web","timeoutSeconds":3},
            "/app-health/b%20c/readyz":{"tcpSocket":{"port":5432}},
            "/app-lifecycle/a/prestop":{"httpGet":{"port":80}}}"#,
    )
    .expect("records");
    assert_eq!(probes.containers(), ["a", "b%20c"]);
    let live = probes.at("/app-health/a/livez").expect("recorded");
    assert_eq!(live.timeout, Duration::from_secs(3));
    assert!(matches!(&live.act, Act::Http(get) if get.scheme == Scheme::Https));
    let ready = probes.at("/app-health/b%20c/readyz").expect("recorded");
    assert_eq!(ready.timeout, Duration::from_secs(1));
    assert_eq!(ready.act, Act::Tcp { port: 5432 });
    assert!(probes.at("/app-health/a/readyz").is_none());
    assert_eq!(
        format!("{probes:?}"),
        r#"["/app-health/a/livez", "/app-health/b%20c/readyz", "/app-lifecycle/a/prestop"]"#
    );
    for record in [
        "{}",
        r#"{"httpGet":{"port":0.5}}"#,
        r#"{"httpGet":{"port":1},"grpc":{"port":1}}"#,
    ] {
        assert!(serde_json::from_str::<Probe>(record).is_err(), "{record}");
    }
}
