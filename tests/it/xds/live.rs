//! Two pods with real Envoys, told by a catalogue, and a host outside the mesh: network namespaces on one bridge, with the
//! redirection that `malha-init` installs, in short. Root, Envoy, `ip`, `nft` and `setpriv` are needed.

mod net;
mod server;

use std::{path::PathBuf, time::Duration};

use malha::{
    identity::SpiffeId,
    mesh::{Event, ObjectName},
    xds::{Catalogue, Kind},
};

use net::{Net, Pod};

const WORLD: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, 'fd00:96::1']
  selector: {app: web}
  ports:
    - {name: http, port: 80, targetPort: 8080}
    - {name: grpc, port: 81, targetPort: 8080}
    - {name: any, port: 82, targetPort: 8082}
    - {name: tcp-greeting, port: 83, targetPort: 8083}
    - {name: http-nobody, port: 84, targetPort: 8084}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}, {name: grpc, port: 8080}, {name: any, port: 8082}, {name: tcp-greeting, port: 8083}, {name: http-nobody, port: 8084}]
endpoints: [{addresses: [10.244.77.2], targetRef: {kind: Pod, name: web-a, namespace: shop}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-6, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: http, port: 8080}, {name: grpc, port: 8080}, {name: any, port: 8082}, {name: tcp-greeting, port: 8083}, {name: http-nobody, port: 8084}]
endpoints: [{addresses: ['fd00:244:77::2'], targetRef: {kind: Pod, name: web-a, namespace: shop}}]
---
apiVersion: v1
kind: Pod
metadata: {name: web-a, namespace: shop, labels: {app: web, version: v1}}
spec: {serviceAccountName: web, containers: [{name: app}, {name: malha-proxy}]}
status: {podIP: 10.244.77.2, podIPs: [{ip: 10.244.77.2}, {ip: 'fd00:244:77::2'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client-a, namespace: jobs, labels: {app: client}}
spec: {serviceAccountName: client, containers: [{name: app}, {name: malha-proxy}]}
status: {podIP: 10.244.77.1, podIPs: [{ip: 10.244.77.1}, {ip: 'fd00:244:77::1'}]}
";

const POD: &str = "10.244.77.2";
const SERVICE: &str = "10.96.0.1";
const POD_V6: &str = "[fd00:244:77::2]";
const SERVICE_V6: &str = "[fd00:96::1]";
const CLIENT_ID: &str = "URI=spiffe://cluster.local/ns/jobs/sa/client";
const SERVER_ID: &str = "URI=spiffe://cluster.local/ns/shop/sa/web";

/// Every step in one test: making the mesh is what takes the time.
#[test]
fn real_envoys_talk_as_each_mode_says() {
    let Some(envoy) = crate::envoy::find_or_skip() else {
        return;
    };
    let Some(net) = Net::new_or_skip(["client-a.jobs", "web-a.shop"]) else {
        return;
    };
    let mesh = Mesh::start(net, envoy);
    mesh.everything_works("nobody said anything");
    assert_eq!(mesh.outside(8080), Ok(None), "PERMISSIVE takes plaintext");
    assert!(
        mesh.outside_greeting(),
        "PERMISSIVE waits for a server that speaks first"
    );

    mesh.metrics_name_both_sides();
    mesh.what_no_application_acted_on_is_tried_again_and_nobody_is_told_how();

    mesh.set_mode("STRICT");
    mesh.until("STRICT refuses plaintext", || mesh.outside(8080).is_err());
    mesh.everything_works("STRICT");
    for port in [8080, 8082, 9999] {
        let before = mesh.server_counter("no_filter_chain_match");
        assert!(
            mesh.outside(port).is_err(),
            "STRICT took plaintext on {port}"
        );
        mesh.until("the refusal is counted", || {
            mesh.server_counter("no_filter_chain_match") > before
        });
    }
    let before = mesh.server_counter("ssl.fail_verify_no_cert");
    mesh.outside_tls(8080);
    mesh.until("TLS without a certificate is refused and counted", || {
        mesh.server_counter("ssl.fail_verify_no_cert") > before
    });

    mesh.set_mode("DISABLE");
    mesh.until("DISABLE takes plaintext", || mesh.outside(8080) == Ok(None));
    mesh.until("callers speak plaintext too", || {
        mesh.call("client-a.jobs", SERVICE, 80, "web.shop") == Ok(None)
            && mesh.call("client-a.jobs", POD, 8080, POD) == Ok(None)
    });

    mesh.set_mode("STRICT");
    mesh.until("STRICT again", || mesh.outside(8080).is_err());
    mesh.another_account_behind_the_service();
    mesh.until("a server with another identity is not taken", || {
        let answer = mesh.call("client-a.jobs", SERVICE, 80, "web.shop");
        answer.is_err_and(|answer| answer.starts_with("503"))
    });
    assert!(mesh.client_counter("ssl.fail_verify_san") > 0);
}

/// The running mesh.
struct Mesh {
    net: Net,
    told: server::Told,
    pods: [Pod; 2],
}

impl Mesh {
    fn start(net: Net, envoy: PathBuf) -> Self {
        let mut catalogue = Catalogue::new(super::settings());
        catalogue.apply(super::world(WORLD));
        let authority = server::Authority::new();
        let id = |text: &str| text.parse::<SpiffeId>().expect("an identity");
        let identities = [
            (
                "client-a.jobs",
                id("spiffe://cluster.local/ns/jobs/sa/client"),
            ),
            ("web-a.shop", id("spiffe://cluster.local/ns/shop/sa/web")),
        ];
        let told = server::Told::serve(catalogue, &authority, identities, net.directory());
        for port in [8080, 8082, 9999] {
            net.serve_http("web-a.shop", port);
        }
        net.serve_greeting("web-a.shop", 8083);
        let pods = ["client-a.jobs", "web-a.shop"].map(|name| net.envoy(&envoy, name));
        let mesh = Self { net, told, pods };
        for pod in &mesh.pods {
            mesh.until("Envoy is ready", || pod.admin("/ready").starts_with("LIVE"));
        }
        mesh
    }

    fn everything_works(&self, when: &str) {
        let known = Ok(Some(CLIENT_ID.to_owned()));
        let call = |ip, port, host| self.call("client-a.jobs", ip, port, host);
        self.until(&format!("{when}: by Service name"), || {
            call(SERVICE, 80, "web.shop") == known
        });
        assert_eq!(
            call(SERVICE, 80, SERVICE),
            known,
            "{when}: by virtual address"
        );
        assert_eq!(call(SERVICE, 82, "web"), known, "{when}: undeclared");
        assert_eq!(call(POD, 8080, POD), known, "{when}: by the pod's address");
        let http2 = self.call_http2("client-a.jobs", SERVICE, 81, "web.shop");
        assert_eq!(http2, known, "{when}: HTTP/2");
        let http2 = self.call_http2("client-a.jobs", SERVICE, 82, "web.shop");
        assert_eq!(http2, known, "{when}: HTTP/2, undeclared");
        assert_eq!(call(SERVICE_V6, 80, "web.shop"), known, "{when}: by IPv6");
        assert_eq!(
            call(SERVICE_V6, 80, SERVICE_V6),
            known,
            "{when}: by IPv6 in the host"
        );
        assert_eq!(
            call(SERVICE_V6, 82, "web"),
            known,
            "{when}: undeclared, IPv6"
        );
        assert_eq!(
            call(POD_V6, 8080, POD_V6),
            known,
            "{when}: by the pod's IPv6"
        );
        for (ip, port) in [(SERVICE, 83), (POD, 8083), (SERVICE_V6, 83), (POD_V6, 8083)] {
            let said = self.net.greeting("client-a.jobs", ip, port);
            assert_eq!(said, Ok("hello".to_owned()), "{when}: {ip} speaks first");
        }
        for service in [SERVICE, SERVICE_V6].into_iter().cycle().take(10) {
            let itself = self.call("web-a.shop", service, 80, "web");
            assert_eq!(
                itself,
                Ok(Some(SERVER_ID.to_owned())),
                "{when}: it calls itself"
            );
        }
        assert_eq!(
            call(POD, 9999, POD).map(drop),
            Ok(()),
            "{when}: a port without a Service"
        );
    }

    /// A port that nobody listens on: the server's proxy says so, and only to the proxy of a caller that can use it.
    fn what_no_application_acted_on_is_tried_again_and_nobody_is_told_how(&self) {
        let post = ["-i", "-X", "POST", "-d", "x"];
        let tries = || {
            let clusters = self.pods[0].admin("/stats?filter=outbound.84.*upstream_rq_retry$");
            let count = clusters.lines().find_map(|line| line.rsplit_once(": "));
            count.map_or(0, |(_, count)| count.trim().parse().expect("a number"))
        };
        let before: u64 = tries();
        for (from, ip, port) in [
            ("client-a.jobs", SERVICE, 84),
            ("client-a.jobs", POD, 8084),
            ("outside", POD, 8084),
        ] {
            let answer = self.net.get(from, ip, port, "web.shop", &post);
            let answer = answer.expect_err("nobody listens");
            assert!(answer.starts_with("503"), "{from} {ip}: {answer}");
            assert!(!answer.contains("x-malha"), "{from} {ip}: {answer}");
        }
        assert_eq!(tries() - before, 2, "tried again by the caller's proxy");
    }

    /// What the agent renames and `malha edges` reads.
    fn metrics_name_both_sides(&self) {
        let wanted = [
            r#"source_principal="spiffe://cluster.local/ns/jobs/sa/client""#,
            r#"destination_principal="spiffe://cluster.local/ns/shop/sa/web""#,
            r#"destination_service="web.shop.svc.cluster.local""#,
            r#"destination_service_namespace="shop""#,
            r#"destination_version="v1""#,
            r#"response_code="200""#,
        ];
        for (pod, reporter) in self.pods.iter().zip(["source", "destination"]) {
            let metrics = pod.admin("/stats/prometheus");
            let reporter = format!(r#"reporter="{reporter}""#);
            for name in ["requests_total{", "request_duration_milliseconds_bucket{"] {
                let mut lines = metrics.lines();
                let found = lines.any(|line| {
                    line.starts_with(&format!("envoy_malha_{name}"))
                        && line.contains(&reporter)
                        && wanted.iter().all(|tag| line.contains(tag))
                });
                let lines = metrics
                    .lines()
                    .filter(|line| line.contains("malha_requests"));
                assert!(found, "{name} {reporter}: {:?}", lines.collect::<Vec<_>>());
            }
        }
    }

    /// The client's identity as the server is told it, or how the call failed.
    fn call(&self, from: &str, ip: &str, port: u16, host: &str) -> Result<Option<String>, String> {
        let seen = self.net.get(from, ip, port, host, &[])?;
        Ok(seen)
    }

    fn call_http2(
        &self,
        from: &str,
        ip: &str,
        port: u16,
        host: &str,
    ) -> Result<Option<String>, String> {
        self.net
            .get(from, ip, port, host, &["--http2-prior-knowledge"])
    }

    /// A plaintext call from outside the mesh, which claims to be somebody.
    fn outside(&self, port: u16) -> Result<Option<String>, String> {
        let claim = [
            "-H",
            "x-forwarded-client-cert: URI=spiffe://cluster.local/ns/a/sa/b",
        ];
        self.net.get("outside", POD, port, POD, &claim)
    }

    fn outside_greeting(&self) -> bool {
        self.net.greeting("outside", POD, 8083) == Ok("hello".to_owned())
    }

    fn outside_tls(&self, port: u16) {
        self.net.tls_without_certificate("outside", POD, port);
    }

    fn set_mode(&self, mode: &str) {
        let text = format!(
            "{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{name: default, namespace: shop}}, spec: {{mtls: {{mode: {mode}}}}}}}"
        );
        self.told.apply(super::world(&text));
    }

    /// The world says that another account stands behind the Service than the server proves.
    fn another_account_behind_the_service(&self) {
        let mut events = super::world(WORLD).into_iter();
        let pod = events.find_map(|event| match event {
            Event::Workload(name, Some(mut pod)) if *name.name == *"web-a" => {
                pod.account = "other".into();
                Some(Event::Workload(name, Some(pod)))
            }
            _ => None,
        });
        self.told.apply(pod);
    }

    fn client_counter(&self, name: &str) -> u64 {
        self.pods[0].counter(name)
    }

    fn server_counter(&self, name: &str) -> u64 {
        self.pods[1].counter(name)
    }

    fn until(&self, what: &str, mut so: impl FnMut() -> bool) {
        for _ in 0..300 {
            if so() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        for pod in &self.pods {
            let _ = std::io::Write::write_all(&mut std::io::stderr(), pod.story().as_bytes());
        }
        let refused = self.told.refusals();
        panic!("not within 30 s: {what}; refused by Envoy: {refused:?}");
    }
}

/// Node ids are `<pod>.<namespace>`.
fn proxy(node: &str) -> ObjectName {
    let (pod, namespace) = node.split_once('.').expect("pod.namespace");
    ObjectName::new(namespace, pod)
}

/// In the order in which they are pushed.
const KINDS: [Kind; 4] = [Kind::Cluster, Kind::Endpoints, Kind::Listener, Kind::Route];
