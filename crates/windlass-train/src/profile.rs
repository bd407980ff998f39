//! Where the operations of a model are and how fast they go: one micro-batch forward and backward, layer by layer.
//!
//! The pass is one of its own beside the run: its gradients are dropped, and it changes nothing.

use crate::data::Batch;
use crate::engine::{filled, start};
use crate::error::Result;
use std::time::Instant;
use windlass_model::{DecoderConfig, Model, Tokens};
use windlass_store::Store;
use windlass_tensor::{Category, Grads, Tape, Tensor, UnitSpec, Weight, Weights};

/// What one layer is, does and takes.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerProfile {
    /// Its unit, or `embedding` and `head`, which may share one.
    pub name: String,
    /// Its parameters; a shared table counts where it is first used.
    pub parameters: usize,
    /// Multiplications and additions of matrix products and attention in one forward pass.
    pub flops: f64,
    /// Seconds of the forward pass. In the head the loss brings its gradient: this is both of its passes.
    pub forward: f64,
    /// Seconds of the backward pass, with the forward pass it repeats under activation checkpointing.
    pub backward: f64,
    /// Forward passes that the backward pass repeats. One counts whole, as DeepSpeed counts it, though a decoder's last product is
    /// left out of it.
    pub recomputed: f64,
}

impl LayerProfile {
    /// Operations of both passes: a backward pass has two products for each of the forward pass.
    pub fn all_flops(&self) -> f64 {
        (3.0 + self.recomputed) * self.flops
    }

    /// Operations of both passes in a second, in units of 1e9.
    pub fn gflops_per_second(&self) -> f64 {
        self.all_flops() / (self.forward + self.backward) / 1e9
    }
}

/// The operations of each layer's forward pass over a batch.
pub(crate) fn flops(config: &DecoderConfig, units: &[UnitSpec], batch: &Batch) -> Vec<f64> {
    let tokens = batch.ids.len() as f64;
    let experts = config.experts.as_ref();
    let chosen = experts.map_or(1.0, |e| e.num_experts_per_tok as f64 / e.num_experts as f64);
    let heads = (config.num_attention_heads * config.head_dim) as f64;
    let blocks = config.layers.iter().enumerate().map(|(index, options)| {
        let name = format!("layer {index}");
        let unit = units.iter().find(|unit| unit.name == name);
        let matrices = unit.into_iter().flat_map(|unit| &unit.params).map(|param| {
            let share = match param.name.contains(".experts.") {
                true => chosen,
                false => 1.0,
            };
            // A matrix is used once for each token; vectors are not counted.
            match param.shape[..] {
                [_, _] => share * param.shape.len() as f64,
                _ => 0.0,
            }
        });
        let pairs: f64 = batch
            .segments
            .iter()
            .map(|&length| pairs(length, options.window))
            .sum();
        // Scores and weighted values: two products over all heads for each pair of tokens.
        2.0 * tokens * matrices.sum::<f64>() + 4.0 * heads * pairs
    });
    let head = 2.0 * tokens * (config.vocab_size * config.hidden_size) as f64;
    std::iter::once(0.0).chain(blocks).chain([head]).collect()
}

/// Pairs of a token and one it attends to, itself included, in a sequence.
fn pairs(length: usize, window: Option<usize>) -> f64 {
    let window = window.unwrap_or(length).min(length);
    let (length, window) = (length as f64, window as f64);
    window * (window + 1.0) / 2.0 + (length - window) * window
}

/// Runs a batch through the model and back, with `scale` on the loss. Collective.
///
/// # Errors
/// What hinders the store from gathering weights: a lost rank, a failing disk.
pub(crate) fn profile(
    model: &Model<Tokens>,
    store: &Store,
    batch: &Tokens,
    flops: &[f64],
    scale: f64,
    checkpointing: bool,
) -> Result<Vec<LayerProfile>> {
    let (cpu, count) = (store.cpu(), model.layers().len());
    let mut layers = Vec::with_capacity(count);
    let mut passes = Vec::with_capacity(count);
    let (mut x, mut dx) = (start(cpu), None);
    for (index, (unit, layer)) in model.layers().enumerate() {
        let weights = store.gather(unit)?;
        let (first, last) = (index == 0, index + 1 == count);
        let again = checkpointing && !first && !last;
        let clock = Instant::now();
        let mut tape = match (again, last) {
            (true, _) => Tape::rehearsal(cpu),
            (false, true) => Tape::training_eager(cpu, zeros(model, unit, &weights), scale),
            (false, false) => Tape::training(cpu),
        };
        let kept = again.then(|| x.clone());
        let input = tape.input(std::mem::replace(&mut x, start(cpu)));
        let y = layer.forward(&weights, input, batch, &mut tape);
        if last {
            let (recorded, grads) = tape.finish(&y);
            let mut grads = grads.expect("an eager tape returns its gradients");
            let seed = y.tensor.cast(cpu, y.tensor.dtype(), Category::Activations);
            dx = recorded.backward(&weights, filled(cpu, seed, scale), &mut grads);
        } else {
            let recorded = (!again).then(|| tape.finish(&y).0);
            passes.push((unit, layer, recorded, kept));
            x = y.tensor;
        }
        layers.push(LayerProfile {
            name: match (first, last) {
                (true, _) => "embedding".into(),
                (_, true) => "head".into(),
                _ => model.units()[unit].name.clone(),
            },
            parameters: parameters(model, index, unit),
            flops: flops[index],
            forward: clock.elapsed().as_secs_f64(),
            backward: 0.0,
            recomputed: f64::from(u8::from(again)),
        });
    }
    for (index, (unit, layer, recorded, kept)) in passes.into_iter().enumerate().rev() {
        let Some(dy) = dx.take() else { break };
        let weights = store.gather(unit)?;
        let clock = Instant::now();
        let again = |input: Tensor| {
            let mut tape = Tape::repeating(cpu);
            let value = tape.input(input);
            let y = layer.forward(&weights, value, batch, &mut tape);
            tape.finish(&y).0
        };
        let recorded = recorded.or_else(|| kept.map(again));
        let recorded = recorded.expect("a pass is recorded, or its input is kept");
        dx = recorded.backward(&weights, dy, &mut zeros(model, unit, &weights));
        layers[index].backward = clock.elapsed().as_secs_f64();
    }
    Ok(layers)
}

/// Parameters of a layer's unit, none if an earlier layer shares it.
fn parameters(model: &Model<Tokens>, index: usize, unit: usize) -> usize {
    if model
        .layers()
        .take(index)
        .any(|(earlier, _)| earlier == unit)
    {
        return 0;
    }
    let params = &model.units()[unit].params;
    params.iter().map(|param| param.shape.len()).sum()
}

/// Gradients that nobody will ask for, of what is trained.
fn zeros(model: &Model<Tokens>, unit: usize, weights: &Weights) -> Grads {
    let params = model.units()[unit].params.iter().zip(weights.iter());
    Grads::new(params.map(|(param, weight)| param.trained && matches!(weight, Weight::Dense(_))))
}
