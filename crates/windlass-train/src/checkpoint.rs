//! Checkpoints of an engine over any model.

use crate::engine::{Engine, EngineState};
use crate::error::{Error, Result};
use crate::optimizer::Optimizer;
use crate::save::load_optimizer;
use serde::{Deserialize, Serialize};
use serde_json::Value;
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
fn plain<B>(engine: &Engine<B>) -> Vec<FileTensor> {
    let tensor = |(id, spec): (ParamId, &ParamSpec)| FileTensor {
        name: spec.name.clone(),
        shape: spec.shape,
        parts: vec![id],
        layout: Layout::Rows,
    };
    engine.store().params().map(tensor).collect()
}

impl<B> Engine<B> {
    /// Writes a checkpoint in `dir`, of any model: weights under their parameters' names, optimizer state, and
    /// `client_state`. Every rank writes its part; [`Engine::load_checkpoint`] continues on any number of ranks, in any
    /// stage and tier. Collective.
    ///
    /// With [`EngineOptions::async_checkpoints`](crate::EngineOptions::async_checkpoints) it returns when everything is
    /// copied into memory. The folder appears later, and `latest` names it when a step, the next call or
    /// [`Engine::finish_checkpoint`] finds all ranks done.
    ///
    /// # Errors
    /// Whatever hinders writing, on all ranks when it hinders one; checkpoints before it stay.
    pub fn save_checkpoint(&mut self, dir: &Path, client_state: &Value) -> Result<PathBuf> {
        let state = Client {
            engine: self.state(),
            ranks: self.store().group().size(),
            dtype: self.store().dtype().name().into(),
            optimizer: self.options().optimizer,
            client_state: client_state.clone(),
        };
        let map = plain(self);
        self.save_with(&Checkpoints::open(dir), map, None, &mut |writer| {
            Ok(writer.json(CLIENT_FILE, &state)?)
        })
    }

    /// Continues from the latest checkpoint in `dir`: its folder and client state, or `None` where there is none.
    /// Collective.
    ///
    /// # Errors
    /// A damaged checkpoint, one of another model, optimizer or storage type.
    pub fn load_checkpoint(&mut self, dir: &Path) -> Result<Option<(PathBuf, Value)>> {
        self.finish_checkpoint()?;
        let Some(found) = Checkpoints::open(dir).latest()? else {
            return Ok(None);
        };
        let checkpoint = found.checkpoint;
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
}
