//! What all handlers share: options, the phase of the server, the model once it is loaded, metrics.

use crate::engine::EngineHandle;
use crate::grammar::Grammars;
use crate::metrics::Metrics;
use crate::options::ServerOptions;
use crate::refusal::Refusal;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use windlass_model::{ChatTemplate, Tokenizer};

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

/// The model in service.
pub(crate) struct Model {
    /// The name that requests know it by.
    pub name: String,
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
}

/// What all handlers share.
pub(crate) struct App {
    pub options: ServerOptions,
    pub metrics: Metrics,
    /// Seconds since 1970 at the start: `created` of the model.
    pub started: u64,
    phase: watch::Sender<Phase>,
    model: OnceLock<Arc<Model>>,
    chance: RandomState,
    drawn: AtomicU64,
}

impl App {
    pub fn new(options: ServerOptions) -> Self {
        App {
            options,
            metrics: Metrics::new(),
            started: unix_now(),
            phase: watch::Sender::new(Phase::Loading),
            model: OnceLock::new(),
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

    /// Puts the model into service.
    pub fn put(&self, model: Arc<Model>) {
        let first = self.model.set(model).is_ok();
        assert!(first, "a server has one model");
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
        let model = self.model.get();
        model.inspect(|model| model.engine.end()).is_some()
    }

    /// The model's name, once it is loaded.
    pub fn model_name(&self) -> &str {
        self.model.get().map_or("", |model| &model.name)
    }

    /// The model, if it can be asked now.
    pub fn model(&self) -> Result<&Arc<Model>, Refusal> {
        match (self.phase(), self.model.get()) {
            (Phase::Ready, Some(model)) => Ok(model),
            (Phase::Loading, _) | (_, None) => Err(Refusal::unavailable("Loading model", 1)),
            _ => Err(Refusal::unavailable("the server is shutting down", 5)),
        }
    }

    /// The model, if it has the name that a request asks for. Without a name it is the one that is there.
    pub fn model_named(&self, name: Option<&str>) -> Result<&Arc<Model>, Refusal> {
        let model = self.model()?;
        match name {
            Some(name) if name != model.name => {
                Err(Refusal::no_model(name, std::slice::from_ref(&model.name)))
            }
            _ => Ok(model),
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

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}
