//! Optimizer updates: every level against the scalar reference and published results, every storage against `f32` bit for
//! bit; the same bits on 1, 2 and 3 threads.

use std::sync::LazyLock;

use half::{bf16, f16};
use windlass_kernels::Element;
use windlass_kernels::dispatch::Level;
use windlass_kernels::optim::{
    self, Adagrad, Adam, BLOCK, Grad, Lamb, LambSums, Lion, Moment, Muon, Rule, Sgd, Storage,
    Values,
};
use windlass_kernels::pool::Pool;
use windlass_kernels::reference;
use windlass_kernels::split::{join, split};

/// Every supported level on 1, 2 and 3 threads, the scalar one first.
static POOLS: LazyLock<Vec<Vec<Pool>>> = LazyLock::new(|| {
    let pools = |&level| {
        (1..=3)
            .map(|threads| Pool::with_level(threads, level))
            .collect()
    };
    Level::supported().iter().map(pools).collect()
});

const ADAMW: Adam = Adam {
    lr: 0.01,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
    decoupled: true,
    bias_correction: true,
    step: 1,
    grad_scale: 0.5,
};
const SGD: Sgd = Sgd {
    lr: 0.1,
    momentum: 0.9,
    dampening: 0.25,
    nesterov: false,
    weight_decay: 0.01,
    step: 1,
    grad_scale: 2.0,
};
const LION: Lion = Lion {
    lr: 0.01,
    beta1: 0.9,
    beta2: 0.99,
    weight_decay: 0.1,
    grad_scale: 1.0,
};
const LAMB: Lamb = Lamb {
    lr: 0.01,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-6,
    weight_decay: 0.1,
    bias_correction: true,
    min_coeff: 0.01,
    max_coeff: 10.0,
    step: 1,
    grad_scale: 0.5,
};
const MUON: Muon = Muon {
    lr: 0.02,
    momentum: 0.95,
    nesterov: true,
    weight_decay: 0.1,
    grad_scale: 1.0,
};

/// The rules that differ in what they compute, at a given step.
fn rules(step: u64) -> Vec<Rule> {
    let nesterov = Sgd {
        step,
        nesterov: true,
        dampening: 0.0,
        ..SGD
    };
    vec![
        Rule::Adam(Adam { step, ..ADAMW }),
        Rule::Adam(Adam {
            step,
            decoupled: false,
            ..ADAMW
        }),
        Rule::Adam(Adam {
            step,
            bias_correction: false,
            ..ADAMW
        }),
        Rule::Adagrad(Adagrad {
            lr: 0.01,
            eps: 1e-10,
            weight_decay: 0.1,
            grad_scale: 0.5,
        }),
        Rule::Lion(LION),
        Rule::Sgd(Sgd { step, ..SGD }),
        Rule::Sgd(nesterov),
        Rule::Sgd(Sgd {
            momentum: 0.0,
            ..SGD
        }),
    ]
}

/// Numbers of many magnitudes, zeros and denormals among them, that depend on nothing but the seed.
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed * 77 + 5;
    let mut bits = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state ^ (state >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16
    };
    let mut one = || {
        let plain = (bits() % 6001) as f32 / 1000.0 - 3.0;
        match bits() % 40 {
            0 => 0.0,
            1 => plain * 1e-39,
            2 => plain * 1e-20,
            3 => plain * 1e-5,
            4 => plain * 1e4,
            _ => plain,
        }
    };
    (0..n).map(|_| one()).collect()
}

/// Every length up to three vectors, and lengths around blocks, tiles and tasks.
fn lengths() -> Vec<usize> {
    let long = [
        63, 64, 65, 100, 255, 256, 257, 1023, 1024, 1025, 1300, 40_000,
    ];
    (0..=48).chain(long).collect()
}

/// One moment in some storage.
#[derive(Clone, Debug, PartialEq)]
enum Held {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    Q8(Vec<u8>, Vec<f32>),
}

