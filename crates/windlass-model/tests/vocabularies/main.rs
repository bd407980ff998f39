//! Tokenizers of GGUF vocabularies and SentencePiece models against published ids and against each other.

mod container;
mod ids;
mod round_trip;
mod small;
