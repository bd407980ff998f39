//! Every op through one harness: gradients against central differences in `f64`, `f32` and `bf16` against `f64`, the same
//! bits whatever the number of threads, nothing recorded in inference; then packed weights and the rules of the tape.

use half::bf16;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use windlass_tensor::{
    Activation, AttentionShape, Category, Cpu, DType, Expert, Grads, IGNORED, Lora, Packed, Rng,
    RopeTable, RouterStats, Segment, Tape, Tensor, Var, Weight, Weights, kernels::packed,
};

/// What an op is given: tensors that gradients flow to, weights, and the forward code.
///
/// The code returns its output and a term of the loss that is not part of it (the load-balancing loss of a router).
type Forward = Box<dyn Fn(&mut Tape, &[Var], &Weights) -> (Var, f64)>;

struct Case {
    name: String,
    inputs: Vec<Vec<usize>>,
    weights: Vec<Vec<usize>>,
    forward: Forward,
    /// Roundings to the storage type that follow each other on the way through the case.
    roundings: f64,
}

impl Case {
    /// More roundings than one.
    fn roundings(mut self, roundings: f64) -> Self {
        self.roundings = roundings;
        self
    }
}

fn case(
    name: impl Into<String>,
    inputs: &[&[usize]],
    weights: &[&[usize]],
    forward: impl Fn(&mut Tape, &[Var], &Weights) -> Var + 'static,
) -> Case {
    let owned = |shapes: &[&[usize]]| shapes.iter().map(|s| s.to_vec()).collect();
    Case {
        name: name.into(),
        inputs: owned(inputs),
        weights: owned(weights),
        forward: Box::new(move |t, x, w| (forward(t, x, w), 0.0)),
        roundings: 1.0,
    }
}

/// Normal numbers that `bf16` holds exactly, so that every storage type gets the same ones.
fn normal(seed: u64, len: usize) -> Vec<f64> {
    let mut rng = Rng::new(seed);
    (0..len)
        .map(|_| bf16::from_f64(rng.normal()).to_f64())
        .collect()
}

fn tensor(cpu: &Cpu, dtype: DType, values: &[f64], shape: &[usize]) -> Tensor {
    let wide = Tensor::from_slice(cpu, values, shape, Category::Activations);
    wide.cast(cpu, dtype, Category::Activations)
}

/// The numbers of a case: inputs, then weights.
#[derive(Clone)]
struct Numbers(Vec<Vec<f64>>);

/// A case with its numbers on a machine, in a storage type.
struct Run<'a> {
    case: &'a Case,
    cpu: &'a Cpu,
    dtype: DType,
    numbers: &'a Numbers,
}

/// Gradients: of each input, then of each weight.
type Gradients = Vec<Vec<f64>>;

impl Run<'_> {
    fn inputs(&self) -> impl Iterator<Item = Tensor> + '_ {
        let shapes = self.case.inputs.iter().zip(&self.numbers.0);
        shapes.map(|(shape, values)| tensor(self.cpu, self.dtype, values, shape))
    }

    fn weights(&self) -> Weights {
        let shapes = self
            .case
            .weights
            .iter()
            .zip(&self.numbers.0[self.case.inputs.len()..]);
        Weights::new(
            shapes
                .map(|(shape, values)| tensor(self.cpu, self.dtype, values, shape).into())
                .collect(),
        )
    }

    /// Output and extra loss of a pass that records nothing.
    fn infer(&self) -> (Vec<f64>, f64) {
        let mut tape = Tape::inference(self.cpu);
        let inputs: Vec<Var> = self.inputs().map(|x| tape.input(x)).collect();
        let (y, extra) = (self.case.forward)(&mut tape, &inputs, &self.weights());
        assert_eq!(y.node(), None, "{}: recorded in inference", self.case.name);
        let dy = y.tensor.deep_clone(self.cpu, Category::Activations);
        let mut grads = Grads::new(self.case.weights.iter().map(|_| true));
        let dx = tape.finish(&y).0.backward(&self.weights(), dy, &mut grads);
        assert!(dx.is_none() && (0..grads.len()).all(|slot| grads.get(slot).is_none()));
        (y.tensor.to_f64(), extra)
    }

    /// Output, gradient of input `wanted` and gradients of the weights, from the gradient `dy` of the output. The other
    /// inputs take gradients too, unless `alone`; weights take none when `frozen`.
    fn train(
        &self,
        dy: &[f64],
        wanted: usize,
        alone: bool,
        frozen: bool,
    ) -> (Vec<f64>, Option<Vec<f64>>, Gradients) {
        let mut tape = Tape::training(self.cpu);
        let tensors: Vec<Tensor> = self.inputs().collect();
        let first = tensors.get(wanted).map(|x| tape.input(x.clone()));
        let inputs = tensors.into_iter().enumerate();
        let inputs: Vec<Var> = inputs
            .map(|(i, x)| match &first {
                Some(first) if i == wanted => first.clone(),
                _ if alone => tape.constant(x),
                _ => tape.input(x),
            })
            .collect();
        drop(first);
        let weights = self.weights();
        let (y, _) = (self.case.forward)(&mut tape, &inputs, &weights);
        drop(inputs);
        let values = y.tensor.to_f64();
        let dy = tensor(self.cpu, y.tensor.dtype(), dy, y.shape());
        let mut grads = Grads::new(self.case.weights.iter().map(|_| !frozen));
        let dx = tape.finish(&y).0.backward(&weights, dy, &mut grads);
        let of = |slot: usize, shape: &Vec<usize>| {
            assert!(
                !frozen || grads.get(slot).is_none(),
                "{}: a frozen weight took a gradient",
                self.case.name
            );
            grads
                .get(slot)
                .map_or(vec![0.0; shape.iter().product()], Tensor::to_f64)
        };
        let dw = self
            .case
            .weights
            .iter()
            .enumerate()
            .map(|(slot, shape)| of(slot, shape))
            .collect();
        (values, dx.map(|dx| dx.to_f64()), dw)
    }

    /// Output and all gradients, each input asked for in turn, with and without the others.
    fn gradients(&self, dy: &[f64]) -> (Vec<f64>, Gradients) {
        let name = &self.case.name;
        let (y, _, dw) = self.train(dy, 0, false, false);
        assert_eq!(
            y,
            self.infer().0,
            "{name} {}: training and inference",
            self.dtype
        );
        let mut all = Vec::new();
        for (i, shape) in self.case.inputs.iter().enumerate() {
            let zeros = vec![0.0; shape.iter().product()];
            let dx = self.train(dy, i, false, false).1.unwrap_or(zeros.clone());
            for (alone, frozen) in [(true, false), (false, true), (true, true)] {
                let again = self.train(dy, i, alone, frozen).1.unwrap_or(zeros.clone());
                assert_eq!(
                    dx, again,
                    "{name} {}: input {i}, alone {alone}, frozen {frozen}",
                    self.dtype
                );
            }
            all.push(dx);
        }
        all.extend(dw);
        (y, all)
    }
}

