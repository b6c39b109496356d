//! The end of the pod: what is open ends, then Envoy does.
//!
//! In native order the application has ended before the sidecar is told to. In classic order both are told at once, and
//! the application may still answer what it has begun, call others to say goodbye, or be sent its `preStop`: the sidecar
//! stays until the application has no port and no connection left, or the time is over.

use std::{collections::BTreeSet, fmt, fs, time::Duration};

use nix::unistd::Uid;
use tokio::time::{Instant, sleep};

use super::{
    pod::Pod,
    settings::{INBOUND_PORT, Settings},
};

/// Who still has something to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Busy {
    /// Ports on which the application listens.
    pub ports: BTreeSet<u16>,
    /// Envoy's gauges that count open connections and requests of the application's.
    pub open: Vec<(String, u64)>,
    /// Requests that Envoy got since its start. Whoever sends more has not heard yet that the pod goes, and is told by
    /// an answer; a closed connection could mean anything.
    pub requests: u64,
}

/// Often enough that an end is not noticeably late, and seldom enough to cost nothing.
const GLANCE: Duration = Duration::from_millis(250);
/// Looks in a row that must find nothing, and nothing new: the first may fall between two calls.
const QUIET: u32 = 2;
/// Inbound listeners tell clients to go elsewhere, and go on answering; the agent ends Envoy itself.
const DRAIN: &str = "/drain_listeners?inboundonly&graceful&skip_exit";
/// Every answer from now on asks its client to close.
const FAIL: &str = "/healthcheck/fail";
/// What [`open`] and [`requests`] read.
const STATS: &str =
    "/stats?filter=downstream_(cx%7Crq)_active$%7Cupstream_cx_active$%7Cdownstream_rq_total$";

/// Asks everybody to end, and waits until they have or `termination_drain` is over.
pub async fn drain(pod: &Pod) {
    let deadline = Instant::now() + pod.settings.termination_drain;
    for act in [FAIL, DRAIN] {
        if let Err(error) = pod.admin.act(act).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot ask Envoy to drain"
            );
        }
    }
    let (mut quiet, mut before) = (0, 0);
    while quiet < QUIET {
        let busy = look(pod).await;
        let came = busy.requests != std::mem::replace(&mut before, busy.requests);
        if busy.is_quiet() && !came {
            quiet += 1;
        } else {
            quiet = 0;
            tracing::debug!(%busy, "draining");
        }
        if Instant::now() >= deadline {
            tracing::warn!(%busy, seconds = pod.settings.termination_drain.as_secs_f32(), "not all has ended in time");
            return;
        }
        sleep(GLANCE).await;
    }
    tracing::info!("nothing is open any more");
}

