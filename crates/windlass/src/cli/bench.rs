//! `windlass bench`: what this machine does in inference, in training steps and in single kernels.

use anyhow::Result;

mod kernels;
mod model;
mod serve;
mod train;

/// Flags of the verb.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    model: model::Args,
}

#[derive(clap::Subcommand)]
enum What {
    /// Whole training steps at the shape of a known model
    Train(train::Args),
    /// Many clients at once: throughput beside what each client waits for
    Serve(serve::Args),
    /// Single kernels beside what the machine could do at most
    Kernels(kernels::Args),
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    match args.what {
        Some(What::Train(args)) => train::run(args),
        Some(What::Serve(args)) => serve::run(args),
        Some(What::Kernels(args)) => kernels::run(args),
        None => model::run(args.model),
    }
}
