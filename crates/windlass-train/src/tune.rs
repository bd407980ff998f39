//! Examples to fine-tune on: from rows of files to tokens, each of which is to be learned or only read.
//!
//! [`read_rows`] reads tables, [`Form::of`] says what the rows are, [`Encoder`] renders and encodes them, and
//! [`Examples`] packs them into sequences. Nothing here knows a model's weights.

mod csv;
mod encode;
mod examples;
mod form;
mod rows;

pub use encode::{Encoder, Example, Learned, Long, Report};
pub use examples::{ExampleSampler, Examples};
pub use form::{Form, Sample, Turns};
pub use rows::{Row, read_rows};
