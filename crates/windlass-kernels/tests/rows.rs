//! Row and element kernels: every level against the scalar reference, for every length up to a few vectors and some
//! that need several tasks; the same bits on 1, 2 and 3 threads.

use std::sync::LazyLock;

use half::{bf16, f16};
use windlass_kernels::activation::{self, Activation};
use windlass_kernels::cross_entropy::{IGNORED, cross_entropy_rows};
use windlass_kernels::dispatch::Level;
use windlass_kernels::pool::Pool;
use windlass_kernels::rope::{Rope, rope};
use windlass_kernels::{DType, Element, Float};
use windlass_kernels::{cast, elementwise, embedding, norm, reduce, reference, softmax, topk};

/// Every supported level on 1, 2 and 3 threads.
static POOLS: LazyLock<Vec<Vec<Pool>>> = LazyLock::new(|| {
    let levels = Level::supported().iter();
    levels
        .map(|&level| {
            (1..=3)
                .map(|threads| Pool::with_level(threads, level))
                .collect()
        })
        .collect()
});

/// What numbers a kernel is fed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// About ±3.
    Plain,
    /// Many magnitudes, zeros and denormals, all finite.
    Wide,
    /// As `Wide`, with infinities and NaN.
    Extreme,
}

/// A source of numbers that depends on nothing but its seed.
struct Numbers(u64, Kind);

impl Numbers {
    fn bits(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 ^ (self.0 >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16
    }

    fn one(&mut self) -> f64 {
        let plain = (self.bits() % 6001) as f64 / 1000.0 - 3.0;
        let pick = self.bits() % 40;
        match (self.1, pick) {
            (Kind::Plain, _) | (_, 10..) => plain,
            (_, 0) => 0.0,
            (_, 1) => -0.0,
            (_, 2) => plain * 1e-39,
            (_, 3) => plain * 1e-20,
            (_, 4) => 1e4,
            (_, 5) => -1e4,
            (_, 6) => plain * 1e15,
            (Kind::Extreme, 7) => f64::INFINITY,
            (Kind::Extreme, 8) => f64::NEG_INFINITY,
            (Kind::Extreme, 9) => f64::NAN,
            _ => plain * 100.0,
        }
    }

    fn many<E: Element>(&mut self, n: usize) -> Vec<E> {
        // Where a type holds no number of this size, one that it holds.
        let fit = |x: f64| {
            if E::DTYPE == DType::F16 && x.is_finite() && x.abs() > 6e4 {
                x.signum() * 1e4
            } else {
                x
            }
        };
        (0..n).map(|_| E::from_f64(fit(self.one()))).collect()
    }
}

/// Outputs of a kernel, each with the type it was rounded to.
type Outputs = Vec<(DType, Vec<f64>)>;

fn output<E: Element>(x: &[E]) -> (DType, Vec<f64>) {
    (E::DTYPE, x.iter().map(|x| x.to_f64()).collect())
}

/// Largest relative error of arithmetic in this type over `n` terms, before the rounding of the result.
fn arithmetic(dtype: DType, n: usize) -> f64 {
    if dtype == DType::F64 {
        0.0
    } else {
        2e-6 + n as f64 * 1e-9
    }
}

fn compare(name: &str, got: &Outputs, want: &Outputs, arithmetic: f64) {
    for (o, ((dtype, got), (_, want))) in got.iter().zip(want).enumerate() {
        assert_eq!(got.len(), want.len());
        let size = want
            .iter()
            .filter(|w| w.is_finite())
            .fold(0.0, |m: f64, w| m.max(w.abs()));
        for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
            // Of a number, and of the smallest.
            let (rounding, least) = match dtype {
                DType::Bf16 => (1.0 / 128.0, 2e-44),
                DType::F16 => (1.0 / 1024.0, 6e-8),
                _ => (0.0, 2e-44),
            };
            let limit = w.abs() * (rounding + arithmetic) + size * arithmetic + least;
            let close = g == w || g.is_nan() && w.is_nan() || (g - w).abs() <= limit;
            assert!(
                close,
                "{name}, output {o}, element {i}: {g:e}, reference {w:e} (limit {limit:e})"
            );
        }
    }
}

