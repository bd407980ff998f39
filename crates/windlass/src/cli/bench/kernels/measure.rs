//! Timing a call between two measurements of the machine's ceilings.

use serde::Serialize;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::time::Instant;
use windlass::tensor::kernels::cost::Cost;
use windlass::tensor::kernels::memory::Buffer;
use windlass::tensor::kernels::pool::Pool;
use windlass::tensor::kernels::{Element, roofline};
use windlass::tensor::{Category, Cpu, DType};

/// Seconds that the runs of a kernel take together, where three runs are not more.
const SECONDS: f64 = 0.25;

/// Elements that the bandwidths are measured over: more than most last-level caches hold.
const STREAM: usize = 1 << 27;

/// What the machine does at most, a second.
#[derive(Clone, Copy)]
pub struct Ceilings {
    /// Operations of fused multiply-adds.
    pub fma: f64,
    /// Operations of `bf16` tile products, where there are tiles.
    pub tiles: Option<f64>,
    /// Bytes read.
    pub read: f64,
}

/// The least work of one call.
pub struct Work {
    /// Arithmetic operations.
    pub flops: f64,
    /// Bytes read and written.
    pub bytes: f64,
    /// Whether tiles could do the arithmetic.
    pub tiles: bool,
}

impl From<Cost> for Work {
    fn from(cost: Cost) -> Self {
        Work {
            flops: cost.flops() as f64,
            bytes: cost.bytes() as f64,
            tiles: false,
        }
    }
}

/// A line of the table.
#[derive(Serialize)]
pub struct Row {
    name: &'static str,
    shape: String,
    dtype: String,
    /// The fastest run.
    seconds: f64,
    gflops: f64,
    gb_s: f64,
    /// What binds it at most: `compute` or `memory`.
    roof: &'static str,
    /// Percent of that roof.
    percent: f64,
}

/// The kernels timed so far.
pub struct Bench<'a> {
    cpu: &'a Cpu,
    data: Numbers<f32>,
    only: Option<String>,
    quiet: bool,
    last: Ceilings,
    rows: Vec<Row>,
    names: Vec<&'static str>,
}

impl<'a> Bench<'a> {
    /// Measures the ceilings first. With `quiet` no line is printed.
    pub fn new(cpu: &'a Cpu, only: Option<String>, quiet: bool) -> Self {
        let mut bench = Bench {
            cpu,
            data: numbers(cpu, STREAM),
            only,
            quiet,
            last: Ceilings {
                fma: 0.0,
                tiles: None,
                read: 0.0,
            },
            rows: Vec::new(),
            names: Vec::new(),
        };
        bench.last = bench.measure_ceilings(4);
        bench
    }

    /// What the kernels run on.
    pub fn pool(&self) -> &'a Pool {
        &self.cpu.pool
    }

    /// The ceilings as measured last.
    pub fn ceilings(&self) -> Ceilings {
        self.last
    }

    /// The lines so far.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The names of all kernels, wanted or not.
    pub fn names(&self) -> &[&'static str] {
        &self.names
    }

    fn measure_ceilings(&self, repeats: usize) -> Ceilings {
        let pool = &self.cpu.pool;
        Ceilings {
            fma: roofline::fma_peak(pool, repeats),
            tiles: roofline::amx_peak(pool, repeats),
            read: roofline::read_bandwidth(pool, &self.data, repeats),
        }
    }

    /// Whether the user asked for a kernel at this shape.
    pub fn wants(&mut self, name: &'static str, shape: &str) -> bool {
        if !self.names.contains(&name) {
            self.names.push(name);
        }
        let full = format!("{name} {shape}");
        self.only.as_ref().is_none_or(|only| full.contains(only))
    }

    /// Numbers between -1 and 1, on the pages that training uses.
    pub fn numbers<E: Element>(&self, len: usize) -> Numbers<E> {
        numbers(self.cpu, len)
    }

    /// Bytes a second that the machine writes.
    pub fn write_bandwidth(&mut self) -> f64 {
        roofline::write_bandwidth(&self.cpu.pool, &mut self.data, 4)
    }

    /// Times `call` if the user asked for it.
    pub fn time(
        &mut self,
        name: &'static str,
        shape: &str,
        dtype: DType,
        work: impl Into<Work>,
        mut call: impl FnMut(&Pool),
    ) {
        if !self.wants(name, shape) {
            return;
        }
        let work = work.into();
        call(&self.cpu.pool);
        let (mut best, mut spent, mut runs) = (f64::INFINITY, 0.0, 0);
        while runs < 3 || (spent < SECONDS && runs < 1000) {
            let start = Instant::now();
            call(&self.cpu.pool);
            let seconds = start.elapsed().as_secs_f64();
            (best, spent, runs) = (best.min(seconds), spent + seconds, runs + 1);
        }
        let after = self.measure_ceilings(3);
        let before = std::mem::replace(&mut self.last, after);
        let compute = match (before.tiles, after.tiles) {
            (Some(a), Some(b)) if work.tiles && dtype == DType::Bf16 => a.max(b),
            _ => before.fma.max(after.fma),
        };
        let compute = work.flops / compute;
        let memory = work.bytes / before.read.max(after.read);
        let row = Row {
            name,
            shape: shape.to_owned(),
            dtype: dtype.to_string(),
            seconds: best,
            gflops: work.flops / best / 1e9,
            gb_s: work.bytes / best / 1e9,
            roof: if compute > memory {
                "compute"
            } else {
                "memory"
            },
            percent: 100.0 * compute.max(memory) / best,
        };
        if !self.quiet {
            row.print();
        }
        self.rows.push(row);
    }

    /// The first line of the table.
    pub fn print_heads() {
        println!(
            "{:<22} {:<28} {:<5} {:>11} {:>9} {:>8} {:>8} roof",
            "kernel", "shape", "type", "best", "GFLOP/s", "GB/s", "% of"
        );
    }
}

impl Row {
    fn print(&self) {
        println!(
            "{:<22} {:<28} {:<5} {:>8.3} ms {:>9.1} {:>8.1} {:>7.0}% {}",
            self.name,
            self.shape,
            self.dtype,
            self.seconds * 1e3,
            self.gflops,
            self.gb_s,
            self.percent,
            self.roof
        );
    }
}

fn numbers<E: Element>(cpu: &Cpu, len: usize) -> Numbers<E> {
    let bytes = len * size_of::<E>();
    let mut buffer = cpu.memory.alloc(bytes, Category::Workspace);
    for (i, x) in buffer.as_mut_slice::<E>().iter_mut().enumerate() {
        *x = E::from_f64((i * 2_654_435_761 % 1009) as f64 / 504.0 - 1.0);
    }
    Numbers(buffer, PhantomData)
}

/// A buffer as a slice of its elements.
pub struct Numbers<E>(Buffer, PhantomData<E>);

impl<E: Element> Deref for Numbers<E> {
    type Target = [E];
    fn deref(&self) -> &[E] {
        self.0.as_slice()
    }
}

impl<E: Element> DerefMut for Numbers<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        self.0.as_mut_slice()
    }
}
