//! Every level against a naive softmax in double precision; the same bits however a batch is cut.

use half::{bf16, f16};

use super::*;
use crate::DType;
use crate::Float;
use crate::dispatch::Level;
use crate::memory::Memory;

/// Numbers in -1..1 from a linear congruential generator.
fn noise(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttentionShape {
        heads,
        kv_heads,
        head_dim,
        scale,
        softcap: None,
        window: None,
    }
}

fn segment(q_start: usize, q_len: usize, kv_start: usize, kv_len: usize) -> Segment {
    Segment {
        q_start,
        q_len,
        kv_start,
        kv_len,
    }
}

/// Inputs and, after a run, results of one call; `q`, `k`, `v` are columns of one buffer as a fused projection makes.
#[derive(Clone)]
struct Case<E: Element> {
    shape: AttentionShape,
    segments: Vec<Segment>,
    tokens: usize,
    kv_tokens: usize,
    qkv: Vec<E>,
    dout: Vec<E>,
}

#[derive(Clone, Debug, PartialEq)]
struct Results<E: Element> {
    out: Vec<E>,
    lse: Vec<E::Acc>,
    grads: [Vec<E>; 3],
}

impl<E: Element> Case<E> {
    fn new(shape: AttentionShape, segments: Vec<Segment>) -> Case<E> {
        let tokens = segments
            .iter()
            .map(|s| s.q_start + s.q_len)
            .max()
            .unwrap_or(0);
        let kv_tokens = segments
            .iter()
            .map(|s| s.kv_start + s.kv_len)
            .max()
            .unwrap_or(0);
        let rows = tokens.max(kv_tokens);
        let cast = |x: Vec<f64>| x.into_iter().map(|x| E::from_f64(2.0 * x)).collect();
        let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let dout = cast(noise(2, tokens * shape.heads * shape.head_dim));
        Case {
            shape,
            segments,
            tokens,
            kv_tokens,
            qkv: cast(noise(1, rows * width)),
            dout,
        }
    }

    /// Queries, keys and values.
    fn inputs(&self) -> [Rows<'_, E>; 3] {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        let stride = (heads + 2 * kv_heads) * head_dim;
        let from =
            |head: usize| Rows::new(&self.qkv[(head * head_dim).min(self.qkv.len())..], stride);
        [from(0), from(heads), from(heads + kv_heads)]
    }

    fn forward(&self, pool: &Pool) -> (Vec<E>, Vec<E::Acc>) {
        let rows = self.tokens * self.shape.heads;
        let (mut out, mut lse) = (
            vec![E::default(); rows * self.shape.head_dim],
            vec![E::Acc::ZERO; rows],
        );
        let [q, k, v] = self.inputs();
        attention(
            pool,
            &self.shape,
            &self.segments,
            q,
            k,
            v,
            &mut out,
            &mut lse,
        );
        (out, lse)
    }

    fn run(&self, pool: &Pool) -> Results<E> {
        let (out, lse) = self.forward(pool);
        let [q, k, v] = self.inputs();
        let kv = self.kv_tokens * self.shape.kv_heads * self.shape.head_dim;
        let mut grads = [out.len(), kv, kv].map(|len| vec![E::from_f64(77.0); len]);
        let [dq, dk, dv] = &mut grads;
        attention_backward(
            pool,
            &self.shape,
            &self.segments,
            q,
            k,
            v,
            &out,
            &lse,
            &self.dout,
            dq,
            dk,
            dv,
        );
        Results { out, lse, grads }
    }