/// A kernel: the reference where there is no pool.
type Kernel<'a> = &'a dyn Fn(Option<&Pool>, &mut Numbers, usize) -> Outputs;

/// Runs a kernel of one storage type over sizes and kinds of numbers.
fn check(name: &str, storage: DType, kinds: &[Kind], sizes: &[usize], kernel: Kernel<'_>) {
    for &kind in kinds {
        for &n in sizes {
            let numbers = || Numbers(n as u64 * 77 + 5, kind);
            let want = kernel(None, &mut numbers(), n);
            for pools in POOLS.iter() {
                let name = format!("{name} {storage} {} {kind:?} of {n}", pools[0].level());
                let got = kernel(Some(&pools[0]), &mut numbers(), n);
                compare(&name, &got, &want, arithmetic(storage, n));
                if n >= 129 {
                    for pool in &pools[1..] {
                        let other = kernel(Some(pool), &mut numbers(), n);
                        assert_eq!(
                            bits(&other),
                            bits(&got),
                            "{name}: {} threads",
                            pool.threads()
                        );
                    }
                }
            }
        }
    }
}

fn bits(outputs: &Outputs) -> Vec<u64> {
    outputs
        .iter()
        .flat_map(|(_, o)| o.iter().map(|x| x.to_bits()))
        .collect()
}

/// Every length up to three vectors, lengths around the unrolled loops, and lengths of several tasks.
fn lengths() -> Vec<usize> {
    (0..=48)
        .chain([63, 64, 65, 80, 100, 127, 128, 129, 140, 1000, 40_000])
        .collect()
}

/// As [`lengths`], for columns; the number of rows is [`rows`].
fn columns() -> Vec<usize> {
    (1..=48)
        .chain([63, 64, 65, 80, 100, 127, 128, 129, 140, 1000, 20_000])
        .collect()
}

fn rows(cols: usize) -> usize {
    match cols {
        1000 => 40,
        _ => 3,
    }
}

const FINITE: [Kind; 2] = [Kind::Plain, Kind::Wide];
const ALL: [Kind; 3] = [Kind::Plain, Kind::Wide, Kind::Extreme];
const CURVES: [Activation; 4] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
];

/// Calls the kernel on the pool, or the reference.
macro_rules! call {
    ($pool:expr, $kernel:path, $reference:path, ($($arg:expr),*)) => {
        match $pool {
            Some(pool) => $kernel(pool, $($arg),*),
            None => $reference($($arg),*),
        }
    };
}

