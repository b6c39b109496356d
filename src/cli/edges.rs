//! `malha edges`: who calls whom, as whom, how often, with what success.
//!
//! `/stats/prometheus` of each agent, twice -> [`Scrape`]s -> [`edges`] -> rows
//!
//! Every call between two meshed pods is counted twice, by the caller's proxy and by the server's. The caller's count
//! stands; the server's is shown where no caller was asked: a client outside the mesh, or in a namespace that is not
//! looked at.

mod exposition;
mod histogram;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use self::{exposition::samples, histogram::Histogram};
use super::{
    Exit, Failure, Terminal,
    cluster::{self, Cluster, ClusterArgs, PodName, ScopeArgs},
    exit::OrExit as _,
    terminal::{table, whole},
};
use crate::config::parse_duration;

const REQUESTS: &str = "istio_requests_total";
const BUCKETS: &str = "istio_request_duration_milliseconds_bucket";
/// How many pods are asked at once: the API server carries every byte.
const AT_ONCE: usize = 16;

/// Show who calls whom: by mutual TLS or not, as whom, how often, how well.
///
/// Reads the metrics of each proxy twice, through the API server's pod proxy (the right to get pods/proxy is the
/// operator's own); no Prometheus is needed. HTTP and gRPC calls are counted; plain TCP has no requests.
///
/// Exit codes: 0; 69 where the cluster does not answer, or no proxy could be asked.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    scope: ScopeArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The time between the two readings; 0s reads once and shows totals since each proxy's start.
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = parse_window)]
    window: Duration,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// One row a pair.
    Table,
    /// With whole identities, medians and totals.
    Wide,
    /// One object.
    Json,
}

fn parse_window(text: &str) -> Result<Duration, String> {
    match text {
        "0" | "0s" => Ok(Duration::ZERO),
        text => parse_duration(text),
    }
}

/// A proxy that is asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Asked {
    pod: PodName,
    /// `NAMESPACE/OWNER`: what the pod belongs to.
    workload: String,
}

/// What one proxy told, once or twice.
#[derive(Clone, Debug)]
struct Scrape {
    asked: Asked,
    /// Calls since the proxy's start.
    total: Counts,
    /// Calls of the window, and its length.
    recent: Option<(Counts, Duration)>,
}