/// Largest difference relative to the largest element.
fn difference(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-3, |m: f64, v| m.max(v.abs()));
    got.iter()
        .zip(want)
        .fold(0.0, |m: f64, (g, w)| m.max((g - w).abs()))
        / scale
}

/// Central differences of `Σ dy y + extra` with respect to every number.
fn differences(case: &Case, cpu: &Cpu, numbers: &Numbers, dy: &[f64]) -> Gradients {
    const H: f64 = 1e-5;
    let mut moved = numbers.clone();
    let mut loss = |part: usize, i: usize, value: f64| {
        let old = std::mem::replace(&mut moved.0[part][i], value);
        let run = Run {
            case,
            cpu,
            dtype: DType::F64,
            numbers: &moved,
        };
        let mut tape = Tape::inference(cpu);
        let inputs: Vec<Var> = run.inputs().map(|x| tape.input(x)).collect();
        let (y, extra) = (case.forward)(&mut tape, &inputs, &run.weights());
        moved.0[part][i] = old;
        (y.tensor.to_f64(), extra)
    };
    let parts = numbers.0.iter().enumerate();
    parts
        .map(|(part, values)| {
            let slope = |(i, &value): (usize, &f64)| {
                let ((up, more), (down, less)) =
                    (loss(part, i, value + H), loss(part, i, value - H));
                let rise: f64 = up
                    .iter()
                    .zip(&down)
                    .zip(dy)
                    .map(|((u, d), dy)| (u - d) * dy)
                    .sum();
                (rise + more - less) / (2.0 * H)
            };
            values.iter().enumerate().map(slope).collect()
        })
        .collect()
}

fn check(case: &Case) {
    let (one, more) = (Cpu::new(1), [Cpu::new(2), Cpu::new(3)]);
    let shapes = case.inputs.iter().chain(&case.weights).enumerate();
    let numbers = Numbers(
        shapes
            .map(|(i, s)| normal(i as u64 + 1, s.iter().product()))
            .collect(),
    );
    let run = |cpu, dtype| Run {
        case,
        cpu,
        dtype,
        numbers: &numbers,
    };
    let wide = run(&one, DType::F64);
    let dy = normal(99, wide.infer().0.len());
    let (y, gradients) = wide.gradients(&dy);

    // The truncation error of the differences is of the order of H², 1e-10; the scale of a loss is rounded to f32, 6e-8.
    for (part, (got, want)) in gradients
        .iter()
        .zip(differences(case, &one, &numbers, &dy))
        .enumerate()
    {
        let d = difference(got, &want);
        assert!(
            d <= 1e-6,
            "{}: gradient {part} differs by {d:.1e} from central differences",
            case.name
        );
    }
    // f32 sums short rows: some units of 2^-24. bf16 rounds once to 8 bits in the forward pass, more often backward;
    // f16 to 11 bits.
    for (dtype, forward, backward) in [
        (DType::F32, 2e-6, 1e-5),
        (DType::Bf16, 1.0 / 256.0, 1.0 / 32.0),
        (DType::F16, 1.0 / 2048.0, 1.0 / 256.0),
    ] {
        let (narrow_y, narrow) = run(&one, dtype).gradients(&dy);
        let d = difference(&narrow_y, &y);
        assert!(
            d <= forward * case.roundings,
            "{} {dtype}: output differs by {d:.1e}",
            case.name
        );
        for (part, (got, want)) in narrow.iter().zip(&gradients).enumerate() {
            let d = difference(got, want);
            assert!(
                d <= backward * case.roundings,
                "{} {dtype}: gradient {part} differs by {d:.1e}",
                case.name
            );
        }
        for threads in [2, 3] {
            let again = run(&more[threads - 2], dtype).gradients(&dy);
            assert_eq!(
                (&narrow_y, &narrow),
                (&again.0, &again.1),
                "{} {dtype}: {threads} threads",
                case.name
            );
        }
    }
}

