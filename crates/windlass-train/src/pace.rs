//! How long passes over a model take, from one layer of each kind.
//!
//! Layers of one kind take the same time, so that a model of many layers is measured without its weights and in a moment. The
//! optimizer and the ranks' waiting for one another are left out.

use crate::data::Batch;
use crate::engine::{filled, start};
use crate::trainer::to_tokens;
use std::sync::Arc;
use std::time::Instant;
use windlass_model::{DecoderConfig, Layer, Model, Tokens};
use windlass_tensor::kernels::Element;
use windlass_tensor::kernels::elementwise::fill as fill_with;
use windlass_tensor::kernels::packed::{Layout, PackedMatrix};
use windlass_tensor::{
    Category, Cpu, DType, Grads, Packed, ParamSpec, Shape, Tape, Tensor, UnitSpec, Weight, Weights,
    each_dtype,
};

/// The largest parameter that is filled by chance; others have one number everywhere, which takes as long.
const FILLED: usize = 1 << 20;

/// Seconds of passes over a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pace {
    /// Through all layers; in the last one the loss brings its gradient.
    pub forward: f64,
    /// Back, and what is run again for it.
    pub backward: f64,
}

/// What the weights of a model are, without their numbers.
pub struct Likeness(Vec<Vec<Like>>);

#[derive(Clone, PartialEq)]
enum Like {
    Dense(DType),
    Packed(Layout, Option<Arc<[u32]>>),
}

impl Likeness {
    /// That of some weights.
    pub fn of(units: &[Weights]) -> Self {
        let like = |weight: &Weight| match weight {
            Weight::Dense(tensor) => Like::Dense(tensor.dtype()),
            Weight::Packed(packed) => {
                Like::Packed(*packed.matrix().layout(), packed.order().cloned())
            }
        };
        let unit = |weights: &Weights| weights.iter().map(like).collect();
        Likeness(units.iter().map(unit).collect())
    }
}

impl Like {
    fn weight(&self, cpu: &Cpu, param: &ParamSpec) -> Weight {
        let shape = param.shape;
        match self {
            Like::Dense(dtype) if shape.len() <= FILLED => param.fill(cpu, 0, *dtype).into(),
            Like::Dense(dtype) => {
                let mut tensor = Tensor::empty(cpu, shape, *dtype, Category::Weights);
                each_dtype!(*dtype, E =>
                    fill_with(&cpu.pool, E::from_f64(1e-3), tensor.as_mut_slice::<E>()));
                tensor.into()
            }
            Like::Packed(layout, order) => {
                let shape = [shape[0], shape[1]];
                // Not zeros: pages that nobody wrote are all the same page, which is in a cache.
                let bytes = vec![1u8; PackedMatrix::packed_bytes(layout, shape)];
                let matrix = PackedMatrix::from_bytes(*layout, shape, Arc::new(bytes));
                let packed = Packed::from(matrix);
                Weight::Packed(match order {
                    Some(order) => packed.with_order(order.clone()),
                    None => packed,
                })
            }
        }
    }
}

/// What a layer is, as far as its time depends on it.
#[derive(PartialEq)]
struct Kind<'a> {
    /// Shape, representation, whether it is trained.
    params: Vec<(Shape, &'a Like, bool)>,
    role: Role,
}

#[derive(Clone, Copy, PartialEq)]
enum Role {
    /// Neither it nor a layer before it trains anything.
    Frozen,
    /// No layer before it does.
    End,
    Middle,
    /// The loss.
    Last,
}

