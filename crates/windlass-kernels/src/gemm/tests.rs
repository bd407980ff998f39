//! Every kernel against the reference: bit for bit on small whole numbers, whose sums are exact in any order, and on
//! fractions within the bound of a dot product.

use half::{bf16, f16};

use super::*;
use crate::DType;

/// A small generator, so that cases are the same everywhere.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    /// Whole numbers in -3..=3, or fractions in -1..1.
    fn fill<E: Element>(&mut self, len: usize, whole: bool) -> Vec<E> {
        let mut one = || {
            if whole {
                self.next() as f64 % 7.0 - 3.0
            } else {
                self.next() as f64 / (1u64 << 30) as f64 - 1.0
            }
        };
        (0..len).map(|_| E::from_f64(one())).collect()
    }
}

const LAYOUTS: [Layout; 3] = [Layout::Nt, Layout::Nn, Layout::Tn];

/// One product with its operands; `pad` is added to every stride.
struct Case<E, C> {
    layout: Layout,
    size: (usize, usize, usize),
    a: Vec<E>,
    b: Vec<E>,
    c: Vec<C>,
    bias: Vec<E>,
    residual: Vec<E>,
    strides: [usize; 4],
}

impl<E: Element, C: Element<Acc = E::Acc>> Case<E, C> {
    fn new(layout: Layout, size: (usize, usize, usize), pad: usize, whole: bool) -> Case<E, C> {
        let (m, n, k) = size;
        let mut numbers = Numbers((m * 31 + n * 7 + k) as u64);
        let (a_shape, b_shape) = (
            if layout == Layout::Tn { (k, m) } else { (m, k) },
            if layout == Layout::Nt { (n, k) } else { (k, n) },
        );
        let strides = [a_shape.1 + pad, b_shape.1 + 2 * pad, n + 3 * pad, n + pad];
        Case {
            layout,
            size,
            a: numbers.fill(a_shape.0 * strides[0], whole),
            b: numbers.fill(b_shape.0 * strides[1], whole),
            c: numbers.fill(m * strides[2], whole),
            bias: numbers.fill(n, whole),
            residual: numbers.fill(m * strides[3], whole),
            strides,
        }
    }

    fn epilogue(&self, which: usize) -> Epilogue<'_, E> {
        Epilogue {
            accumulate: which & 1 != 0,
            bias: (which & 2 != 0).then_some(&self.bias),
            residual: (which & 4 != 0).then_some(Mat {
                data: &self.residual,
                stride: self.strides[3],
            }),
        }
    }

    fn run(&self, pool: &Pool, kernel: Option<&Kernel>, which: usize) -> Vec<C> {
        let mut c = self.c.clone();
        let a = Mat {
            data: &self.a,
            stride: self.strides[0],
        };
        let b = Mat {
            data: &self.b,
            stride: self.strides[1],
        };
        gemm_with(
            pool,
            kernel,
            self.layout,
            self.size,
            a,
            b,
            &mut c,
            self.strides[2],
            self.epilogue(which),
        );
        c
    }

    fn want(&self, which: usize) -> Vec<C> {
        let mut c = self.c.clone();
        let a = Mat {
            data: &self.a,
            stride: self.strides[0],
        };
        let b = Mat {
            data: &self.b,
            stride: self.strides[1],
        };
        reference::gemm(
            self.layout,
            self.size,
            a,
            b,
            &mut c,
            self.strides[2],
            self.epilogue(which),
        );
        c
    }
}

/// Every way to multiply `dtype` that this CPU can run, with the level its pool needs.
fn kernels(dtype: DType) -> Vec<(Level, Option<&'static Kernel>)> {
    let mut all: Vec<_> = Level::supported()
        .iter()
        .map(|&level| (level, kernel::select(dtype, level)))
        .collect();
    let avx512 = Level::Avx512.is_supported();
    if dtype == DType::Bf16 && avx512 {
        all.push((Level::Avx512, Some(&kernel::AVX512_BF16)));
        if is_x86_feature_detected!("avx512bf16") {
            all.push((Level::Avx512, Some(&kernel::AVX512_PAIRS)));
        }
    }
    all
}

/// [`kernels`] of the types that have kernels.
fn every_kernel() -> impl Iterator<Item = (Level, Option<&'static Kernel>)> {
    let types = [DType::F32, DType::Bf16, DType::F16];
    types.into_iter().flat_map(kernels)
}

fn name(kernel: Option<&Kernel>) -> &'static str {
    kernel.map_or("reference", |kernel| kernel.name)
}

