//! Every format at every level against the specification, bit for bit, and that against plain numbers.

use super::activations::{BOTH, GROUP};
use super::*;
use crate::Element;
use crate::activation::{Activation, gated};
use crate::blocks::{self, BlockType, FLOAT4, UNEVEN};
use crate::dispatch::Level;
use crate::gemm::{self, Epilogue, Mat, gemm, gemm_packed};
use crate::memory::Memory;
use crate::pool::Pool;
use half::{bf16, f16};

fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

fn layouts() -> Vec<(&'static str, Layout)> {
    let half = |codes, offset, group, min| Layout {
        codes,
        offset,
        scale: Scale::Half { group },
        min,
    };
    let two = |codes, offset, sub, min| Layout {
        codes,
        offset,
        scale: Scale::Super { sub },
        min,
    };
    vec![
        ("q4", Layout::q4(32)),
        ("q4 in groups of 64", Layout::q4(64)),
        ("q4 in groups of 128", Layout::q4(128)),
        ("q4 with zeros", Layout::q4_asymmetric(128)),
        ("q8", Layout::q8()),
        ("Q4_1", half(Codes::U4, 0, 32, Min::Half)),
        ("Q5_0", half(Codes::U5, 16, 32, Min::Without)),
        ("Q5_1", half(Codes::U5, 0, 32, Min::Half)),
        ("Q2_K", two(Codes::U2, 0, 16, Min::Super)),
        ("Q3_K", two(Codes::U3, 4, 16, Min::Without)),
        ("Q4_K", two(Codes::U4, 0, 32, Min::Super)),
        ("Q5_K", two(Codes::U5, 0, 32, Min::Super)),
        ("Q6_K", two(Codes::U6, 32, 16, Min::Without)),
        ("IQ4_NL", half(Codes::Table(&UNEVEN), 0, 32, Min::Without)),
        ("IQ4_XS", two(Codes::Table(&UNEVEN), 0, 32, Min::Without)),
        (
            "MXFP4",
            Layout {
                scale: Scale::Exponent,
                ..half(Codes::Table(&FLOAT4), 0, 32, Min::Without)
            },
        ),
        ("TQ2_0", half(Codes::U2, 1, 256, Min::Without)),
        ("2 bits with zeros", half(Codes::U2, 0, 64, Min::Zero)),
        ("3 bits with zeros", half(Codes::U3, 0, 128, Min::Zero)),
        ("8 bits with zeros", half(Codes::U8, 0, 128, Min::Zero)),
        (
            "q8 in groups of 128",
            half(Codes::U8, 128, 128, Min::Without),
        ),
        (
            "a table in groups of 128",
            half(Codes::Table(&UNEVEN), 0, 128, Min::Without),
        ),
    ]
}

/// Random numbers in all fields that the layout stores.
fn random_unit(layout: &Layout, next: &mut impl FnMut() -> u64) -> RowUnit {
    let mut unit = RowUnit::ZERO;
    let small = |next: &mut dyn FnMut() -> u64| {
        f16::from_f32(((next() >> 40) as f32 / 1e7 - 0.8) / 50.0).to_bits()
    };
    let bits = layout.codes.bits();
    unit.codes
        .fill_with(|| (next() >> 32) as u8 & ((1u16 << bits) - 1) as u8);
    for i in 0..UNIT_STEPS {
        unit.scales[i] = match layout.scale {
            Scale::Exponent => 110 + (next() >> 60) as u16,
            _ => small(next),
        };
        unit.mins[i] = match layout.min {
            Min::Without => 0,
            Min::Zero => (next() >> 32) as u16 & ((1 << bits) - 1),
            _ => small(next),
        };
    }
    if matches!(layout.scale, Scale::Super { .. }) {
        unit.sub_scales.fill_with(|| (next() >> 58) as i8 - 32);
        if layout.min == Min::Super {
            unit.sub_mins.fill_with(|| (next() >> 58) as u8);
        }
    }
    unit
}

#[track_caller]
fn assert_bits(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(
            got.to_bits(),
            want.to_bits(),
            "{what}: element {i}: {got} for {want}"
        );
    }
}

