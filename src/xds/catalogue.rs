//! Every resource of every proxy, kept up to date with the world.
//!
//! events -> what they concern (dirty) -> translated again -> [`Touched`]: what really became other
//!
//! What is concerned is judged generously, by who selects, backs or governs whom; what is touched is judged by content, so
//! that an endpoint that comes or goes touches its own endpoints and nothing else. Resources are encoded once and shared.
//! Routes differ by the caller's namespace (short names, `exportTo`), but most namespaces have nothing of their own on a
//! port and share one view; they are made when first asked for.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use prost::Message;

use super::{
    Kind, Resource, Settings, Touched, cluster, inbound,
    listener::Families,
    outbound,
    pods::{self, Block},
    route::{self, Host},
    service::{self, View, host, in_namespace, is_http, is_meshed},
};
use crate::mesh::{
    Address, Event, ExportTo, ObjectName, ObjectRef, Service, Slice, Workload, World,
    modes::Policies,
};

/// Every resource of every proxy, kept up to date with the world. Owned by one task; streams read it under a lock.
#[derive(Debug)]
pub struct Catalogue {
    settings: Settings,
    world: World,
    backers: Backers,
    /// Shared resources by kind and name, without routes.
    shared: BTreeMap<Kind, BTreeMap<Arc<str>, Shared>>,
    /// What each Service gave to `shared`, and how it is routed to.
    services: BTreeMap<ObjectName, OfService>,
    /// HTTP ports -> Services that have them.
    http: BTreeMap<u16, BTreeSet<ObjectName>>,
    /// Services -> names (`ExternalName`) that mean them.
    aliases: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
    /// Addresses of meshed pods, by block.
    blocks: BTreeMap<Block, BTreeMap<IpAddr, ObjectName>>,
    virtual_outbound: BTreeMap<Families, Arc<Resource>>,
    /// What equal pods share.
    own: BTreeMap<inbound::Pod, Arc<Own>>,
    proxies: BTreeMap<ObjectName, Proxy>,
    /// Made when asked for.
    routes: Mutex<BTreeMap<RouteView, Arc<Resource>>>,
}

/// A port, and the namespace that sees it in its own way, or (`None`) all others.
type RouteView = (u16, Option<Arc<str>>);

#[derive(Debug)]
struct Shared {
    resource: Arc<Resource>,
    scope: Scope,
}

/// Who is told a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Scope {
    Everyone,
    /// Those that see this Service.
    Service(ObjectName),
    /// Those that see some Service of this HTTP port.
    Port(u16),
}

#[derive(Debug, Default)]
struct OfService {
    resources: BTreeSet<(Kind, Arc<str>)>,
    /// As callers saw it.
    seen: Option<Service>,
}

#[derive(Debug)]
struct Proxy {
    families: Families,
    own: Arc<Own>,
}

/// The resources of the server's side.
#[derive(Debug, PartialEq)]
struct Own {
    listener: Arc<Resource>,
    clusters: Vec<Arc<Resource>>,
}

/// Slices by the Service and by the pods in them.
#[derive(Debug, Default)]
struct Backers {
    of_service: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
    with_pod: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
}

/// What must be translated again.
#[derive(Debug, Default)]
struct Dirty {
    services: BTreeSet<ObjectName>,
    pods: BTreeSet<ObjectName>,
    blocks: BTreeSet<Block>,
}

impl Catalogue {
    /// Nothing is known yet.
    pub fn new(settings: Settings) -> Self {
        let mut catalogue = Self {
            settings,
            world: World::default(),
            backers: Backers::default(),
            shared: BTreeMap::new(),
            services: BTreeMap::new(),
            http: BTreeMap::new(),
            aliases: BTreeMap::new(),
            blocks: BTreeMap::new(),
            virtual_outbound: BTreeMap::new(),
            own: BTreeMap::new(),
            proxies: BTreeMap::new(),
            routes: Mutex::default(),
        };
        let fixed = [
            (cluster::PASSTHROUGH, cluster::passthrough()),
            (cluster::BLACK_HOLE, cluster::black_hole()),
            (
                cluster::INBOUND_PASSTHROUGH,
                cluster::inbound(cluster::INBOUND_PASSTHROUGH),
            ),
        ];
        for (name, body) in fixed {
            let made = resource(name.into(), body, None);
            catalogue.put(Kind::Cluster, made, Scope::Everyone);
        }
        catalogue
    }