fn attention_case(name: &str, shape: AttentionShape, segments: &[Segment]) -> Case {
    let (q, k) = (
        segments.iter().map(|s| s.q_start + s.q_len).max().unwrap(),
        segments
            .iter()
            .map(|s| s.kv_start + s.kv_len)
            .max()
            .unwrap(),
    );
    let (wide, narrow) = (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    );
    let segments: Arc<[Segment]> = segments.into();
    case(
        name,
        &[&[q, wide], &[k, narrow], &[k, narrow]],
        &[],
        move |t, x, _| t.attention(&shape, &segments, &x[0], &x[1], &x[2]),
    )
}

fn segment(q_start: usize, q_len: usize, kv_start: usize, kv_len: usize) -> Segment {
    Segment {
        q_start,
        q_len,
        kv_start,
        kv_len,
    }
}

fn attention_cases() -> Vec<Case> {
    let shape = AttentionShape {
        heads: 2,
        kv_heads: 2,
        head_dim: 8,
        scale: 0.35,
        softcap: None,
        window: None,
    };
    let grouped = AttentionShape {
        heads: 4,
        head_dim: 6,
        ..shape
    };
    vec![
        attention_case(
            "attention, packed",
            shape,
            &[
                Segment::whole(0, 5),
                Segment::whole(5, 1),
                Segment::whole(6, 4),
            ],
        ),
        attention_case("attention, grouped", grouped, &[Segment::whole(0, 7)]),
        attention_case(
            "attention, window",
            AttentionShape {
                window: Some(2),
                ..grouped
            },
            &[Segment::whole(0, 6)],
        ),
        attention_case(
            "attention, soft cap",
            AttentionShape {
                softcap: Some(1.5),
                ..grouped
            },
            &[Segment::whole(0, 6)],
        ),
        attention_case(
            "attention, past, window, soft cap",
            AttentionShape {
                softcap: Some(2.0),
                window: Some(3),
                ..grouped
            },
            &[segment(0, 2, 0, 6), segment(2, 1, 6, 5)],
        ),
    ]
}

fn rope_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (interleaved, pairs) in [(false, 4), (true, 4), (false, 2), (true, 3)] {
        let frequencies: Vec<f64> = (0..pairs).map(|i| 0.7f64.powi(i)).collect();
        let table = Arc::new(RopeTable::new(9, &frequencies, 1.25, interleaved));
        let positions: Arc<[u32]> = [0, 1, 2, 8, 0].into();
        let name = format!("rope, interleaved {interleaved}, {pairs} pairs of 4");
        cases.push(case(name, &[&[5, 16]], &[], move |t, x, _| {
            let apart = t.rope(x[0].clone(), 8, &table, &positions);
            // In place: nobody else holds the product.
            let product = t.scale(-0.5, &apart);
            let in_place = t.rope(product, 8, &table, &positions);
            t.mul(&in_place, &x[0])
        }));
    }
    cases.into_iter().map(|case| case.roundings(4.0)).collect()
}

fn linear_cases() -> Vec<Case> {
    let mut cases = vec![
        case("linear", &[&[5, 7]], &[&[6, 7]], |t, x, w| {
            t.linear(&x[0], w.at(0), None, None)
        }),
        case(
            "linear, three axes, bias",
            &[&[2, 3, 7]],
            &[&[6, 7], &[6]],
            |t, x, w| t.linear(&x[0], w.at(0), Some(w.at(1)), None),
        ),
        case(
            "linear, residual",
            &[&[5, 7], &[5, 6]],
            &[&[6, 7]],
            |t, x, w| t.linear(&x[0], w.at(0), None, Some(&x[1])),
        ),
        case(
            "linear, bias, residual",
            &[&[5, 7], &[5, 6]],
            &[&[6, 7], &[6]],
            |t, x, w| t.linear(&x[0], w.at(0), Some(w.at(1)), Some(&x[1])),
        ),
        case(
            "linear twice on one input",
            &[&[5, 6]],
            &[&[6, 6]],
            |t, x, w| {
                let y = t.linear(&x[0], w.at(0), None, Some(&x[0]));
                t.linear(&x[0], w.at(0), None, Some(&y))
            },
        )
        .roundings(2.0),
        case("gather_rows", &[&[5, 3]], &[], |t, x, _| {
            t.gather_rows(&x[0], &[4, 0, 4, 2])
        }),
    ];
    for scale in [1.0, 2.5] {
        cases.push(case(
            format!("embedding, scale {scale}"),
            &[],
            &[&[7, 5]],
            move |t, _, w| {
                let dtype = w.at(0).weight.dense().dtype();
                t.embedding(w.at(0), &[6, 0, 3, 3, 6, 3], scale, dtype)
            },
        ));
    }
    cases
}

fn norm_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for offset in [0.0, 1.0] {
        for heads in [1, 3] {
            let name = format!("rms_norm, offset {offset}, {heads} heads");
            cases.push(case(name, &[&[4, 10 * heads]], &[&[10]], move |t, x, w| {
                t.rms_norm(&x[0], w.at(0), 1e-5, offset)
            }));
        }
    }
    for heads in [1, 3] {
        cases.push(case(
            format!("layer_norm, {heads} heads"),
            &[&[4, 10 * heads]],
            &[&[10]],
            |t, x, w| t.layer_norm(&x[0], w.at(0), None, 1e-5),
        ));
        cases.push(case(
            format!("layer_norm, bias, {heads} heads"),
            &[&[4, 10 * heads]],
            &[&[10], &[10]],
            |t, x, w| t.layer_norm(&x[0], w.at(0), Some(w.at(1)), 1e-5),
        ));
    }
    // The gradient of the input is added to what flowed there before.
    cases.push(
        case(
            "norms on one input",
            &[&[4, 10]],
            &[&[10], &[10], &[10]],
            |t, x, w| {
                let a = t.rms_norm(&x[0], w.at(0), 1e-5, 0.0);
                let b = t.layer_norm(&x[0], w.at(1), Some(w.at(2)), 1e-5);
                let sum = t.add(&a, &b);
                t.add(&sum, &x[0])
            },
        )
        .roundings(3.0),
    );
    cases
}

