//! Products on tiles, and the same to the bit by vectors.

#![expect(
    clippy::needless_range_loop,
    reason = "indices of register arrays address memory too"
)]

use std::arch::asm;
use std::arch::x86_64::*;

use super::pairs::Stored;
use super::{LANES, STEP};
use crate::attention::tile::prefetch;
use crate::simd::Avx512;

/// `c[16, 64] (+)= a b` of rows of `bf16` and packed pairs. Strides are in elements of four bytes.
pub struct Product {
    pub a: *const f32,
    pub a_row: usize,
    pub b: *const f32,
    pub b_row: usize,
    pub c: *mut f32,
    pub c_row: usize,
}

impl Product {
    /// Over `steps` times 32 elements, added to `c` or not.
    ///
    /// # Safety
    /// Tiles are configured, and everything is in bounds.
    #[inline(always)]
    pub unsafe fn run(&self, steps: usize, add: bool) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "test {add:e}, {add:e}", "jnz 2f",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", "jmp 3f",
                "2:",
                "tileloadd tmm0, [{c} + {c_row}*1]", "tileloadd tmm1, [{c} + {c_row}*1 + 64]",
                "tileloadd tmm2, [{c} + {c_row}*1 + 128]", "tileloadd tmm3, [{c} + {c_row}*1 + 192]",
                "3:",
                "tileloadd tmm4, [{a} + {a_row}*1]",
                "tileloadd tmm5, [{b} + {b_row}*1]", "tdpbf16ps tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{b} + {b_row}*1 + 64]", "tdpbf16ps tmm1, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {b_row}*1 + 128]", "tdpbf16ps tmm2, tmm4, tmm7",
                "tileloadd tmm5, [{b} + {b_row}*1 + 192]", "tdpbf16ps tmm3, tmm4, tmm5",
                "add {a}, 64", "add {b}, {b_step}", "dec {n}", "jnz 3b",
                "tilestored [{c} + {c_row}*1], tmm0", "tilestored [{c} + {c_row}*1 + 64], tmm1",
                "tilestored [{c} + {c_row}*1 + 128], tmm2", "tilestored [{c} + {c_row}*1 + 192], tmm3",
                add = in(reg) u32::from(add),
                a = inout(reg) self.a => _, a_row = in(reg) 4 * self.a_row,
                b = inout(reg) self.b => _, b_row = in(reg) 4 * self.b_row, b_step = in(reg) 64 * self.b_row,
                c = in(reg) self.c, c_row = in(reg) 4 * self.c_row, n = inout(reg) steps => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    }
}

/// What tiles add to `c` for a row `a`, to the bit: in every 32 steps a chain of fused multiply-adds for the even ones and one
/// for the odd. Rows of `b` are `b_row` apart; those behind `depth` count as zeros.
#[inline(always)]
pub unsafe fn chains<B: Stored>(
    a: &[f32],
    [b, next]: [*const B; 2],
    b_row: usize,
    depth: usize,
    c: &mut [f32],
) {
    /// Vectors of `c` at a time.
    const WIDE: usize = 4;
    // SAFETY: vectors of `c`, and `depth` rows of `b`; the features are there by the caller's promise.
    unsafe {
        for (chunk, c) in c.chunks_mut(WIDE * LANES).enumerate() {
            let [b, next] = [b, next].map(|b| b.wrapping_add(chunk * WIDE * LANES));
            let vectors = c.len() / LANES;
            let mut total = [_mm512_setzero_ps(); WIDE];
            for i in 0..vectors {
                total[i] = _mm512_loadu_ps(c.as_ptr().add(i * LANES));
            }
            for first in (0..depth).step_by(STEP) {
                let mut sums = [[_mm512_setzero_ps(); WIDE]; 2];
                for step in first..depth.min(first + STEP) {
                    let ahead = next.wrapping_add(step * b_row);
                    for i in (0..WIDE * LANES).step_by(64 / size_of::<B>()) {
                        prefetch(ahead.wrapping_add(i));
                    }
                    let x = _mm512_set1_ps(a[step]);
                    let sums = &mut sums[step % 2];
                    for i in 0..WIDE {
                        let b = B::load_vector::<Avx512>(b.add(step * b_row + i * LANES)).0;
                        sums[i] = _mm512_fmadd_ps(x, b, sums[i]);
                    }
                }
                let [even, odd] = sums;
                for i in 0..WIDE {
                    total[i] = _mm512_add_ps(total[i], _mm512_add_ps(even[i], odd[i]));
                }
            }
            for i in 0..vectors {
                _mm512_storeu_ps(c.as_mut_ptr().add(i * LANES), total[i]);
            }
        }
    }
}
