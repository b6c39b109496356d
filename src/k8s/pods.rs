//! Which pods of the mesh run without a sidecar, or with an old one, and why.
//!
//! ```text
//! World ──> survey ──> gauge `malha_injector_pods`
//!             │  a pod without a sidecar is read once per template of its owner
//!             └─> Inquiry ──> inject (the same code as the webhook's) ──> reason ──> Event on the owner
//! ```
//!
//! Only the leader does this, off the request path: the webhook itself tells nobody, so that a dry run has no effect and a
//! thousand pods are not a thousand Events. One Event is told per owner, generation of its template, and reason.

mod survey;

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{Client, api::GetParams, core::Request};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use self::survey::{Counts, Found, Sighting, Subject, survey};
use super::{
    ApiError, ask,
    events::{Kind, Note, Notes},
    lease::Claim,
    world::World,
};
use crate::{
    clock::Clock,
    inject::{Call, ClusterFacts, Entry, Injector, SkipReason, Verdict},
};

/// Changes within this time are looked at together.
const SETTLE: Duration = Duration::from_secs(1);

/// A look takes at most one part in so many of a core, however many pods there are.
const SHARE: u32 = 50;

/// Pods read in one look: a big namespace that was just labelled is a matter of seconds, not of a storm.
const READ_AT_ONCE: usize = 20;

/// A pod older than this is no news: what happened to it was told when it happened, maybe by another replica.
const NEWS: SignedDuration = SignedDuration::from_mins(10);

/// `malha_injector_pods`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pods: Family<Labels, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    state: &'static str,
    namespace: String,
}

impl Metrics {
    /// Makes them known to the scraper.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "malha_injector_pods",
            "Pods of the mesh's namespaces that carry the sidecar, should and do not, or carry another one than configured; told by the leader",
            self.pods.clone(),
        );
    }
}

/// Everything that watching over the pods takes.
pub struct Watch {
    /// The cluster.
    pub client: Client,
    /// What is known of it.
    pub world: Arc<World>,
    /// The webhook's own settings and code.
    pub injector: Arc<ArcSwap<Injector>>,
    /// Only while it stands, anything is read, counted or told.
    pub claim: Claim,
    /// Where it is told.
    pub notes: Notes,
    /// What is counted.
    pub metrics: Metrics,
    /// The time.
    pub clock: Clock,
    /// The end.
    pub stop: CancellationToken,
}

/// Watches over the pods until `stop`.
pub fn keep(watch: Watch) -> impl Future<Output = ()> + Send {
    let stop = watch.stop.clone();
    let overseer = Overseer {
        watch,
        told: HashSet::new(),
        findings: HashMap::new(),
        judged_by: None,
        namespaces: HashSet::new(),
        pause: SETTLE,
    };
    async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = overseer.run() => {}
        }
    }
}

struct Overseer {
    watch: Watch,
    /// What was told, as long as such a pod is there.
    told: HashSet<(Subject, &'static str)>,
    /// Why pods of a template have no sidecar.
    findings: HashMap<Subject, Finding>,
    /// The injector that judged them.
    judged_by: Option<Arc<Injector>>,
    /// Namespaces with a gauge.
    namespaces: HashSet<String>,
    /// The time between two looks.
    pause: Duration,
}

/// Why a pod that an entry selects has no sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Finding {
    /// It is one of those that are left alone.
    Skipped(SkipReason),
    /// It should have one.
    Missing(String),
}

impl Overseer {
    async fn run(mut self) {
        let mut changes = self.watch.world.changes();
        let mut leading = self.watch.claim.watch();
        changes.mark_changed();
        loop {
            tokio::select! {
                Ok(()) = changes.changed() => {}
                Ok(()) = leading.changed() => {}
                // the claim may stand again without having been told anew
                () = sleep(Duration::from_secs(30)) => {}
            }
            while self.look().await {
                sleep(self.pause).await;
            }
            sleep(self.pause).await;
        }
    }