/// Calls by who makes them and who answers, as the proxy labels them.
type Counts = BTreeMap<Call, Tally>;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Call {
    by_source: bool,
    source: Option<String>,
    destination: Option<String>,
    service: Option<String>,
    /// The server's word on mutual TLS; the caller's is that both identities are known.
    mutual: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Tally {
    requests: f64,
    failures: f64,
    durations: Histogram,
}

impl Tally {
    fn merge(&mut self, other: &Self) {
        self.requests += other.requests;
        self.failures += other.failures;
        self.durations.merge(&other.durations);
    }
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let Told { scrapes, silent } = cluster::block_on(ask(&args))?;
    for (pod, why) in silent.iter().take(5) {
        terminal.note(&format!("warning: pod {pod} could not be asked: {why}"));
    }
    if silent.len() > 5 {
        terminal.note(&format!(
            "warning: {} more pods could not be asked",
            silent.len() - 5
        ));
    }
    if scrapes.is_empty() && !silent.is_empty() {
        return Err(Exit::Unreachable.because(anyhow!(
            "none of {} proxies could be asked for its metrics; the right to get pods/proxy is needed",
            silent.len()
        )));
    }
    let edges = edges(&scrapes);
    match args.output {
        Format::Json => terminal.result(&format!("{:#}\n", to_json(&edges, args.window)))?,
        _ if edges.is_empty() => terminal.note(&format!(
            "{} proxies tell of no HTTP call yet; -A looks at all namespaces",
            scrapes.len()
        )),
        _ => {
            let wide = args.output == Format::Wide;
            terminal.styled(&table(&rows(&edges, wide, args.window.is_zero())))?;
        }
    }
    Ok(Exit::Done)
}

struct Told {
    scrapes: Vec<Scrape>,
    silent: Vec<(PodName, String)>,
}

async fn ask(args: &Args) -> Result<Told, Failure> {
    let cluster = args.cluster.connect().await?;
    let scope = args.scope.of(Some(cluster.namespace()));
    let pods = cluster
        .pods(scope.as_deref())
        .await
        .or_exit(Exit::Unreachable)?;
    let meshed = pods
        .iter()
        .filter(|pod| cluster::runs_in_mesh(pod))
        .map(asked);
    let answers = stream::iter(meshed)
        .map(|asked| scrape(&cluster, asked, args.window))
        .buffer_unordered(AT_ONCE);
    let mut told = Told {
        scrapes: Vec::new(),
        silent: Vec::new(),
    };
    for answer in answers.collect::<Vec<_>>().await {
        match answer {
            Ok(scrape) => told.scrapes.push(scrape),
            Err((pod, why)) => told.silent.push((pod, whole(&why))),
        }
    }
    Ok(told)
}

fn asked(pod: &Pod) -> Asked {
    let name = PodName::of(pod);
    Asked {
        workload: format!("{}/{}", name.namespace, owner(pod).unwrap_or(&name.name)),
        pod: name,
    }
}

/// `web` of `apps/v1/Deployment/web`, which the injector has told the sidecar.
fn owner(pod: &Pod) -> Option<&str> {
    let spec = pod.spec.as_ref()?;
    let mut containers = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers);
    let sidecar = containers.find(|container| container.name == "malha-proxy")?;
    let mut variables = sidecar.env.iter().flatten();
    let owner = variables.find(|variable| variable.name == "MALHA_OWNER")?;
    owner
        .value
        .as_deref()?
        .rsplit('/')
        .next()
        .filter(|name| !name.is_empty())
}

async fn scrape(
    cluster: &Cluster,
    asked: Asked,
    window: Duration,
) -> Result<Scrape, (PodName, anyhow::Error)> {
    let once = async || -> anyhow::Result<(Counts, Instant)> {
        let text = cluster.metrics(&asked.pod).await?;
        Ok((count(&text)?, Instant::now()))
    };
    let twice = async {
        let (first, began) = once().await?;
        if window.is_zero() {
            return Ok((first, None));
        }
        tokio::time::sleep(window).await;
        let (second, ended) = once().await?;
        let recent = (since(&first, &second), ended - began);
        Ok((second, Some(recent)))
    };
    match twice.await {
        Ok((total, recent)) => Ok(Scrape {
            asked,
            total,
            recent,
        }),
        Err(why) => Err((asked.pod, why)),
    }
}

/// Sorts the samples of one exposition by call.
fn count(text: &str) -> anyhow::Result<Counts> {
    let wanted = samples(text, |name| name == REQUESTS || name == BUCKETS)
        .context("the proxy's metrics cannot be read")?;
    let mut counts = Counts::new();
    for sample in wanted {
        let label = |name: &str| {
            let value = sample.labels.get(name)?;
            let said = !matches!(value.as_str(), "" | "-" | "unknown");
            said.then(|| value.clone())
        };
        let by_source = label("reporter").as_deref() == Some("source");
        let (source, destination) = (label("source_principal"), label("destination_principal"));
        let mutual = match by_source {
            true => source.is_some() && destination.is_some(),
            false => label("connection_security_policy").as_deref() == Some("mutual_tls"),
        };
        let call = Call {
            service: service(
                label("destination_service"),
                label("destination_service_namespace"),
            ),
            by_source,
            source,
            destination,
            mutual,
        };
        let tally = counts.entry(call).or_default();
        if sample.name == BUCKETS {
            let le = sample
                .labels
                .get("le")
                .context("a bucket without a bound")?;
            tally.durations.add(le, sample.value);
        } else {
            tally.requests += sample.value;
            if failed(label("response_code").as_deref()) {
                tally.failures += sample.value;
            }
        }
    }
    Ok(counts)
}

