//! What DeepSpeed's own tests check, where it makes sense here and no other file of this folder does.
//!
//! Elsewhere: a backward pass as in data parallelism, offloading, accumulation, checkpointed activations and bf16 masters
//! (`zero.rs`: `all_stages_give_the_same_bits`), mean and sum over ranks and coarse reduction (`zero.rs`:
//! `other_reductions_give_what_they_promise`), overflow in all stages (`zero.rs`, `loss_scale.rs`), reductions that are
//! left out (`windlass/tests/accelerator.rs`), resuming at other world sizes, from and to a disk (`trainer.rs`:
//! `a_run_resumes_on_any_ranks_in_any_stage`), optimizers (`windlass-kernels/tests/optim.rs`), asynchronous transfers
//! (`windlass-store/src/swap/tests.rs`), configurations and schedules (`ds_config.rs`, `schedule/deepspeed.rs`), tiles of
//! odd lengths (`windlass-kernels/tests/rows.rs`).

use serde_json::json;
use std::time::Duration;
use windlass_comm::Group;
use windlass_model::{DecoderConfig, Goal, Layer, Model, Tokens, decoder, preset_config};
use windlass_store::swap::{AioOptions, SwapFile};
use windlass_store::{Home, Placement, Stage, Store, Tier};
use windlass_tensor::{Category, Cpu, DType, ParamId, ParamSpec, Rng, Tape, Tensor, Var, Weights};
use windlass_train::loss_scale::LossScale;
use windlass_train::{Engine, EngineOptions, Losses, Optimizer};

const SGD: Optimizer = Optimizer::Sgd {
    momentum: 0.0,
    dampening: 0.0,
    nesterov: false,
    weight_decay: 0.0,
};

/// Widths of the chain: what goes in, what its shared layer has, what comes out (an odd number that no ranks divide).
const WIDTHS: [usize; 3] = [5, 19, 53];
const ROWS: usize = 4;

/// The rows that go in.
type Batch = Vec<f64>;

/// `x Wᵀ`; the first layer starts from the batch, the last one returns the sum of what comes out.
struct Linear {
    first: bool,
    last: bool,
}

impl Layer<Batch> for Linear {
    fn forward(&self, w: &Weights, x: Var, batch: &Batch, tape: &mut Tape) -> Var {
        let cpu = tape.cpu().clone();
        let dtype = w.at(0).weight.dense().dtype();
        let x = match self.first {
            true => {
                let rows =
                    Tensor::from_slice(&cpu, batch, [ROWS, WIDTHS[0]], Category::Activations);
                tape.constant(rows.cast(&cpu, dtype, Category::Activations))
            }
            false => x,
        };
        let y = tape.linear(&x, w.at(0), None, None);
        if self.last { tape.sum(&y) } else { y }
    }
}

/// A layer whose unit has no parameters.
struct Twice;

impl Layer<Batch> for Twice {
    fn forward(&self, _: &Weights, x: Var, _: &Batch, tape: &mut Tape) -> Var {
        tape.scale(2.0, &x)
    }
}

/// A chain of linear layers, of which one is used three times, with a unit without parameters among them.
fn chain() -> Model<Batch> {
    let mut model = Model::new();
    let weight = |name: &str, rows: usize, cols: usize| {
        vec![ParamSpec::normal(
            format!("{name}.weight"),
            [rows, cols],
            0.3,
        )]
    };
    let [input, hidden, output] = WIDTHS;
    let first = model.unit("first", weight("first", hidden, input));
    let shared = model.unit("shared", weight("shared", hidden, hidden));
    let empty = model.unit("empty", Vec::new());
    let last = model.unit("last", weight("last", output, hidden));
    let linear = |first, last| Linear { first, last };
    model.layer(first, linear(true, false));
    model.layer(shared, linear(false, false));
    model.layer(shared, linear(false, false));
    model.layer(empty, Twice);
    model.layer(shared, linear(false, false));
    model.layer(last, linear(false, true));
    model
}