    /// What it was made from.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// What holds for the whole mesh.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes changes over; what must be looked at again comes back. An event that says what is known changes nothing.
    pub fn apply(&mut self, events: impl IntoIterator<Item = Event>) -> Touched {
        let mut dirty = Dirty::default();
        for event in events {
            self.take(event, &mut dirty);
        }
        self.translate(dirty)
    }

    /// A resource of a proxy's, as it is now; `None` where there is none of that name for it.
    pub fn find(&self, proxy: &ObjectName, kind: Kind, name: &str) -> Option<Arc<Resource>> {
        let Proxy { families, own } = self.proxies.get(proxy)?;
        if kind == Kind::Route {
            return self.routes(&proxy.namespace, name.parse().ok()?);
        }
        let mut of_proxy = self.of_proxy(kind, *families, own);
        if let Some(found) = of_proxy.find(|resource| *resource.name == *name) {
            return Some(Arc::clone(found));
        }
        let shared = self.shared.get(&kind)?.get(name)?;
        let seen = self.is_told(&proxy.namespace, &shared.scope);
        seen.then(|| Arc::clone(&shared.resource))
    }

    /// Everything of one kind that a proxy is told without asking by name (`*`): clusters and listeners.
    pub fn all(&self, proxy: &ObjectName, kind: Kind) -> Vec<Arc<Resource>> {
        let Some(Proxy { families, own }) = self.proxies.get(proxy) else {
            return Vec::new();
        };
        let shared = self
            .shared
            .get(&kind)
            .into_iter()
            .flat_map(BTreeMap::values);
        let shared = shared.filter(|shared| self.is_told(&proxy.namespace, &shared.scope));
        let shared = shared.map(|shared| &shared.resource);
        let of_proxy = self.of_proxy(kind, *families, own);
        shared.chain(of_proxy).cloned().collect()
    }

    fn of_proxy<'c>(
        &'c self,
        kind: Kind,
        families: Families,
        own: &'c Own,
    ) -> impl Iterator<Item = &'c Arc<Resource>> {
        let (clusters, listeners) = match kind {
            Kind::Cluster => (own.clusters.as_slice(), [None, None]),
            Kind::Listener => {
                let outbound = self.virtual_outbound.get(&families);
                ([].as_slice(), [outbound, Some(&own.listener)])
            }
            _ => ([].as_slice(), [None, None]),
        };
        clusters.iter().chain(listeners.into_iter().flatten())
    }

    fn is_told(&self, namespace: &str, scope: &Scope) -> bool {
        let sees = |name| self.sees(namespace, name);
        match scope {
            Scope::Everyone => true,
            Scope::Service(name) => sees(name),
            Scope::Port(port) => self.http.get(port).into_iter().flatten().any(sees),
        }
    }

    fn sees(&self, namespace: &str, service: &ObjectName) -> bool {
        match self
            .world
            .services
            .get(service)
            .map(|service| &service.export_to)
        {
            None => false,
            Some(ExportTo::Everyone) => true,
            Some(ExportTo::Only(namespaces)) => {
                namespaces.iter().any(|allowed| **allowed == *namespace)
            }
        }
    }
}

