//! The sum over ranks: always in rank order, so that its bits depend on neither transport nor timing.

use crate::datum::Real;

/// Elements that are summed over all ranks before the next ones: a block of sums stays in the first-level cache.
pub const BLOCK: usize = 2048;

/// `out = values of rank 0 + values of rank 1 + …`, or `out += (that sum)`.
pub fn fold<T: Real>(ranks: &[&[T]], out: &mut [T::Sum], accumulate: bool) {
    let mut scratch = [T::Sum::default(); BLOCK];
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        let range = block * BLOCK..block * BLOCK + out.len();
        let values = ranks.iter().map(|values| &values[range.clone()]);
        if accumulate {
            let sum = &mut scratch[..out.len()];
            sum_of(values, sum);
            T::add_sums(out, sum);
        } else {
            sum_of(values, out);
        }
    }
}

/// The sum of one block.
pub fn sum_of<'a, T: Real>(mut ranks: impl Iterator<Item = &'a [T]>, sum: &mut [T::Sum]) {
    match (ranks.next(), ranks.next()) {
        (Some(first), Some(second)) => T::add_two(first, second, sum),
        (Some(first), None) => T::widen(first, sum),
        (None, _) => {}
    }
    for values in ranks {
        T::add(sum, values);
    }
}