/// A matrix of random units, and the units themselves where a row really has them.
fn random_matrix(
    pool: &Pool,
    layout: Layout,
    shape: [usize; 2],
) -> (PackedMatrix, Vec<Vec<RowUnit>>) {
    let mut next = random(shape[0] as u64 * 7919 + shape[1] as u64);
    let units = shape[1].div_ceil(UNIT);
    let rows: Vec<Vec<RowUnit>> = (0..shape[0])
        .map(|_| {
            (0..units)
                .map(|_| random_unit(&layout, &mut next))
                .collect()
        })
        .collect();
    let memory = Memory::new();
    let matrix = PackedMatrix::pack(pool, &memory, layout, shape, |row, unit, out| {
        out.write(&rows[row][unit]);
    });
    (matrix, rows)
}

/// A product with the matrix has the bits of one with all of it unpacked.
fn unpacked_as_needed<E: Element<Acc = f32>>(what: &str, pool: &Pool, matrix: &PackedMatrix) {
    let (n, k) = (matrix.rows(), matrix.cols());
    let mut plain = vec![E::from_f64(0.0); n * k];
    matrix.unpack_rows(pool, 0..n, &mut plain);
    for m in [0, 1, 19] {
        let mut next = random(m as u64 + 7);
        let mut element = || E::from_f64((next() >> 40) as f64 / 8e6 - 1.0);
        let a: Vec<E> = (0..m * n).map(|_| element()).collect();
        let before: Vec<E> = (0..m * k).map(|_| element()).collect();
        let epilogue = Epilogue {
            accumulate: m > 1,
            ..Default::default()
        };
        let mat = |data, stride| Mat { data, stride };
        let (mut want, mut got) = (before.clone(), before);
        let (a, b) = (mat(&a[..], n), mat(&plain[..], k));
        gemm(
            pool,
            gemm::Layout::Nn,
            m,
            k,
            n,
            a,
            b,
            &mut want,
            k,
            epilogue,
        );
        gemm_packed(pool, m, a, matrix, &mut got, k, epilogue);
        let numbers = |of: &[E]| of.iter().map(|x| x.to_f64() as f32).collect::<Vec<_>>();
        assert_bits(
            &format!("{what}, {m} rows of {}", E::DTYPE),
            &numbers(&got),
            &numbers(&want),
        );
    }
}

fn check(name: &str, layout: Layout, [n, k]: [usize; 2]) {
    let pools: Vec<Pool> = Level::supported()
        .iter()
        .map(|&level| Pool::with_level(2, level))
        .collect();
    let (matrix, rows) = random_matrix(&pools[0], layout, [n, k]);
    let mut row = vec![0f32; k];
    let mut dense = Vec::new();
    for (r, units) in rows.iter().enumerate() {
        matrix.unpack_row(r, &mut row);
        let want: Vec<f32> = (0..k)
            .map(|k| units[k / UNIT].weight(&layout, k % UNIT))
            .collect();
        assert_bits(
            &format!("{name} [{n}, {k}]: row {r} read back"),
            &row,
            &want,
        );
        dense.extend_from_slice(&row);
    }
    for (pool, rows) in pools.iter().flat_map(|pool| {
        let row = n / 3;
        [(pool, 0..n), (pool, row..n), (pool, row..row + 1)]
    }) {
        let mut got = vec![0f32; rows.len() * k];
        matrix.unpack_rows(pool, rows.clone(), &mut got);
        let what = format!("{name} [{n}, {k}]: rows {rows:?}, {}", pool.level());
        assert_bits(&what, &got, &dense[rows.start * k..rows.end * k]);
        unpacked_as_needed::<f32>(&what, pool, &matrix);
        unpacked_as_needed::<bf16>(&what, pool, &matrix);
    }
    let memory = Memory::new();
    for m in [1, 2, 3, 5, 9, 17, 70, 300] {
        // Results of 64 rows and more of four panels are streamed where they begin at a line.
        if m == 70 && n != 64 || m == 300 && n > 40 {
            continue;
        }
        let mut next = random(m as u64);
        let x: Vec<f32> = (0..m * k)
            .map(|_| (next() >> 40) as f32 / 8e6 - 1.0)
            .collect();
        let scalar = Activations::quantize(&pools[0], &memory, &x, k);
        let want: Vec<f32> = (0..m * n)
            .map(|i| reference::dot(&matrix, i % n, &scalar, i / n))
            .collect();
        for pool in &pools {
            let quantized = Activations::quantize(pool, &memory, &x, k);
            let mut room = vec![0f32; m * n + 16];
            let skip = room.as_ptr().align_offset(64);
            let got = &mut room[skip..][..m * n];
            let product = Product::of(&matrix, got);
            multiply(pool, &quantized, &mut [product]);
            let what = format!("{name} [{n}, {k}], {m} rows, {}", pool.level());
            assert_bits(&what, &room[skip..][..m * n], &want);
        }
        // The specification against plain products of the quantized numbers.
        for i in (0..m * n).step_by(7) {
            let weights = &dense[i % n * k..][..k];
            let (mut exact, mut size) = (0f64, 0f64);
            for (k, w) in weights.iter().enumerate() {
                let (quants, scales) = scalar.step(i / n, k / STEP);
                let a = f64::from(quants[k % STEP]) * f64::from(scales.scale);
                exact += a * f64::from(*w);
                // Terms of a minimum and of codes cancel.
                size += a.abs() * (f64::from(w.abs()) + 1.0);
            }
            let error = (f64::from(want[i]) - exact).abs();
            assert!(error <= 1e-5 * size, "{name}: {} for {exact}", want[i]);
        }
    }
}

