//! `malha`: the control plane (`malha serve`) and the operator's verbs.

fn main() {}
