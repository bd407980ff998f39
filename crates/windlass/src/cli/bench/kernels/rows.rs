//! Kernels over rows and elements, and the optimizer's: what binds them is memory.

use super::measure::Bench;
use std::hint::black_box;
use windlass::tensor::kernels::activation::{self, Activation};
use windlass::tensor::kernels::cross_entropy::cross_entropy_rows;
use windlass::tensor::kernels::optim::{self, Adam, Grad, Moment, Rule, Values};
use windlass::tensor::kernels::pool::Pool;
use windlass::tensor::kernels::rope::{Rope, rope};
use windlass::tensor::kernels::{Element, cast, cost, embedding, norm, reduce, softmax};
use windlass::tensor::{DType, bf16};

const ROWS: usize = 2048;
const COLS: usize = 768;
/// Elements of the activations between the MLP's matrices.
const INNER: usize = 2048 * 2048;
const VOCABULARY: usize = 32000;
const PARAMETERS: usize = 20_000_000;

/// RMS norm and layer norm.
pub fn norms<E: Element>(b: &mut Bench<'_>) {
    let n = ROWS * COLS;
    let (x, dy, w) = (b.numbers::<E>(n), b.numbers::<E>(n), b.numbers::<E>(COLS));
    let mut y = b.numbers::<E>(n);
    let (mut mean, mut inv) = (b.numbers::<E::Acc>(ROWS), b.numbers::<E::Acc>(ROWS));
    let (mut dw, mut db) = (b.numbers::<E::Acc>(COLS), b.numbers::<E::Acc>(COLS));
    let shape = format!("{ROWS} x {COLS}");
    let t = E::DTYPE;
    b.time(
        "rms_norm",
        &shape,
        t,
        cost::rms_norm::<E>(ROWS, COLS),
        |p| {
            norm::rms_norm(p, &x, &w, 0.0, 1e-5, &mut y, &mut inv);
        },
    );
    let work = cost::rms_norm_backward::<E>(ROWS, COLS);
    b.time("rms_norm_backward", &shape, t, work, |p| {
        norm::rms_norm_backward(p, &x, &w, 0.0, &inv, &dy, &mut y, false, &mut dw);
    });
    let work = cost::layer_norm::<E>(ROWS, COLS);
    b.time("layer_norm", &shape, t, work, |p| {
        norm::layer_norm(p, &x, &w, Some(&w[..]), 1e-5, &mut y, &mut mean, &mut inv);
    });
    let work = cost::layer_norm_backward::<E>(ROWS, COLS);
    b.time("layer_norm_backward", &shape, t, work, |p| {
        let db = Some(&mut db[..]);
        norm::layer_norm_backward(p, &x, &w, &mean, &inv, &dy, &mut y, false, &mut dw, db);
    });
}

/// Rotations and embeddings.
pub fn positions_and_tables<E: Element>(b: &mut Bench<'_>) {
    let t = E::DTYPE;
    let (mut x, mut y) = (b.numbers::<E>(ROWS * COLS), b.numbers::<E>(ROWS * COLS));
    let (head_dim, positions) = (64, (0..ROWS as u32).collect::<Vec<_>>());
    let angles = (0..ROWS * head_dim / 2).map(|i| i as f32 * 0.01);
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|a| (a.cos(), a.sin())).unzip();
    let layout = Rope {
        stride: COLS,
        heads: COLS / head_dim,
        head_dim,
        rotary: head_dim,
        interleaved: false,
        inverse: false,
    };
    let shape = format!("{ROWS} x {COLS}");
    b.time("rope", &shape, t, cost::rope::<E>(ROWS, COLS), |p| {
        rope(p, &mut x, &layout, &cos, &sin, &positions);
    });
    let ids: Vec<u32> = (0..ROWS).map(|i| (i * 7919 % VOCABULARY) as u32).collect();
    let shape = format!("{ROWS} of {VOCABULARY} x {COLS}");
    if !["gather", "scatter_add"]
        .map(|name| b.wants(name, &shape))
        .contains(&true)
    {
        return;
    }
    let table = b.numbers::<E>(VOCABULARY * COLS);
    b.time("gather", &shape, t, cost::gather::<E>(ROWS, COLS), |p| {
        embedding::gather(p, &table, &ids, 1.0, &mut y);
    });
    let mut dtable = b.numbers::<E::Acc>(VOCABULARY * COLS);
    let work = cost::scatter_add::<E>(ROWS, COLS);
    b.time("scatter_add", &shape, t, work, |p| {
        embedding::scatter_add(p, &x, &ids, 1.0, &mut dtable);
    });
}

/// Softmax and cross-entropy.
pub fn losses<E: Element>(b: &mut Bench<'_>) {
    const CHUNK: usize = 256;
    let t = E::DTYPE;
    let (x, dy) = (b.numbers::<E>(ROWS * COLS), b.numbers::<E>(ROWS * COLS));
    let mut y = b.numbers::<E>(ROWS * COLS);
    let shape = format!("{ROWS} x {COLS}");
    b.time("softmax", &shape, t, cost::softmax::<E>(ROWS, COLS), |p| {
        softmax::softmax(p, &x, COLS, &mut y);
    });
    let work = cost::softmax_backward::<E>(ROWS, COLS);
    b.time("softmax_backward", &shape, t, work, |p| {
        softmax::softmax_backward(p, &x, &dy, COLS, &mut y);
    });
    let mut logits = b.numbers::<E::Acc>(CHUNK * VOCABULARY);
    let mut dlogits = b.numbers::<E>(CHUNK * VOCABULARY);
    let (targets, mut loss) = (vec![5; CHUNK], b.numbers::<E::Acc>(CHUNK));
    let shape = format!("{CHUNK} x {VOCABULARY}");
    let work = cost::cross_entropy_rows::<E>(CHUNK, VOCABULARY);
    b.time("cross_entropy_rows", &shape, t, work, |p| {
        let gradient = Some((&mut dlogits[..], 1.0));
        cross_entropy_rows(
            p,
            &mut logits,
            VOCABULARY,
            None,
            &targets,
            &mut loss,
            gradient,
        );
    });
}