#[test]
fn all_levels_give_the_bits_of_the_specification() {
    for (name, layout) in layouts() {
        for shape in [[1, 256], [16, 512], [37, 768], [64, 256], [130, 256]] {
            check(name, layout, shape);
        }
        // Columns that fill no unit, no group, no step.
        if !matches!(layout.scale, Scale::Super { .. }) {
            for shape in [[5, 32], [20, 172], [17, 900]] {
                check(name, layout, shape);
            }
        }
    }
}

#[test]
fn scales_of_a_unit_share_a_power_of_two() {
    // An `f16` of half of the largest and more is exact, any other within half of a 2^12th.
    let mut next = random(3);
    for _ in 0..1000 {
        let scales: [f32; UNIT_STEPS] = std::array::from_fn(|_| {
            f16::from_f32(((next() >> 40) as f32 / 8e6 - 1.0) / 30.0).to_f32()
        });
        let (factors, power) = reference::align(scales);
        let largest = scales.into_iter().fold(0f32, |most, s| most.max(s.abs()));
        for (scale, factor) in scales.into_iter().zip(factors) {
            assert!(factor.abs() < 1 << 12, "{scales:?}: {factor}");
            let error = (factor as f32 * power - scale).abs();
            let allowed = if scale.abs() >= largest / 2.0 {
                0.0
            } else {
                power / 2.0
            };
            assert!(error <= allowed && power <= largest / 2048.0, "{scales:?}");
        }
    }
    // Zeros, the smallest numbers, the largest sum, and what is none: the same at all levels.
    let bits = [0, 1, 0xbbff, 0x7e00, 0x7c00, 0xfc00];
    let memory = Memory::new();
    let mut x: Vec<f32> = (0..20 * 256).map(|i| (i as f32 * 0.37).sin()).collect();
    x[..256].fill(1.0);
    for &level in Level::supported() {
        let pool = Pool::with_level(1, level);
        let shape = [bits.len(), 256];
        let matrix = PackedMatrix::pack(&pool, &memory, Layout::q4(32), shape, |row, _, out| {
            let mut unit = random_unit(&Layout::q4(32), &mut random(row as u64));
            match bits[row] {
                0 | 1 => unit.scales = [bits[row]; UNIT_STEPS],
                0xbbff => (unit.scales, unit.codes) = ([0xbbff; UNIT_STEPS], [0; UNIT]),
                odd => unit.scales[5] = odd,
            }
            out.write(&unit);
        });
        for m in [1, 5, 20] {
            let x = Activations::quantize(&pool, &memory, &x[..m * 256], 256);
            let mut out = vec![0f32; m * bits.len()];
            let product = Product::of(&matrix, &mut out);
            multiply(&pool, &x, &mut [product]);
            for (i, got) in out.into_iter().enumerate() {
                let (row, n) = (i / bits.len(), i % bits.len());
                let want = reference::dot(&matrix, n, &x, row);
                let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                let kind = [
                    got == 0.0,
                    got != 0.0,
                    row > 0 || (got - 8.0 * 256.0 * 0.9995).abs() < 0.1,
                    got.is_nan(),
                    got.is_nan(),
                    got.is_nan(),
                ];
                assert!(
                    same && kind[n],
                    "{level}, {m} rows, row {n}: {got} for {want}"
                );
            }
        }
    }
}

