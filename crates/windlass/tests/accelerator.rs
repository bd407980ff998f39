//! The engine in Accelerate's words: accumulation that sends nothing before the last batch.

use std::time::Duration;
use windlass::accelerator::{Accelerator, AcceleratorOptions};
use windlass::comm::Group;
use windlass::prelude::*;
use windlass::store::{Placement, Stage};
use windlass::train::schedule::Rate;

const WIDTH: usize = 64;

/// `mean (x Wᵀ)²`.
struct Square;

impl Layer<Vec<f32>> for Square {
    fn forward(&self, w: &Weights, _: Var, batch: &Vec<f32>, tape: &mut Tape) -> Var {
        let rows = batch.len() / WIDTH;
        let x = Tensor::from_slice(&Cpu::new(1), batch, [rows, WIDTH], Category::Activations);
        let x = tape.constant(x);
        let y = tape.linear(&x, w.at(0), None, None);
        let square = tape.mul(&y, &y);
        let sum = tape.sum(&square);
        tape.scale(1.0 / batch.len() as f64, &sum)
    }
}

/// The weights after some steps of four batches, and the bytes that a rank has sent to reduce gradients.
fn train(group: Group, stage: Stage, sync_each_batch: bool) -> (Vec<f32>, u64) {
    let mut model = Model::new();
    let weight = ParamSpec::normal("weight", [WIDTH, WIDTH], 0.1);
    let unit = model.unit("linear", vec![weight]);
    model.layer(unit, Square);
    let options = AcceleratorOptions {
        gradient_accumulation_steps: 4,
        sync_each_batch,
        placement: Placement {
            stage,
            persistence_threshold: 0,
            ..Placement::default()
        },
        ..AcceleratorOptions::default()
    };
    let mut accelerator = Accelerator::on(Cpu::new(1), group, options);
    let mut rng = Rng::stream(7, accelerator.process_index() as u64);
    let sgd = Optimizer::Sgd {
        momentum: 0.9,
        dampening: 0.0,
        nesterov: false,
        weight_decay: 0.0,
    };
    let mut model = accelerator
        .prepare(model, sgd, Rate::Constant(0.1))
        .unwrap();
    for _ in 0..12 {
        let batch = (0..4 * WIDTH).map(|_| rng.uniform_f32() - 0.5).collect();
        model.accumulate(batch).unwrap();
    }
    assert_eq!(model.engine().global_steps(), 3);
    let sent = model
        .engine()
        .store()
        .group()
        .traffic()
        .reduce_scatter
        .bytes;
    let id = model.engine().store().find("weight").unwrap();
    (model.engine().store_mut().master(id).unwrap(), sent)
}

#[test]
fn accumulation_sends_nothing_before_the_last_batch_where_the_stage_allows_it() {
    let run = |stage, each| {
        std::thread::scope(|scope| {
            let groups = Group::local(2, Duration::from_secs(60)).into_iter();
            let ranks: Vec<_> = groups
                .map(|group| scope.spawn(move || train(group, stage, each)))
                .collect();
            let mut seen = ranks.into_iter().map(|rank| rank.join().unwrap());
            let (first, second) = (seen.next().unwrap(), seen.next().unwrap());
            assert_eq!(first, second, "both ranks have half of the parameter");
            first
        })
    };
    let (want, all) = run(Stage::Replicated, true);
    assert_eq!(all as usize, 3 * 4 * 4 * WIDTH * WIDTH / 2);
    for stage in [
        Stage::Replicated,
        Stage::Optimizer,
        Stage::Gradients,
        Stage::Parameters,
    ] {
        let (weights, sent) = run(stage, false);
        let once = stage < Stage::Gradients;
        assert_eq!(sent, if once { all / 4 } else { all }, "{stage:?}");
        assert!(once || weights == want, "{stage:?}: the same sums");
        for (a, b) in weights.iter().zip(&want) {
            assert!((a - b).abs() < 1e-6, "{stage:?}: {a} and {b}");
        }
    }
}
