//! A real Envoy with a plain bootstrap: static listeners and clusters, secrets over SDS by Istio's names.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::until;

/// Which of SDS's two protocols.
#[derive(Clone, Copy)]
pub(super) enum Sds {
    StateOfTheWorld,
    Delta,
}

pub(super) struct Envoy {
    child: Child,
    log: PathBuf,
    admin: PathBuf,
}

impl Envoy {
    /// Answers `200` over mutual TLS, with the client's identity in `x-peer`.
    pub(super) fn server(program: &Path, place: &Path, sds: &Path, protocol: Sds) -> Self {
        let tls = json!({
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": true,
            "common_tls_context": context(protocol, None),
        });
        let response = json!({
            "match": {"prefix": "/"},
            "direct_response": {"status": 200, "body": {"inline_string": "ok"}},
            "response_headers_to_add": [{"header": {"key": "x-peer", "value": "%DOWNSTREAM_PEER_URI_SAN%"}}],
        });
        let chain = json!({
            "filters": [connections("server", &[response])],
            "transport_socket": {"name": "tls", "typed_config": tls},
        });
        Self::start(program, place, sds, &[chain], &[])
    }

    /// Takes plain requests and passes them on over mutual TLS: those for `/new` on a connection of their own, the rest
    /// on kept ones. It expects to meet `server_id`.
    pub(super) fn client(
        program: &Path,
        place: &Path,
        sds: &Path,
        protocol: Sds,
        server: u16,
        server_id: &str,
    ) -> Self {
        let route = |prefix: &str, cluster: &str| json!({"match": {"prefix": prefix}, "route": {"cluster": cluster}});
        let routes = [route("/new", "new"), route("/", "kept")];
        let chain = json!({"filters": [connections("client", &routes)]});
        let cluster = |name: &str, requests: Value| {
            let tls = json!({
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": context(protocol, Some(server_id)),
            });
            let mut options = json!({"explicit_http_config": {"http_protocol_options": {}}});
            options["@type"] =
                json!("type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions");
            options["common_http_protocol_options"] = requests;
            json!({
                "name": name,
                "type": "STATIC",
                "load_assignment": endpoints(name, json!({"socket_address": {"address": "127.0.0.1", "port_value": server}})),
                "transport_socket": {"name": "tls", "typed_config": tls},
                "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
            })
        };
        let clusters = [
            cluster("new", json!({"max_requests_per_connection": 1})),
            cluster("kept", json!({})),
        ];
        Self::start(program, place, sds, &[chain], &clusters)
    }

    fn start(program: &Path, place: &Path, sds: &Path, chains: &[Value], more: &[Value]) -> Self {
        fs::create_dir_all(place).expect("a directory");
        let mut options = json!({"explicit_http_config": {"http2_protocol_options": {}}});
        options["@type"] =
            json!("type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions");
        let mut clusters = vec![json!({
            "name": "sds",
            "type": "STATIC",
            "load_assignment": endpoints("sds", json!({"pipe": {"path": sds}})),
            "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        })];
        clusters.extend_from_slice(more);
        let admin = place.join("admin.sock");
        let bootstrap = json!({
            "node": {"id": "web-0.shop", "cluster": "web"},
            "admin": {"address": {"pipe": {"path": admin}}},
            "static_resources": {
                "listeners": [{
                    "name": "inbound",
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
                    "filter_chains": chains,
                }],
                "clusters": clusters,
            },
        });
        let file = place.join("bootstrap.json");
        fs::write(&file, bootstrap.to_string()).expect("writable");
        let log = place.join("envoy.log");
        let out = File::create(&log).expect("writable");
        let child = Command::new(program)
            .args([
                "--disable-hot-restart",
                "--concurrency",
                "1",
                "--log-level",
                "warning",
                "-c",
            ])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("a handle"))
            .stderr(out)
            .spawn()
            .expect("Envoy starts");
        Self { child, log, admin }
    }

    /// Where it listens, once it does: not before it has its secrets.
    pub(super) async fn port(&self) -> u16 {
        let mut port = None;
        until("Envoy's listener", async || {
            let listeners = self.ask("/listeners?format=json").await.unwrap_or_default();
            let listeners: Value = serde_json::from_str(&listeners).unwrap_or_default();
            let address = &listeners["listener_statuses"][0]["local_address"]["socket_address"];
            port = address["port_value"].as_u64().filter(|port| *port > 0);
            match port {
                Some(_) => self
                    .ask("/ready")
                    .await
                    .is_ok_and(|ready| ready.contains("LIVE")),
                None => false,
            }
        })
        .await;
        port.and_then(|port| u16::try_from(port).ok())
            .expect("a port")
    }

    /// One of its counters, summed over everything whose name ends so.
    pub(super) async fn counter(&self, end: &str) -> u64 {
        let stats = self.ask("/stats?format=json").await.expect("statistics");
        let stats: Value = serde_json::from_str(&stats).expect("JSON");
        let stats = stats["stats"].as_array().expect("a list").iter();
        let named = stats.filter(|stat| {
            stat["name"]
                .as_str()
                .is_some_and(|name| name.ends_with(end))
        });
        named.filter_map(|stat| stat["value"].as_u64()).sum()
    }

    /// Asks its admin interface.
    pub(super) async fn ask(&self, path: &str) -> io::Result<String> {
        let stream = UnixStream::connect(&self.admin).await?;
        exchange(stream, path).await
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let said = fs::read_to_string(&self.log).unwrap_or_default();
            eprintln!("-- Envoy said --\n{said}\n--");
        }
    }
}

/// A plain request to a port of this machine: the whole answer, head and body.
pub(super) async fn get(port: u16, path: &str) -> io::Result<String> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    exchange(stream, path).await
}

async fn exchange(
    mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin,
    path: &str,
) -> io::Result<String> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let text = String::from_utf8_lossy(&answer).into_owned();
    // the admin interface sends chunks; what is asked for here fits into one
    match text.split_once("\r\n\r\n") {
        Some((head, body)) if head.contains("chunked") => {
            let lines = body.split("\r\n").skip(1).step_by(2);
            Ok(lines.collect())
        }
        Some((_, body)) if path.starts_with("/listeners") || path.starts_with("/stats") => {
            Ok(body.to_owned())
        }
        _ => Ok(text),
    }
}

fn context(protocol: Sds, server_id: Option<&str>) -> Value {
    let api_type = match protocol {
        Sds::StateOfTheWorld => "GRPC",
        Sds::Delta => "DELTA_GRPC",
    };
    let secret = |name: &str| {
        json!({
            "name": name,
            "sds_config": {
                "resource_api_version": "V3",
                "initial_fetch_timeout": "0s",
                "api_config_source": {
                    "api_type": api_type,
                    "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "sds"}}],
                },
            },
        })
    };
    let names = server_id.map(|id| json!([{"san_type": "URI", "matcher": {"exact": id}}]));
    json!({
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificate_sds_secret_configs": [secret("default")],
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": names.unwrap_or(json!([]))},
            "validation_context_sds_secret_config": secret("ROOTCA"),
        },
    })
}

fn endpoints(cluster: &str, address: Value) -> Value {
    json!({
        "cluster_name": cluster,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
    })
}

fn connections(prefix: &str, routes: &[Value]) -> Value {
    json!({
        "name": "http",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": prefix,
            "http_filters": [{"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        },
    })
}
