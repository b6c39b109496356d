//! Servers and clients that nobody here wrote, from Debian's packages: of RabbitMQ the client speaks first, of MariaDB
//! the server does.

use super::{STRICT, counter, until};
use crate::node::{self, Namespace};

const RABBITMQ: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: rabbitmq}}
spec:
  enableServiceLinks: false # it reads variables that begin with the name of its Service
  terminationGracePeriodSeconds: 1
  containers:
  - name: rabbitmq
    image: rig.local/rabbitmq:1
    command: [sh, -c, "echo 'loopback_users = none' >/tmp/rabbitmq.conf && exec /usr/lib/rabbitmq/bin/rabbitmq-server"]
    env:
    - {name: HOME, value: /tmp}
    - {name: RABBITMQ_CONFIG_FILE, value: /tmp/rabbitmq.conf}
    - {name: RABBITMQ_LOGS, value: "-"}
    - {name: RABBITMQ_MNESIA_BASE, value: /tmp/mnesia}
    ports: [{name: amqp, containerPort: 5672}]
    readinessProbe: {tcpSocket: {port: amqp}, periodSeconds: 1, timeoutSeconds: 10}
  - {name: shell, image: "rig.local/tools:1", command: [sleep, "100000"]}
---
apiVersion: v1
kind: Service
metadata: {name: rabbitmq}
spec:
  selector: {app: rabbitmq}
  ports: [{name: amqp, port: 5672}]
"#;

const MARIADB: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: mariadb}}
spec:
  enableServiceLinks: false
  terminationGracePeriodSeconds: 1
  containers:
  - name: mariadb
    image: rig.local/mariadb:1
    command:
    - sh
    - -c
    - |
      set -e
      mkdir /tmp/data
      mariadb-install-db --user=root --datadir=/tmp/data --skip-test-db >/dev/null
      printf "%s\n" "CREATE DATABASE shop;" "CREATE USER shop IDENTIFIED BY 'shop';" "GRANT ALL ON shop.* TO shop;" >/tmp/init
      exec mariadbd --user=root --datadir=/tmp/data --init-file=/tmp/init --skip-name-resolve --bind-address='*' \
        --socket=/tmp/socket --pid-file=/tmp/pid
    ports: [{name: mysql, containerPort: 3306}]
    readinessProbe: {tcpSocket: {port: mysql}, periodSeconds: 1, timeoutSeconds: 10}
  - {name: shell, image: "rig.local/tools:1", command: [sleep, "100000"]}
---
apiVersion: v1
kind: Service
metadata: {name: mariadb}
spec:
  selector: {app: mariadb}
  ports: [{name: mysql, port: 3306}]
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_rabbitmq_takes_and_gives_messages_of_the_mesh_alone() {
    let packages = &["rabbitmq-server", "amqp-tools"];
    let Some(stage) = Stage::set("rabbitmq", packages, RABBITMQ).await else {
        return;
    };
    let message = |host: &str, text: &str| {
        format!(
            "amqp-declare-queue --server={host} -q {text} >&2 && amqp-publish --server={host} -r {text} -b {text} \
             && amqp-get --server={host} -q {text}"
        )
    };
    stage.serves_the_mesh_alone(message).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mariadb_writes_and_reads_rows_of_the_mesh_alone() {
    let packages = &["mariadb-server"];
    let Some(stage) = Stage::set("mariadb", packages, MARIADB).await else {
        return;
    };
    // A plaintext client waits for the server's greeting, so it is Envoy that must end it.
    let row = |host: &str, text: &str| {
        format!(
            "mariadb --host={host} --user=shop --password=shop --connect-timeout=60 --skip-column-names shop -e \"\
             CREATE TABLE IF NOT EXISTS orders (id INT AUTO_INCREMENT PRIMARY KEY, what TEXT); \
             INSERT INTO orders (what) VALUES ('{text}'); SELECT what FROM orders WHERE id = LAST_INSERT_ID()\""
        )
    };
    stage.serves_the_mesh_alone(row).await;
}

/// A server in the mesh behind a Service of its name, a client beside it and one outside.
struct Stage {
    service: &'static str,
    mesh: Namespace,
    outside: Namespace,
}

impl Stage {
    async fn set(service: &'static str, packages: &'static [&str], server: &str) -> Option<Self> {
        let node = node::shared().await?;
        node.load_debian(service, packages).await?;
        let stage = Self {
            service,
            mesh: node
                .namespace(service, &[("istio-injection", "enabled")])
                .await,
            outside: node.namespace("outside", &[]).await,
        };
        stage.mesh.apply(STRICT).await;
        stage.mesh.apply(server).await;
        for namespace in [&stage.mesh, &stage.outside] {
            namespace.apply(&client(service)).await;
        }
        stage.mesh.ready("pod/server").await;
        for namespace in [&stage.mesh, &stage.outside] {
            namespace.ready("pod/client").await;
        }
        Some(stage)
    }

    /// `exchange` is a shell's line that gives a text to a host and prints what it gets back.
    async fn serves_the_mesh_alone(&self, exchange: impl Fn(&str, &str) -> String) {
        let host = format!("{}.{}", self.service, self.mesh.name());
        let ask = async |from: &Namespace, text: &str| {
            let line = exchange(&host, text);
            let answer = from
                .exec("pod/client", "client", &["sh", "-c", &line])
                .await;
            answer.map(|answer| answer.trim().to_owned())
        };
        // The first call finds a Service that is as new as itself.
        until(
            "a client of the mesh is served",
            |answer: &Result<String, String>| answer.as_deref() == Ok("first"),
            async || ask(&self.mesh, "first").await,
        )
        .await;
        let refused = async || {
            let name = "envoy_listener_no_filter_chain_match";
            counter(&self.mesh, ("pod/server", "shell"), name).await
        };
        let before = refused().await;
        let outsider = ask(&self.outside, "plaintext").await;
        assert!(outsider.is_err(), "{outsider:?}");
        until("the refusal is counted", |count| *count > before, refused).await;
        let answer = ask(&self.mesh, "last").await;
        assert_eq!(answer.as_deref(), Ok("last"), "the mesh goes on");
    }
}

fn client(image: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: client}}\nspec:\n  enableServiceLinks: false\n  \
         terminationGracePeriodSeconds: 1\n  containers:\n  - {{name: client, image: \"rig.local/{image}:1\", \
         command: [sleep, \"100000\"]}}\n"
    )
}
