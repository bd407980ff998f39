//! How trained values, gradients and moments lie in memory, and the parts of them that tasks take.

use std::ops::Range;

use half::{bf16, f16};

use super::code::{self, Code};
use crate::pool::SharedMut;
use crate::split;

/// Elements that share one scale in [`Moment::Q8`].
pub const BLOCK: usize = 256;

/// The values that an optimizer updates.
pub enum Values<'a> {
    /// Parameters in `f32`: the weights themselves.
    F32(&'a mut [f32]),
    /// Parameters in `bf16` with `f32` masters: `high` is the master rounded (half up), `low` what is missing, so
    /// that both together are the master to the bit, in four bytes instead of six (see [`crate::split`]).
    Split {
        /// The weights that forward passes read.
        high: &'a mut [bf16],
        /// `master bits = (high bits << 16) + low`.
        low: &'a mut [i16],
    },
    /// Parameters in `f16` with `f32` masters.
    Half {
        /// The weights that forward passes read: the masters rounded, infinite where one is too large.
        low: &'a mut [f16],
        /// The masters.
        master: &'a mut [f32],
    },
    /// Double precision: the scalar reference only.
    F64(&'a mut [f64]),
}

impl Values<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::Split { high, .. } => high.len(),
            Values::Half { master, .. } => master.len(),
            Values::F64(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the master values of `range` out: exactly, but for `f64`, which are rounded.
    pub fn master(&self, range: Range<usize>) -> Vec<f32> {
        match self {
            Values::F32(values) => values[range].to_vec(),
            Values::Split { high, low } => high[range.clone()]
                .iter()
                .zip(&low[range])
                .map(|(&h, &l)| split::join(h, l))
                .collect(),
            Values::Half { master, .. } => master[range].to_vec(),
            Values::F64(values) => values[range].iter().map(|&v| v as f32).collect(),
        }
    }

    /// Sets the values from `start` on from masters.
    pub fn set_master(&mut self, start: usize, masters: &[f32]) {
        let at = start..start + masters.len();
        match self {
            Values::F32(values) => values[at].copy_from_slice(masters),
            Values::Split { high, low } => {
                for (i, &value) in at.zip(masters) {
                    (high[i], low[i]) = split::split(value);
                }
            }
            Values::Half { low, master } => {
                master[at.clone()].copy_from_slice(masters);
                for (low, &value) in low[at].iter_mut().zip(masters) {
                    *low = f16::from_f32(value);
                }
            }
            Values::F64(values) => {
                for (to, &value) in values[at].iter_mut().zip(masters) {
                    *to = value.into();
                }
            }
        }
    }

    /// The values of a range, borrowed from these.
    pub fn part(&mut self, range: Range<usize>) -> Values<'_> {
        match self {
            Values::F32(values) => Values::F32(&mut values[range]),
            Values::Split { high, low } => Values::Split {
                high: &mut high[range.clone()],
                low: &mut low[range],
            },
            Values::Half { low, master } => Values::Half {
                low: &mut low[range.clone()],
                master: &mut master[range],
            },
            Values::F64(values) => Values::F64(&mut values[range]),
        }
    }

    /// Asserts that the parts of a value are as many.
    #[track_caller]
    pub(super) fn check(&self) {
        let (a, b) = match self {
            Values::Split { high, low } => (low.len(), high.len()),
            Values::Half { low, master } => (low.len(), master.len()),
            Values::F32(_) | Values::F64(_) => return,
        };
        assert!(a == b, "{a} low parts of {b} values");
    }
}

