//! Requests and limits of what is injected, so that quotas accept the pod and its QoS class stays.

use serde_json::Value;

use super::{
    Denial,
    annotations::{Wishes, invalid},
    lax::{Slot, write_text},
    ours,
    patch::{Operations, Pointer},
    pod::{Amount, Amounts, Container, PodView, Resources},
    quantity::Quantity,
    record::Record,
    settings::{AmountSettings, InjectSettings, ResourceSettings},
};

/// A pod's class, as `k8s.io/kubernetes/pkg/apis/core/v1/helper/qos` computes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

/// What both of our containers ask for.
#[derive(Debug)]
pub(super) struct Shares {
    pub(super) proxy: ResourceSettings,
    pub(super) init: ResourceSettings,
}

/// Settings, annotations and the pod's class decide.
///
/// # Errors
/// When annotations give a request above a limit.
pub(super) fn shares(
    pod: &PodView<'_>,
    wishes: &Wishes<'_>,
    settings: &InjectSettings,
) -> Result<Shares, Denial> {
    let guaranteed = qos(pod) == Qos::Guaranteed;
    let proxy = proxy_share(wishes, settings, guaranteed)?;
    let mut init = settings.init.resources.clone();
    if guaranteed {
        let pair = &settings.proxy.guaranteed;
        init.limits.cpu = init.limits.cpu.or_else(|| pair.cpu.clone());
        init.limits.memory = init.limits.memory.or_else(|| pair.memory.clone());
        init.requests = init.limits.clone();
    } else if is_empty(&proxy) {
        init = ResourceSettings::default(); // the operator wants BestEffort pods to stay so
    }
    Ok(Shares { proxy, init })
}

fn proxy_share(
    wishes: &Wishes<'_>,
    settings: &InjectSettings,
    guaranteed: bool,
) -> Result<ResourceSettings, Denial> {
    let proxy = &settings.proxy;
    let (requests, limits) = match guaranteed {
        true => (&proxy.guaranteed, &proxy.guaranteed),
        false => (&proxy.resources.requests, &proxy.resources.limits),
    };
    let cpu = merged(
        (requests.cpu.clone(), limits.cpu.clone()),
        (wishes.cpu_request.clone(), wishes.cpu_limit.clone()),
        guaranteed,
    );
    let memory = merged(
        (requests.memory.clone(), limits.memory.clone()),
        (wishes.memory_request.clone(), wishes.memory_limit.clone()),
        guaranteed,
    );
    let (cpu_request, cpu_limit) = cpu.map_err(|it| it.denial("sidecar.istio.io/proxyCPU"))?;
    let (memory_request, memory_limit) =
        memory.map_err(|it| it.denial("sidecar.istio.io/proxyMemory"))?;
    Ok(ResourceSettings {
        requests: AmountSettings {
            cpu: cpu_request,
            memory: memory_request,
        },
        limits: AmountSettings {
            cpu: cpu_limit,
            memory: memory_limit,
        },
    })
}

/// A request and a limit.
type Pair = (Option<Quantity>, Option<Quantity>);

/// Both were asked for, and the request is above the limit.
struct Contradiction {
    request: Quantity,
    limit: Quantity,
}

impl Contradiction {
    fn denial(&self, annotation: &str) -> Denial {
        let allowed = format!("at most {annotation}Limit, which is {}", self.limit);
        invalid(annotation, self.request.as_str(), &allowed)
    }
}

/// One resource's request and limit: each is merged by itself, and what was not asked for gives way only where it would
/// contradict what was. A limit of 0 is none. Where the pod is Guaranteed both stay equal.
fn merged(default: Pair, asked: Pair, guaranteed: bool) -> Result<Pair, Contradiction> {
    let (default_request, default_limit) = (default.0, default.1.filter(|limit| !limit.is_zero()));
    Ok(match asked {
        (None, None) => (default_request, default_limit),
        (Some(request), None) => {
            let fits = |limit: &Quantity| !guaranteed && request <= *limit;
            let limit =
                default_limit.map(|limit| if fits(&limit) { limit } else { request.clone() });
            (Some(request), limit.filter(|limit| !limit.is_zero()))
        }
        (request, Some(limit)) if limit.is_zero() => (request.or(default_request), None),
        (None, Some(limit)) => {
            let fits = |request: &Quantity| !guaranteed && *request <= limit;
            let request = default_request.map(|request| {
                if fits(&request) {
                    request
                } else {
                    limit.clone()
                }
            });
            (request, Some(limit))
        }
        (Some(request), Some(limit)) if request > limit => {
            return Err(Contradiction { request, limit });
        }
        both => both,
    })
}

