//! `windlass bench --model X`: prompts and generation in tokens a second, in the columns of llama-bench, beside what the
//! memory and the byte products of the machine allow.
//!
//! The ceilings are measured in the same run: other programs change them from minute to minute.

use crate::cli::Machine;
use crate::cli::source::Source;
use anyhow::Result;
use serde_json::{Map, Value, json};
use std::time::Instant;
use windlass::infer::{LoadedModel, Session};
use windlass::store::Store;
use windlass::tensor::kernels::roofline;
use windlass::tensor::{Category, Cpu, DType, Tensor};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Tokens of the prompt, a row for each number; 0 leaves this test out
    #[arg(short = 'p', long, value_name = "N,N", value_delimiter = ',', default_values_t = [512])]
    n_prompt: Vec<usize>,
    /// Tokens to generate, a row for each number; 0 leaves this test out
    #[arg(short = 'n', long, value_name = "N,N", value_delimiter = ',', default_values_t = [128])]
    n_gen: Vec<usize>,
    /// Tokens that the sequence already has, all tests for each number
    #[arg(short = 'd', long, value_name = "N,N", value_delimiter = ',', default_values_t = [0])]
    n_depth: Vec<usize>,
    /// Numbers of threads, all tests for each of them [default: --threads]
    #[arg(
        short = 't',
        long,
        value_name = "N,N",
        value_delimiter = ',',
        conflicts_with = "threads"
    )]
    n_threads: Vec<usize>,
    /// Runs of each test, after one that does not count
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Elements that bandwidth is measured over: 512 MiB, more than caches hold.
const STREAM: usize = 1 << 27;
/// Streams of a core that are tried.
const STREAMS: [usize; 5] = [1, 2, 4, 8, 12];
/// Prompt tokens that are read at once.
const CHUNK: usize = 512;

/// What the machine does at most, a second.
struct Ceilings {
    /// Bytes read, by streams a core.
    bandwidth: Vec<(usize, f64)>,
    /// Operations of byte products, where there are such instructions.
    int8: Option<f64>,
    /// Operations of fused multiply-adds.
    fma: f64,
}

impl Ceilings {
    fn measure(model: &LoadedModel) -> Ceilings {
        let cpu = model.store.cpu();
        let mut data = Tensor::empty(cpu, [STREAM], DType::F32, Category::Workspace);
        // Pages that were never written are one and the same.
        data.as_mut_slice::<f32>().fill(1.0);
        let of = |streams| roofline::stream_bandwidth(&cpu.pool, data.as_slice(), streams, 3);
        Ceilings {
            bandwidth: STREAMS.map(|streams| (streams, of(streams))).to_vec(),
            int8: roofline::int8_peak(&cpu.pool, 5),
            fma: roofline::fma_peak(&cpu.pool, 5),
        }
    }

    fn json(&self, threads: usize) -> Value {
        let bandwidth = self.bandwidth.iter();
        let bandwidth: Map<String, Value> = bandwidth
            .map(|(streams, rate)| (streams.to_string(), (*rate).into()))
            .collect();
        json!({
            "threads": threads, "bandwidth_by_streams": bandwidth,
            "int8_operations": self.int8, "fma_operations": self.fma,
        })
    }

    fn best_bandwidth(&self) -> f64 {
        self.bandwidth
            .iter()
            .map(|(_, rate)| *rate)
            .fold(0.0, f64::max)
    }
}

/// A test and the tokens a second of each of its runs.
struct Test {
    /// Whether a prompt is read, or tokens are generated.
    prompt: bool,
    tokens: usize,
    depth: usize,
    rates: Vec<f64>,
}

impl Test {
    /// As llama-bench calls it.
    fn name(&self) -> String {
        let kind = if self.prompt { "pp" } else { "tg" };
        match self.depth {
            0 => format!("{kind}{}", self.tokens),
            depth => format!("{kind}{} @ d{depth}", self.tokens),
        }
    }

    fn mean(&self) -> f64 {
        self.rates.iter().sum::<f64>() / self.rates.len() as f64
    }

    fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares: f64 = self.rates.iter().map(|rate| (rate - mean).powi(2)).sum();
        (squares / (self.rates.len().max(2) - 1) as f64).sqrt()
    }

    fn best(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    for &threads in &args.n_threads {
        let machine = Machine {
            threads: Some(threads),
        };
        machine.cpu_threads()?;
    }
    let mut model = args.source.open_without_tokenizer()?;
    let mut threads = args.n_threads.clone();
    if threads.is_empty() {
        threads.push(model.store.cpu().pool.threads());
    }
    let (mut ceilings, mut tests) = (Vec::new(), Vec::new());
    for threads in threads {
        set_threads(&mut model, threads);
        let report = Report::new(&model)?;
        if !args.json {
            report.head();
        }
        measure(&model, &args, |test| match args.json {
            true => tests.push(report.json(test)),
            false => report.row(test),
        })?;
        ceilings.push(report.ceilings.json(threads));
    }
    if args.json {
        let (bytes, bytes_per_token) = model.weight_bytes()?;
        let out = json!({
            "model": model.folder, "model_type": model.config.model_type,
            "bytes": bytes, "bytes_per_token": bytes_per_token,
            "parameters": model.model.num_params(), "tests": tests, "ceilings": ceilings,
        });
        println!("{out}");
    }
    Ok(())
}

