//! A server of a tiny model in this process.

use crate::client::{Answer, Client};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use windlass_infer::LoadedModel;
use windlass_infer::engine::EngineOptions;
use windlass_model::{ChatTemplate, DecoderConfig, Tokenizer, decoder};
use windlass_serve::{Notice, ServeError, Served, Server, ServerOptions, Stop};
use windlass_store::{Store, elements, save_weights};
use windlass_tensor::{Cpu, DType, ParamId};

const TEMPLATE: &str = "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}\
{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\
{{ c.function | tojson }}</tool_call>{% endfor %}{{ '\n' }}{% endfor %}{% if mood %}({{ mood }}){% endif %}\
{% if add_generation_prompt %}<assistant>{% endif %}";
const TEXT: &str = "the cat sat on the mat and the dog sat on the log while the rat ran. ";

/// The model's name.
pub const NAME: &str = "tiny/cat";
/// The most tokens of a text.
pub const CONTEXT: usize = 512;

/// Opens a tiny model of random weights that has seen a few words.
pub fn model() -> LoadedModel {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path();
    let config = json!({
        "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "initializer_range": 0.5, "tie_word_embeddings": false,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let config = DecoderConfig::load(folder).unwrap();
    let built = decoder(&config);
    let store = Store::init(&Cpu::new(1), built.units(), DType::F32, 3);
    let map = config.naming.file_tensors(&built);
    let read = |id: ParamId| elements(store.gather(id.unit).unwrap().at(id.slot).weight);
    save_weights(
        folder,
        built.units(),
        &map,
        DType::F32,
        &Default::default(),
        read,
    )
    .unwrap();
    let tokenizer = Tokenizer::train([TEXT; 20].iter(), 290, "<|end|>").unwrap();
    tokenizer.save(folder).unwrap();
    LoadedModel::open(&Cpu::new(1), folder, None).unwrap()
}

/// A server that runs in a thread; it ends when this is dropped.
pub struct House {
    pub address: SocketAddr,
    stop: Stop,
    ready: mpsc::Receiver<()>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl House {
    /// With limits of one's own.
    pub fn with(options: ServerOptions, engine: EngineOptions) -> Self {
        Self::built(options, engine, TEMPLATE, Vec::new())
    }

    /// With a template of one's own too.
    pub fn with_template(
        options: ServerOptions,
        engine: EngineOptions,
        template: &'static str,
    ) -> Self {
        Self::built(options, engine, template, Vec::new())
    }

    /// With the adapters of folders.
    pub fn adapted(adapters: Vec<(String, PathBuf)>) -> Self {
        let (options, engine) = (ServerOptions::default(), EngineOptions::default());
        Self::built(options, engine, TEMPLATE, adapters)
    }

    fn built(
        options: ServerOptions,
        engine: EngineOptions,
        template: &'static str,
        adapters: Vec<(String, PathBuf)>,
    ) -> Self {
        let house = Self::loading(options, move || {
            let model = model();
            let loader = model.overlay_loader().unwrap();
            let load = |(name, folder): (String, PathBuf)| (name, loader.load(&folder).unwrap());
            let adapters = adapters.into_iter().map(load).collect();
            let tokens = model.tokenizer().unwrap().special_tokens();
            Ok(Served {
                name: NAME.into(),
                template: Some(ChatTemplate::new(template, tokens).unwrap()),
                tool_template: None,
                adapters,
                engine,
                model,
            })
        });
        let ready = house.ready.recv_timeout(Duration::from_secs(100));
        ready.expect("the model is loaded");
        house
    }

    /// With a loader of one's own, which is not waited for.
    pub fn loading(
        options: ServerOptions,
        load: impl FnOnce() -> Result<Served, ServeError> + Send + 'static,
    ) -> Self {
        let server = Server::bind(ServerOptions { port: 0, ..options }).unwrap();
        let (address, stop) = (server.address(), server.stop());
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            server.run(load, move |notice| {
                if notice == Notice::Ready(address) {
                    // Whoever waits may be gone.
                    let _ = ready.send(());
                }
            })
        });
        House {
            address,
            stop,
            ready: is_ready,
            thread: Some(thread),
        }
    }

    pub fn new() -> Self {
        Self::with(ServerOptions::default(), EngineOptions::default())
    }

    pub fn client(&self) -> Client {
        Client::new(self.address)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.client().ask("GET", path, "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.client().ask("POST", path, &body.to_string())
    }

    /// Posts what must succeed.
    #[track_caller]
    pub fn ok(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{body}: {}", answer.text());
        answer.json()
    }

    /// Posts what must succeed with a text.
    #[track_caller]
    pub fn ok_text(&self, path: &str, body: &Value) -> String {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{body}: {}", answer.text());
        answer.text()
    }

    /// Posts what must be refused: the error's `param` and a part of its message.
    #[track_caller]
    pub fn refused(&self, path: &str, body: &Value, status: u16, param: Value, part: &str) {
        let answer = self.post(path, body);
        assert_eq!(answer.status, status, "{body}: {}", answer.text());
        let error = &answer.json()["error"];
        assert_eq!(error["param"], param, "{body}: {error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(part), "{body}: {message}");
    }

    /// Posts a request for a stream; the objects of its events.
    #[track_caller]
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let answer = self.post(path, &body);
        assert_eq!(answer.status, 200, "{body}: {}", answer.text());
        assert_eq!(
            answer.header("content-type"),
            "text/event-stream; charset=utf-8"
        );
        answer.events()
    }

    /// A value of `/metrics`.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("windlass:{name}{{")));
        line.unwrap_or_else(|| panic!("{name} in {text}"))
            .rsplit(' ')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    }

    /// Waits until a value of `/metrics` is as it should be.
    #[track_caller]
    pub fn until(&self, name: &str, wanted: f64) {
        let start = Instant::now();
        while self.metric(name) != wanted {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{name}: {}, not {wanted}",
                self.metric(name)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends the server as a signal does.
    pub fn drain(&self) {
        self.stop.drain();
    }

    /// Waits for its end.
    pub fn join(mut self) -> Result<(), ServeError> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.stop.drain();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(std::thread::panicking() || ended.is_ok());
        }
    }
}