impl Held {
    /// Rounds a moment, the `index`th of its rule.
    fn new(storage: Storage, index: usize, x: &[f32]) -> Held {
        let mut held = match storage {
            Storage::F32 => Held::F32(vec![0.0; x.len()]),
            Storage::Bf16 => Held::Bf16(vec![bf16::ZERO; x.len()]),
            Storage::Q8 => Held::Q8(vec![0; x.len()], vec![0.0; x.len().div_ceil(BLOCK)]),
            Storage::F64 => unreachable!("not tested here"),
        };
        held.lend().write(index, 0, x);
        held
    }

    fn lend(&mut self) -> Moment<'_> {
        match self {
            Held::F32(m) => Moment::F32(m),
            Held::Bf16(m) => Moment::Bf16(m),
            Held::Q8(codes, scales) => Moment::Q8 { codes, scales },
        }
    }

    fn read(&mut self, index: usize) -> Vec<f32> {
        let moment = self.lend();
        moment.read(index, 0..moment.len())
    }
}

/// What a step starts from; second moments are not negative.
fn state(n: usize) -> (Vec<f32>, Vec<f32>, [Vec<f32>; 2]) {
    let v = numbers(4, n).into_iter().map(f32::abs).collect();
    (numbers(1, n), numbers(2, n), [numbers(3, n), v])
}

/// The moment that a rule starts from; Adagrad's only one is a sum of squares.
fn start_of<'a>(rule: &Rule, states: &'a [Vec<f32>; 2], index: usize) -> &'a [f32] {
    match rule {
        Rule::Adagrad(_) => &states[1],
        _ => &states[index],
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Values within rounding of each other; moments may be short.
#[track_caller]
fn close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        // Relative to numbers of about one: differences of those leave what rounding left in them.
        let limit = 4e-6 * w.abs().max(1.0);
        assert!(
            (g - w).abs() <= limit,
            "{what}, element {i}: {g:e}, reference {w:e}"
        );
    }
}

#[test]
fn every_level_agrees_with_the_reference() {
    for n in lengths() {
        let (p, g, states) = state(n);
        for rule in rules(3) {
            let count = rule.moments();
            let start = || -> Vec<Held> {
                let moment = |i: usize| Held::new(Storage::F32, i, start_of(&rule, &states, i));
                (0..count).map(moment).collect()
            };
            let (mut want_p, mut want) = (p.clone(), start());
            let mut lent: Vec<_> = want.iter_mut().map(Held::lend).collect();
            reference::optimizer_step(&rule, Values::F32(&mut want_p), Grad::F32(&g), &mut lent);
            for pools in POOLS.iter() {
                let name = format!("{rule:?} at {} of {n}", pools[0].level());
                let mut first: Option<(Vec<f32>, Vec<Held>)> = None;
                for pool in pools {
                    let (mut p, mut held) = (p.clone(), start());
                    let mut lent: Vec<_> = held.iter_mut().map(Held::lend).collect();
                    optim::step(pool, &rule, Values::F32(&mut p), Grad::F32(&g), &mut lent);
                    // Among many there are quotients of differences, of which no limit can be said.
                    if n < 2000 {
                        close(&name, &p, &want_p);
                        for i in 0..count {
                            close(&name, &held[i].read(i), &want[i].read(i));
                        }
                    }
                    let (p1, held1) = first.get_or_insert((p.clone(), held.clone()));
                    let same = bits(&p) == bits(p1) && held == *held1;
                    assert!(same, "{name}: {} threads", pool.threads());
                }
            }
        }
    }
}

/// What a step leaves, and how the values were kept.
struct Left {
    masters: Vec<f32>,
    weights: Vec<f32>,
    moments: Vec<Held>,
}

