#![allow(missing_docs)]
use windlass_kernels::pool::Pool;
use windlass_kernels::{Element, Float};
pub enum Layout {
    Nt,
    Nn,
    Tn,
}
#[derive(Clone, Copy)]
pub struct Mat<'a, E> {
    data: &'a [E],
    stride: usize,
}
impl<'a, E> Mat<'a, E> {
    pub fn new(data: &'a [E], stride: usize) -> Self {
        Mat { data, stride }
    }
}
pub struct Epilogue<'a, E> {
    pub accumulate: bool,
    pub bias: Option<&'a [E]>,
    pub residual: Option<Mat<'a, E>>,
}
impl<E> Default for Epilogue<'_, E> {
    fn default() -> Self {
        Epilogue {
            accumulate: false,
            bias: None,
            residual: None,
        }
    }
}
pub fn gemm<E: Element, C: Element<Acc = E::Acc>>(
    _p: &Pool,
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    a: Mat<E>,
    b: Mat<E>,
    c: &mut [C],
    cs: usize,
    epi: Epilogue<C>,
) {
    for i in 0..m {
        for j in 0..n {
            let mut s = E::Acc::ZERO;
            for p in 0..k {
                let (x, y) = match layout {
                    Layout::Nt => (a.data[i * a.stride + p], b.data[j * b.stride + p]),
                    Layout::Nn => (a.data[i * a.stride + p], b.data[p * b.stride + j]),
                    Layout::Tn => (a.data[p * a.stride + i], b.data[p * b.stride + j]),
                };
                s += x.load() * y.load();
            }
            if epi.accumulate {
                s += c[i * cs + j].load();
            }
            if let Some(b) = epi.bias {
                s += b[j].load();
            }
            if let Some(r) = &epi.residual {
                s += r.data[i * r.stride + j].load();
            }
            c[i * cs + j] = C::store(s);
        }
    }
}
