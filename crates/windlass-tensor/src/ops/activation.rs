//! Activations, plain and gated.

use crate::tape::{Backprop, Backward, Recipe};
use crate::{Activation, Cpu, Tape, Tensor, Var, Weights, each_dtype};
use windlass_kernels::activation;
use windlass_kernels::memory::Category;

impl Tape {
    /// `y = act(x)`, element by element.
    pub fn activation(&mut self, kind: Activation, x: &Var) -> Var {
        let cpu = self.cpu().clone();
        let recipe = Activated {
            kind,
            x: x.tensor.clone(),
        };
        let y = recipe.compute(&cpu);
        let y = self.record(y, x.node().is_some(), || Saved { kind, x: x.clone() });
        self.with_recipe(y, || recipe)
    }

    /// `y = act(gate) * up`, element by element: SwiGLU and its kin.
    ///
    /// # Source
    /// Shazeer 2020, "GLU Variants Improve Transformer".
    #[track_caller]
    pub fn gated(&mut self, kind: Activation, gate: &Var, up: &Var) -> Var {
        assert_eq!(gate.shape(), up.shape(), "gate against up");
        let cpu = self.cpu().clone();
        let recipe = Gated {
            kind,
            gate: gate.tensor.clone(),
            up: up.tensor.clone(),
        };
        let y = recipe.compute(&cpu);
        let flows = gate.node().is_some() || up.node().is_some();
        let y = self.record(y, flows, || SavedGated {
            kind,
            gate: gate.clone(),
            up: up.clone(),
        });
        self.with_recipe(y, || recipe)
    }
}

#[derive(Debug)]
struct Activated {
    kind: Activation,
    x: Tensor,
}

impl Activated {
    fn compute(&self, cpu: &Cpu) -> Tensor {
        let mut y = Tensor::empty(cpu, *self.x.shape(), self.x.dtype(), Category::Activations);
        each_dtype!(y.dtype(), E => activation::activation(
            &cpu.pool, self.kind, self.x.as_slice::<E>(), y.as_mut_slice::<E>()));
        y
    }
}

impl Recipe for Activated {
    fn value(&self, cpu: &Cpu, _: &Weights) -> Tensor {
        self.compute(cpu)
    }
}

#[derive(Debug)]
struct Gated {
    kind: Activation,
    gate: Tensor,
    up: Tensor,
}

impl Gated {
    fn compute(&self, cpu: &Cpu) -> Tensor {
        let mut y = Tensor::empty(
            cpu,
            *self.up.shape(),
            self.up.dtype(),
            Category::Activations,
        );
        each_dtype!(y.dtype(), E => activation::gated(
            &cpu.pool, self.kind, self.gate.as_slice::<E>(), self.up.as_slice::<E>(), y.as_mut_slice::<E>()));
        y
    }
}

impl Recipe for Gated {
    fn value(&self, cpu: &Cpu, _: &Weights) -> Tensor {
        self.compute(cpu)
    }
}

struct Saved {
    kind: Activation,
    x: Var,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let cpu = cx.cpu();
        let mut dx = Tensor::empty(&cpu, *dy.shape(), dy.dtype(), Category::Activations);
        each_dtype!(dy.dtype(), E => activation::activation_backward(
            &cpu.pool, self.kind, self.x.tensor.as_slice::<E>(), dy.as_slice::<E>(), dx.as_mut_slice::<E>()));
        cx.add(self.x.node(), dx);
    }
}

struct SavedGated {
    kind: Activation,
    gate: Var,
    up: Var,
}

impl Backward for SavedGated {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let cpu = cx.cpu();
        let mut dgate = Tensor::empty(&cpu, *dy.shape(), dy.dtype(), Category::Activations);
        let mut dup = Tensor::empty(&cpu, *dy.shape(), dy.dtype(), Category::Activations);
        each_dtype!(dy.dtype(), E => activation::gated_backward(
            &cpu.pool,
            self.kind,
            self.gate.tensor.as_slice::<E>(),
            self.up.tensor.as_slice::<E>(),
            dy.as_slice::<E>(),
            dgate.as_mut_slice::<E>(),
            dup.as_mut_slice::<E>(),
        ));
        cx.add(self.gate.node(), dgate);
        cx.add(self.up.node(), dup);
    }
}
