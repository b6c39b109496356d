//! Facts by namespace and name: one writer, many readers.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// What is kept of one kind. Objects without a namespace stand under the empty one.
#[derive(Debug)]
pub(super) struct Kept<F> {
    map: RwLock<Listing<F>>,
    synced: AtomicBool,
}

/// A list that is under way, or the one that readers see.
#[derive(Debug)]
pub(super) struct Listing<F>(HashMap<Box<str>, HashMap<Box<str>, F>>);

impl<F> Default for Listing<F> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<F: PartialEq> Listing<F> {
    /// Whether anything is new.
    pub(super) fn insert(&mut self, namespace: &str, name: &str, facts: F) -> bool {
        if !self.0.contains_key(namespace) {
            self.0.insert(namespace.into(), HashMap::new());
        }
        let Some(inside) = self.0.get_mut(namespace) else {
            return false;
        };
        if inside.get(name) == Some(&facts) {
            return false;
        }
        inside.insert(name.into(), facts);
        true
    }

    fn remove(&mut self, namespace: &str, name: &str) -> bool {
        let Some(inside) = self.0.get_mut(namespace) else {
            return false;
        };
        let removed = inside.remove(name).is_some();
        if inside.is_empty() {
            self.0.remove(namespace);
        }
        removed
    }
}

impl<F: Clone + PartialEq> Kept<F> {
    pub(super) fn new() -> Self {
        Self {
            map: RwLock::new(Listing::default()),
            synced: AtomicBool::new(false),
        }
    }

    /// Whether a whole list was seen.
    pub(super) fn synced(&self) -> bool {
        self.synced.load(Ordering::Acquire)
    }

    pub(super) fn begin(&self) -> Listing<F> {
        Listing::default()
    }

    pub(super) fn replace(&self, listing: Listing<F>) {
        let old = {
            let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *map, listing)
        };
        self.synced.store(true, Ordering::Release);
        drop(old);
    }

    pub(super) fn insert(&self, namespace: &str, name: &str, facts: F) -> bool {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        map.insert(namespace, name, facts)
    }

    pub(super) fn remove(&self, namespace: &str, name: &str) -> bool {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        map.remove(namespace, name)
    }

    pub(super) fn get(&self, namespace: &str, name: &str) -> Option<F> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.0.get(namespace)?.get(name).cloned()
    }

    /// Looks at the objects of one namespace.
    pub(super) fn each_in(&self, namespace: &str, look: impl FnMut(&F)) {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let inside = map.0.get(namespace);
        inside.into_iter().flat_map(HashMap::values).for_each(look);
    }

    pub(super) fn each(&self, mut look: impl FnMut(&F)) {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.0.values().flat_map(HashMap::values).for_each(&mut look);
    }

    pub(super) fn each_namespace(
        &self,
        mut look: impl FnMut(&str, &mut dyn Iterator<Item = (&str, &F)>),
    ) {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        for (namespace, inside) in &map.0 {
            let mut objects = inside.iter().map(|(name, facts)| (&**name, facts));
            look(namespace, &mut objects);
        }
    }
}

/// Names that many objects share, each kept once.
#[derive(Debug, Default)]
pub(super) struct Names {
    shared: HashSet<Arc<str>>,
    sweep_at: usize,
}

impl Names {
    pub(super) fn share(&mut self, name: &str) -> Arc<str> {
        if let Some(shared) = self.shared.get(name) {
            return shared.clone();
        }
        if self.shared.len() >= self.sweep_at {
            // names that nobody holds any more: owners come and go for as long as the process lives
            self.shared.retain(|name| Arc::strong_count(name) > 1);
            self.sweep_at = 1024.max(2 * self.shared.len());
        }
        let shared: Arc<str> = name.into();
        self.shared.insert(shared.clone());
        shared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_nobody_holds_are_swept() {
        let mut names = Names::default();
        let held = names.share("held");
        for number in 0..100_000 {
            names.share(&number.to_string());
        }
        assert!(names.shared.len() <= 2048, "{}", names.shared.len());
        assert!(Arc::ptr_eq(&held, &names.share("held")));
    }
}
