//! Codes and scales as tiles and what follows them take them.

use std::arch::x86_64::*;

use super::super::kernel::{aligned, scales};
use super::super::lanes::{Lanes, Vnni};
use super::super::layout::{ALIGNED, Codes, Layout, Unit, WHOLE_32, sum_steps};
use super::super::planes::Unpack;
use super::super::{PANEL, STEP, UNIT_STEPS};
use super::{Scales, TILE_BYTES, Work, unit_parts, unit_tiles, whole};

/// `i - zero` for each code below 32, as `bf16`.
fn numbers(layout: &Layout) -> [u16; 32] {
    std::array::from_fn(|i| ((i as f32 - layout.zero() as f32).to_bits() >> 16) as u16)
}

/// The lower bytes of words as `bf16`, less the zero.
///
/// # Safety
/// AVX-512.
#[inline(always)]
unsafe fn numbered(words: __m512i, zero: __m512) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let byte = _mm512_set1_epi32(0xff);
        let low = _mm512_and_si512(words, byte);
        let high = _mm512_and_si512(_mm512_srli_epi32::<16>(words), byte);
        let low = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(low), zero));
        let high = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(high), zero));
        // Whole numbers of eight bits: the lower half of each is zero.
        _mm512_or_si512(_mm512_srli_epi32::<16>(low), high)
    }
}

/// Unpacks a unit of a panel, and zeros up to a whole item.
///
/// # Safety
/// As [`super::Kernel`]; `base` is the unit's first byte.
#[inline(always)]
pub(super) unsafe fn unpack<U: Unpack, const SPAN: usize, const MIN: bool>(
    work: &Work<'_>,
    panel: usize,
    unit: &Unit,
    base: *const u8,
) {
    // SAFETY: as the caller promised, and there is room for the steps of a unit.
    unsafe {
        let layout = work.layout;
        let codes = (&raw mut (*work.space).codes).cast::<u8>();
        let codes = codes.add(panel * unit_tiles(SPAN) * TILE_BYTES);
        let parts = unit_parts(SPAN);
        let to = (&raw mut (*work.space).scales).cast::<Scales>();
        let to = to.add(panel * parts);
        if whole(SPAN) {
            unpack_whole::<U, SPAN>(layout, unit, base, codes, to);
            if MIN {
                let mins = (&raw mut (*work.space).mins).cast::<[u8; TILE_BYTES]>();
                unpack_mins::<SPAN>(unit, base, mins.add(panel).cast(), to);
            }
        } else {
            unpack_plain::<U, SPAN, MIN>(layout, unit, base, codes, to);
        }
    }
}

/// [`unpack`] for codes as they are.
///
/// # Safety
/// As [`unpack`].
#[inline(always)]
unsafe fn unpack_plain<U: Unpack, const SPAN: usize, const MIN: bool>(
    layout: &Layout,
    unit: &Unit,
    base: *const u8,
    codes: *mut u8,
    to: *mut Scales,
) {
    // SAFETY: as the caller promised.
    unsafe {
        let parts = unit_parts(SPAN);
        let step_bytes = unit_tiles(SPAN) * TILE_BYTES / UNIT_STEPS;
        let table = match layout.codes {
            Codes::Table(table) => Vnni::table(table),
            _ => Vnni::splat(0),
        };
        let numbers = _mm512_loadu_si512(numbers(layout).as_ptr().cast());
        let zero = _mm512_set1_ps(layout.zero() as f32);
        let zeros = _mm512_set1_epi8(layout.zero() as u8 as i8);
        for step in 0..unit.steps {
            let bytes = U::unpack::<Vnni>(base.add(unit.planes + step * U::BYTES), table);
            let codes = codes.add(step * step_bytes);
            for (four, &bytes) in bytes.iter().enumerate() {
                if super::bytes(SPAN) {
                    let bytes = if MIN {
                        bytes
                    } else {
                        _mm512_sub_epi8(bytes, zeros)
                    };
                    _mm512_store_si512(codes.cast::<__m512i>().add(four), bytes);
                    continue;
                }
                // Every other column: activations have theirs in the same order.
                let odd = _mm512_srli_epi16::<8>(bytes);
                let (even, odd) = match U::BITS <= 5 {
                    true => (
                        _mm512_permutexvar_epi16(bytes, numbers),
                        _mm512_permutexvar_epi16(odd, numbers),
                    ),
                    false => (numbered(bytes, zero), numbered(odd, zero)),
                };
                let to = codes.cast::<__m512i>().add(2 * four);
                _mm512_store_si512(to, even);
                _mm512_store_si512(to.add(1), odd);
            }
            let (scale, min) = scales::<Vnni>(layout, unit, base, 0, step);
            let to = to.add(step * STEP / SPAN).cast::<f32>();
            _mm512_store_ps(to, scale);
            _mm512_store_ps(to.add(PANEL), min);
        }
        let end = unit.steps.next_multiple_of(sum_steps(SPAN));
        let lacking = end - unit.steps;
        let codes = codes.add(unit.steps * step_bytes);
        codes.write_bytes(0, lacking * step_bytes);
        // Groups with one scale are whole.
        let written = (unit.steps * parts).div_ceil(UNIT_STEPS);
        to.add(written)
            .write_bytes(0, end * parts / UNIT_STEPS - written);
    }
}

