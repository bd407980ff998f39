//! How the server is set up, and what can keep it from starting.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use windlass_infer::engine::EngineOptions;
use windlass_infer::{LoadedModel, Overlay};
use windlass_model::ChatTemplate;

/// Where the server listens and what it bears.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// A host name or address.
    pub host: String,
    /// A port; 0 takes any that is free.
    pub port: u16,
    /// Keys of which requests must name one; empty lets everyone in.
    pub api_keys: Vec<String>,
    /// The most bytes of a request's body.
    pub max_body: usize,
    /// The most connections at once; further ones wait to be accepted.
    pub max_connections: usize,
    /// How long the head of a request may take, and a connection stay idle.
    pub header_timeout: Duration,
    /// How long the body of a request may take.
    pub body_timeout: Duration,
    /// How long a client may take no bytes of an answer.
    pub write_timeout: Duration,
    /// How long a request may take altogether; its answer ends with an error then.
    pub request_timeout: Duration,
    /// How long running answers may go on after a signal to end.
    pub drain_timeout: Duration,
    /// The most time between two tokens of an answer that new prompts should cause.
    pub inter_token_target: Duration,
    /// Whether prompts and answers are written to the log.
    pub log_prompts: bool,
    /// The folder of the adapters that requests may load and unload by the names of its subfolders; none forbids it.
    pub adapter_folder: Option<PathBuf>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            host: "127.0.0.1".into(),
            port: 8000,
            api_keys: Vec::new(),
            max_body: 16 << 20,
            max_connections: 1024,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            request_timeout: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(60),
            inter_token_target: Duration::from_millis(100),
            log_prompts: false,
            adapter_folder: None,
        }
    }
}

/// A model to serve.
pub struct Served {
    /// The name that requests know it by.
    pub name: String,
    /// Its weights and tokenizer, without an adapter of its own.
    pub model: LoadedModel,
    /// Adapters that were loaded for it, by the names of the models that they make; all names differ.
    pub adapters: Vec<(String, Overlay)>,
    /// Its chat template, where it has one.
    pub template: Option<ChatTemplate>,
    /// A template of its own for conversations with tools, where it has one.
    pub tool_template: Option<ChatTemplate>,
    /// Limits of the engine.
    pub engine: EngineOptions,
}

/// What keeps the server from starting or going on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {host}:{port}")]
    Listen {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The system refuses threads or signals.
    #[error("the system refuses threads or signals")]
    System(#[from] std::io::Error),
    /// The model cannot be loaded.
    #[error("the model cannot be served")]
    Load(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The thread that computes has ended.
    #[error("the engine has failed: {reason}")]
    Engine {
        /// Why.
        reason: String,
    },
}

impl ServeError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Listen { source, .. } if source.kind() == std::io::ErrorKind::AddrInUse => {
                "another program listens there: choose another --port, or 0 for any"
            }
            Self::Listen { source, .. }
                if source.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                "ports below 1024 are kept to the administrator: choose a higher --port"
            }
            Self::Listen { .. } => {
                "check --host: 127.0.0.1 serves this machine, 0.0.0.0 all networks"
            }
            Self::System(_) => "check the limits on threads and open files",
            Self::Load(_) => return None,
            Self::Engine { .. } => "the log says what came before",
        };
        Some(text.to_owned())
    }
}

/// What the server says of itself; the caller shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// It listens; the model is being loaded.
    Listening(SocketAddr),
    /// The model is loaded.
    Ready(SocketAddr),
    /// A signal came: running answers are finished.
    Draining,
}
