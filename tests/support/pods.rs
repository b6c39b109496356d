//! Legal but odd pods, each made from one seed: the same seed gives the same pod on every machine.
//!
//! seed + [`Mode`] -> [`pod`]; the tables [`ANNOTATIONS`], [`REFUSED`], [`IGNORED`] are the annotations of the injector
//! with values that it must accept and values that it must refuse.
#![allow(
    dead_code,
    reason = "shared by several test programs, none of which uses all of it"
)]

use serde_json::{Map, Value, json};

use crate::dice::Dice;

/// How odd a pod may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The API server's own validation accepts it (whatever the injector thinks of its annotations).
    Valid,
    /// Anything that an API server may send to a webhook, which it does before it validates: null lists, fields that
    /// no version knows yet, probes on plain init containers, names and ports that collide with the sidecar's.
    Anything,
}

/// An annotation that the injector reads: values that it accepts, values that it refuses.
pub(crate) struct Annotation {
    pub(crate) key: &'static str,
    pub(crate) good: &'static [&'static str],
    pub(crate) bad: &'static [&'static str],
}

const BAD_BOOLS: &[&str] = &[
    "yes",
    "True",
    " true",
    "true\n",
    "1",
    "",
    "\"true\"",
    "{{ true }}",
    "false\u{0}",
];
const BAD_QUANTITIES: &[&str] = &[
    "abc", "-1", "1 Gi", "", "Gi", "1..0", "0x10", "1Gi\n", "½", "NaN", "{{1}}", "1KiB",
];
const LEVELS: &[&str] = &[
    "trace", "debug", "info", "warning", "error", "critical", "off",
];
const BAD_LEVELS: &[&str] = &[
    "loud",
    "",
    "info\ndebug",
    "info,debug:x",
    "\"info\"",
    "{{info}}",
];
const BAD_PORTS: &[&str] = &[
    "0", "65536", "-1", "http", "80;90", "80\n443", "*,80", "8 0", "٣", "1e3", "{{80}}",
];
const BAD_RANGES: &[&str] = &[
    "10.0.0.0/33",
    "10.0.0",
    "::/129",
    "300.0.0.0/8",
    "10.0.0.0/8;",
    "all",
    "10.0.0.0/-1",
    "10.0.0.0/8\n",
];

/// What is read, and how. Values whose legality could be argued about are left out.
pub(crate) const ANNOTATIONS: &[Annotation] = &[
    Annotation {
        key: "sidecar.istio.io/nativeSidecar",
        good: &["true", "false"],
        bad: BAD_BOOLS,
    },
    Annotation {
        key: "sidecar.istio.io/rewriteAppHTTPProbers",
        good: &["true", "false"],
        bad: BAD_BOOLS,
    },
    Annotation {
        key: "sidecar.istio.io/proxyCPU",
        good: &["100m", "1", "0.5", "0"],
        bad: BAD_QUANTITIES,
    },
    Annotation {
        key: "sidecar.istio.io/proxyCPULimit",
        good: &["2", "2500m", "4", "0"],
        bad: BAD_QUANTITIES,
    },
    Annotation {
        key: "sidecar.istio.io/proxyMemory",
        good: &["128Mi", "64M", "1e8", "0"],
        bad: BAD_QUANTITIES,
    },
    Annotation {
        key: "sidecar.istio.io/proxyMemoryLimit",
        good: &["1Gi", "1.5Gi", "2G", "0"],
        bad: BAD_QUANTITIES,
    },
    Annotation {
        key: "sidecar.istio.io/logLevel",
        good: LEVELS,
        bad: BAD_LEVELS,
    },
    Annotation {
        key: "sidecar.istio.io/agentLogLevel",
        good: LEVELS,
        bad: BAD_LEVELS,
    },
    Annotation {
        key: "sidecar.istio.io/componentLogLevel",
        good: &["upstream:debug", "upstream:debug,http:info"],
        bad: &[
            "upstream",
            "upstream:loud",
            ":debug",
            "upstream:debug\n",
            "{{a}}:debug",
        ],
    },
    Annotation {
        key: "sidecar.istio.io/interceptionMode",
        good: &["REDIRECT"],
        bad: &["redirect", "", "REDIRECT\n"],
    },
    Annotation {
        key: "readiness.status.sidecar.istio.io/initialDelaySeconds",
        good: &["0", "1", "3600"],
        bad: &[
            "-1",
            "3601",
            "1.5",
            "abc",
            "",
            "1e2",
            "99999999999999999999",
            "1\n",
        ],
    },
    Annotation {
        key: "readiness.status.sidecar.istio.io/periodSeconds",
        good: &["1", "30", "3600"],
        bad: &["0", "-1", "3601", "1.5", "abc", ""],
    },
    Annotation {
        key: "readiness.status.sidecar.istio.io/failureThreshold",
        good: &["1", "30", "3600"],
        bad: &["0", "-1", "3601", "abc", ""],
    },
    Annotation {
        key: "traffic.sidecar.istio.io/includeInboundPorts",
        good: &["*", "", "80", "80,8443"],
        bad: BAD_PORTS,
    },
    Annotation {
        key: "traffic.sidecar.istio.io/excludeInboundPorts",
        good: &["", "9090", "1,65535"],
        bad: BAD_PORTS,
    },
    Annotation {
        key: "traffic.sidecar.istio.io/includeOutboundPorts",
        good: &["*", "", "5432"],
        bad: BAD_PORTS,
    },
    Annotation {
        key: "traffic.sidecar.istio.io/excludeOutboundPorts",
        good: &["", "53", "53,3306"],
        bad: BAD_PORTS,
    },
    Annotation {
        key: "traffic.sidecar.istio.io/includeOutboundIPRanges",
        good: &["*", "", "10.0.0.0/8", "10.0.0.0/8,fd00::/8"],
        bad: BAD_RANGES,
    },
    Annotation {
        key: "traffic.sidecar.istio.io/excludeOutboundIPRanges",
        good: &["", "169.254.169.254/32", "fe80::/10"],
        bad: BAD_RANGES,
    },
    Annotation {
        key: "traffic.sidecar.istio.io/excludeInterfaces",
        good: &["", "eth1", "net1,net2"],
        bad: &["sixteen-chars-xx", "a/b", "net1\n"],
    },
    Annotation {
        key: "prometheus.istio.io/merge-metrics",
        good: &["true", "false"],
        bad: BAD_BOOLS,
    },
    Annotation {
        key: "malha.io/hold-application",
        good: &["true", "false"],
        bad: BAD_BOOLS,
    },
    Annotation {
        key: "malha.io/workload-api",
        good: &["true", "false"],
        bad: BAD_BOOLS,
    },
    Annotation {
        key: "malha.io/exclude-outbound-uids",
        good: &["0", "1000", "1000,2000"],
        bad: &["abc", "-1", "4294967296", "1000;2000", "1000\n"],
    },
    Annotation {
        key: "malha.io/run-before",
        good: &[],
        bad: &["no-such-init", "{{x}}", "a\nb"],
    },
    Annotation {
        key: "malha.io/proxy-image",
        good: &[],
        bad: &[
            "registry.example.net/proxy:1",
            "not an image",
            "",
            "x\ny",
            "{{image}}",
        ],
    },
];

