//! Makes a failing pod small: takes fields and items away as long as the failure stays.

use serde_json::Value;

/// At most this many tries; a pod of some kilobytes needs a few hundred.
const TRIES: usize = 4_000;

/// The smallest pod found that still `fails`.
pub(crate) fn shrink(mut pod: Value, fails: impl Fn(&Value) -> bool) -> Value {
    let mut tries = 0;
    loop {
        let mut paths = Vec::new();
        collect(&pod, &mut Vec::new(), &mut paths);
        // the big parts first: they stand before what they hold
        let mut shrunk = false;
        for path in paths {
            tries += 1;
            if tries > TRIES {
                return pod;
            }
            let mut smaller = pod.clone();
            if remove(&mut smaller, &path) && fails(&smaller) {
                pod = smaller;
                shrunk = true;
                // positions after it have moved; a stale path removes something else or nothing, and is tried like any
            }
        }
        if !shrunk {
            return pod;
        }
    }
}

#[derive(Clone)]
enum Step {
    Key(String),
    Index(usize),
}

fn collect(value: &Value, at: &mut Vec<Step>, paths: &mut Vec<Vec<Step>>) {
    let steps: Vec<(Step, &Value)> = match value {
        Value::Object(fields) => fields
            .iter()
            .map(|(key, field)| (Step::Key(key.clone()), field))
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(index, item)| (Step::Index(index), item))
            .rev()
            .collect(),
        _ => return,
    };
    for (step, child) in steps {
        at.push(step);
        paths.push(at.clone());
        collect(child, at, paths);
        at.pop();
    }
}

fn remove(value: &mut Value, path: &[Step]) -> bool {
    let Some((last, parents)) = path.split_last() else {
        return false;
    };
    let mut value = value;
    for step in parents {
        let child = match step {
            Step::Key(key) => value.get_mut(key),
            Step::Index(index) => value.get_mut(index),
        };
        let Some(child) = child else {
            return false;
        };
        value = child;
    }
    match (last, value) {
        (Step::Key(key), Value::Object(fields)) => fields.shift_remove(key).is_some(),
        (Step::Index(index), Value::Array(items)) if *index < items.len() => {
            items.remove(*index);
            true
        }
        _ => false,
    }
}
