use super::*;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

/// What a proxy tells of calls that it makes or answers.
struct Line<'a> {
    reporter: &'a str,
    source: &'a str,
    destination: &'a str,
    service: &'a str,
    policy: &'a str,
    code: &'a str,
    requests: u32,
}

const BY_WEB: Line<'_> = Line {
    reporter: "source",
    source: WEB,
    destination: CART,
    service: "cart.shop.svc.cluster.local",
    policy: "unknown",
    code: "200",
    requests: 90,
};

fn exposition(lines: &[Line<'_>]) -> String {
    let mut text = String::from("# TYPE istio_requests_total counter\n");
    for line in lines {
        let Line {
            reporter,
            source,
            destination,
            service,
            policy,
            code,
            requests,
        } = line;
        let labels = format!(
            "reporter=\"{reporter}\",source_principal=\"{source}\",destination_principal=\"{destination}\",\
             destination_service=\"{service}\",destination_service_namespace=\"shop\",\
             connection_security_policy=\"{policy}\",response_code=\"{code}\",response_flags=\"-\""
        );
        text += &format!("istio_requests_total{{{labels}}} {requests}\n");
        for (le, count) in [("5", requests / 2), ("10", *requests), ("+Inf", *requests)] {
            text += &format!(
                "istio_request_duration_milliseconds_bucket{{{labels},le=\"{le}\"}} {count}\n"
            );
        }
    }
    text
}

fn scraped(pod: &str, first: &[Line<'_>], second: &[Line<'_>]) -> Scrape {
    let first = count(&exposition(first)).expect("metrics");
    let second = count(&exposition(second)).expect("metrics");
    let (workload, _) = pod.rsplit_once('-').expect("a pod of a workload");
    Scrape {
        asked: Asked {
            pod: PodName {
                namespace: "shop".into(),
                name: pod.into(),
            },
            workload: format!("shop/{workload}"),
        },
        recent: Some((since(&first, &second), Duration::from_secs(2))),
        total: second,
    }
}

fn lines(scrapes: &[Scrape], wide: bool, totals: bool) -> String {
    table(&rows(&edges(scrapes), wide, totals))
}

#[test]
fn a_call_that_both_sides_tell_of_is_counted_once() {
    let web = scraped(
        "web-1",
        &[],
        &[
            BY_WEB,
            Line {
                code: "503",
                requests: 10,
                ..BY_WEB
            },
        ],
    );
    let by_cart = Line {
        reporter: "destination",
        policy: "mutual_tls",
        ..BY_WEB
    };
    let cart = scraped("cart-1", &[], &[by_cart]);
    assert_eq!(
        lines(&[web, cart], false, false),
        "\
CLIENT     SERVER      MTLS   IDENTITIES              RPS    SUCCESS   P99
shop/web   shop/cart   yes    shop/web -> shop/cart   50.0   90.0 %    9.9 ms
"
    );
}

#[test]
fn callers_outside_the_mesh_are_told_by_the_server() {
    let plain = Line {
        reporter: "destination",
        source: "-",
        destination: "-",
        policy: "none",
        requests: 4,
        ..BY_WEB
    };
    let cart = scraped("cart-1", &[], &[plain]);
    assert_eq!(
        lines(&[cart], true, false),
        "\
CLIENT    SERVER      MTLS   IDENTITIES   RPS   SUCCESS   P99      P50      TOTAL   TOLD BY
unknown   shop/cart   no     - -> -       2.0   100.0 %   9.9 ms   5.0 ms   4       server
"
    );
}

#[test]
fn callers_that_are_not_looked_at_are_told_by_the_server_with_their_account() {
    let by_cart = Line {
        reporter: "destination",
        policy: "mutual_tls",
        ..BY_WEB
    };
    let cart = scraped("cart-1", &[], &[by_cart]);
    assert!(lines(&[cart], false, false).contains("\nshop/web   shop/cart   yes "));
}

#[test]
fn replicas_of_a_workload_are_one_client() {
    let plain = Line {
        source: "-",
        destination: "-",
        requests: 10,
        ..BY_WEB
    };
    let one = scraped(
        "web-1",
        &[BY_WEB],
        &[Line {
            requests: 100,
            ..BY_WEB
        }],
    );
    let other = scraped("web-2", &[], &[plain]);
    let text = lines(&[one, other], true, false);
    assert!(text.contains("partly"), "{text}");
    assert!(text.contains(" 10.0 "), "{text}");
    assert!(text.contains(" 110 "), "{text}");
}

#[test]
fn a_proxy_that_began_anew_is_counted_from_its_start() {
    let web = scraped(
        "web-1",
        &[Line {
            requests: 500,
            ..BY_WEB
        }],
        &[BY_WEB],
    );
    assert!(lines(&[web], false, false).contains(" 45.0 "));
}

#[test]
fn without_calls_in_the_window_there_is_no_success_to_tell() {
    let web = scraped("web-1", &[BY_WEB], &[BY_WEB]);
    let text = lines(std::slice::from_ref(&web), false, false);
    assert!(text.ends_with("0.0   -         -\n"), "{text}");
    let text = lines(&[web], false, true);
    assert!(
        text.contains("REQUESTS") && text.contains("90         100.0 %"),
        "{text}"
    );
}

#[test]
fn success_is_never_rounded_up_to_all() {
    assert_eq!(percent(999_999.0 / 1_000_000.0), "99.9 %");
    assert_eq!(percent(1.0), "100.0 %");
    for (code, want) in [("200", false), ("404", false), ("503", true), ("0", true)] {
        assert_eq!(failed(Some(code)), want, "{code}");
    }
    assert!(failed(None));
}

#[test]
fn services_are_named_by_namespace_and_name() {
    let of = |host: &str, namespace: Option<&str>| {
        service(Some(host.to_owned()), namespace.map(str::to_owned)).expect("a name")
    };
    assert_eq!(of("cart.shop.svc.cluster.local", None), "shop/cart");
    assert_eq!(of("cart", Some("shop")), "shop/cart");
    assert_eq!(of("api.example.com", None), "api.example.com");
    assert_eq!(account(WEB), "shop/web");
    assert_eq!(account("spiffe://other/x"), "spiffe://other/x");
}

#[test]
fn json_holds_what_the_table_shows() {
    let web = scraped("web-1", &[], &[BY_WEB]);
    let json = to_json(&edges(&[web]), Duration::from_secs(2));
    assert_eq!(json["kind"], "EdgeList");
    assert_eq!(json["items"][0]["clientIdentities"], json!([WEB]));
    assert_eq!(json["items"][0]["requestsPerSecond"], 45.0);
    assert_eq!(json["items"][0]["mtls"], "yes");
}

#[test]
fn the_window_may_be_nothing() {
    assert_eq!(parse_window("0"), Ok(Duration::ZERO));
    assert_eq!(parse_window("2s"), Ok(Duration::from_secs(2)));
    assert!(parse_window("soon").is_err());
}

#[test]
fn a_pod_belongs_to_what_the_injector_wrote_down() {
    let pod = |env: Value| -> Pod {
        let sidecar = json!({ "name": "malha-proxy", "env": env });
        let pod = json!({
            "metadata": { "namespace": "shop", "name": "web-5d4f8-x" },
            "spec": { "initContainers": [sidecar], "containers": [] },
        });
        serde_json::from_value(pod).expect("a pod")
    };
    let owned = pod(json!([{ "name": "MALHA_OWNER", "value": "apps/v1/Deployment/web" }]));
    assert_eq!(asked(&owned).workload, "shop/web");
    assert_eq!(asked(&pod(json!([]))).workload, "shop/web-5d4f8-x");
}
