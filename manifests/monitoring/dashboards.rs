//! What the dashboards show: [`DASHBOARDS`] is the one source, [`to_text`] makes of each what Grafana imports.
//!
//! A dashboard is rows of panels, three in a line; a panel is some queries in one unit. `make dashboards` writes them.

use serde_json::{Value, json};

/// One file.
pub(crate) struct Dashboard {
    /// Name of the file, and the dashboard's uid after `malha-`.
    pub(crate) name: &'static str,
    title: &'static str,
    rows: &'static [Row],
}

struct Row {
    title: &'static str,
    panels: &'static [Panel],
}

struct Panel {
    title: &'static str,
    shape: Shape,
    /// A unit of Grafana's.
    unit: &'static str,
    /// What is told with each line, and the query.
    queries: &'static [(&'static str, &'static str)],
}

enum Shape {
    /// Lines over time.
    Lines,
    /// The last value, large.
    Number,
}

use Shape::{Lines, Number};

/// All of them.
pub(crate) const DASHBOARDS: [Dashboard; 3] = [
    Dashboard {
        name: "injector",
        title: "Malha: injector",
        rows: &[
            Row {
                title: "Admissions",
                panels: &[
                    Panel {
                        title: "By what became of them",
                        shape: Lines,
                        unit: "reqps",
                        queries: &[(
                            "{{result}} {{reason}}",
                            r#"sum by (result, reason) (rate(malha_injector_admission_requests_total{dry_run="false"}[$__rate_interval])) > 0"#,
                        )],
                    },
                    Panel {
                        title: "Time to answer",
                        shape: Lines,
                        unit: "s",
                        queries: &[
                            (
                                "half of them",
                                "histogram_quantile(0.5, sum by (le) (rate(malha_injector_admission_duration_seconds_bucket[$__rate_interval])))",
                            ),
                            (
                                "99 of 100",
                                "histogram_quantile(0.99, sum by (le) (rate(malha_injector_admission_duration_seconds_bucket[$__rate_interval])))",
                            ),
                        ],
                    },
                    Panel {
                        title: "In flight, and how large",
                        shape: Lines,
                        unit: "short",
                        queries: &[
                            ("in flight", "sum(malha_injector_inflight)"),
                            (
                                "KiB, 99 of 100",
                                "histogram_quantile(0.99, sum by (le) (rate(malha_injector_request_bytes_bucket[$__rate_interval]))) / 1024",
                            ),
                        ],
                    },
                ],
            },
            Row {
                title: "The API server's side",
                panels: &[
                    Panel {
                        title: "Calls that failed: pods refused",
                        shape: Lines,
                        unit: "reqps",
                        queries: &[(
                            "{{name}}",
                            r#"sum by (name) (rate(apiserver_admission_webhook_rejection_count{name=~".+[.]malha[.]io",error_type="calling_webhook_error"}[$__rate_interval]))"#,
                        )],
                    },
                    Panel {
                        title: "Calls that failed: let through",
                        shape: Lines,
                        unit: "reqps",
                        queries: &[(
                            "{{name}}",
                            r#"sum by (name) (rate(apiserver_admission_webhook_fail_open_count{name=~".+[.]malha[.]io"}[$__rate_interval]))"#,
                        )],
                    },
                    Panel {
                        title: "The caBundle: right (1), repaired",
                        shape: Lines,
                        unit: "short",
                        queries: &[
                            (
                                "{{webhook}} right",
                                "min by (webhook) (malha_webhook_ca_bundle_matches)",
                            ),
                            (
                                "repaired: {{cause}}",
                                "sum by (cause) (increase(malha_webhook_repairs_total[$__rate_interval])) > 0",
                            ),
                        ],
                    },
                ],
            },
            Row {
                title: "Pods of the mesh's namespaces",
                panels: &[
                    Panel {
                        title: "With a sidecar",
                        shape: Number,
                        unit: "short",
                        queries: &[("", r#"sum(malha_injector_pods{state="injected"})"#)],
                    },
                    Panel {
                        title: "Without one that they should have",
                        shape: Lines,
                        unit: "short",
                        queries: &[(
                            "{{namespace}}",
                            r#"sum by (namespace) (malha_injector_pods{state="missing"}) > 0"#,
                        )],
                    },
                    Panel {
                        title: "With one of another version or configuration",
                        shape: Lines,
                        unit: "short",
                        queries: &[(
                            "{{namespace}}",
                            r#"sum by (namespace) (malha_injector_pods{state="stale"}) > 0"#,
                        )],
                    },
                ],
            },
            Row {
                title: "Process",
                panels: &[
                    Panel {
                        title: "Memory, of what is granted",
                        shape: Lines,
                        unit: "percentunit",
                        queries: &[(
                            "{{pod}}",
                            r#"process_resident_memory_bytes{job="malha"} / malha_memory_limit_bytes"#,
                        )],
                    },
                    Panel {
                        title: "Processor",
                        shape: Lines,
                        unit: "short",
                        queries: &[(
                            "{{pod}}",
                            r#"rate(process_cpu_seconds_total{job="malha"}[$__rate_interval])"#,
                        )],
                    },
                    Panel {
                        title: "Connections and handshakes that failed",
                        shape: Lines,
                        unit: "short",
                        queries: &[
                            (
                                "{{listener}} open",
                                "sum by (listener) (malha_listener_connections)",
                            ),
                            (
                                "{{listener}} failed a second",
                                "sum by (listener) (rate(malha_listener_handshakes_failed_total[$__rate_interval]))",
                            ),
                        ],
                    },
                ],
            },
        ],
    },
    Dashboard {
        name: "authority",
        title: "Malha: authority",
        rows: &[
            Row {
                title: "Certificates of workloads",
                panels: &[
                    Panel {
                        title: "Requests by what became of them",
                        shape: Lines,
                        unit: "reqps",
                        queries: &[(
                            "{{result}} {{reason}}",
                            "sum by (result, reason) (rate(malha_ca_csr_total[$__rate_interval]))",
                        )],
                    },
                    Panel {
                        title: "From the credential to the certificate",
                        shape: Lines,
                        unit: "s",
                        queries: &[
                            (
                                "half of them",
                                "histogram_quantile(0.5, sum by (le) (rate(malha_ca_issue_duration_seconds_bucket[$__rate_interval])))",
                            ),
                            (
                                "99 of 100",
                                "histogram_quantile(0.99, sum by (le) (rate(malha_ca_issue_duration_seconds_bucket[$__rate_interval])))",
                            ),
                        ],
                    },
                    Panel {
                        title: "Tokens checked, requests under way",
                        shape: Lines,
                        unit: "short",
                        queries: &[
                            (
                                "{{method}} {{result}} a second",
                                "sum by (method, result) (rate(malha_ca_token_validation_total[$__rate_interval]))",
                            ),
                            ("under way", "sum(malha_ca_queue_entries)"),
                        ],
                    },
                ],
            },
            Row {
                title: "The authority itself",
                panels: &[
                    Panel {
                        title: "Life left",
                        shape: Lines,
                        unit: "s",
                        queries: &[(
                            "{{kind}} {{state}}",
                            "min by (kind, state) (malha_ca_certificate_expiration_timestamp_seconds) - time()",
                        )],
                    },
                    Panel {
                        title: "Roots by phase",
                        shape: Lines,
                        unit: "short",
                        queries: &[("{{phase}}", "max by (phase) (malha_ca_rotation_phase)")],
                    },
                    Panel {
                        title: "Failed steps",
                        shape: Lines,
                        unit: "short",
                        queries: &[(
                            "{{step}}",
                            "sum by (step) (increase(malha_ca_rotation_errors_total[$__rate_interval]))",
                        )],
                    },
                ],
            },
            Row {
                title: "Trust",
                panels: &[
                    Panel {
                        title: "Changes of the trust set",
                        shape: Number,
                        unit: "short",
                        queries: &[("", "max(malha_ca_generation)")],
                    },
                    Panel {
                        title: "Namespaces by their trust bundle",
                        shape: Lines,
                        unit: "short",
                        queries: &[(
                            "{{state}}",
                            "max by (state) (malha_trust_bundle_namespaces)",
                        )],
                    },
                    Panel {
                        title: "Signs with the journal's authority, leads",
                        shape: Lines,
                        unit: "short",
                        queries: &[
                            (
                                "{{pod}} signs",
                                "min by (pod) (malha_ca_loaded_key_id_matches)",
                            ),
                            ("{{pod}} leads", "max by (pod) (malha_leader)"),
                        ],
                    },
                ],
            },
        ],
    },
    Dashboard {
        name: "data-plane",
        title: "Malha: data plane",
        rows: &[
            Row {
                title: "Requests",
                panels: &[
                    Panel {
                        title: "Share that succeeds, by service",
                        shape: Lines,
                        unit: "percentunit",
                        queries: &[(
                            "{{destination_service_namespace}}/{{destination_service}}",
                            r#"sum by (destination_service, destination_service_namespace) (rate(istio_requests_total{reporter="destination",response_code!~"5.."}[$__rate_interval])) / sum by (destination_service, destination_service_namespace) (rate(istio_requests_total{reporter="destination"}[$__rate_interval]))"#,
                        )],
                    },
                    Panel {
                        title: "Who calls whom",
                        shape: Lines,
                        unit: "reqps",
                        queries: &[(
                            "{{source_principal}} to {{destination_principal}}",
                            r#"sum by (source_principal, destination_principal) (rate(istio_requests_total{reporter="destination"}[$__rate_interval]))"#,
                        )],
                    },
                    Panel {
                        title: "Errors by code and flag",
                        shape: Lines,
                        unit: "reqps",
                        queries: &[(
                            "{{destination_service}} {{response_code}} {{response_flags}}",
                            r#"sum by (destination_service, response_code, response_flags) (rate(istio_requests_total{reporter="source",response_code=~"[45].."}[$__rate_interval]))"#,
                        )],
                    },
                    Panel {
                        title: "Time to answer, 99 of 100",
                        shape: Lines,
                        unit: "ms",
                        queries: &[(
                            "{{destination_service_namespace}}/{{destination_service}}",
                            r#"histogram_quantile(0.99, sum by (le, destination_service, destination_service_namespace) (rate(istio_request_duration_milliseconds_bucket{reporter="destination"}[$__rate_interval])))"#,
                        )],
                    },
                ],
            },
            Row {
                title: "Mutual TLS",
                panels: &[
                    Panel {
                        title: "Share of requests",
                        shape: Lines,
                        unit: "percentunit",
                        queries: &[(
                            "{{destination_service_namespace}}",
                            r#"sum by (destination_service_namespace) (rate(istio_requests_total{reporter="destination",connection_security_policy="mutual_tls"}[$__rate_interval])) / sum by (destination_service_namespace) (rate(istio_requests_total{reporter="destination"}[$__rate_interval]))"#,
                        )],
                    },
                    Panel {
                        title: "Handshakes",
                        shape: Lines,
                        unit: "reqps",
                        queries: &[
                            (
                                "{{namespace}} good",
                                "sum by (namespace) (rate(envoy_listener_ssl_handshake[$__rate_interval]))",
                            ),
                            (
                                "{{namespace}} broken off",
                                "sum by (namespace) (rate(envoy_listener_ssl_connection_error[$__rate_interval]))",
                            ),
                        ],
                    },
                    Panel {
                        title: "Refused",
                        shape: Lines,
                        unit: "reqps",
                        queries: &[
                            (
                                "{{namespace}} plaintext",
                                "sum by (namespace) (rate(envoy_listener_no_filter_chain_match[$__rate_interval]))",
                            ),
                            (
                                "{{namespace}} foreign certificate",
                                "sum by (namespace) (rate(envoy_listener_ssl_fail_verify_error[$__rate_interval]))",
                            ),
                            (
                                "{{namespace}} another trust domain",
                                "sum by (namespace) (rate(envoy_listener_ssl_fail_verify_san[$__rate_interval]))",
                            ),
                        ],
                    },
                    Panel {
                        title: "Life left of the first certificate to end",
                        shape: Lines,
                        unit: "s",
                        queries: &[(
                            "{{namespace}}",
                            "min by (namespace) (malha_agent_certificate_expiration_timestamp_seconds) - time()",
                        )],
                    },
                ],
            },
            Row {
                title: "Configuration",
                panels: &[
                    Panel {
                        title: "Proxies connected, and owing an answer",
                        shape: Lines,
                        unit: "short",
                        queries: &[
                            ("streams", "sum(malha_xds_clients)"),
                            ("late", "sum(malha_xds_late_clients)"),
                            ("not connected", "sum(malha_agent_xds_connected == bool 0)"),
                        ],
                    },
                    Panel {
                        title: "From a change to its effect, 99 of 100",
                        shape: Lines,
                        unit: "s",
                        queries: &[(
                            "{{type}}",
                            "histogram_quantile(0.99, sum by (le, type) (rate(malha_xds_convergence_seconds_bucket[$__rate_interval])))",
                        )],
                    },
                    Panel {
                        title: "Sent, and refused",
                        shape: Lines,
                        unit: "Bps",
                        queries: &[
                            (
                                "{{type}}",
                                "sum by (type) (rate(malha_xds_sent_bytes_total[$__rate_interval]))",
                            ),
                            (
                                "{{type}} refused",
                                "sum by (type) (increase(malha_xds_nacks_total[$__rate_interval])) > 0",
                            ),
                        ],
                    },
                ],
            },
            Row {
                title: "Envoy",
                panels: &[
                    Panel {
                        title: "Memory, largest",
                        shape: Lines,
                        unit: "bytes",
                        queries: &[(
                            "{{namespace}}",
                            "max by (namespace) (envoy_server_memory_allocated)",
                        )],
                    },
                    Panel {
                        title: "Connections to upstreams",
                        shape: Lines,
                        unit: "short",
                        queries: &[
                            (
                                "{{namespace}} open",
                                "sum by (namespace) (envoy_cluster_upstream_cx_active)",
                            ),
                            (
                                "{{namespace}} failed a second",
                                "sum by (namespace) (rate(envoy_cluster_upstream_cx_connect_fail[$__rate_interval]))",
                            ),
                        ],
                    },
                    Panel {
                        title: "Ended although nobody asked",
                        shape: Lines,
                        unit: "short",
                        queries: &[(
                            "{{namespace}}",
                            "sum by (namespace) (increase(malha_agent_envoy_restarts_total[$__rate_interval]))",
                        )],
                    },
                ],
            },
        ],
    },
];

/// As it stands in the file.
pub(crate) fn to_text(dashboard: &Dashboard) -> String {
    format!("{:#}\n", to_json(dashboard))
}

/// As Grafana imports it; the data source is the reader's choice.
fn to_json(dashboard: &Dashboard) -> Value {
    let mut panels = Vec::new();
    let mut y = 0;
    for row in dashboard.rows {
        panels.push(json!({
            "type": "row", "title": row.title, "collapsed": false, "panels": [],
            "gridPos": { "x": 0, "y": y, "w": WHOLE, "h": 1 },
        }));
        y += 1;
        let width = WHOLE / row.panels.len();
        for (place, panel) in row.panels.iter().enumerate() {
            let at = json!({ "x": place * width, "y": y, "w": width, "h": HIGH });
            panels.push(to_panel(panel, at));
        }
        y += HIGH;
    }
    for (place, panel) in panels.iter_mut().enumerate() {
        panel["id"] = (place + 1).into();
    }
    json!({
        "uid": format!("malha-{}", dashboard.name),
        "title": dashboard.title,
        "tags": ["malha"],
        "schemaVersion": 39,
        "editable": true,
        "refresh": "30s",
        "time": { "from": "now-1h", "to": "now" },
        "templating": { "list": [{
            "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus",
        }] },
        "panels": panels,
    })
}

/// Grafana's grid has so many columns.
const WHOLE: usize = 24;
/// Lines of the grid that a panel takes.
const HIGH: usize = 8;

fn to_panel(panel: &Panel, at: Value) -> Value {
    let kind = match panel.shape {
        Lines => "timeseries",
        Number => "stat",
    };
    let targets: Vec<_> = panel
        .queries
        .iter()
        .zip('A'..)
        .map(|((legend, query), letter)| {
            json!({ "refId": letter, "expr": query, "legendFormat": legend, "datasource": source() })
        })
        .collect();
    json!({
        "type": kind, "title": panel.title, "gridPos": at, "datasource": source(), "targets": targets,
        "fieldConfig": { "defaults": { "unit": panel.unit, "min": 0 }, "overrides": [] },
    })
}

fn source() -> Value {
    json!({ "type": "prometheus", "uid": "${datasource}" })
}
