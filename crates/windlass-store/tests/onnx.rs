//! Operator conformance cases of ONNX that map to our kernels: norms, softmax, losses, rotation, activations, attention
//! and optimizers, in `f32`.

use serde_json::Value;
use std::path::Path;
use windlass_store::safetensors::Tensors;
use windlass_tensor::kernels::activation::{Activation, activation};
use windlass_tensor::kernels::attention::{AttentionShape, Rows, Segment, attention};
use windlass_tensor::kernels::cross_entropy::cross_entropy_rows;
use windlass_tensor::kernels::pool::Pool;
use windlass_tensor::kernels::rope::{Rope, rope};
use windlass_tensor::kernels::{norm, optim, softmax};

/// Cases of each group that must have run.
const CASES: [(&str, usize); 11] = [
    ("RMSNormalization", 19),
    ("LayerNormalization", 19),
    ("Softmax", 7),
    ("LogSoftmax", 7),
    ("SoftmaxCrossEntropyLoss", 18),
    ("RotaryEmbedding", 8),
    ("Gelu", 4),
    ("Swish", 1),
    ("Attention", 32),
    ("FlexAttention", 6),
    ("Optimizer", 5),
];

struct Case<'a> {
    name: &'a str,
    json: &'a Value,
    tensors: &'a Tensors,
}

impl Case<'_> {
    fn entry(&self, list: &str, name: &str) -> Option<&Value> {
        self.json[list]
            .as_array()?
            .iter()
            .find(|e| e["name"] == name)
    }

    /// The input under its formal position; `None` when absent.
    fn slot(&self, position: usize) -> Option<String> {
        let name = self.json["node_inputs"].get(position)?.as_str()?;
        (!name.is_empty()).then(|| name.to_string())
    }

    fn shape(&self, entry: &Value) -> Vec<usize> {
        entry["shape"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap() as usize)
            .collect()
    }

    fn floats(&self, entry: &Value) -> Vec<f32> {
        let view = self.tensors.get(entry["key"].as_str().unwrap()).unwrap();
        let mut out = vec![0f32; view.elements()];
        view.read_into(0..view.rows(), &mut out).unwrap();
        out
    }

    fn ints(&self, entry: &Value) -> Vec<i64> {
        let view = self.tensors.get(entry["key"].as_str().unwrap()).unwrap();
        match entry["dtype"].as_str().unwrap() {
            "INT32" => view
                .as_slice::<i32>()
                .unwrap()
                .iter()
                .map(|&v| v as i64)
                .collect(),
            _ => view
                .bytes
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
                .collect(),
        }
    }

    fn input(&self, position: usize) -> Option<(Vec<usize>, Vec<f32>)> {
        let name = self.slot(position)?;
        let entry = self.entry("inputs", &name)?;
        Some((self.shape(entry), self.floats(entry)))
    }

    fn input_ints(&self, position: usize) -> Option<Vec<i64>> {
        let name = self.slot(position)?;
        Some(self.ints(self.entry("inputs", &name)?))
    }

    fn number(&self, attribute: &str, default: f64) -> f64 {
        self.json["attrs"]
            .get(attribute)
            .and_then(Value::as_f64)
            .unwrap_or(default)
    }

    /// Compares with the output at a position, where the case has it.
    fn expect(&self, position: usize, got: &[f32]) {
        let Some(name) = self.json["node_outputs"]
            .get(position)
            .and_then(Value::as_str)
        else {
            return;
        };
        let Some(entry) = self.entry("outputs", name) else {
            return;
        };
        let want = self.floats(entry);
        assert_eq!(
            got.len(),
            want.len(),
            "{}: elements of output {position}",
            self.name
        );
        let tolerance = if entry["dtype"] == "FLOAT16" {
            2e-3
        } else {
            2e-5
        };
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            let near = (g - w).abs() <= tolerance * (1.0 + w.abs());
            assert!(
                near,
                "{}: output {position}[{i}] is {g}, not {w}",
                self.name
            );
        }
    }

    /// The axis of an attribute, counted from the front.
    fn axis(&self, ndim: usize) -> usize {
        (self.number("axis", -1.0) as i64).rem_euclid(ndim as i64) as usize
    }
}

/// Moves `axis` last (`back` undoes it).
fn axis_last(x: &[f32], shape: &[usize], axis: usize, back: bool) -> Vec<f32> {
    let n = shape[axis];
    let inner: usize = shape[axis + 1..].iter().product();
    let mut out = vec![0.0; x.len()];
    for (i, _) in x.iter().enumerate() {
        let (outer, a, r) = (i / (n * inner), i / inner % n, i % inner);
        let moved = (outer * inner + r) * n + a;
        if back {
            out[i] = x[moved];
        } else {
            out[moved] = x[i];
        }
    }
    out
}