/// Annotations that cannot be honoured without changing traffic or security, with a value each.
pub(crate) const REFUSED: &[(&str, &str)] = &[
    ("sidecar.istio.io/interceptionMode", "TPROXY"),
    ("sidecar.istio.io/interceptionMode", "NONE"),
    ("inject.istio.io/templates", "gateway"),
    ("inject.istio.io/templates", "sidecar,custom"),
    ("sidecar.istio.io/bootstrapOverride", "my-config"),
    (
        "sidecar.istio.io/userVolume",
        "[{\"name\":\"v\",\"emptyDir\":{}}]",
    ),
    (
        "sidecar.istio.io/userVolumeMount",
        "[{\"name\":\"v\",\"mountPath\":\"/v\"}]",
    ),
    ("sidecar.istio.io/discoveryAddress", "elsewhere:15012"),
    ("traffic.sidecar.istio.io/kubevirtInterfaces", "k6t-eth0"),
    ("istio.io/reroute-virtual-interfaces", "k6t-eth0"),
];

/// Annotations without effect here, with a value each: a warning, no more.
pub(crate) const IGNORED: &[(&str, &str)] = &[
    (
        "sidecar.istio.io/proxyImage",
        "docker.io/istio/proxyv2:1.20",
    ),
    ("sidecar.istio.io/proxyImageType", "distroless"),
    ("sidecar.istio.io/controlPlaneAuthPolicy", "MUTUAL_TLS"),
    ("sidecar.istio.io/enableCoreDump", "true"),
    ("sidecar.istio.io/extraStatTags", "a,b"),
    ("sidecar.istio.io/statsInclusionPrefixes", "cluster"),
    ("status.sidecar.istio.io/port", "15021"),
    (
        "proxy.istio.io/config",
        "holdApplicationUntilProxyStarts: true\n",
    ),
    ("proxy.istio.io/overrides", "{\"containers\":[]}"),
];

/// Ports of the sidecar, which no container of the pod may claim.
pub(crate) const OUR_PORTS: &[i64] = &[15001, 15006, 15020, 15021, 15090];

/// Texts that are legal in annotation values and environment variables, and break what pastes instead of encoding.
pub(crate) const ODD_TEXTS: &[&str] = &[
    "",
    "plain",
    "line one\nline two",
    "tab\tand\rreturn",
    "\"quoted\" 'twice' `thrice`",
    "back\\slash \\n \\u0000",
    "{{ .Values.x }} {{- end }}",
    "${HOME} $(POD_NAME) %s %n",
    "~0~1/~",
    "]}],\"injected\":[{",
    "\u{7f}\u{1}\u{1f}",
    "\u{2028}\u{2029}\u{feff}",
    "żółć 漢字 🦀 e\u{301}",
    "<script>&amp;</script>",
    "null",
    "- yaml: [\n# no",
    "-----BEGIN CERTIFICATE-----",
];