fn batch(number: u64) -> Batch {
    let mut rng = Rng::stream(5, number);
    (0..ROWS * WIDTHS[0])
        .map(|_| f64::from(rng.uniform_f32()) - 0.3)
        .collect()
}

/// The gradient of the sum for each weight, by hand.
fn closed_form(weights: &[Vec<f64>; 3], batch: &Batch) -> [Vec<f64>; 3] {
    let [first, shared, last] = weights;
    let steps = [
        (0, first, 1.0),
        (1, shared, 1.0),
        (1, shared, 2.0),
        (1, shared, 1.0),
        (2, last, 1.0),
    ];
    let mut grads = [first, shared, last].map(|w| vec![0.0; w.len()]);
    for row in batch.chunks(WIDTHS[0]) {
        let mut inputs = vec![row.to_vec()];
        for (_, weight, factor) in &steps {
            let x = inputs.last().unwrap();
            let dot = |w: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() * factor;
            inputs.push(weight.chunks(x.len()).map(dot).collect());
        }
        let mut flowing = vec![1.0; WIDTHS[2]];
        for (step, (index, weight, factor)) in steps.iter().enumerate().rev() {
            let x = &inputs[step];
            let mut dx = vec![0.0; x.len()];
            for (o, dy) in flowing.iter().enumerate() {
                for (i, value) in x.iter().enumerate() {
                    grads[*index][o * x.len() + i] += factor * dy * value;
                    dx[i] += factor * dy * weight[o * x.len() + i];
                }
            }
            flowing = dx;
        }
    }
    grads
}

fn options() -> EngineOptions {
    EngineOptions {
        optimizer: SGD,
        gradient_clipping: None,
        losses: Losses::Sum,
        ..Default::default()
    }
}

fn engine<B>(
    cpu: &Cpu,
    group: Group,
    model: Model<B>,
    (dtype, placement): (DType, Placement),
    options: EngineOptions,
) -> Engine<B> {
    let mut home = Home::on(group, placement);
    if placement.needs_disk() {
        let folder = std::env::temp_dir();
        let swap = SwapFile::create(&folder, "cases", AioOptions::default(), None);
        home.swap = Some(swap.unwrap());
    }
    let fill = |_, p: &ParamSpec, range| Ok(p.fill_range(cpu, 9, dtype, range));
    let store = Store::build(cpu, home, model.units(), fill).unwrap();
    Engine::initialize(model, store, options).unwrap()
}

/// Every stage with every place that it allows.
fn placements() -> Vec<Placement> {
    let mut placements = Vec::new();
    for stage in (0..4).filter_map(Stage::from_number) {
        for persistence_threshold in [0, 10, 400] {
            for [parameters, optimizer] in [
                [Tier::Memory, Tier::Memory],
                [Tier::Memory, Tier::Nvme],
                [Tier::Nvme, Tier::Nvme],
            ] {
                let placement = Placement {
                    stage,
                    persistence_threshold,
                    parameters,
                    optimizer,
                    bucket: 100,
                    swap_from: 16,
                    sub_group: 64,
                    ..Default::default()
                };
                let differs = stage == Stage::Parameters || persistence_threshold == 0;
                if placement.is_consistent() && differs {
                    placements.push(placement);
                }
            }
        }
    }
    placements
}

