//! `windlass adapter add`: several adapters as one.

use crate::cli::usage;
use anyhow::Result;
use std::path::PathBuf;
use windlass::infer::write_sum;

#[derive(clap::Args)]
pub struct Args {
    /// The folders of the adapters
    #[arg(required = true, num_args = 2.., value_name = "ADAPTER")]
    adapters: Vec<PathBuf>,
    /// How much of each counts [default: 1 for each]
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "W,W,...",
        allow_hyphen_values = true
    )]
    weights: Vec<f64>,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// One adapter whose factors are those of all, side by side: its product is the weighted sum of theirs, exactly.
pub fn add(args: &Args) -> Result<()> {
    let weights = match args.weights.as_slice() {
        [] => vec![1.0; args.adapters.len()],
        some if some.len() == args.adapters.len() => some.to_vec(),
        some => {
            let message = format!(
                "{} --weights for {} adapters",
                some.len(),
                args.adapters.len()
            );
            return Err(usage(message, "give one for each"));
        }
    };
    let adapters: Vec<(PathBuf, f64)> = args.adapters.iter().cloned().zip(weights).collect();
    let config = write_sum(&adapters, &args.out)?;
    println!("{}: rank {}", args.out.display(), config.r);
    Ok(())
}
