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
    // Optional, or clap would ask what comes after a subcommand for its flags.
    #[command(flatten)]
    model: Option<model::Args>,
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
    match (args.what, args.model) {
        (Some(What::Train(args)), _) => train::run(args),
        (Some(What::Serve(args)), _) => serve::run(args),
        (Some(What::Kernels(args)), _) => kernels::run(args),
        (None, Some(args)) => model::run(args),
        (None, None) => unreachable!("clap asks for --model where no subcommand is given"),
    }
}
