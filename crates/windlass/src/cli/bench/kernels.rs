//! `windlass bench kernels`.

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {}

/// Runs the verb.
pub fn run(_: Args) -> anyhow::Result<()> {
    Err(crate::cli::failure("not in this build", "use another verb"))
}