/// What an event concerns.
impl Catalogue {
    fn take(&mut self, event: Event, dirty: &mut Dirty) {
        let world = &self.world;
        match event {
            Event::Namespace(..) => self.world.apply(event),
            Event::Service(ref name, ref new) => {
                if world.services.get(name) == new.as_ref() {
                    return;
                }
                let name = name.clone();
                self.mark_service(&name, dirty);
                self.alias(&name, false);
                self.world.apply(event);
                self.alias(&name, true);
                self.mark_service(&name, dirty);
            }
            Event::Slice(ref name, ref new) => {
                if world.slices.get(name) == new.as_ref() {
                    return;
                }
                let name = name.clone();
                self.mark_slice(&name, dirty);
                self.backers.forget(&name, world.slices.get(&name));
                self.world.apply(event);
                self.backers.learn(&name, self.world.slices.get(&name));
                self.mark_slice(&name, dirty);
            }
            Event::Workload(ref name, ref new) => {
                if world.workloads.get(name) == new.as_ref() {
                    return;
                }
                let name = name.clone();
                self.mark_pod(&name, dirty);
                self.house(&name, false);
                self.world.apply(event);
                self.house(&name, true);
                self.mark_pod(&name, dirty);
            }
            Event::PeerAuthentication(ref name, ref new) => {
                if world.peer_authentications.get(name) == new.as_ref() {
                    return;
                }
                let namespace = Arc::clone(&name.namespace);
                self.world.apply(event);
                let everywhere = namespace == self.settings.root_namespace;
                let pods = self.world.workloads.keys();
                for pod in pods.filter(|pod| everywhere || pod.namespace == namespace) {
                    self.mark_pod(pod, dirty);
                }
            }
        }
    }

    fn mark_service(&self, name: &ObjectName, dirty: &mut Dirty) {
        dirty.services.insert(name.clone());
        let Some(service) = self.world.services.get(name) else {
            return;
        };
        let selected = service::selected(&self.world, name, service);
        dirty.pods.extend(selected.map(|(pod, _)| pod.clone()));
        if service.selector.is_empty() {
            let slices = self.slices(name);
            let endpoints = slices.into_iter().flat_map(|slice| &slice.endpoints);
            let pods = endpoints.filter_map(|endpoint| endpoint.pod.clone());
            dirty.pods.extend(pods);
        }
    }

    fn mark_slice(&self, name: &ObjectName, dirty: &mut Dirty) {
        let Some(slice) = self.world.slices.get(name) else {
            return;
        };
        let service = service_of(name, slice);
        let found = self.world.services.get(&service);
        if found.is_some_and(|service| service.selector.is_empty()) {
            let endpoints = slice.endpoints.iter();
            let pods = endpoints.filter_map(|endpoint| endpoint.pod.clone());
            dirty.pods.extend(pods);
        }
        dirty.services.insert(service);
    }

    fn mark_pod(&self, name: &ObjectName, dirty: &mut Dirty) {
        dirty.pods.insert(name.clone());
        let Some(pod) = self.world.workloads.get(name) else {
            return;
        };
        dirty
            .blocks
            .extend(pod.addresses.iter().map(|&ip| Block::of(ip)));
        let services = in_namespace(&self.world.services, &name.namespace);
        let selecting = services.filter(|(_, service)| service::selects(service, pod));
        dirty
            .services
            .extend(selecting.map(|(name, _)| name.clone()));
        let slices = self.backers.with_pod.get(name).into_iter().flatten();
        let backed =
            slices.filter_map(|slice| Some(service_of(slice, self.world.slices.get(slice)?)));
        dirty.services.extend(backed);
    }

    /// The Service that an `ExternalName` means, if it is one of the cluster's.
    fn means(&self, service: &Service) -> Option<ObjectName> {
        let Address::External(name) = &service.address else {
            return None;
        };
        let suffix = format!(".svc.{}", self.settings.cluster_domain);
        let (name, namespace) = name
            .trim_end_matches('.')
            .strip_suffix(&suffix)?
            .split_once('.')?;
        Some(ObjectName::new(namespace, name))
    }

    fn alias(&mut self, name: &ObjectName, there: bool) {
        let service = self.world.services.get(name);
        let Some(target) = service.and_then(|service| self.means(service)) else {
            return;
        };
        insert_or_remove(&mut self.aliases, target, name, there);
    }

    fn house(&mut self, name: &ObjectName, there: bool) {
        let Some(pod) = self.world.workloads.get(name).filter(|pod| is_meshed(pod)) else {
            return;
        };
        for &ip in &pod.addresses {
            let block = self.blocks.entry(Block::of(ip)).or_default();
            match there {
                true => drop(block.insert(ip, name.clone())),
                // Its successor at this address may be there already.
                false if block.get(&ip) == Some(name) => drop(block.remove(&ip)),
                false => {}
            }
        }
    }