/// [`unpack`] for codes times whole numbers: four tiles of the upper bytes, then those of the lower ones. Steps that the unit
/// lacks stay what they were: activations are zero there.
///
/// # Safety
/// As [`unpack`].
#[inline(always)]
unsafe fn unpack_whole<U: Unpack, const SPAN: usize>(
    layout: &Layout,
    unit: &Unit,
    base: *const u8,
    codes: *mut u8,
    scales: *mut Scales,
) {
    // SAFETY: as the caller promised; there is room for both halves.
    unsafe {
        let table = match layout.codes {
            Codes::Table(table) => Vnni::table(table),
            _ => Vnni::splat(0),
        };
        let low = _mm512_set1_epi16(0xff);
        let zero = _mm512_set1_epi16(layout.zero() as i16);
        let (factors, scale) = match SPAN {
            ALIGNED => aligned::<Vnni>(unit, base, 0),
            _ => ([Vnni::splat(0); UNIT_STEPS], Vnni::halves(base)),
        };
        let sub = |sub: usize| Vnni::signed(base.add(unit.sub_scales + sub * PANEL));
        _mm512_store_ps((*scales).scale.as_mut_ptr(), scale);
        for (step, factor) in (0..unit.steps).zip(factors) {
            // Of the first half of the step, and of the second.
            let factors = match SPAN {
                ALIGNED => [factor; 2],
                WHOLE_32 => [sub(step); 2],
                _ => [sub(2 * step), sub(2 * step + 1)],
            };
            // In both halves of each lane.
            let factors = factors.map(|f| {
                let low = _mm512_and_si512(f, _mm512_set1_epi32(0xffff));
                _mm512_or_si512(low, _mm512_slli_epi32::<16>(f))
            });
            let bytes = U::unpack::<Vnni>(base.add(unit.planes + step * U::BYTES), table);
            for (four, &bytes) in bytes.iter().enumerate() {
                let factor = factors[four / 4];
                let even = _mm512_sub_epi16(_mm512_and_si512(bytes, low), zero);
                let odd = _mm512_sub_epi16(_mm512_srli_epi16::<8>(bytes), zero);
                let even = _mm512_mullo_epi16(even, factor);
                let odd = _mm512_mullo_epi16(odd, factor);
                // `low ? a : b`.
                let upper =
                    _mm512_ternarylogic_epi32::<0xca>(low, _mm512_srli_epi16::<8>(even), odd);
                let lower =
                    _mm512_ternarylogic_epi32::<0xca>(low, even, _mm512_slli_epi16::<8>(odd));
                let to = codes.add(step * TILE_BYTES / 2).cast::<__m512i>().add(four);
                _mm512_store_si512(to, upper);
                _mm512_store_si512(to.add(4 * TILE_BYTES / 64), lower);
            }
        }
    }
}

/// The minimum of a unit, and its sub-minimums for each 16 columns as `bf16`, times 256 beside as they are.
///
/// # Safety
/// As [`unpack`]; there is room for a tile.
#[inline(always)]
unsafe fn unpack_mins<const SPAN: usize>(
    unit: &Unit,
    base: *const u8,
    to: *mut u8,
    scales: *mut Scales,
) {
    // SAFETY: as the caller promised.
    unsafe {
        let min = Vnni::halves(base.add(unit.mins));
        _mm512_store_ps((*scales).min.as_mut_ptr(), min);
        for half in 0..2 * UNIT_STEPS {
            let sub = if SPAN == WHOLE_32 { half / 2 } else { half };
            let min = Vnni::unsigned(base.add(unit.sub_mins + sub * PANEL));
            let digit = _mm512_castps_si512(_mm512_mul_ps(min, _mm512_set1_ps(256.0)));
            // Whole numbers of eight bits: the lower half of each is zero.
            let min = _mm512_castps_si512(min);
            let both = _mm512_or_si512(_mm512_srli_epi32::<16>(digit), min);
            _mm512_store_si512(to.cast::<__m512i>().add(half), both);
        }
    }
}