/// 5xx, and 0: no response at all.
fn failed(code: Option<&str>) -> bool {
    code.is_none_or(|code| code == "0" || (code.len() == 3 && code.starts_with('5')))
}

/// `shop/cart` of `cart.shop.svc.cluster.local`; a name outside the cluster is itself.
fn service(host: Option<String>, namespace: Option<String>) -> Option<String> {
    let host = host?;
    let mut parts = host.split('.');
    let name = parts.next().unwrap_or_default();
    match (parts.next(), parts.next(), namespace) {
        (Some(namespace), Some("svc"), _) => Some(format!("{namespace}/{name}")),
        (None, _, Some(namespace)) => Some(format!("{namespace}/{name}")),
        _ => Some(host),
    }
}

/// What came between two readings. A counter that fell began anew with the proxy.
fn since(first: &Counts, second: &Counts) -> Counts {
    let nothing = Tally::default();
    let counts = second.iter().map(|(call, now)| {
        let before = first
            .get(call)
            .filter(|before| before.requests <= now.requests);
        (call.clone(), now.since(before.unwrap_or(&nothing)))
    });
    counts.collect()
}

impl Tally {
    fn since(&self, before: &Self) -> Self {
        Self {
            requests: self.requests - before.requests,
            failures: (self.failures - before.failures).max(0.0),
            durations: self.durations.since(&before.durations),
        }
    }
}

/// One line of the answer.
#[derive(Clone, Debug, Default)]
struct Edge {
    total: Tally,
    recent: Tally,
    rate: f64,
    sources: BTreeSet<String>,
    destinations: BTreeSet<String>,
    /// Whether calls came by mutual TLS, and whether others did not.
    mutual: bool,
    plain: bool,
    /// Only the server's proxy tells of it.
    by_server: bool,
}

/// By client and server.
type Edges = BTreeMap<(String, String), Edge>;

fn edges(scrapes: &[Scrape]) -> Edges {
    let mut told_by_source = BTreeSet::new();
    for scrape in scrapes {
        let by_source = scrape.total.keys().filter(|call| call.by_source);
        told_by_source.extend(by_source.map(|call| (&call.source, &call.service)));
    }
    let mut edges = Edges::new();
    for scrape in scrapes {
        for (call, total) in &scrape.total {
            let known_twice = !call.by_source
                && call.source.is_some()
                && told_by_source.contains(&(&call.source, &call.service));
            if !known_twice {
                let edge = edges.entry(ends(call, &scrape.asked)).or_default();
                edge.add(call, total, scrape.recent.as_ref());
            }
        }
    }
    edges
}

/// The names of client and server.
fn ends(call: &Call, asked: &Asked) -> (String, String) {
    let unknown = || "unknown".to_owned();
    let service = call.service.clone();
    if call.by_source {
        let account = call.destination.as_deref().map(account);
        return (
            asked.workload.clone(),
            service.or(account).unwrap_or_else(unknown),
        );
    }
    let client = call.source.as_deref().map(account).unwrap_or_else(unknown);
    (client, service.unwrap_or_else(|| asked.workload.clone()))
}

/// `shop/web` of `spiffe://cluster.local/ns/shop/sa/web`; another id is itself.
fn account(id: &str) -> String {
    let parsed = || {
        let (_, path) = id.strip_prefix("spiffe://")?.split_once("/ns/")?;
        let (namespace, account) = path.split_once("/sa/")?;
        Some(format!("{namespace}/{account}"))
    };
    parsed().unwrap_or_else(|| id.to_owned())
}