/// A pod. The same arguments give the same pod.
pub(crate) fn pod(seed: u64, mode: Mode) -> Value {
    let mut maker = Maker {
        dice: Dice::new(seed),
        mode,
        init_names: Vec::new(),
        volumes: Vec::new(),
    };
    maker.pod(seed)
}

struct Maker {
    dice: Dice,
    mode: Mode,
    init_names: Vec<String>,
    volumes: Vec<String>,
}

impl Maker {
    fn anything(&self) -> bool {
        self.mode == Mode::Anything
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.dice.chance(percent)
    }

    /// True in `percent` of a hundred cases, but never where validation must pass.
    fn odd(&mut self, percent: usize) -> bool {
        let chance = self.dice.chance(percent);
        chance && self.anything()
    }

    fn text(&mut self) -> String {
        (*self.dice.pick(ODD_TEXTS)).to_owned()
    }

    fn pod(&mut self, seed: u64) -> Value {
        let spec = self.spec();
        let mut metadata = self.metadata(seed);
        self.annotate(&mut metadata);
        let mut pod =
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
        if self.chance(30) {
            pod["status"] = json!({});
        }
        if self.anything() && self.chance(40) {
            let share = self.dice.below(20);
            sprinkle(&mut self.dice, share, &mut pod);
        }
        if self.chance(30) {
            shuffle_keys(&mut self.dice, &mut pod);
        }
        pod
    }

    // -- metadata --

    fn metadata(&mut self, seed: u64) -> Value {
        let mut metadata = Map::new();
        match self.dice.below(3) {
            0 => {
                metadata.insert("name".into(), json!(format!("pod-{seed}.with-dots")));
            }
            1 => {
                metadata.insert(
                    "generateName".into(),
                    json!(format!("app-{seed}-6d4cf56db6-")),
                );
                metadata.insert(
                    "ownerReferences".into(),
                    json!([self.owner("ReplicaSet", &format!("app-{seed}-6d4cf56db6"))]),
                );
            }
            _ => {
                metadata.insert("generateName".into(), json!(format!("job-{seed}-")));
                if self.chance(50) {
                    metadata.insert(
                        "ownerReferences".into(),
                        json!([self.owner("Job", &format!("job-{seed}"))]),
                    );
                }
            }
        }
        if self.chance(30) {
            metadata.insert("creationTimestamp".into(), Value::Null);
        }
        if self.odd(20) {
            metadata.insert("finalizers".into(), json!(["example.com/keep"]));
        }
        match self.dice.below(10) {
            0 => {}
            1 => {
                metadata.insert("labels".into(), Value::Null);
            }
            2 => {
                metadata.insert("labels".into(), json!({}));
            }
            _ => {
                metadata.insert("labels".into(), self.labels());
            }
        }
        Value::Object(metadata)
    }

    fn owner(&mut self, kind: &str, name: &str) -> Value {
        let group = if kind == "Job" { "batch/v1" } else { "apps/v1" };
        json!({
            "apiVersion": group, "kind": kind, "name": name, "controller": true, "blockOwnerDeletion": self.chance(50),
            "uid": format!("{:08x}-0000-4000-8000-{:012x}", self.dice.next() as u32, self.dice.next() >> 16),
        })
    }

    fn labels(&mut self) -> Value {
        let mut labels = Map::new();
        labels.insert("app".into(), json!("web"));
        for (percent, key, values) in [
            (40, "app.kubernetes.io/name", &["web", "a.b_c-d", ""][..]),
            (40, "pod-template-hash", &["6d4cf56db6"]),
            (15, "sidecar.istio.io/inject", &["true"]),
            (10, "security.istio.io/tlsMode", &["istio", "disabled"]),
            (10, "istio.io/rev", &["default"]),
            (10, "service.istio.io/canonical-name", &["web"]),
            (5, "a-prefix.example.com/with.dots_and-dashes", &["Value.1"]),
        ] {
            if self.chance(percent) {
                labels.insert(key.into(), json!(self.dice.pick(values)));
            }
        }
        if self.chance(2) {
            labels.insert(
                "sidecar.istio.io/inject".into(),
                json!(self.dice.pick(&["false", "maybe", "True", ""])),
            );
        }
        Value::Object(labels)
    }

    fn annotate(&mut self, metadata: &mut Value) {
        match self.dice.below(10) {
            0 => {}
            1 => metadata["annotations"] = Value::Null,
            2 => metadata["annotations"] = json!({}),
            _ => metadata["annotations"] = self.annotations(),
        }
    }

