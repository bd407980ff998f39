//! What the model answers while it is trained.

use super::Args;
use anyhow::Result;
use serde_json::json;
use windlass::infer::{GenerateOptions, Generator, LoadedModel, SamplingParams};
use windlass::model::{
    AdapterConfig, ChatOptions, ChatTemplate, DecoderConfig, Tokenizer, decoder,
};
use windlass::store::Store;
use windlass::tensor::kernels::attention::KvType;
use windlass::tensor::{DType, Weights};
use windlass::train::Trainer;

/// Prompts, and what is needed to answer them with the weights of the moment.
pub struct Speaker {
    prompts: Vec<String>,
    template: Option<ChatTemplate>,
    config: DecoderConfig,
    adapter: Option<AdapterConfig>,
    tokenizer: Tokenizer,
    dtype: DType,
    kv_type: KvType,
    max_tokens: usize,
}

impl Speaker {
    pub fn new(args: &Args, model: &LoadedModel) -> Result<Self> {
        let tokenizer = model.tokenizer()?.clone();
        let template = match args.sample.is_empty() {
            true => None,
            false => args.lessons.template(&tokenizer, false)?,
        };
        Ok(Speaker {
            prompts: args.sample.clone(),
            template,
            config: model.config.clone(),
            adapter: model.adapter.as_ref().map(|adapter| adapter.config.clone()),
            dtype: model.dtype,
            kv_type: model.kv_type,
            max_tokens: args.sample_tokens,
            tokenizer,
        })
    }

    /// Answers all prompts, greedily, on the first rank; `note` is told each answer there. Collective: where weights are
    /// partitioned, that rank has all of them for as long.
    pub fn speak(&self, trainer: &Trainer, note: &mut dyn FnMut(&str)) {
        if self.prompts.is_empty() {
            return;
        }
        let store = trainer.engine().store();
        if store.group().rank() > 0 {
            // What hinders this hinders the next step as well.
            let _ = (0..store.units().len()).try_for_each(|unit| store.gather(unit).map(|_| ()));
            return;
        }
        for (prompt, answer) in self.prompts.iter().zip(self.answers(trainer)) {
            let answer = answer.unwrap_or_else(|error| format!("({error})"));
            note(&format!("> {prompt}\n{}", answer.trim()));
        }
    }

    fn answers(&self, trainer: &Trainer) -> Vec<Result<String>> {
        let model = match self.snapshot(trainer) {
            Ok(model) => model,
            Err(error) => return vec![Err(error)],
        };
        let answer = |prompt: &String| {
            let mut options = GenerateOptions {
                max_tokens: self.max_tokens,
                ..GenerateOptions::default()
            };
            options.sampling = SamplingParams {
                temperature: 0.0,
                ..options.sampling
            };
            let mut generator = Generator::new(&model, options)?;
            let ids = match &self.template {
                None => model.encode(prompt)?,
                Some(template) => {
                    let message = json!({ "role": "user", "content": prompt });
                    let options = ChatOptions {
                        add_generation_prompt: true,
                        ..ChatOptions::default()
                    };
                    let text = template.render(&[message], &options)?;
                    self.tokenizer.encode(&text, false)?
                }
            };
            Ok(generator.generate(&ids, &mut |_| ())?.text)
        };
        self.prompts.iter().map(answer).collect()
    }

    /// The model as it stands; its weights are shared until it is dropped.
    fn snapshot(&self, trainer: &Trainer) -> Result<LoadedModel> {
        let store = trainer.engine().store();
        let mut model = decoder(&self.config);
        let adapter = match &self.adapter {
            Some(config) => Some(model.adapt(self.config.naming, config)?),
            None => None,
        };
        let units = 0..model.units().len();
        let weights = units.map(|unit| Ok((*store.gather(unit)?).clone()));
        let weights = weights.collect::<Result<Vec<Weights>>>()?;
        let store = Store::new(store.cpu(), model.units(), weights);
        Ok(LoadedModel {
            config: self.config.clone(),
            model,
            store,
            tokenizer: Some(self.tokenizer.clone()),
            dtype: self.dtype,
            notes: Vec::new(),
            folder: Default::default(),
            kv_type: self.kv_type,
            adapter,
        })
    }
}