/// Seconds of a pass over a batch and back, through a model whose weights are as `like` says. With `checkpointing` layers are
/// run again on the way back.
///
/// # Panics
/// When the likeness is that of another model.
pub fn pace(
    cpu: &Cpu,
    model: &Model<Tokens>,
    like: &Likeness,
    (config, dtype): (&DecoderConfig, DType),
    batch: &Batch,
    checkpointing: bool,
) -> Pace {
    let (units, count) = (model.units(), model.layers().len());
    let trains = |unit: usize| units[unit].params.iter().any(|param| param.trained);
    let first = model.layers().position(|(unit, _)| trains(unit));
    let first = first.unwrap_or(count);
    let mut seen: Vec<(Kind<'_>, Pace)> = Vec::new();
    let (mut sum, mut x) = (Pace::default(), start(cpu));
    for (index, (unit, layer)) in model.layers().enumerate() {
        let (spec, like) = (&units[unit], &like.0[unit]);
        let params = spec.params.iter().zip(like);
        let kind = Kind {
            params: params.map(|(p, like)| (p.shape, like, p.trained)).collect(),
            role: match index {
                _ if index + 1 == count => Role::Last,
                _ if index < first => Role::Frozen,
                _ if index == first => Role::End,
                _ => Role::Middle,
            },
        };
        // The first layer starts from the batch, the others from what the one before them made.
        let known = seen.iter().find(|(known, _)| index > 1 && *known == kind);
        let took = match known {
            Some((_, took)) => *took,
            None => {
                let weights = fill(cpu, spec, like);
                let again = checkpointing && kind.role == Role::Middle;
                let batch = || Tokens {
                    // The balance of experts couples layers, and costs next to nothing.
                    router: None,
                    ..to_tokens(batch.clone(), config, dtype, 1.0, 1)
                };
                let (mut best, mut y) = (None::<Pace>, None);
                for _ in 0..2 {
                    let (took, out) =
                        run(cpu, (spec, layer, &weights), x.clone(), &batch(), kind.role);
                    best = Some(best.map_or(took, |best| Pace {
                        forward: best.forward.min(took.forward),
                        backward: best.backward.min(took.backward),
                    }));
                    y = Some(out);
                }
                x = y.expect("two runs");
                let mut took = best.expect("two runs");
                took.backward += f64::from(u8::from(again)) * took.forward;
                seen.push((kind, took));
                took
            }
        };
        sum.forward += took.forward;
        sum.backward += took.backward;
    }
    sum
}

fn fill(cpu: &Cpu, spec: &UnitSpec, like: &[Like]) -> Weights {
    assert_eq!(spec.params.len(), like.len(), "weights of {}", spec.name);
    let weights = spec.params.iter().zip(like);
    let weights = weights.map(|(param, like)| like.weight(cpu, param));
    Weights::new(weights.collect()).with_adapters(&spec.adapters)
}

/// Runs a layer and goes back.
fn run(
    cpu: &Cpu,
    (spec, layer, weights): (&UnitSpec, &dyn Layer<Tokens>, &Weights),
    x: Tensor,
    batch: &Tokens,
    role: Role,
) -> (Pace, Tensor) {
    let dense = |(param, weight): (&ParamSpec, &Weight)| {
        param.trained && matches!(weight, Weight::Dense(_))
    };
    let mut grads = Grads::new(spec.params.iter().zip(weights.iter()).map(dense));
    let clock = Instant::now();
    let mut tape = match role {
        Role::Frozen => Tape::rehearsal(cpu),
        Role::Last => Tape::training_eager(cpu, std::mem::take(&mut grads), 1.0),
        Role::End | Role::Middle => Tape::training(cpu),
    };
    let input = match role {
        Role::End => tape.constant(x),
        _ => tape.input(x),
    };
    let y = layer.forward(weights, input, batch, &mut tape);
    let (recorded, kept) = tape.finish(&y);
    let forward = clock.elapsed().as_secs_f64();
    if role == Role::Frozen {
        let backward = 0.0;
        return (Pace { forward, backward }, y.tensor);
    }
    let mut grads = kept.unwrap_or(grads);
    let clock = Instant::now();
    let seed = y.tensor.deep_clone(cpu, Category::Activations);
    let seed = match role {
        Role::Last => filled(cpu, seed, 1.0),
        _ => seed,
    };
    recorded.backward(weights, seed, &mut grads);
    let backward = clock.elapsed().as_secs_f64();
    (Pace { forward, backward }, y.tensor)
}