    /// One look at every pod; whether another is needed soon.
    async fn look(&mut self) -> bool {
        if !self.watch.claim.stands() {
            self.forget();
            return false;
        }
        if !self.watch.world.synced() {
            return true;
        }
        let injector = self.watch.injector.load_full();
        self.judge_anew(&injector);
        let began = Instant::now();
        let sightings = survey(&self.watch.world, injector.settings());
        self.pause = SETTLE.max(began.elapsed() * SHARE);
        self.sweep(&sightings);
        let more = self.inquire(&sightings, &injector).await;
        if !self.watch.claim.stands() {
            return false;
        }
        self.count(&sightings);
        let queue_full = !self.tell_all(&sightings);
        more || queue_full
    }

    /// Who does not lead knows nothing: the next leader may have told and counted meanwhile.
    fn forget(&mut self) {
        self.told.clear();
        self.findings.clear();
        self.watch.metrics.pods.clear();
        self.namespaces.clear();
    }

    /// Other settings may give other reasons.
    fn judge_anew(&mut self, injector: &Arc<Injector>) {
        let same = self
            .judged_by
            .as_ref()
            .is_some_and(|judge| Arc::ptr_eq(judge, injector));
        if !same {
            self.findings.clear();
            self.judged_by = Some(injector.clone());
        }
    }

    /// Templates without pods are forgotten, so that memory follows the cluster.
    fn sweep(&mut self, sightings: &[Sighting]) {
        let present: HashSet<&Subject> =
            sightings.iter().map(|sighting| &sighting.subject).collect();
        self.told.retain(|(subject, _)| present.contains(subject));
        self.findings.retain(|subject, _| present.contains(subject));
    }

    /// Finds out about templates that nobody looked at yet; whether some are left.
    async fn inquire(&mut self, sightings: &[Sighting], injector: &Injector) -> bool {
        let mut reads = 0;
        for sighting in sightings {
            let Found::Without(entry) = sighting.found else {
                continue;
            };
            if self.findings.contains_key(&sighting.subject) {
                continue;
            }
            if reads == READ_AT_ONCE {
                return true;
            }
            reads += 1;
            match self.read(sighting).await {
                Ok(Some(pod)) => {
                    let finding = self.judge(&pod, sighting, entry, injector);
                    self.findings.insert(sighting.subject.clone(), finding);
                }
                // gone meanwhile; the watch will tell
                Ok(None) => {}
                Err(error) => {
                    debug!(%error, pod = sighting.pod, namespace = sighting.namespace, "a pod could not be read");
                    return true;
                }
            }
        }
        false
    }