fn activation_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
    ] {
        cases.push(case(
            format!("{kind:?}"),
            &[&[3, 37]],
            &[],
            move |t, x, _| t.activation(kind, &x[0]),
        ));
        cases.push(case(
            format!("gated {kind:?}"),
            &[&[3, 37], &[3, 37]],
            &[],
            move |t, x, _| t.gated(kind, &x[0], &x[1]),
        ));
    }
    cases.push(
        case("gated by itself", &[&[3, 5]], &[], |t, x, _| {
            t.gated(Activation::Silu, &x[0], &x[0])
        })
        .roundings(2.0),
    );
    cases
}

/// Targets below `v`, some of them ignored.
fn targets(rows: usize, v: i64) -> Arc<[i64]> {
    (0..rows as i64)
        .map(|t| if t % 4 == 2 { IGNORED } else { (t * 5 + 1) % v })
        .collect()
}

fn cross_entropy_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // 600 rows are two chunks.
    for (rows, softcap, denominator) in
        [(9, None, 6.0), (9, Some(2.0), 7.0), (600, Some(2.0), 450.0)]
    {
        let targets = targets(rows, 11);
        let name = format!("cross_entropy, {rows} rows, soft cap {softcap:?}");
        let case = case(name, &[&[rows, 3]], &[&[11, 3]], move |t, x, w| {
            t.cross_entropy(&x[0], w.at(0), &targets, softcap, denominator)
        });
        cases.push(case);
    }
    let nothing: Arc<[i64]> = vec![IGNORED; 4].into();
    cases.push(case(
        "cross_entropy, all ignored",
        &[&[4, 3]],
        &[&[11, 3]],
        move |t, x, w| t.cross_entropy(&x[0], w.at(0), &nothing, None, 1.0),
    ));
    cases
}

/// A mixture of `x[0]` over linear experts, routed by `logits`.
fn mixture(
    t: &mut Tape,
    x: &Var,
    logits: &Var,
    w: &Weights,
    normalize: bool,
    stats: Option<&Arc<RouterStats>>,
) -> Var {
    let routing = t.routing(logits, 2, normalize, stats);
    let outputs: Vec<Var> = (0..logits.tensor.cols())
        .map(|e| {
            let rows: Vec<u32> = routing.rows[e].iter().map(|&(row, _)| row).collect();
            let part = t.gather_rows(x, &rows);
            t.linear(&part, w.at(e), None, None)
        })
        .collect();
    t.combine(&routing, &outputs, x.tensor.cols())
}

fn mixture_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let expert: &[usize] = &[5, 5];
    for normalize in [false, true] {
        cases.push(
            case(
                format!("mixture, normalized {normalize}"),
                &[&[6, 5], &[6, 4]],
                &[expert; 4],
                move |t, x, w| mixture(t, &x[0], &x[1], w, normalize, None),
            )
            .roundings(4.0),
        );
        // Two layers share the statistics, which are closed after both.
        let inputs = [vec![6, 5], vec![6, 4], vec![6, 4]].to_vec();
        cases.push(Case {
            name: format!("mixtures with load-balancing loss, normalized {normalize}"),
            inputs,
            weights: vec![expert.to_vec(); 4],
            forward: Box::new(move |t, x, w| {
                let stats = Arc::new(RouterStats::default());
                let y = mixture(t, &x[0], &x[1], w, normalize, Some(&stats));
                let y = mixture(t, &y, &x[2], w, normalize, Some(&stats));
                let seed = 0.75;
                let extra = seed * stats.close(seed);
                (y, extra)
            }),
            roundings: 8.0,
        });
    }
    // An expert that nobody chose.
    cases.push(
        case(
            "mixture, an idle expert",
            &[&[6, 5], &[6, 3]],
            &[expert; 4],
            move |t, x, w| {
                let small = t.scale(0.0, &x[1]);
                let column = t.split(&small, 0..1);
                let never = t.shift(-9.0, &column);
                let logits = t.concat(&[&x[1], &never]);
                mixture(t, &x[0], &logits, w, true, None)
            },
        )
        .roundings(4.0),
    );
    cases
}

fn glue_cases() -> Vec<Case> {
    let two: &[&[usize]] = &[&[3, 5], &[3, 5]];
    let one: &[&[usize]] = &[&[3, 5]];
    vec![
        case("add", two, &[], |t, x, _| t.add(&x[0], &x[1])),
        case("add to itself", one, &[], |t, x, _| t.add(&x[0], &x[0])),
        case("mul", two, &[], |t, x, _| t.mul(&x[0], &x[1])),
        case("mul by itself", one, &[], |t, x, _| t.mul(&x[0], &x[0])),
        case("scale", one, &[], |t, x, _| t.scale(-1.5, &x[0])),
        case("shift", one, &[], |t, x, _| t.shift(0.5, &x[0])),
        case("cast to f64", one, &[], |t, x, _| t.cast(&x[0], DType::F64)),
        case("reshape", one, &[], |t, x, _| {
            let y = t.reshape(&x[0], [5, 3]);
            t.mul(&y, &y)
        }),
        case("transpose", one, &[], |t, x, _| t.transpose(&x[0])),
        case("concat", &[&[3, 5], &[3, 1], &[3, 2]], &[], |t, x, _| {
            t.concat(&[&x[0], &x[1], &x[2], &x[0]])
        }),
        case("split", one, &[], |t, x, _| {
            let (a, b) = (t.split(&x[0], 0..2), t.split(&x[0], 1..3));
            t.mul(&a, &b)
        }),
        case("sum", one, &[], |t, x, _| t.sum(&x[0])),
        case("softmax", &[&[3, 19]], &[], |t, x, _| t.softmax(&x[0])),
        case("log", one, &[], |t, x, _| {
            let square = t.mul(&x[0], &x[0]);
            let positive = t.shift(1.5, &square);
            t.log(&positive)
        })
        .roundings(4.0),
    ]
}