fn elementwise_of<E: Element>() {
    let d = E::DTYPE;
    check("add", d, &ALL, &lengths(), &|pool, x, n| {
        let (a, b, mut y) = (x.many::<E>(n), x.many::<E>(n), x.many::<E>(n));
        call!(pool, elementwise::add, reference::add, (&a, &b, &mut y));
        vec![output(&y)]
    });
    check("mul", d, &ALL, &lengths(), &|pool, x, n| {
        let (a, b, mut y) = (x.many::<E>(n), x.many::<E>(n), x.many::<E>(n));
        call!(pool, elementwise::mul, reference::mul, (&a, &b, &mut y));
        vec![output(&y)]
    });
    check("scale", d, &ALL, &lengths(), &|pool, x, n| {
        let (a, mut y, mut z) = (x.many::<E>(n), x.many::<E>(n), x.many::<E>(n));
        call!(
            pool,
            elementwise::scale,
            reference::scale,
            (1.7, &a, &mut y)
        );
        call!(
            pool,
            elementwise::scale_in_place,
            reference::scale_in_place,
            (-0.3, &mut z)
        );
        vec![output(&y), output(&z)]
    });
    check("axpy", d, &FINITE, &lengths(), &|pool, x, n| {
        let (a, mut y) = (x.many::<E>(n), x.many::<E>(n));
        call!(pool, elementwise::axpy, reference::axpy, (-1.7, &a, &mut y));
        vec![output(&y)]
    });
    check("fill", d, &[Kind::Plain], &lengths(), &|pool, x, n| {
        let mut y = x.many::<E>(n);
        call!(
            pool,
            elementwise::fill,
            reference::fill,
            (E::from_f64(2.5), &mut y)
        );
        vec![output(&y)]
    });
    check("cast", d, &ALL, &lengths(), &|pool, x, n| {
        let (a, mut f, mut b, mut w) = (
            x.many::<E>(n),
            vec![0f32; n],
            vec![bf16::ONE; n],
            vec![0f64; n],
        );
        let mut h = vec![f16::ONE; n];
        call!(pool, cast::cast, reference::cast, (&a, &mut h));
        call!(pool, cast::cast, reference::cast, (&a, &mut f));
        call!(pool, cast::cast, reference::cast, (&a, &mut b));
        call!(pool, cast::cast, reference::cast, (&a, &mut w));
        let outputs = vec![output(&f), output(&b), output(&w), output(&h)];
        assert!(
            outputs[2]
                .1
                .iter()
                .zip(&a)
                .all(|(w, a)| w.to_bits() == a.to_f64().to_bits())
        );
        outputs
    });
    check("activations", d, &ALL, &lengths(), &|pool, x, n| {
        let (a, dy, mut y, mut dx) = (
            x.many::<E>(n),
            x.many::<E>(n),
            x.many::<E>(n),
            x.many::<E>(n),
        );
        // Derivatives are compared on the scale of what they multiply: they cancel where a curve is flat.
        let size = dy
            .iter()
            .map(|dy| dy.to_f64().abs())
            .filter(|dy| dy.is_finite())
            .fold(0.0, f64::max);
        let mut outputs = vec![];
        for kind in CURVES {
            call!(
                pool,
                activation::activation,
                reference::activation,
                (kind, &a, &mut y)
            );
            call!(
                pool,
                activation::activation_backward,
                reference::activation_backward,
                (kind, &a, &dy, &mut dx)
            );
            outputs.extend([output(&y), output(&dx)]);
            outputs.last_mut().expect("just pushed").1.push(size);
        }
        outputs
    });
    check("gated", d, &FINITE, &lengths(), &|pool, x, n| {
        let (gate, up, dy) = (x.many::<E>(n), x.many::<E>(n), x.many::<E>(n));
        let (mut y, mut dgate, mut dup) = (
            vec![E::default(); n],
            vec![E::default(); n],
            vec![E::default(); n],
        );
        let size = up
            .iter()
            .zip(&dy)
            .map(|(up, dy)| (up.to_f64() * dy.to_f64()).abs())
            .fold(0.0, f64::max);
        let mut outputs = vec![];
        for kind in CURVES {
            call!(
                pool,
                activation::gated,
                reference::gated,
                (kind, &gate, &up, &mut y)
            );
            call!(
                pool,
                activation::gated_backward,
                reference::gated_backward,
                (kind, &gate, &up, &dy, &mut dgate, &mut dup)
            );
            outputs.extend([output(&y), output(&dup), output(&dgate)]);
            outputs.last_mut().expect("just pushed").1.push(size);
        }
        outputs
    });
}

fn reductions_of<E: Element>() {
    check("reductions", E::DTYPE, &ALL, &lengths(), &|pool, x, n| {
        let n = if n == 40_000 { 150_000 } else { n };
        let (a, b) = (x.many::<E>(n), x.many::<E>(n));
        let squares = call!(pool, reduce::sum_squares, reference::sum_squares, (&a));
        let dot = call!(pool, reduce::dot, reference::dot, (&a, &b));
        let count = call!(
            pool,
            reduce::count_nonfinite,
            reference::count_nonfinite,
            (&a)
        );
        // The dot product is compared on the scale of its terms.
        let size: f64 = a
            .iter()
            .zip(&b)
            .map(|(a, b)| (a.to_f64() * b.to_f64()).abs())
            .sum();
        let size = if size.is_finite() { size } else { 0.0 };
        // Blocks are added in another order than the reference's.
        let dtype = if E::DTYPE == DType::F64 {
            DType::Bf16
        } else {
            E::DTYPE
        };
        vec![
            (dtype, vec![squares]),
            (dtype, vec![dot, size]),
            (DType::F64, vec![count as f64]),
        ]
    });
    check(
        "sum_rows",
        E::DTYPE,
        &FINITE,
        &columns(),
        &|pool, x, cols| {
            let (a, mut sums) = (x.many::<E>(rows(cols) * cols), x.many::<E::Acc>(cols));
            match pool {
                Some(pool) => elementwise::sum_rows(pool, &a, &mut sums),
                None => reference::sum_rows(&a, cols, 0, &mut sums),
            }
            vec![output(&sums)]
        },
    );
    check(
        "transpose",
        E::DTYPE,
        &[Kind::Plain],
        &columns(),
        &|pool, x, cols| {
            let a = x.many::<E>(rows(cols) * cols);
            let mut y = vec![E::default(); a.len()];
            call!(
                pool,
                elementwise::transpose,
                reference::transpose,
                (&a, rows(cols), cols, &mut y)
            );
            vec![output(&y)]
        },
    );
}

