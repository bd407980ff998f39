//! Checkpoints of an engine over any model.

use crate::engine::{Engine, EngineState};
use crate::error::{Error, Result};
use crate::optimizer::Optimizer;
use crate::save::{Place, load_optimizer};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use windlass_store::Loader;
use windlass_store::checkpoint::Checkpoints;
use windlass_tensor::{FileTensor, Layout, ParamId, ParamSpec};

/// What an engine's own checkpoint says beside its tensors.
#[derive(Serialize, Deserialize)]
struct Client {
    engine: EngineState,
    ranks: usize,
    dtype: String,
    optimizer: Optimizer,
    client_state: Value,
}

/// The file of [`Client`].
const CLIENT_FILE: &str = "engine_state.json";

/// The parameters under their own names, as they are.
pub(crate) fn plain<B>(engine: &Engine<B>) -> Vec<FileTensor> {
    let tensor = |(id, spec): (ParamId, &ParamSpec)| FileTensor {
        name: spec.name.clone(),
        shape: spec.shape,
        parts: vec![id],
        layout: Layout::Rows,
    };
    engine.store().params().map(tensor).collect()
}

impl<B> Engine<B> {
    /// Writes a checkpoint in the folder `tag` of `dir`, of any model: weights under their parameters' names, optimizer
    /// state, and `client_state`. Without a tag it is called `global_step` and the number of steps; a tag may be used
    /// again, and the checkpoint that had it stays until the new one is whole. The file `latest` in `dir` then names it.
    /// Every rank writes its part; [`Engine::load_checkpoint`] continues on any number of ranks, in any
    /// stage and tier. Collective.
    ///
    /// With [`EngineOptions::async_checkpoints`](crate::EngineOptions::async_checkpoints) it returns when everything is
    /// copied into memory. The folder appears later, and `latest` names it when a step, the next call or
    /// [`Engine::finish_checkpoint`] finds all ranks done.
    ///
    /// # Errors
    /// Whatever hinders writing, on all ranks when it hinders one; checkpoints before it stay. Ranks that give different
    /// tags, and tags that are no folder's name.
    pub fn save_checkpoint(
        &mut self,
        dir: &Path,
        tag: Option<&str>,
        client_state: &Value,
    ) -> Result<PathBuf> {
        let default = format!("global_step{}", self.global_steps());
        let tag = tag.unwrap_or(&default);
        self.agree_on("the tag of the checkpoint", tag)?;
        let state = Client {
            engine: self.state(),
            ranks: self.store().group().size(),
            dtype: self.store().dtype().name().into(),
            optimizer: self.options().optimizer,
            client_state: client_state.clone(),
        };
        let map = plain(self);
        let place = Place {
            checkpoints: &Checkpoints::open(dir),
            name: Some(tag),
        };
        self.save_with(place, map.into(), None, &mut |writer| {
            Ok(writer.json(CLIENT_FILE, &state)?)
        })
    }

    /// Continues from the checkpoint `tag` in `dir`, without a tag from the one that `latest` names: its folder and client
    /// state, or `None` where nothing was ever saved. Every byte is verified first. Collective.
    ///
    /// # Errors
    /// A tag that is not there, a damaged checkpoint, one of another model, optimizer or storage type.
    pub fn load_checkpoint(
        &mut self,
        dir: &Path,
        tag: Option<&str>,
    ) -> Result<Option<(PathBuf, Value)>> {
        self.finish_checkpoint()?;
        self.agree_on("the tag of the checkpoint", tag.unwrap_or_default())?;
        let checkpoints = Checkpoints::open(dir);
        let checkpoint = match tag {
            Some(tag) => {
                let named = checkpoints.get_named(tag)?;
                named.verify()?;
                named
            }
            None => match checkpoints.latest()? {
                Some(found) => found.checkpoint,
                None => return Ok(None),
            },
        };
        let saved: Client = checkpoint.json(CLIENT_FILE)?;
        let now = self.store().dtype().name().to_string();
        if saved.dtype != now {
            let (what, saved) = ("the storage type", saved.dtype);
            return Err(Error::Changed { what, saved, now });
        }
        if saved.optimizer != self.options().optimizer {
            return Err(Error::Changed {
                what: "the optimizer",
                saved: format!("{:?}", saved.optimizer),
                now: format!("{:?}", self.options().optimizer),
            });
        }
        let (cpu, dtype) = (self.store().cpu().clone(), self.store().dtype());
        let tensors = checkpoint.weights()?;
        let (units, map) = (self.model().units().to_vec(), plain(self));
        let mut loader = Loader::new(&cpu, &tensors, &units, &map, |_| None);
        self.store_mut()
            .refill(|id, _, range| loader.read(id, range, dtype))?;
        load_optimizer(&checkpoint, saved.ranks, self.store_mut())?;
        self.resume(&saved.engine)?;
        let path = checkpoint.path().to_owned();
        self.last_checkpoint = Some(path.clone());
        Ok(Some((path, saved.client_state)))
    }

    /// Fails, on all ranks, if they do not say the same.
    fn agree_on(&self, what: &str, text: &str) -> Result<()> {
        let hash = Sha256::digest(text.as_bytes());
        let hash = u64::from_le_bytes(std::array::from_fn(|i| hash[i]));
        let agreed = self.store().group().agree(what, hash);
        agreed.map_err(|e| Error::Store(e.into()))
    }
}
