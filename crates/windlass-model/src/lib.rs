//! Architectures as lists of units of plain functions over borrowed weights; configuration and tokenizer.