fn norms_of<E: Element>() {
    check("rms_norm", E::DTYPE, &ALL, &columns(), &|pool, x, cols| {
        let n = rows(cols) * cols;
        let (a, w, dy, mut y, mut dx) = (
            x.many(n),
            x.many(cols),
            x.many(n),
            x.many(n),
            x.many::<E>(n),
        );
        let (mut inv, mut dw) = (vec![E::Acc::ZERO; rows(cols)], x.many::<E::Acc>(cols));
        let offset = (cols % 2) as f32;
        call!(
            pool,
            norm::rms_norm,
            reference::rms_norm,
            (&a, &w, offset, 1e-5, &mut y, &mut inv)
        );
        let outputs = vec![output(&y), output(&inv)];
        if x.1 != Kind::Plain || cols < 3 {
            return outputs; // gradients of wild numbers and of very short rows are what cancellation leaves
        }
        match pool {
            Some(pool) => {
                norm::rms_norm_backward(
                    pool,
                    &a,
                    &w,
                    offset,
                    &inv,
                    &dy,
                    &mut dx,
                    cols % 3 == 0,
                    &mut dw,
                );
            }
            None => {
                reference::rms_norm_dx(&a, &w, offset, &inv, &dy, &mut dx, cols % 3 == 0);
                reference::rms_norm_dw(&a, cols, 0, &inv, &dy, &mut dw);
            }
        }
        [outputs, vec![output(&dx), output(&dw)]].concat()
    });
    check(
        "layer_norm",
        E::DTYPE,
        &[Kind::Plain],
        &columns(),
        &|pool, x, cols| {
            let n = rows(cols) * cols;
            let (a, w, b, dy) = (x.many(n), x.many(cols), x.many(cols), x.many(n));
            let (mut y, mut dx) = (x.many(n), x.many::<E>(n));
            let (mut mean, mut inv) = (
                vec![E::Acc::ZERO; rows(cols)],
                vec![E::Acc::ZERO; rows(cols)],
            );
            let (mut dw, mut db) = (x.many::<E::Acc>(cols), x.many::<E::Acc>(cols));
            let with_bias = cols % 2 == 0;
            let b = with_bias.then_some(&b[..]);
            call!(
                pool,
                norm::layer_norm,
                reference::layer_norm,
                (&a, &w, b, 1e-5, &mut y, &mut mean, &mut inv)
            );
            if cols < 3 {
                return vec![output(&y)]; // what is left is rounding noise
            }
            let db_in = with_bias.then_some(&mut db[..]);
            match pool {
                Some(pool) => {
                    norm::layer_norm_backward(
                        pool,
                        &a,
                        &w,
                        &mean,
                        &inv,
                        &dy,
                        &mut dx,
                        cols % 3 == 0,
                        &mut dw,
                        db_in,
                    );
                }
                None => {
                    reference::layer_norm_dx(&a, &w, &mean, &inv, &dy, &mut dx, cols % 3 == 0);
                    reference::layer_norm_dw(&a, cols, 0, &mean, &inv, &dy, &mut dw, db_in);
                }
            }
            vec![
                output(&y),
                output(&mean),
                output(&inv),
                output(&dx),
                output(&dw),
                output(&db),
            ]
        },
    );
}