    fn slices(&self, service: &ObjectName) -> Vec<&Slice> {
        let names = self.backers.of_service.get(service).into_iter().flatten();
        names
            .filter_map(|name| self.world.slices.get(name))
            .collect()
    }
}

/// Translating again.
impl Catalogue {
    fn translate(&mut self, dirty: Dirty) -> Touched {
        let mut touched = Touched::default();
        self.translate_blocks(&dirty.blocks, &mut touched);
        for service in &dirty.services {
            self.translate_service(service, &mut touched);
        }
        for pod in &dirty.pods {
            self.translate_pod(pod, &mut touched);
        }
        self.own.retain(|_, own| Arc::strong_count(own) > 1);
        touched
    }

    fn translate_service(&mut self, name: &ObjectName, touched: &mut Touched) {
        let service = self.world.services.get(name);
        let made = service.map(|service| {
            let view = View {
                world: &self.world,
                settings: &self.settings,
                name,
                service,
                slices: self.slices(name),
            };
            view.resources()
        });
        let seen = service.cloned();
        let old = self.services.remove(name).unwrap_or_default();
        let scope_changed =
            old.seen.as_ref().map(|old| &old.export_to) != seen.as_ref().map(|new| &new.export_to);
        let mut now = BTreeSet::new();
        for (kind, text, body) in made.into_iter().flatten() {
            let source = ObjectRef {
                kind: "Service",
                name: name.clone(),
            };
            let made = resource(text.into(), body, Some(source));
            let key = (kind, Arc::clone(&made.name));
            if self.put(kind, made, Scope::Service(name.clone())) || scope_changed {
                touched.shared.insert(key.clone());
            }
            now.insert(key);
        }
        let scope = Scope::Service(name.clone());
        for (kind, gone) in old.resources.difference(&now) {
            self.remove(*kind, gone, &scope);
            touched.shared.insert((*kind, Arc::clone(gone)));
        }
        // Endpoints come and go without a word about routes.
        if old.seen != seen {
            self.route_again(name, [&old.seen, &seen], touched);
        }
        if let Some(seen) = seen {
            let of_service = OfService {
                resources: now,
                seen: Some(seen),
            };
            self.services.insert(name.clone(), of_service);
        }
    }

    fn route_again(
        &mut self,
        name: &ObjectName,
        states: [&Option<Service>; 2],
        touched: &mut Touched,
    ) {
        let ports = |service: &Option<Service>| -> BTreeSet<u16> {
            let ports = service.iter().flat_map(|service| &service.ports);
            let ports = ports.filter(|port| is_http(port.protocol));
            ports.map(|port| port.number).collect()
        };
        let [old, new] = states.map(ports);
        for &port in old.difference(&new) {
            insert_or_remove(&mut self.http, port, name, false);
        }
        for &port in &new {
            insert_or_remove(&mut self.http, port, name, true);
        }
        let mut all: BTreeSet<u16> = old.union(&new).copied().collect();
        // An alias has no ports of its own.
        for target in states
            .into_iter()
            .flatten()
            .filter_map(|service| self.means(service))
        {
            all.extend(ports(&self.world.services.get(&target).cloned()));
        }
        for port in all {
            self.forget_routes(port);
            touched
                .shared
                .insert((Kind::Route, port.to_string().into()));
            self.translate_port(port, touched);
        }
    }

    /// The listeners of an HTTP port: for each family in which some Service has an address.
    fn translate_port(&mut self, port: u16, touched: &mut Touched) {
        let services = self.http.get(&port).into_iter().flatten();
        let services = services.filter_map(|name| self.world.services.get(name));
        let ips: Vec<_> = services
            .flat_map(|service| match &service.address {
                Address::ClusterIps(ips) => ips.as_slice(),
                Address::Headless | Address::External(_) => &[],
            })
            .map(IpAddr::is_ipv6)
            .collect();
        // These two ports are the proxy's own.
        let free = port != outbound::PORT && port != inbound::PORT;
        for v6 in [false, true] {
            let name: Arc<str> = outbound::port_name(v6, port).into();
            if free && ips.contains(&v6) {
                let made = outbound::port(v6, port, self.blocks.keys());
                self.put(Kind::Listener, listener(made), Scope::Port(port));
                // Who is told it may have changed with what is exported.
                touched.shared.insert((Kind::Listener, name));
            } else if self.remove(Kind::Listener, &name, &Scope::Port(port)) {
                touched.shared.insert((Kind::Listener, name));
            }
        }
    }

