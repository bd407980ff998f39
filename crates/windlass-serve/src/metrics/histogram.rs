//! Counts of observations below fixed bounds.

use std::fmt::Write;

/// Observations by bound, their sum and number.
pub(super) struct Histogram {
    bounds: &'static [f64],
    /// One for each bound, and one for what lies above all.
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    /// Nothing observed yet; the bounds rise.
    pub fn new(bounds: &'static [f64]) -> Self {
        Histogram {
            bounds,
            counts: vec![0; bounds.len() + 1],
            sum: 0.0,
        }
    }

    pub fn observe(&mut self, value: f64) {
        let at = self.bounds.partition_point(|&bound| bound < value);
        self.counts[at] += 1;
        self.sum += value;
    }

    /// The samples: cumulative counts, sum and number.
    pub fn write(&self, text: &mut String, name: &str, labels: &str) {
        let mut below = 0;
        for (index, count) in self.counts.iter().enumerate() {
            below += count;
            let bound = self.bounds.get(index);
            let bound = bound.map_or("+Inf".to_owned(), f64::to_string);
            let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {below}");
        }
        let _ = writeln!(
            text,
            "{name}_sum{{{labels}}} {}\n{name}_count{{{labels}}} {below}",
            self.sum
        );
    }
}