fn softmaxes_of<E: Element>() {
    check("softmax", E::DTYPE, &ALL, &columns(), &|pool, x, cols| {
        let n = rows(cols) * cols;
        let (a, dy) = (x.many::<E>(n), x.many::<E>(n));
        let (mut y, mut l, mut dx, mut dl) = (x.many(n), x.many(n), x.many::<E>(n), x.many::<E>(n));
        call!(
            pool,
            softmax::softmax,
            reference::softmax,
            (&a, cols, &mut y)
        );
        call!(
            pool,
            softmax::log_softmax,
            reference::log_softmax,
            (&a, cols, &mut l)
        );
        let mut outputs = vec![output(&y), output(&l)];
        if x.1 == Kind::Plain {
            let (y, l) = (x.many::<E>(n), x.many::<E>(n)); // any numbers will do, and both sides get the same
            call!(
                pool,
                softmax::softmax_backward,
                reference::softmax_backward,
                (&y, &dy, cols, &mut dx)
            );
            call!(
                pool,
                softmax::log_softmax_backward,
                reference::log_softmax_backward,
                (&l, &dy, cols, &mut dl)
            );
            outputs.extend([output(&dx), output(&dl)]);
        }
        outputs
    });
    check(
        "cross_entropy",
        E::DTYPE,
        &ALL,
        &columns(),
        &|pool, x, cols| {
            let rows = rows(cols) + 1;
            let logits = x.many::<E::Acc>(rows * cols);
            let mut targets: Vec<i64> =
                (0..rows).map(|_| (x.bits() % cols as u64) as i64).collect();
            targets[1] = IGNORED;
            let mut outputs = vec![];
            for softcap in [None, Some(30.0)] {
                let (mut z, mut loss) = (logits.clone(), vec![E::Acc::ONE; rows]);
                let mut d = x.many::<E>(rows * cols);
                let gradient = Some((&mut d[..], 0.25));
                call!(
                    pool,
                    cross_entropy_rows,
                    reference::cross_entropy_rows,
                    (&mut z, cols, softcap, &targets, &mut loss, gradient)
                );
                let (mut again, mut alone) = (logits.clone(), vec![E::Acc::ONE; rows]);
                call!(
                    pool,
                    cross_entropy_rows,
                    reference::cross_entropy_rows,
                    (
                        &mut again,
                        cols,
                        softcap,
                        &targets,
                        &mut alone,
                        None::<(&mut [E], f32)>
                    )
                );
                assert_eq!(
                    bits(&vec![output(&alone)]),
                    bits(&vec![output(&loss)]),
                    "the gradient changes the loss"
                );
                outputs.extend([output(&loss), output(&d)]);
            }
            outputs
        },
    );
    check(
        "top_k",
        E::DTYPE,
        &ALL,
        &(1..=40).collect::<Vec<_>>(),
        &|pool, x, cols| {
            let (k, n) = (cols.div_ceil(3), if cols > 38 { 2000 } else { 20 });
            let a = x.many::<E>(n * cols);
            let (mut values, mut indices) = (vec![E::default(); n * k], vec![0; n * k]);
            call!(
                pool,
                topk::top_k,
                reference::top_k,
                (&a, cols, k, &mut values, &mut indices)
            );
            vec![
                output(&values),
                (DType::F64, indices.iter().map(|&i| i as f64).collect()),
            ]
        },
    );
}

fn lookups_of<E: Element>() {
    check(
        "rope",
        E::DTYPE,
        &ALL,
        &(1..=70).collect::<Vec<_>>(),
        &|pool, x, pairs| {
            let (heads, rows, max) = (3, if pairs > 60 { 300 } else { 5 }, 400);
            let head_dim = 2 * pairs + pairs % 3;
            let stride = heads * head_dim + pairs % 5;
            let angles: Vec<f64> = (0..max * pairs).map(|i| i as f64 * 0.01).collect();
            let cos: Vec<f32> = angles.iter().map(|a| a.cos() as f32).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin() as f32).collect();
            let positions: Vec<u32> = (0..rows).map(|_| (x.bits() % max as u64) as u32).collect();
            let mut outputs = vec![];
            for (interleaved, inverse) in
                [(false, false), (false, true), (true, false), (true, true)]
            {
                let mut a = x.many::<E>((rows - 1) * stride + heads * head_dim);
                let shape = Rope {
                    stride,
                    heads,
                    head_dim,
                    rotary: 2 * pairs,
                    interleaved,
                    inverse,
                };
                call!(
                    pool,
                    rope,
                    reference::rope,
                    (&mut a, &shape, &cos, &sin, &positions)
                );
                outputs.push(output(&a));
            }
            outputs
        },
    );
    check(
        "embedding",
        E::DTYPE,
        &FINITE,
        &columns(),
        &|pool, x, cols| {
            let (vocabulary, tokens) = (7, 40);
            let (table, dy) = (x.many::<E>(vocabulary * cols), x.many::<E>(tokens * cols));
            let ids: Vec<u32> = (0..tokens)
                .map(|_| (x.bits() % vocabulary as u64) as u32)
                .collect();
            let (mut y, mut dtable) = (
                vec![E::default(); tokens * cols],
                x.many::<E::Acc>(vocabulary * cols),
            );
            let scale = if cols % 2 == 0 { 1.0 } else { 1.5 };
            match pool {
                Some(pool) => {
                    embedding::gather(pool, &table, &ids, scale, &mut y);
                    embedding::scatter_add(pool, &dy, &ids, scale, &mut dtable);
                }
                None => {
                    reference::gather(&table, cols, &ids, scale, &mut y);
                    reference::scatter_add(&dy, cols, &ids, scale, &mut dtable);
                }
            }
            vec![output(&y), output(&dtable)]
        },
    );
}