    /// The pod as it is stored, raw: the injector reads no typed round trip.
    async fn read(&self, sighting: &Sighting) -> Result<Option<String>, ApiError> {
        let path = format!("/api/v1/namespaces/{}/pods", sighting.namespace);
        let request = Request::new(path).get(&sighting.pod, &GetParams::default());
        let request =
            request.map_err(|error| ApiError::Refused(kube::Error::BuildRequest(error)))?;
        match ask(self.watch.client.request_text(request)).await {
            Ok(pod) => Ok(Some(pod)),
            Err(error) if error.code() == Some(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn judge(&self, pod: &str, sighting: &Sighting, entry: Entry, injector: &Injector) -> Finding {
        let call = Call {
            entry,
            namespace: &sighting.namespace,
            oldest_kubelet: self.watch.world.oldest_kubelet(),
        };
        match injector.inject(pod.as_bytes(), &call) {
            Ok(answer) => finding(answer.verdict),
            Err(error) => Finding::Missing(format!("It cannot be read: {error}.")),
        }
    }

    fn count(&mut self, sightings: &[Sighting]) {
        let mut counts: HashMap<&str, Counts> = HashMap::new();
        for sighting in sightings {
            let here = counts.entry(&sighting.namespace).or_default();
            match (&sighting.found, self.findings.get(&sighting.subject)) {
                (Found::Current, _) => here.injected += 1,
                (Found::Stale, _) => here.stale += 1,
                (Found::Without(_), Some(Finding::Missing(_))) => here.missing += 1,
                (Found::Without(_), _) | (Found::Skipped(_), _) => {}
            }
        }
        let gauges = &self.watch.metrics.pods;
        let labels = |state, namespace: &str| Labels {
            state,
            namespace: namespace.to_owned(),
        };
        for (namespace, counts) in &counts {
            for (state, count) in counts.states() {
                gauges.get_or_create(&labels(state, namespace)).set(count);
            }
        }
        for namespace in self
            .namespaces
            .iter()
            .filter(|it| !counts.contains_key(it.as_str()))
        {
            for (state, _) in Counts::default().states() {
                gauges.remove(&labels(state, namespace));
            }
        }
        self.namespaces = counts.into_keys().map(str::to_owned).collect();
    }

    /// Tells what was not told yet; false where the queue had no room for all of it.
    fn tell_all(&mut self, sightings: &[Sighting]) -> bool {
        let now = self.watch.clock.now();
        for sighting in sightings {
            let finding = self.findings.get(&sighting.subject);
            let Some(story) = story(sighting, finding, now) else {
                continue;
            };
            let key = (sighting.subject.clone(), story.code);
            if self.told.contains(&key) {
                continue;
            }
            if !self.watch.notes.tell(story.into_note(sighting)) {
                return false;
            }
            self.told.insert(key);
        }
        true
    }
}

fn finding(verdict: Verdict) -> Finding {
    match verdict {
        Verdict::Skip(reason) => Finding::Skipped(reason),
        Verdict::Patch(_) => Finding::Missing(
            "It was created before its namespace was selected, or while the webhook was away. Create it anew to \
             bring it into the mesh."
                .to_owned(),
        ),
        Verdict::Deny(denial) => Finding::Missing(format!(
            "Created anew, it would be refused ({}): {}",
            denial.reason, denial.message
        )),
    }
}

/// What there is to tell about a pod.
struct Story {
    kind: Kind,
    reason: &'static str,
    /// The reason's code, one story per subject and code.
    code: &'static str,
    text: String,
}

fn story(sighting: &Sighting, finding: Option<&Finding>, now: Timestamp) -> Option<Story> {
    let news = sighting
        .created
        .is_some_and(|created| now.duration_since(created) < NEWS);
    let pod = &sighting.pod;
    match (&sighting.found, finding) {
        (Found::Current | Found::Stale, _) if news => Some(Story {
            kind: Kind::Normal,
            reason: "SidecarInjected",
            code: "Injected",
            text: format!("Pod {pod} and those of the same template run with Malha's sidecar."),
        }),
        (Found::Skipped(reason), _) | (Found::Without(_), Some(Finding::Skipped(reason)))
            if news =>
        {
            Some(Story {
                kind: Kind::Normal,
                reason: "InjectionSkipped",
                code: reason.as_str(),
                text: format!(
                    "{reason}: pod {pod} and those of the same template run without Malha's sidecar."
                ),
            })
        }
        (Found::Without(_), Some(Finding::Missing(why))) => Some(Story {
            kind: Kind::Warning,
            reason: "InjectionFailed",
            code: "Missing",
            text: format!("Pod {pod} should run with Malha's sidecar and does not. {why}"),
        }),
        _ => None,
    }
}

impl Story {
    fn into_note(self, sighting: &Sighting) -> Note {
        Note {
            regarding: regarding(sighting),
            kind: self.kind,
            reason: self.reason,
            action: "Inject",
            text: self.text,
            distinction: format!("{} {}", sighting.subject.template, self.code),
        }
    }
}

/// The owner, where people look; a pod of its own is told about itself.
fn regarding(sighting: &Sighting) -> ObjectReference {
    let namespace = Some(sighting.namespace.clone());
    match &sighting.owner {
        Some(owner) => ObjectReference {
            api_version: Some(owner.api_version.as_ref().to_owned()),
            kind: Some(owner.kind.as_ref().to_owned()),
            name: Some(owner.name.as_ref().to_owned()),
            uid: Some(owner.uid.as_ref().to_owned()),
            namespace,
            ..ObjectReference::default()
        },
        None => ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(sighting.pod.clone()),
            uid: Some(sighting.subject.uid.as_ref().to_owned()),
            namespace,
            ..ObjectReference::default()
        },
    }
}
