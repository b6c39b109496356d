//! Quantiles of a histogram with cumulative buckets, as Prometheus' `histogram_quantile` guesses them.

use std::collections::BTreeMap;

/// Counts by upper bound; the bounds are kept as written, since a float is no key.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Histogram {
    buckets: BTreeMap<String, f64>,
}

impl Histogram {
    /// Adds to the bucket whose label `le` is this.
    pub(super) fn add(&mut self, le: &str, count: f64) {
        *self.buckets.entry(le.to_owned()).or_default() += count;
    }

    /// Adds every bucket of another one.
    pub(super) fn merge(&mut self, other: &Self) {
        other
            .buckets
            .iter()
            .for_each(|(le, count)| self.add(le, *count));
    }

    /// What came since an earlier reading of the same counters.
    pub(super) fn since(&self, before: &Self) -> Self {
        let counts = self.buckets.iter().map(|(le, count)| {
            let before = before.buckets.get(le).copied().unwrap_or_default();
            (le.clone(), (count - before).max(0.0))
        });
        Self {
            buckets: counts.collect(),
        }
    }

    /// The value below which this share of the observations is; `None` where there are none.
    ///
    /// Linear within a bucket; beyond the last finite bound the answer is that bound, and nothing better is known.
    pub(super) fn quantile(&self, share: f64) -> Option<f64> {
        let mut buckets: Vec<(f64, f64)> = self
            .buckets
            .iter()
            .filter_map(|(le, count)| Some((le.parse().ok()?, *count)))
            .collect();
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        let total = buckets.last().filter(|last| last.0 == f64::INFINITY)?.1;
        if total <= 0.0 {
            return None;
        }
        let rank = share * total;
        let (mut bound, mut below) = (0.0, 0.0);
        for (upper, count) in buckets {
            if count >= rank {
                let within = if count > below {
                    (rank - below) / (count - below)
                } else {
                    1.0
                };
                return Some(match upper.is_finite() {
                    true => bound + (upper - bound) * within,
                    false => bound,
                });
            }
            (bound, below) = (upper, count);
        }
        Some(bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(buckets: &[(&str, f64)]) -> Histogram {
        let mut histogram = Histogram::default();
        buckets
            .iter()
            .for_each(|(le, count)| histogram.add(le, *count));
        histogram
    }

    #[test]
    fn quantiles_are_those_of_prometheus() {
        let uniform = histogram(&[("5", 50.0), ("10", 90.0), ("25", 100.0), ("+Inf", 100.0)]);
        assert_eq!(uniform.quantile(0.5), Some(5.0));
        assert_eq!(uniform.quantile(0.7), Some(7.5));
        assert_eq!(uniform.quantile(0.99), Some(23.5));
        let slow = histogram(&[("5", 50.0), ("10", 60.0), ("+Inf", 100.0)]);
        assert_eq!(slow.quantile(0.99), Some(10.0));
    }

    #[test]
    fn without_observations_there_is_none() {
        assert_eq!(histogram(&[]).quantile(0.5), None);
        assert_eq!(histogram(&[("5", 0.0), ("+Inf", 0.0)]).quantile(0.5), None);
        // a histogram that does not end at infinity is broken
        assert_eq!(histogram(&[("5", 1.0)]).quantile(0.5), None);
    }

    #[test]
    fn two_of_them_are_one() {
        let mut all = histogram(&[("5", 1.0), ("+Inf", 1.0)]);
        all.merge(&histogram(&[("5", 0.0), ("+Inf", 1.0)]));
        assert_eq!(all, histogram(&[("5", 1.0), ("+Inf", 2.0)]));
    }
}