#[test]
fn kernels_agree_with_the_reference_in_f32() {
    elementwise_of::<f32>();
    reductions_of::<f32>();
    norms_of::<f32>();
    softmaxes_of::<f32>();
    lookups_of::<f32>();
}

#[test]
fn kernels_agree_with_the_reference_in_bf16() {
    elementwise_of::<bf16>();
    reductions_of::<bf16>();
    norms_of::<bf16>();
    softmaxes_of::<bf16>();
    lookups_of::<bf16>();
}

#[test]
fn kernels_agree_with_the_reference_in_f16() {
    elementwise_of::<f16>();
    reductions_of::<f16>();
    norms_of::<f16>();
    softmaxes_of::<f16>();
    lookups_of::<f16>();
}

#[test]
fn kernels_agree_with_the_reference_in_f64() {
    elementwise_of::<f64>();
    reductions_of::<f64>();
    norms_of::<f64>();
    softmaxes_of::<f64>();
    lookups_of::<f64>();
}

/// Denormal results cost a processor hundreds of cycles each: vectors write zero in their place.
#[test]
fn softmax_and_its_loss_write_no_denormals() {
    let cols = 5000;
    let x: Vec<f32> = (0..cols).map(|i| i as f32 * 0.03).collect();
    for pools in &POOLS[1..] {
        let (mut y, mut d, mut loss) = (vec![0f32; cols], vec![0f32; cols], [0f32]);
        softmax::softmax(&pools[0], &x, cols, &mut y);
        let to = Some((&mut d[..], 1e-3));
        cross_entropy_rows(&pools[0], &mut x.clone(), cols, None, &[7], &mut loss, to);
        for (name, row) in [("softmax", y), ("gradient", d)] {
            let denormals = row.iter().filter(|y| y.is_subnormal()).count();
            let zeros = row.iter().filter(|&&y| y == 0.0).count();
            assert_eq!(denormals, 0, "{name} at {}", pools[0].level());
            assert!((1500..2500).contains(&zeros), "{name}: {zeros} zeros");
        }
    }
}

/// Logits of ±10 000 and -∞ have exact losses and gradients, at every level.
#[test]
fn cross_entropy_survives_extreme_logits() {
    let (low, inf) = (-1e4f32, f32::NEG_INFINITY);
    let cases: [(&[f32], i64, f32, &[f32]); 6] = [
        (&[1e4, low, 0.0], 0, 0.0, &[0.0, 0.0, 0.0]),
        (&[1e4, low, 0.0], 1, 2e4, &[1.0, -1.0, 0.0]),
        (&[inf, 1.0, inf], 1, 0.0, &[0.0, 0.0, 0.0]),
        (&[inf, 0.0, 0.0], 0, f32::INFINITY, &[-1.0, 0.5, 0.5]),
        (
            &[low, low, low, low],
            2,
            1.386_294_4,
            &[0.25, 0.25, -0.75, 0.25],
        ),
        (&[1e4, inf, 1e4], IGNORED, 0.0, &[0.0, 0.0, 0.0]),
    ];
    for pools in POOLS.iter() {
        for (logits, target, want, gradient) in cases {
            let (mut z, mut loss, mut d) = (logits.to_vec(), [9.0f32], vec![9.0f32; logits.len()]);
            let to = Some((&mut d[..], 1.0));
            cross_entropy_rows(
                &pools[0],
                &mut z,
                logits.len(),
                None,
                &[target],
                &mut loss,
                to,
            );
            let close = |got: f32, want: f32| {
                got == want || (got - want).abs() < 2e-7 * want.abs().max(1.0)
            };
            assert!(
                close(loss[0], want),
                "loss of {logits:?} at {target}: {}, known {want}",
                loss[0]
            );
            assert!(
                d.iter().zip(gradient).all(|(&d, &g)| close(d, g)),
                "{logits:?} at {target}: {d:?}"
            );
        }
    }
}

