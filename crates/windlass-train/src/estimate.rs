//! DeepSpeed's estimators of the memory of model states, by their formulas and in their words.
//!
//! They know parameters, gradients and states of Adam in mixed precision, and no activations: what a run of this
//! program takes is its plan's to say. Beside them DeepSpeed's readers compare.
//!
//! # Source
//! `runtime/zero/stage_1_and_2.py` and `runtime/zero/stage3.py` of DeepSpeed 0.19.

use std::collections::HashMap;
use std::fmt::Write;

use serde::Serialize;
use windlass_tensor::UnitSpec;

/// What the estimators know of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ModelSize {
    /// Parameters, shared ones once.
    pub total_params: u64,
    /// Parameters of the largest layer: a weight and its bias.
    pub largest_layer_params: u64,
}

impl ModelSize {
    /// The size of a model from its units.
    pub fn of(units: &[UnitSpec]) -> Self {
        let mut layers: HashMap<&str, u64> = HashMap::new();
        for param in units.iter().flat_map(|unit| &unit.params) {
            let layer = param.name.rsplit_once('.').map_or("", |(layer, _)| layer);
            *layers.entry(layer).or_default() += param.shape.len() as u64;
        }
        Self {
            total_params: layers.values().sum(),
            largest_layer_params: layers.values().copied().max().unwrap_or(0),
        }
    }
}

/// The machines of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Hardware {
    /// Machines; at least 1.
    pub nodes: u64,
    /// Ranks of each; at least 1.
    pub ranks_per_node: u64,
}

impl Hardware {
    fn ranks(self) -> f64 {
        (self.nodes * self.ranks_per_node) as f64
    }
}

/// The factor DeepSpeed adds to memory of the host for buffers.
pub const ADDITIONAL_BUFFER_FACTOR: f64 = 1.5;

/// Bytes for a choice of settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Bytes of each machine's memory.
    pub per_cpu: u64,
    /// Bytes of each device.
    pub per_gpu: u64,
    /// The settings in DeepSpeed's words.
    pub options: String,
}

/// Bytes `(per machine, per device)` of stage 2, with states and their update on the host or not.
pub fn zero2(model: ModelSize, hardware: Hardware, offload_optimizer: bool) -> (u64, u64) {
    let params = model.total_params as f64;
    let ranks = hardware.ranks();
    let (cpu, gpu) = match offload_optimizer {
        true => (params * (4.0 * ranks).max(16.0), 2.0 * params),
        false => (
            params * 4.0 * hardware.ranks_per_node as f64,
            2.0 * params + (18.0 * params / ranks).floor(),
        ),
    };
    ((cpu * ADDITIONAL_BUFFER_FACTOR) as u64, gpu as u64)
}

/// What is on the host at stage 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Nothing.
    None,
    /// States of the optimizer, and their update.
    Optimizer,
    /// These and parameters.
    Both,
}

/// Bytes `(per machine, per device)` of stage 3. Without `zero_init` each rank of a machine builds the whole model.
pub fn zero3(
    model: ModelSize,
    hardware: Hardware,
    offload: Offload,
    zero_init: bool,
) -> (u64, u64) {
    let params = model.total_params as f64;
    let largest = model.largest_layer_params as f64;
    let (ranks, local) = (hardware.ranks(), hardware.ranks_per_node as f64);
    let share = 1.0 / hardware.nodes as f64;
    let on_host = |bytes: f64| match zero_init {
        true => params * bytes * share,
        false => params * (4.0 * local).max(bytes * share),
    };
    let (cpu, gpu) = match offload {
        Offload::Both => (on_host(18.0), 0.0),
        Offload::Optimizer => (on_host(16.0), (2.0 * params / ranks).floor()),
        Offload::None if zero_init => (largest * 4.0 * local, (18.0 * params / ranks).floor()),
        Offload::None => (params * 4.0 * local, (18.0 * params / ranks).floor()),
    };
    (
        (cpu * ADDITIONAL_BUFFER_FACTOR) as u64,
        (4.0 * largest + gpu) as u64,
    )
}

/// All settings of stage 2, in DeepSpeed's order.
pub fn zero2_rows(model: ModelSize, hardware: Hardware) -> Vec<Row> {
    [(true, "cpu "), (false, "none")]
        .map(|(offload, device)| {
            let (per_cpu, per_gpu) = zero2(model, hardware, offload);
            Row {
                per_cpu,
                per_gpu,
                options: format!("offload_optimizer={device}"),
            }
        })
        .into()
}

/// All settings of stage 3, in DeepSpeed's order.
pub fn zero3_rows(model: ModelSize, hardware: Hardware) -> Vec<Row> {
    let mut rows = Vec::new();
    for (offload, params, optimizer) in [
        (Offload::Both, "cpu ", "cpu "),
        (Offload::Optimizer, "none", "cpu "),
        (Offload::None, "none", "none"),
    ] {
        for zero_init in [true, false] {
            let (per_cpu, per_gpu) = zero3(model, hardware, offload, zero_init);
            let init = u8::from(zero_init);
            rows.push(Row {
                per_cpu,
                per_gpu,
                options: format!(
                    "offload_param={params}, offload_optimizer={optimizer}, zero_init={init}"
                ),
            });
        }
    }
    rows
}

/// Stage 2 as DeepSpeed prints it, its trailing blanks included. GB are 2^30 bytes.
pub fn zero2_table(model: ModelSize, hardware: Hardware) -> String {
    let size = format!("{}M total params.", model.total_params / 1_000_000);
    table(hardware, &size, &zero2_rows(model, hardware))
}