    fn translate_blocks(&mut self, dirty: &BTreeSet<Block>, touched: &mut Touched) {
        let mut blocks_changed = false;
        for block in dirty {
            let name: Arc<str> = block.cluster_name().into();
            let pods = self.pods_of(block);
            if pods.is_empty() {
                self.blocks.remove(block);
                if self.remove(Kind::Cluster, &name, &Scope::Everyone) {
                    blocks_changed = true;
                    touched.shared.insert((Kind::Cluster, name));
                }
                continue;
            }
            let clusters = self.shared.get(&Kind::Cluster);
            blocks_changed |= clusters.is_none_or(|all| !all.contains_key(&name));
            let made = resource(Arc::clone(&name), pods::cluster(*block, &pods), None);
            if self.put(Kind::Cluster, made, Scope::Everyone) {
                touched.shared.insert((Kind::Cluster, name));
            }
        }
        if blocks_changed {
            let families: Vec<_> = self.virtual_outbound.keys().copied().collect();
            for families in families {
                self.translate_virtual_outbound(families);
            }
            touched
                .shared
                .insert((Kind::Listener, "virtualOutbound".into()));
            let ports: Vec<_> = self.http.keys().copied().collect();
            for port in ports {
                self.translate_port(port, touched);
            }
        }
    }

    fn pods_of(&self, block: &Block) -> BTreeMap<IpAddr, pods::Pod> {
        let pods = self.blocks.get(block).into_iter().flatten();
        let pods = pods.filter_map(|(&ip, name)| {
            let pod = self.world.workloads.get(name)?;
            let policies = self.policies(name);
            let ports = policies
                .ports()
                .map(|port| (port, policies.at(Some(port)).0));
            let pod = pods::Pod {
                identity: service::identity(&self.settings, name, pod)?,
                mode: policies.at(None).0,
                ports: ports.collect(),
            };
            Some((ip, pod))
        });
        pods.collect()
    }

    fn translate_virtual_outbound(&mut self, families: Families) {
        let made = listener(outbound::virtual_outbound(families, self.blocks.keys()));
        self.virtual_outbound.insert(families, made.into());
    }

    fn translate_pod(&mut self, name: &ObjectName, touched: &mut Touched) {
        let pod = self.world.workloads.get(name).filter(|pod| is_meshed(pod));
        let Some(pod) = pod else {
            if self.proxies.remove(name).is_some() {
                touched.proxies.insert(name.clone());
            }
            return;
        };
        let inbound = self.inbound(name, pod);
        let families = inbound.families;
        let own = match self.own.get(&inbound) {
            Some(own) => Arc::clone(own),
            None => {
                let own = Arc::new(self.make_own(&inbound));
                self.own.insert(inbound, Arc::clone(&own));
                own
            }
        };
        if !self.virtual_outbound.contains_key(&families) {
            self.translate_virtual_outbound(families);
        }
        let new = Proxy { families, own };
        let old = self.proxies.get(name);
        let same = old.is_some_and(|old| old.families == families && old.own == new.own);
        if !same {
            touched.proxies.insert(name.clone());
        }
        self.proxies.insert(name.clone(), new);
    }

    fn make_own(&self, pod: &inbound::Pod) -> Own {
        let made = inbound::virtual_inbound(pod, &self.settings.trust_domain);
        let behind = pod.ports.iter().filter(|port| port.service.is_some());
        let clusters = behind.map(|port| {
            let name = port.cluster_name();
            let body = cluster::inbound(&name);
            Arc::new(resource(name.into(), body, None))
        });
        let policy = pod.policy.clone().map(|name| ObjectRef {
            kind: "PeerAuthentication",
            name,
        });
        Own {
            listener: Arc::new(Resource {
                source: policy,
                ..listener(made)
            }),
            clusters: clusters.collect(),
        }
    }

