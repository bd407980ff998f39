//! Declaring parameters: names, shapes and initial values, and the layers that are nothing but parameters.

use crate::families::{DecoderConfig, Norm};
use windlass_tensor::{Init, ParamSpec, Projection, Tape, Var, Weights};

/// Collects the parameters of a unit while its layer is declared.
pub(super) struct Params<'a> {
    config: &'a DecoderConfig,
    specs: Vec<ParamSpec>,
}

/// A projection: the places of its parameters in the unit.
#[derive(Clone, Copy)]
pub(super) struct Linear {
    weight: usize,
    bias: Option<usize>,
}

/// A norm: the places of its parameters in the unit, and how it computes.
#[derive(Clone, Copy)]
pub(super) struct NormSlots {
    weight: usize,
    bias: Option<usize>,
    kind: Norm,
    eps: f32,
}

impl<'a> Params<'a> {
    pub(super) fn new(config: &'a DecoderConfig) -> Self {
        Params {
            config,
            specs: Vec::new(),
        }
    }

    pub(super) fn take(&mut self) -> Vec<ParamSpec> {
        std::mem::take(&mut self.specs)
    }

    fn push(&mut self, spec: ParamSpec) -> usize {
        self.specs.push(spec);
        self.specs.len() - 1
    }

    pub(super) fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> usize {
        self.push(ParamSpec::normal(
            format!("{name}.weight"),
            [rows, cols],
            self.config.initializer_range,
        ))
    }

    pub(super) fn linear(&mut self, name: &str, rows: usize, cols: usize, bias: bool) -> Linear {
        let weight = self.matrix(name, rows, cols);
        let bias = bias.then(|| {
            self.push(ParamSpec::constant(
                format!("{name}.bias"),
                [rows],
                Init::Zeros,
            ))
        });
        Linear { weight, bias }
    }

    /// A matrix that writes to the residual stream.
    pub(super) fn output(&mut self, name: &str, rows: usize, cols: usize, bias: bool) -> Linear {
        let linear = self.linear(name, rows, cols, bias);
        self.specs[linear.weight].init = Init::Normal(self.config.residual_init_std);
        linear
    }

    pub(super) fn norm(&mut self, name: &str, width: usize, kind: Norm) -> NormSlots {
        let init = if kind == (Norm::Rms { offset: 1.0 }) {
            Init::Zeros
        } else {
            Init::Ones
        };
        let weight = self.push(ParamSpec::constant(format!("{name}.weight"), [width], init));
        let bias = (kind == Norm::Layer { bias: true }).then(|| {
            self.push(ParamSpec::constant(
                format!("{name}.bias"),
                [width],
                Init::Zeros,
            ))
        });
        NormSlots {
            weight,
            bias,
            kind,
            eps: self.config.norm_eps,
        }
    }
}

impl Linear {
    pub(super) fn forward(
        &self,
        w: &Weights,
        x: &Var,
        residual: Option<&Var>,
        tape: &mut Tape,
    ) -> Var {
        let (weight, bias) = self.params(w);
        tape.linear(x, weight, bias, residual)
    }

    /// The output of a unit.
    pub(super) fn forward_out(&self, w: &Weights, x: &Var, residual: &Var, tape: &mut Tape) -> Var {
        let (weight, bias) = self.params(w);
        tape.linear_out(x, weight, bias, residual)
    }

    pub(super) fn params<'w>(&self, w: &'w Weights) -> Projection<'w> {
        (w.at(self.weight), self.bias.map(|b| w.at(b)))
    }

    /// Several products of the same input.
    pub(super) fn forward_all<const N: usize>(
        linears: [&Linear; N],
        w: &Weights,
        x: &Var,
        tape: &mut Tape,
    ) -> [Var; N] {
        let outputs = tape.linears(x, &linears.map(|linear| linear.params(w)));
        outputs.try_into().expect("an output for each weight")
    }
}

impl NormSlots {
    pub(super) fn forward(&self, w: &Weights, x: &Var, tape: &mut Tape) -> Var {
        match self.kind {
            Norm::Rms { offset } => tape.rms_norm(x, w.at(self.weight), self.eps, offset),
            Norm::Layer { .. } => {
                tape.layer_norm(x, w.at(self.weight), self.bias.map(|b| w.at(b)), self.eps)
            }
        }
    }
}

/// The norm of `x`, or `x` where there is none.
pub(super) fn normed(norm: &Option<NormSlots>, w: &Weights, x: Var, tape: &mut Tape) -> Var {
    match norm {
        None => x,
        Some(norm) => norm.forward(w, &x, tape),
    }
}
