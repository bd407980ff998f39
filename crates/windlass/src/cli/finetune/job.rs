//! One run of several ranks: what they share, and what each of them does.

use super::samples::Speaker;
use super::{Args, Settings};
use crate::cli::drive;
use crate::cli::observe::Observer;
use anyhow::Result;
use std::hash::{DefaultHasher, Hash, Hasher};
use windlass::comm::Group;
use windlass::model::{AdapterConfig, DecoderConfig, Tokenizer, decoder};
use windlass::progress::say;
use windlass::store::checkpoint::CheckpointDir;
use windlass::store::{Deal, Store};
use windlass::tensor::Cpu;
use windlass::tensor::kernels::memory::Memory;
use windlass::train::config::Observe;
use windlass::train::{Lessons, Plan, Subject, TrainOptions, Trainer};

/// What all ranks of this process train.
pub struct Job<'a> {
    pub args: &'a Args,
    pub settings: Settings,
    pub options: TrainOptions,
    pub observe: Observe,
    /// What the communication of a step is compared with.
    pub theory: Option<Plan>,
    pub config: DecoderConfig,
    pub adapter: Option<AdapterConfig>,
    pub tokenizer: Tokenizer,
    pub lessons: Lessons,
    /// The weights, which the ranks take.
    pub deal: Deal,
    /// Where they are.
    pub memory: Memory,
    pub speaker: Speaker,
    pub resume: Option<CheckpointDir>,
}

impl Job<'_> {
    /// One rank's part; the lowest loss that evaluations have shown.
    pub fn run(&self, group: Group, cpu: &Cpu) -> Result<Option<f64>> {
        let first = group.rank() == 0;
        self.agree(&group)?;
        let mut trainer = self.trainer(group, cpu, first)?;
        let observer = first.then(|| Observer::new(self.observe.clone(), self.theory.as_ref()));
        let steps = self.options.steps;
        let look = &mut |trainer: &Trainer, note: &mut dyn FnMut(&str)| {
            self.speaker.speak(trainer, note);
        };
        drive::tune(&mut trainer, steps, observer, &self.memory, look)?;
        let last = self.args.out.join("last");
        trainer.save_trained(&last)?;
        let best = trainer.best_loss();
        if let Some(source) = self.args.lessons.template_source()?.filter(|_| first) {
            let folders = [Some(last), best.map(|_| trainer.best_folder())];
            for folder in folders.into_iter().flatten() {
                let file = folder.join("chat_template.jinja");
                let disk = windlass::store::atomic::RealDisk;
                windlass::store::atomic::write_atomic(&disk, &file, source.as_bytes())?;
            }
        }
        Ok(best)
    }

    /// The rank's trainer, over the weights that it takes.
    fn trainer(&self, group: Group, cpu: &Cpu, first: bool) -> Result<Trainer> {
        let mut model = decoder(&self.config);
        let adapter = match &self.adapter {
            Some(config) => Some(model.adapt(self.config.naming, config)?),
            None => None,
        };
        let home = self.settings.home(group)?;
        let note = home.swap.as_ref().and_then(|swap| swap.note());
        if let Some(note) = note.filter(|_| first) {
            say(&format!("note: swap file: {note}"));
        }
        let subject = Subject {
            store: Store::of(cpu, home, model.units(), &self.deal)?,
            config: self.config.clone(),
            tokenizer: self.tokenizer.clone(),
            model,
            adapter,
        };
        let (lessons, options) = (self.lessons.clone(), self.options.clone());
        Ok(Trainer::tune(
            subject,
            lessons,
            options,
            self.resume.as_ref(),
        )?)
    }

    /// Fails, on all ranks, if they are not about to do the same.
    fn agree(&self, group: &Group) -> Result<()> {
        let resume = self.resume.as_ref().map(CheckpointDir::step);
        let Lessons {
            train,
            held_out,
            patience,
            preference,
        } = &self.lessons;
        let data = [Some(train), held_out.as_ref()].map(|data| data.map(|data| data.digest()));
        let options = (&self.options, self.settings.placement, patience, preference);
        for (what, value) in [
            ("the model", self.config.json.to_string()),
            ("the adapter", format!("{:?}", self.adapter)),
            ("the settings", format!("{options:?}")),
            ("the data and its tokenizer", format!("{data:?}")),
            ("the checkpoint to resume from", format!("{resume:?}")),
        ] {
            // Not the hash of a map, whose keys are chosen by chance.
            let mut hasher = DefaultHasher::new();
            value.hash(&mut hasher);
            group.agree(what, hasher.finish())?;
        }
        Ok(())
    }
}