/// More rows and columns than the product takes at a time, and more than it packs in one piece.
#[test]
fn a_matrix_of_several_blocks_is_unpacked_as_needed() {
    for &level in Level::supported() {
        let pool = Pool::with_level(2, level);
        for shape in [[1100, 160], [4200, 1100]] {
            if level == Level::Scalar && shape[0] > 4000 {
                continue;
            }
            let (matrix, _) = random_matrix(&pool, Layout::q4(32), shape);
            unpacked_as_needed::<bf16>(&format!("{shape:?} on {level}"), &pool, &matrix);
        }
    }
}

#[test]
fn several_products_share_a_run_with_bias_and_residual() {
    let pool = Pool::new(2);
    let memory = Memory::new();
    let (a, _) = random_matrix(&pool, Layout::q4(32), [70, 256]);
    let (b, _) = random_matrix(&pool, Layout::q8(), [33, 256]);
    let x: Vec<f32> = (0..3 * 256).map(|i| (i as f32 * 0.37).sin()).collect();
    let x = Activations::quantize(&pool, &memory, &x, 256);
    let plain = |matrix: &PackedMatrix| -> Vec<f32> {
        (0..3 * matrix.rows())
            .map(|i| reference::dot(matrix, i % matrix.rows(), &x, i / matrix.rows()))
            .collect()
    };
    let bias: Vec<f32> = (0..70).map(|i| i as f32).collect();
    let residual: Vec<f32> = (0..210).map(|i| 1.0 / (1.0 + i as f32)).collect();
    let (mut ya, mut yb) = (vec![0f32; 210], vec![0f32; 99]);
    multiply(
        &pool,
        &x,
        &mut [
            Product {
                bias: Some(&bias),
                residual: Some(&residual),
                ..Product::of(&a, &mut ya)
            },
            Product::of(&b, &mut yb),
        ],
    );
    let want: Vec<f32> = plain(&a)
        .iter()
        .enumerate()
        .map(|(i, y)| y + bias[i % 70] + residual[i])
        .collect();
    assert_bits("with bias and residual", &ya, &want);
    assert_bits("the second product", &yb, &plain(&b));
}

fn biased<'a, E>(matrix: &'a PackedMatrix, bias: &'a [E], out: &'a mut [E]) -> Product<'a, E> {
    Product {
        bias: Some(bias),
        ..Product::of(matrix, out)
    }
}

/// Two products and what [`gated`] makes of them, beside one product with a gate.
fn check_gate<E: Element>(pool: &Pool, layout: Layout, kind: Activation, [m, n, k]: [usize; 3]) {
    let memory = Memory::new();
    let (up, rows) = random_matrix(pool, layout, [n, k]);
    let gate = PackedMatrix::pack(pool, &memory, layout, [n, k], |row, unit, out| {
        out.write(&rows[n - 1 - row][unit]);
    });
    let mut next = random((m * n) as u64);
    let mut numbers = |len: usize| -> Vec<E> {
        let number = |_| E::from_f64((next() >> 40) as f64 / 8e6 - 1.0);
        (0..len).map(number).collect()
    };
    let x = Activations::quantize(pool, &memory, &numbers(m * k), k);
    let (bias, other) = (numbers(n), numbers(n));
    let [mut ups, mut gates, mut want, mut got] = [const { Vec::new() }; 4];
    for out in [&mut ups, &mut gates, &mut want] {
        out.resize(m * n, E::from_f64(0.0));
    }
    // From a line on, so that what may be streamed is.
    got.resize(m * n + 64, E::from_f64(0.0));
    let skip = got.as_ptr().align_offset(64);
    let got = &mut got[skip..][..m * n];
    let two = &mut [
        biased(&up, &bias, &mut ups),
        biased(&gate, &other, &mut gates),
    ];
    multiply(pool, &x, two);
    gated(pool, kind, &gates, &ups, &mut want);
    let gate = Gate {
        activation: kind,
        matrix: &gate,
        bias: Some(&other),
    };
    let one = Product {
        gate: Some(gate),
        ..biased(&up, &bias, &mut *got)
    };
    multiply(pool, &x, &mut [one]);
    let bits = |values: &[E]| -> Vec<u64> { values.iter().map(|v| v.to_f64().to_bits()).collect() };
    let what = format!("{layout:?} {kind:?} {}: {m} x {n}", pool.level());
    assert!(bits(got) == bits(&want), "{what}");
    assert!(ups.iter().any(|v| v.to_f64() != 0.0), "{what}: all zeros");
}

