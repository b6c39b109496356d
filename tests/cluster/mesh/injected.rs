//! What an injected pod is where it runs: in what class, with which rights, in what order it ends, and where it is let in.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use super::{STRICT, Shop, curl, until};
use crate::{
    node::{self, Namespace, Node, process_of},
    rig,
};

const MESH: (&str, &str) = ("istio-injection", "enabled");

#[tokio::test(flavor = "multi_thread")]
async fn pods_keep_their_class_and_their_sidecars_hold_no_right_and_no_token_of_the_api_server() {
    let Some(node) = node::shared().await else {
        return;
    };
    let mesh = node.namespace("classes", &[MESH]).await;
    let own = |resources: Value| json!({"containers": [{"resources": resources}]});
    let amount = json!({"cpu": "20m", "memory": "32Mi"});
    let pods = [
        ("guaranteed", "Guaranteed", own(json!({"limits": amount}))),
        (
            "by-the-pod",
            "Guaranteed",
            json!({"resources": {"limits": amount}}),
        ),
        ("burstable", "Burstable", own(json!({"requests": amount}))),
        // Quotas accept a sidecar only with requests and limits, and with these nothing is BestEffort.
        ("nothing-asked", "Burstable", json!({})),
    ];
    for (name, class, spec) in &pods {
        let mut pod = app(name, spec);
        if *class == "Guaranteed" {
            // Less than the half of a core that is the default, for a node that others use too.
            let share = json!({"sidecar.istio.io/proxyCPU": "200m"});
            pod["metadata"]["annotations"] = share;
        }
        mesh.apply(&pod.to_string()).await;
    }
    // The operator may have it otherwise.
    let none =
        "proxy: {resources: {requests: {cpu: '', memory: ''}, limits: {cpu: '', memory: ''}}}";
    let best_effort = injected(none, &mesh, &app("best-effort", &json!({}))).await;
    mesh.apply(&best_effort).await;

    let classes = pods.iter().map(|(name, class, _)| (*name, *class));
    for (name, class) in classes.chain([("best-effort", "BestEffort")]) {
        mesh.ready(&format!("pod/{name}")).await;
        let pod = Running::read(&mesh, name).await;
        assert_eq!(pod.0["status"]["qosClass"], class, "{name}");
        for container in ["app", "malha-proxy"] {
            assert_eq!(
                pod.process(container).class(),
                class,
                "{name}: {container}'s cgroup"
            );
        }
    }

    let pod = Running::read(&mesh, "burstable").await;
    let (app, proxy) = (pod.process("app"), pod.process("malha-proxy"));
    assert_eq!(
        app.audiences(),
        [[rig::ISSUER]],
        "the application keeps its own token, at which this test sees what it looks for"
    );
    assert_eq!(proxy.audiences(), [["malha-ca"]]);
    for (field, value) in [
        ("Uid", "1337"),
        ("Gid", "1337"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        assert_eq!(proxy.status(field).as_deref(), Some(value), "{field}");
    }
    let mount = |at: &str| proxy.mounts().into_iter().find(|mount| mount.at == at);
    let root = mount("/").expect("a root");
    assert!(root.options.contains(&"ro".to_owned()), "{root:?}");
    let run = mount("/run/malha").expect("a place for sockets and the key");
    assert_eq!(run.kind, "tmpfs", "never on a disk: {run:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_limits_and_pod_security_let_the_sidecar_in() {
    let Some(node) = node::shared().await else {
        return;
    };
    a_quota_and_a_limit_range(node).await;
    pod_security(node).await;
}

async fn a_quota_and_a_limit_range(node: &'static Node) {
    let mesh = node.namespace("quota", &[MESH]).await;
    mesh.apply(
        "apiVersion: v1\nkind: LimitRange\nmetadata: {name: limits}\nspec:\n  limits:\n  - {type: Container, default: \
         {cpu: 300m, memory: 64Mi}, defaultRequest: {cpu: 50m, memory: 32Mi}, max: {cpu: \"2\", memory: 1Gi}, min: \
         {cpu: 5m, memory: 8Mi}}\n---\napiVersion: v1\nkind: ResourceQuota\nmetadata: {name: quota}\nspec: {hard: \
         {requests.cpu: \"1\", requests.memory: 1Gi, limits.cpu: \"4\", limits.memory: 2Gi, pods: \"1\"}}\n",
    )
    .await;
    let used = async || {
        let quota = mesh
            .kubectl(&["get", "resourcequota/quota", "-o", "json"])
            .await;
        let quota: Value = serde_json::from_str(&quota).expect("JSON");
        quota["status"]["used"].clone()
    };
    until("the quota is counted", Value::is_object, used).await;
    mesh.apply(&app("counted", &json!({})).to_string()).await;
    mesh.ready("pod/counted").await;
    // The application's share is the LimitRange's, the sidecar's its own.
    let sum = json!({
        "requests.cpu": "150m", "requests.memory": "160Mi",
        "limits.cpu": "2300m", "limits.memory": "1088Mi", "pods": "1",
    });
    assert_eq!(used().await, sum);
}

/// `malha-init` needs a capability that the level forbids; nothing else of ours is in the way. Where a component of the
/// node installs the rules, nothing is.
async fn pod_security(node: &'static Node) {
    let restricted = ("pod-security.kubernetes.io/enforce", "restricted");
    let mesh = node.namespace("restricted", &[MESH, restricted]).await;
    let context = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
    let spec = json!({
        "securityContext": {
            "runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [{"securityContext": context}, {
            "name": "web", "image": "rig.local/agnhost:1", "args": ["netexec", "--http-port=8080"],
            "ports": [{"containerPort": 8080}], "securityContext": context,
            "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1},
        }],
    });
    let pod = app("strict", &spec);
    let refused = mesh.try_apply(&pod.to_string()).await;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        said.contains(
            "violates PodSecurity \"restricted:latest\": unrestricted capabilities (container \"malha-init\" must not \
             include \"NET_ADMIN\" in securityContext.capabilities.add)"
        ),
        "the one objection: {said}"
    );
    assert!(said.contains("Warning: PodSecurityForbidsInit"), "{said}");

    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: strict}, ports: [{name: \
                   http, port: 80, targetPort: 8080}]}\n";
    mesh.apply(service).await;
    mesh.apply(STRICT).await;
    let external = injected("redirect: external", &mesh, &pod).await;
    mesh.apply(&external).await;
    let init = ".status.initContainerStatuses[?(@.name==\"malha-init\")]";
    let said = format!(
        "jsonpath={{{init}.lastState.terminated.message}}{{{init}.state.terminated.message}}"
    );
    until(
        "malha-init sees that nobody redirects",
        |said: &String| said.contains("did not come to the proxy's port"),
        async || mesh.kubectl(&["get", "pod/strict", "-o", &said]).await,
    )
    .await;
    install_from_the_node(&mesh, "strict").await;
    mesh.ready("pod/strict").await;
    let caller = format!("URI=spiffe://cluster.local/ns/{}/sa/default", mesh.name());
    let own = format!(
        "http://web.{}/header?key=X-Forwarded-Client-Cert",
        mesh.name()
    );
    until(
        "what the pod sends and receives goes through its proxy",
        |seen: &Result<String, String>| seen.as_ref().is_ok_and(|seen| seen.contains(&caller)),
        async || curl(&mesh, "pod/strict", "app", &[&own]).await,
    )
    .await;
}

