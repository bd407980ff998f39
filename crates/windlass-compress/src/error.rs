//! What can go wrong while a model is rewritten, and what the user can do about it.

use std::path::PathBuf;

use windlass_tensor::kernels::blocks::BlockType;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A model that cannot be rewritten as asked. [`Error::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    Store(#[from] windlass_store::Error),
    /// The source is quantized already.
    #[error("tensor '{name}' is {found} already: quantizing it again adds errors")]
    Requantize {
        /// The tensor.
        name: String,
        /// Its type.
        found: BlockType,
    },
    /// A type cannot be the result.
    #[error("tensor '{name}': {block_type} is not written")]
    Unsupported {
        /// The tensor.
        name: String,
        /// The type.
        block_type: BlockType,
    },
    /// A weight is infinite or no number.
    #[error("tensor '{name}', row {row}: a weight is {value}")]
    NotFinite {
        /// The tensor.
        name: String,
        /// The row, all dimensions but the last counted together.
        row: usize,
        /// The weight.
        value: f32,
    },
    /// A weight is too large for the type's scales.
    #[error("tensor '{name}', row {row}: weights are beyond the range of {block_type}")]
    BeyondRange {
        /// The tensor.
        name: String,
        /// The row, all dimensions but the last counted together.
        row: usize,
        /// The type.
        block_type: BlockType,
    },
    /// An importance matrix breaks its format.
    #[error("{}: {problem}", path.display())]
    Importance {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An importance matrix is of another model.
    #[error("importance matrix: tensor '{name}' has {found} columns, the model's has {expected}")]
    OtherModel {
        /// The tensor.
        name: String,
        /// Columns of the matrix.
        found: usize,
        /// Columns of the model.
        expected: usize,
    },
    /// A type needs an importance matrix.
    #[error("{block_type} for tensor '{name}' needs an importance matrix")]
    NeedsImportance {
        /// The tensor.
        name: String,
        /// The type.
        block_type: BlockType,
    },
    /// The result would replace its source.
    #[error("{} is both the source and the result", path.display())]
    SameFile {
        /// The file.
        path: PathBuf,
    },
}

impl Error {
    /// What the user can do, where something can be said beyond the message.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Error::Store(error) => return error.hint(),
            Error::Requantize { .. } => {
                "start from the F32, F16 or BF16 file, or allow it with --allow-requantize"
            }
            Error::Unsupported { .. } => "choose another type",
            Error::NotFinite { .. } => {
                "the model is damaged: fetch or convert it again, and look at the tensor with `windlass inspect`"
            }
            Error::BeyondRange { .. } => {
                "keep this tensor: --tensor-type NAME=F32 (or BF16, which has the same range)"
            }
            Error::Importance { .. } => "give a file of llama.cpp's llama-imatrix",
            Error::OtherModel { .. } => "make the importance matrix with this model",
            Error::NeedsImportance { .. } => {
                "make an importance matrix and give it with --imatrix, or choose more bits"
            }
            Error::SameFile { .. } => "write to another name",
        };
        Some(text.to_owned())
    }
}
