//! Shapes of up to four axes, by value.

/// Lengths of up to four axes, outermost first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; 4],
    ndim: usize,
}

impl Shape {
    /// A shape from a slice.
    ///
    /// # Panics
    /// On more than four axes.
    #[track_caller]
    pub fn new(axes: &[usize]) -> Self {
        assert!(axes.len() <= 4, "{} axes against at most 4", axes.len());
        let mut dims = [1; 4];
        dims[..axes.len()].copy_from_slice(axes);
        Shape {
            dims,
            ndim: axes.len(),
        }
    }

    /// Number of elements (1 for a scalar).
    #[expect(
        clippy::len_without_is_empty,
        reason = "the number of elements of a shape, not of a container"
    )]
    pub fn len(&self) -> usize {
        self.dims[..self.ndim].iter().product()
    }
}

impl std::ops::Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.dims[..self.ndim]
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(axes: [usize; N]) -> Self {
        Shape::new(&axes)
    }
}

impl From<&[usize]> for Shape {
    fn from(axes: &[usize]) -> Self {
        Shape::new(axes)
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", &self[..])
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}