    fn annotations(&mut self) -> Value {
        let mut annotations = Map::new();
        if self.odd(15) {
            annotations.insert("with~tilde/and/slashes".into(), json!(self.text()));
        }
        if self.odd(1) {
            annotations.insert("kubernetes.io/config.mirror".into(), json!("0123"));
        }
        for key in [
            "example.com/note",
            "kubectl.kubernetes.io/last-applied-configuration",
            "sidecar.istio.io/status",
        ] {
            if self.chance(15) {
                annotations.insert(key.into(), json!(self.text()));
            }
        }
        for (percent, key, values) in [
            (10, "kubectl.kubernetes.io/default-container", &["app"][..]),
            (
                10,
                "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes",
                &["", "data", "data,malha-run"],
            ),
            (20, "prometheus.io/scrape", &["true", "false"]),
            (20, "prometheus.io/port", &["8080", "9090"]),
            (
                20,
                "prometheus.io/path",
                &["/metrics", "/m?a=b&c=\"d\"", "/$(POD_NAME)/$$", ""],
            ),
            (10, "prometheus.io/scheme", &["http", "https"]),
        ] {
            if self.chance(percent) {
                annotations.insert(key.into(), json!(self.dice.pick(values)));
            }
        }
        for annotation in ANNOTATIONS {
            if !annotation.good.is_empty() && self.chance(4) {
                annotations.insert(
                    annotation.key.into(),
                    json!(self.dice.pick(annotation.good)),
                );
            }
        }
        if !self.init_names.is_empty() && self.chance(12) {
            let first = self.dice.pick(&self.init_names).clone();
            annotations.insert("malha.io/run-before".into(), json!(first));
        }
        if self.chance(5) {
            annotations.insert("inject.istio.io/templates".into(), json!("sidecar"));
        }
        if self.chance(8) {
            let (key, value) = *self.dice.pick(IGNORED);
            annotations.insert(key.into(), json!(value));
        }
        if self.chance(4) {
            let key = *self.dice.pick(&[
                "sidecar.istio.io/proxyCpu",
                "malha.io/hold-aplication",
                "traffic.sidecar.istio.io/excludeOutboundPort",
            ]);
            annotations.insert(key.into(), json!(self.text()));
        }
        if self.chance(3) {
            annotations.insert(
                "sidecar.istio.io/inject".into(),
                json!(self.dice.pick(&["true", "true", "false", "no"])),
            );
        }
        if self.chance(4) {
            let annotation = self.dice.pick(ANNOTATIONS);
            let bad = *self.dice.pick(annotation.bad);
            annotations.insert(annotation.key.into(), json!(bad));
        }
        if self.chance(3) {
            let (key, value) = *self.dice.pick(REFUSED);
            annotations.insert(key.into(), json!(value));
        }
        if self.chance(3) {
            annotations.insert(
                "malha.io/status".into(),
                json!("{\"version\":\"9.9.9\",\"revision\":\"x\",\"hash\":\"0\"}"),
            );
        }
        Value::Object(annotations)
    }

    // -- spec --

    fn spec(&mut self) -> Value {
        let mut spec = Map::new();
        self.volumes(&mut spec);
        let guaranteed = self.chance(20);
        let best_effort = !guaranteed && self.chance(20);
        let resources = match (guaranteed, best_effort) {
            (true, _) => Resources::Guaranteed,
            (_, true) => Resources::None,
            _ => Resources::Any,
        };
        let init = match self.dice.below(6) {
            0..=2 => 0,
            3 | 4 => 1 + self.dice.below(2),
            _ => 3 + self.dice.below(3),
        };
        let mut inits = Vec::new();
        for index in 0..init {
            let sidecar = self.chance(40);
            let name = self.container_name("init", index);
            self.init_names.push(name.clone());
            let kind = if sidecar {
                Kind::NativeSidecar
            } else {
                Kind::PlainInit
            };
            inits.push(self.container(&name, kind, resources));
        }
        match (inits.is_empty(), self.dice.below(3)) {
            (true, 0) => {}
            (true, 1) => {
                spec.insert("initContainers".into(), Value::Null);
            }
            _ => {
                spec.insert("initContainers".into(), Value::Array(inits));
            }
        }
        let count = match self.dice.below(20) {
            0..=11 => 1,
            12..=16 => 2,
            17 | 18 => 3 + self.dice.below(3),
            _ => 8 + self.dice.below(12),
        };
        let mut containers = Vec::new();
        for index in 0..count {
            let name = if index == 0 {
                "app".to_owned()
            } else {
                self.container_name("c", index)
            };
            containers.push(self.container(&name, Kind::App, resources));
        }
        spec.insert("containers".into(), Value::Array(containers));
        self.pod_fields(&mut spec, guaranteed);
        self.conflicts(&mut spec);
        Value::Object(spec)
    }

    fn container_name(&mut self, stem: &str, index: usize) -> String {
        match self.dice.below(8) {
            0 => format!(
                "{stem}-{index}-{}",
                "n".repeat(63 - stem.len() - index.to_string().len() - 2)
            ),
            1 => format!("{index}{stem}"),
            _ => format!("{stem}-{index}"),
        }
    }