/// `job` on every rank.
fn ranks<T: Send>(count: usize, job: impl Fn(Group) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let groups = Group::local(count, Duration::from_secs(60));
        let ranks: Vec<_> = groups.into_iter().map(|g| scope.spawn(|| job(g))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn ids<B>(engine: &Engine<B>) -> Vec<ParamId> {
    engine.store().params().map(|(id, _)| id).collect()
}

fn masters<B>(engine: &mut Engine<B>) -> Vec<Vec<f32>> {
    let ids = ids(engine);
    ids.into_iter()
        .map(|id| engine.store_mut().master(id).unwrap())
        .collect()
}

fn passes(engine: &mut Engine<Batch>, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let loss = engine.forward(batch(number)).unwrap();
        engine.backward(loss).unwrap();
    }
}

/// Partitioned parameters (uneven, persistent or not, on a disk or not), a module used several times, a group without
/// parameters: every gradient is the one found by hand, and the weights after a step follow from it.
#[test]
fn every_gradient_is_the_closed_form() {
    for count in [1, 2, 3] {
        for placement in placements() {
            ranks(count, |group| {
                let rank = group.rank() as u64;
                let home = (DType::F32, placement);
                let mut engine = engine(&Cpu::new(1), group, chain(), home, options());
                let before = masters(&mut engine);
                let weights: Vec<Vec<f64>> = before
                    .iter()
                    .map(|w| w.iter().map(|&v| f64::from(v)).collect())
                    .collect();
                let weights = <[_; 3]>::try_from(weights).unwrap();
                let mut wanted = [0, 1, 2].map(|i| vec![0.0; before[i].len()]);
                for other in 0..count as u64 {
                    let grads = closed_form(&weights, &batch(other));
                    for (sum, grad) in wanted.iter_mut().zip(grads) {
                        sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g);
                    }
                }
                passes(&mut engine, rank..rank + 1);
                for (id, wanted) in ids(&engine).into_iter().zip(&wanted) {
                    let found = engine.store().gradient(id).unwrap().unwrap().to_f64();
                    for (a, b) in found.iter().zip(wanted) {
                        let close = (a - b).abs() < 1e-5 + 1.3e-6 * b.abs().max(10.0);
                        assert!(close, "{a} and {b} in {placement:?} on {count} ranks");
                    }
                }
                engine.step_at(1e-3).unwrap();
                let after = masters(&mut engine);
                for ((after, before), grads) in after.iter().zip(&weights).zip(&wanted) {
                    for ((a, b), g) in after.iter().zip(before).zip(grads) {
                        let moved = b - 1e-3 * g;
                        assert!((f64::from(*a) - moved).abs() < 1e-6, "{a} and {moved}");
                    }
                }
            });
        }
    }
}

/// Values, gradients and moments by name: whole on every rank, and what is set is seen by all.
#[test]
fn full_tensors_are_got_and_set_on_every_rank() {
    for dtype in [DType::F32, DType::Bf16] {
        for placement in placements() {
            ranks(3, |group| {
                let rank = group.rank() as u64;
                let cpu = Cpu::new(1);
                let adam = EngineOptions {
                    optimizer: Optimizer::ADAMW,
                    ..options()
                };
                let mut engine = engine(&cpu, group, chain(), (dtype, placement), adam);
                let id = engine.store().find("last.weight").unwrap();
                assert!(engine.store().gradient(id).unwrap().is_none());
                let set: Vec<f32> = (0..53 * 19).map(|i| i as f32 * 1e-3 + 1e-6).collect();
                engine.store_mut().set_master(id, &set).unwrap();
                assert!(
                    engine.store_mut().master(id).unwrap() == set,
                    "{placement:?}"
                );
                let whole = engine
                    .store()
                    .gather(id.unit)
                    .unwrap()
                    .at(id.slot)
                    .weight
                    .dense()
                    .to_f64();
                for (a, b) in whole.iter().zip(&set) {
                    assert!(
                        (a - f64::from(*b)).abs() <= 4e-3 * f64::from(*b),
                        "{a} and {b}"
                    );
                }
                passes(&mut engine, rank..rank + 1);
                let grad = engine.store().gradient(id).unwrap().unwrap().to_f64();
                engine.step_at(0.0).unwrap();
                let moment = engine.store_mut().moment(id, 0).unwrap();
                // The mean of gradients starts as a tenth of the first one.
                for (m, g) in moment.iter().zip(&grad) {
                    let wanted = 0.1 * g;
                    let close = (f64::from(*m) - wanted).abs() < 1e-5 * wanted.abs().max(1.0);
                    assert!(close, "{m} and {wanted} in {placement:?}");
                }
                assert!(engine.store().find("lost.weight").is_none());
            });
        }
    }
}

