//! Contiguous tensors on pooled memory.

use crate::Shape;
use std::sync::Arc;
use windlass_kernels::memory::{Buffer, Category, Memory};
use windlass_kernels::pool::Pool;
use windlass_kernels::{DType, Element, elementwise};

/// Runs `body` with the type variable bound to the element type of a [`DType`].
#[macro_export]
macro_rules! each_dtype {
    ($dtype:expr, $E:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $E = f32;
                $body
            }
            $crate::DType::Bf16 => {
                type $E = $crate::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $E = $crate::f16;
                $body
            }
            $crate::DType::F64 => {
                type $E = f64;
                $body
            }
        }
    };
}

/// The machine as ops see it: threads and memory. Clones share both.
#[derive(Clone)]
pub struct Cpu {
    /// The threads.
    pub pool: Arc<Pool>,
    /// The memory.
    pub memory: Memory,
}

impl Cpu {
    /// A machine of `threads` threads with an empty memory pool.
    pub fn new(threads: usize) -> Self {
        Cpu {
            pool: Arc::new(Pool::new(threads)),
            memory: Memory::new(),
        }
    }

    /// A machine that allocates as the real one would and computes nothing: a step replayed on it is the memory plan.
    pub fn dry() -> Self {
        Cpu {
            pool: Arc::new(Pool::dry()),
            memory: Memory::new(),
        }
    }
}

/// A contiguous row-major tensor. Clones share the bytes; writing needs the only reference.
#[derive(Clone)]
pub struct Tensor {
    shape: Shape,
    dtype: DType,
    offset: usize,
    data: Arc<Buffer>,
}

impl Tensor {
    /// A tensor whose contents are unspecified: for outputs that are overwritten whole.
    pub fn empty(cpu: &Cpu, shape: impl Into<Shape>, dtype: DType, category: Category) -> Self {
        let shape = shape.into();
        let data = Arc::new(cpu.memory.alloc(shape.len() * dtype.size(), category));
        Tensor {
            shape,
            dtype,
            offset: 0,
            data,
        }
    }

    /// A tensor of zeros.
    pub fn zeros(cpu: &Cpu, shape: impl Into<Shape>, dtype: DType, category: Category) -> Self {
        let mut tensor = Self::empty(cpu, shape, dtype, category);
        if !tensor.data.is_fresh() {
            each_dtype!(dtype, E =>
                elementwise::fill(&cpu.pool, E::from_f64(0.0), tensor.as_mut_slice::<E>()));
        }
        tensor
    }

    /// A copy of `values`.
    ///
    /// # Panics
    /// When the shape does not hold exactly `values.len()` elements.
    #[track_caller]
    pub fn from_slice<E: Element>(
        cpu: &Cpu,
        values: &[E],
        shape: impl Into<Shape>,
        category: Category,
    ) -> Self {
        let mut tensor = Self::empty(cpu, shape, E::DTYPE, category);
        assert_eq!(
            tensor.len(),
            values.len(),
            "shape {} against {} values",
            tensor.shape,
            values.len()
        );
        tensor.as_mut_slice::<E>().copy_from_slice(values);
        tensor
    }

    /// A tensor over bytes that exist already.
    ///
    /// # Panics
    /// When the buffer is too short.
    #[track_caller]
    pub fn from_buffer(buffer: Buffer, shape: impl Into<Shape>, dtype: DType) -> Self {
        let shape = shape.into();
        assert!(
            buffer.bytes() >= shape.len() * dtype.size(),
            "a buffer of {} bytes against {dtype} {shape}",
            buffer.bytes()
        );
        Tensor {
            shape,
            dtype,
            offset: 0,
            data: Arc::new(buffer),
        }
    }

    /// The bytes, if no other tensor shares them and they are all this tensor's.
    pub fn into_buffer(self) -> Option<Buffer> {
        (self.offset == 0).then(|| Arc::into_inner(self.data))?
    }

    /// The bytes: these where nothing else shares them, else a copy under `category`.
    pub fn into_own_buffer(self, cpu: &Cpu, category: Category) -> Buffer {
        let own = match self.offset == 0 && self.is_unique() {
            true => self,
            false => self.deep_clone(cpu, category),
        };
        own.into_buffer().expect("nothing else shares it")
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The storage type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Length of the last axis.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Product of all axes but the last.
    pub fn rows(&self) -> usize {
        self.len().checked_div(self.cols()).unwrap_or(0)
    }

    /// The elements.
    ///
    /// # Panics
    /// When `E` is not the storage type.
    #[track_caller]
    pub fn as_slice<E: Element>(&self) -> &[E] {
        assert_eq!(
            self.dtype,
            E::DTYPE,
            "storage type of a tensor {} against the type asked for",
            self.shape
        );
        &self.data.as_slice::<E>()[self.offset..self.offset + self.shape.len()]
    }

    /// The elements, to be written.
    ///
    /// # Panics
    /// When `E` is not the storage type or another tensor shares the bytes.
    #[track_caller]
    pub fn as_mut_slice<E: Element>(&mut self) -> &mut [E] {
        assert_eq!(
            self.dtype,
            E::DTYPE,
            "storage type of a tensor {} against the type asked for",
            self.shape
        );
        let range = self.offset..self.offset + self.shape.len();
        let data = Arc::get_mut(&mut self.data)
            .expect("a tensor is written while another shares its bytes");
        &mut data.as_mut_slice::<E>()[range]
    }

    /// Whether no other tensor shares the bytes.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.data) == 1
    }

    /// The same elements in another shape.
    #[track_caller]
    pub fn reshape(mut self, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        assert_eq!(
            self.shape.len(),
            shape.len(),
            "elements of {} against {shape}",
            self.shape
        );
        self.shape = shape;
        self
    }

    /// Rows `range` of a tensor seen as `[rows, cols]`; shares the bytes.
    #[track_caller]
    pub fn slice_rows(&self, range: std::ops::Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.rows(),
            "rows {range:?} of {}",
            self.shape
        );
        let mut part = self.clone();
        part.offset += range.start * self.cols();
        part.shape = [range.len(), self.cols()].into();
        part
    }

    /// The elements as `f64`, for tests and reports.
    pub fn to_f64(&self) -> Vec<f64> {
        each_dtype!(self.dtype, E => self.as_slice::<E>().iter().map(|v| v.to_f64()).collect())
    }

    /// The elements as `f32`, rounded where the storage is wider.
    pub fn to_f32(&self) -> Vec<f32> {
        each_dtype!(self.dtype, E => self.as_slice::<E>().iter().map(|v| v.to_f64() as f32).collect())
    }

    /// A copy in another storage type.
    pub fn cast(&self, cpu: &Cpu, dtype: DType, category: Category) -> Self {
        let mut out = Tensor::empty(cpu, self.shape, dtype, category);
        each_dtype!(self.dtype, A => each_dtype!(dtype, B =>
            windlass_kernels::cast::cast(&cpu.pool, self.as_slice::<A>(), out.as_mut_slice::<B>())));
        out
    }

    /// A copy that shares nothing.
    pub fn deep_clone(&self, cpu: &Cpu, category: Category) -> Self {
        self.cast(cpu, self.dtype, category)
    }

    /// The single element of a tensor of one.
    #[track_caller]
    pub fn item(&self) -> f64 {
        assert_eq!(self.len(), 1, "elements of {} against a scalar", self.shape);
        self.to_f64()[0]
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({} {})", self.dtype, self.shape)
    }
}
