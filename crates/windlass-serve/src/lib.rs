//! The OpenAI-compatible server over [`windlass_infer::engine`].
//!
//! HTTP, JSON and text on one side, tokens on the other. One thread owns the engine and computes; connections belong to an
//! asynchronous runtime. Nothing here prints or reads the environment: what is worth knowing is logged through `tracing`,
//! or told to the caller as a [`Notice`].

mod adapters;
mod app;
mod blocks;
mod body;
mod chat;
mod choice;
mod completions;
mod conversation;
mod embeddings;
mod engine;
mod fields;
mod grammar;
mod job;
mod logprobs;
mod messages;
mod metrics;
mod openapi;
mod options;
mod page;
mod patience;
mod refusal;
mod responses;
mod routes;
mod sampling;
mod server;
mod thoughts;
mod tokens;
mod tools;

pub use options::{Notice, ServeError, Served, ServerOptions};
pub use server::{Server, Stop};
