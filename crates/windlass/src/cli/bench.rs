//! `windlass bench`: what this machine does in training steps and in single kernels.

use anyhow::Result;

mod kernels;
mod train;

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Whole training steps at the shape of a known model
    Train(train::Args),
    /// Single kernels beside what the machine could do at most
    Kernels(kernels::Args),
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Train(args) => train::run(args),
        What::Kernels(args) => kernels::run(args),
    }
}