#[test]
fn gradients_types_threads_and_inference() {
    let families = [
        linear_cases(),
        norm_cases(),
        rope_cases(),
        attention_cases(),
        activation_cases(),
        cross_entropy_cases(),
        mixture_cases(),
        glue_cases(),
    ];
    for case in families.iter().flatten() {
        check(case);
    }
}

/// Loss, gradient of `h` and gradient of the weight, in the storage type of `h`.
struct Head {
    weights: Weights,
    targets: Arc<[i64]>,
    softcap: Option<f32>,
    trained: bool,
}

impl Head {
    fn pass(&self, mut tape: Tape, h: &Tensor, seed: f64) -> (f64, Vec<f64>, Option<Vec<f64>>) {
        let cpu = tape.cpu().clone();
        let input = tape.input(h.clone());
        let loss = tape.cross_entropy(&input, self.weights.at(0), &self.targets, self.softcap, 6.0);
        let (recorded, early) = tape.finish(&loss);
        let mut grads = early.unwrap_or_else(|| Grads::new([self.trained]));
        let dy = tensor(&cpu, loss.tensor.dtype(), &[seed], &[1]);
        let dh = recorded
            .backward(&self.weights, dy, &mut grads)
            .expect("a gradient of the input");
        (
            loss.tensor.item(),
            dh.to_f64(),
            grads.get(0).map(Tensor::to_f64),
        )
    }
}

/// A loss computed together with its gradient is the loss, and has the gradient, of a pass forward and a pass back.
#[test]
fn eager_cross_entropy_is_cross_entropy() {
    let cpu = Cpu::new(2);
    for dtype in [DType::F64, DType::F32, DType::Bf16, DType::F16] {
        for (rows, softcap, seed, trained) in [
            (9, None, 1.0, true),
            (600, Some(2.0), 0.25, true),
            (9, Some(2.0), 2.0, false),
        ] {
            let h = tensor(&cpu, dtype, &normal(1, rows * 8), &[rows, 8]);
            let weights = Weights::new(vec![tensor(&cpu, dtype, &normal(2, 40), &[5, 8]).into()]);
            let head = Head {
                weights,
                targets: targets(rows, 5),
                softcap,
                trained,
            };
            let eager = head.pass(
                Tape::training_eager(&cpu, Grads::new([trained]), seed),
                &h,
                seed,
            );
            assert_eq!(
                eager,
                head.pass(Tape::training(&cpu), &h, seed),
                "{dtype}, {rows} rows"
            );
            assert_eq!(eager.2.is_some(), trained);
        }
    }
}

/// Losses of single rows and logits against the loss and against each other.
#[test]
fn token_losses_and_logits_agree_with_the_loss() {
    let cpu = Cpu::new(2);
    let (rows, v) = (600, 5);
    let targets = targets(rows, v as i64);
    for (dtype, tolerance) in [
        (DType::F64, 1e-12),
        (DType::F32, 1e-5),
        (DType::Bf16, 1e-5),
        (DType::F16, 1e-5),
    ] {
        for softcap in [None, Some(2.0)] {
            let weights =
                Weights::new(vec![tensor(&cpu, dtype, &normal(2, v * 8), &[v, 8]).into()]);
            let mut tape = Tape::inference(&cpu);
            let h = tape.input(tensor(&cpu, dtype, &normal(1, rows * 8), &[rows, 8]));
            let losses = tape
                .token_losses(&h, weights.at(0), &targets, softcap)
                .tensor
                .to_f64();
            let logits = tape.logits(&h, weights.at(0), softcap).tensor.to_f64();
            let loss = tape
                .cross_entropy(&h, weights.at(0), &targets, softcap, 6.0)
                .tensor
                .item();
            assert!(difference(&[losses.iter().sum::<f64>() / 6.0], &[loss]) <= tolerance);
            let by_hand = logits
                .chunks(v)
                .zip(&targets[..])
                .map(|(row, &target)| match target {
                    IGNORED => 0.0,
                    target => row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[target as usize],
                });
            let d = difference(&losses, &by_hand.collect::<Vec<f64>>());
            assert!(d <= tolerance, "{dtype}, soft cap {softcap:?}: {d:.1e}");
        }
    }
}