    /// Whole matrices of scores, in double precision.
    fn naive(&self) -> Results<f64> {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
            scale,
            softcap,
            window,
        } = self.shape;
        let [q, k, v] = self.inputs();
        let widen = |x: &[E]| x.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut out = vec![0.0; self.tokens * heads * head_dim];
        let mut lse = vec![0.0; self.tokens * heads];
        let kv = self.kv_tokens * kv_heads * head_dim;
        let mut grads = [vec![77.0; out.len()], vec![77.0; kv], vec![77.0; kv]];
        for s in &self.segments {
            let width = kv_heads * head_dim;
            for grad in &mut grads[1..] {
                grad[s.kv_start * width..(s.kv_start + s.kv_len) * width].fill(0.0);
            }
            for (head, i) in (0..heads).flat_map(|head| (0..s.q_len).map(move |i| (head, i))) {
                let kv_head = head * kv_heads / heads;
                let row = s.q_start + i;
                let query = widen(q.head(row, head, head_dim));
                let position = s.kv_len - s.q_len + i;
                let sees = |j: usize| j <= position && window.is_none_or(|w| j + w > position);
                let keys: Vec<_> = (0..s.kv_len)
                    .filter(|&j| sees(j))
                    .map(|j| s.kv_start + j)
                    .collect();
                let raw: Vec<f64> = keys
                    .iter()
                    .map(|&t| f64::from(scale) * dot(&query, &widen(k.head(t, kv_head, head_dim))))
                    .collect();
                let cap = |x: f64| softcap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh());
                let max = raw.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(cap(x)));
                let total: f64 = raw.iter().map(|&x| (cap(x) - max).exp()).sum();
                let p: Vec<f64> = raw.iter().map(|&x| (cap(x) - max).exp() / total).collect();
                lse[head * self.tokens + row] = max + total.ln();
                let at = (row * heads + head) * head_dim;
                for (p, &t) in p.iter().zip(&keys) {
                    for (o, v) in out[at..at + head_dim]
                        .iter_mut()
                        .zip(v.head(t, kv_head, head_dim))
                    {
                        *o += p * v.to_f64();
                    }
                }
                let dout = widen(&self.dout[at..at + head_dim]);
                let dp: Vec<f64> = keys
                    .iter()
                    .map(|&t| dot(&dout, &widen(v.head(t, kv_head, head_dim))))
                    .collect();
                let mean = dot(&p, &dp);
                grads[0][at..at + head_dim].fill(0.0);
                for n in 0..keys.len() {
                    let slope =
                        softcap.map_or(1.0, |c| 1.0 - (raw[n] / f64::from(c)).tanh().powi(2));
                    let ds = p[n] * (dp[n] - mean) * slope * f64::from(scale);
                    let key = k.head(keys[n], kv_head, head_dim);
                    let kv_at = (keys[n] * kv_heads + kv_head) * head_dim;
                    for c in 0..head_dim {
                        grads[0][at + c] += ds * key[c].to_f64();
                        grads[1][kv_at + c] += ds * query[c];
                        grads[2][kv_at + c] += p[n] * dout[c];
                    }
                }
            }
        }
        Results { out, lse, grads }
    }
}

/// Largest difference, relative to the largest number expected.
fn error<E: Element>(got: &[E], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
    let far = |(g, w): (&E, &f64)| {
        if g.to_f64().is_nan() {
            f64::INFINITY
        } else {
            (g.to_f64() - w).abs()
        }
    };
    got.iter().zip(want).map(far).fold(0.0, f64::max) / size
}

fn check<E: Element>(shape: AttentionShape, segments: &[Segment], tolerance: f64) {
    let case = Case::<E>::new(shape, segments.to_vec());
    let want = case.naive();
    for &level in Level::supported() {
        let got = case.run(&Pool::with_level(1, level));
        let errors = [
            ("out", error(&got.out, &want.out)),
            ("lse", error(&got.lse, &want.lse)),
            ("dq", error(&got.grads[0], &want.grads[0])),
            ("dk", error(&got.grads[1], &want.grads[1])),
            ("dv", error(&got.grads[2], &want.grads[2])),
        ];
        for (name, error) in errors {
            assert!(
                error <= tolerance,
                "{name} {level} {:?} {shape:?} {segments:?}: {error:e}",
                E::DTYPE
            );
        }
        for threads in [2, 3] {
            let again = case.run(&Pool::with_level(threads, level));
            assert!(
                again == got,
                "{threads} threads differ: {level} {:?} {shape:?} {segments:?}",
                E::DTYPE
            );
        }
    }
}

