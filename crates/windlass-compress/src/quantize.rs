//! A GGUF file rewritten with fewer bits, tensor by tensor, rows by rows.

use std::path::Path;

use regex::Regex;
use windlass_store::atomic::Disk;
use windlass_store::gguf::{self, BlockType, Metadata, TensorInfo, Writer};
use windlass_tensor::kernels::blocks::{dequantize_all, first_bad_block, quantize_all};
use windlass_tensor::kernels::pool::Pool;

use crate::error::{Error, Result};
use crate::file_type::FileType;
use crate::importance::Importance;
use crate::select::{Planned, plan};

/// Elements that are in memory as `f32` at a time.
const CHUNK: usize = 1 << 23;
/// The version of the block types, as llama.cpp counts them.
const QUANTIZATION_VERSION: u32 = 2;

/// How a file is rewritten.
#[derive(Clone, Debug)]
pub struct Options {
    /// The mix.
    pub file_type: FileType,
    /// Give every matrix the mix's main type.
    pub pure: bool,
    /// How much columns matter.
    pub importance: Option<Importance>,
    /// The name that the file says of the importances.
    pub importance_name: String,
    /// Types for tensors whose name a pattern is found in; the first that is found counts.
    pub overrides: Vec<(Regex, BlockType)>,
    /// The type of the output matrix.
    pub output_type: Option<BlockType>,
    /// The type of the token embeddings.
    pub embedding_type: Option<BlockType>,
    /// Keep the output matrix as it is.
    pub leave_output: bool,
    /// Allow a source that is quantized already.
    pub allow_requantize: bool,
}

impl Options {
    /// A mix without exceptions of the user's.
    pub fn new(file_type: FileType) -> Self {
        Options {
            file_type,
            pure: false,
            importance: None,
            importance_name: String::new(),
            overrides: Vec::new(),
            output_type: None,
            embedding_type: None,
            leave_output: false,
            allow_requantize: false,
        }
    }

    /// Writes into a file's metadata what the file is made with.
    pub fn describe(&self, metadata: &mut Metadata) {
        metadata.insert("general.quantization_version", QUANTIZATION_VERSION);
        metadata.insert("general.file_type", self.file_type.id());
        if let Some(importance) = &self.importance {
            metadata.insert("quantize.imatrix.file", self.importance_name.as_str());
            metadata.insert("quantize.imatrix.dataset", importance.datasets.join(","));
            metadata.insert(
                "quantize.imatrix.entries_count",
                importance.names().len() as u32,
            );
            metadata.insert("quantize.imatrix.chunks_count", importance.chunks);
        }
    }

    /// Finds what cannot be done with tensors of a plan. Returns the matrices that lose bits and have no importances, where
    /// there is an importance matrix.
    ///
    /// # Errors
    /// A type that is not written or needs importances, a source that is quantized already, importances of another model.
    pub fn check(&self, planned: &[Planned]) -> Result<Vec<String>> {
        check(planned, self)
    }
}

/// What was done.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Every tensor and its new type, in order.
    pub tensors: Vec<Planned>,
    /// Bytes of all tensors before.
    pub bytes_before: usize,
    /// Bytes of all tensors after.
    pub bytes_after: usize,
    /// Number of weights.
    pub elements: usize,
    /// Matrices that lost bits and that the importance matrix does not know.
    pub without_importance: Vec<String>,
}

/// Writes `file` to `out` as `options` say; the file appears whole or not at all. `progress` is told the tensor and the
/// bytes of the source that are done.
///
/// # Errors
/// [`Error::Store`]; every mistake is found before anything is written, but those in the weights themselves.
pub fn quantize(
    pool: &Pool,
    disk: &dyn Disk,
    file: &gguf::File,
    out: &Path,
    options: &Options,
    mut progress: impl FnMut(&Planned, usize),
) -> Result<Report> {
    let canonical = |path: &Path| path.canonicalize().ok();
    let target = canonical(out);
    if target.is_some() && file.parts().any(|part| canonical(part) == target) {
        return Err(Error::SameFile {
            path: out.to_owned(),
        });
    }
    let planned = plan(file, options)?;
    let without_importance = options.check(&planned)?;
    let mut metadata = file.metadata().clone();
    options.describe(&mut metadata);
    let tensors: Vec<TensorInfo> = planned
        .iter()
        .map(|p| TensorInfo::new(p.info.name.clone(), p.info.shape.clone(), p.target))
        .collect();
    let mut writer = Writer::create(disk, out, &metadata, &tensors)?;
    let mut done = 0;
    for tensor in &planned {
        rewrite(pool, file, tensor, options, &mut writer, &mut |bytes| {
            done += bytes;
            progress(tensor, done);
        })?;
    }
    writer.finish()?;
    Ok(Report {
        bytes_before: file.total_bytes(),
        bytes_after: tensors.iter().map(TensorInfo::byte_size).sum(),
        elements: tensors.iter().map(TensorInfo::elements).sum(),
        tensors: planned,
        without_importance,
    })
}

