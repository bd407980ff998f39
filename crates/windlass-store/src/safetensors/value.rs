//! Numbers between memory and file: every pair of floating types, rounded once, to nearest even.

use half::{bf16, f16};

use super::Dtype;
use crate::mmap::{self, Plain};

/// A floating type that tensors are stored in or read into.
pub trait Value: Plain {
    /// Its tag in a file.
    const DTYPE: Dtype;
    /// From `f32`, rounding to nearest even.
    fn from_f32(value: f32) -> Self;
    /// From `f64`, rounding to nearest even.
    fn from_f64(value: f64) -> Self;
    /// To another type, rounding once.
    fn cast<U: Value>(self) -> U;
}

impl Value for f32 {
    const DTYPE: Dtype = Dtype::F32;
    fn from_f32(value: f32) -> Self {
        value
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    fn cast<U: Value>(self) -> U {
        U::from_f32(self)
    }
}

impl Value for f64 {
    const DTYPE: Dtype = Dtype::F64;
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }
    fn from_f64(value: f64) -> Self {
        value
    }
    fn cast<U: Value>(self) -> U {
        U::from_f64(self)
    }
}

impl Value for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn from_f64(value: f64) -> Self {
        bf16::from_f32(round_to_odd(value))
    }
    fn cast<U: Value>(self) -> U {
        U::from_f32(self.to_f32())
    }
}

impl Value for f16 {
    const DTYPE: Dtype = Dtype::F16;
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn from_f64(value: f64) -> Self {
        f16::from_f32(round_to_odd(value))
    }
    fn cast<U: Value>(self) -> U {
        U::from_f32(self.to_f32())
    }
}

/// The `f32` next to `value` toward zero, made odd if that is inexact. Rounding it once more, to a type at least two
/// bits shorter, gives what rounding `value` itself would: the odd bit remembers that something lay below.
///
/// # Source
/// Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd".
fn round_to_odd(value: f64) -> f32 {
    let near = value as f32;
    if near.is_nan() || f64::from(near) == value {
        return near;
    }
    let toward_zero = near.to_bits() - u32::from(f64::from(near).abs() > value.abs());
    f32::from_bits(toward_zero | 1)
}

/// Whether `dtype` is a [`Value`].
pub(super) fn is_floating(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F64 | Dtype::BF16 | Dtype::F16)
}

/// Reads `bytes`, little-endian elements of `dtype` at any alignment, into `out`.
///
/// # Panics
/// If the lengths do not match, or `dtype` is not a floating type.
#[track_caller]
pub fn read_values<T: Value>(dtype: Dtype, bytes: &[u8], out: &mut [T]) {
    assert_eq!(
        bytes.len() * 8,
        out.len() * dtype.bitsize(),
        "bits stored as {dtype} and bits asked for"
    );
    match dtype {
        Dtype::F32 => decode(bytes, out, f32::from_le_bytes),
        Dtype::BF16 => decode(bytes, out, bf16::from_le_bytes),
        Dtype::F16 => decode(bytes, out, f16::from_le_bytes),
        Dtype::F64 => decode(bytes, out, f64::from_le_bytes),
        other => panic!("{other} is not a floating type"),
    }
}

fn decode<S: Value, T: Value, const N: usize>(
    bytes: &[u8],
    out: &mut [T],
    parse: impl Fn([u8; N]) -> S,
) {
    for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = parse(*raw).cast();
    }
}

/// Appends `values` to `out` as little-endian elements of `dtype`.
///
/// # Panics
/// If `dtype` is not a floating type.
#[track_caller]
pub(super) fn append_values<T: Value>(dtype: Dtype, values: &[T], out: &mut Vec<u8>) {
    match dtype {
        same if same == T::DTYPE => out.extend_from_slice(mmap::bytes_of(values)),
        Dtype::F32 => out.extend(values.iter().flat_map(|v| v.cast::<f32>().to_le_bytes())),
        Dtype::BF16 => out.extend(values.iter().flat_map(|v| v.cast::<bf16>().to_le_bytes())),
        Dtype::F16 => out.extend(values.iter().flat_map(|v| v.cast::<f16>().to_le_bytes())),
        Dtype::F64 => out.extend(values.iter().flat_map(|v| v.cast::<f64>().to_le_bytes())),
        other => panic!("{other} is not a floating type"),
    }
}