/// `[B, H, S, D]` to rows `[B, S, H, D]` (or back, with `h` and `s` swapped).
fn swap_middle(x: &[f32], [b, h, s, d]: [usize; 4]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for (i, row) in x.chunks(d).enumerate() {
        let (batch, head, at) = (i / (h * s), i / s % h, i % s);
        let to = ((batch * s + at) * h + head) * d;
        out[to..to + d].copy_from_slice(row);
    }
    assert_eq!(x.len(), b * h * s * d);
    out
}

fn norms(pool: &Pool, case: &Case<'_>, layer: bool) {
    let (shape, x) = case.input(0).unwrap();
    let (_, w) = case.input(1).unwrap();
    let eps = case.number("epsilon", 1e-5) as f32;
    let rows = shape[..case.axis(shape.len())].iter().product();
    let (mut y, mut a, mut b) = (vec![0.0; x.len()], vec![0.0; rows], vec![0.0; rows]);
    if layer {
        let bias = case.input(2).map(|(_, bias)| bias);
        norm::layer_norm(pool, &x, &w, bias.as_deref(), eps, &mut y, &mut a, &mut b);
        case.expect(1, &a);
        case.expect(2, &b);
    } else {
        norm::rms_norm(pool, &x, &w, 0.0, eps, &mut y, &mut a);
    }
    case.expect(0, &y);
}

fn softmaxes(pool: &Pool, case: &Case<'_>, log: bool) {
    let (shape, x) = case.input(0).unwrap();
    let axis = case.axis(shape.len());
    let rows = axis_last(&x, &shape, axis, false);
    let mut y = vec![0.0; x.len()];
    if log {
        softmax::log_softmax(pool, &rows, shape[axis], &mut y);
    } else {
        softmax::softmax(pool, &rows, shape[axis], &mut y);
    }
    case.expect(0, &axis_last(&y, &shape, axis, true));
}

fn losses(pool: &Pool, case: &Case<'_>) {
    let (shape, x) = case.input(0).unwrap();
    let ignored = case.json["attrs"]
        .get("ignore_index")
        .and_then(Value::as_i64);
    let targets = case.input_ints(1).unwrap();
    let targets: Vec<i64> = targets
        .iter()
        .map(|&t| if Some(t) == ignored { -100 } else { t })
        .collect();
    let rows = axis_last(&x, &shape, 1, false);
    let (mut logits, mut loss) = (rows.clone(), vec![0.0; targets.len()]);
    cross_entropy_rows::<f32>(pool, &mut logits, shape[1], None, &targets, &mut loss, None);
    let scored = targets.iter().filter(|&&t| t != -100).count() as f32;
    let sum: f32 = loss.iter().sum();
    match case.json["attrs"]
        .get("reduction")
        .and_then(Value::as_str)
        .unwrap_or("mean")
    {
        "none" => case.expect(0, &loss),
        "sum" => case.expect(0, &[sum]),
        _ => case.expect(0, &[sum / scored]),
    }
    let mut log = vec![0.0; x.len()];
    softmax::log_softmax(pool, &rows, shape[1], &mut log);
    case.expect(1, &axis_last(&log, &shape, 1, true));
}

fn rotation(pool: &Pool, case: &Case<'_>) {
    let (shape, x) = case.input(0).unwrap();
    let (cos, sin) = (case.input(1).unwrap().1, case.input(2).unwrap().1);
    let (b, h, s, d) = match shape[..] {
        [b, h, s, d] => (b, h, s, d),
        [b, s, width] => {
            let h = case.number("num_heads", 1.0) as usize;
            (b, h, s, width / h)
        }
        _ => panic!("{}: shape {shape:?}", case.name),
    };
    let four = shape.len() == 4;
    let mut rows = if four {
        swap_middle(&x, [b, h, s, d])
    } else {
        x
    };
    let rotary = Some(case.number("rotary_embedding_dim", 0.0) as usize)
        .filter(|&n| n > 0)
        .unwrap_or(d);
    let positions: Vec<u32> = match case.input_ints(3) {
        Some(ids) => ids.iter().map(|&p| p as u32).collect(),
        None => (0..(b * s) as u32).collect(),
    };
    let interleaved = case.number("interleaved", 0.0) != 0.0;
    let rule = Rope {
        stride: h * d,
        heads: h,
        head_dim: d,
        rotary,
        interleaved,
        inverse: false,
    };
    rope(pool, &mut rows, &rule, &cos, &sin, &positions);
    case.expect(
        0,
        &if four {
            swap_middle(&rows, [b, s, h, d])
        } else {
            rows
        },
    );
}

