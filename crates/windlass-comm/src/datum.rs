//! The numbers that ranks exchange.

use std::fmt;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
}

/// The type of the numbers in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the types themselves")]
pub enum Element {
    F32,
    F64,
    Bf16,
    F16,
    U8,
    I8,
    I16,
    I32,
    I64,
    U32,
    U64,
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// A number that can be sent. No other crate can add one.
pub trait Datum: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// Which type it is.
    const ELEMENT: Element;
}

/// A number that can be summed over ranks.
pub trait Real: Datum {
    /// What sums are taken and kept in.
    type Sum: Datum;
    /// `out = values`, in the type of sums.
    #[doc(hidden)]
    fn widen(values: &[Self], out: &mut [Self::Sum]);
    /// `out = first + second`, in the type of sums.
    #[doc(hidden)]
    fn add_two(first: &[Self], second: &[Self], out: &mut [Self::Sum]);
    /// `sum += values`.
    #[doc(hidden)]
    fn add(sum: &mut [Self::Sum], values: &[Self]);
    /// `sum += more`, both sums already.
    #[doc(hidden)]
    fn add_sums(sum: &mut [Self::Sum], more: &[Self::Sum]);
}

macro_rules! datum {
    ($($element:ident $number:ty),*) => {$(
        impl sealed::Sealed for $number {}
        impl Datum for $number {
            const ELEMENT: Element = Element::$element;
        }
    )*};
}

datum!(F32 f32, F64 f64, Bf16 bf16, F16 f16, U8 u8, I8 i8, I16 i16, I32 i32, I64 i64, U32 u32, U64 u64);

macro_rules! real {
    ($($number:ty),*) => {$(
        impl Real for $number {
            type Sum = $number;
            fn widen(values: &[Self], out: &mut [Self]) {
                out.copy_from_slice(values);
            }
            fn add_two(first: &[Self], second: &[Self], out: &mut [Self]) {
                for ((out, first), second) in out.iter_mut().zip(first).zip(second) {
                    *out = *first + *second;
                }
            }
            fn add(sum: &mut [Self], values: &[Self]) {
                for (sum, value) in sum.iter_mut().zip(values) {
                    *sum += *value;
                }
            }
            fn add_sums(sum: &mut [Self], more: &[Self]) {
                Self::add(sum, more);
            }
        }
    )*};
}

real!(f32, f64);

/// The `f32` with the same value; without a test for NaN, so that loops over it become vector code.
fn widened(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

impl Real for bf16 {
    type Sum = f32;
    fn widen(values: &[Self], out: &mut [f32]) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = widened(*value);
        }
    }
    fn add_two(first: &[Self], second: &[Self], out: &mut [f32]) {
        for ((out, first), second) in out.iter_mut().zip(first).zip(second) {
            *out = widened(*first) + widened(*second);
        }
    }
    fn add(sum: &mut [f32], values: &[Self]) {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum += widened(*value);
        }
    }
    fn add_sums(sum: &mut [f32], more: &[f32]) {
        f32::add(sum, more);
    }
}

impl Real for f16 {
    type Sum = f32;
    fn widen(values: &[Self], out: &mut [f32]) {
        values.convert_to_f32_slice(out);
    }
    fn add_two(first: &[Self], second: &[Self], out: &mut [f32]) {
        Self::widen(first, out);
        Self::add(out, second);
    }
    fn add(sum: &mut [f32], values: &[Self]) {
        // The processor's conversion is chosen once a slice, so not number by number.
        let mut wide = [0.0f32; 256];
        for (sum, values) in sum.chunks_mut(256).zip(values.chunks(256)) {
            let wide = &mut wide[..values.len()];
            values.convert_to_f32_slice(wide);
            f32::add(sum, wide);
        }
    }
    fn add_sums(sum: &mut [f32], more: &[f32]) {
        f32::add(sum, more);
    }
}
