//! Stored bytes to `f32`, exactly as the format's reference does it.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use super::codebook::{self, is_codebook};
use super::{BlockType, Codes};
use crate::pool::{Pool, SharedMut};
use crate::tasks::Tasks;

/// Writes the values of consecutive elements.
///
/// # Panics
/// If `bytes` are not whole blocks with as many elements as `out`.
#[track_caller]
pub fn dequantize(block_type: BlockType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        Some(bytes.len()),
        block_type.size_of(out.len()),
        "bytes and those of {} elements in {block_type}",
        out.len()
    );
    macro_rules! plain {
        ($t:ty, $value:expr) => {{
            for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(size_of::<$t>())) {
                *out = $value(<$t>::from_le_bytes(bytes.try_into().expect("chunked")));
            }
        }};
    }
    match block_type {
        BlockType::F32 => plain!(f32, |v| v),
        BlockType::F16 => plain!(f16, f16::to_f32),
        BlockType::BF16 => plain!(bf16, bf16::to_f32),
        BlockType::F64 => plain!(f64, |v| v as f32),
        BlockType::I8 => plain!(i8, |v| v as f32),
        BlockType::I16 => plain!(i16, |v| v as f32),
        BlockType::I32 => plain!(i32, |v| v as f32),
        BlockType::I64 => plain!(i64, |v| v as f32),
        _ if is_codebook(block_type) => {
            let blocks = bytes.chunks_exact(block_type.bytes());
            for (block, out) in blocks.zip(out.chunks_exact_mut(block_type.elements())) {
                codebook::values(block_type, block, out);
            }
        }
        _ => {
            let mut codes = Codes::new(block_type);
            let blocks = bytes.chunks_exact(block_type.bytes());
            for (block, out) in blocks.zip(out.chunks_exact_mut(block_type.elements())) {
                codes.decode(block_type, block);
                codes.values(out);
            }
        }
    }
}

/// [`dequantize`] by all threads of a pool.
///
/// # Panics
/// As [`dequantize`].
#[track_caller]
pub fn dequantize_all(pool: &Pool, block_type: BlockType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        Some(bytes.len()),
        block_type.size_of(out.len()),
        "bytes and those of {} elements in {block_type}",
        out.len()
    );
    let elements = block_type.elements();
    let tasks = Tasks::rows(out.len() / elements, elements);
    let out = SharedMut::new(out);
    pool.run(tasks.count(), |task, _| {
        let blocks = tasks.part(task);
        // SAFETY: each task writes its own blocks alone.
        let out = unsafe { out.slice(blocks.start * elements, blocks.len() * elements) };
        let bytes = &bytes[blocks.start * block_type.bytes()..blocks.end * block_type.bytes()];
        dequantize(block_type, bytes, out);
    });
}

/// The first block with a scale that is infinite or no number: such a file is damaged. `None` if there is no such
/// block, and for types whose scales are always finite.
///
/// # Panics
/// If `bytes` are not whole blocks.
#[track_caller]
pub fn first_bad_block(block_type: BlockType, bytes: &[u8]) -> Option<usize> {
    use BlockType::*;
    let offsets: &[usize] = match block_type {
        F16 | BF16 | F32 | F64 => return first_bad_number(block_type, bytes),
        Q4_0 | Q5_0 | Q8_0 | IQ4_NL | IQ4_XS | Q1_0 | Q2_0 | IQ1_S | IQ2_XXS | IQ2_XS | IQ2_S
        | IQ3_XXS | IQ3_S => &[0],
        Q4_1 | Q5_1 | Q4_K | Q5_K => &[0, 2],
        Q2_K => &[80, 82],
        Q3_K => &[108],
        Q6_K => &[208],
        TQ1_0 => &[52],
        TQ2_0 => &[64],
        MXFP4 => return bytes.chunks_exact(17).position(|block| block[0] == 255),
        IQ1_M => {
            let bad = |block: &[u8]| !codebook::scattered_scale(block).is_finite();
            return bytes.chunks_exact(56).position(bad);
        }
        NVFP4 | I8 | I16 | I32 | I64 => return None,
    };
    let width = block_type.bytes();
    assert!(
        bytes.len().is_multiple_of(width),
        "{} bytes of {block_type}",
        bytes.len()
    );
    // All bits of the exponent are set.
    let (first, last) = (offsets[0] + 1, offsets[offsets.len() - 1] + 1);
    let bad = |block: &[u8]| block[first] & 0x7c == 0x7c || block[last] & 0x7c == 0x7c;
    bytes.chunks_exact(width).position(bad)
}

/// [`first_bad_block`] by all threads of a pool.
///
/// # Panics
/// As [`first_bad_block`].
#[track_caller]
pub fn first_bad_block_of_all(pool: &Pool, block_type: BlockType, bytes: &[u8]) -> Option<usize> {
    let width = block_type.bytes();
    assert!(
        bytes.len().is_multiple_of(width),
        "{} bytes of {block_type}",
        bytes.len()
    );
    let tasks = Tasks::rows(bytes.len() / width, width);
    let first = AtomicUsize::new(usize::MAX);
    pool.run(tasks.count(), |task, _| {
        let blocks = tasks.part(task);
        let bytes = &bytes[blocks.start * width..blocks.end * width];
        if let Some(bad) = first_bad_block(block_type, bytes) {
            first.fetch_min(blocks.start + bad, Ordering::Relaxed);
        }
    });
    Some(first.into_inner()).filter(|&first| first != usize::MAX)
}

fn first_bad_number(block_type: BlockType, bytes: &[u8]) -> Option<usize> {
    let mask: u64 = match block_type {
        BlockType::F16 => 0x7c00,
        BlockType::BF16 => 0x7f80,
        BlockType::F32 => 0x7f80_0000,
        _ => 0x7ff0_0000_0000_0000,
    };
    let width = block_type.bytes();
    bytes.chunks_exact(width).position(|number| {
        let mut bits = [0; 8];
        bits[..width].copy_from_slice(number);
        u64::from_le_bytes(bits) & mask == mask
    })
}
