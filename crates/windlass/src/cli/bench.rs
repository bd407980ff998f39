//! `windlass bench`: what this machine does in inference, in training steps and in single kernels.

use anyhow::Result;
use clap::Subcommand as _;

mod kernels;
mod model;
mod serve;
mod train;

/// Flags of the verb: those of a subcommand, or of a model. By hand, for a derived form would ask for the model's flags
/// after a subcommand too.
pub enum Args {
    /// Something that is not about one model.
    What(What),
    /// `--model X`.
    Model(model::Args),
}

impl clap::FromArgMatches for Args {
    fn from_arg_matches(matches: &clap::ArgMatches) -> Result<Self, clap::Error> {
        match matches.subcommand_name() {
            Some(_) => What::from_arg_matches(matches).map(Args::What),
            None => model::Args::from_arg_matches(matches).map(Args::Model),
        }
    }

    fn update_from_arg_matches(&mut self, matches: &clap::ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Args {
    fn augment_args(command: clap::Command) -> clap::Command {
        What::augment_subcommands(model::Args::augment_args(command))
            .args_conflicts_with_subcommands(true)
            .subcommand_negates_reqs(true)
            // The derived form asks for one of them.
            .subcommand_required(false)
            .arg_required_else_help(false)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// What is measured without a model.
#[derive(clap::Subcommand)]
pub enum What {
    /// Whole training steps at the shape of a known model
    Train(train::Args),
    /// Many clients at once: throughput beside what each client waits for
    Serve(serve::Args),
    /// Single kernels beside what the machine could do at most
    Kernels(kernels::Args),
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    match args {
        Args::What(What::Train(args)) => train::run(args),
        Args::What(What::Serve(args)) => serve::run(args),
        Args::What(What::Kernels(args)) => kernels::run(args),
        Args::Model(args) => model::run(args),
    }
}