/// Whole numbers: the same bits as the reference, on 1, 2 and 3 threads.
fn check<E: Element, C: Element<Acc = E::Acc>>(sizes: &[(usize, usize, usize)]) {
    let kernels: Vec<_> = kernels(E::DTYPE)
        .into_iter()
        .map(|(level, kernel)| {
            (
                kernel,
                [1, 2, 3].map(|threads| Pool::with_level(threads, level)),
            )
        })
        .collect();
    for (index, &size) in sizes.iter().enumerate() {
        for layout in LAYOUTS {
            let (pad, which) = (index % 2 * 5, index % 8);
            let case = Case::<E, C>::new(layout, size, pad, true);
            let want = case.want(which);
            for (kernel, pools) in &kernels {
                let few = if kernel.is_none() { 1..2 } else { 0..3 };
                for pool in &pools[few] {
                    let got = case.run(pool, *kernel, which);
                    let first = got.iter().zip(&want).position(|(g, w)| g != w);
                    assert!(
                        first.is_none(),
                        "{} {layout:?} {size:?} pad {pad} epilogue {which} {pool:?}: element {first:?} is {:?}, not {:?}",
                        name(*kernel),
                        got[first.unwrap()],
                        want[first.unwrap()],
                    );
                }
            }
        }
    }
}

/// Sizes around one to three slivers of every kernel, and around the boundaries of blocks.
fn sizes() -> Vec<(usize, usize, usize)> {
    let mut all = vec![
        (0, 3, 4),
        (3, 0, 4),
        (3, 4, 0),
        (200, 40, 0),
        (1, 1, 1),
        (2, 3, 1),
    ];
    for m in [
        1, 2, 5, 6, 7, 12, 13, 14, 15, 16, 17, 27, 28, 29, 32, 33, 43, 64, 65, 97,
    ] {
        all.push((m, 33, 35));
    }
    for n in [1, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 97, 129] {
        all.push((15, n, 31));
        all.push((1, n, 65));
    }
    for k in [
        1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 383, 384, 385, 767, 769, 1023, 1024,
        1025,
    ] {
        all.push((9, 37, k));
        all.push((131, 18, k));
    }
    all.extend([
        (128, 100, 300),
        (129, 100, 300),
        (260, 1100, 7),
        (140, 545, 60),
    ]);
    all
}

#[test]
fn f32_equals_the_reference() {
    check::<f32, f32>(&sizes());
}

#[test]
fn bf16_equals_the_reference() {
    check::<bf16, bf16>(&sizes());
    check::<bf16, f32>(&sizes());
    check::<f32, bf16>(&sizes()[20..30]);
}

#[test]
fn f16_equals_the_reference() {
    check::<f16, f16>(&sizes());
    check::<f16, f32>(&sizes());
    check::<f32, f16>(&sizes()[20..30]);
    check::<bf16, f16>(&sizes()[30..40]);
    check::<f16, bf16>(&sizes()[40..50]);
}

#[test]
fn f64_runs_the_reference_on_every_level() {
    check::<f64, f64>(&sizes()[..40]);
}

#[test]
fn depth_in_several_parts() {
    check::<f32, f32>(&[(130, 33, 4097)]);
    check::<bf16, bf16>(&[(130, 33, 4097), (131, 17, 8500)]);
    check::<f16, f16>(&[(131, 17, 2500)]);
    // More rows than partial sums are kept for.
    check::<f32, f32>(&[(4200, 1, 4100)]);
}

#[test]
fn fractions_are_within_the_bound() {
    for (level, kernel) in every_kernel() {
        let pool = Pool::with_level(2, level);
        for size in [(150, 70, 1000), (3, 40, 2500)] {
            for layout in LAYOUTS {
                if kernel.is_none_or(|k| k.name.contains("f32")) {
                    check_bound::<f32>(&pool, kernel, layout, size);
                } else if kernel.is_some_and(|k| k.name.contains(" f16")) {
                    check_bound::<f16>(&pool, kernel, layout, size);
                } else {
                    check_bound::<bf16>(&pool, kernel, layout, size);
                }
            }
        }
    }
}