/// Shapes of heads, and batches of segments, that reach every edge.
fn cases() -> Vec<(AttentionShape, Vec<Segment>)> {
    let mut cases = Vec::new();
    for (heads, kv_heads, head_dim) in [
        (2, 2, 8),
        (4, 2, 16),
        (2, 1, 64),
        (3, 3, 80),
        (8, 1, 96),
        (2, 2, 128),
        (2, 1, 256),
        (1, 1, 1),
        (2, 2, 37),
    ] {
        let shape = shape(heads, kv_heads, head_dim);
        cases.push((shape, vec![Segment::whole(0, 70)]));
        cases.push((
            shape,
            vec![
                segment(0, 3, 0, 67),
                segment(3, 1, 67, 130),
                segment(4, 65, 197, 65),
            ],
        ));
    }
    for window in [1, 5, 64, 100, 1000] {
        let shape = AttentionShape {
            window: Some(window),
            ..shape(4, 2, 16)
        };
        cases.push((
            shape,
            vec![
                Segment::whole(0, 33),
                Segment::whole(33, 200),
                segment(240, 5, 240, 150),
            ],
        ));
    }
    for softcap in [0.5, 50.0] {
        let shape = AttentionShape {
            softcap: Some(softcap),
            scale: 0.7,
            window: Some(40),
            ..shape(2, 1, 24)
        };
        cases.push((shape, vec![Segment::whole(0, 100)]));
    }
    let lengths = [1, 2, 15, 16, 17, 63, 64, 65, 129];
    let starts = lengths
        .iter()
        .scan(0, |end, len| Some(std::mem::replace(end, *end + len)));
    cases.push((
        shape(6, 2, 32),
        starts
            .zip(lengths)
            .map(|(at, len)| Segment::whole(at, len))
            .collect(),
    ));
    cases.push((
        shape(6, 2, 32),
        vec![
            Segment::whole(0, 0),
            Segment::whole(0, 9),
            segment(12, 0, 9, 4),
        ],
    ));
    cases.push((shape(2, 2, 8), vec![]));
    cases
}

#[test]
fn agrees_with_a_naive_softmax() {
    for (shape, segments) in cases() {
        check::<f64>(shape, &segments, 1e-12);
        check::<f32>(shape, &segments, 1e-5);
        check::<bf16>(shape, &segments, 2e-2);
        check::<f16>(shape, &segments, 3e-3);
    }
}

#[test]
fn gradients_are_finite_differences() {
    let pool = Pool::new(1);
    let plain = shape(4, 2, 6);
    let odd = AttentionShape {
        softcap: Some(1.5),
        window: Some(5),
        ..plain
    };
    for shape in [plain, odd] {
        let case = Case::<f64>::new(shape, vec![Segment::whole(0, 4), segment(4, 5, 4, 9)]);
        let loss = |case: &Case<f64>| -> f64 {
            case.forward(&pool)
                .0
                .iter()
                .zip(&case.dout)
                .map(|(o, d)| o * d)
                .sum()
        };
        let grads = case.run(&pool).grads;
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = shape;
        let width = (heads + 2 * kv_heads) * head_dim;
        for at in 0..case.qkv.len() {
            let (row, column) = (at / width, at % width);
            let head = column / head_dim;
            let (which, heads, head) = match head.checked_sub(heads) {
                None => (0, heads, head),
                Some(head) => (1 + head / kv_heads, kv_heads, head % kv_heads),
            };
            let tokens = if which == 0 {
                case.tokens
            } else {
                case.kv_tokens
            };
            if row >= tokens {
                continue;
            }
            let difference = |step: f64| {
                let mut moved = case.clone();
                moved.qkv[at] += step;
                loss(&moved)
            };
            let want = (difference(1e-5) - difference(-1e-5)) / 2e-5;
            let got = grads[which][(row * heads + head) * head_dim + column % head_dim];
            assert!(
                (got - want).abs() < 1e-8,
                "{shape:?} row {row} column {column}: {got} and {want}"
            );
        }
    }
}