fn is_empty(resources: &ResourceSettings) -> bool {
    let none = |amount: &AmountSettings| amount.cpu.is_none() && amount.memory.is_none();
    none(&resources.requests) && none(&resources.limits)
}

/// Writes `{"limits":{..},"requests":{..}}`; nothing for what is not set.
pub(super) fn write(resources: &ResourceSettings, out: &mut String) {
    out.push('{');
    for (name, amount) in [
        ("limits", &resources.limits),
        ("requests", &resources.requests),
    ] {
        let values = [("cpu", &amount.cpu), ("memory", &amount.memory)];
        let mut present = values
            .iter()
            .filter_map(|(key, value)| Some((key, value.as_ref()?)))
            .peekable();
        if present.peek().is_none() {
            continue;
        }
        if !out.ends_with('{') {
            out.push(',');
        }
        write_text(name, out);
        out.push_str(":{");
        for (key, value) in present {
            if !out.ends_with('{') {
                out.push(',');
            }
            write_text(key, out);
            out.push(':');
            write_text(value.as_str(), out);
        }
        out.push('}');
    }
    out.push('}');
}

/// Where the pod has resources of its own, the sidecar's share is added to each value that is there.
///
/// A pod's request must not be below the sum of its containers', nor its limit below any one's; the init container
/// runs before the sidecar or beside it, so the larger of the two is added.
pub(super) fn pad_pod(
    pod: &PodView<'_>,
    shares: &Shares,
    record: &mut Record,
    operations: &mut Operations,
) {
    let Some(own) = pod.spec.present().and_then(|spec| spec.resources.present()) else {
        return;
    };
    for key in ["cpu", "memory"] {
        let (limit, request) = (find(&own.limits, key), find(&own.requests, key));
        for (side, own, ours) in [
            ("limits", limit, Share::of(shares, key, limit_of)),
            ("requests", request, Share::of(shares, key, request_of)),
        ] {
            if let Some((own, quantity)) = own.and_then(|own| Some((own, read(own)?)))
                && let Some(padded) = ours
                    .added_to(&quantity)
                    .filter(|padded| *padded != quantity)
            {
                let pointer = Pointer::new(&["spec", "resources", side, key]);
                operations.add_text(&pointer, padded.as_str());
                record.resource(side, key, own.value());
            }
        }
    }
    keep_defaulted_requests(pod, own, shares, record, operations);
}

/// Kubernetes defaults a pod's request to its limit where no container asks for the resource. Ours ask, and would turn
/// the reservation into theirs alone, so the request is written as it would have been, with ours.
///
/// Before a webhook is called the API server has filled it in; a manifest is read without.
fn keep_defaulted_requests(
    pod: &PodView<'_>,
    own: &Resources<'_>,
    shares: &Shares,
    record: &mut Record,
    operations: &mut Operations,
) {
    if own.requests.is_odd() {
        return;
    }
    let mut missing = own.requests.is_missing();
    let requests = Pointer::new(&["spec", "resources", "requests"]);
    for key in ["cpu", "memory"] {
        let ours = Share::of(shares, key, request_of);
        let defaulted = find(&own.requests, key).is_none() && !ours.is_nothing();
        if !defaulted
            || pod
                .all_containers()
                .any(|container| asks_for(container, key))
        {
            continue;
        }
        let limit = find(&own.limits, key).and_then(read);
        let Some(request) = limit.and_then(|limit| ours.added_to(&limit)) else {
            continue;
        };
        if missing {
            operations.add(&requests, "{}");
            missing = false;
        }
        operations.add_text(&requests.key(key), request.as_str());
        record.resource("requests", key, Value::Null);
    }
}

