//! `windlass info`: what this machine offers, and which kernels will run.

use super::usage;
use anyhow::Result;
use serde::Serialize;
use windlass::tensor::kernels::dispatch::Level;
use windlass::tensor::kernels::{packed, roofline};
use windlass::tensor::{Category, Cpu, DType, Tensor};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The machine.
#[derive(Serialize)]
struct Info {
    version: &'static str,
    cpu: String,
    threads: usize,
    features: Vec<&'static str>,
    kernels: &'static str,
    kernels_reason: String,
    kernels_supported: Vec<&'static str>,
    packed_products: &'static str,
    memory_total_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    huge_pages: Option<String>,
    /// Reads by all threads together, and with how many streams a thread; `None` where there is no memory to measure.
    read_bytes_per_second: Option<f64>,
    read_streams: Option<usize>,
}

/// Elements that bandwidth is measured over: 256 MiB, more than most caches hold.
const STREAM: usize = 1 << 26;
/// Streams of a thread that are tried.
const STREAMS: [usize; 4] = [1, 4, 8, 12];

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let info = Info::read()?;
    if args.json {
        println!("{}", serde_json::to_string(&info)?);
        return Ok(());
    }
    let gib = |bytes: Option<u64>| {
        bytes.map_or("unknown".into(), |b| {
            format!("{:.1} GiB", b as f64 / (1u64 << 30) as f64)
        })
    };
    let or_none = |names: &[&str]| match names {
        [] => "none".to_owned(),
        names => names.join(" "),
    };
    println!("windlass     {}", info.version);
    println!("CPU          {}", info.cpu);
    println!("threads      {}", info.threads);
    println!("features     {}", or_none(&info.features));
    println!("kernels      {}: {}", info.kernels, info.kernels_reason);
    println!("supported    {}", info.kernels_supported.join(" "));
    println!("packed       {}", info.packed_products);
    println!(
        "memory       {}, {} available",
        gib(info.memory_total_bytes),
        gib(info.memory_available_bytes)
    );
    println!(
        "huge pages   {}",
        info.huge_pages.as_deref().unwrap_or("unknown")
    );
    let bandwidth = info.read_bytes_per_second.zip(info.read_streams);
    println!(
        "bandwidth    {}",
        bandwidth.map_or("not measured".into(), |(rate, streams)| format!(
            "{:.1} GB/s of reads, best with {streams} streams a thread",
            rate / 1e9
        ))
    );
    Ok(())
}

impl Info {
    fn read() -> Result<Self> {
        let level = Level::from_env()
            .map_err(|message| usage(message, "unset WINDLASS_KERNELS to use the best one"))?;
        let forced = std::env::var("WINDLASS_KERNELS").is_ok_and(|value| !value.is_empty());
        let reason = match forced {
            true => format!("WINDLASS_KERNELS={level} asks for it"),
            false => "the highest that this machine supports".to_owned(),
        };
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let huge = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let available = kilobytes(&meminfo, "MemAvailable:");
        let bandwidth = available
            .is_some_and(|bytes| bytes > 8 * STREAM as u64)
            .then(|| bandwidth(threads));
        Ok(Info {
            version: env!("CARGO_PKG_VERSION"),
            cpu: cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            threads,
            features: features(),
            kernels: level.name(),
            kernels_reason: reason,
            kernels_supported: Level::supported()
                .iter()
                .map(|level| level.name())
                .collect(),
            packed_products: packed::kernel_names(level),
            memory_total_bytes: kilobytes(&meminfo, "MemTotal:"),
            memory_available_bytes: available,
            huge_pages: huge.ok().and_then(|text| bracketed(&text)),
            read_bytes_per_second: bandwidth.map(|(rate, _)| rate),
            read_streams: bandwidth.map(|(_, streams)| streams),
        })
    }
}

/// The best rate of reads in bytes a second, and its streams a thread.
fn bandwidth(threads: usize) -> (f64, usize) {
    let cpu = Cpu::new(threads);
    let mut data = Tensor::empty(&cpu, [STREAM], DType::F32, Category::Workspace);
    // Pages that were never written are one and the same.
    data.as_mut_slice::<f32>().fill(1.0);
    let of = |streams| {
        let rate = roofline::stream_bandwidth(&cpu.pool, data.as_slice(), streams, 2);
        (rate, streams)
    };
    let rates = STREAMS.map(of).into_iter();
    let best = rates.max_by(|a, b| a.0.total_cmp(&b.0));
    best.expect("some streams are tried")
}

fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The bytes of a line such as `MemTotal:  1024 kB`.
fn kilobytes(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// The choice in a text such as `always [madvise] never`.
fn bracketed(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// The instructions that the kernels look for, as this CPU and system offer them.
#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    macro_rules! present {
        ($($name:tt),*) => {
            [$(($name, is_x86_feature_detected!($name))),*]
        };
    }
    let all = present![
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512dq",
        "avx512vnni",
        "avx512bf16"
    ];
    let mut present: Vec<&str> = all
        .iter()
        .filter(|(_, there)| *there)
        .map(|(name, _)| *name)
        .collect();
    if Level::Amx.is_supported() {
        present.extend(["amx-bf16", "amx-int8"]);
    }
    present
}

#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<&'static str> {
    Vec::new()
}