/// Computes with other threads; the weights stay where they are.
fn set_threads(model: &mut LoadedModel, threads: usize) {
    let memory = model.store.cpu().memory.clone();
    let pool = Cpu::new(threads).pool;
    let cpu = Cpu { pool, memory };
    let none = Store::new(&cpu, &[], Vec::new());
    let weights = std::mem::replace(&mut model.store, none).into_weights();
    model.store = Store::new(&cpu, model.model.units(), weights);
}

/// Runs every test at every depth.
fn measure(model: &LoadedModel, args: &Args, mut done: impl FnMut(&Test)) -> Result<()> {
    let prompts = args.n_prompt.iter().map(|&tokens| (true, tokens));
    let tests = prompts.chain(args.n_gen.iter().map(|&tokens| (false, tokens)));
    let tests: Vec<(bool, usize)> = tests.filter(|(_, tokens)| *tokens > 0).collect();
    let most = tests.iter().map(|(_, tokens)| *tokens).max().unwrap_or(0);
    let vocabulary = model.config.vocab_size as u32;
    for &depth in &args.n_depth {
        let mut session = Session::new(model, depth + most, CHUNK);
        session.read(&tokens_of(depth, vocabulary))?;
        for &(prompt, tokens) in &tests {
            let ids = tokens_of(tokens, vocabulary);
            let mut rates = Vec::new();
            for run in 0..=args.repetitions.max(1) {
                session.truncate(depth);
                let start = Instant::now();
                match prompt {
                    true => drop(session.next(&ids)?),
                    false => ids
                        .iter()
                        .try_for_each(|id| session.next(&[*id]).map(drop))?,
                }
                if run > 0 {
                    rates.push(tokens as f64 / start.elapsed().as_secs_f64());
                }
            }
            done(&Test {
                prompt,
                tokens,
                depth,
                rates,
            });
        }
    }
    Ok(())
}

/// Some tokens, the same in every run.
fn tokens_of(count: usize, vocabulary: u32) -> Vec<u32> {
    (0..count as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 7) % vocabulary)
        .collect()
}

/// What shows tests of a model with some threads.
struct Report<'a> {
    model: &'a LoadedModel,
    ceilings: Ceilings,
    /// Bytes of all weights, and of those that a token reads.
    bytes: (usize, usize),
    kernel: String,
    /// Operations of a token, and operations a second that the kernels could do at most.
    work: f64,
    peak: f64,
}

impl<'a> Report<'a> {
    /// Measures what the machine does at most.
    fn new(model: &'a LoadedModel) -> Result<Self> {
        let (bytes, packed) = (model.weight_bytes()?, model.is_packed()?);
        let ceilings = Ceilings::measure(model);
        let level = model.store.cpu().pool.level();
        Ok(Report {
            model,
            bytes,
            kernel: match packed {
                true => format!("{level} int8"),
                false => format!("{level} {}", model.dtype.name()),
            },
            // Every weight that is read is multiplied and added once for each token.
            work: 2.0 * model.model.num_params() as f64 * bytes.1 as f64 / bytes.0 as f64,
            peak: ceilings.int8.filter(|_| packed).unwrap_or(ceilings.fma),
            ceilings,
        })
    }

    fn threads(&self) -> usize {
        self.model.store.cpu().pool.threads()
    }

    /// The best run of a test as a share of what binds it: arithmetic for prompts, memory for generation.
    fn share(&self, test: &Test) -> f64 {
        match test.prompt {
            true => test.best() * self.work / self.peak,
            false => test.best() * self.bytes.1 as f64 / self.ceilings.best_bandwidth(),
        }
    }

    fn json(&self, test: &Test) -> Value {
        json!({
            "test": test.name(), "threads": self.threads(), "kernel": self.kernel,
            "tokens_per_second": test.mean(), "deviation": test.deviation(),
            "runs": test.rates, "roofline": self.share(test),
        })
    }

    /// The ceilings, and the head of a table.
    fn head(&self) {
        let streams = self.ceilings.bandwidth.iter();
        let streams: Vec<String> = streams
            .map(|(n, rate)| format!("{:.1} ({n})", rate / 1e9))
            .collect();
        let int8 = self
            .ceilings
            .int8
            .map(|peak| format!(" · int8 {:.2} TOP/s", peak / 1e12));
        println!(
            "memory reads in GB/s (streams a core): {}{} · FMA {:.0} GFLOP/s",
            streams.join(", "),
            int8.unwrap_or_default(),
            self.ceilings.fma / 1e9
        );
        println!(
            "| model | size | params | kernel | threads | test | t/s | of the roofline (best run) |"
        );
        println!("|---|---:|---:|---|---:|---:|---:|---:|");
    }

    fn row(&self, test: &Test) {
        println!(
            "| {} | {:.2} MiB | {:.2} B | {} | {} | {} | {:.2} ± {:.2} | {:.0} % of {} |",
            self.model.config.model_type,
            self.bytes.0 as f64 / (1 << 20) as f64,
            self.model.model.num_params() as f64 / 1e9,
            self.kernel,
            self.threads(),
            test.name(),
            test.mean(),
            test.deviation(),
            100.0 * self.share(test),
            if test.prompt { "arithmetic" } else { "memory" },
        );
    }
}
