//! Writing: the header from declarations, then the tensors' bytes one after another.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use super::header::{TensorInfo, alignment, check_size};
use super::metadata::Metadata;
use super::value::{Array, Kind, Value};
use super::{MAGIC, MAX_DIMS, VERSION};
use crate::atomic::{AtomicFile, Disk};
use crate::error::{Error, Result};

/// Longest name of a tensor that other readers accept, in bytes.
pub const MAX_NAME_BYTES: usize = 63;

/// A file being written: it appears whole with [`Writer::finish`], or not at all.
pub struct Writer<'d> {
    file: AtomicFile<'d>,
    tensors: Vec<(String, usize)>,
    alignment: usize,
    /// The tensor being written, and how many of its bytes are.
    current: usize,
    written: usize,
}

impl<'d> Writer<'d> {
    /// Starts a file of version 3 and writes its header. The tensors' bytes follow in the order of `tensors`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Unsupported`] for what other readers refuse: names beyond [`MAX_NAME_BYTES`], more
    /// than four dimensions, rows that are no whole blocks, an alignment that is no power of two.
    ///
    /// # Panics
    /// If two tensors have one name.
    #[track_caller]
    pub fn create(
        disk: &'d dyn Disk,
        path: &Path,
        metadata: &Metadata,
        tensors: &[TensorInfo],
    ) -> Result<Self> {
        let refuse = |problem: String| Error::Unsupported {
            path: path.to_owned(),
            problem,
            hint: "no GGUF reader accepts this: rename the tensor, or choose another type".into(),
        };
        let alignment = alignment(metadata).map_err(|problem| refuse(problem.to_string()))?;
        let mut names = BTreeSet::new();
        let mut sizes = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let TensorInfo { name, shape, .. } = tensor;
            assert!(names.insert(name), "tensor '{name}' is declared twice");
            if name.len() > MAX_NAME_BYTES {
                let bytes = name.len();
                return Err(refuse(format!(
                    "the name '{name}' has {bytes} bytes, at most {MAX_NAME_BYTES} are possible"
                )));
            }
            if shape.len() > MAX_DIMS {
                return Err(refuse(format!("tensor '{name}' has the shape {shape:?}")));
            }
            sizes.push((name.clone(), check_size(tensor).map_err(refuse)?));
        }
        let mut writer = Writer {
            file: AtomicFile::create(disk, path)?,
            tensors: sizes,
            alignment,
            current: 0,
            written: 0,
        };
        let header = encode(metadata, tensors, &writer.tensors, alignment);
        writer.put(&header)?;
        writer.skip_empty();
        Ok(writer)
    }

    /// Appends bytes to tensor `name`, the next one that is not complete: all of them at once, or in pieces.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If another tensor is next, or with more bytes than its shape and type take.
    #[track_caller]
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some((next, size)) = self.tensors.get(self.current) else {
            panic!("bytes for tensor '{name}' after the last one");
        };
        assert_eq!(name, next, "tensor written and tensor that is next");
        let (size, written) = (*size, self.written + bytes.len());
        assert!(
            written <= size,
            "{written} bytes for tensor '{name}', which has {size}"
        );
        self.put(bytes)?;
        self.written = written;
        if written == size {
            let padding = size.next_multiple_of(self.alignment) - size;
            self.zeros(padding)?;
            (self.current, self.written) = (self.current + 1, 0);
            self.skip_empty();
        }
        Ok(())
    }

    /// Forces the file to the disk and puts it in place.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If tensors are not complete.
    #[track_caller]
    pub fn finish(self) -> Result<()> {
        if let Some((name, size)) = self.tensors.get(self.current) {
            panic!("tensor '{name}' has {} of its {size} bytes", self.written);
        }
        self.file.commit()
    }

    fn skip_empty(&mut self) {
        while self.tensors.get(self.current).is_some_and(|t| t.1 == 0) {
            self.current += 1;
        }
    }

    fn zeros(&mut self, mut count: usize) -> Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while count > 0 {
            let now = count.min(ZEROS.len());
            self.put(&ZEROS[..now])?;
            count -= now;
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let result = self.file.write_all(bytes);
        result.map_err(|e| Error::io("write", self.file.target(), e))
    }
}

/// The header with its padding. `sizes` has the bytes of each tensor.
fn encode(
    metadata: &Metadata,
    tensors: &[TensorInfo],
    sizes: &[(String, usize)],
    alignment: usize,
) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    put_u64(&mut out, tensors.len());
    put_u64(&mut out, metadata.len());
    for (key, value) in metadata.iter() {
        put_string(&mut out, key);
        put_value(&mut out, value);
    }
    let mut offset = 0;
    for (tensor, (_, bytes)) in tensors.iter().zip(sizes) {
        put_string(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for &size in tensor.shape.iter().rev() {
            put_u64(&mut out, size);
        }
        out.extend(tensor.block_type.id().to_le_bytes());
        put_u64(&mut out, offset);
        offset += bytes.next_multiple_of(alignment);
    }
    out.resize(out.len().next_multiple_of(alignment), 0);
    out
}

fn put_u64(out: &mut Vec<u8>, value: usize) {
    out.extend((value as u64).to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    put_u64(out, text.len());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    macro_rules! put {
        ($($kind:ident)*) => {
            match value {
                $(Value::$kind(value) => {
                    out.extend((Kind::$kind as u32).to_le_bytes());
                    out.extend(value.to_le_bytes());
                })*
                Value::Bool(value) => {
                    out.extend((Kind::Bool as u32).to_le_bytes());
                    out.push((*value).into());
                }
                Value::String(text) => {
                    out.extend((Kind::String as u32).to_le_bytes());
                    put_string(out, text);
                }
                Value::Array(array) => {
                    out.extend(Kind::ARRAY.to_le_bytes());
                    out.extend((array.kind() as u32).to_le_bytes());
                    put_u64(out, array.len());
                    match array {
                        $(Array::$kind(values) => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),)*
                        Array::Bool(values) => out.extend(values.iter().map(|v| u8::from(*v))),
                        Array::String(texts) => texts.iter().for_each(|text| put_string(out, text)),
                    }
                }
            }
        };
    }
    put!(U8 I8 U16 I16 U32 I32 F32 U64 I64 F64);
}
