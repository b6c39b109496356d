//! The verbs that ask a running control plane, against one that tells a fixed document.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    process::{Command, Output},
    thread,
};

use serde_json::{Value, json};

#[test]
fn ps_tells_what_a_control_plane_at_an_address_knows() {
    let document = proxies("synced").to_string();
    let table = ps("200 OK", &document, &[]);
    assert_eq!(table.status.code(), Some(0), "{}", text(&table.stderr));
    let shown = text(&table.stdout);
    let mut lines = shown.lines().map(|line| line.split("   ").map(str::trim));
    let mut cells = || -> Vec<String> {
        let line = lines.next().expect("a line");
        line.filter(|cell| !cell.is_empty())
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(cells(), ["POD", "IDENTITY", "CERT LEFT", "XDS", "VERSION"]);
    let row = cells();
    let (left, rest) = (row[2].clone(), [&row[..2], &row[3..]].concat());
    assert_eq!(
        rest,
        [
            "shop/web-1",
            "spiffe://cluster.local/ns/shop/sa/web",
            "synced",
            "1.40.0"
        ]
    );
    assert!(
        left.starts_with("expired ") && left.ends_with(" ago"),
        "{left}"
    );

    assert_eq!(
        text(&ps("200 OK", &document, &["-o", "name"]).stdout),
        "shop/web-1\n"
    );
    let list: Value =
        serde_json::from_slice(&ps("200 OK", &document, &["-o", "json"]).stdout).expect("JSON");
    assert_eq!(list["apiVersion"], "malha/v1");
    assert_eq!(list["items"][0]["state"], "synced");
    assert_eq!(
        list["items"][0]["certificateNotAfter"],
        "2020-01-01T00:00:00Z"
    );
}

#[test]
fn cert_ls_shows_what_ends_first_and_only_what_ends_in_time() {
    let mut document = proxies("synced");
    let mut later = document["items"][0].clone();
    later["pod"] = json!("web-2");
    later["certificateNotAfter"] = json!("2999-01-01T00:00:00Z");
    let mut unseen = later.clone();
    unseen["pod"] = json!("web-3");
    unseen["certificateNotAfter"] = Value::Null;
    document["items"] = json!([later, unseen, document["items"][0]]);
    let document = document.to_string();
    let pods = |args: &[&str]| -> Vec<String> {
        let args = [args, &["-o", "json"]].concat();
        let listed = verb(&["cert", "ls"], "200 OK", &document, &args);
        assert_eq!(listed.status.code(), Some(0), "{}", text(&listed.stderr));
        let list: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
        assert_eq!(list["kind"], "CertificateList");
        let items = list["items"].as_array().expect("a list").iter();
        items
            .map(|item| item["pod"].as_str().expect("a name").to_owned())
            .collect()
    };
    assert_eq!(pods(&[]), ["web-1", "web-2"]);
    assert_eq!(pods(&["--expiring-in", "2h"]), ["web-1"]);
    let table = verb(&["cert", "ls"], "200 OK", &document, &[]);
    let shown = text(&table.stdout);
    let mut lines = shown.lines();
    assert!(lines.next().expect("a head").starts_with("POD "), "{shown}");
    let first = lines.next().expect("a row");
    assert!(
        first.contains("shop/web-1") && first.contains("expired "),
        "{shown}"
    );
}

#[test]
fn ps_says_where_else_there_are_proxies() {
    let other = ps("200 OK", &proxies("synced").to_string(), &["-n", "bank"]);
    assert_eq!(other.status.code(), Some(0));
    assert_eq!(text(&other.stdout), "");
    assert_eq!(
        text(&other.stderr),
        "no proxies in namespace bank; 1 in others: -A shows them\n"
    );
}

#[test]
fn a_refused_configuration_is_a_warning_where_strict_asks_for_one() {
    let document = proxies("rejected").to_string();
    assert_eq!(ps("200 OK", &document, &[]).status.code(), Some(0));
    let strict = ps("200 OK", &document, &["--strict"]);
    assert_eq!(strict.status.code(), Some(2));
    assert!(text(&strict.stdout).contains("rejected (lds)"));
}

#[test]
fn an_answer_that_is_none_ends_with_69() {
    for (status, body, words) in [
        ("404 Not Found", "", "does not tell about proxies (404)"),
        (
            "503 Service Unavailable",
            "",
            "GET /v1/proxies was answered with 503",
        ),
        ("200 OK", "<html>", "the answer is not a ProxyList"),
    ] {
        let output = ps(status, body, &[]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(69), "{said}");
        assert!(said.contains(words), "{said}");
    }
}

fn proxies(state: &str) -> Value {
    json!({ "apiVersion": "malha/v1", "kind": "ProxyList", "items": [{
        "namespace": "shop", "pod": "web-1",
        "identity": "spiffe://cluster.local/ns/shop/sa/web",
        "connectedSince": "2019-12-31T12:00:00Z",
        "envoyVersion": "1.40.0",
        "certificateNotAfter": "2020-01-01T00:00:00Z",
        "types": { "cds": { "state": "synced", "resources": 9 }, "lds": { "state": state, "resources": 3, "lastAck": "2019-12-31T12:00:01Z" } },
    }] })
}

/// `malha ps` against a server that gives one answer.
fn ps(status: &str, body: &str, args: &[&str]) -> Output {
    verb(&["ps"], status, body, args)
}

fn verb(verb: &[&str], status: &str, body: &str, args: &[&str]) -> Output {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = socket.local_addr().expect("an address").to_string();
    let answer = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let server = thread::spawn(move || {
        let (mut stream, _) = socket.accept().expect("a caller");
        let mut asked = [0; 4096];
        let count = stream.read(&mut asked).expect("a request");
        stream.write_all(answer.as_bytes()).expect("written");
        text(&asked[..count])
    });
    let output = Command::new(env!("CARGO_BIN_EXE_malha"))
        .args(verb)
        .args(["--address", &address])
        .args(args)
        .env("NO_COLOR", "1")
        .output()
        .expect("malha runs");
    let asked = server.join().expect("asked once");
    assert!(asked.starts_with("GET /v1/proxies HTTP/1.1\r\n"), "{asked}");
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
