//! Muon: momentum whose direction is made orthogonal, for weights that are matrices.
//!
//! Orthogonalization needs the whole matrix, the rest does not: [`muon_direction`] and [`muon_apply`] work on any part,
//! [`orthogonalize`] on the whole between them.

use super::rule::{Factors, Rule, Sgd};
use super::state::{Grad, Moment, Storage, Values};
use super::{run, step};
use crate::gemm::{Epilogue, Layout, Mat, gemm};
use crate::pool::Pool;
use crate::tasks::assert_len;
use crate::{Float, elementwise, reduce};

/// Muon, for a matrix of `rows` (outputs) and `cols` (inputs).
///
/// With `g' = grad_scale g`: `m ← μ m + (1 - μ) g'`, `d = (1 - μ) g' + μ m` (Nesterov) or `m`, `o = orthogonalize(d)`,
/// `p ← (1 - lr λ) p - lr sqrt(max(1, rows / cols)) o`.
///
/// # Source
/// Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    /// Learning rate of this step.
    pub lr: f64,
    /// μ.
    pub momentum: f64,
    /// Look ahead along the momentum.
    pub nesterov: bool,
    /// λ, times the learning rate.
    pub weight_decay: f64,
    /// Multiplies gradients first. Scales away in the first step, not in the momentum.
    pub grad_scale: f64,
}

/// [`Muon`] as the arithmetic needs it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MuonFactors<A> {
    pub grad_scale: A,
    pub one_minus_momentum: A,
    /// How far from the gradient to the momentum the direction lies.
    pub ahead: A,
}

/// Steps of the iteration of [`orthogonalize`].
pub const NEWTON_SCHULZ_STEPS: usize = 5;
/// `a`, `b`, `c` of the iteration: chosen for the steepest start at zero; singular values end near 1, not at it.
const QUINTIC: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// The least norm divided by.
const NORM_EPS: f64 = 1e-7;

impl Muon {
    /// Whether the momentum can be stored this way.
    ///
    /// # Errors
    /// A message that says what is possible.
    pub fn supports(storage: Storage) -> Result<(), String> {
        match storage {
            Storage::Q8 => {
                Err("Muon has no 8-bit moments: only AdamW has; use f32 or bf16 moments".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn factors<A: Float>(&self) -> Factors<A> {
        Factors::Muon(MuonFactors {
            grad_scale: A::of(self.grad_scale),
            one_minus_momentum: A::of(1.0 - self.momentum),
            ahead: A::of(if self.nesterov { self.momentum } else { 1.0 }),
        })
    }
}

/// Updates the momentum and writes the direction before orthogonalization.
///
/// # Panics
/// When the lengths differ or the momentum's storage is not supported.
#[track_caller]
pub fn muon_direction(
    pool: &Pool,
    rule: &Muon,
    grad: Grad<'_>,
    moment: &mut Moment<'_>,
    direction: &mut [f32],
) {
    if let Err(message) = Muon::supports(moment.storage()) {
        panic!("{message}");
    }
    let moments = std::slice::from_mut(moment);
    let factors = (rule.factors(), rule.factors());
    run(pool, factors, Values::F32(direction), Some(grad), moments);
}

/// Updates values, which are any part of a matrix of `rows` and `cols`, by their part of the orthogonal direction.
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn muon_apply(
    pool: &Pool,
    rule: &Muon,
    (rows, cols): (usize, usize),
    values: Values<'_>,
    direction: &[f32],
) {
    let scale = (rows as f64 / cols as f64).max(1.0).sqrt();
    // `(1 - lr λ) p - lr scale d`, in other words.
    let sgd = Sgd {
        lr: rule.lr * scale,
        momentum: 0.0,
        dampening: 0.0,
        nesterov: false,
        weight_decay: rule.weight_decay / scale,
        step: 1,
        grad_scale: 1.0,
    };
    step(pool, &Rule::Sgd(sgd), values, Grad::F32(direction), &mut []);
}

/// Elements of the workspace of [`orthogonalize`].
pub fn orthogonalize_workspace(rows: usize, cols: usize) -> usize {
    rows * cols + 2 * rows.min(cols) * rows.min(cols)
}

/// Replaces a row-major matrix by one near its closest (semi-)orthogonal matrix: its singular values become roughly 1
/// (0.7 to 1.2), its singular vectors stay.
///
/// `X ← x / ‖x‖`, then five times `X ← a X + (b A + c A²) X` with `A = X Xᵀ`, from the right for tall matrices.
///
/// # Panics
/// When `x` or `workspace` has another length than the shape asks for.
#[track_caller]
pub fn orthogonalize(
    pool: &Pool,
    (rows, cols): (usize, usize),
    x: &mut [f32],
    workspace: &mut [f32],
) {
    assert_len("x", x.len(), rows * cols);
    let needed = orthogonalize_workspace(rows, cols);
    assert_len("workspace", workspace.len(), needed);
    let side = rows.min(cols);
    if side == 0 {
        return;
    }
    let norm = reduce::sum_squares(pool, x).sqrt();
    elementwise::scale_in_place(pool, (1.0 / norm.max(NORM_EPS)) as f32, x);
    let [a, b, c] = QUINTIC;
    let (next, squares) = workspace.split_at_mut(rows * cols);
    let (gram, polynomial) = squares.split_at_mut(side * side);
    for _ in 0..NEWTON_SCHULZ_STEPS {
        if rows > cols {
            product(pool, Layout::Tn, [side, side, rows], x, x, gram, false);
        } else {
            product(pool, Layout::Nt, [side, side, cols], x, x, gram, false);
        }
        product(pool, Layout::Nn, [side; 3], gram, gram, polynomial, false);
        elementwise::scale_in_place(pool, c, polynomial);
        elementwise::axpy(pool, b, gram, polynomial);
        elementwise::scale(pool, a, x, next);
        let shape = [rows, cols, side];
        if rows > cols {
            product(pool, Layout::Nn, shape, x, polynomial, next, true);
        } else {
            product(pool, Layout::Nn, shape, polynomial, x, next, true);
        }
        elementwise::scale(pool, 1.0, next, x);
    }
}

/// `C = op(A) op(B)`, added to what C holds or not; rows lie one after another.
fn product(
    pool: &Pool,
    layout: Layout,
    [m, n, k]: [usize; 3],
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
    accumulate: bool,
) {
    let (a_stride, b_stride) = match layout {
        Layout::Nt => (k, k),
        Layout::Nn => (k, n),
        Layout::Tn => (m, n),
    };
    let (a, b) = (
        Mat {
            data: a,
            stride: a_stride,
        },
        Mat {
            data: b,
            stride: b_stride,
        },
    );
    let epilogue = Epilogue {
        accumulate,
        ..Epilogue::default()
    };
    gemm(pool, layout, m, n, k, a, b, c, n, epilogue);
}

/// A whole step on a whole matrix: [`muon_direction`], [`orthogonalize`], [`muon_apply`]. `direction` has the values'
/// length, `workspace` that of [`orthogonalize_workspace`].
///
/// # Panics
/// When a length does not match, or the momentum's storage is not supported.
#[track_caller]
pub fn muon(
    pool: &Pool,
    rule: &Muon,
    shape: (usize, usize),
    values: Values<'_>,
    grad: Grad<'_>,
    moment: &mut Moment<'_>,
    direction: &mut [f32],
    workspace: &mut [f32],
) {
    muon_direction(pool, rule, grad, moment, direction);
    orthogonalize(pool, shape, direction, workspace);
    muon_apply(pool, rule, shape, values, direction);
}
