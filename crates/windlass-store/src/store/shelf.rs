//! Values of a forward pass that rest on the disk until its backward pass asks for them.
//!
//! Their places in the swap file are used again: by the next micro-batch, and for shorter values. What is on its way
//! there is bounded by a number of values and not by the disk's speed, so that a plan knows it.

use super::disk::{Coming, Going, Spot};
use super::{Store, Tier};
use crate::error::Result;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use windlass_tensor::kernels::memory::Category;
use windlass_tensor::{DType, Shape, Tensor};

/// Values on their way to the disk at a time.
const UNDER_WAY: usize = 2;

/// Places for values, and values on their way there.
#[derive(Default)]
pub(super) struct Shelf {
    /// Places that nothing rests in, by their size in bytes.
    free: Mutex<BTreeMap<usize, Vec<Spot>>>,
    going: Mutex<VecDeque<Going>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place that goes back to its shelf.
struct Place {
    spot: Spot,
    capacity: usize,
    shelf: Arc<Shelf>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut free = lock(&self.shelf.free);
        let spots = free.entry(self.capacity).or_default();
        spots.push(self.spot.take());
    }
}

/// A value that rests on the disk, or is on its way from there; [`Store::unshelve`] gives it back. Dropping it forgets it.
pub struct Shelved {
    /// Dropped first: its place is not free before.
    coming: Option<Coming>,
    place: Place,
    bytes: usize,
    shape: Shape,
    dtype: DType,
}

impl Store {
    /// Whether a value rests on the disk between the forward and the backward pass.
    pub fn shelves(&self, value: &Tensor) -> bool {
        self.placement.activations == Tier::Nvme && value.len() >= self.placement.swap_from
    }

    /// Starts to move a value to the disk.
    ///
    /// # Errors
    /// A disk that is full or failing.
    pub fn shelve(&self, value: Tensor) -> Result<Shelved> {
        let (shape, dtype) = (*value.shape(), value.dtype());
        let buffer = value.into_own_buffer(&self.cpu, Category::Activations);
        let bytes = buffer.bytes();
        let place = self.place(bytes)?;
        let going = self.disk.start(&part(&place.spot, bytes), 0, buffer);
        self.settle(UNDER_WAY - 1)?;
        lock(&self.shelf.going).push_back(going);
        Ok(Shelved {
            coming: None,
            place,
            bytes,
            shape,
            dtype,
        })
    }

    /// Hint: the value will be asked for soon.
    ///
    /// # Errors
    /// A disk that failed to write it.
    pub fn recall(&self, shelved: &mut Shelved) -> Result<()> {
        if shelved.coming.is_none() {
            self.settle(0)?;
            let buffer = self.cpu.memory.alloc(shelved.bytes, Category::Activations);
            let from = part(&shelved.place.spot, shelved.bytes);
            shelved.coming = Some(self.disk.read(&from, 0, buffer));
        }
        Ok(())
    }

    /// The value, from the disk.
    ///
    /// # Errors
    /// A disk that does not give back what was written.
    pub fn unshelve(&self, mut shelved: Shelved) -> Result<Tensor> {
        self.recall(&mut shelved)?;
        let coming = shelved.coming.take().expect("recalled");
        Ok(Tensor::from_buffer(
            coming.wait()?,
            shelved.shape,
            shelved.dtype,
        ))
    }

    /// Waits until at most `left` values are on their way to the disk.
    fn settle(&self, left: usize) -> Result<()> {
        let mut going = lock(&self.shelf.going);
        while going.len() > left {
            going.pop_front().expect("a value under way").wait()?;
        }
        Ok(())
    }

    /// The smallest free place for so many bytes, or a new one.
    fn place(&self, bytes: usize) -> Result<Place> {
        let mut free = lock(&self.shelf.free);
        let found = free.range_mut(bytes..).find_map(|(&capacity, spots)| {
            let spot = spots.pop()?;
            Some((spot, capacity))
        });
        let (spot, capacity) = match found {
            Some(found) => found,
            None => (self.disk.reserve(bytes)?, bytes),
        };
        Ok(Place {
            spot,
            capacity,
            shelf: self.shelf.clone(),
        })
    }
}

/// The start of a place.
fn part(spot: &Spot, bytes: usize) -> Spot {
    spot.as_ref().map(|region| region.first(bytes))
}