/// Several engines, their losses added up and taken back together, are as each alone.
#[test]
fn several_engines_do_not_meet() {
    let cpu = Cpu::new(2);
    let home = (DType::F32, Placement::default());
    let new = || engine(&cpu, Group::solo(), chain(), home, options());
    let alone = [0, 10].map(|from| {
        let mut engine = new();
        for step in from..from + 3 {
            passes(&mut engine, step..step + 1);
            engine.step_at(1e-3).unwrap();
        }
        masters(&mut engine)
    });
    let (mut one, mut other) = (new(), new());
    for step in 0..3 {
        let losses = [one.forward(batch(step)), other.forward(batch(10 + step))];
        let [a, b] = losses.map(Result::unwrap);
        assert!((a.value() + b.value()).is_finite());
        other.backward(b).unwrap();
        one.backward(a).unwrap();
        one.step_at(1e-3).unwrap();
        other.step_at(1e-3).unwrap();
    }
    assert!([masters(&mut one), masters(&mut other)] == alone);
}

/// The loss of a step is the mean of its batches' losses, or their sum if that is asked for.
#[test]
fn accumulated_losses_are_a_mean_or_a_sum() {
    let norms = [Losses::Mean, Losses::Sum].map(|losses| {
        let norms = ranks(2, |group| {
            let rank = group.rank() as u64;
            let options = EngineOptions {
                losses,
                gradient_accumulation_steps: 4,
                ..options()
            };
            let home = (DType::F32, Placement::default());
            let mut engine = engine(&Cpu::new(1), group, chain(), home, options);
            for micro in 0..4 {
                assert_eq!(engine.is_gradient_accumulation_boundary(), micro == 3);
                passes(&mut engine, rank * 4 + micro..rank * 4 + micro + 1);
            }
            engine.step_at(0.0).unwrap().grad_norm
        });
        assert_eq!(norms[0], norms[1]);
        norms[0]
    });
    let ratio = norms[1] / norms[0];
    assert!((ratio - 8.0).abs() < 1e-12, "2 ranks of 4 batches: {ratio}");
}

/// The norm is that before clipping; the update is no longer than the bound; without a bound nothing is clipped.
#[test]
fn clipping_bounds_the_update_and_reports_the_norm_before() {
    for placement in placements() {
        let mut reported = Vec::new();
        for clip in [None, Some(1e-2), Some(1.0), Some(1e6)] {
            let moved = ranks(2, |group| {
                let rank = group.rank() as u64;
                let options = EngineOptions {
                    gradient_clipping: clip,
                    ..options()
                };
                let home = (DType::F32, placement);
                let mut engine = engine(&Cpu::new(1), group, chain(), home, options);
                let before = masters(&mut engine);
                passes(&mut engine, rank..rank + 1);
                let norm = engine.step_at(1e-2).unwrap().grad_norm;
                assert_eq!(engine.last_grad_norm(), Some(norm));
                let after = masters(&mut engine);
                let pairs = before.iter().flatten().zip(after.iter().flatten());
                let squares = pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                (norm, squares.sqrt() / 1e-2)
            });
            let (norm, moved) = moved[0];
            let wanted = clip.map_or(norm, |clip| norm.min(clip));
            assert!(
                (moved - wanted).abs() < 2e-3 * wanted,
                "{moved}, not {wanted}, at {clip:?}"
            );
            reported.push(norm);
        }
        assert!(
            reported.windows(2).all(|pair| pair[0] == pair[1]),
            "{reported:?}"
        );
    }
}

/// A loss scale changes no gradient beyond the rounding of `f16`.
#[test]
fn a_loss_scale_changes_no_gradient() {
    let norm = |scale: Option<f64>| {
        let options = EngineOptions {
            loss_scale: scale.map(LossScale::Static),
            ..options()
        };
        let home = (DType::F16, Placement::default());
        let mut engine = engine(&Cpu::new(1), Group::solo(), chain(), home, options);
        passes(&mut engine, 0..1);
        engine.step_at(0.0).unwrap().grad_norm
    };
    let wanted = norm(None);
    for scale in [1.0, 4.0, 16.0] {
        let found = norm(Some(scale));
        assert!(
            (found - wanted).abs() < 1e-3 * wanted,
            "{found} and {wanted} at {scale}"
        );
    }
}