impl Edge {
    fn add(&mut self, call: &Call, total: &Tally, recent: Option<&(Counts, Duration)>) {
        self.total.merge(total);
        if let Some((counts, window)) = recent
            && let Some(tally) = counts.get(call)
        {
            self.recent.merge(tally);
            self.rate += tally.requests / window.as_secs_f64().max(0.001);
        }
        self.sources.extend(call.source.clone());
        self.destinations.extend(call.destination.clone());
        self.mutual |= call.mutual;
        self.plain |= !call.mutual;
        self.by_server = !call.by_source;
    }

    fn mtls(&self) -> &'static str {
        match (self.mutual, self.plain) {
            (true, false) => "yes",
            (true, true) => "partly",
            (false, _) => "no",
        }
    }

    /// What rates and quantiles are taken of.
    fn tally(&self, totals: bool) -> &Tally {
        if totals { &self.total } else { &self.recent }
    }

    fn identities(&self, wide: bool) -> String {
        let side = |ids: &BTreeSet<String>| {
            let ids: Vec<_> = ids
                .iter()
                .map(|id| if wide { id.clone() } else { account(id) })
                .collect();
            match ids.is_empty() {
                true => "-".to_owned(),
                false => ids.join(","),
            }
        };
        format!("{} -> {}", side(&self.sources), side(&self.destinations))
    }
}

impl Tally {
    /// `99.5 %`; rounded down, so that one failure in a million calls is not 100.
    fn success(&self) -> Option<f64> {
        (self.requests > 0.0).then(|| (self.requests - self.failures) / self.requests)
    }
}

fn rows(edges: &Edges, wide: bool, totals: bool) -> Vec<Vec<String>> {
    let often = if totals { "REQUESTS" } else { "RPS" };
    let mut head = vec![
        "CLIENT",
        "SERVER",
        "MTLS",
        "IDENTITIES",
        often,
        "SUCCESS",
        "P99",
    ];
    if wide {
        head.extend(["P50", "TOTAL", "TOLD BY"]);
    }
    let head = head.into_iter().map(str::to_owned).collect();
    let rows = edges.iter().map(|((client, server), edge)| {
        let tally = edge.tally(totals);
        let often = match totals {
            true => format!("{:.0}", tally.requests),
            false => format!("{:.1}", edge.rate),
        };
        let dash = || "-".to_owned();
        let quantile = |share| {
            tally
                .durations
                .quantile(share)
                .map_or_else(dash, milliseconds)
        };
        let mut row = vec![
            client.clone(),
            server.clone(),
            edge.mtls().to_owned(),
            edge.identities(wide),
            often,
            tally.success().map_or_else(dash, percent),
            quantile(0.99),
        ];
        if wide {
            row.extend([
                quantile(0.5),
                format!("{:.0}", edge.total.requests),
                if edge.by_server { "server" } else { "client" }.to_owned(),
            ]);
        }
        row
    });
    std::iter::once(head).chain(rows).collect()
}

fn percent(share: f64) -> String {
    format!("{:.1} %", (share * 1000.0).floor() / 10.0)
}

fn milliseconds(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.1} ms"),
        value => format!("{value:.0} ms"),
    }
}

fn to_json(edges: &Edges, window: Duration) -> Value {
    let totals = window.is_zero();
    let items: Vec<_> = edges
        .iter()
        .map(|((client, server), edge)| {
            let tally = edge.tally(totals);
            json!({
                "client": client,
                "server": server,
                "mtls": edge.mtls(),
                "clientIdentities": edge.sources,
                "serverIdentities": edge.destinations,
                "toldBy": if edge.by_server { "server" } else { "client" },
                "totalRequests": edge.total.requests,
                "requests": tally.requests,
                "requestsPerSecond": (!totals).then_some(edge.rate),
                "success": tally.success(),
                "p50Milliseconds": tally.durations.quantile(0.5),
                "p99Milliseconds": tally.durations.quantile(0.99),
            })
        })
        .collect();
    json!({
        "apiVersion": "malha/v1",
        "kind": "EdgeList",
        "windowSeconds": window.as_secs_f64(),
        "items": items,
    })
}

#[cfg(test)]
mod tests;
