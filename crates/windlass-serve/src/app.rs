//! What all handlers share: options, the phase of the server, the models once they are loaded, metrics.

use crate::engine::EngineHandle;
use crate::grammar::Grammars;
use crate::metrics::Metrics;
use crate::options::ServerOptions;
use crate::refusal::Refusal;
use std::hash::{BuildHasher, RandomState};
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use windlass_infer::{Overlay, OverlayLoader};
use windlass_model::{ChatError, ChatTemplate, Tokenizer};

/// The life of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The model is being loaded.
    Loading,
    /// Requests are answered.
    Ready,
    /// Running answers are finished; new requests are refused.
    Draining,
}

/// The most adapters at once.
const MOST_ADAPTERS: usize = 64;

/// A model that requests can name: the one that was loaded, or that one with an adapter.
pub(crate) struct Model {
    /// The name that requests know it by.
    pub name: String,
    /// What makes it another model than the one that was loaded.
    pub adapter: Option<Arc<Overlay>>,
    /// The chat template that its adapter was trained with.
    pub own_template: Option<ChatTemplate>,
    /// Seconds since 1970 when it came.
    pub created: u64,
    base: Arc<Base>,
}

/// What a model and those with adapters have in common.
pub(crate) struct Base {
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// The number of its tokens, which may be more than the tokenizer's.
    pub vocabulary: usize,
    /// The length of its embeddings.
    pub hidden_size: usize,
    /// The chat template.
    pub template: Option<ChatTemplate>,
    /// The one for conversations with tools, where that is another.
    pub tool_template: Option<ChatTemplate>,
    /// The most tokens of a prompt and its answer.
    pub context: usize,
    /// Where requests go.
    pub engine: EngineHandle,
    /// Compiles grammars for its vocabulary.
    pub grammars: Grammars,
    /// The bytes of each token, and whether it is a control token.
    pub tokens: Vec<(Vec<u8>, bool)>,
    /// Loads adapters for it.
    pub loader: OverlayLoader,
}

impl Model {
    /// The model itself.
    pub fn new(name: String, base: Base, created: u64) -> Self {
        Model {
            name,
            adapter: None,
            own_template: None,
            created,
            base: Arc::new(base),
        }
    }

    /// A model with an adapter.
    pub fn adapted(
        model: &Model,
        name: String,
        adapter: Overlay,
        created: u64,
    ) -> Result<Self, ChatError> {
        let special = model.tokenizer.special_tokens();
        let template = adapter.chat_template.as_deref();
        let template = template.map(|source| ChatTemplate::new(source, special));
        Ok(Model {
            name,
            own_template: template.transpose()?,
            adapter: Some(Arc::new(adapter)),
            created,
            base: model.base.clone(),
        })
    }
}

impl Deref for Model {
    type Target = Base;
    fn deref(&self) -> &Base {
        &self.base
    }
}

/// What all handlers share.
pub(crate) struct App {
    pub options: ServerOptions,
    pub metrics: Metrics,
    phase: watch::Sender<Phase>,
    /// The model that was loaded first, then adapters in the order in which they came.
    models: RwLock<Vec<Arc<Model>>>,
    chance: RandomState,
    drawn: AtomicU64,
}

impl App {
    pub fn new(options: ServerOptions) -> Self {
        App {
            options,
            metrics: Metrics::new(),
            phase: watch::Sender::new(Phase::Loading),
            models: RwLock::new(Vec::new()),
            chance: RandomState::new(),
            drawn: AtomicU64::new(0),
        }
    }

    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub fn set_phase(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    pub fn watch_phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Puts the model and its adapters into service.
    pub fn put(&self, models: Vec<Model>) {
        *self.models.write().expect("a list") = models.into_iter().map(Arc::new).collect();
        // A signal that came while the model was loaded stays.
        self.phase.send_if_modified(|phase| {
            let loading = *phase == Phase::Loading;
            if loading {
                *phase = Phase::Ready;
            }
            loading
        });
    }

    /// Ends the engine's thread, if it has begun; false when it has not.
    pub fn end(&self) -> bool {
        let model = self.models().first().cloned();
        model.inspect(|model| model.engine.end()).is_some()
    }

    /// All models, once they are loaded; the one without an adapter comes first.
    pub fn models(&self) -> Vec<Arc<Model>> {
        self.models.read().expect("a list").clone()
    }

    /// The model that was loaded, if it can be asked now.
    pub fn model(&self) -> Result<Arc<Model>, Refusal> {
        let first = self.models.read().expect("a list").first().cloned();
        match (self.phase(), first) {
            (Phase::Ready, Some(model)) => Ok(model),
            (Phase::Loading, _) | (_, None) => Err(Refusal::unavailable("Loading model", 1)),
            _ => Err(Refusal::unavailable("the server is shutting down", 5)),
        }
    }

    /// The model of the name that a request asks for. Without a name it is the one without an adapter.
    pub fn model_named(&self, name: Option<&str>) -> Result<Arc<Model>, Refusal> {
        let first = self.model()?;
        let Some(name) = name else {
            return Ok(first);
        };
        let models = self.models();
        let found = models.iter().find(|model| model.name == name);
        found.cloned().ok_or_else(|| {
            let known: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
            Refusal::no_model(name, &known)
        })
    }

    /// Whether an adapter of this name may come.
    pub fn has_room_for(&self, name: &str) -> Result<(), Refusal> {
        room_for(&self.models.read().expect("a list"), name)
    }

    /// Takes one more adapter into service.
    pub fn add(&self, model: Model) -> Result<(), Refusal> {
        let mut models = self.models.write().expect("a list");
        // Another request may have been faster.
        room_for(&models, &model.name)?;
        models.push(Arc::new(model));
        Ok(())
    }

    /// Takes an adapter out of service. What is under way keeps it until it has ended.
    pub fn remove(&self, name: &str) -> Result<(), Refusal> {
        let mut models = self.models.write().expect("a list");
        let found = models
            .iter()
            .position(|model| model.adapter.is_some() && model.name == name);
        match found {
            Some(index) => {
                models.remove(index);
                Ok(())
            }
            None => Err(Refusal {
                param: Some("lora_name".into()),
                ..Refusal::not_found(format!("there is no adapter {name:?}"))
            }),
        }
    }

    /// A number that nobody can foresee who does not know the others: for seeds and names, not for secrets.
    pub fn draw(&self) -> u64 {
        let index = self.drawn.fetch_add(1, Ordering::Relaxed);
        self.chance.hash_one(index)
    }

    /// A new name, such as `chatcmpl-0123456789abcdef01234567`.
    pub fn new_id(&self, prefix: &str) -> String {
        format!("{prefix}{:016x}{:08x}", self.draw(), self.draw() as u32)
    }
}

fn room_for(models: &[Arc<Model>], name: &str) -> Result<(), Refusal> {
    if models.iter().any(|model| model.name == name) {
        let problem = format!("{name:?} is there already: unload it first, or choose another name");
        return Err(Refusal::field("lora_name", problem));
    }
    if models.len() > MOST_ADAPTERS {
        let problem = format!("{MOST_ADAPTERS} adapters are loaded: unload one first");
        return Err(Refusal::field("lora_name", problem));
    }
    Ok(())
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}