/// A prompt whole, in chunks, one token at a time and next to other sequences.
fn check_cuts<E: Element>(shape: AttentionShape, len: usize) {
    let whole = Case::<E>::new(shape, vec![Segment::whole(0, len)]);
    let width = shape.heads * shape.head_dim;
    for &level in Level::supported() {
        let pool = Pool::with_level(2, level);
        let (want_out, want_lse) = whole.forward(&pool);
        for chunk in [1, 7, 16, 50, 64, 100] {
            let mut out = vec![E::default(); len * width];
            for start in (0..len).step_by(chunk) {
                let q_len = chunk.min(len - start);
                // A second, unrelated sequence before this one.
                let cut = vec![
                    segment(0, 3, 5, 20),
                    segment(start + 3, q_len, 0, start + q_len),
                ];
                let mut case = Case {
                    segments: cut,
                    tokens: start + q_len + 3,
                    ..whole.clone()
                };
                let stride = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
                let mut q = vec![E::default(); 3 * stride];
                q.extend_from_slice(&whole.qkv);
                let [_, k, v] = whole.inputs();
                case.qkv = q;
                let mut part = vec![E::default(); case.tokens * width];
                let mut lse = vec![E::Acc::ZERO; case.tokens * shape.heads];
                attention(
                    &pool,
                    &shape,
                    &case.segments,
                    case.inputs()[0],
                    k,
                    v,
                    &mut part,
                    &mut lse,
                );
                out[start * width..][..q_len * width].copy_from_slice(&part[(start + 3) * width..]);
                for head in 0..shape.heads {
                    let got = &lse[(head + 1) * case.tokens - q_len..][..q_len];
                    assert_eq!(
                        got,
                        &want_lse[head * len + start..][..q_len],
                        "{level} {shape:?} chunk {chunk}"
                    );
                }
            }
            assert!(
                out == want_out,
                "{level} {:?} {shape:?} chunk {chunk}",
                E::DTYPE
            );
        }
    }
}

#[test]
fn bits_do_not_depend_on_how_a_prompt_is_cut() {
    for (window, softcap) in [(None, None), (Some(30), None), (Some(90), Some(5.0))] {
        for (heads, kv_heads, head_dim) in [(2, 2, 64), (8, 1, 40), (5, 1, 16), (4, 2, 128)] {
            let shape = AttentionShape {
                window,
                softcap,
                ..shape(heads, kv_heads, head_dim)
            };
            check_cuts::<f32>(shape, 203);
            check_cuts::<bf16>(shape, 203);
            check_cuts::<f16>(shape, 203);
        }
    }
}

/// Queries of a paged batch: two sequences whose pages lie anywhere, written in two parts.
fn check_pages<E: Element>(shape: AttentionShape, kind: KvType, tolerance: f64) {
    let cuts = vec![segment(0, 10, 0, 150), segment(10, 80, 192, 80)];
    let case = Case::<E>::new(shape, cuts);
    let table = [5u32, 0, 3, 1, 4];
    let rows: Vec<usize> = (0..150).chain(192..272).collect();
    let slot = |row: usize| table[row / PAGE] * PAGE as u32 + (row % PAGE) as u32;
    let [q, k, v] = case.inputs();
    let mut first_bits = None;
    for &level in Level::supported() {
        let pool = Pool::with_level(2, level);
        let (want, want_lse) = case.forward(&pool);
        let mut kv = PagedKv::new(&Memory::new(), kind, shape.kv_heads, shape.head_dim, 7);
        for part in [&rows[..100], &rows[100..]] {
            let slots: Vec<u32> = part.iter().map(|&row| slot(row)).collect();
            let pick = |x: Rows<'_, E>| -> Vec<E> {
                let width = shape.kv_heads * shape.head_dim;
                let row = |&row: &usize| x.data[row * x.stride..][..width].to_vec();
                part.iter().flat_map(row).collect()
            };
            let (k, v) = (pick(k), pick(v));
            let width = shape.kv_heads * shape.head_dim;
            kv.write(&pool, Rows::new(&k, width), Rows::new(&v, width), &slots);
        }
        let run = |kv: &PagedKv, table: &[u32], segments: &[Segment]| {
            let (mut out, mut lse) = (vec![E::default(); want.len()], want_lse.clone());
            attention_paged(&pool, &shape, segments, q, kv, table, &mut out, &mut lse);
            (out, lse)
        };
        let (out, lse) = run(&kv, &table, &case.segments);
        if kind == KvType::Plain(E::DTYPE) {
            assert!(out == want && lse == want_lse, "{level} {shape:?} {kind}");
        }
        let exact: Vec<f64> = want.iter().map(|x| x.to_f64()).collect();
        let error = error(&out, &exact);
        assert!(error < tolerance, "{level} {shape:?} {kind}: {error}");
        // One query at a time, after a page has moved.
        kv.copy_page(3, 6);
        let first = [0, 1, 9].map(|i| (i, 141 + i, 0));
        let second = [0, 14, 63, 64, 79].map(|i| (10 + i, 1 + i, 192));
        for (i, kv_len, kv_start) in first.into_iter().chain(second) {
            let one = [segment(i, 1, kv_start, kv_len)];
            let (part, part_lse) = run(&kv, &[5, 0, 6, 1, 4], &one);
            let width = shape.heads * shape.head_dim;
            let at = i * width..(i + 1) * width;
            assert!(
                part[at.clone()] == out[at],
                "{level} {shape:?} {kind} query {i}"
            );
            assert!(part_lse[i] == lse[i], "{level} {shape:?} {kind} query {i}");
        }
        if level < Level::Avx512 {
            continue;
        }
        let first_bits = first_bits.get_or_insert_with(|| out.clone());
        #[cfg(target_arch = "x86_64")]
        if on_tiles::<E>(level, &shape, &Source::Pages(&kv, &table)) {
            let exact: Vec<f64> = first_bits.iter().map(|x| x.to_f64()).collect();
            // Queries and exponentials of 8 bits.
            let most = 1.0 / 128.0;
            let error = super::tests::error(&out, &exact);
            assert!(error < most, "{level} {shape:?} {kind}: {error}");
            continue;
        }
        assert!(
            *first_bits == out,
            "{level} {shape:?} {kind}: other bits than another vector level"
        );
    }
}