/// Stage 3 as DeepSpeed prints it. GB are 2^30 bytes.
pub fn zero3_table(model: ModelSize, hardware: Hardware) -> String {
    let size = format!(
        "{}M total params, {}M largest layer params.",
        model.total_params / 1_000_000,
        model.largest_layer_params / 1_000_000
    );
    table(hardware, &size, &zero3_rows(model, hardware))
}

fn table(hardware: Hardware, size: &str, rows: &[Row]) -> String {
    let plural = |count: u64, name: &str| {
        let end = if count > 1 { "s" } else { "" };
        format!("{count} {name}{end}")
    };
    let mut text = format!(
        "Estimated memory needed for params, optim states and gradients for a:\n\
         HW: Setup with {}, {} per node.\n\
         SW: Model with {size}\n  per CPU  |  per GPU |   Options\n",
        plural(hardware.nodes, "node"),
        plural(hardware.ranks_per_node, "GPU"),
    );
    let gb = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    for row in rows {
        let (cpu, gpu) = (gb(row.per_cpu), gb(row.per_gpu));
        let line = writeln!(text, " {cpu:7.2}GB | {gpu:6.2}GB | {}", row.options);
        line.expect("a String takes everything");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_tensor::{Init, ParamSpec};

    const T5_3B: ModelSize = ModelSize {
        total_params: 2_851_000_000,
        largest_layer_params: 32_000_000,
    };
    const ONE_BY_EIGHT: Hardware = Hardware {
        nodes: 1,
        ranks_per_node: 8,
    };

    #[test]
    fn the_tables_are_deepspeeds_to_the_letter() {
        let three = "\
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 1 node, 8 GPUs per node.
SW: Model with 2851M total params, 32M largest layer params.
  per CPU  |  per GPU |   Options
   71.69GB |   0.12GB | offload_param=cpu , offload_optimizer=cpu , zero_init=1
  127.45GB |   0.12GB | offload_param=cpu , offload_optimizer=cpu , zero_init=0
   63.72GB |   0.78GB | offload_param=none, offload_optimizer=cpu , zero_init=1
  127.45GB |   0.78GB | offload_param=none, offload_optimizer=cpu , zero_init=0
    1.43GB |   6.09GB | offload_param=none, offload_optimizer=none, zero_init=1
  127.45GB |   6.09GB | offload_param=none, offload_optimizer=none, zero_init=0
";
        assert_eq!(zero3_table(T5_3B, ONE_BY_EIGHT), three);
        let two = "\
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 2 nodes, 1 GPU per node.
SW: Model with 2851M total params.
  per CPU  |  per GPU |   Options
   63.72GB |   5.31GB | offload_optimizer=cpu \n   15.93GB |  29.21GB | offload_optimizer=none
";
        let hardware = Hardware {
            nodes: 2,
            ranks_per_node: 1,
        };
        assert_eq!(zero2_table(T5_3B, hardware), two);
    }

    /// Rows of `cpu|gpu` in the order of the tables, for a model and machines.
    #[test]
    fn figures_computed_elsewhere() {
        let llama = ModelSize {
            total_params: 6_738_415_616,
            largest_layer_params: 131_072_000,
        };
        let tiny = ModelSize {
            total_params: 1_100_048_384,
            largest_layer_params: 65_536_000,
        };
        for (model, [nodes, ranks_per_node], figures) in [
            (
                T5_3B,
                [1, 8],
                "127.45|5.31 127.45|11.28 71.69|0.12 127.45|0.12 63.72|0.78 127.45|0.78 1.43|6.09 127.45|6.09",
            ),
            (
                T5_3B,
                [1, 1],
                "63.72|5.31 15.93|53.10 71.69|0.12 71.69|0.12 63.72|5.43 63.72|5.43 0.18|47.91 15.93|47.91",
            ),
            (
                llama,
                [1, 1],
                "150.62|12.55 37.65|125.51 169.44|0.49 169.44|0.49 150.62|13.04 150.62|13.04 0.73|113.45 37.65|113.45",
            ),
            (
                llama,
                [2, 8],
                "602.46|12.55 301.23|19.61 84.72|0.49 301.23|0.49 75.31|1.27 301.23|1.27 5.86|7.55 301.23|7.55",
            ),
            (
                tiny,
                [1, 4],
                "24.59|2.05 24.59|6.66 27.66|0.24 27.66|0.24 24.59|0.76 24.59|0.76 1.46|4.85 24.59|4.85",
            ),
        ] {
            let hardware = Hardware {
                nodes,
                ranks_per_node,
            };
            let mut rows = zero2_rows(model, hardware);
            rows.extend(zero3_rows(model, hardware));
            let gb = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            let found: Vec<String> = rows
                .iter()
                .map(|row| format!("{:.2}|{:.2}", gb(row.per_cpu), gb(row.per_gpu)))
                .collect();
            assert_eq!(found.join(" "), figures, "{model:?} {hardware:?}");
        }
    }

    #[test]
    fn a_layer_is_a_weight_and_its_bias() {
        let zeros = |name: &str, shape: &[usize]| ParamSpec::constant(name, shape, Init::Zeros);
        let unit = |name: &str, params: Vec<ParamSpec>| UnitSpec {
            name: name.into(),
            params,
            adapters: Default::default(),
        };
        let units = [
            unit("embedding", vec![zeros("embed.weight", &[10, 8])]),
            unit(
                "block",
                vec![
                    zeros("layers.0.up.weight", &[8, 10]),
                    zeros("layers.0.up.bias", &[10]),
                    zeros("scale", &[1]),
                ],
            ),
        ];
        let size = ModelSize::of(&units);
        assert_eq!((size.total_params, size.largest_layer_params), (171, 90));
        let none = ModelSize::of(&[]);
        assert_eq!((none.total_params, none.largest_layer_params), (0, 0));
    }
}
