//! `windlass bench --model X`: prompts and generation in tokens a second, in the columns of llama-bench, beside what the
//! memory and the byte products of the machine allow.
//!
//! The ceilings are measured in the same run: other programs change them from minute to minute.

use crate::cli::source::Source;
use anyhow::Result;
use serde_json::json;
use std::time::Instant;
use windlass::infer::{LoadedModel, Session};
use windlass::tensor::kernels::roofline;
use windlass::tensor::{Category, Tensor};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Tokens of the prompt; 0 leaves this test out
    #[arg(short = 'p', long, value_name = "N", default_value_t = 512)]
    n_prompt: usize,
    /// Tokens to generate; 0 leaves this test out
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    n_gen: usize,
    /// Tokens that the sequence already has
    #[arg(short = 'd', long, value_name = "N", default_value_t = 0)]
    n_depth: usize,
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
        let mut data = Tensor::empty(
            cpu,
            [STREAM],
            windlass::tensor::DType::F32,
            Category::Workspace,
        );
        // Pages that were never written are one and the same.
        data.as_mut_slice::<f32>().fill(1.0);
        let of = |streams| roofline::stream_bandwidth(&cpu.pool, data.as_slice(), streams, 3);
        Ceilings {
            bandwidth: STREAMS.map(|streams| (streams, of(streams))).to_vec(),
            int8: roofline::int8_peak(&cpu.pool, 5),
            fma: roofline::fma_peak(&cpu.pool, 5),
        }
    }

    fn best_bandwidth(&self) -> f64 {
        self.bandwidth
            .iter()
            .map(|(_, rate)| *rate)
            .fold(0.0, f64::max)
    }
}

/// A test: a name as llama-bench gives it, and the tokens a second of each run.
struct Test {
    name: String,
    rates: Vec<f64>,
}

impl Test {
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
    let model = args.source.open_without_tokenizer()?;
    let depth = match args.n_depth {
        0 => String::new(),
        depth => format!(" @ d{depth}"),
    };
    let ceilings = Ceilings::measure(&model);
    let mut tests = Vec::new();
    if args.n_prompt > 0 {
        let rates = measure(&model, &args, prompt)?;
        tests.push((
            Test {
                name: format!("pp{}{depth}", args.n_prompt),
                rates,
            },
            true,
        ));
    }
    if args.n_gen > 0 {
        let rates = measure(&model, &args, generation)?;
        tests.push((
            Test {
                name: format!("tg{}{depth}", args.n_gen),
                rates,
            },
            false,
        ));
    }
    report(&model, &ceilings, &tests, args.json)
}

/// Tokens a second of a test.
fn measure(
    model: &LoadedModel,
    args: &Args,
    test: fn(&mut Session<'_>, &Args, u32) -> Result<f64>,
) -> Result<Vec<f64>> {
    let tokens = args.n_depth + args.n_prompt.max(args.n_gen);
    let mut session = Session::new(model, tokens, CHUNK);
    let vocabulary = model.config.vocab_size as u32;
    session.read(&tokens_of(args.n_depth, vocabulary))?;
    let mut rates = Vec::new();
    for run in 0..=args.repetitions.max(1) {
        session.truncate(args.n_depth);
        let rate = test(&mut session, args, vocabulary)?;
        if run > 0 {
            rates.push(rate);
        }
    }
    Ok(rates)
}

/// Some tokens, the same in every run.
fn tokens_of(count: usize, vocabulary: u32) -> Vec<u32> {
    (0..count as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 7) % vocabulary)
        .collect()
}

fn prompt(session: &mut Session<'_>, args: &Args, vocabulary: u32) -> Result<f64> {
    let ids = tokens_of(args.n_prompt, vocabulary);
    let start = Instant::now();
    session.next(&ids)?;
    Ok(args.n_prompt as f64 / start.elapsed().as_secs_f64())
}

fn generation(session: &mut Session<'_>, args: &Args, vocabulary: u32) -> Result<f64> {
    let start = Instant::now();
    for id in tokens_of(args.n_gen, vocabulary) {
        session.next(&[id])?;
    }
    Ok(args.n_gen as f64 / start.elapsed().as_secs_f64())
}

/// What a run found, ready to be shown.
struct Report<'a> {
    model: &'a LoadedModel,
    ceilings: &'a Ceilings,
    /// Bytes of all weights, and of those that a token reads.
    bytes: (usize, usize),
    kernel: String,
    /// Operations of a token, and operations a second that the kernels could do at most.
    work: f64,
    peak: f64,
}

fn report(
    model: &LoadedModel,
    ceilings: &Ceilings,
    tests: &[(Test, bool)],
    json: bool,
) -> Result<()> {
    let bytes = model.weight_bytes()?;
    let packed = model.is_packed()?;
    let peak = match (packed, ceilings.int8) {
        (true, Some(int8)) => int8,
        _ => ceilings.fma,
    };
    let level = model.store.cpu().pool.level();
    let report = Report {
        model,
        ceilings,
        bytes,
        kernel: match packed {
            true => format!("{level} int8"),
            false => format!("{level} {}", model.dtype.name()),
        },
        // Every weight that is read is multiplied and added once for each token.
        work: 2.0 * model.model.num_params() as f64 * bytes.1 as f64 / bytes.0 as f64,
        peak,
    };
    match json {
        true => report.json(tests),
        false => report.table(tests),
    }
    Ok(())
}

impl Report<'_> {
    /// The best run of a test as a share of what binds it: arithmetic for prompts, memory for generation.
    fn share(&self, test: &Test, prompt: bool) -> f64 {
        match prompt {
            true => test.best() * self.work / self.peak,
            false => test.best() * self.bytes.1 as f64 / self.ceilings.best_bandwidth(),
        }
    }

    fn json(&self, tests: &[(Test, bool)]) {
        let rows: Vec<_> = tests
            .iter()
            .map(|(test, prompt)| {
                json!({
                    "test": test.name, "tokens_per_second": test.mean(), "deviation": test.deviation(),
                    "runs": test.rates, "roofline": self.share(test, *prompt),
                })
            })
            .collect();
        let bandwidth = self.ceilings.bandwidth.iter();
        let bandwidth: serde_json::Map<_, _> = bandwidth
            .map(|(streams, rate)| (streams.to_string(), (*rate).into()))
            .collect();
        let out = json!({
            "model": self.model.folder, "model_type": self.model.config.model_type,
            "bytes": self.bytes.0, "bytes_per_token": self.bytes.1,
            "parameters": self.model.model.num_params(),
            "threads": self.model.store.cpu().pool.threads(),
            "kernel": self.kernel, "tests": rows,
            "ceilings": {
                "bandwidth_by_streams": bandwidth, "int8_operations": self.ceilings.int8,
                "fma_operations": self.ceilings.fma,
            },
        });
        println!("{out}");
    }

    fn table(&self, tests: &[(Test, bool)]) {
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
        for (test, prompt) in tests {
            let bound = if *prompt { "arithmetic" } else { "memory" };
            println!(
                "| {} | {:.2} MiB | {:.2} B | {} | {} | {} | {:.2} ± {:.2} | {:.0} % of {bound} |",
                self.model.config.model_type,
                self.bytes.0 as f64 / (1 << 20) as f64,
                self.model.model.num_params() as f64 / 1e9,
                self.kernel,
                self.model.store.cpu().pool.threads(),
                test.name,
                test.mean(),
                test.deviation(),
                100.0 * self.share(test, *prompt),
            );
        }
    }
}
