//! Fine-tuning with the trainer: a model that is given, examples, the best weights, stopping early.

use super::feed::Feed;
use super::{End, Event, TrainOptions, Trainer};
use crate::error::{Error, Result};
use crate::preference::Preference;
use crate::save::{self, Progress};
use crate::tune::{ExampleSampler, Examples};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use windlass_model::{Adapter, DecoderConfig, Model, Tokenizer, Tokens};
use windlass_store::Store;
use windlass_store::checkpoint::CheckpointDir;

/// The folder of the best weights, in a run's folder.
const BEST: &str = "best";

/// What is fine-tuned.
pub struct Subject {
    /// The model's configuration.
    pub config: DecoderConfig,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its units and layers, adapted or not.
    pub model: Model<Tokens>,
    /// Its weights.
    pub store: Store,
    /// Its adapter: then that alone is trained and saved.
    pub adapter: Option<Adapter>,
}

/// Examples to train on, and others to measure on.
#[derive(Clone, Debug)]
pub struct Lessons {
    /// To train on.
    pub train: Arc<Examples>,
    /// To measure on.
    pub held_out: Option<Arc<Examples>>,
    /// Evaluations without a better loss after which a run ends.
    pub patience: Option<u64>,
    /// How answers are compared, where the examples are such.
    pub preference: Option<Preference>,
}

/// What evaluations have shown.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Best {
    /// The lowest loss.
    pub(crate) loss: Option<f64>,
    /// Evaluations since.
    pub(crate) stale: u64,
}

impl Trainer {
    /// A run that fine-tunes a model on examples. With `resume`, the weights of `subject` must be those of the checkpoint.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn tune(
        subject: Subject,
        lessons: Lessons,
        options: TrainOptions,
        resume: Option<&CheckpointDir>,
    ) -> Result<Self> {
        let longest = lessons.train.longest();
        if longest > subject.config.max_position_embeddings {
            return Err(Error::ContextTooShort {
                asked: longest,
                context: subject.config.max_position_embeddings,
            });
        }
        let group = subject.store.group();
        let (rank, ranks) = (group.rank(), group.size());
        let sampler = ExampleSampler::new(lessons.train, options.seed, rank, ranks)?;
        let feed = Feed::Examples {
            sampler,
            held_out: lessons.held_out,
        };
        let mut trainer = Self::build(subject, feed, options, resume)?;
        if let Some(checkpoint) = resume {
            let saved: Progress = checkpoint.json(save::STATE_FILE)?;
            if saved.preference != lessons.preference {
                return Err(Error::Changed {
                    what: "the comparison of answers",
                    saved: format!("{:?}", saved.preference),
                    now: format!("{:?}", lessons.preference),
                });
            }
        }
        trainer.patience = lessons.patience;
        trainer.preference = lessons.preference;
        trainer.keeps_best = true;
        Ok(trainer)
    }

    /// The folder of the best weights that evaluations have shown.
    pub fn best_folder(&self) -> PathBuf {
        self.options.out.join(BEST)
    }

    /// The lowest loss that evaluations have shown.
    pub fn best_loss(&self) -> Option<f64> {
        self.best.loss
    }

    /// Writes what is trained: the adapter as PEFT does, or the model as a Hugging Face folder. Collective.
    ///
    /// # Errors
    /// Whatever hinders writing.
    pub fn save_trained(&self, folder: &Path) -> Result<()> {
        match &self.adapter {
            Some(adapter) => save::save_adapter(folder, &self.engine, adapter),
            None => self.save_model(folder),
        }
    }

    /// Takes note of an evaluation: keeps the best weights, and says whether the run is to end.
    pub(super) fn judge(
        &mut self,
        step: u64,
        loss: f64,
        tell: &mut dyn FnMut(Event),
    ) -> Result<Option<End>> {
        if !self.keeps_best {
            return Ok(None);
        }
        if self.best.loss.is_none_or(|best| loss < best) {
            self.best = Best {
                loss: Some(loss),
                stale: 0,
            };
            self.save_trained(&self.best_folder())?;
            tell(Event::Best { step, loss });
            return Ok(None);
        }
        self.best.stale += 1;
        let stale = self.best.stale;
        Ok(self
            .patience
            .is_some_and(|most| stale >= most)
            .then_some(End::Stopped))
    }
}