/// The gradient of the values; the `Take` forms are left zero.
pub enum Grad<'a> {
    /// In single precision.
    F32(&'a [f32]),
    /// In `bf16`.
    Bf16(&'a [bf16]),
    /// In `f16`.
    F16(&'a [f16]),
    /// As [`Grad::F32`], set to zero in the same pass.
    TakeF32(&'a mut [f32]),
    /// As [`Grad::Bf16`], set to zero in the same pass.
    TakeBf16(&'a mut [bf16]),
    /// As [`Grad::F16`], set to zero in the same pass.
    TakeF16(&'a mut [f16]),
    /// Double precision: the scalar reference only.
    F64(&'a [f64]),
}

impl Grad<'_> {
    /// Some of the elements, to be read.
    pub fn part(&self, at: Range<usize>) -> Grad<'_> {
        match self {
            Grad::F32(g) => Grad::F32(&g[at]),
            Grad::Bf16(g) => Grad::Bf16(&g[at]),
            Grad::F16(g) => Grad::F16(&g[at]),
            Grad::TakeF32(g) => Grad::F32(&g[at]),
            Grad::TakeBf16(g) => Grad::Bf16(&g[at]),
            Grad::TakeF16(g) => Grad::F16(&g[at]),
            Grad::F64(g) => Grad::F64(&g[at]),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Grad::F32(g) => g.len(),
            Grad::Bf16(g) => g.len(),
            Grad::TakeF32(g) => g.len(),
            Grad::TakeBf16(g) => g.len(),
            Grad::F16(g) => g.len(),
            Grad::TakeF16(g) => g.len(),
            Grad::F64(g) => g.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How moments are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// Single precision: 4 bytes.
    F32,
    /// `bf16`, rounded to nearest even: 2 bytes.
    Bf16,
    /// 8-bit codes and a scale for each [`BLOCK`]: 1.016 bytes.
    Q8,
    /// Double precision, for [`Values::F64`] only: 8 bytes.
    F64,
}

/// One moment of the values.
pub enum Moment<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Rounded to nearest even when it is written.
    Bf16(&'a mut [bf16]),
    /// Codes of the dynamic 8-bit map times the scale of their [`BLOCK`], which begin at the slice's start; the last may
    /// be short. Zero bytes are a moment of zero. Codes ascend with their values, as in bitsandbytes.
    ///
    /// # Source
    /// Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", sections 2.1 and 2.2.
    Q8 {
        /// One code an element.
        codes: &'a mut [u8],
        /// The largest magnitude of each block.
        scales: &'a mut [f32],
    },
    /// Double precision: the scalar reference only.
    F64(&'a mut [f64]),
}

impl Moment<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Moment::F32(m) => m.len(),
            Moment::Bf16(m) => m.len(),
            Moment::Q8 { codes, .. } => codes.len(),
            Moment::F64(m) => m.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How the moment is stored.
    pub fn storage(&self) -> Storage {
        match self {
            Moment::F32(_) => Storage::F32,
            Moment::Bf16(_) => Storage::Bf16,
            Moment::Q8 { .. } => Storage::Q8,
            Moment::F64(_) => Storage::F64,
        }
    }

    /// A part, which in 8 bits begins at a block.
    ///
    /// # Panics
    /// When it does not, or is not within.
    #[track_caller]
    pub fn part(&mut self, range: Range<usize>) -> Moment<'_> {
        match self {
            Moment::F32(m) => Moment::F32(&mut m[range]),
            Moment::Bf16(m) => Moment::Bf16(&mut m[range]),
            Moment::Q8 { codes, scales } => {
                let start = range.start;
                assert!(start.is_multiple_of(BLOCK), "{start} is inside a block");
                let blocks = start / BLOCK..range.end.div_ceil(BLOCK);
                Moment::Q8 {
                    codes: &mut codes[range],
                    scales: &mut scales[blocks],
                }
            }
            Moment::F64(m) => Moment::F64(&mut m[range]),
        }
    }

    /// Copies the elements of `range` out, in `f32`. `index` is the moment's place in its rule, which decides about
    /// the sign of 8-bit codes.
    pub fn read(&self, index: usize, range: Range<usize>) -> Vec<f32> {
        match self {
            Moment::F32(m) => m[range].to_vec(),
            Moment::Bf16(m) => m[range].iter().map(|m| m.to_f32()).collect(),
            Moment::Q8 { codes, scales } => range
                .map(|i| Code::of(index).decode(codes[i]) * scales[i / BLOCK])
                .collect(),
            Moment::F64(m) => m[range].iter().map(|&m| m as f32).collect(),
        }
    }

    /// Sets the elements from `start` on, rounding; `index` as in [`Moment::read`].
    ///
    /// # Panics
    /// When the values do not fit, or, in 8 bits, are not whole blocks.
    #[track_caller]
    pub fn write(&mut self, index: usize, start: usize, values: &[f32]) {
        let at = start..start + values.len();
        match self {
            Moment::F32(m) => m[at].copy_from_slice(values),
            Moment::Bf16(m) => {
                for (m, &value) in m[at].iter_mut().zip(values) {
                    *m = <bf16 as crate::Element>::store(value);
                }
            }
            Moment::Q8 { codes, scales } => {
                let whole = at.end.is_multiple_of(BLOCK) || at.end == codes.len();
                assert!(
                    start.is_multiple_of(BLOCK) && whole,
                    "{at:?} of {} elements are not whole blocks of {BLOCK}",
                    codes.len()
                );
                let blocks = codes[at]
                    .chunks_mut(BLOCK)
                    .zip(&mut scales[start / BLOCK..]);
                for ((codes, scale), values) in blocks.zip(values.chunks(BLOCK)) {
                    *scale = code::encode_block(Code::of(index), values, codes);
                }
            }
            Moment::F64(m) => {
                for (m, &value) in m[at].iter_mut().zip(values) {
                    *m = value.into();
                }
            }
        }
    }

    /// Asserts the lengths.
    #[track_caller]
    pub(super) fn check(&self, index: usize, len: usize) {
        assert!(
            self.len() == len,
            "moment {index} has {} elements of {len}",
            self.len()
        );
        if let Moment::Q8 { scales, .. } = self {
            assert!(
                scales.len() == len.div_ceil(BLOCK),
                "moment {index} has {} scales for {} blocks",
                scales.len(),
                len.div_ceil(BLOCK)
            );
        }
    }
}

/// [`Values`] that tasks take parts of.
pub(super) enum SharedValues<'a> {
    F32(SharedMut<'a, f32>),
    Split(SharedMut<'a, bf16>, SharedMut<'a, i16>),
    Half(SharedMut<'a, f16>, SharedMut<'a, f32>),
    F64(SharedMut<'a, f64>),
}

impl<'a> SharedValues<'a> {
    pub fn new(values: Values<'a>) -> Self {
        match values {
            Values::F32(v) => SharedValues::F32(SharedMut::new(v)),
            Values::Split { high, low } => {
                SharedValues::Split(SharedMut::new(high), SharedMut::new(low))
            }
            Values::Half { low, master } => {
                SharedValues::Half(SharedMut::new(low), SharedMut::new(master))
            }
            Values::F64(v) => SharedValues::F64(SharedMut::new(v)),
        }
    }

    /// # Safety
    /// As [`SharedMut::slice`].
    pub unsafe fn part(&self, at: Range<usize>) -> Values<'_> {
        // SAFETY (all): the caller's promise.
        match self {
            SharedValues::F32(v) => Values::F32(unsafe { v.part(at) }),
            SharedValues::Split(high, low) => Values::Split {
                high: unsafe { high.part(at.clone()) },
                low: unsafe { low.part(at) },
            },
            SharedValues::Half(low, master) => Values::Half {
                low: unsafe { low.part(at.clone()) },
                master: unsafe { master.part(at) },
            },
            SharedValues::F64(v) => Values::F64(unsafe { v.part(at) }),
        }
    }
}

/// A [`Grad`] that tasks take parts of.
pub(super) enum SharedGrad<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    TakeF32(SharedMut<'a, f32>),
    TakeBf16(SharedMut<'a, bf16>),
    F16(&'a [f16]),
    TakeF16(SharedMut<'a, f16>),
    F64(&'a [f64]),
}

impl<'a> SharedGrad<'a> {
    pub fn new(grad: Grad<'a>) -> Self {
        match grad {
            Grad::F32(g) => SharedGrad::F32(g),
            Grad::Bf16(g) => SharedGrad::Bf16(g),
            Grad::TakeF32(g) => SharedGrad::TakeF32(SharedMut::new(g)),
            Grad::TakeBf16(g) => SharedGrad::TakeBf16(SharedMut::new(g)),
            Grad::F16(g) => SharedGrad::F16(g),
            Grad::TakeF16(g) => SharedGrad::TakeF16(SharedMut::new(g)),
            Grad::F64(g) => SharedGrad::F64(g),
        }
    }

    /// # Safety
    /// As [`SharedMut::slice`].
    pub unsafe fn part(&self, at: Range<usize>) -> Grad<'_> {
        // SAFETY (all): the caller's promise.
        match self {
            SharedGrad::F32(g) => Grad::F32(&g[at]),
            SharedGrad::Bf16(g) => Grad::Bf16(&g[at]),
            SharedGrad::TakeF32(g) => Grad::TakeF32(unsafe { g.part(at) }),
            SharedGrad::TakeBf16(g) => Grad::TakeBf16(unsafe { g.part(at) }),
            SharedGrad::F16(g) => Grad::F16(&g[at]),
            SharedGrad::TakeF16(g) => Grad::TakeF16(unsafe { g.part(at) }),
            SharedGrad::F64(g) => Grad::F64(&g[at]),
        }
    }
}

/// A [`Moment`] that tasks take parts of.
pub(super) enum SharedMoment<'a> {
    F32(SharedMut<'a, f32>),
    Bf16(SharedMut<'a, bf16>),
    Q8(SharedMut<'a, u8>, SharedMut<'a, f32>),
    F64(SharedMut<'a, f64>),
}

impl<'a> SharedMoment<'a> {
    pub fn new(moment: &'a mut Moment<'_>) -> Self {
        match moment {
            Moment::F32(m) => SharedMoment::F32(SharedMut::new(m)),
            Moment::Bf16(m) => SharedMoment::Bf16(SharedMut::new(m)),
            Moment::Q8 { codes, scales } => {
                SharedMoment::Q8(SharedMut::new(codes), SharedMut::new(scales))
            }
            Moment::F64(m) => SharedMoment::F64(SharedMut::new(m)),
        }
    }

    /// The part of a range, which starts at a block's start.
    ///
    /// # Safety
    /// As [`SharedMut::slice`].
    pub unsafe fn part(&self, at: Range<usize>) -> Moment<'_> {
        // SAFETY (all): the caller's promise.
        match self {
            SharedMoment::F32(m) => Moment::F32(unsafe { m.part(at) }),
            SharedMoment::Bf16(m) => Moment::Bf16(unsafe { m.part(at) }),
            SharedMoment::Q8(codes, scales) => Moment::Q8 {
                scales: unsafe { scales.part(at.start / BLOCK..at.end.div_ceil(BLOCK)) },
                codes: unsafe { codes.part(at) },
            },
            SharedMoment::F64(m) => Moment::F64(unsafe { m.part(at) }),
        }
    }
}