/// Zeros behind every head's row of `from` elements, up to `to`; or the rows cut to `to`.
fn resize_heads(rows: &[f32], from: usize, to: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len() / from * to);
    for row in rows.chunks(from) {
        out.extend_from_slice(&row[..from.min(to)]);
        out.resize(out.len() + to.saturating_sub(from), 0.0);
    }
    out
}

/// Rows of a cache before new ones, sequence by sequence.
fn behind(past: &[f32], new: &[f32], batch: usize) -> Vec<f32> {
    let (p, n) = (past.len() / batch, new.len() / batch);
    (0..batch)
        .flat_map(|i| [&past[i * p..][..p], &new[i * n..][..n]].concat())
        .collect()
}

/// Attention without a mask of its own: plain, causal, causal over a padded cache or behind one.
///
/// Where heads of V have another size than those of Q and K, the smaller ones get zeros: these change no score, and
/// only add columns to the output.
fn attend(pool: &Pool, case: &Case<'_>) {
    let [(q_shape, q), (k_shape, k), (v_shape, v)] = [0, 1, 2].map(|i| case.input(i).unwrap());
    let four = q_shape.len() == 4;
    let heads = |shape: &[usize], key: &str| {
        if four {
            shape[1]
        } else {
            case.number(key, 1.0) as usize
        }
    };
    let (heads_q, heads_kv) = (
        heads(&q_shape, "q_num_heads"),
        heads(&k_shape, "kv_num_heads"),
    );
    let (b, s) = (q_shape[0], q_shape[q_shape.len() - 2]);
    let new = k_shape[k_shape.len() - 2];
    let size = |shape: &[usize], h| shape[shape.len() - 1] / if four { 1 } else { h };
    let (dk, dv) = (size(&q_shape, heads_q), size(&v_shape, heads_kv));
    let d = dk.max(dv);
    let rows = |x: Vec<f32>, h: usize, s: usize, d: usize| {
        if four {
            swap_middle(&x, [b, h, s, d])
        } else {
            x
        }
    };
    let past = case.input(4).map_or(0, |(shape, _)| shape[2]);
    let keys = past + new;
    let with_past = |x: Vec<f32>, d: usize, position: usize, present: usize| {
        let x = rows(x, heads_kv, new, d);
        let Some((_, cache)) = case.input(position) else {
            return x;
        };
        let x = behind(&swap_middle(&cache, [b, heads_kv, past, d]), &x, b);
        case.expect(present, &swap_middle(&x, [b, keys, heads_kv, d]));
        x
    };
    let q = resize_heads(&rows(q, heads_q, s, dk), dk, d);
    let k = resize_heads(&with_past(k, dk, 4, 1), dk, d);
    let v = resize_heads(&with_past(v, dv, 5, 2), dv, d);
    let causal = case.number("is_causal", 0.0) != 0.0;
    let lengths = case.input_ints(6);
    let segments: Vec<Segment> = (0..b)
        .flat_map(|i| {
            let kv_len = lengths.as_ref().map_or(past + s, |n| n[i] as usize);
            let whole = Segment {
                q_start: i * s,
                q_len: s,
                kv_start: i * keys,
                kv_len,
            };
            let alone = move |j| Segment {
                q_start: i * s + j,
                q_len: 1,
                kv_start: i * keys,
                kv_len: keys,
            };
            if causal {
                vec![whole]
            } else {
                (0..s).map(alone).collect()
            }
        })
        .collect();
    let cap = case.number("softcap", 0.0) as f32;
    let shape = AttentionShape {
        heads: heads_q,
        kv_heads: heads_kv,
        head_dim: d,
        scale: case.number("scale", (dk as f64).powf(-0.5)) as f32,
        softcap: (cap > 0.0).then_some(cap),
        window: None,
    };
    let view = |data, heads: usize| Rows {
        data,
        stride: heads * d,
    };
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; heads_q * b * s]);
    let (q, k, v) = (
        view(&q[..], heads_q),
        view(&k[..], heads_kv),
        view(&v[..], heads_kv),
    );
    attention(pool, &shape, &segments, q, k, v, &mut out, &mut lse);
    let out = resize_heads(&out, d, dv);
    case.expect(
        0,
        &if four {
            swap_middle(&out, [b, s, heads_q, dv])
        } else {
            out
        },
    );
}

