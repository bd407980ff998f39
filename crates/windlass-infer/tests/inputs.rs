//! The inputs of matrices against a Llama written out in `f64`.

use std::collections::BTreeMap;
use std::path::Path;
use windlass_infer::inputs::input_squares;
use windlass_infer::{InferError, LoadedModel};
use windlass_store::gguf::File;
use windlass_tensor::Cpu;
use windlass_tensor::kernels::blocks::dequantize;

const WINDOW: usize = 24;
const HEADS: usize = 8;
const KEY_HEADS: usize = 4;

struct Llama {
    file: File,
    squares: BTreeMap<String, Vec<f64>>,
}

impl Llama {
    fn numbers(&self, name: &str) -> Vec<f64> {
        let info = self.file.tensor(name).unwrap();
        let mut out = vec![0f32; info.elements()];
        dequantize(info.block_type, self.file.bytes(name).unwrap(), &mut out);
        out.iter().map(|&value| f64::from(value)).collect()
    }

    /// `W x`, whose input is counted.
    fn product(&mut self, name: &str, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let matrix = self.numbers(name);
        let sums = self.squares.entry(name.to_owned()).or_default();
        sums.resize(x[0].len(), 0.0);
        for row in x {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
        }
        let dot = |w: &[f64], x: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum();
        let rows = x.iter().map(|x| {
            let weights = matrix.chunks(x.len());
            weights.map(|w| dot(w, x)).collect()
        });
        rows.collect()
    }

    fn norm(&self, name: &str, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let weights = self.numbers(name);
        let normed = |x: &Vec<f64>| {
            let square: f64 = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (square + 1e-5).sqrt();
            x.iter().zip(&weights).map(|(x, w)| x * scale * w).collect()
        };
        x.iter().map(normed).collect()
    }

    fn run(&mut self, ids: &[u32]) {
        let table = self.numbers("token_embd.weight");
        let width = table.len() / 512;
        let mut x: Vec<Vec<f64>> = ids
            .iter()
            .map(|&id| table[id as usize * width..][..width].to_vec())
            .collect();
        let add = |x: &mut [Vec<f64>], y: Vec<Vec<f64>>| {
            for (x, y) in x.iter_mut().zip(y) {
                x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
            }
        };
        for layer in 0..5 {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            let h = self.norm(&name("attn_norm"), &x);
            let q = rotated(self.product(&name("attn_q"), &h), HEADS);
            let k = rotated(self.product(&name("attn_k"), &h), KEY_HEADS);
            let v = self.product(&name("attn_v"), &h);
            let y = self.product(&name("attn_output"), &attention(&q, &k, &v));
            add(&mut x, y);
            let h = self.norm(&name("ffn_norm"), &x);
            let gate = self.product(&name("ffn_gate"), &h);
            let mut up = self.product(&name("ffn_up"), &h);
            for (up, gate) in up.iter_mut().flatten().zip(gate.iter().flatten()) {
                *up *= gate / (1.0 + (-gate).exp());
            }
            let y = self.product(&name("ffn_down"), &up);
            add(&mut x, y);
        }
    }
}

/// Neighbors turned by the angle of their place.
fn rotated(mut rows: Vec<Vec<f64>>, heads: usize) -> Vec<Vec<f64>> {
    for (place, row) in rows.iter_mut().enumerate() {
        let dim = row.len() / heads;
        for head in row.chunks_mut(dim) {
            for (i, pair) in head.chunks_mut(2).enumerate() {
                let angle = place as f64 / 10_000f64.powf(2.0 * i as f64 / dim as f64);
                let (sin, cos) = angle.sin_cos();
                let [a, b] = [pair[0], pair[1]];
                (pair[0], pair[1]) = (a * cos - b * sin, a * sin + b * cos);
            }
        }
    }
    rows
}

fn attention(q: &[Vec<f64>], k: &[Vec<f64>], v: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let dim = q[0].len() / HEADS;
    let mut out = vec![vec![0.0; q[0].len()]; q.len()];
    for (t, out) in out.iter_mut().enumerate() {
        for head in 0..HEADS {
            let q = &q[t][head * dim..][..dim];
            let at = head / (HEADS / KEY_HEADS) * dim;
            let scores: Vec<f64> = (0..=t)
                .map(|s| {
                    let dot: f64 = q.iter().zip(&k[s][at..]).map(|(q, k)| q * k).sum();
                    (dot / (dim as f64).sqrt()).exp()
                })
                .collect();
            let sum: f64 = scores.iter().sum();
            for (s, score) in scores.iter().enumerate() {
                let out = &mut out[head * dim..][..dim];
                for (out, v) in out.iter_mut().zip(&v[s][at..]) {
                    *out += score / sum * v;
                }
            }
        }
    }
    out
}

#[test]
fn squares_are_those_of_a_model_written_out() {
    let Some(data) = std::env::var_os("WINDLASS_TEST_DATA") else {
        println!("WINDLASS_TEST_DATA is not set: nothing is compared");
        return;
    };
    let path = Path::new(&data).join("models/stories260K/gguf-v3/stories260K-F32.gguf");
    let cpu = Cpu::new(2);
    let model = LoadedModel::open(&cpu, &path, None).unwrap();
    let ids: Vec<u32> = (0..3 * WINDOW as u32 + 7).map(|i| (i * 37) % 512).collect();
    let mut told = 0;
    let got = input_squares(&model, &ids, WINDOW, &mut |done| told = done).unwrap();
    assert_eq!(told, 3 * WINDOW);
    let mut llama = Llama {
        file: File::open(&path).unwrap(),
        squares: BTreeMap::new(),
    };
    for window in ids.chunks_exact(WINDOW) {
        let mut window = window.to_vec();
        window[0] = 1;
        llama.run(&window);
    }
    let names = llama.file.tensors().map(|info| &info.name);
    let mut names: Vec<&String> = names
        .filter(|name| name.starts_with("blk.") && !name.contains("norm"))
        .collect();
    names.sort();
    assert_eq!(got.keys().collect::<Vec<_>>(), names);
    for (name, got) in &got {
        assert_eq!(got.counts, [3.0 * WINDOW as f64], "{name}");
        let want = &llama.squares[name];
        let largest = want.iter().copied().fold(0.0, f64::max);
        assert_eq!(got.squares.len(), want.len(), "{name}");
        for (got, want) in got.squares.iter().zip(want) {
            let error = (got - want).abs();
            assert!(
                error <= 1e-4 * want + 1e-6 * largest,
                "{name}: {got} {want}"
            );
        }
    }
    // Packed matrices are watched too.
    let packed = path.with_file_name("stories260K-Q8_0.gguf");
    let packed = LoadedModel::open(&cpu, &packed, None).unwrap();
    let rounded = input_squares(&packed, &ids, WINDOW, &mut |_| {}).unwrap();
    for name in ["blk.0.attn_q.weight", "blk.4.ffn_down.weight"] {
        let (got, want) = (&rounded[name].squares, &got[name].squares);
        let (sum, all): (f64, f64) = (got.iter().sum(), want.iter().sum());
        assert!((sum / all - 1.0).abs() < 0.02, "{name}: {sum} {all}");
    }
    let error = input_squares(&model, &ids, 100, &mut |_| {}).unwrap_err();
    assert!(matches!(error, InferError::Setting { .. }), "{error}");
}