#[test]
fn pages_hold_the_same_rows() {
    for (window, softcap) in [(None, None), (Some(100), Some(5.0))] {
        for (heads, kv_heads, head_dim) in [(4, 2, 24), (2, 2, 64), (16, 1, 32), (3, 1, 128)] {
            let shape = AttentionShape {
                window,
                softcap,
                ..shape(heads, kv_heads, head_dim)
            };
            check_pages::<f64>(shape, KvType::Plain(DType::F64), 1e-12);
            check_pages::<f64>(shape, KvType::Int8, 0.05);
            check_pages::<f32>(shape, KvType::Plain(DType::F32), 1e-6);
            check_pages::<f32>(shape, KvType::Plain(DType::F16), 5e-3);
            check_pages::<f32>(shape, KvType::Plain(DType::Bf16), 2e-2);
            check_pages::<f32>(shape, KvType::Int8, 0.05);
            check_pages::<bf16>(shape, KvType::Plain(DType::Bf16), 1e-6);
            check_pages::<bf16>(shape, KvType::Int8, 0.06);
            check_pages::<f16>(shape, KvType::Plain(DType::F16), 1e-6);
        }
    }
}

#[test]
fn a_number_that_is_none_is_not_hidden_by_int8() {
    for (len, width) in [(2, 16), (2, 64), (5, 64)] {
        let shape = shape(1, 1, width);
        let mut case = Case::<f32>::new(shape, vec![segment(0, len, 0, len)]);
        case.qkv[width] = f32::INFINITY;
        case.qkv[2 * width] = f32::INFINITY;
        let [q, k, v] = case.inputs();
        let mut slots: Vec<u32> = (0..len as u32).collect();
        for &level in Level::supported() {
            let pool = Pool::with_level(1, level);
            let mut kv = PagedKv::new(&Memory::new(), KvType::Int8, 1, width, 1);
            let run = |kv: &PagedKv, tokens: usize| {
                let (mut out, mut lse) = (vec![0.0; len * width], vec![0.0; len]);
                let cut = [segment(0, tokens, 0, tokens)];
                attention_paged(&pool, &shape, &cut, q, kv, &[0], &mut out, &mut lse);
                out
            };
            kv.write(&pool, k, v, &slots);
            let out = run(&kv, len);
            assert!(out[0].is_nan(), "{level} {len} {width}: {}", out[0]);
            // What another sequence has left behind is nobody's.
            slots.rotate_right(1);
            kv.write(&pool, k, v, &slots);
            let out = run(&kv, len - 1);
            assert!(
                out.iter().all(|x| x.is_finite()),
                "{level} {len} {width}: {out:?}"
            );
            slots.rotate_left(1);
        }
    }
}

/// Scores so large and so negative that exponentials over- and underflow without the running maximum.
#[test]
fn extreme_scores_stay_finite() {
    let mut case = Case::<f32>::new(shape(1, 1, 16), vec![Segment::whole(0, 150)]);
    case.qkv.iter_mut().for_each(|x| *x *= 1e4);
    let want = case.naive();
    for &level in Level::supported() {
        let got = case.run(&Pool::with_level(1, level));
        assert!(error(&got.out, &want.out) < 1e-4, "{level}");
        assert!(got.grads.iter().flatten().all(|x| x.is_finite()), "{level}");
    }
}
