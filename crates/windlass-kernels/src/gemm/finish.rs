//! The epilogue: sums become C, rounded once.

use half::{bf16, f16};

use crate::DType;
use crate::dispatch::Level;
use crate::simd::{Avx2, Avx512, Simd, SimdElement};

/// Where results go and what is added to them. Strides in elements; absent operands are null.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub c: *mut u8,
    pub c_stride: usize,
    pub accumulate: bool,
    pub bias: *const u8,
    pub residual: *const u8,
    pub residual_stride: usize,
    pub finish: Finish,
}

// SAFETY: tasks write disjoint blocks of C; the rest is only read. `gemm` holds the borrows.
unsafe impl Sync for Target {}

/// A block of sums with `pitch` words a row and its place in C.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub sums: *const f32,
    pub pitch: usize,
    pub row: usize,
    pub column: usize,
    pub rows: usize,
    pub columns: usize,
}

/// Writes one block of C.
pub(super) type Finish = unsafe fn(&Target, Block);

/// The epilogue for operands of one type and results of another.
pub(super) fn select(operands: DType, results: DType, level: Level) -> Finish {
    match (operands, results) {
        (DType::F32, DType::F32) => at::<f32, f32>(level),
        (DType::F32, DType::Bf16) => at::<f32, bf16>(level),
        (DType::Bf16, DType::F32) => at::<bf16, f32>(level),
        (DType::Bf16, DType::Bf16) => at::<bf16, bf16>(level),
        (DType::F32, DType::F16) => at::<f32, f16>(level),
        (DType::Bf16, DType::F16) => at::<bf16, f16>(level),
        (DType::F16, DType::F32) => at::<f16, f32>(level),
        (DType::F16, DType::Bf16) => at::<f16, bf16>(level),
        (DType::F16, DType::F16) => at::<f16, f16>(level),
        (DType::F64, _) | (_, DType::F64) => unreachable!("f64 runs the reference"),
    }
}

fn at<E: SimdElement, C: SimdElement>(level: Level) -> Finish {
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2<E: SimdElement, C: SimdElement>(target: &Target, block: Block) {
        // SAFETY: the features are enabled here; the rest is the caller's promise.
        unsafe { finish::<Avx2, E, C>(target, block) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn avx512<E: SimdElement, C: SimdElement>(target: &Target, block: Block) {
        // SAFETY: as above.
        unsafe { finish::<Avx512, E, C>(target, block) }
    }
    if level == Level::Avx2 {
        avx2::<E, C>
    } else {
        avx512::<E, C>
    }
}

/// `C = sums (+ C) (+ bias) (+ residual)`, added in this order.
///
/// # Safety
/// The block lies in C and the operands, and no other thread accesses it in C.
#[inline(always)]
unsafe fn finish<S: Simd, E: SimdElement, C: SimdElement>(t: &Target, block: Block) {
    // SAFETY: as the caller promised.
    unsafe {
        for row in 0..block.rows {
            let sums = block.sums.add(row * block.pitch);
            let c =
                t.c.cast::<C>()
                    .add((block.row + row) * t.c_stride + block.column);
            let mut column = 0;
            while column < block.columns {
                let n = (block.columns - column).min(S::LANES);
                let mut v = S::load(sums.add(column));
                if t.accumulate {
                    v = v + load::<S, C>(c.add(column), n);
                }
                if !t.bias.is_null() {
                    v = v + load::<S, E>(t.bias.cast::<E>().add(block.column + column), n);
                }
                if !t.residual.is_null() {
                    let at = (block.row + row) * t.residual_stride + block.column + column;
                    v = v + load::<S, E>(t.residual.cast::<E>().add(at), n);
                }
                if n == S::LANES {
                    C::store_vector(c.add(column), v);
                } else {
                    C::store_vector_partial(c.add(column), v, n);
                }
                column += S::LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn load<S: Simd, T: SimdElement>(from: *const T, n: usize) -> S {
    // SAFETY: `n` elements are valid by the caller's promise.
    unsafe {
        if n == S::LANES {
            T::load_vector(from)
        } else {
            T::load_vector_partial(from, n)
        }
    }
}
