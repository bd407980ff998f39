//! The backward references against central differences of the forward references, in double precision.

use windlass_kernels::activation::Activation;
use windlass_kernels::cross_entropy::IGNORED;
use windlass_kernels::reference;
use windlass_kernels::rope::Rope;

/// A function of several buffers: its outputs.
type Forward<'a> = &'a dyn Fn(&[Vec<f64>]) -> Vec<f64>;
/// Inputs and the outputs' gradient: the inputs' gradients.
type Backward<'a> = &'a dyn Fn(&[Vec<f64>], &[f64]) -> Vec<Vec<f64>>;

/// Numbers in ±1.5 without a pattern.
fn numbers(n: usize, seed: usize) -> Vec<f64> {
    (0..n)
        .map(|i| ((i * 7 + seed * 13 + 3) as f64 * 1.234).sin() * 1.5)
        .collect()
}

fn check(name: &str, lengths: &[usize], forward: Forward<'_>, backward: Backward<'_>) {
    const STEP: f64 = 1e-5;
    let inputs: Vec<Vec<f64>> = lengths
        .iter()
        .enumerate()
        .map(|(i, &n)| numbers(n, i))
        .collect();
    let dy = numbers(forward(&inputs).len(), 9);
    let gradients = backward(&inputs, &dy);
    for (which, gradient) in gradients.iter().enumerate() {
        assert_eq!(gradient.len(), lengths[which], "{name}: gradient {which}");
        for (i, &got) in gradient.iter().enumerate() {
            let at = |step: f64| {
                let mut moved = inputs.clone();
                moved[which][i] += step;
                forward(&moved)
                    .iter()
                    .zip(&dy)
                    .map(|(y, dy)| y * dy)
                    .sum::<f64>()
            };
            let want = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let close = (got - want).abs() < 1e-8 * (1.0 + want.abs());
            assert!(
                close,
                "{name}, gradient {which}, element {i}: {got}, difference {want}"
            );
        }
    }
}

/// `initial + change`, for gradients that are added to.
fn added(n: usize, add: impl FnOnce(&mut [f64])) -> Vec<f64> {
    let mut sum = vec![0.5; n];
    add(&mut sum);
    sum.into_iter().map(|x| x - 0.5).collect()
}

#[test]
fn norms() {
    const EPS: f32 = 1e-3;
    for (offset, accumulate) in [(0.0, false), (1.0, true)] {
        check(
            "rms_norm",
            &[3 * 5, 5],
            &|i| {
                let (mut y, mut inv) = (vec![0.0; 15], vec![0.0; 3]);
                reference::rms_norm(&i[0], &i[1], offset, EPS, &mut y, &mut inv);
                y
            },
            &|i, dy| {
                let (mut y, mut inv) = (vec![0.0; 15], vec![0.0; 3]);
                reference::rms_norm(&i[0], &i[1], offset, EPS, &mut y, &mut inv);
                let start = if accumulate { 0.5 } else { 0.0 };
                let mut dx = vec![0.5; 15];
                reference::rms_norm_dx(&i[0], &i[1], offset, &inv, dy, &mut dx, accumulate);
                let dw = added(5, |dw| {
                    // In two stripes, as tasks do.
                    reference::rms_norm_dw(&i[0], 5, 0, &inv, dy, &mut dw[..2]);
                    reference::rms_norm_dw(&i[0], 5, 2, &inv, dy, &mut dw[2..]);
                });
                vec![dx.into_iter().map(|x| x - start).collect(), dw]
            },
        );
    }
    check(
        "layer_norm",
        &[3 * 5, 5, 5],
        &|i| {
            let (mut y, mut mean, mut inv) = (vec![0.0; 15], vec![0.0; 3], vec![0.0; 3]);
            reference::layer_norm(&i[0], &i[1], Some(&i[2]), EPS, &mut y, &mut mean, &mut inv);
            y
        },
        &|i, dy| {
            let (mut y, mut mean, mut inv) = (vec![0.0; 15], vec![0.0; 3], vec![0.0; 3]);
            reference::layer_norm(&i[0], &i[1], Some(&i[2]), EPS, &mut y, &mut mean, &mut inv);
            let mut dx = vec![0.5; 15];
            reference::layer_norm_dx(&i[0], &i[1], &mean, &inv, dy, &mut dx, true);
            let mut db = vec![0.0; 5];
            let dw = added(5, |dw| {
                reference::layer_norm_dw(
                    &i[0],
                    5,
                    0,
                    &mean,
                    &inv,
                    dy,
                    &mut dw[..3],
                    Some(&mut db[..3]),
                );
                reference::layer_norm_dw(
                    &i[0],
                    5,
                    3,
                    &mean,
                    &inv,
                    dy,
                    &mut dw[3..],
                    Some(&mut db[3..]),
                );
            });
            vec![dx.into_iter().map(|x| x - 0.5).collect(), dw, db]
        },
    );
}

