//! The storage types that kernels are generic over.

use half::{bf16, f16};

/// Storage type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// The upper half of an `f32`: 8 exponent bits, 7 mantissa bits.
    Bf16,
    /// IEEE half precision: 5 exponent bits, 10 mantissa bits; infinite beyond 65 504.
    F16,
    /// IEEE double precision: the scalar reference only, for finite differences.
    F64,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::F64 => 8,
        }
    }

    /// The type in which sums, statistics and weight gradients of this storage type are kept.
    pub const fn accumulator(self) -> DType {
        match self {
            DType::F64 => DType::F64,
            _ => DType::F32,
        }
    }

    /// The name used in messages and in safetensors headers.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::Bf16 => "BF16",
            DType::F16 => "F16",
            DType::F64 => "F64",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// A storage type: `f32`, `bf16` or `f16` (arithmetic in `f32`), or `f64` (scalar reference only).
///
/// Arithmetic is done in [`Element::Acc`]; loads widen, stores round to nearest even.
pub trait Element:
    sealed::Sealed + Copy + Default + Send + Sync + PartialEq + std::fmt::Debug + 'static
{
    /// The arithmetic type.
    type Acc: Float;
    /// The storage type's tag.
    const DTYPE: DType;
    /// Widens to the arithmetic type, exactly.
    fn load(self) -> Self::Acc;
    /// Rounds from the arithmetic type, to nearest even.
    fn store(value: Self::Acc) -> Self;
    /// Converts from `f64`, rounding.
    fn from_f64(value: f64) -> Self {
        Self::store(Self::Acc::of(value))
    }
    /// Converts to `f64`, exactly.
    fn to_f64(self) -> f64 {
        self.load().f64()
    }
}

/// An arithmetic type: `f32` or `f64`.
pub trait Float:
    Element<Acc = Self>
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
    + std::iter::Sum
{
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Negative infinity.
    const NEG_INFINITY: Self;
    /// From `f64`, rounded.
    fn of(value: f64) -> Self;
    /// To `f64`, exactly.
    fn f64(self) -> f64;
    /// `e^self`.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// The larger of two numbers.
    fn maximum(self, other: Self) -> Self;
}

macro_rules! float {
    ($t:ty, $dtype:expr) => {
        impl Element for $t {
            type Acc = $t;
            const DTYPE: DType = $dtype;
            #[inline(always)]
            fn load(self) -> $t {
                self
            }
            #[inline(always)]
            fn store(value: $t) -> $t {
                value
            }
        }
        impl Float for $t {
            const ZERO: $t = 0.0;
            const ONE: $t = 1.0;
            const NEG_INFINITY: $t = <$t>::NEG_INFINITY;
            #[inline(always)]
            fn of(value: f64) -> $t {
                value as $t
            }
            #[inline(always)]
            fn f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn exp(self) -> $t {
                self.exp()
            }
            #[inline(always)]
            fn ln(self) -> $t {
                self.ln()
            }
            #[inline(always)]
            fn tanh(self) -> $t {
                self.tanh()
            }
            #[inline(always)]
            fn sqrt(self) -> $t {
                self.sqrt()
            }
            #[inline(always)]
            fn abs(self) -> $t {
                self.abs()
            }
            #[inline(always)]
            fn maximum(self, other: $t) -> $t {
                self.max(other)
            }
        }
    };
}
float!(f32, DType::F32);
float!(f64, DType::F64);

impl Element for bf16 {
    type Acc = f32;
    const DTYPE: DType = DType::Bf16;
    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn store(value: f32) -> bf16 {
        let bits = value.to_bits();
        if value.is_nan() {
            return bf16::from_bits((bits >> 16) as u16 | 0x40);
        }
        let rounding = 0x7fff + ((bits >> 16) & 1);
        bf16::from_bits((bits.wrapping_add(rounding) >> 16) as u16)
    }
}

impl Element for f16 {
    type Acc = f32;
    const DTYPE: DType = DType::F16;
    #[inline(always)]
    fn load(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn store(value: f32) -> f16 {
        f16::from_f32(value)
    }
}