/// What a component of the node would do: `malha-init` as root, in the pod's network.
async fn install_from_the_node(mesh: &Namespace, pod: &str) {
    let pod = Running::read(mesh, pod).await;
    let init = &pod.0["spec"]["initContainers"][0];
    assert_eq!(
        (&init["name"], &init["args"][0]),
        (&json!("malha-init"), &json!("--check"))
    );
    let settings = init["args"][1].as_str().expect("its settings");
    // The container that keeps the pod's network is not among those of its status.
    let uid = pod.0["metadata"]["uid"].as_str().expect("a uid");
    let process = process_of(uid).expect("a process of the pod");
    let install = std::process::Command::new("nsenter")
        .arg(format!("--net=/proc/{process}/ns/net"))
        .args([env!("CARGO_BIN_EXE_malha-init"), settings])
        .output()
        .expect("nsenter starts");
    assert!(install.status.success(), "{install:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_ends_after_the_application_which_calls_others_to_its_last_moment() {
    let Some(shop) = Shop::open("last").await else {
        return;
    };
    shop.mesh.apply(STRICT).await;
    let call = |moment: &str| {
        format!("curl -sS --fail --retry 3 --retry-all-errors http://web/echo?msg={moment}")
    };
    let spec = json!({
        "terminationGracePeriodSeconds": 60,
        "containers": [{
            // Long enough after the signal that a proxy that got one too would be gone.
            "command": ["sh", "-c", format!(
                "trap 'sleep 3; {}; exit 0' TERM; while :; do sleep 0.1; done", call("in-SIGTERM")
            )],
            "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", call("in-preStop")]}}},
        }],
    });
    let mut leaving = app("leaving", &spec);
    // So that how it ended can be read.
    leaving["metadata"]["finalizers"] = json!(["malha.io/read-how-it-ended"]);
    shop.mesh.apply(&leaving.to_string()).await;
    shop.mesh.ready("pod/leaving").await;
    shop.mesh
        .kubectl(&["delete", "pod/leaving", "--wait=false"])
        .await;
    let ended = |pod: &Running| {
        let of = |container| pod.container(container)["state"]["terminated"].clone();
        [of("app"), of("malha-proxy")]
    };
    until(
        "both have ended",
        |pod: &Running| ended(pod).iter().all(Value::is_object),
        async || Running::read(&shop.mesh, "leaving").await,
    )
    .await;
    let [app, proxy] = ended(&Running::read(&shop.mesh, "leaving").await);
    let done = r#"{"metadata": {"finalizers": null}}"#;
    shop.mesh
        .kubectl(&["patch", "pod/leaving", "--type=merge", "-p", done])
        .await;
    assert_eq!(
        (&app["exitCode"], &proxy["exitCode"]),
        (&json!(0), &json!(0))
    );
    let at = |state: &Value| state["finishedAt"].as_str().map(str::to_owned);
    assert!(at(&proxy) >= at(&app), "{app} {proxy}");
    let served = shop.mesh.kubectl(&["logs", "pod/web", "-c", "web"]).await;
    for moment in ["in-preStop", "in-SIGTERM"] {
        assert!(served.contains(moment), "{moment}: {served}");
    }
}