    fn inbound(&self, name: &ObjectName, pod: &Workload) -> inbound::Pod {
        let policies = self.policies(name);
        let mut ports: BTreeMap<u16, Option<inbound::Behind>> =
            policies.ports().map(|port| (port, None)).collect();
        for (number, behind) in self.behind(name, pod) {
            // Of two Services with one port the first by name says what is spoken.
            ports.entry(number).or_default().get_or_insert(behind);
        }
        // Bytes to these never come from outside.
        ports.remove(&inbound::PORT);
        let port = |(number, service)| inbound::Port {
            number,
            mode: policies.at(Some(number)).0,
            service,
        };
        let deciding = ports.keys().map(|port| policies.at(Some(*port)).1);
        let (mode, policy) = policies.at(None);
        let policy = policy.or_else(|| deciding.flatten().next()).cloned();
        inbound::Pod {
            families: Families::of(pod),
            mode,
            policy,
            version: service::version(pod).cloned(),
            ports: ports.into_iter().map(port).collect(),
        }
    }

    /// Ports of a pod that Services stand before, by the Services' names.
    fn behind(&self, name: &ObjectName, pod: &Workload) -> Vec<(u16, inbound::Behind)> {
        let mut found = Vec::new();
        for (service_name, service) in in_namespace(&self.world.services, &name.namespace) {
            let behind = |port: &crate::mesh::ServicePort| inbound::Behind {
                name: service_name.clone(),
                host: host(service_name, &self.settings).into(),
                protocol: port.protocol,
            };
            if service::selects(service, pod) {
                let ports = service.ports.iter();
                found.extend(
                    ports.filter_map(|port| Some((service::target(port, pod)?, behind(port)))),
                );
            } else if service.selector.is_empty() {
                let slices = self.slices(service_name).into_iter();
                let with_pod = slices.filter(|slice| {
                    let mut endpoints = slice.endpoints.iter();
                    endpoints.any(|endpoint| endpoint.pod.as_ref() == Some(name))
                });
                found.extend(with_pod.flat_map(|slice| {
                    let ports = service.ports.iter();
                    ports.filter_map(|port| Some((*slice.ports.get(&port.name)?, behind(port))))
                }));
            }
        }
        found
    }

    fn policies(&self, pod: &ObjectName) -> Policies<'_> {
        Policies::of(&self.world, &self.settings.root_namespace, pod)
    }

    /// Whether it is new or other than it was.
    fn put(&mut self, kind: Kind, resource: Resource, scope: Scope) -> bool {
        let all = self.shared.entry(kind).or_default();
        let old = all.get(&resource.name);
        if old.is_some_and(|old| old.resource.version == resource.version && old.scope == scope) {
            return false;
        }
        let name = Arc::clone(&resource.name);
        let resource = Arc::new(resource);
        all.insert(name, Shared { resource, scope });
        true
    }

    /// Whether it was there, and by the same right.
    fn remove(&mut self, kind: Kind, name: &str, scope: &Scope) -> bool {
        let Some(all) = self.shared.get_mut(&kind) else {
            return false;
        };
        let there = all.get(name).is_some_and(|shared| shared.scope == *scope);
        there && all.remove(name).is_some()
    }
}

/// Routes, by the caller's namespace.
impl Catalogue {
    fn routes(&self, namespace: &Arc<str>, port: u16) -> Option<Arc<Resource>> {
        if !self.is_told(namespace, &Scope::Port(port)) {
            return None;
        }
        let view = self
            .has_own_view(namespace, port)
            .then(|| Arc::clone(namespace));
        let mut known = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let routes = known.entry((port, view)).or_insert_with(|| {
            let name = port.to_string();
            let routes = route::routes(&name, self.hosts(namespace, port));
            resource(name.into(), routes.encode_to_vec(), None).into()
        });
        Some(Arc::clone(routes))
    }