fn optimizers(pool: &Pool, case: &Case<'_>, adam: bool) {
    let states = if adam { 4 } else { 3 };
    let tensors = (case.json["node_inputs"].as_array().unwrap().len() - 2) / states;
    let lr = case.input(0).unwrap().1[0] as f64;
    let decay = case.number("norm_coefficient", 0.0) as f32;
    let (alpha, beta) = (case.number("alpha", 0.9), case.number("beta", 0.999));
    for i in 0..tensors {
        let read = |part: usize| case.input(2 + part * tensors + i).unwrap().1;
        let (mut x, mut g, mut m) = (read(0), read(1), read(2));
        g.iter_mut().zip(&x).for_each(|(g, x)| *g += decay * x);
        if adam {
            // Step 0 of ONNX has no bias correction: undo that of our first step.
            let mut v = read(3);
            let root = (1.0 - beta).sqrt();
            let rule = optim::Adam {
                lr: lr * (1.0 - alpha) / root,
                beta1: alpha,
                beta2: beta,
                eps: case.number("epsilon", 1e-6) / root,
                weight_decay: 0.0,
                decoupled: true,
                bias_correction: true,
                step: 1,
                grad_scale: 1.0,
            };
            let (values, grad) = (optim::Values::F32(&mut x), optim::Grad::F32(&g));
            let moments = &mut [optim::Moment::F32(&mut m), optim::Moment::F32(&mut v)];
            optim::step(pool, &optim::Rule::Adam(rule), values, grad, moments);
            case.expect(2 * tensors + i, &v);
        } else {
            let nesterov = case.json["attrs"]["mode"] == "nesterov";
            let rule = optim::Sgd {
                lr,
                momentum: alpha,
                dampening: 0.0,
                nesterov,
                weight_decay: 0.0,
                step: 2,
                grad_scale: 1.0,
            };
            let (values, grad) = (optim::Values::F32(&mut x), optim::Grad::F32(&g));
            let moments = &mut [optim::Moment::F32(&mut m)];
            optim::step(pool, &optim::Rule::Sgd(rule), values, grad, moments);
        }
        case.expect(i, &x);
        case.expect(tensors + i, &m);
    }
}

/// Runs a case that maps to a kernel; the group it counts for.
fn run(pool: &Pool, case: &Case<'_>) -> Option<&'static str> {
    let has = |position| case.slot(position).is_some();
    match case.json["op"].as_str().unwrap() {
        "RMSNormalization" => norms(pool, case, false),
        "LayerNormalization" => norms(pool, case, true),
        "Softmax" => softmaxes(pool, case, false),
        "LogSoftmax" => softmaxes(pool, case, true),
        "SoftmaxCrossEntropyLoss" if !has(2) => losses(pool, case),
        "RotaryEmbedding" => rotation(pool, case),
        "Gelu" | "Swish" => {
            let kind = match case.json["attrs"]
                .get("approximate")
                .and_then(Value::as_str)
            {
                _ if case.json["op"] == "Swish" => Activation::Silu,
                Some("tanh") => Activation::GeluTanh,
                _ => Activation::Gelu,
            };
            let (_, x) = case.input(0).unwrap();
            let mut y = vec![0.0; x.len()];
            activation(pool, kind, &x, &mut y);
            case.expect(0, &y);
        }
        // Left out: masks of their own, which the kernels do not read (also where a cache is behind such a mask, and
        // where the scores themselves are an output), and `negative_offset`, whose first queries see no key at all.
        "Attention" if !has(3) && !case.name.contains("negative_offset") => attend(pool, case),
        // Those with functions on the scores as subgraphs are not in the data.
        "FlexAttention" => attend(pool, case),
        "Adam" | "Momentum" => {
            optimizers(pool, case, case.json["op"] == "Adam");
            return Some("Optimizer");
        }
        _ => return None,
    }
    CASES
        .iter()
        .map(|(group, _)| *group)
        .find(|group| *group == case.json["op"])
}

#[test]
fn onnx_operator_cases() {
    let Some(data) = std::env::var_os("WINDLASS_TEST_DATA") else {
        println!("skipped: set WINDLASS_TEST_DATA");
        return;
    };
    let folder = Path::new(&data).join("fixtures/onnx-ops");
    let text = std::fs::read_to_string(folder.join("onnx_op_cases.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let tensors = Tensors::open(&folder.join("onnx_op_cases.safetensors")).unwrap();
    let pool = Pool::new(2);
    let mut counts = CASES.map(|(group, _)| (group, 0));
    for (name, json) in json["cases"].as_object().unwrap() {
        if let Some(group) = run(
            &pool,
            &Case {
                name,
                json,
                tensors: &tensors,
            },
        ) {
            counts
                .iter_mut()
                .find(|(other, _)| *other == group)
                .unwrap()
                .1 += 1;
        }
    }
    assert_eq!(counts, CASES);
}
