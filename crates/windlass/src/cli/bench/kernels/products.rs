//! Matrix products and attention: what binds them is arithmetic, save for a single row.

use super::measure::{Bench, Work};
use windlass::tensor::kernels::Element;
use windlass::tensor::kernels::attention::{
    AttentionShape, Rows, Segment, attention as forward, attention_backward,
};
use windlass::tensor::kernels::gemm::{
    Epilogue, Layout, Mat, gemm as product, gemm_bytes, gemm_flops,
};

/// Rows of a batch.
const TOKENS: usize = 2048;
/// Width of the model whose projections are timed.
const WIDTH: usize = 768;

/// Forward (NT), input gradient (NN) and weight gradient (TN) of projections; squares; single rows.
pub fn gemm<E: Element>(bench: &mut Bench<'_>) {
    for width in [768, 2048, 3072, 32000] {
        time::<E>(bench, Layout::Nt, (TOKENS, width, WIDTH));
        time::<E>(bench, Layout::Nn, (TOKENS, WIDTH, width));
        time::<E>(bench, Layout::Tn, (width, WIDTH, TOKENS));
    }
    for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
        time::<E>(bench, layout, (2048, 2048, 2048));
    }
    for (n, k) in [(3072, 768), (4096, 4096), (32000, 768)] {
        time::<E>(bench, Layout::Nt, (1, n, k));
    }
}

fn time<E: Element>(bench: &mut Bench<'_>, layout: Layout, (m, n, k): (usize, usize, usize)) {
    let name = match layout {
        Layout::Nt => "gemm nt",
        Layout::Nn => "gemm nn",
        Layout::Tn => "gemm tn",
    };
    let shape = format!("{m} x {n} x {k}");
    if !bench.wants(name, &shape) {
        return;
    }
    let (a, b) = (bench.numbers::<E>(m * k), bench.numbers::<E>(n * k));
    let mut c = bench.numbers::<E>(m * n);
    let a = Mat {
        data: &a[..],
        stride: if layout == Layout::Tn { m } else { k },
    };
    let b = Mat {
        data: &b[..],
        stride: if layout == Layout::Nt { k } else { n },
    };
    let work = Work {
        flops: gemm_flops(m, n, k) as f64,
        bytes: gemm_bytes::<E, E>(m, n, k) as f64,
        tiles: true,
    };
    bench.time(name, &shape, E::DTYPE, work, |pool| {
        product(
            pool,
            layout,
            m,
            n,
            k,
            a,
            b,
            &mut c[..],
            n,
            Epilogue::default(),
        );
    });
}

/// Forward and backward passes over packed sequences, and one query of a long sequence.
pub fn attention<E: Element>(bench: &mut Bench<'_>) {
    let shape = |heads, kv_heads| AttentionShape {
        heads,
        kv_heads,
        head_dim: 64,
        scale: 0.125,
        softcap: None,
        window: None,
    };
    for (sequences, length, heads, kv_heads) in [(4, 512, 12, 12), (1, 2048, 32, 4)] {
        let segments: Vec<Segment> = (0..sequences)
            .map(|i| Segment::whole(i * length, length))
            .collect();
        let name = format!("{sequences} x {length}, {heads}/{kv_heads} heads of 64");
        passes::<E>(bench, &name, &shape(heads, kv_heads), &segments);
    }
    let last = Segment {
        q_start: 0,
        q_len: 1,
        kv_start: 0,
        kv_len: 16384,
    };
    let name = "1 of 16384, 32/8 heads of 64";
    passes::<E>(bench, name, &shape(32, 8), &[last]);
}

fn passes<E: Element>(
    bench: &mut Bench<'_>,
    name: &str,
    shape: &AttentionShape,
    segments: &[Segment],
) {
    let tokens: usize = segments.iter().map(|s| s.q_len).sum();
    let kv_tokens: usize = segments.iter().map(|s| s.kv_len).sum();
    const NAMES: [&str; 2] = ["attention", "attention_backward"];
    if !NAMES
        .map(|kernel| bench.wants(kernel, name))
        .contains(&true)
    {
        return;
    }
    let width = shape.heads * shape.head_dim;
    let kv_width = shape.kv_heads * shape.head_dim;
    let (q, dout) = (
        bench.numbers::<E>(tokens * width),
        bench.numbers::<E>(tokens * width),
    );
    let (k, v) = (
        bench.numbers::<E>(kv_tokens * kv_width),
        bench.numbers::<E>(kv_tokens * kv_width),
    );
    let (mut out, mut dq) = (
        bench.numbers::<E>(tokens * width),
        bench.numbers::<E>(tokens * width),
    );
    let (mut dk, mut dv) = (
        bench.numbers::<E>(kv_tokens * kv_width),
        bench.numbers::<E>(kv_tokens * kv_width),
    );
    let mut lse = bench.numbers::<E::Acc>(tokens * shape.heads);
    let q = Rows::new(&q[..], width);
    let (k, v) = (Rows::new(&k[..], kv_width), Rows::new(&v[..], kv_width));
    let sums = (tokens * shape.heads * size_of::<E::Acc>()) as f64;
    let rows = ((tokens * width + kv_tokens * kv_width) * size_of::<E>()) as f64;
    let work = Work {
        flops: shape.flops(segments),
        bytes: 2.0 * rows + sums,
        tiles: true,
    };
    bench.time(NAMES[0], name, E::DTYPE, work, |pool| {
        forward(pool, shape, segments, q, k, v, &mut out, &mut lse);
    });
    if tokens < kv_tokens {
        return;
    }
    // The backward pass needs what the forward pass leaves, timed or not.
    forward(bench.pool(), shape, segments, q, k, v, &mut out, &mut lse);
    let work = Work {
        flops: 2.5 * shape.flops(segments),
        bytes: 4.0 * rows + sums,
        tiles: true,
    };
    bench.time(NAMES[1], name, E::DTYPE, work, |pool| {
        attention_backward(
            pool, shape, segments, q, k, v, &out, &lse, &dout, &mut dq, &mut dk, &mut dv,
        );
    });
}