/// Ops on a packed weight against the same op on the numbers that it unpacks to: the same bits, and where activations are kept
/// in 16 bits, about the same.
#[test]
fn packed_weights_are_their_unpacked_numbers() {
    let cpu = Cpu::new(2);
    type Op<'a> = &'a dyn Fn(&mut Tape, &Var, &Weights) -> Var;
    let dtypes = [DType::F64, DType::F32, DType::Bf16, DType::F16];
    for (dtype, ordered) in dtypes.into_iter().flat_map(|d| [(d, false), (d, true)]) {
        // Groups that are not full, and once more rows and columns than are unpacked at a time.
        let (n, k, rows) = match (dtype, ordered) {
            (DType::F32, false) => (4700, 1000, 6),
            _ => (700, 40, 6),
        };
        let targets = targets(rows, n as i64);
        let source = normal(3, n * k);
        let mut stored = source.clone();
        // Columns packed in another order are the same matrix.
        let order: Vec<u32> = (0..k as u32).map(|j| (j * 7 + 3) % k as u32).collect();
        if ordered {
            let places = (0..n).flat_map(|row| order.iter().map(move |&c| row * k + c as usize));
            stored = places.map(|at| source[at]).collect();
        }
        let mut packed = Packed::quantize(
            &cpu,
            packed::Layout::q8(),
            &tensor(&cpu, DType::F32, &stored, &[n, k]),
        );
        if ordered {
            packed = packed.with_order(order.into());
        }
        let dense = packed.unpack_rows(&cpu, 0..n, dtype);
        let error = difference(&dense.to_f64(), &source);
        assert!(error <= 1.0 / 128.0, "8 bits of {error:.1e}");
        let bias = tensor(&cpu, dtype, &normal(4, n), &[n]);
        let linear: Op = &|t, x, w| t.linear(x, w.at(0), Some(w.at(1)), None);
        let loss: Op = &|t, x, w| t.cross_entropy(x, w.at(0), &targets, None, 6.0);
        let logits: Op = &|t, x, w| t.logits(&t.constant(x.tensor.clone()), w.at(0), None);
        let embedding: Op = &|t, _, w| t.embedding(w.at(0), &[n as u32 - 1, 0, 513, 0], 1.5, dtype);
        for (name, op) in [
            ("linear", linear),
            ("loss", loss),
            ("logits", logits),
            ("embedding", embedding),
        ] {
            let pass = |weight: Weight| {
                let weights = Weights::new(vec![weight, bias.clone().into()]);
                let mut grads = Grads::new([false, true]);
                let mut tape = Tape::training(&cpu);
                let x = tape.input(tensor(&cpu, dtype, &normal(5, rows * k), &[rows, k]));
                let y = op(&mut tape, &x, &weights);
                let dy = tensor(
                    &cpu,
                    y.tensor.dtype(),
                    &normal(6, y.tensor.len()),
                    y.shape(),
                );
                let dx = tape
                    .finish(&y)
                    .0
                    .backward(&weights, dy, &mut grads)
                    .map(|dx| dx.to_f64());
                assert!(
                    grads.get(0).is_none(),
                    "{name}: a packed weight took a gradient"
                );
                (y.tensor.to_f64(), dx, grads.get(1).map(Tensor::to_f64))
            };
            let (packed, dense) = (
                pass(Weight::Packed(packed.clone())),
                pass(Weight::Dense(dense.clone())),
            );
            assert_eq!(packed.2, dense.2, "{name} {dtype}: gradient of the bias");
            assert_eq!(packed.1.is_some(), dense.1.is_some());
            let inputs = packed.1.as_ref().zip(dense.1.as_ref());
            for (packed, dense) in [(&packed.0, &dense.0)].into_iter().chain(inputs) {
                match dtype {
                    DType::F64 | DType::F32 => assert!(packed == dense, "{name} {dtype}"),
                    DType::Bf16 | DType::F16 => {
                        let d = difference(packed, dense);
                        // A softmax of large logits makes much of little.
                        let bound = if name == "loss" { 0.2 } else { 0.03 };
                        assert!(d <= bound, "{name} {dtype}: {d:.1e}");
                    }
                }
            }
        }
    }
}

/// Casting rounds values on the way forward and gradients on the way back.
#[test]
fn a_cast_rounds_both_ways() {
    let cpu = Cpu::new(1);
    let third = 1.0 / 3.0;
    let mut tape = Tape::training(&cpu);
    let x = tape.input(tensor(&cpu, DType::Bf16, &[0.5, -2.0], &[2]));
    let y = tape.cast(&x, DType::F32);
    assert_eq!(
        (y.tensor.dtype(), y.tensor.to_f64()),
        (DType::F32, vec![0.5, -2.0])
    );
    let dy = tensor(&cpu, DType::F32, &[third, 1.0], &[2]);
    let dx = tape
        .finish(&y)
        .0
        .backward(&Weights::default(), dy, &mut Grads::default())
        .expect("a gradient");
    assert_eq!(
        (dx.dtype(), dx.to_f64()),
        (DType::Bf16, vec![bf16::from_f64(third).to_f64(), 1.0])
    );
    let mut tape = Tape::inference(&cpu);
    let x = tape.input(tensor(&cpu, DType::F64, &[third], &[1]));
    assert_eq!(
        tape.cast(&x, DType::Bf16).tensor.to_f64(),
        [bf16::from_f64(third).to_f64()]
    );
}

/// Packed products of one input, whose columns lie in several orders: each is what it is alone, and about that of its
/// numbers.
#[test]
fn packed_products_know_their_order() {
    let cpu = Cpu::new(2);
    let (n, k, rows) = (48, 96, 5);
    let order = |step: usize| -> Vec<u32> { (0..k).map(|j| (j * step % k) as u32).collect() };
    let pack = |seed: u64, step: Option<usize>| {
        let values = tensor(&cpu, DType::F32, &normal(seed, n * k), &[n, k]);
        let packed = Packed::quantize(&cpu, packed::Layout::q8(), &values);
        Weight::Packed(match step {
            Some(step) => packed.with_order(order(step).into()),
            None => packed,
        })
    };
    let steps = [Some(5), None, Some(7), Some(5), None];
    let packed = (0..).zip(steps).map(|(seed, step)| pack(seed, step));
    let weights = Weights::new(packed.collect());
    let mut tape = Tape::inference(&cpu);
    let x = tape.input(tensor(&cpu, DType::F32, &normal(9, rows * k), &[rows, k]));
    let slots: Vec<_> = (0..steps.len())
        .map(|slot| (weights.at(slot), None))
        .collect();
    let together = tape.linears(&x, &slots);
    for (slot, y) in together.iter().enumerate() {
        let alone = tape.linear(&x, weights.at(slot), None, None);
        assert_eq!(y.tensor.to_f64(), alone.tensor.to_f64(), "weight {slot}");
        let Weight::Packed(packed) = weights.at(slot).weight else {
            unreachable!("all are packed")
        };
        let dense = Weights::new(vec![packed.unpack_rows(&cpu, 0..n, DType::F32).into()]);
        let plain = tape.linear(&x, dense.at(0), None, None).tensor.to_f64();
        let d = difference(&y.tensor.to_f64(), &plain);
        assert!(d < 0.02, "weight {slot}: off by {d:.1e}");
        let head = tape.logits(&x, weights.at(slot), None).tensor.to_f64();
        assert_eq!(head, y.tensor.to_f64(), "weight {slot} as a head");
    }
}