#[test]
fn activations() {
    for kind in [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
    ] {
        check(
            &format!("{kind:?}"),
            &[40],
            &|i| {
                let mut y = vec![0.0; 40];
                reference::activation(kind, &i[0], &mut y);
                y
            },
            &|i, dy| {
                let mut dx = vec![0.0; 40];
                reference::activation_backward(kind, &i[0], dy, &mut dx);
                vec![dx]
            },
        );
        check(
            &format!("gated {kind:?}"),
            &[40, 40],
            &|i| {
                let mut y = vec![0.0; 40];
                reference::gated(kind, &i[0], &i[1], &mut y);
                y
            },
            &|i, dy| {
                let (mut dgate, mut dup) = (vec![0.0; 40], vec![0.0; 40]);
                reference::gated_backward(kind, &i[0], &i[1], dy, &mut dgate, &mut dup);
                vec![dgate, dup]
            },
        );
    }
}

#[test]
fn softmaxes() {
    type Pair = (
        fn(&[f64], usize, &mut [f64]),
        fn(&[f64], &[f64], usize, &mut [f64]),
    );
    let pairs: [(&str, Pair); 2] = [
        ("softmax", (reference::softmax, reference::softmax_backward)),
        (
            "log_softmax",
            (reference::log_softmax, reference::log_softmax_backward),
        ),
    ];
    for (name, (forward, backward)) in pairs {
        let run = |x: &[f64]| {
            let mut y = vec![0.0; 14];
            forward(x, 7, &mut y);
            y
        };
        check(name, &[14], &|i| run(&i[0]), &|i, dy| {
            let mut dx = vec![0.0; 14];
            backward(&run(&i[0]), dy, 7, &mut dx);
            vec![dx]
        });
    }
}

#[test]
fn cross_entropy() {
    let targets = [2, IGNORED, 0, 6];
    for softcap in [None, Some(2.0)] {
        // The kernel's gradient is that of the scaled sum of losses, so each row is weighed alike.
        check(
            "cross_entropy",
            &[28],
            &|i| {
                let (mut z, mut loss) = (i[0].clone(), [0.0; 4]);
                reference::cross_entropy_rows::<f64>(&mut z, 7, softcap, &targets, &mut loss, None);
                vec![loss.iter().sum()]
            },
            &|i, dy| {
                let (mut z, mut loss, mut d) = (i[0].clone(), [0.0; 4], vec![7.0; 28]);
                let gradient = Some((&mut d[..], 0.25));
                reference::cross_entropy_rows(&mut z, 7, softcap, &targets, &mut loss, gradient);
                vec![d.iter().map(|d| d * 4.0 * dy[0]).collect()]
            },
        );
    }
}

#[test]
fn rope_and_embedding() {
    let cos: Vec<f32> = (0..30).map(|i| (i as f32 * 0.3).cos()).collect();
    let sin: Vec<f32> = (0..30).map(|i| (i as f32 * 0.3).sin()).collect();
    for interleaved in [false, true] {
        let shape = Rope {
            stride: 17,
            heads: 2,
            head_dim: 8,
            rotary: 6,
            interleaved,
            inverse: false,
        };
        let rotate = |x: &[f64], inverse: bool| {
            let mut x = x.to_vec();
            reference::rope(&mut x, &Rope { inverse, ..shape }, &cos, &sin, &[3, 0, 9]);
            x
        };
        check(
            "rope",
            &[2 * 17 + 16],
            &|i| rotate(&i[0], false),
            &|_, dy| vec![rotate(dy, true)],
        );
    }
    let ids = [2, 0, 2, 1];
    check(
        "embedding",
        &[3 * 4],
        &|i| {
            let mut y = vec![0.0; 16];
            reference::gather(&i[0], 4, &ids, 1.5, &mut y);
            y
        },
        &|_, dy| vec![added(12, |d| reference::scatter_add(dy, 4, &ids, 1.5, d))],
    );
}