async fn look(pod: &Pod) -> Busy {
    let uid = Uid::effective().as_raw();
    let sockets = ["/proc/self/net/tcp", "/proc/self/net/tcp6"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .collect::<String>();
    // An Envoy that does not answer has nothing open.
    let stats = pod.admin.read(STATS).await.unwrap_or_default();
    let stats = String::from_utf8_lossy(&stats);
    Busy {
        ports: listening(&sockets, &pod.settings, uid),
        open: open(&stats),
        requests: requests(&stats),
    }
}

/// The application's listening ports: those that it has told of; where it has told of none, those of other users than
/// ours. `sockets` is what `/proc/net/tcp` holds.
pub fn listening(sockets: &str, settings: &Settings, own_uid: u32) -> BTreeSet<u16> {
    let own = settings.own_ports();
    let all = sockets.lines().filter_map(listener);
    all.filter(|(port, uid)| match settings.app_ports.as_slice() {
        [] => *uid != own_uid && !own.contains(port),
        told => told.contains(port),
    })
    .map(|(port, _)| port)
    .collect()
}

/// Port and owner of a line that shows a listening socket: `sl local remote state .. .. .. uid ..`.
fn listener(line: &str) -> Option<(u16, u32)> {
    const LISTEN: &str = "0A";
    let mut words = line.split_whitespace();
    let (_, port) = words.nth(1)?.rsplit_once(':')?;
    let state = words.nth(1)?;
    let uid = words.nth(3)?.parse().ok()?;
    (state == LISTEN).then_some((u16::from_str_radix(port, 16).ok()?, uid))
}

/// Gauges that are not zero among those that count what is the application's: requests that it has to answer,
/// connections to it, and connections of its own to others. `stats` is what Envoy's admin interface says.
///
/// Connections from others are not counted: with nothing behind them they would only wait for their own end.
pub fn open(stats: &str) -> Vec<(String, u64)> {
    numbers(stats)
        .filter(|(name, value)| *value > 0 && is_the_applications(name))
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// How many requests came to the application or from it, whatever became of them.
pub fn requests(stats: &str) -> u64 {
    let counters = numbers(stats).filter(|(name, _)| {
        name.strip_prefix("http.")
            .is_some_and(|rest| rest.ends_with(".downstream_rq_total") && !is_ours(rest))
    });
    counters.map(|(_, value)| value).sum()
}

fn numbers(stats: &str) -> impl Iterator<Item = (&str, u64)> {
    stats.lines().filter_map(|line| {
        let (name, value) = line.rsplit_once(": ")?;
        Some((name, value.parse().ok()?))
    })
}

/// Of the admin interface and of whoever scrapes metrics.
fn is_ours(name: &str) -> bool {
    name.starts_with("admin.") || name.starts_with("metrics.")
}

fn is_the_applications(gauge: &str) -> bool {
    let Some((whose, name)) = gauge.split_once('.') else {
        return false;
    };
    match whose {
        "http" => gauge.ends_with(".downstream_rq_active") && !is_ours(name),
        "cluster" => {
            gauge.ends_with(".upstream_cx_active")
                && (name.starts_with("inbound|") || name.starts_with("InboundPassthroughCluster"))
        }
        "listener" => {
            let is_inbound = name.split('.').any(|part| {
                part.ends_with(&format!("_{INBOUND_PORT}"))
                    || part == "virtualInbound"
                    || part == "inbound"
            });
            gauge.ends_with(".downstream_cx_active") && !is_ours(name) && !is_inbound
        }
        _ => false,
    }
}

impl Busy {
    /// Whether nobody has anything to do.
    pub fn is_quiet(&self) -> bool {
        self.ports.is_empty() && self.open.is_empty()
    }
}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = self.ports.iter().map(|port| format!("port {port} listens"));
        let open = self
            .open
            .iter()
            .map(|(name, value)| format!("{name} {value}"));
        f.write_str(&ports.chain(open).collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOCKETS: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1 1 0
   1: 00000000:3AAD 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1337        0 2 1 0
   2: 0100007F:1F91 0100007F:9C40 01 00000000:00000000 00:00000000 00000000  1000        0 3 1 0
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:2382 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4 1 0
";

    #[test]
    fn the_applications_ports_are_those_it_told_of_or_those_of_others() {
        let settings = |ports: &str| {
            Settings::read(|name| match name {
                "MALHA_PORTS" => Some(ports.to_owned()),
                "MALHA_CONTROL_PLANE" => Some("malha:1".to_owned()),
                "POD_IPS" => Some("10.0.0.1".to_owned()),
                "POD_NAME" | "POD_NAMESPACE" | "SERVICE_ACCOUNT" => Some("x".to_owned()),
                _ => None,
            })
            .expect("settings")
        };
        let told = settings(r#"[{"containerPort":8080},{"containerPort":9999}]"#);
        assert_eq!(listening(SOCKETS, &told, 1337), BTreeSet::from([8080]));
        let silent = settings("[]");
        assert_eq!(
            listening(SOCKETS, &silent, 1337),
            BTreeSet::from([8080, 9090])
        );
    }

    #[test]
    fn only_what_is_the_applications_keeps_the_pod() {
        let stats = "\
cluster.inbound|8080||;.upstream_cx_active: 1
cluster.outbound|80||web.shop.svc.cluster.local;.upstream_cx_active: 7
cluster.xds;.upstream_cx_active: 1
http.admin.downstream_rq_active: 1
http.metrics.downstream_rq_active: 1
http.inbound_0.0.0.0_8080.downstream_rq_active: 2
http.inbound_0.0.0.0_8080.downstream_cx_active: 3
http.inbound_0.0.0.0_8080.downstream_rq_total: 9
http.outbound_0.0.0.0_80.downstream_rq_total: 3
http.admin.downstream_rq_total: 70
http.metrics.downstream_rq_total: 4
listener.admin.downstream_cx_active: 1
listener.admin.main_thread.downstream_cx_active: 1
listener.metrics.downstream_cx_active: 1
listener.0.0.0.0_15006.downstream_cx_active: 3
listener.0.0.0.0_15006.worker_0.downstream_cx_active: 3
listener.[__]_15006.downstream_cx_active: 3
listener.0.0.0.0_15001.downstream_cx_active: 4
listener.0.0.0.0_80.downstream_cx_active: 0
";
        assert_eq!(requests(stats), 12);
        let names: Vec<_> = open(stats).into_iter().map(|(name, _)| name).collect();
        assert_eq!(
            names,
            [
                "cluster.inbound|8080||;.upstream_cx_active",
                "http.inbound_0.0.0.0_8080.downstream_rq_active",
                "listener.0.0.0.0_15001.downstream_cx_active",
            ]
        );
    }
}
