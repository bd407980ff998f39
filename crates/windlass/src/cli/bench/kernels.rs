//! `windlass bench kernels`: single kernels at the shapes of models, beside what the machine could do at most.
//!
//! The ceilings are measured between the kernels: other programs change them from minute to minute.

mod measure;
mod products;
mod rows;

use crate::cli::{Machine, Precision, usage};
use anyhow::Result;
use measure::Bench;
use serde_json::json;
use windlass::tensor::kernels::gemm::gemm_kernel_name;
use windlass::tensor::{DType, bf16};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// Storage type [default: both]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// Only kernels whose name or shape contains this text
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let cpu = args.machine.cpu()?;
    let pool = &cpu.pool;
    let mut bench = Bench::new(&cpu, args.only.clone(), args.json);
    let write = bench.write_bandwidth();
    let ceilings = bench.ceilings();
    let kernels = [
        ("f32", gemm_kernel_name::<f32>(pool)),
        ("bf16", gemm_kernel_name::<bf16>(pool)),
    ];
    if !args.json {
        let tiles = match ceilings.tiles {
            Some(tiles) => format!(", bf16 tiles {:.0} GFLOP/s", tiles / 1e9),
            None => String::new(),
        };
        println!(
            "{} · {} threads · FMA {:.0} GFLOP/s{tiles} · memory reads {:.1} GB/s, writes {:.1} GB/s",
            pool.level(),
            pool.threads(),
            ceilings.fma / 1e9,
            ceilings.read / 1e9,
            write / 1e9
        );
        println!(
            "best of several runs; % of what binds it: arithmetic or memory (more when the tensors stay in a cache)"
        );
        Bench::print_heads();
    }
    for dtype in [DType::F32, DType::Bf16] {
        match dtype {
            _ if args.dtype.is_some_and(|only| only.dtype() != dtype) => continue,
            DType::F32 => all::<f32>(&mut bench),
            _ => all::<bf16>(&mut bench),
        }
    }
    rows::optimizers(&mut bench, args.dtype.map(Precision::dtype));
    if bench.rows().is_empty() {
        let only = args.only.unwrap_or_default();
        let hint = format!("known: {}", bench.names().join(", "));
        return Err(usage(format!("--only {only} names no kernel"), hint));
    }
    if args.json {
        let report = json!({
            "level": pool.level().to_string(), "threads": pool.threads(),
            "gemm_kernels": kernels.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "fma_gflops": ceilings.fma / 1e9, "tile_gflops": ceilings.tiles.map(|t| t / 1e9),
            "read_gb_s": ceilings.read / 1e9, "write_gb_s": write / 1e9, "kernels": bench.rows(),
        });
        println!("{report}");
    }
    Ok(())
}

fn all<E: windlass::tensor::kernels::Element>(bench: &mut Bench<'_>) {
    products::gemm::<E>(bench);
    products::attention::<E>(bench);
    rows::norms::<E>(bench);
    rows::positions_and_tables::<E>(bench);
    rows::losses::<E>(bench);
    rows::elements::<E>(bench);
}