/// A step on values kept in one of the three ways, with a gradient in `f32` or `bf16`, taken or not.
fn stored(
    pool: &Pool,
    rule: &Rule,
    values: &str,
    grad: &str,
    (p, g): (&[f32], &[f32]),
    mut moments: Vec<Held>,
) -> Left {
    let n = p.len();
    let (mut plain, mut half) = (p.to_vec(), vec![f16::ZERO; n]);
    let (mut high, mut low): (Vec<bf16>, Vec<i16>) = p.iter().map(|&p| split(p)).unzip();
    let (mut g32, mut g16) = (
        g.to_vec(),
        g.iter().map(|&g| bf16::store(g)).collect::<Vec<_>>(),
    );
    let mut h16: Vec<f16> = g.iter().map(|&g| f16::from_f32(g)).collect();
    let to = match values {
        "f32" => Values::F32(&mut plain),
        "split" => Values::Split {
            high: &mut high,
            low: &mut low,
        },
        _ => Values::Half {
            low: &mut half,
            master: &mut plain,
        },
    };
    let from = match grad {
        "f32" => Grad::F32(&g32),
        "bf16" => Grad::Bf16(&g16),
        "f16" => Grad::F16(&h16),
        "take f32" => Grad::TakeF32(&mut g32),
        "take f16" => Grad::TakeF16(&mut h16),
        _ => Grad::TakeBf16(&mut g16),
    };
    let mut lent: Vec<_> = moments.iter_mut().map(Held::lend).collect();
    optim::step(pool, rule, to, from, &mut lent);
    match grad {
        "take f32" => assert!(g32.iter().all(|g| g.to_bits() == 0)),
        "take f16" => assert!(h16.iter().all(|g| g.to_bits() == 0)),
        "take bf16" => assert!(g16.iter().all(|g| g.to_bits() == 0)),
        _ => {}
    }
    let (masters, weights) = match values {
        "f32" => (plain.clone(), plain),
        "split" => (
            high.iter().zip(&low).map(|(&h, &l)| join(h, l)).collect(),
            high.iter().map(|h| h.to_f32()).collect(),
        ),
        _ => (plain, half.iter().map(|h| h.to_f32()).collect()),
    };
    Left {
        masters,
        weights,
        moments,
    }
}