#[test]
fn a_gate_gives_the_bits_of_two_products() {
    use Activation::{Gelu, GeluTanh, Relu, Silu};
    for &level in Level::supported() {
        let pool = Pool::with_level(2, level);
        for (m, n) in [(1, 50), (2, 64), (5, 33), (20, 70), (70, 128)] {
            for (_, layout) in layouts() {
                check_gate::<f32>(&pool, layout, Silu, [m, n, 256]);
            }
            for kind in [Silu, Gelu, GeluTanh, Relu] {
                check_gate::<f32>(&pool, Layout::q4(32), kind, [m, n, 320]);
                check_gate::<bf16>(&pool, Layout::q4(32), kind, [m, n, 320]);
                check_gate::<f16>(&pool, Layout::q4_asymmetric(128), kind, [m, n, 384]);
            }
        }
        // Tasks of four panels of each on tiles, whose results are streamed.
        check_gate::<f32>(&pool, Layout::q4(32), Silu, [70, 1024, 64]);
    }
}

#[test]
fn groups_of_rows_have_the_bits_of_all_rows() {
    let memory = Memory::new();
    let (rows, n, k) = (23, 40, 288);
    let mut next = random(11);
    let x: Vec<f32> = (0..rows * k)
        .map(|_| (next() >> 40) as f32 / 8e6 - 1.0)
        .collect();
    // In several groups or in none, alone, in more than a block, out of order.
    let wide: Vec<Vec<u32>> = vec![
        (0..20).collect(),
        vec![],
        vec![22],
        vec![5, 3, 4],
        (2..11).collect(),
    ];
    let alone: Vec<Vec<u32>> = vec![vec![7], vec![], vec![0], vec![7]];
    let two: Vec<Vec<u32>> = vec![vec![1, 9], vec![4]];
    for &level in Level::supported() {
        let pool = Pool::with_level(2, level);
        for groups in [&wide, &alone, &two] {
            let matrices: Vec<PackedMatrix> = (0..groups.len())
                .map(|i| random_matrix(&pool, Layout::q4(32), [n + i, k]).0)
                .collect();
            let all = Activations::quantize(&pool, &memory, &x, k);
            let whole: Vec<Vec<f32>> = matrices
                .iter()
                .map(|matrix| {
                    let mut out = vec![0f32; rows * matrix.rows()];
                    let product = Product::of(matrix, &mut out);
                    multiply(&pool, &all, &mut [product]);
                    out
                })
                .collect();
            let (some, ranges) = all.grouped(&pool, &memory, groups);
            let mut outs: Vec<Vec<f32>> = (groups.iter().zip(&matrices))
                .map(|(group, matrix)| vec![0f32; group.len() * matrix.rows()])
                .collect();
            let mut products: Vec<_> = (ranges.into_iter().zip(&matrices).zip(&mut outs))
                .map(|((rows, matrix), out)| {
                    let product = Product::of(matrix, out);
                    (rows, product)
                })
                .collect();
            multiply_groups(&pool, &some, &mut products);
            for (i, (group, out)) in groups.iter().zip(&outs).enumerate() {
                for (row, out) in group.iter().zip(out.chunks(n + i)) {
                    let want = &whole[i][*row as usize * (n + i)..][..n + i];
                    assert_bits(&format!("{level}: row {row} of group {i}"), out, want);
                }
            }
        }
    }
}

