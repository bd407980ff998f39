//! The project's one random number generator: xoshiro256++ seeded through splitmix64.
//!
//! Every random choice (initial weights, data order, sampled tokens) is drawn from a [`Rng`] whose seed or
//! state is an argument, so that a run can be repeated and resumed bit for bit. The whole state is four
//! words: nothing is cached between calls. It is not fit for cryptography.

/// A deterministic generator of pseudo-random numbers (xoshiro256++, period 2²⁵⁶ − 1).
///
/// # Source
/// D. Blackman and S. Vigna, "Scrambled Linear Pseudorandom Number Generators", 2021.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rng {
    state: [u64; 4],
}

/// Advances a splitmix64 state and returns the next mixed word.
///
/// # Source
/// G. Steele, D. Lea and C. Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
pub fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rng {
    /// A generator seeded by the first four splitmix64 words of `seed`.
    pub fn new(seed: u64) -> Self {
        let mut mix = seed;
        Self {
            state: std::array::from_fn(|_| splitmix64(&mut mix)),
        }
    }

    /// The generator number `index` of a family that shares `seed`: one for each parameter, epoch or request.
    ///
    /// Two indices give unrelated sequences; the mapping never changes.
    pub fn stream(seed: u64, index: u64) -> Self {
        let mut mix = seed;
        let a = splitmix64(&mut mix);
        let mut mix = a ^ index.wrapping_mul(0xd134_2543_de82_ef95);
        Self::new(splitmix64(&mut mix))
    }

    /// The whole state, to be saved with a checkpoint.
    pub fn state(&self) -> [u64; 4] {
        self.state
    }

    /// A generator that continues from a saved [`Rng::state`].
    ///
    /// The all-zero state, which xoshiro can never leave, is replaced by that of seed 0.
    pub fn from_state(state: [u64; 4]) -> Self {
        if state == [0; 4] {
            return Self::new(0);
        }
        Self { state }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A uniform number in `[0, 1)`, a multiple of 2⁻⁵³.
    pub fn uniform_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// A uniform number in `[0, 1)`, a multiple of 2⁻²⁴.
    pub fn uniform_f32(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    /// A uniform integer in `0..bound`, without bias.
    ///
    /// # Panics
    /// When `bound` is zero.
    ///
    /// # Source
    /// D. Lemire, "Fast Random Integer Generation in an Interval", 2019.
    #[track_caller]
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "an integer below 0 was asked for");
        let mut wide = u128::from(self.next_u64()) * u128::from(bound);
        if (wide as u64) < bound {
            let threshold = bound.wrapping_neg() % bound;
            while (wide as u64) < threshold {
                wide = u128::from(self.next_u64()) * u128::from(bound);
            }
        }
        (wide >> 64) as u64
    }

    /// One element of `items`, each with the same probability.
    ///
    /// # Panics
    /// When `items` is empty.
    #[track_caller]
    pub fn choose<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }

    /// Puts `items` in a random order (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }

    /// Two independent standard normal numbers: `√(−2 ln u) · (cos 2πv, sin 2πv)` (Box-Muller).
    pub fn normal_pair(&mut self) -> (f64, f64) {
        // 1 − u lies in (0, 1]: the logarithm is finite.
        let radius = (-2.0 * (1.0 - self.uniform_f64()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform_f64()).sin_cos();
        (radius * cos, radius * sin)
    }

    /// A standard normal number. The second of the pair is dropped: the state stays four words.
    pub fn normal(&mut self) -> f64 {
        self.normal_pair().0
    }

    /// Fills `out` with normal numbers of the given mean and standard deviation.
    pub fn fill_normal(&mut self, out: &mut [f32], mean: f64, std: f64) {
        for pair in out.chunks_mut(2) {
            let (a, b) = self.normal_pair();
            pair[0] = (mean + std * a) as f32;
            if let Some(second) = pair.get_mut(1) {
                *second = (mean + std * b) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_match_the_published_generators() {
        let mut mix = 0;
        let words: [u64; 4] = std::array::from_fn(|_| splitmix64(&mut mix));
        assert_eq!(
            words,
            [
                0xe220_a839_7b1d_cdaf,
                0x6e78_9e6a_a1b9_65f4,
                0x06c4_5d18_8009_454f,
                0xf88b_b8a8_724c_81ec
            ]
        );
        let mut rng = Rng::from_state([1, 2, 3, 4]);
        let words: [u64; 4] = std::array::from_fn(|_| rng.next_u64());
        assert_eq!(
            words,
            [41943041, 58720359, 3588806011781223, 3591011842654386]
        );
        assert_eq!(Rng::new(0).state()[0], 0xe220_a839_7b1d_cdaf);
        assert_ne!(Rng::from_state([0; 4]).next_u64(), 0);
    }

    #[test]
    fn a_saved_state_continues_the_sequence() {
        let mut rng = Rng::stream(7, 3);
        for _ in 0..5 {
            rng.normal();
            rng.below(10);
        }
        let mut resumed = Rng::from_state(rng.state());
        for _ in 0..5 {
            assert_eq!(rng.normal().to_bits(), resumed.normal().to_bits());
            assert_eq!(rng.uniform_f32(), resumed.uniform_f32());
        }
        let mut first: Vec<u64> = (0..64).map(|i| Rng::stream(7, i).next_u64()).collect();
        first.push(Rng::new(7).next_u64());
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), 65);
    }

    #[test]
    fn moments_and_ranges_are_those_of_the_distributions() {
        let mut rng = Rng::new(42);
        let n = 200_000;
        let mut values = vec![0f32; n + 1];
        rng.fill_normal(&mut values, 1.0, 2.0);
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len() as f64;
        let moment = |power: i32| {
            let terms = values
                .iter()
                .map(|&x| ((f64::from(x) - mean) / 2.0).powi(power));
            terms.sum::<f64>() / values.len() as f64
        };
        assert!((mean - 1.0).abs() < 0.02, "mean {mean}");
        assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.15, "kurtosis {}", moment(4));

        let mut counts = [0usize; 7];
        let mut order: Vec<usize> = (0..50).collect();
        for _ in 0..n {
            counts[rng.below(7) as usize] += 1;
            assert!((0.0..1.0).contains(&rng.uniform_f32()));
            assert!((0.0..1.0).contains(&rng.uniform_f64()));
        }
        for count in counts {
            assert!(count.abs_diff(n / 7) < 800, "{counts:?}");
        }
        rng.shuffle(&mut order);
        assert_ne!(order, (0..50).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }
}