/// Saved before the first step, saved again after loading, saved and loaded amid the batches of a step: training goes on
/// from the last step.
#[test]
fn checkpoints_at_odd_moments() {
    for placement in [Placement::default(), placements().pop().unwrap()] {
        let folder = tempfile::tempdir().unwrap();
        let options = EngineOptions {
            optimizer: Optimizer::ADAMW,
            gradient_accumulation_steps: 2,
            ..options()
        };
        let home = (DType::Bf16, placement);
        let new = || engine(&Cpu::new(1), Group::solo(), chain(), home, options);
        let step = |engine: &mut Engine<Batch>, number: u64| {
            passes(engine, 2 * number..2 * number + 2);
            engine.step_at(1e-2).unwrap();
        };
        let mut whole = new();
        (0..4).for_each(|number| step(&mut whole, number));
        let wanted = masters(&mut whole);

        let mut first = new();
        first
            .save_checkpoint(folder.path(), Some("start"), &json!({"at": 0}))
            .unwrap();
        let mut second = new();
        step(&mut second, 7);
        let (_, state) = second
            .load_checkpoint(folder.path(), None)
            .unwrap()
            .unwrap();
        assert_eq!((state, second.global_steps()), (json!({"at": 0}), 0));
        second
            .save_checkpoint(folder.path(), Some("again"), &json!(null))
            .unwrap();
        let mut third = new();
        third
            .load_checkpoint(folder.path(), Some("again"))
            .unwrap()
            .unwrap();
        (0..2).for_each(|number| step(&mut third, number));
        // One batch of the third step, which the checkpoint forgets, and so does the engine that loads it.
        passes(&mut third, 4..5);
        third
            .save_checkpoint(folder.path(), None, &json!(null))
            .unwrap();
        let mut fourth = new();
        for engine in [&mut third, &mut fourth] {
            engine
                .load_checkpoint(folder.path(), None)
                .unwrap()
                .unwrap();
            assert_eq!(engine.global_steps(), 2);
            (2..4).for_each(|number| step(engine, number));
            assert!(masters(engine) == wanted, "{placement:?}");
        }
    }
}

/// Experts are parameters like others, some of them without a token in a batch: all stages give the same bits.
#[test]
fn experts_train_the_same_in_every_stage() {
    let text = preset_config("mixtral", "1m", 320).unwrap();
    let config = DecoderConfig::from_json("experts", &text).unwrap();
    let train = |placement: Placement| {
        let mut all = ranks(2, |group| {
            let rank = group.rank() as u64;
            let home = (DType::F32, placement);
            let mut engine = engine(&Cpu::new(1), group, decoder(&config), home, options());
            for step in 0..2 {
                let mut rng = Rng::stream(step, rank);
                let mut id = |_| (rng.next_u64() % 320) as u32;
                let tokens: Vec<u32> = (0..6).map(&mut id).collect();
                let goal = Goal::Loss {
                    targets: tokens.iter().map(|&t| i64::from(t)).collect(),
                    denominator: 12.0,
                };
                let loss = engine
                    .forward(Tokens::new(tokens, &[6], goal, DType::F32))
                    .unwrap();
                engine.backward(loss).unwrap();
                engine.step_at(1e-2).unwrap();
            }
            masters(&mut engine)
        });
        assert_eq!(all[0], all[1], "ranks");
        all.swap_remove(0)
    };
    let stage = |number: u8| Placement {
        stage: Stage::from_number(number).unwrap(),
        persistence_threshold: 0,
        ..Default::default()
    };
    let wanted = train(stage(0));
    for number in 1..4 {
        assert!(train(stage(number)) == wanted, "stage {number}");
    }
}
