//! What ranks tell one another around files.

use crate::error::{Error, Result};
use windlass_comm::Group;

/// Lets all ranks know whether one of them failed: the others then fail with its message.
pub(crate) fn together(
    group: &Group,
    what: &'static str,
    error: Option<&impl std::fmt::Display>,
) -> Result<()> {
    let message = error.map_or(String::new(), |e| format!("{e}"));
    let messages = exchange(group, what, message.as_bytes())?;
    let failed = messages.iter().position(|m| !m.is_empty());
    match failed {
        Some(rank) if message.is_empty() => Err(Error::Peer {
            rank,
            what,
            message: String::from_utf8_lossy(&messages[rank]).into_owned(),
        }),
        _ => Ok(()),
    }
}

/// The bytes of every rank, in rank order.
pub(crate) fn exchange(group: &Group, tag: &str, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
    let comm = |e: windlass_comm::Error| Error::Store(e.into());
    let lens = group.collect(tag, &[mine.len() as u64]).map_err(comm)?;
    let mut at = 0;
    let shards: Vec<_> = lens
        .iter()
        .map(|&len| {
            at += len as usize;
            at - len as usize..at
        })
        .collect();
    let mut all = vec![0u8; at];
    all[shards[group.rank()].clone()].copy_from_slice(mine);
    group.all_gather(tag, &shards, &mut all).map_err(comm)?;
    Ok(shards.into_iter().map(|s| all[s].to_vec()).collect())
}