fn asks_for(container: &Container<'_>, key: &str) -> bool {
    container.resources.present().is_some_and(|resources| {
        find(&resources.requests, key).is_some() || find(&resources.limits, key).is_some()
    })
}

/// What ours ask for of one resource.
struct Share<'s> {
    proxy: Option<&'s Quantity>,
    init: Option<&'s Quantity>,
}

impl<'s> Share<'s> {
    fn of(
        shares: &'s Shares,
        key: &str,
        side: fn(&'s ResourceSettings, &str) -> Option<&'s Quantity>,
    ) -> Self {
        Self {
            proxy: side(&shares.proxy, key),
            init: side(&shares.init, key),
        }
    }

    fn is_nothing(&self) -> bool {
        self.proxy.is_none() && self.init.is_none()
    }

    /// The pod's own amount with ours; `None` if it does not fit.
    fn added_to(&self, own: &Quantity) -> Option<Quantity> {
        match (self.proxy, self.init) {
            (Some(proxy), init) => own.plus(init.map_or(proxy, |init| init.max(proxy))),
            (None, Some(init)) => Some(init.max(own).clone()),
            (None, None) => Some(own.clone()),
        }
    }
}

/// A container without a request is defaulted to its limit.
fn request_of<'s>(resources: &'s ResourceSettings, key: &str) -> Option<&'s Quantity> {
    let request = setting(&resources.requests, key);
    request.or_else(|| setting(&resources.limits, key))
}

/// A container without a limit still needs room for its request: the pod's request must not outgrow its limit.
fn limit_of<'s>(resources: &'s ResourceSettings, key: &str) -> Option<&'s Quantity> {
    let limit = setting(&resources.limits, key);
    limit.or_else(|| setting(&resources.requests, key))
}

fn setting<'s>(amounts: &'s AmountSettings, key: &str) -> Option<&'s Quantity> {
    match key {
        "cpu" => amounts.cpu.as_ref(),
        _ => amounts.memory.as_ref(),
    }
}

fn find<'s, 'a>(amounts: &'s Slot<Amounts<'a>>, key: &str) -> Option<&'s Amount<'a>> {
    amounts.present()?.find(key)
}

fn read(amount: &Amount<'_>) -> Option<Quantity> {
    Quantity::parse(&amount.text)
}

/// The class of the pod without what is ours.
pub(super) fn qos(pod: &PodView<'_>) -> Qos {
    let own = pod
        .spec
        .present()
        .and_then(|spec| spec.resources.present())
        .filter(|own| is_set(own));
    if let Some(own) = own {
        return class([own].into_iter());
    }
    let nothing = Resources::default();
    let containers = pod
        .all_containers()
        .filter(|container| !ours::is_ours(container));
    class(
        containers
            .map(|container: &Container<'_>| container.resources.present().unwrap_or(&nothing)),
    )
}

fn is_set(resources: &Resources<'_>) -> bool {
    ["cpu", "memory"].iter().any(|key| {
        amount(&resources.requests, key).is_some() || amount(&resources.limits, key).is_some()
    })
}

fn class<'r, 'a: 'r>(all: impl Iterator<Item = &'r Resources<'a>>) -> Qos {
    let (mut any, mut guaranteed) = (false, true);
    for resources in all {
        for key in ["cpu", "memory"] {
            let limit = amount(&resources.limits, key);
            // A missing request is defaulted to the limit.
            let request = amount(&resources.requests, key).or_else(|| limit.clone());
            any |= request.is_some();
            guaranteed &= limit.is_some() && request == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => Qos::BestEffort,
        (true, true) => Qos::Guaranteed,
        (true, false) => Qos::Burstable,
    }
}

/// An amount above zero.
fn amount(amounts: &Slot<Amounts<'_>>, key: &str) -> Option<Quantity> {
    read(find(amounts, key)?).filter(|quantity| !quantity.is_zero() && !quantity.is_negative())
}