#[test]
fn activations_round_to_nearest_and_pass_on_what_is_not_finite() {
    let memory = Memory::new();
    for &level in Level::supported() {
        let pool = Pool::with_level(1, level);
        let mut x: Vec<f32> = (0..768).map(|i| (i as f32 - 48.0) / 3.0).collect();
        (x[300], x[600]) = (f32::NAN, f32::NEG_INFINITY);
        let q = Activations::quantize(&pool, &memory, &x, 768);
        for step in 0..8 {
            let (quants, scales) = q.step(0, step);
            assert!((scales.scale * 127.0 - x[255]).abs() < 1e-5, "{level}");
            let whole = |quants: &[i8]| quants.iter().map(|&q| f32::from(q)).sum::<f32>();
            let sums = [&quants[..16], &quants[16..], quants].map(whole);
            assert_eq!([0, 1, BOTH].map(|part| scales.sum(part)), sums, "{level}");
            let steps = (step / 4 * 4..).take(4);
            let steps: f32 = steps.map(|step| whole(q.step(0, step).0)).sum();
            assert_eq!(scales.sum(GROUP), steps, "{level}");
            for (q, x) in quants.iter().zip(&x[step * STEP..]) {
                let error = (scales.scale * f32::from(*q) - x).abs();
                assert!(error <= scales.scale * 0.5001, "{level}: {error}");
            }
        }
        assert_eq!(q.step(0, 7).0[31], 127, "{level}");
        assert!((8..24).all(|step| q.step(0, step).1.scale.is_nan()));
        let q = Activations::quantize(&pool, &memory, &[1e-42f32; 32], 32);
        assert_eq!((q.step(0, 0).1.scale, q.step(0, 0).0[0]), (0.0, 0));
    }
}

#[test]
fn layouts_without_a_kernel_are_refused_by_name() {
    let two = |codes, sub| Layout {
        scale: Scale::Super { sub },
        ..Layout {
            codes,
            ..Layout::q8()
        }
    };
    for (layout, said) in [
        (
            two(Codes::U8, 32),
            "U8 have no kernel for a scale of 32 columns",
        ),
        (
            two(Codes::U4, 16),
            "U4 have no kernel for a scale of 16 columns",
        ),
        (two(Codes::U4, 64), "a sub-scale for 64 columns"),
        (Layout::q4(48), "a scale for 48 columns"),
    ] {
        let problem = layout.problem().expect("a layout without a kernel");
        assert!(problem.contains(said), "{problem}");
    }
    for (name, layout) in layouts() {
        assert_eq!(layout.problem(), None, "{name}");
    }
}

#[test]
fn sizes_are_those_of_the_formats() {
    let unit = |layout: Layout| layout.bits_per_weight();
    assert_eq!(unit(Layout::q4(32)), 4.5);
    assert_eq!(unit(Layout::q4(128)), 4.125);
    assert_eq!(unit(Layout::q8()), 8.5);
    for (name, layout) in layouts() {
        let plain = layout.codes.bits() as f64;
        let extra = unit(layout) - plain;
        assert!(
            (0.06..=1.15).contains(&extra),
            "{name}: {extra} bits of scales"
        );
    }
}

/// Blocks of random bytes, with scales that are numbers.
#[test]
fn blocks_are_packed_without_a_change() {
    let pool = Pool::new(2);
    let memory = Memory::new();
    let mut checked = 0;
    for &block_type in BlockType::ALL {
        let Some(layout) = Layout::of(block_type) else {
            continue;
        };
        checked += 1;
        let (rows, cols) = (19, 512 + block_type.elements());
        let mut next = random(checked);
        let count = rows * cols / block_type.elements();
        let mut bytes = Vec::new();
        let mut plain = vec![0f32; rows * cols];
        for out in plain.chunks_mut(block_type.elements()) {
            // Halves of random bytes are sometimes not finite.
            let block = loop {
                let block: Vec<u8> = (0..block_type.bytes())
                    .map(|_| (next() >> 32) as u8)
                    .collect();
                blocks::dequantize(block_type, &block, out);
                if out
                    .iter()
                    .all(|x| x.is_finite() && x.abs() >= f32::MIN_POSITIVE || *x == 0.0)
                {
                    break block;
                }
            };
            bytes.extend_from_slice(&block);
        }
        assert_eq!(bytes.len(), count * block_type.bytes());
        let shape = [rows, cols];
        let matrix =
            PackedMatrix::from_blocks(&pool, &memory, block_type, shape, &bytes, |n| rows - 1 - n)
                .expect("finite scales");
        let mut row = vec![0f32; cols];
        for n in 0..rows {
            matrix.unpack_row(n, &mut row);
            let want = &plain[(rows - 1 - n) * cols..][..cols];
            for (k, (got, want)) in row.iter().zip(want).enumerate() {
                assert_eq!(got, want, "{block_type} {layout:?}: row {n}, column {k}");
            }
        }
        // Scales of less than a byte get a whole one, codes of less than two bits get two.
        let (file, packed) = (block_type.bits(), layout.bits_per_weight());
        let most = match block_type {
            BlockType::TQ1_0 | BlockType::Q1_0 => 2.2,
            BlockType::Q2_K => 3.2,
            BlockType::Q3_K => 3.65,
            _ => 1.05 * file,
        };
        assert!(packed <= most, "{block_type}: {packed} bits for {file}");
    }
    assert_eq!(checked, 17);
}