/// `|error| <= sqrt(k) eps Σ|a b|`, a rounding walk.
fn check_bound<E: Element<Acc = f32>>(
    pool: &Pool,
    kernel: Option<&Kernel>,
    layout: Layout,
    size: (usize, usize, usize),
) {
    let case = Case::<E, f32>::new(layout, size, 0, false);
    let got = case.run(pool, kernel, 0);
    let (m, n, k) = size;
    for row in [0, m / 2, m - 1] {
        for column in 0..n {
            let a = |i: usize| {
                if layout == Layout::Tn {
                    case.a[i * m + row]
                } else {
                    case.a[row * k + i]
                }
            };
            let b = |i: usize| {
                if layout == Layout::Nt {
                    case.b[column * k + i]
                } else {
                    case.b[i * n + column]
                }
            };
            let terms = (0..k).map(|i| a(i).to_f64() * b(i).to_f64());
            let (sum, size) = terms.fold((0.0, 0.0), |(s, t), x| (s + x, t + x.abs()));
            let error = (got[row * n + column] as f64 - sum).abs();
            let limit = (k as f64).sqrt() * f64::from(f32::EPSILON) * size;
            assert!(
                error <= limit,
                "{} {layout:?}: error {error:e}, limit {limit:e}",
                name(kernel)
            );
        }
    }
}

/// A row's bits are the same in any batch, in any layout that can hold it, and on both widths of vectors.
#[test]
fn bits_depend_on_nothing_else() {
    let bits = |c: &[f32]| c.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for (level, kernel) in every_kernel() {
        let pool = Pool::with_level(2, level);
        if kernel.is_none_or(|k| k.name.contains("f32")) {
            check_rows::<f32>(&pool, kernel);
        } else if kernel.is_some_and(|k| k.name.contains(" f16")) {
            check_rows::<f16>(&pool, kernel);
        } else {
            check_rows::<bf16>(&pool, kernel);
        }
    }
    if Level::Avx512.is_supported() {
        let case = Case::<f32, f32>::new(Layout::Nt, (150, 70, 1000), 0, false);
        let [narrow, wide] = [Level::Avx2, Level::Avx512].map(|level| {
            bits(&case.run(
                &Pool::with_level(1, level),
                kernel::select(DType::F32, level),
                0,
            ))
        });
        assert!(narrow == wide, "AVX2 and AVX-512 differ");
    }
}

fn check_rows<E: Element<Acc = f32>>(pool: &Pool, kernel: Option<&Kernel>) {
    let (m, n, k) = (170, 50, 1300);
    let whole = Case::<E, f32>::new(Layout::Nt, (m, n, k), 0, false);
    let want = whole.run(pool, kernel, 0);
    for (first, rows) in [
        (0, 1),
        (5, 2),
        (3, 8),
        (17, 13),
        (40, 100),
        (169, 1),
        (20, 150),
    ] {
        let part = Case::<E, f32> {
            a: whole.a[first * k..(first + rows) * k].to_vec(),
            b: whole.b.clone(),
            ..Case::new(Layout::Nt, (rows, n, k), 0, false)
        };
        let got = part.run(pool, kernel, 0);
        let want = &want[first * n..(first + rows) * n];
        assert!(
            got.iter()
                .zip(want)
                .all(|(g, w)| g.to_bits() == w.to_bits()),
            "{}: rows {first}+{rows}",
            name(kernel)
        );
    }
    let transposed = |data: &[E], rows: usize, columns: usize| -> Vec<E> {
        (0..rows * columns)
            .map(|i| data[i % rows * columns + i / rows])
            .collect()
    };
    for layout in [Layout::Nn, Layout::Tn] {
        let a = if layout == Layout::Tn {
            transposed(&whole.a, m, k)
        } else {
            whole.a.clone()
        };
        let b = transposed(&whole.b, n, k);
        let case = Case::<E, f32> {
            a,
            b,
            ..Case::new(layout, (m, n, k), 0, false)
        };
        let got = case.run(pool, kernel, 0);
        assert!(
            got.iter()
                .zip(&want)
                .all(|(g, w)| g.to_bits() == w.to_bits()),
            "{}: {layout:?}",
            name(kernel)
        );
    }
}

#[test]
fn a_dry_pool_touches_nothing() {
    let mut c = [7f32; 4];
    let one = Mat {
        data: &[1f32; 4],
        stride: 2,
    };
    gemm(
        &Pool::dry(),
        Layout::Nt,
        2,
        2,
        2,
        one,
        one,
        &mut c,
        2,
        Epilogue::default(),
    );
    assert_eq!(c, [7.0; 4]);
}

#[test]
#[should_panic(expected = "B: 3 x 4 with stride 4 needs 12 elements, got 11")]
fn short_operands_are_refused() {
    let (a, b, mut c) = ([0f32; 8], [0f32; 11], [0f32; 6]);
    let (a, b) = (
        Mat {
            data: &a,
            stride: 4,
        },
        Mat {
            data: &b,
            stride: 4,
        },
    );
    gemm(
        &Pool::new(1),
        Layout::Nt,
        2,
        3,
        4,
        a,
        b,
        &mut c,
        3,
        Epilogue::default(),
    );
}
