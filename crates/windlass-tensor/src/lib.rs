//! Tensors, weights, ops with their backward passes, and the tape.