    fn volumes(&mut self, spec: &mut Map<String, Value>) {
        match self.dice.below(5) {
            0 => {}
            1 => {
                spec.insert("volumes".into(), Value::Null);
            }
            2 => {
                spec.insert("volumes".into(), json!([]));
            }
            _ => {
                let kinds = [
                    json!({"name": "data", "emptyDir": {}}),
                    json!({"name": "conf", "configMap": {"name": "web-conf", "optional": true, "items": [{"key": "a", "path": "b"}]}}),
                    json!({"name": "creds", "secret": {"secretName": "web", "defaultMode": 256}}),
                    json!({"name": "info", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}}),
                    json!({"name": "all", "projected": {"sources": [{"configMap": {"name": "a"}}, {"serviceAccountToken": {"path": "t", "audience": "x"}}]}}),
                    json!({"name": "claim", "persistentVolumeClaim": {"claimName": "web-0"}}),
                    json!({"name": "host", "hostPath": {"path": "/var/log", "type": ""}}),
                ];
                let mut volumes = Vec::new();
                for kind in kinds {
                    if self.chance(40) {
                        self.volumes
                            .push(kind["name"].as_str().expect("named above").to_owned());
                        volumes.push(kind);
                    }
                }
                spec.insert("volumes".into(), Value::Array(volumes));
            }
        }
    }

    fn pod_fields(&mut self, spec: &mut Map<String, Value>, guaranteed: bool) {
        let restart = match self.dice.below(6) {
            0 => Some("OnFailure"),
            1 => Some("Never"),
            2 | 3 => Some("Always"),
            _ => None,
        };
        if let Some(policy) = restart {
            spec.insert("restartPolicy".into(), json!(policy));
        }
        for (percent, key, value) in [
            (30, "terminationGracePeriodSeconds", json!(30)),
            (20, "dnsPolicy", json!("ClusterFirst")),
            (
                10,
                "dnsConfig",
                json!({"options": [{"name": "ndots", "value": "2"}]}),
            ),
            (20, "serviceAccountName", json!("default")),
            (10, "automountServiceAccountToken", json!(false)),
            (10, "shareProcessNamespace", json!(true)),
            (10, "enableServiceLinks", json!(false)),
            (10, "hostname", json!("web-0")),
            (10, "subdomain", json!("web")),
            (10, "schedulerName", json!("default-scheduler")),
            (
                10,
                "nodeSelector",
                json!({"kubernetes.io/os": "linux", "disk.example.com/kind": "ssd"}),
            ),
            (
                10,
                "tolerations",
                json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}]),
            ),
            (
                10,
                "affinity",
                json!({"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 1, "podAffinityTerm": {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "web"}}}}]}}),
            ),
            (
                10,
                "topologySpreadConstraints",
                json!([{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}]),
            ),
            (
                10,
                "hostAliases",
                json!([{"ip": "127.0.0.2", "hostnames": ["here.example"]}]),
            ),
            (
                10,
                "readinessGates",
                json!([{"conditionType": "example.com/ready"}]),
            ),
            (5, "os", json!({"name": "linux"})),
            (5, "activeDeadlineSeconds", json!(600)),
        ] {
            if self.chance(percent) {
                spec.insert(key.into(), value);
            }
        }
        match self.dice.below(8) {
            0 => {
                spec.insert("imagePullSecrets".into(), json!([{"name": "registry"}]));
            }
            1 => {
                spec.insert("imagePullSecrets".into(), Value::Null);
            }
            2 => {
                spec.insert("imagePullSecrets".into(), json!([]));
            }
            _ => {}
        }
        if self.chance(35) {
            let mut context = Map::new();
            for (percent, key, value) in [
                (50, "runAsNonRoot", json!(true)),
                (40, "runAsUser", json!(1000)),
                (30, "runAsGroup", json!(3000)),
                (30, "fsGroup", json!(2000)),
                (50, "seccompProfile", json!({"type": "RuntimeDefault"})),
                (20, "supplementalGroups", json!([4000])),
                (10, "fsGroupChangePolicy", json!("OnRootMismatch")),
            ] {
                if self.chance(percent) {
                    context.insert(key.into(), value);
                }
            }
            spec.insert("securityContext".into(), Value::Object(context));
        } else if self.chance(10) {
            spec.insert("securityContext".into(), Value::Null);
        }
        if !guaranteed && self.chance(8) {
            // more than 20 containers of up to 2 CPU, 2 Gi each
            let value = self
                .dice
                .pick(&[json!("64"), json!("100"), json!(64)])
                .clone();
            let limit = self
                .dice
                .pick(&[value.clone(), value.clone(), json!("100500m")])
                .clone();
            let mut resources = json!({"requests": {"cpu": value, "memory": "200Gi"}, "limits": {"cpu": limit, "memory": "200Gi"}});
            if self.chance(40) {
                resources["limits"]
                    .as_object_mut()
                    .expect("made above")
                    .remove("memory");
            }
            if self.chance(20) {
                resources
                    .as_object_mut()
                    .expect("made above")
                    .remove("requests");
            }
            spec.insert("resources".into(), resources);
        }
    }

    /// Now and then one thing that is the injector's own, or that it stays away from.
    fn conflicts(&mut self, spec: &mut Map<String, Value>) {
        if self.chance(2) {
            spec.insert("hostNetwork".into(), json!(true));
            set_host_ports(spec);
        }
        if self.odd(2) {
            spec.insert("os".into(), json!({"name": "windows"}));
        }
        if self.chance(1) {
            spec.insert(
                "nodeSelector".into(),
                json!({"kubernetes.io/os": "windows"}),
            );
        }
        if self.chance(2) {
            let name =
                *self
                    .dice
                    .pick(&["istio-proxy", "linkerd-proxy", "malha-proxy", "malha-init"]);
            let list = spec
                .get_mut("containers")
                .and_then(Value::as_array_mut)
                .expect("made above");
            list.push(json!({"name": name, "image": "someone/else:1"}));
        }
        if self.chance(2) {
            let name = *self
                .dice
                .pick(&["malha-run", "malha-token", "malha-ca", "malha-podinfo"]);
            let volume = json!({"name": name, "emptyDir": {}});
            match spec.get_mut("volumes").and_then(Value::as_array_mut) {
                Some(list) => list.push(volume),
                None => {
                    spec.insert("volumes".into(), json!([volume]));
                }
            }
        }
        if self.chance(2) {
            let context = spec.entry("securityContext").or_insert_with(|| json!({}));
            if context.is_null() {
                *context = json!({});
            }
            context["runAsGroup"] = json!(1337);
        }
        if self.chance(2) {
            let context = spec.entry("securityContext").or_insert_with(|| json!({}));
            if context.is_null() {
                *context = json!({});
            }
            context["runAsUser"] = json!(1337);
        }
        if self.odd(3) {
            spec.insert(
                "ephemeralContainers".into(),
                json!([{"name": "debug", "image": "busybox"}]),
            );
        }
    }

    // -- containers --

    fn container(&mut self, name: &str, kind: Kind, resources: Resources) -> Value {
        let mut container = Map::new();
        container.insert("name".into(), json!(name));
        container.insert("image".into(), json!(self.dice.pick(&["nginx", "registry.example/app@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", "app:1.0"])));
        let names = self.ports(&mut container);
        if kind == Kind::NativeSidecar {
            container.insert("restartPolicy".into(), json!("Always"));
        }
        if kind != Kind::PlainInit || self.odd(20) {
            for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
                if self.chance(35) {
                    let value = self.probe(probe, &names);
                    container.insert(probe.into(), value);
                } else if self.chance(5) {
                    container.insert(probe.into(), Value::Null);
                }
            }
            if self.chance(25) {
                let mut lifecycle = Map::new();
                for hook in ["postStart", "preStop"] {
                    if self.chance(60) {
                        let value = self.hook(&names);
                        lifecycle.insert(hook.into(), value);
                    }
                }
                container.insert("lifecycle".into(), Value::Object(lifecycle));
            }
        }
        self.resources(&mut container, resources);
        self.mounts_and_env(&mut container);
        self.security_context(&mut container);
        for (percent, key, value) in [
            (20, "imagePullPolicy", json!("IfNotPresent")),
            (20, "terminationMessagePath", json!("/dev/termination-log")),
            (10, "tty", json!(true)),
            (10, "stdin", json!(false)),
            (10, "workingDir", json!("/srv/\"app\"")),
            (
                20,
                "command",
                json!(["sh", "-c", "echo \"$HOME\" && exec app\n"]),
            ),
            (20, "args", json!(["--flag={{ x }}", "--", "漢字"])),
        ] {
            if self.chance(percent) {
                container.insert(key.into(), value);
            }
        }
        Value::Object(container)
    }

    /// Adds ports; gives the names.
    fn ports(&mut self, container: &mut Map<String, Value>) -> Vec<String> {
        let mut names = Vec::new();
        match self.dice.below(6) {
            0 => {}
            1 => {
                container.insert("ports".into(), Value::Null);
            }
            2 => {
                container.insert("ports".into(), json!([]));
            }
            _ => {
                let mut ports = Vec::new();
                for (name, number) in [
                    ("http", 8080),
                    ("grpc", 9000),
                    ("fifteen-chars-x", 65535),
                    ("adm", 1),
                ] {
                    if self.chance(40) {
                        let mut port = json!({"containerPort": number});
                        if self.chance(70) {
                            port["name"] = json!(name);
                            names.push(name.to_owned());
                        }
                        if self.chance(50) {
                            port["protocol"] =
                                json!(self.dice.pick(&["TCP", "TCP", "UDP", "SCTP"]));
                        }
                        ports.push(port);
                    }
                }
                if self.chance(1) {
                    ports.push(json!({"containerPort": self.dice.pick(OUR_PORTS)}));
                }
                if self.odd(2) {
                    ports.push(
                        json!({"containerPort": self.dice.pick(&[0, -1, 70000]), "name": "odd"}),
                    );
                }
                container.insert("ports".into(), Value::Array(ports));
            }
        }
        names
    }

    fn port(&mut self, names: &[String]) -> Value {
        match self.dice.below(10) {
            0..=4 => json!(self.dice.pick(&[80, 8080, 8443, 1, 65535])),
            5..=7 if !names.is_empty() => json!(self.dice.pick(names)),
            8 => json!("no-such-port"),
            _ if self.anything() && self.dice.chance(20) => {
                self.dice.pick(&[json!(0), json!(65536), json!(-1)]).clone()
            }
            _ => json!(9000),
        }
    }

    fn http_get(&mut self, names: &[String]) -> Value {
        let mut get = json!({"port": self.port(names)});
        if self.chance(80) {
            get["path"] = json!(self.dice.pick(&[
                "/",
                "/healthz",
                "/ready?full=\"1\"&x={{y}}",
                "/ż/漢",
                "/$(HOME)$$",
                "relative",
                "/a%20b"
            ]));
        }
        if self.chance(30) {
            get["scheme"] = json!(self.dice.pick(&["HTTP", "HTTPS"]));
        }
        if self.chance(20) {
            get["host"] = json!(self.dice.pick(&[
                "",
                "127.0.0.1",
                "localhost",
                "::1",
                "example.com",
                "192.0.2.7"
            ]));
        }
        match self.dice.below(8) {
            0 => get["httpHeaders"] = Value::Null,
            1 => get["httpHeaders"] = json!([]),
            2 => {
                get["httpHeaders"] = json!([{"name": "Host", "value": "app.example"}, {"name": "X-Odd", "value": self.text()}])
            }
            3 => get["httpHeaders"] = json!([{"name": "Authorization", "value": "Basic abc"}]),
            _ => {}
        }
        get
    }

    fn probe(&mut self, kind: &str, names: &[String]) -> Value {
        let mut probe = match self.dice.below(7) {
            0..=2 => json!({"httpGet": self.http_get(names)}),
            3 => {
                let mut tcp = json!({"port": self.port(names)});
                if self.chance(20) {
                    tcp["host"] = json!(self.dice.pick(&["", "127.0.0.1", "db.example.com"]));
                }
                json!({"tcpSocket": tcp})
            }
            4 => {
                let mut grpc = json!({"port": self.dice.pick(&[9000, 50051])});
                if self.chance(50) {
                    grpc["service"] = self
                        .dice
                        .pick(&[json!("pkg.Health"), json!(""), Value::Null])
                        .clone();
                }
                json!({"grpc": grpc})
            }
            5 => json!({"exec": {"command": ["sh", "-c", "curl -f \"http://localhost:8080/x\""]}}),
            _ => json!({"exec": {"command": ["true"]}}),
        };
        for (percent, key, value) in [
            (40, "initialDelaySeconds", json!(5)),
            (40, "periodSeconds", json!(7)),
            (40, "timeoutSeconds", json!(self.dice.between(1, 9))),
            (40, "failureThreshold", json!(4)),
        ] {
            if self.chance(percent) {
                probe[key] = value;
            }
        }
        if kind == "readinessProbe" && self.chance(20) {
            probe["successThreshold"] = json!(3);
        }
        if kind != "readinessProbe" && self.chance(20) {
            probe["terminationGracePeriodSeconds"] = json!(11);
        }
        probe
    }

    fn hook(&mut self, names: &[String]) -> Value {
        match self.dice.below(5) {
            0 | 1 => json!({"httpGet": self.http_get(names)}),
            2 => json!({"tcpSocket": {"port": 8080}}),
            3 => json!({"sleep": {"seconds": 1}}),
            _ => json!({"exec": {"command": ["sleep", "1"]}}),
        }
    }

    fn resources(&mut self, container: &mut Map<String, Value>, resources: Resources) {
        match resources {
            Resources::Guaranteed => {
                let cpu = *self.dice.pick(&["500m", "1", "0.25"]);
                let memory = *self.dice.pick(&["256Mi", "1Gi", "1e9"]);
                let limits = json!({"cpu": cpu, "memory": memory});
                let both = json!({"requests": limits, "limits": limits});
                // requests default to limits
                let value = if self.chance(70) {
                    both
                } else {
                    json!({"limits": limits})
                };
                container.insert("resources".into(), value);
            }
            Resources::None => match self.dice.below(4) {
                0 => {
                    container.insert("resources".into(), json!({}));
                }
                1 => {
                    container.insert("resources".into(), Value::Null);
                }
                2 => {
                    container.insert("resources".into(), json!({"requests": {}, "limits": null}));
                }
                _ => {}
            },
            Resources::Any => {
                let mut value = Map::new();
                let mut requests = Map::new();
                let mut limits = Map::new();
                for (key, low, high) in [
                    ("cpu", "100m", "2"),
                    ("memory", "64Mi", "2Gi"),
                    ("ephemeral-storage", "1Gi", "1.5Gi"),
                ] {
                    if self.chance(35) {
                        requests.insert(key.into(), json!(low));
                    }
                    if self.chance(35) {
                        limits.insert(key.into(), json!(high));
                    }
                }
                if self.odd(5) {
                    requests.insert("cpu".into(), json!(1));
                }
                if self.odd(3) {
                    requests.insert("memory".into(), json!("lots"));
                }
                if !requests.is_empty() || self.chance(20) {
                    value.insert("requests".into(), Value::Object(requests));
                }
                if !limits.is_empty() || self.chance(20) {
                    value.insert("limits".into(), Value::Object(limits));
                }
                if !value.is_empty() || self.chance(20) {
                    container.insert("resources".into(), Value::Object(value));
                }
            }
        }
    }

    fn mounts_and_env(&mut self, container: &mut Map<String, Value>) {
        if self.chance(40) {
            let mut mounts = Vec::new();
            for (index, volume) in self.volumes.clone().into_iter().enumerate() {
                if self.chance(50) {
                    mounts.push(json!({"name": volume, "mountPath": format!("/mnt/{index}"), "readOnly": self.chance(50)}));
                }
            }
            container.insert("volumeMounts".into(), Value::Array(mounts));
        } else if self.chance(20) {
            container.insert("volumeMounts".into(), Value::Null);
        }
        if self.chance(40) {
            let mut env = vec![json!({"name": "ODD", "value": self.text()})];
            if self.chance(50) {
                env.push(json!({"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}));
            }
            if self.chance(10) {
                env.push(json!({"name": "SPIFFE_ENDPOINT_SOCKET", "value": "unix:///elsewhere"}));
            }
            container.insert("env".into(), Value::Array(env));
        } else if self.chance(20) {
            container.insert("env".into(), Value::Null);
        }
        if self.chance(10) {
            container.insert(
                "envFrom".into(),
                json!([{"configMapRef": {"name": "web", "optional": true}}]),
            );
        }
    }

    fn security_context(&mut self, container: &mut Map<String, Value>) {
        if self.chance(30) {
            container.insert("securityContext".into(), json!({
                "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": true,
                "seccompProfile": {"type": "RuntimeDefault"}, "readOnlyRootFilesystem": self.chance(50),
            }));
        } else if self.chance(20) {
            container.insert(
                "securityContext".into(),
                self.dice
                    .pick(&[
                        json!({"privileged": true}),
                        json!({"capabilities": {"add": ["NET_ADMIN", "SYS_TIME"]}}),
                        json!({"runAsUser": 0}),
                        json!({"runAsUser": 1337}),
                        json!({}),
                        Value::Null,
                    ])
                    .clone(),
            );
        } else if self.chance(1) {
            container.insert("securityContext".into(), json!({"runAsGroup": 1337}));
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    App,
    PlainInit,
    NativeSidecar,
}

#[derive(Clone, Copy)]
enum Resources {
    Guaranteed,
    None,
    Any,
}

/// A host-network pod's ports are the host's, so only its first container keeps them: the others would want the same.
fn set_host_ports(spec: &mut Map<String, Value>) {
    let mut first = true;
    for list in ["containers", "initContainers"] {
        for container in spec
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if !first {
                container["ports"] = Value::Null;
            }
            first = false;
            for port in container
                .get_mut("ports")
                .and_then(Value::as_array_mut)
                .into_iter()
                .flatten()
            {
                port["hostPort"] = port["containerPort"].clone();
            }
        }
    }
}

/// Maps from text to text, where another key would be data and not an unknown field.
const TEXT_MAPS: &[&str] = &[
    "labels",
    "annotations",
    "nodeSelector",
    "requests",
    "limits",
    "matchLabels",
];

/// Adds fields that no version knows, in `percent` of a hundred objects.
pub(crate) fn sprinkle(dice: &mut Dice, percent: usize, value: &mut Value) {
    match value {
        Value::Array(items) => items
            .iter_mut()
            .for_each(|item| sprinkle(dice, percent, item)),
        Value::Object(fields) => {
            for (key, field) in fields.iter_mut() {
                if !TEXT_MAPS.contains(&key.as_str()) {
                    sprinkle(dice, percent, field);
                }
            }
            if dice.chance(percent) {
                let key = *dice.pick(&[
                    "futureField",
                    "x-odd/key~1",
                    "Name",
                    "",
                    "\u{0}",
                    "\"",
                    "漢字",
                ]);
                let unknown = dice
                    .pick(&[
                        json!(null),
                        json!([null, {}, []]),
                        json!({"name": "malha-proxy", "containers": null}),
                        json!(1.5e300),
                        json!(-9_007_199_254_740_993_i64),
                        json!("{{ }}\n\u{0}"),
                        json!(true),
                        json!({"": ""}),
                    ])
                    .clone();
                fields.insert(key.into(), unknown);
            }
        }
        _ => {}
    }
}

/// The same object with its keys in another order, at every level.
pub(crate) fn shuffle_keys(dice: &mut Dice, value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| shuffle_keys(dice, item)),
        Value::Object(fields) => {
            let mut entries: Vec<(String, Value)> = std::mem::take(fields).into_iter().collect();
            dice.shuffle(&mut entries);
            for (key, mut field) in entries {
                shuffle_keys(dice, &mut field);
                fields.insert(key, field);
            }
        }
        _ => {}
    }
}