/// Experts with packed weights give together the bits that they give one by one.
#[test]
fn packed_experts_are_what_each_is_alone() {
    let cpu = Cpu::new(2);
    let (d, f, count) = (64, 96, 6);
    let mut weights = Vec::new();
    for expert in 0..count {
        let q4 = packed::Layout::q4(32);
        // A gate that is packed as `up` is, and one that is not.
        for ([n, k], layout) in [
            ([f, d], q4),
            ([f, d], q4),
            ([d, f], q4),
            ([f, d], packed::Layout::q8()),
        ] {
            let values = normal(31 + weights.len() as u64 + expert, n * k);
            let values = tensor(&cpu, DType::F32, &values, &[n, k]);
            weights.push(Packed::quantize(&cpu, layout, &values));
        }
    }
    let mut checked = 0;
    let cases = [(1, 1), (1, 3), (2, 2), (7, 1), (150, 3)];
    for ((rows, per_token), dtype) in cases
        .into_iter()
        .flat_map(|case| [(case, DType::F32), (case, DType::Bf16)])
    {
        for gate in [Some(0), Some(3), None] {
            let bias = tensor(&cpu, dtype, &normal(8, f), &[f]);
            let all = weights.iter().cloned().map(Weight::Packed);
            let w = Weights::new(all.chain([bias.into()]).collect());
            let mut tape = Tape::inference(&cpu);
            let h = tape.constant(tensor(&cpu, dtype, &normal(9, rows * d), &[rows, d]));
            let logits = normal(rows as u64, rows * count as usize);
            let logits = tensor(&cpu, dtype, &logits, &[rows, count as usize]);
            let logits = tape.constant(logits);
            let routing = tape.routing(&logits, per_token, true, None);
            let bias = Some(w.at(weights.len()));
            let experts: Vec<Expert<'_>> = (0..count as usize)
                .map(|e| Expert {
                    gate: gate.map(|gate| (w.at(4 * e + gate), bias)),
                    up: (w.at(4 * e + 1), None),
                    down: (w.at(4 * e + 2), None),
                })
                .collect();
            let kind = Activation::Silu;
            let together = tape.packed_experts(kind, &h, &routing, &experts);
            let together = together.expect("all weights are packed");
            let outputs: Vec<Var> = (experts.iter().zip(&routing.rows))
                .map(|(expert, rows)| {
                    let rows: Vec<u32> = rows.iter().map(|(row, _)| *row).collect();
                    let x = tape.gather_rows(&h, &rows);
                    let up = tape.linear(&x, expert.up.0, None, None);
                    let a = match expert.gate {
                        Some((gate, bias)) => {
                            let both = tape.gated_linears(kind, &x, (gate, bias), expert.up);
                            let gate = tape.linear(&x, gate, bias, None);
                            let apart = tape.gated(kind, &gate, &up);
                            assert_eq!(both.tensor.to_f64(), apart.tensor.to_f64());
                            apart
                        }
                        None => tape.activation(kind, &up),
                    };
                    tape.linear(&a, expert.down.0, None, None)
                })
                .collect();
            let alone = tape.combine(&routing, &outputs, d);
            assert_eq!(
                together.tensor.to_f64(),
                alone.tensor.to_f64(),
                "{rows} rows, {per_token} experts each, {dtype}, gate: {gate:?}"
            );
            checked += 1;
            for mut refused in [
                Tape::training(&cpu),
                Tape::rehearsal(&cpu),
                Tape::watched(&cpu, Arc::new(|_, _| {})),
            ] {
                let grouped = refused.packed_experts(kind, &h, &routing, &experts);
                assert!(
                    grouped.is_none(),
                    "a tape that rounds nothing, or is watched"
                );
            }
        }
    }
    assert_eq!(checked, 30);
}

/// An op without a backward pass refuses to stand on the way of a gradient, and nowhere else.
#[test]
fn opaque_ops_do_not_stop_gradients_silently() {
    let cpu = Cpu::new(1);
    let value = || tensor(&cpu, DType::F32, &normal(1, 8), &[2, 4]);
    let weights = Weights::new(vec![value().into()]);
    type Op<'a> = &'a dyn Fn(&mut Tape, &Var) -> Var;
    let ops: [(&str, Op); 3] = [
        ("logits", &|t, x| t.logits(x, weights.at(0), None)),
        ("token_losses", &|t, x| {
            t.token_losses(x, weights.at(0), &[0, 1], None)
        }),
        ("mine", &|t, x| {
            t.record_opaque("mine", x.tensor.clone(), &[x])
        }),
    ];
    for (name, op) in ops {
        let mut tape = Tape::training(&cpu);
        let x = tape.input(value());
        let panic =
            catch_unwind(AssertUnwindSafe(|| op(&mut tape, &x))).expect_err("recorded silently");
        let message = panic.downcast_ref::<String>().expect("a message");
        assert!(
            message.contains(name) && message.contains("no backward pass"),
            "{message}"
        );
        let constant = tape.constant(value());
        assert_eq!(op(&mut tape, &constant).node(), None);
        let mut tape = Tape::inference(&cpu);
        let x = tape.input(value());
        assert_eq!(op(&mut tape, &x).node(), None);
    }
}