#[test]
fn top_k_is_descending_and_ties_go_to_the_lower_column() {
    let x = [1.0f32, 3.0, f32::NAN, 3.0, 2.0, f32::NEG_INFINITY];
    let (mut values, mut indices) = ([0.0; 5], [0; 5]);
    topk::top_k(&POOLS[0][0], &x, 6, 5, &mut values, &mut indices);
    assert_eq!(indices, [1, 3, 4, 0, 2]);
    assert_eq!(values[..4], [3.0, 3.0, 2.0, 1.0]);
}

#[test]
#[should_panic(expected = "position 4 lies beyond the 4 positions of the rotary table")]
fn rope_refuses_positions_beyond_its_table() {
    let shape = Rope {
        stride: 2,
        heads: 1,
        head_dim: 2,
        rotary: 2,
        interleaved: false,
        inverse: false,
    };
    rope(
        &POOLS[0][0],
        &mut [0f32; 4],
        &shape,
        &[1.0; 4],
        &[0.0; 4],
        &[0, 4],
    );
}

#[test]
#[should_panic(expected = "target 3 is not one of 3 classes")]
fn cross_entropy_refuses_targets_beyond_its_columns() {
    cross_entropy_rows::<f32>(&POOLS[0][0], &mut [0.0; 3], 3, None, &[3], &mut [0.0], None);
}

/// Gradients of weights have the same bits whether rows come at once or in two calls.
#[test]
fn weight_gradients_do_not_depend_on_how_rows_are_cut() {
    let (rows, cols) = (37, 150);
    let x = &mut Numbers(3, Kind::Plain);
    let (a, dy, w) = (
        x.many::<bf16>(rows * cols),
        x.many::<bf16>(rows * cols),
        x.many::<bf16>(cols),
    );
    let (mean, inv) = (x.many::<f32>(rows), x.many::<f32>(rows));
    let ids: Vec<u32> = (0..rows).map(|_| (x.bits() % 5) as u32).collect();
    for pools in POOLS.iter() {
        let sums = |cuts: &[usize]| {
            let (mut rms, mut layer, mut bias) =
                (vec![0.5f32; cols], vec![0.5; cols], vec![0.5; cols]);
            let (mut plain, mut table) = (vec![0.5f32; cols], vec![0.5; 5 * cols]);
            let mut dx = vec![bf16::ZERO; rows * cols];
            for part in cuts.windows(2) {
                let (r, c) = (part[0]..part[1], part[0] * cols..part[1] * cols);
                let (a, dy, dx) = (&a[c.clone()], &dy[c.clone()], &mut dx[c]);
                let (mean, inv, pool) = (&mean[r.clone()], &inv[r.clone()], &pools[1]);
                norm::rms_norm_backward(pool, a, &w, 0.0, inv, dy, dx, false, &mut rms);
                norm::layer_norm_backward(
                    pool,
                    a,
                    &w,
                    mean,
                    inv,
                    dy,
                    dx,
                    true,
                    &mut layer,
                    Some(&mut bias),
                );
                elementwise::sum_rows(pool, dy, &mut plain);
                embedding::scatter_add(pool, dy, &ids[r], 1.5, &mut table);
            }
            vec![
                output(&rms),
                output(&layer),
                output(&bias),
                output(&plain),
                output(&table),
                output(&dx),
            ]
        };
        assert_eq!(
            bits(&sums(&[0, rows])),
            bits(&sums(&[0, 5, 20, rows])),
            "{}",
            pools[0].level()
        );
    }
}
