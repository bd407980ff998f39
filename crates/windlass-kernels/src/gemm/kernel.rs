//! The table of what differs between levels: packing, micro-kernel, epilogue, and the block sizes they imply.

use crate::DType;
use crate::dispatch::Level;

use super::amx;
use super::lanes::{Lanes8, Lanes16, Pairs16};
use super::micro::{self, F32, HALF, PAIRS, WIDEN};

/// An operand as packing sees it: lanes (rows of A, columns of B) by steps of the inner dimension.
#[derive(Clone, Copy)]
pub(super) struct Source {
    /// The first element.
    pub data: *const u8,
    /// Bytes between rows of memory.
    pub stride: usize,
    /// Bytes of one element.
    pub size: usize,
    /// Whether a row of memory is a lane (or else a step).
    pub k_contiguous: bool,
}

// SAFETY: a view that is only read; `gemm` holds the borrow.
unsafe impl Sync for Source {}

impl Source {
    /// The address of an element; valid to read where both numbers are in range.
    #[inline(always)]
    pub fn at(&self, lane: usize, k: usize) -> *const u8 {
        let (row, column) = if self.k_contiguous {
            (lane, k)
        } else {
            (k, lane)
        };
        self.data
            .wrapping_add(row * self.stride + column * self.size)
    }

    /// The operand without its first `lanes` lanes.
    #[inline(always)]
    pub fn skip_lanes(&self, lanes: usize) -> Source {
        Source {
            data: self.at(lanes, 0),
            ..*self
        }
    }

    /// The operand without its first `k` steps.
    pub fn skip_k(&self, k: usize) -> Source {
        Source {
            data: self.at(0, k),
            ..*self
        }
    }
}

/// Packs `lanes` lanes of `depth` steps to `dst`, `pitch` lanes wide.
pub(super) type Pack =
    unsafe fn(src: Source, lanes: usize, depth: usize, dst: *mut f32, pitch: usize);

/// One way to multiply at one level. Sizes are in 32-bit words.
pub(super) struct Kernel {
    /// Name in benchmarks and messages.
    pub name: &'static str,
    /// Rows of a sliver of A.
    pub mr: usize,
    /// Columns of a sliver of B.
    pub nr: usize,
    /// Depth of a block of the inner dimension.
    pub kc: usize,
    /// Steps of the inner dimension are padded to a multiple of this.
    pub k_unit: usize,
    /// Elements of the inner dimension in a word.
    pub per_word: usize,
    /// Rows of a sliver of A are padded to a multiple of this.
    pub row_unit: usize,
    /// Packs a sliver of A; `pitch` = rows padded to `row_unit`. Writes up to 16 words past the sliver.
    pub pack_a: Pack,
    /// Packs a sliver of B; `pitch` = `nr`, missing columns are zero.
    pub pack_b: Pack,
    /// `sums[mr, nr] (+)= a b` for `rows` padded rows and `words` words of depth, overwriting when `first`;
    /// fetches from `ahead`, which need not be valid.
    pub multiply: unsafe fn(
        rows: usize,
        words: usize,
        a: *const f32,
        b: *const f32,
        sums: *mut f32,
        first: bool,
        ahead: *const f32,
    ),
    /// Prepares the thread for `multiply`.
    pub enter: unsafe fn(),
    /// Undoes `enter`.
    pub leave: unsafe fn(),
}

impl Kernel {
    /// Words of depth for `depth` steps.
    pub fn words(&self, depth: usize) -> usize {
        depth.next_multiple_of(self.k_unit) / self.per_word
    }

    /// `rows` rows of a sliver of A, padded.
    pub fn padded(&self, rows: usize) -> usize {
        rows.next_multiple_of(self.row_unit)
    }

    /// Room for a sliver of A of the given depth: whole cache lines, and one for vectors that are stored whole.
    pub fn a_room(&self, rows: usize, depth: usize) -> usize {
        (self.padded(rows) * self.words(depth)).next_multiple_of(16) + 16
    }
}

/// The kernel for a storage type at a level; `None` where the scalar reference runs.
pub(super) fn select(dtype: DType, level: Level) -> Option<&'static Kernel> {
    match (dtype, level) {
        (DType::F64, _) | (_, Level::Scalar) => None,
        (DType::F32, Level::Avx2) => Some(&AVX2_F32),
        (DType::Bf16, Level::Avx2) => Some(&AVX2_BF16),
        (DType::F32, Level::Avx512 | Level::Amx) => Some(&AVX512_F32),
        (DType::Bf16, Level::Avx512) if fast_pairs() => Some(&AVX512_PAIRS),
        (DType::Bf16, Level::Avx512) => Some(&AVX512_BF16),
        (DType::Bf16, Level::Amx) => Some(&AMX_BF16),
        (DType::F16, Level::Avx2) => Some(&AVX2_F16),
        (DType::F16, Level::Avx512 | Level::Amx) => Some(&AVX512_F16),
    }
}