/// A pod with a shell in container `app`; `spec` comes over it.
fn app(name: &str, spec: &Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "app", "image": "rig.local/tools:1", "command": ["sleep", "100000"],
            }],
        },
    });
    merge(&mut pod["spec"], spec);
    pod
}

/// Objects key by key, lists place by place.
fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (Value::Array(into), Value::Array(from)) => {
            for (at, value) in from.iter().enumerate() {
                match into.get_mut(at) {
                    Some(own) => merge(own, value),
                    None => into.push(value.clone()),
                }
            }
        }
        (into, from) => *into = from.clone(),
    }
}

/// `malha inject` with settings other than those of the running control plane.
async fn injected(settings: &str, mesh: &Namespace, pod: &Value) -> String {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), settings).expect("it is ours");
    let mut inject = tokio::process::Command::new(env!("CARGO_BIN_EXE_malha"));
    inject.args([
        "inject",
        "-f",
        "-",
        "--namespace",
        mesh.name(),
        "--injector-config",
    ]);
    inject.arg(file.path());
    let output = rig::run(inject, Some(&pod.to_string())).await;
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("YAML")
}

/// A pod as the API server shows it.
#[derive(Debug)]
struct Running(Value);

impl Running {
    async fn read(mesh: &Namespace, name: &str) -> Self {
        let pod = mesh.kubectl(&["get", "pod", name, "-o", "json"]).await;
        Self(serde_json::from_str(&pod).expect("JSON"))
    }

    /// A container's status.
    fn container(&self, name: &str) -> &Value {
        let status = &self.0["status"];
        let lists = ["initContainerStatuses", "containerStatuses"].map(|list| &status[list]);
        let mut all = lists.into_iter().filter_map(Value::as_array).flatten();
        all.find(|status| status["name"] == name)
            .unwrap_or(&Value::Null)
    }

    fn process(&self, container: &str) -> Process {
        let id = self.container(container)["containerID"].as_str();
        let id = id.and_then(|id| id.rsplit_once('/')).expect("it runs").1;
        Process(process_of(id).expect("a process of the container"))
    }
}

/// A container's first process, as the kernel shows it.
struct Process(u32);

#[derive(Debug)]
struct Mount {
    at: String,
    options: Vec<String>,
    kind: String,
}

impl Process {
    fn read(&self, file: &str) -> String {
        let read = std::fs::read_to_string(format!("/proc/{}/{file}", self.0));
        read.expect("the process lives")
    }

    /// The directory of cgroups that the kubelet chose.
    fn class(&self) -> &'static str {
        let cgroup = self.read("cgroup");
        match () {
            () if cgroup.contains("besteffort") => "BestEffort",
            () if cgroup.contains("burstable") => "Burstable",
            () => "Guaranteed",
        }
    }

    /// A field's first word.
    fn status(&self, field: &str) -> Option<String> {
        let status = self.read("status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        Some(line?.split_whitespace().next()?.to_owned())
    }

    /// proc_pid_mountinfo(5).
    fn mounts(&self) -> Vec<Mount> {
        let mountinfo = self.read("mountinfo");
        let mount = |line: &str| {
            let (before, after) = line.split_once(" - ")?;
            let mut before = before.split(' ').skip(4);
            Some(Mount {
                at: before.next()?.to_owned(),
                options: before.next()?.split(',').map(str::to_owned).collect(),
                kind: after.split(' ').next()?.to_owned(),
            })
        };
        mountinfo.lines().filter_map(mount).collect()
    }

    /// Of every token in a directory that is mounted into the container: for whom it is.
    fn audiences(&self) -> Vec<Vec<String>> {
        let token = |mount: Mount| {
            let at = mount.at.trim_start_matches('/').to_owned();
            let token = format!("/proc/{}/root/{at}/token", self.0);
            std::fs::read_to_string(token).ok()
        };
        self.mounts()
            .into_iter()
            .filter_map(token)
            .map(|token| audience(&token))
            .collect()
    }
}

/// Of a JWT (RFC 7519 4.1.3).
fn audience(token: &str) -> Vec<String> {
    let claims = token.split('.').nth(1).expect("a JWT");
    let claims = URL_SAFE_NO_PAD.decode(claims).expect("base64url");
    let claims: Value = serde_json::from_slice(&claims).expect("JSON");
    serde_json::from_value(claims["aud"].clone()).expect("audiences")
}