/// An inference tape keeps no value alive: what the forward code drops is free at once.
#[test]
fn inference_keeps_nothing_alive() {
    let cpu = Cpu::new(1);
    let weights = Weights::new(vec![tensor(&cpu, DType::F32, &normal(1, 16), &[16]).into()]);
    let in_use = |tape: &mut Tape| {
        let mut x = tape.input(tensor(&cpu, DType::F32, &normal(2, 64 * 16), &[64, 16]));
        let before = cpu.memory.now().of(Category::Activations);
        for _ in 0..10 {
            x = tape.rms_norm(&x, weights.at(0), 1e-5, 0.0);
            x = tape.activation(Activation::Silu, &x);
        }
        cpu.memory.now().of(Category::Activations) - before
    };
    assert_eq!(in_use(&mut Tape::inference(&cpu)), 0);
    assert!(in_use(&mut Tape::training(&cpu)) >= 19 * 64 * 16 * 4);
}

/// Dropout before an adapter with magnitudes, as PEFT has it: `W x + (g - 1) W x' + g s B A x'` of the dropped input `x'`,
/// where `g` is the magnitude over the norm.
#[test]
fn dropout_leaves_alone_what_magnitudes_do() {
    let cpu = Cpu::new(1);
    let (n, r, rows) = (6, 2, 9);
    let lora = Lora {
        a: 1,
        b: 2,
        magnitude: Some(3),
        scale: 2.0,
        dropout: 0.25,
    };
    let identity: Vec<f64> = (0..n * n)
        .map(|i| f64::from(u8::from(i % (n + 1) == 0)))
        .collect();
    let weights = |b: &[f64], magnitudes: &[f64]| {
        let of = |values: &[f64], shape: &[usize]| tensor(&cpu, DType::F64, values, shape).into();
        let a = normal(2, r * n);
        Weights::new(vec![
            of(&identity, &[n, n]),
            of(&a, &[r, n]),
            of(b, &[n, r]),
            of(magnitudes, &[n]),
        ])
        .with_adapters(&vec![(0, lora)].into())
    };
    let x = normal(5, rows * n);
    let run = |weights: &Weights, x: &[f64], noise: Option<u64>| {
        let tape = Tape::training(&cpu);
        let mut tape = match noise {
            Some(noise) => tape.with_noise(noise),
            None => tape,
        };
        let x = tape.input(tensor(&cpu, DType::F64, x, &[rows, n]));
        let y = tape.linear(&x, weights.at(0), None, None);
        (y.tensor.to_f64(), tape.finish(&y).0)
    };
    // The norm of a row is 1 while B is 0: what is added is the dropped input, with a magnitude of 2.
    let (y, _) = run(&weights(&vec![0.0; n * r], &[2.0; 6]), &x, Some(4));
    let added: Vec<f64> = y.iter().zip(&x).map(|(y, x)| y - x).collect();
    let dropped = added.iter().filter(|v| v.abs() < 1e-12).count();
    assert!(
        (4..30).contains(&dropped),
        "{dropped} of 54 with a quarter dropped"
    );
    for (added, x) in added.iter().zip(&x) {
        let kept = (added - x / 0.75).abs() < 1e-12;
        assert!(added.abs() < 1e-12 || kept, "{added} of {x}");
    }
    let (y, _) = run(&weights(&vec![0.0; n * r], &[1.0; 6]), &x, Some(4));
    assert!(difference(&y, &x) < 1e-12, "magnitudes that change nothing");

    let b = normal(3, n * r);
    let dy = normal(6, rows * n);
    let magnitudes = normal(7, n);
    let all = weights(&b, &magnitudes);
    let (_, recorded) = run(&all, &x, Some(4));
    let seed = tensor(&cpu, DType::F64, &dy, &[rows, n]);
    let mut grads = Grads::new([false, true, true, true]);
    let dx = recorded.backward(&all, seed, &mut grads).unwrap().to_f64();
    let value = |x: &[f64], magnitudes: &[f64]| -> f64 {
        let y = run(&weights(&b, magnitudes), x, Some(4)).0;
        y.iter().zip(&dy).map(|(y, dy)| y * dy).sum()
    };
    let slope = |values: &[f64], at: usize, value: &dyn Fn(&[f64]) -> f64| {
        let moved = |by: f64| {
            let mut values = values.to_vec();
            values[at] += by;
            value(&values)
        };
        (moved(1e-5) - moved(-1e-5)) / 2e-5
    };
    for (at, found) in dx.iter().enumerate() {
        let want = slope(&x, at, &|x| value(x, &magnitudes));
        assert!((found - want).abs() < 1e-6, "dx {at}: {found} and {want}");
    }
    for (at, found) in grads.get(3).unwrap().to_f64().iter().enumerate() {
        let want = slope(&magnitudes, at, &|m| value(&x, m));
        assert!((found - want).abs() < 1e-6, "dm {at}: {found} and {want}");
    }
    assert!(grads.get(1).is_some() && grads.get(2).is_some());
}