/// A step on any storage gives the bits of a step in `f32` that starts from the same numbers, rounded where it is
/// written.
#[test]
fn every_storage_gives_the_bits_of_f32() {
    for pools in POOLS.iter() {
        for n in [0, 1, 7, 16, 31, 255, 256, 300, 1025, 20_001] {
            let (p, g, states) = state(n);
            // Numbers that `bf16` and `f16` hold, so that all kinds of gradients are the same.
            let both = |&g: &f32| f16::from_f32(bf16::store(g.clamp(-4e4, 4e4)).to_f32()).to_f32();
            let g: Vec<f32> = g
                .iter()
                .map(both)
                .map(|g| bf16::store(g).to_f32())
                .collect();
            for rule in rules(3) {
                for storage in [Storage::F32, Storage::Bf16, Storage::Q8] {
                    if rule.supports(storage).is_err() {
                        continue;
                    }
                    let mut start: Vec<Held> = (0..rule.moments())
                        .map(|i| Held::new(storage, i, start_of(&rule, &states, i)))
                        .collect();
                    let mut lent: Vec<_> = start.iter_mut().map(Held::lend).collect();
                    let mut wide: Vec<_> = lent
                        .iter()
                        .enumerate()
                        .map(|(i, m)| m.read(i, 0..n))
                        .collect();
                    lent.clear();
                    let (mut want, mut moments) = (p.clone(), Vec::new());
                    moments.extend(wide.iter_mut().map(|m| Moment::F32(m)));
                    let values = Values::F32(&mut want);
                    optim::step(&pools[0], &rule, values, Grad::F32(&g), &mut moments);
                    for values in ["f32", "split", "half"] {
                        for grad in ["f32", "bf16", "f16", "take f32", "take bf16", "take f16"] {
                            let pool = &pools[if n > 20_000 { 2 } else { 0 }];
                            let left = stored(pool, &rule, values, grad, (&p, &g), start.clone());
                            let name = format!("{rule:?}, {values}, {grad}, {storage:?}, {n}");
                            assert_eq!(bits(&left.masters), bits(&want), "{name}");
                            for (i, want) in want.iter().enumerate() {
                                let rounded = match values {
                                    "f32" => *want,
                                    "split" => split(*want).0.to_f32(),
                                    _ => f16::from_f32(*want).to_f32(),
                                };
                                assert_eq!(left.weights[i].to_bits(), rounded.to_bits(), "{name}");
                            }
                            for (i, wide) in wide.iter().enumerate() {
                                assert_eq!(left.moments[i], Held::new(storage, i, wide), "{name}");
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Blocks that hold infinities or NaN stay visible, blocks of zeros and of the smallest numbers stay zero.
#[test]
fn eight_bit_blocks_survive_extremes() {
    let rule = Rule::Adam(ADAMW);
    let n = 3 * BLOCK + 5;
    let mut g = numbers(9, n);
    g[..BLOCK].fill(0.0);
    g[BLOCK + 3] = f32::NAN;
    g[2 * BLOCK + 9] = f32::INFINITY;
    g[3 * BLOCK..].fill(1e-30);
    for pools in POOLS.iter() {
        let mut p = vec![1.0; n];
        let mut moments = [0, 1].map(|i| Held::new(Storage::Q8, i, &vec![0.0; n]));
        for _ in 0..2 {
            let lent = &mut moments.each_mut().map(Held::lend);
            optim::step(&pools[0], &rule, Values::F32(&mut p), Grad::F32(&g), lent);
        }
        for (i, moment) in moments.iter_mut().enumerate() {
            let read = moment.read(i);
            assert!(read[..BLOCK].iter().all(|&m| m == 0.0));
            assert!(read[BLOCK..3 * BLOCK].iter().all(|m| m.is_nan()));
            assert!(read[3 * BLOCK..].iter().all(|m| m.is_finite()));
        }
        assert!(p[..BLOCK].iter().all(|p| (0.9..1.0).contains(p)));
        assert!(
            p[BLOCK..3 * BLOCK].iter().all(|p| p.is_nan()),
            "seen at the second step"
        );
        assert!(p[3 * BLOCK..].iter().all(|p| p.is_finite()));
    }
}

/// Noisy gradients of a quadratic bowl lead 8-bit AdamW where `f32` leads it.
#[test]
fn eight_bit_adamw_descends_like_f32() {
    let (n, pool) = (1000, &POOLS.last().unwrap()[0]);
    let target = numbers(11, n)
        .iter()
        .map(|t| t.clamp(-3.0, 3.0))
        .collect::<Vec<_>>();
    let loss = |storage| {
        let mut p = vec![0.0; n];
        let mut moments = [0, 1].map(|i| Held::new(storage, i, &vec![0.0; n]));
        for step in 1..=300 {
            let noise = numbers(100 + step, n);
            let gradient = |i: usize| p[i] - target[i] + 0.3 * noise[i].clamp(-3.0, 3.0);
            let g: Vec<f32> = (0..n).map(gradient).collect();
            let rule = Rule::Adam(Adam {
                step,
                lr: 0.02,
                weight_decay: 0.0,
                grad_scale: 1.0,
                ..ADAMW
            });
            let lent = &mut moments.each_mut().map(Held::lend);
            optim::step(pool, &rule, Values::F32(&mut p), Grad::F32(&g), lent);
        }
        let error = p.iter().zip(&target).map(|(p, t)| (p - t).powi(2) as f64);
        error.sum::<f64>() / n as f64
    };
    let (plain, small) = (loss(Storage::F32), loss(Storage::Q8));
    assert!(
        small < 1.1 * plain + 1e-3,
        "8-bit loss {small}, f32 {plain}"
    );
}

/// Parameters, gradients, two states and the step.
type Update<'a> = &'a dyn Fn(&mut [f64], &[f64], &mut [f64], &mut [f64], u64);

/// Three steps against PyTorch (Adam, AdamW, Adagrad) or the published algorithm, computed independently in double
/// precision.
#[test]
fn optimizers_give_known_answers() {
    const GRADIENTS: [[f64; 4]; 3] = [
        [0.1, -0.2, 0.0, 3.0],
        [-0.3, 0.25, 1e-3, -2.0],
        [0.05, 0.7, -1e-3, 0.5],
    ];
    let pool = &POOLS[0][0];
    let check = |name: &str, want: [f64; 4], update: Update<'_>| {
        let (mut p, mut m, mut v) = ([1.0, -2.0, 0.5, 0.0], [0.0; 4], [0.0; 4]);
        for (t, g) in GRADIENTS.iter().enumerate() {
            update(&mut p, g, &mut m, &mut v, t as u64 + 1);
        }
        for (p, want) in p.iter().zip(want) {
            assert!((p - want).abs() < 1e-12, "{name}: {p}, known {want}");
        }
    };
    let known = |name: &str, rule: &dyn Fn(u64) -> Rule, want: [f64; 4]| {
        check(name, want, &|p, g, m, v, t| {
            let rule = rule(t);
            let moments = &mut [Moment::F64(m), Moment::F64(v)][..rule.moments()];
            optim::step(pool, &rule, Values::F64(p), Grad::F64(g), moments);
        });
    };
    known(
        "adamw",
        &|step| Rule::Adam(Adam { step, ..ADAMW }),
        [
            0.9946921543720242,
            -1.9918618272132318,
            0.4916057426586841,
            -0.01344931812532919,
        ],
    );
    known(
        "adam",
        &|step| rules(step)[1],
        [
            0.9796488861015133,
            -1.9786462998806342,
            0.47001327754514916,
            -0.013458405119021645,
        ],
    );
    known(
        "adamw without correction",
        &|step| rules(step)[2],
        [
            0.9975097957043287,
            -1.9949887911010131,
            0.49435447104132074,
            -0.0067944345936711914,
        ],
    );
    known(
        "adagrad",
        &|step| rules(step)[3],
        [
            0.9870457600379013,
            -1.992001363464052,
            0.4773452324088828,
            -0.005819952666951925,
        ],
    );
    known(
        "sgd",
        &|step| Rule::Sgd(Sgd { step, ..SGD }),
        [
            1.0189416506875,
            -2.058172676375,
            0.49742431846875,
            -1.1295153375,
        ],
    );
    known(
        "nesterov",
        &|step| rules(step)[6],
        [
            1.066774123960999,
            -2.248100947922,
            0.4958211725705,
            -1.1646693154,
        ],
    );
    known(
        "plain sgd",
        &|step| rules(step)[7],
        [1.026982979, -2.144035958, 0.4985016995, -0.2992006],
    );
    known(
        "lion",
        &|_| Rule::Lion(LION),
        [0.987012989, -2.004015988, 0.4985114995, -0.00999001],
    );
    let lamb = |rule: Lamb, p: &mut [f64], g: &[f64], m: &mut [f64], v: &mut [f64]| {
        let moments = &mut [Moment::F64(m), Moment::F64(v)];
        let sums = optim::lamb_moments(pool, &rule, Values::F64(p), Grad::F64(g), moments);
        optim::lamb_apply(pool, &rule, Values::F64(p), moments, rule.trust(sums));
    };
    check(
        "lamb",
        [
            1.0049106090387747,
            -2.00387205542965,
            0.47919483577712635,
            -0.02476347616652639,
        ],
        &|p, g, m, v, step| lamb(Lamb { step, ..LAMB }, p, g, m, v),
    );
    let clamped = |step| Lamb {
        step,
        bias_correction: false,
        max_coeff: 0.3,
        ..LAMB
    };
    check(
        "lamb, clamped, without correction",
        [
            0.9992511337766566,
            -1.998493743780248,
            0.4983162521685746,
            -0.0020403873025180356,
        ],
        &|p, g, m, v, step| lamb(clamped(step), p, g, m, v),
    );
}

/// LAMB in `f32` on every level: both halves against the scalar level; sums over parts add up; the values of `Split` and
/// `Half` follow to the bit.
#[test]
fn lamb_agrees_on_every_level() {
    let rule = Lamb { step: 3, ..LAMB };
    let whole = |pool: &Pool, n: usize, cut: usize| {
        let (mut p, g, [mut m, mut v]) = state(n);
        let mut sums = LambSums::default();
        for at in [0..cut, cut..n] {
            let moments = &mut [
                Moment::F32(&mut m[at.clone()]),
                Moment::F32(&mut v[at.clone()]),
            ];
            let values = Values::F32(&mut p[at.clone()]);
            sums = sums + optim::lamb_moments(pool, &rule, values, Grad::F32(&g[at]), moments);
        }
        let moments = &mut [Moment::F32(&mut m), Moment::F32(&mut v)];
        let trust = rule.trust(sums);
        let (mut high, mut low): (Vec<bf16>, Vec<i16>) = p.iter().map(|&p| split(p)).unzip();
        let halves = Values::Split {
            high: &mut high,
            low: &mut low,
        };
        optim::lamb_apply(pool, &rule, halves, moments, trust);
        optim::lamb_apply(pool, &rule, Values::F32(&mut p), moments, trust);
        let joined: Vec<f32> = high.iter().zip(&low).map(|(&h, &l)| join(h, l)).collect();
        assert_eq!(bits(&joined), bits(&p));
        (p, m, v, trust)
    };
    for n in lengths() {
        let want = whole(&POOLS[0][0], n, n);
        for pools in POOLS.iter() {
            let first = whole(&pools[0], n, n);
            for (pool, cut) in [(&pools[0], n / 3), (&pools[1], n), (&pools[2], n)] {
                let name = format!("lamb {} of {n}, cut at {cut}", pool.level());
                let got = whole(pool, n, cut);
                close(&name, &got.0, &want.0);
                close(&name, &got.1, &want.1);
                close(&name, &got.2, &want.2);
                assert!((got.3 / want.3 - 1.0).abs() < 1e-6, "{name}");
                assert!(
                    cut != n || bits(&got.0) == bits(&first.0),
                    "{name}: threads"
                );
            }
        }
    }
}

/// Muon's three steps on a wide and a tall matrix against the algorithm in double precision; PyTorch's, which iterates in
/// `bf16`, gives the same to three digits.
#[test]
fn muon_gives_known_answers() {
    const GRADIENTS: [[f32; 6]; 3] = [
        [0.1, -0.2, 0.0, 3.0, 0.5, -0.4],
        [-0.3, 0.25, 1e-3, -2.0, 0.1, 0.7],
        [0.05, 0.7, -1e-3, 0.5, -0.6, 0.2],
    ];
    let cases = [
        (
            (2, 3),
            [
                0.9997249955739984,
                -1.988937944713795,
                0.508077956069313,
                -0.02195812949874084,
                0.24662452499680287,
                -1.0104308276723462,
            ],
        ),
        (
            (3, 2),
            [
                1.0078598445707057,
                -2.0047919572483752,
                0.48219473763476906,
                -0.016816969991225804,
                0.22425304033056168,
                -1.0041172592180185,
            ],
        ),
    ];
    for pool in POOLS.iter().flatten() {
        for (shape, want) in cases {
            let mut p = [1.0, -2.0, 0.5, 0.0, 0.25, -1.0];
            let (mut m, mut d) = ([0.0; 6], [0.0; 6]);
            let mut workspace = vec![0.0; optim::orthogonalize_workspace(shape.0, shape.1)];
            for g in &GRADIENTS {
                let (p, moment) = (Values::F32(&mut p), &mut Moment::F32(&mut m));
                let (d, w) = (&mut d, &mut workspace);
                optim::muon(pool, &MUON, shape, p, Grad::F32(g), moment, d, w);
            }
            for (p, want) in p.iter().zip(want) {
                assert!(
                    (*p as f64 - want).abs() < 2e-6,
                    "{shape:?}: {p}, known {want}"
                );
            }
        }
    }
}

/// The result has singular values near 1: `Xᵀ X` (or `X Xᵀ`) of random matrices has a diagonal near 1 and keeps the
/// singular vectors, so that it commutes with that of the input.
#[test]
fn orthogonalize_flattens_the_spectrum() {
    for (rows, cols) in [(1, 1), (5, 64), (64, 5), (40, 40), (130, 33), (33, 700)] {
        let x: Vec<f32> = numbers(7, rows * cols)
            .iter()
            .map(|x| x.clamp(-3.0, 3.0))
            .collect();
        let side = rows.min(cols);
        let at = |x: &[f32], i: usize, k: usize| {
            x[if rows > cols {
                k * cols + i
            } else {
                i * cols + k
            }] as f64
        };
        let gram = |x: &[f32]| -> Vec<f64> {
            let inner = rows.max(cols);
            let dot = |ij| -> f64 {
                (0..inner)
                    .map(|k| at(x, ij / side, k) * at(x, ij % side, k))
                    .sum()
            };
            (0..side * side).map(dot).collect()
        };
        let times = |a: &[f64], b: &[f64]| -> Vec<f64> {
            let dot = |ij| -> f64 {
                let (i, j) = (ij / side, ij % side);
                (0..side).map(|k| a[i * side + k] * b[k * side + j]).sum()
            };
            (0..side * side).map(dot).collect()
        };
        let before = gram(&x);
        for pools in POOLS.iter() {
            let mut first = None;
            for pool in pools {
                let mut y = x.clone();
                let mut workspace = vec![0.0; optim::orthogonalize_workspace(rows, cols)];
                optim::orthogonalize(pool, (rows, cols), &mut y, &mut workspace);
                let name = format!("{rows} x {cols} at {}", pool.level());
                assert_eq!(first.get_or_insert(bits(&y)), &bits(&y), "{name}: threads");
                let after = gram(&y);
                let (ab, ba) = (times(&before, &after), times(&after, &before));
                let size = ab.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                for (ab, ba) in ab.iter().zip(&ba) {
                    assert!((ab - ba).abs() < 1e-4 * size, "{name}: {ab} and {ba}");
                }
                // Five steps leave singular values of 0.68 to 1.21; the diagonal lies between their squares.
                for i in 0..side {
                    let d = after[i * side + i];
                    assert!((0.4..1.5).contains(&d), "{name}: diagonal {d}");
                }
            }
        }
    }
}

#[test]
fn storages_without_a_kernel_are_refused() {
    let known = [Storage::F32, Storage::Bf16, Storage::Q8];
    for rule in rules(1) {
        for storage in known {
            let adamw = matches!(rule, Rule::Adam(adam) if adam.decoupled);
            match rule.supports(storage) {
                Ok(()) => assert!(storage != Storage::Q8 || adamw),
                Err(message) => {
                    assert!(storage == Storage::Q8 && !adamw);
                    assert!(message.starts_with(rule.name()), "{message}");
                }
            }
        }
    }
    assert!(Lamb::supports(Storage::Q8).unwrap_err().contains("LAMB"));
    assert!(Muon::supports(Storage::Q8).unwrap_err().contains("Muon"));
    assert!(Lamb::supports(Storage::Bf16).is_ok() && Muon::supports(Storage::Bf16).is_ok());
    let step = |rule: Rule, moments: &mut [Moment<'_>]| {
        optim::step(
            &POOLS[0][0],
            &rule,
            Values::F32(&mut [1.0]),
            Grad::F32(&[1.0]),
            moments,
        );
    };
    let panics: [&dyn Fn(); 4] = [
        &|| {
            let (codes, scales) = (&mut [0][..], &mut [0.0][..]);
            step(Rule::Lion(LION), &mut [Moment::Q8 { codes, scales }]);
        },
        &|| step(Rule::Lion(LION), &mut []),
        &|| step(Rule::Lion(LION), &mut [Moment::F32(&mut [])]),
        &|| step(Rule::Lion(LION), &mut [Moment::F64(&mut [0.0])]),
    ];
    for (i, call) in panics.into_iter().enumerate() {
        let call = std::panic::AssertUnwindSafe(call);
        assert!(std::panic::catch_unwind(call).is_err(), "case {i}");
    }
}