    fn forget_routes(&self, port: u16) {
        let mut known = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(of, _), _| *of != port);
    }

    /// Whether a namespace sees a port in another way than most: it has short names there, or something is not exported
    /// to everyone.
    fn has_own_view(&self, namespace: &Arc<str>, port: u16) -> bool {
        let all = self.http.get(&port).into_iter().flatten();
        let all = all.flat_map(|name| self.aliases.get(name).into_iter().flatten().chain([name]));
        all.into_iter().any(|name| {
            let service = self.world.services.get(name);
            let restricted = service.is_some_and(|found| found.export_to != ExportTo::Everyone);
            restricted || name.namespace == *namespace
        })
    }

    fn hosts(&self, namespace: &Arc<str>, port: u16) -> Vec<Host> {
        let services = self.http.get(&port).into_iter().flatten();
        let seen = services.filter(|name| self.sees(namespace, name));
        let host = |name: &ObjectName| {
            let full = host(name, &self.settings);
            let aliases = self.aliases.get(name).into_iter().flatten();
            let aliases = aliases.filter(|alias| self.sees(namespace, alias));
            Host {
                name: format!("{full}:{port}"),
                domains: aliases.fold(self.domains(name, namespace), |mut all, alias| {
                    all.extend(self.domains(alias, namespace));
                    all
                }),
                cluster: service::cluster_name(&full, port),
            }
        };
        seen.map(host).collect()
    }

    /// What a Service is called by callers of a namespace, the most exact name first.
    fn domains(&self, name: &ObjectName, caller: &Arc<str>) -> Vec<String> {
        let ObjectName {
            namespace,
            name: own,
        } = name;
        let mut domains = vec![
            host(name, &self.settings),
            format!("{own}.{namespace}.svc"),
            format!("{own}.{namespace}"),
        ];
        if namespace == caller {
            domains.push(own.to_string());
        }
        let service = self.world.services.get(name);
        if let Some(Address::ClusterIps(ips)) = service.map(|service| &service.address) {
            domains.extend(ips.iter().map(|ip| match ip {
                IpAddr::V4(ip) => ip.to_string(),
                IpAddr::V6(ip) => format!("[{ip}]"),
            }));
        }
        domains
    }
}

impl Backers {
    fn learn(&mut self, name: &ObjectName, slice: Option<&Slice>) {
        self.set(name, slice, true);
    }

    fn forget(&mut self, name: &ObjectName, slice: Option<&Slice>) {
        self.set(name, slice, false);
    }

    fn set(&mut self, name: &ObjectName, slice: Option<&Slice>, there: bool) {
        let Some(slice) = slice else { return };
        insert_or_remove(&mut self.of_service, service_of(name, slice), name, there);
        for endpoint in &slice.endpoints {
            if let Some(pod) = &endpoint.pod {
                insert_or_remove(&mut self.with_pod, pod.clone(), name, there);
            }
        }
    }
}

fn service_of(slice_name: &ObjectName, slice: &Slice) -> ObjectName {
    ObjectName {
        namespace: Arc::clone(&slice_name.namespace),
        name: Arc::clone(&slice.service),
    }
}

fn insert_or_remove<K: Ord>(
    map: &mut BTreeMap<K, BTreeSet<ObjectName>>,
    key: K,
    value: &ObjectName,
    there: bool,
) {
    if there {
        map.entry(key).or_default().insert(value.clone());
    } else if let Some(values) = map.get_mut(&key) {
        values.remove(value);
        if values.is_empty() {
            map.remove(&key);
        }
    }
}

fn listener(made: Listener) -> Resource {
    resource(made.name.as_str().into(), made.encode_to_vec(), None)
}

fn resource(name: Arc<str>, body: Vec<u8>, source: Option<ObjectRef>) -> Resource {
    Resource {
        name,
        version: version(&body),
        body: Bytes::from(body),
        source,
    }
}

/// The first 8 bytes of SHA-256, the same in every process. 0 is left for "none".
fn version(body: &[u8]) -> u64 {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, body);
    let first = digest.as_ref().first_chunk().expect("SHA-256 has 32 bytes");
    u64::from_be_bytes(*first).max(1)
}
