//! What a run says about itself while it goes and at its end, as `ds_config.json` asks: steps, times, communication.

use windlass::comm::Volume;
use windlass::train::config::Observe;
use windlass::train::{LayerProfile, Plan, StepEvent};

/// Calls and bytes of a step by collective, as a plan has them.
type Theory = [(&'static str, u64, u64); 6];

/// Collects what steps tell and says it when it is due.
#[derive(Default)]
pub struct Observer {
    observe: Observe,
    theory: Theory,
    /// Since the last lines.
    window: Sums,
    /// Since the start.
    run: Sums,
}

/// What steps have in sum.
#[derive(Clone, Default)]
struct Sums {
    steps: u64,
    seconds: f64,
    milliseconds: [(&'static str, f64); 5],
    volumes: [Volume; 6],
}

impl Observer {
    /// An observer of the first rank of a run. The plan is what its communication is compared with, where it is to be told.
    pub fn new(observe: Observe, plan: Option<&Plan>) -> Self {
        Self {
            observe,
            theory: plan.map_or_else(Theory::default, |plan| plan.collectives),
            ..Self::default()
        }
    }

    /// Takes in a step; returns the lines that are due.
    pub fn step(&mut self, event: &StepEvent) -> Vec<String> {
        self.window.add(event);
        self.run.add(event);
        let mut lines = Vec::new();
        let comms = self.observe.comms_logger.as_ref();
        let each = comms.is_some_and(|comms| comms.verbose).then_some(1);
        let every = self.observe.steps_per_print.or(each);
        if every.is_none_or(|every| !event.step.is_multiple_of(every.max(1))) {
            return lines;
        }
        if self.observe.steps_per_print.is_some() {
            let &StepEvent {
                step,
                skipped,
                lr,
                loss,
                ..
            } = event;
            lines.push(format!(
                "step={step}, skipped={skipped}, lr={lr:e}, loss={loss:.6}"
            ));
            if self.observe.wall_clock_breakdown {
                lines.push(self.window.times());
            }
        }
        if each.is_some() {
            lines.extend(self.communication(&self.window));
        }
        self.window = Sums::default();
        lines
    }

    /// The table of layers, if it does not go to a file.
    pub fn profile(&self, mut layers: Vec<LayerProfile>) -> Vec<String> {
        let Some(asked) = &self.observe.flops_profiler else {
            return Vec::new();
        };
        if asked.recompute_fwd_factor > 0.0 {
            // The head has no backward pass of its own, so nothing to repeat.
            for layer in layers.iter_mut().filter(|layer| layer.backward > 0.0) {
                layer.recomputed = asked.recompute_fwd_factor;
            }
        }
        let sum = |part: fn(&LayerProfile) -> f64| layers.iter().map(part).sum::<f64>();
        let (time, all) = (
            sum(|layer| layer.forward + layer.backward),
            sum(LayerProfile::all_flops),
        );
        let line = |name: &str, parameters: usize, flops: f64, times: [f64; 2], rate: f64| {
            let [forward, backward] = times.map(|seconds| seconds * 1e3);
            let share = 100.0 * (times[0] + times[1]) / time;
            format!(
                "  {name:<12}{parameters:>14}{:>14.6}{forward:>12.3}{backward:>12.3}{share:>8.1}{rate:>10.2}",
                flops / 1e9
            )
        };
        let mut lines = vec![
            format!(
                "profile of one micro-batch before step {} on the first rank; the head's forward time has both passes",
                asked.profile_step
            ),
            format!(
                "  {:<12}{:>14}{:>14}{:>12}{:>12}{:>8}{:>10}",
                "", "parameters", "GFLOP forward", "forward ms", "backward ms", "%", "GFLOP/s"
            ),
        ];
        if asked.detailed {
            lines.extend(layers.iter().map(|layer| {
                let times = [layer.forward, layer.backward];
                let rate = layer.gflops_per_second();
                line(&layer.name, layer.parameters, layer.flops, times, rate)
            }));
        }
        let parameters = layers.iter().map(|layer| layer.parameters).sum();
        let times = [sum(|layer| layer.forward), sum(|layer| layer.backward)];
        let flops = sum(|layer| layer.flops);
        lines.push(line("all", parameters, flops, times, all / time / 1e9));
        let Some(path) = &asked.output_file else {
            return lines;
        };
        match std::fs::write(path, lines.join("\n") + "\n") {
            Ok(()) => vec![format!("profile written to {}", path.display())],
            Err(error) => {
                let path = path.display();
                lines.push(format!("flops_profiler.output_file {path}: {error}"));
                lines
            }
        }
    }

    /// What is said at the end.
    pub fn end(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.run.steps == 0 {
            return lines;
        }
        if self.observe.wall_clock_breakdown {
            lines.push(self.run.times());
        }
        if self.observe.comms_logger.is_some() {
            lines.extend(self.communication(&self.run));
        }
        lines
    }

    /// A table of collectives: what a step sent, what it should have sent, and how fast.
    fn communication(&self, sums: &Sums) -> Vec<String> {
        let asked = self.observe.comms_logger.as_ref();
        let asked = asked.map_or(&[][..], |comms| &comms.prof_ops);
        let steps = sums.steps as f64;
        let mut lines = vec![
            format!(
                "communication of the first rank, mean of {} steps",
                sums.steps
            ),
            row(["", "calls", "bytes", "theory", "ms", "GB/s"].map(str::to_owned)),
        ];
        for ((name, calls, theory), volume) in self.theory.iter().zip(&sums.volumes) {
            // Small messages are no part of the theory of ZeRO.
            let control = *name == "control";
            let hidden = !asked.is_empty() && !asked.iter().any(|asked| asked == name);
            if hidden || (volume.calls == 0 && *calls == 0) {
                continue;
            }
            let rate = match volume.bytes {
                0 => "-".to_owned(),
                bytes => format!("{:.3}", bytes as f64 / volume.seconds / 1e9),
            };
            let theory = match control {
                true => "-".to_owned(),
                false => theory.to_string(),
            };
            lines.push(row([
                (*name).to_owned(),
                mean(volume.calls, sums.steps),
                mean(volume.bytes, sums.steps),
                theory,
                format!("{:.3}", volume.seconds * 1e3 / steps),
                rate,
            ]));
        }
        if lines.len() == 2 {
            lines.truncate(1);
            lines[0].push_str(": none");
        }
        lines
    }
}

/// A row of the table.
fn row(cells: [String; 6]) -> String {
    let [name, calls, bytes, theory, time, rate] = cells;
    format!("  {name:<16}{calls:>8}{bytes:>16}{theory:>16}{time:>12}{rate:>10}")
}

/// A mean, without a fraction where it has none.
fn mean(sum: u64, steps: u64) -> String {
    match sum.is_multiple_of(steps) {
        true => (sum / steps).to_string(),
        false => format!("{:.1}", sum as f64 / steps as f64),
    }
}

impl Sums {
    fn add(&mut self, event: &StepEvent) {
        self.steps += 1;
        self.seconds += event.seconds;
        for (sum, (name, milliseconds)) in self.milliseconds.iter_mut().zip(event.milliseconds()) {
            *sum = (name, sum.1 + milliseconds);
        }
        for (sum, (_, volume)) in self.volumes.iter_mut().zip(event.traffic.kinds()) {
            sum.calls += volume.calls;
            sum.bytes += volume.bytes;
            sum.seconds += volume.seconds;
        }
    }

    fn times(&self) -> String {
        let steps = self.steps as f64;
        let parts = self.milliseconds.map(|(name, sum)| {
            let name = name.trim_end_matches("_ms");
            format!("{name} {:.2}", sum / steps)
        });
        format!(
            "time (ms), mean of {} steps: {} | of it waiting for ranks: {} | all {:.2}",
            self.steps,
            parts[..3].join(", "),
            parts[3..].join(", "),
            self.seconds * 1e3 / steps
        )
    }
}