/// Whether products of `bf16` pairs are twice as fast as `f32` products (AMD) or half as fast (Intel): known by vendor,
/// because a choice by timing would make bits depend on the weather.
fn fast_pairs() -> bool {
    static FAST: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *FAST.get_or_init(|| {
        let id = std::arch::x86_64::__cpuid(0);
        let vendor = [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat();
        vendor == b"AuthenticAMD" && is_x86_feature_detected!("avx512bf16")
    })
}

/// Instantiates packing in a function with the features.
macro_rules! packing {
    ($name:ident, $features:literal, $lanes:ty, $mode:expr) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(src: Source, lanes: usize, depth: usize, dst: *mut f32, pitch: usize) {
            // SAFETY: the features are enabled here; the rest is the caller's promise.
            unsafe { micro::pack::<$lanes, { $mode }>(src, lanes, depth, dst, pitch) }
        }
    };
}
packing!(pack_avx2_f32, "avx2,fma,f16c", Lanes8, F32);
packing!(pack_avx2_bf16, "avx2,fma,f16c", Lanes8, WIDEN);
packing!(pack_avx2_f16, "avx2,fma,f16c", Lanes8, HALF);
packing!(
    pack_avx512_f16,
    "avx512f,avx512bw,avx512vl,avx512dq",
    Lanes16,
    HALF
);
packing!(
    pack_avx512_f32,
    "avx512f,avx512bw,avx512vl,avx512dq",
    Lanes16,
    F32
);
packing!(
    pack_avx512_bf16,
    "avx512f,avx512bw,avx512vl,avx512dq",
    Lanes16,
    WIDEN
);
packing!(
    pack_avx512_pairs,
    "avx512f,avx512bw,avx512vl,avx512dq",
    Lanes16,
    PAIRS
);

/// Instantiates a micro-kernel for every number of rows.
macro_rules! micro_kernel {
    ($name:ident, $features:literal, $lanes:ty, [$($rows:literal)*]) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(rows: usize, words: usize, a: *const f32, b: *const f32, sums: *mut f32, first: bool, ahead: *const f32) {
            // SAFETY: the features are enabled here; the rest is the caller's promise.
            unsafe {
                match rows {
                    $($rows => micro::multiply::<$lanes, $rows>(words, a, b, sums, first, ahead),)*
                    _ => unreachable!("a sliver of {rows} rows"),
                }
            }
        }
    };
}
micro_kernel!(multiply_avx2, "avx2,fma,f16c", Lanes8, [1 2 3 4 5 6]);
micro_kernel!(multiply_avx512, "avx512f,avx512bw,avx512vl,avx512dq", Lanes16, [1 2 3 4 5 6 7 8 9 10 11 12 13 14]);
micro_kernel!(
    multiply_pairs,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16",
    Pairs16,
    [1 2 3 4 5 6 7 8 9 10 11 12 13 14]
);

unsafe fn nothing() {}

/// The sums of all kernels on `f32` products are cut at the same depth, so that `f32` results are the same bits on AVX2
/// and AVX-512.
const KC: usize = 384;

const AVX2_F32: Kernel = Kernel {
    name: "avx2 f32",
    mr: 6,
    nr: 16,
    kc: KC,
    k_unit: 1,
    per_word: 1,
    row_unit: 1,
    pack_a: pack_avx2_f32,
    pack_b: pack_avx2_f32,
    multiply: multiply_avx2,
    enter: nothing,
    leave: nothing,
};
const AVX2_BF16: Kernel = Kernel {
    name: "avx2 bf16 widened",
    pack_a: pack_avx2_bf16,
    pack_b: pack_avx2_bf16,
    ..AVX2_F32
};
const AVX2_F16: Kernel = Kernel {
    name: "avx2 f16 widened",
    pack_a: pack_avx2_f16,
    pack_b: pack_avx2_f16,
    ..AVX2_F32
};
const AVX512_F32: Kernel = Kernel {
    name: "avx512 f32",
    mr: 14,
    nr: 32,
    pack_a: pack_avx512_f32,
    pack_b: pack_avx512_f32,
    multiply: multiply_avx512,
    ..AVX2_F32
};
pub(super) const AVX512_BF16: Kernel = Kernel {
    name: "avx512 bf16 widened",
    pack_a: pack_avx512_bf16,
    pack_b: pack_avx512_bf16,
    ..AVX512_F32
};
const AVX512_F16: Kernel = Kernel {
    name: "avx512 f16 widened",
    pack_a: pack_avx512_f16,
    pack_b: pack_avx512_f16,
    ..AVX512_F32
};
/// Pairs of `bf16`: for CPUs that multiply them at twice the rate.
pub(super) const AVX512_PAIRS: Kernel = Kernel {
    name: "avx512 bf16 pairs",
    kc: 2 * KC,
    k_unit: 2,
    per_word: 2,
    pack_a: pack_avx512_pairs,
    pack_b: pack_avx512_pairs,
    multiply: multiply_pairs,
    ..AVX512_F32
};
const AMX_BF16: Kernel = Kernel {
    name: "amx bf16",
    mr: 32,
    nr: 32,
    kc: 1024,
    k_unit: 32,
    per_word: 2,
    row_unit: 16,
    pack_a: amx::pack_a,
    pack_b: amx::pack_b,
    multiply: amx::multiply,
    enter: amx::enter,
    leave: amx::leave,
};
