//! GB/s of the row kernels at the shapes of models, beside the machine's read and write ceilings.
//!
//! `cargo run --release -p windlass-kernels --example rows_bench [threads] [filter] [million parameters]`: best and
//! median of repeated calls, bytes as [`windlass_kernels::cost`] counts them. Activations of one layer stay in the last
//! cache; the optimizer's states do not. `WINDLASS_KERNELS` forces a level.

use std::time::Instant;

use half::bf16;
use windlass_kernels::activation::{self, Activation};
use windlass_kernels::cost::{self, Cost};
use windlass_kernels::cross_entropy::cross_entropy_rows;
use windlass_kernels::memory::{Buffer, Category, Memory};
use windlass_kernels::optim::{self, Adam, Grad, Lion, Moment, Rule, Sgd, Values};
use windlass_kernels::pool::Pool;
use windlass_kernels::rope::{Rope, rope};
use windlass_kernels::{Element, Float};
use windlass_kernels::{cast, elementwise, embedding, norm, reduce, roofline, softmax};

struct Bench {
    pool: Pool,
    filter: String,
    /// Bytes a second that the machine reads.
    ceiling: f64,
}

impl Bench {
    fn row(&self, name: &str, cost: Cost, mut call: impl FnMut(&Pool)) {
        if !name.contains(&self.filter) {
            return;
        }
        call(&self.pool);
        let calls = (2e9 / cost.bytes() as f64).clamp(7.0, 200.0) as usize;
        let mut times: Vec<f64> = (0..calls)
            .map(|_| {
                let start = Instant::now();
                call(&self.pool);
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let speed = |seconds: f64| cost.bytes() as f64 / seconds / 1e9;
        let (best, median) = (speed(times[0]), speed(times[calls / 2]));
        let part = median * 1e9 / self.ceiling * 100.0;
        println!(
            "{name:<44} {:>9.1} us {best:>7.1} {median:>7.1} GB/s {part:>4.0}%",
            times[calls / 2] * 1e6
        );
    }
}

fn numbers<E: Element>(len: usize) -> Vec<E> {
    (0..len)
        .map(|i| E::from_f64((i * 2_654_435_761 % 1009) as f64 / 504.0 - 1.0))
        .collect()
}

fn rows_of<E: Element>(b: &Bench, rows: usize, cols: usize) {
    let n = rows * cols;
    let (x, dy, w) = (numbers::<E>(n), numbers::<E>(n), numbers::<E>(cols));
    let (mut y, mut z) = (numbers::<E>(n), numbers::<E>(n));
    let (mut mean, mut inv) = (vec![E::Acc::ZERO; rows], vec![E::Acc::ONE; rows]);
    let (mut dw, mut db) = (vec![E::Acc::ZERO; cols], vec![E::Acc::ZERO; cols]);
    let name = |kernel: &str| format!("{kernel} {} {rows}x{cols}", E::DTYPE);
    b.row(&name("rms_norm"), cost::rms_norm::<E>(rows, cols), |p| {
        norm::rms_norm(p, &x, &w, 0.0, 1e-5, &mut y, &mut inv);
    });
    b.row(
        &name("rms_norm_backward"),
        cost::rms_norm_backward::<E>(rows, cols),
        |p| {
            norm::rms_norm_backward(p, &x, &w, 0.0, &inv, &dy, &mut y, false, &mut dw);
        },
    );
    b.row(
        &name("layer_norm"),
        cost::layer_norm::<E>(rows, cols),
        |p| {
            norm::layer_norm(p, &x, &w, Some(&w), 1e-5, &mut y, &mut mean, &mut inv);
        },
    );
    b.row(
        &name("layer_norm_backward"),
        cost::layer_norm_backward::<E>(rows, cols),
        |p| {
            norm::layer_norm_backward(
                p,
                &x,
                &w,
                &mean,
                &inv,
                &dy,
                &mut y,
                false,
                &mut dw,
                Some(&mut db),
            );
        },
    );
    b.row(&name("softmax"), cost::softmax::<E>(rows, cols), |p| {
        softmax::softmax(p, &x, cols, &mut y)
    });
    b.row(
        &name("softmax_backward"),
        cost::softmax_backward::<E>(rows, cols),
        |p| {
            softmax::softmax_backward(p, &x, &dy, cols, &mut y);
        },
    );
    b.row(&name("sum_rows"), cost::sum_rows::<E>(rows, cols), |p| {
        elementwise::sum_rows(p, &x, &mut dw)
    });
    b.row(&name("transpose"), cost::transpose::<E>(rows, cols), |p| {
        elementwise::transpose(p, &x, rows, cols, &mut y);
    });
    let (head_dim, positions) = (64, (0..rows as u32).collect::<Vec<_>>());
    let angles = (0..rows * head_dim / 2).map(|i| i as f32 * 0.01);
    let (cos, sin) = angles
        .map(|a| (a.cos(), a.sin()))
        .unzip::<f32, f32, Vec<_>, Vec<_>>();
    let shape = Rope {
        stride: cols,
        heads: cols / head_dim,
        head_dim,
        rotary: head_dim,
        interleaved: false,
        inverse: false,
    };
    b.row(&name("rope"), cost::rope::<E>(rows, cols), |p| {
        rope(p, &mut y, &shape, &cos, &sin, &positions)
    });
    let ids: Vec<u32> = (0..rows).map(|i| (i * 7919 % 5000) as u32).collect();
    let (weights, mut dtable) = (numbers::<E>(5000 * cols), vec![E::Acc::ZERO; 5000 * cols]);
    b.row(&name("gather"), cost::gather::<E>(rows, cols), |p| {
        embedding::gather(p, &weights, &ids, 1.0, &mut z)
    });
    b.row(
        &name("scatter_add"),
        cost::scatter_add::<E>(rows, cols),
        |p| {
            embedding::scatter_add(p, &dy, &ids, 1.0, &mut dtable);
        },
    );
}

fn elements_of<E: Element>(b: &Bench, n: usize) {
    let (x, u, dy) = (numbers::<E>(n), numbers::<E>(n), numbers::<E>(n));
    let (mut y, mut z, mut f) = (numbers::<E>(n), numbers::<E>(n), vec![0f32; n]);
    let name = |kernel: &str| format!("{kernel} {} {n}", E::DTYPE);
    for kind in [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
    ] {
        b.row(&name(&format!("{kind:?}")), cost::activation::<E>(n), |p| {
            activation::activation(p, kind, &x, &mut y)
        });
        b.row(
            &name(&format!("{kind:?}_backward")),
            cost::activation_backward::<E>(n),
            |p| {
                activation::activation_backward(p, kind, &x, &dy, &mut y);
            },
        );
    }
    b.row(&name("gated_silu"), cost::gated::<E>(n), |p| {
        activation::gated(p, Activation::Silu, &x, &u, &mut y)
    });
    b.row(
        &name("gated_silu_backward"),
        cost::gated_backward::<E>(n),
        |p| {
            activation::gated_backward(p, Activation::Silu, &x, &u, &dy, &mut y, &mut z);
        },
    );
    b.row(&name("add"), cost::binary::<E>(n), |p| {
        elementwise::add(p, &x, &u, &mut y)
    });
    b.row(&name("axpy"), cost::axpy::<E>(n), |p| {
        elementwise::axpy(p, 1e-3, &x, &mut y)
    });
    b.row(&name("scale"), cost::scale::<E>(n), |p| {
        elementwise::scale(p, 0.5, &x, &mut y)
    });
    b.row(&name("fill"), cost::fill::<E>(n), |p| {
        elementwise::fill(p, E::default(), &mut y)
    });
    b.row(&name("cast to f32"), cost::cast::<E, f32>(n), |p| {
        cast::cast(p, &x, &mut f)
    });
    b.row(&name("cast from f32"), cost::cast::<f32, E>(n), |p| {
        cast::cast(p, &f, &mut y)
    });
    b.row(&name("sum_squares"), cost::sum_squares::<E>(n), |p| {
        std::hint::black_box(reduce::sum_squares(p, &x));
    });
    b.row(&name("dot"), cost::dot::<E>(n), |p| {
        std::hint::black_box(reduce::dot(p, &x, &u));
    });
    b.row(
        &name("count_nonfinite"),
        cost::count_nonfinite::<E>(n),
        |p| {
            std::hint::black_box(reduce::count_nonfinite(p, &x));
        },
    );
}

fn cross_entropy_of<E: Element>(b: &Bench, rows: usize, cols: usize) {
    let (mut z, mut d) = (numbers::<E::Acc>(rows * cols), numbers::<E>(rows * cols));
    let (targets, mut loss) = (vec![5; rows], vec![E::Acc::ZERO; rows]);
    let name = format!("cross_entropy {} {rows}x{cols}", E::DTYPE);
    b.row(&name, cost::cross_entropy_rows::<E>(rows, cols), |p| {
        cross_entropy_rows(
            p,
            &mut z,
            cols,
            None,
            &targets,
            &mut loss,
            Some((&mut d, 1.0)),
        );
    });
}

/// [`numbers`] where training keeps its tensors: on huge pages.
fn pooled<E: Element>(memory: &Memory, len: usize) -> Buffer {
    let mut buffer = memory.alloc(len * size_of::<E>(), Category::Optimizer);
    buffer.as_mut_slice().copy_from_slice(&numbers::<E>(len));
    buffer
}

fn optimizers(b: &Bench, n: usize) {
    let memory = Memory::new();
    let mut buffers: [Buffer; 4] = [(); 4].map(|()| pooled::<f32>(&memory, n));
    let [p, g, m, v] = buffers.each_mut().map(|b| b.as_mut_slice::<f32>());
    m.fill(0.0);
    v.fill(0.0);
    let mut halves: [Buffer; 2] = [(); 2].map(|()| pooled::<bf16>(&memory, n));
    let [hi, half_g] = halves.each_mut().map(|b| b.as_mut_slice::<bf16>());
    let mut lo = vec![0i16; n];
    let adamw = Rule::Adam(Adam {
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
    let sgd = Rule::Sgd(Sgd {
        lr: 1e-4,
        momentum: 0.9,
        dampening: 0.0,
        nesterov: true,
        weight_decay: 0.0,
        step: 10,
        grad_scale: 0.5,
    });
    let lion = Rule::Lion(Lion {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.99,
        weight_decay: 0.1,
        grad_scale: 0.5,
    });
    let name = |kernel: &str| format!("{kernel} {}M", n / 1_000_000);
    for (kernel, rule) in [("adamw", &adamw), ("sgd", &sgd), ("lion", &lion)] {
        let moments = &[4, 4][..rule.moments()];
        let work = |grad| cost::optimizer(n, 4, grad, moments);
        let mut states = [Moment::F32(&mut *m), Moment::F32(&mut *v)];
        let states = &mut states[..rule.moments()];
        b.row(&name(&format!("{kernel} f32")), work(4), |pool| {
            optim::step(pool, rule, Values::F32(&mut *p), Grad::F32(&*g), states)
        });
        b.row(&name(&format!("{kernel} f32 clears")), work(8), |pool| {
            optim::step(
                pool,
                rule,
                Values::F32(&mut *p),
                Grad::TakeF32(&mut *g),
                states,
            )
        });
        let mut split = |pool: &_, grad: Grad<'_>, states: &mut [Moment<'_>]| {
            let (high, low) = (&mut hi[..], &mut lo[..]);
            optim::step(pool, rule, Values::Split { high, low }, grad, states);
        };
        b.row(&name(&format!("{kernel} split")), work(4), |pool| {
            split(pool, Grad::F32(&*g), states);
        });
        b.row(&name(&format!("{kernel} split, bf16 g")), work(2), |pool| {
            split(pool, Grad::Bf16(&*half_g), states);
        });
    }
    let blocks = n.div_ceil(optim::BLOCK);
    let (mut bm, mut bv) = (vec![bf16::ZERO; n], vec![bf16::ZERO; n]);
    let work = cost::optimizer(n, 4, 4, &[2, 2]);
    b.row(&name("adamw f32, bf16 moments"), work, |pool| {
        let states = &mut [Moment::Bf16(&mut bm), Moment::Bf16(&mut bv)];
        optim::step(pool, &adamw, Values::F32(&mut *p), Grad::F32(&*g), states);
    });
    let (mut mc, mut vc) = (vec![0u8; n], vec![0u8; n]);
    let (mut ms, mut vs) = (vec![0f32; blocks], vec![0f32; blocks]);
    let work = cost::optimizer(n, 4, 4, &[1, 1]);
    b.row(&name("adamw f32, 8-bit moments"), work, |pool| {
        let (codes, scales) = (&mut mc[..], &mut ms[..]);
        let first = Moment::Q8 { codes, scales };
        let (codes, scales) = (&mut vc[..], &mut vs[..]);
        let states = &mut [first, Moment::Q8 { codes, scales }];
        optim::step(pool, &adamw, Values::F32(&mut *p), Grad::F32(&*g), states);
    });
    b.row(
        &name("sum_squares f32"),
        cost::sum_squares::<f32>(n),
        |pool| {
            std::hint::black_box(reduce::sum_squares(pool, g));
        },
    );
    b.row(&name("add f32"), cost::binary::<f32>(n), |pool| {
        elementwise::add(pool, g, v, m)
    });
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments
        .next()
        .map_or(1, |t| t.parse().expect("threads is a number"));
    let filter = arguments.next().unwrap_or_default();
    let millions: usize = arguments
        .next()
        .map_or(50, |t| t.parse().expect("million parameters is a number"));
    let pool = Pool::new(threads);
    let mut data = vec![1f32; 64 << 20];
    let ceiling = roofline::read_bandwidth(&pool, &data, 5);
    let write = roofline::write_bandwidth(&pool, &mut data, 5);
    drop(data);
    println!(
        "{threads} threads, {}: memory reads {:.1} GB/s, writes {:.1} GB/s; best, median, % of reads",
        pool.level(),
        ceiling / 1e9,
        write / 1e9
    );
    let b = Bench {
        pool,
        filter,
        ceiling,
    };
    for (rows, cols) in [(2048, 768), (2048, 2048)] {
        rows_of::<bf16>(&b, rows, cols);
        rows_of::<f32>(&b, rows, cols);
    }
    elements_of::<bf16>(&b, 2048 * 2048);
    elements_of::<f32>(&b, 2048 * 2048);
    cross_entropy_of::<bf16>(&b, 64, 50257);
    cross_entropy_of::<f32>(&b, 64, 50257);
    optimizers(&b, millions * 1_000_000);
}