/// Finds what cannot be done before anything is written. Returns the matrices without importances.
fn check(planned: &[Planned], options: &Options) -> Result<Vec<String>> {
    let mut without = Vec::new();
    for Planned { info, target, .. } in planned {
        if info.block_type == *target {
            continue;
        }
        let name = info.name.clone();
        if !target.is_writable() {
            return Err(Error::Unsupported {
                name,
                block_type: *target,
            });
        }
        if info.block_type.elements() > 1 && !options.allow_requantize {
            return Err(Error::Requantize {
                name,
                found: info.block_type,
            });
        }
        let measured = options
            .importance
            .as_ref()
            .map(|importance| importance.columns(&name));
        let expected = experts(info) * info.row_len();
        let end = [
            "token_embd.weight",
            "per_layer_token_embd.weight",
            "output.weight",
        ];
        let end = end.contains(&name.as_str());
        match measured {
            // Embeddings are looked up, not multiplied: what was measured there is the output's.
            Some(Some(columns)) if columns.len() != expected && !end => {
                return Err(Error::OtherModel {
                    name,
                    found: columns.len(),
                    expected,
                });
            }
            Some(None) if target.elements() > 1 && !end => without.push(name.clone()),
            _ => {}
        }
        let needed = options.file_type == FileType::Q2_K_S && *target == BlockType::Q2_K && !end;
        if needed && !matches!(measured, Some(Some(_))) {
            return Err(Error::NeedsImportance {
                name,
                block_type: *target,
            });
        }
    }
    Ok(without)
}

/// Matrices that lie one after another in a tensor: one for each expert.
fn experts(info: &TensorInfo) -> usize {
    let outer = info.shape.len().saturating_sub(2);
    info.shape[..outer].iter().product()
}

/// Reads, quantizes and writes one tensor.
fn rewrite(
    pool: &Pool,
    file: &gguf::File,
    tensor: &Planned,
    options: &Options,
    writer: &mut Writer,
    progress: &mut dyn FnMut(usize),
) -> Result<()> {
    let Planned { info, target, .. } = tensor;
    let source = file.bytes(&info.name)?;
    if info.block_type == *target || source.is_empty() {
        if !source.is_empty() {
            writer.write(&info.name, source)?;
        }
        progress(source.len());
        return Ok(());
    }
    let row_len = info.row_len();
    let (row_bytes, experts) = (source.len() / info.rows(), experts(info));
    let rows_of_expert = info.rows() / experts;
    let columns = options
        .importance
        .as_ref()
        .and_then(|all| all.columns(&info.name));
    let columns = columns.filter(|columns| columns.len() == experts * row_len);
    let rows_of_chunk = (CHUNK / row_len).clamp(1, rows_of_expert);
    let (mut values, mut blocks) = (Vec::new(), Vec::new());
    for expert in 0..experts {
        let importance = columns
            .as_ref()
            .map(|all| &all[expert * row_len..][..row_len]);
        let end = (expert + 1) * rows_of_expert;
        let mut row = expert * rows_of_expert;
        while row < end {
            let rows = rows_of_chunk.min(end - row);
            let bytes = &source[row * row_bytes..(row + rows) * row_bytes];
            values.resize(rows * row_len, 0.0);
            dequantize_all(pool, info.block_type, bytes, &mut values);
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                return Err(Error::NotFinite {
                    name: info.name.clone(),
                    row: row + i / row_len,
                    value: values[i],
                });
            }
            let size = target
                .size_of(values.len())
                .expect("checked with the header");
            blocks.resize(size, 0);
            quantize_all(pool, *target, &values, row_len, importance, &mut blocks);
            if let Some(i) = first_bad_block(*target, &blocks) {
                return Err(Error::BeyondRange {
                    name: info.name.clone(),
                    row: row + i * target.elements() / row_len,
                    block_type: *target,
                });
            }
            writer.write(&info.name, &blocks)?;
            progress(bytes.len());
            row += rows;
        }
    }
    Ok(())
}