/// Activations, casts and sums.
pub fn elements<E: Element>(b: &mut Bench<'_>) {
    let n = INNER;
    let t = E::DTYPE;
    let (x, u, dy) = (b.numbers::<E>(n), b.numbers::<E>(n), b.numbers::<E>(n));
    let (mut y, mut z, mut wide) = (b.numbers::<E>(n), b.numbers::<E>(n), b.numbers::<f32>(n));
    let shape = format!("{n}");
    b.time("gelu", &shape, t, cost::activation::<E>(n), |p| {
        activation::activation(p, Activation::Gelu, &x, &mut y);
    });
    let work = cost::activation_backward::<E>(n);
    b.time("gelu_backward", &shape, t, work, |p| {
        activation::activation_backward(p, Activation::Gelu, &x, &dy, &mut y);
    });
    b.time("swiglu", &shape, t, cost::gated::<E>(n), |p| {
        activation::gated(p, Activation::Silu, &x, &u, &mut y);
    });
    let work = cost::gated_backward::<E>(n);
    b.time("swiglu_backward", &shape, t, work, |p| {
        activation::gated_backward(p, Activation::Silu, &x, &u, &dy, &mut y, &mut z);
    });
    b.time("cast to f32", &shape, t, cost::cast::<E, f32>(n), |p| {
        cast::cast(p, &x, &mut wide[..]);
    });
    b.time("cast from f32", &shape, t, cost::cast::<f32, E>(n), |p| {
        cast::cast(p, &wide[..], &mut y);
    });
    b.time("sum_squares", &shape, t, cost::sum_squares::<E>(n), |p| {
        black_box(reduce::sum_squares(p, &x));
    });
}

/// AdamW over the storages that training uses.
pub fn optimizers(b: &mut Bench<'_>, only: Option<DType>) {
    let n = PARAMETERS;
    let shape = format!("{n}");
    let rule = Rule::Adam(Adam {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        decoupled: true,
        bias_correction: true,
        step: 10,
        grad_scale: 0.5,
    });
    if ![
        "adamw",
        "adamw_split",
        "adamw_split_bf16_grad",
        "adamw_bf16_moments",
        "adamw_8bit",
    ]
    .map(|name| b.wants(name, &shape))
    .contains(&true)
    {
        return;
    }
    let (g, half_g) = (b.numbers::<f32>(n), b.numbers::<bf16>(n));
    let (mut m, mut v) = (b.numbers::<f32>(n), b.numbers::<f32>(n));
    v.iter_mut().for_each(|v| *v = v.abs());
    if only != Some(DType::Bf16) {
        let mut w = b.numbers::<f32>(n);
        let work = cost::optimizer(n, 4, 4, &[4, 4]);
        b.time("adamw", &shape, DType::F32, work, |p| {
            let moments = &mut [Moment::F32(&mut m), Moment::F32(&mut v)];
            optim::step(p, &rule, Values::F32(&mut w), Grad::F32(&g), moments);
        });
    }
    if only != Some(DType::F32) {
        let (mut high, mut low) = (b.numbers::<bf16>(n), vec![0i16; n]);
        let mut step = |p: &Pool, grad: Grad<'_>, moments: &mut [Moment<'_>]| {
            let (high, low) = (&mut high[..], &mut low[..]);
            optim::step(p, &rule, Values::Split { high, low }, grad, moments);
        };
        let work = cost::optimizer(n, 4, 4, &[4, 4]);
        b.time("adamw_split", &shape, DType::Bf16, work, |p| {
            let moments = &mut [Moment::F32(&mut m), Moment::F32(&mut v)];
            step(p, Grad::F32(&g), moments);
        });
        let work = cost::optimizer(n, 4, 2, &[4, 4]);
        b.time("adamw_split_bf16_grad", &shape, DType::Bf16, work, |p| {
            let moments = &mut [Moment::F32(&mut m), Moment::F32(&mut v)];
            step(p, Grad::Bf16(&half_g), moments);
        });
        small_moments(b, &shape, &mut step);
    }
}

/// AdamW with moments of two bytes and of one.
fn small_moments(
    b: &mut Bench<'_>,
    shape: &str,
    step: &mut dyn FnMut(&Pool, Grad<'_>, &mut [Moment<'_>]),
) {
    let n = PARAMETERS;
    let g = b.numbers::<f32>(n);
    let (mut m, mut v) = (vec![bf16::ZERO; n], vec![bf16::ZERO; n]);
    let work = cost::optimizer(n, 4, 4, &[2, 2]);
    b.time("adamw_bf16_moments", shape, DType::Bf16, work, |p| {
        let moments = &mut [Moment::Bf16(&mut m), Moment::Bf16(&mut v)];
        step(p, Grad::F32(&g), moments);
    });
    let blocks = n.div_ceil(optim::BLOCK);
    let (mut codes, mut scales) = (
        [vec![0; n], vec![0; n]],
        [vec![0.0; blocks], vec![0.0; blocks]],
    );
    let work = cost::optimizer(n, 4, 4, &[1, 1]);
    b.time("adamw_8bit", shape, DType::Bf16, work, |p| {
        let mut states = codes.iter_mut().zip(&mut scales);
        let mut moment = || {
            let (codes, scales) = states.next().expect("two moments");
            Moment::Q8 { codes, scales }
        };
        step(p, Grad::F32(&g), &mut [moment(), moment()]);
    });
}