/// Roots of the mean squared error, relative to the standard deviation.
#[test]
fn own_formats_round_well() {
    let pool = Pool::new(2);
    let memory = Memory::new();
    let mut next = random(5);
    let (rows, cols) = (40, 1000);
    // Sums of uniform numbers, nearly normal.
    let x: Vec<f32> = (0..rows * cols)
        .map(|_| {
            (0..12)
                .map(|_| (next() >> 40) as f32 / (1 << 24) as f32 - 0.5)
                .sum()
        })
        .collect();
    let error = |matrix: &PackedMatrix| {
        let mut row = vec![0f32; cols];
        let mut sum = 0f64;
        for n in 0..rows {
            matrix.unpack_row(n, &mut row);
            for (got, want) in row.iter().zip(&x[n * cols..]) {
                sum += f64::from(got - want).powi(2);
            }
        }
        (sum / (rows * cols) as f64).sqrt()
    };
    let of = |layout| {
        let at = |pool: &Pool| PackedMatrix::quantize(pool, &memory, layout, [rows, cols], &x);
        let matrix = at(&pool);
        for &level in Level::supported() {
            let same = at(&Pool::with_level(1, level)).bytes() == matrix.bytes();
            assert!(same, "{layout:?} on {level}");
        }
        error(&matrix)
    };
    // As the file format's quantizer: the largest weight is -8, without a search.
    let mut q4_0 = 0f64;
    for x in x.chunks(32) {
        let largest = x
            .iter()
            .fold(0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
        let d = f16::from_f32(largest / -8.0).to_f32();
        for x in x {
            let q = (x / d + 8.5).trunc().min(15.0) - 8.0;
            q4_0 += f64::from(q * d - x).powi(2);
        }
    }
    let q4_0 = (q4_0 / x.len() as f64).sqrt();
    let errors = [
        Layout::q4(32),
        Layout::q4_asymmetric(32),
        Layout::q4_asymmetric(128),
        Layout::q8(),
    ]
    .map(of);
    assert!(
        errors[0] < 0.95 * q4_0,
        "{} against {q4_0} of Q4_0",
        errors[0]
    );
    assert!(
        errors[1] < errors[0] && errors[2] < 1.3 * q4_0,
        "{errors:?}"
    );
    assert!(errors[3] < 0.008, "{errors:?}");
}

/// Weights that are far from normal are rounded alike on all levels, and none of them is refused.
#[test]
fn odd_weights_round_alike() {
    let memory = Memory::new();
    let mut next = random(6);
    let (rows, cols) = (19, 301);
    let odd = |kind: usize, number: f32, pick: u64| match (kind, pick % 31) {
        (0, _) => 0.0,
        (1, _) => (pick % 5) as f32 - 2.0,
        (2, _) => number * 1e-7,
        (3, _) => number * 1e37,
        (4, _) => number.abs() + 1.0,
        (5, 0) => f32::NAN,
        (6, 0) => f32::INFINITY,
        (7, 0) => f32::NEG_INFINITY,
        _ => number,
    };
    for kind in 0..9 {
        let x: Vec<f32> = (0..rows * cols)
            .map(|_| {
                let number = (next() >> 40) as f32 / (1 << 24) as f32 - 0.5;
                odd(kind, number, next() >> 30)
            })
            .collect();
        for group in [32, 64, 128, 256] {
            for layout in [
                Layout::q4(group),
                Layout::q4_asymmetric(group),
                Layout::q8(),
            ] {
                let at = |level| {
                    let pool = Pool::with_level(1, level);
                    PackedMatrix::quantize(&pool, &memory, layout, [rows, cols], &x)
                };
                let scalar = at(Level::Scalar);
                for &level in Level::supported() {
                    let same = at(level).bytes() == scalar.bytes();
                    assert!(same, "{layout:?} of kind {kind} on {level}");
                }
            }
        }
    }
}
