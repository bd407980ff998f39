//! What the matrices of a model are multiplied with: sums of squares of each column, for importance matrices.
//!
//! Names and experts are those of GGUF files, whatever file the model came from. Matrices outside the layers (embeddings,
//! output) are left out, as llama-imatrix does it.

use crate::divergence::Windows;
use crate::{InferError, LoadedModel};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use windlass_model::Goal;
use windlass_model::gguf::place;
use windlass_tensor::{Category, Cpu, DType, Tape, Tensor};

/// Inputs of a tensor of a GGUF file, summed over tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InputSquares {
    /// Sums of squares of the columns, expert after expert.
    pub squares: Vec<f64>,
    /// How many inputs were summed, for each expert; one count for other matrices.
    pub counts: Vec<f64>,
}

/// Runs a text through the model by windows of `window` tokens, as [`crate::divergence`] cuts it, and sums the squares of
/// what each matrix of a layer is multiplied with. The order of the sums depends on nothing but the text.
///
/// `tell` hears after each window how many tokens are done.
///
/// # Errors
/// [`InferError::Setting`] for a window that is longer than the context or the text; [`InferError::Unfit`] where an input
/// is no finite number; [`InferError::Empty`], [`InferError::UnknownToken`].
pub fn input_squares(
    model: &LoadedModel,
    ids: &[u32],
    window: usize,
    tell: &mut dyn FnMut(usize),
) -> Result<BTreeMap<String, InputSquares>, InferError> {
    let read = Windows::new(model, ids, window)?;
    let cpu = model.store.cpu();
    let places = places(model);
    let sums: Vec<Arc<Mutex<Sums>>> = places.iter().map(|_| Arc::default()).collect();
    for (done, ids) in read.windows.iter().enumerate() {
        let rows = Vec::new().into();
        let goal = Goal::Logits { rows };
        let batch = model.whole(ids.clone(), &[ids.len()], goal);
        model.run_on(&batch, false, |unit| {
            let (cpu, sums) = (cpu.clone(), sums[unit].clone());
            let add = move |slot: usize, x: &Tensor| {
                sums.lock().expect("sums").add(&cpu, slot, x);
            };
            Tape::watched(model.store.cpu(), Arc::new(add))
        });
        tell((done + 1) * window);
    }
    collect(&places, &sums)
}

/// Of each unit, the tensors of its parameters that are matrices of a layer: slot, name, expert, and how many.
fn places(model: &LoadedModel) -> Vec<Vec<Place>> {
    let experts = model.config.experts.as_ref().map_or(1, |e| e.num_experts);
    let units = model.model.units().iter().map(|unit| {
        let params = unit.params.iter().enumerate();
        let found = params.filter_map(|(slot, param)| {
            let rows = param.shape[0];
            let place = place(&model.config, &param.name, rows);
            let layer = place.tensor.starts_with("blk.") && param.shape.to_vec().len() == 2;
            let start = place.rows.map_or(0, |Range { start, .. }| start);
            let stacked = place.tensor.contains("_exps.");
            // Of parameters that share a tensor's columns the first is enough.
            (layer && (stacked || start == 0)).then(|| Place {
                slot,
                tensor: place.tensor,
                expert: if stacked { start / rows } else { 0 },
                experts: if stacked { experts } else { 1 },
            })
        });
        found.collect()
    });
    units.collect()
}

struct Place {
    slot: usize,
    tensor: String,
    expert: usize,
    experts: usize,
}

/// Sums of a unit, by slot.
#[derive(Default)]
struct Sums(BTreeMap<usize, (Vec<f64>, usize)>);

impl Sums {
    fn add(&mut self, cpu: &Cpu, slot: usize, x: &Tensor) {
        let (squares, count) = self.0.entry(slot).or_default();
        squares.resize(x.cols(), 0.0);
        *count += x.rows();
        let wide;
        let x = match x.dtype() {
            DType::F32 => x,
            _ => {
                wide = x.cast(cpu, DType::F32, Category::Activations);
                &wide
            }
        };
        for row in x.as_slice::<f32>().chunks_exact(x.cols().max(1)) {
            for (sum, &value) in squares.iter_mut().zip(row) {
                *sum += f64::from(value) * f64::from(value);
            }
        }
    }
}

fn collect(
    places: &[Vec<Place>],
    sums: &[Arc<Mutex<Sums>>],
) -> Result<BTreeMap<String, InputSquares>, InferError> {
    let mut all: BTreeMap<String, InputSquares> = BTreeMap::new();
    for (places, sums) in places.iter().zip(sums) {
        let sums = sums.lock().expect("sums");
        for place in places {
            // An expert that no token chose.
            let Some((squares, count)) = sums.0.get(&place.slot) else {
                continue;
            };
            if let Some(value) = squares.iter().find(|value| !value.is_finite()) {
                return Err(InferError::Unfit {
                    tensor: place.tensor.clone(),
                    problem: format!("the squares of its inputs add up to {value}"),
                });
            }
            let entry = all.entry(place.tensor.clone()).or_default();
            let width = squares.len();
            entry.squares.resize(width * place.experts, 0.0);
            entry.counts.resize(place.experts, 0.0);
            entry.squares[place.expert * width..][..width].copy_from_slice(squares);
            entry.counts[place.expert] = *count as f64;
        }
    }
    Ok(all)
}
