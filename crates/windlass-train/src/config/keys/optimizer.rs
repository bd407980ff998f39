//! The parameters of each optimizer, with the defaults of DeepSpeed (or of PyTorch and bitsandbytes, whose names they are).

use super::Status::{NoMeaning, Unsupported};
use super::{BOOL, COUNT, Key, Kind, NOT_NEGATIVE, Status, UNIT, YES, key};

const ONE: Status = NoMeaning("there is one implementation of each optimizer");
const AMSGRAD: Status = Unsupported("the AMSGrad variant");
const STATES: Status = NoMeaning("the type of states is bf16.bf16_optimizer_states");
const BETAS: Kind = Kind::Betas;

/// An optimizer's name in small letters, and its parameters.
pub struct Optimizer {
    /// Its name in small letters.
    pub name: &'static str,
    /// Its parameters, or why it is not supported.
    pub params: Result<&'static [Key], &'static str>,
}

const fn known(name: &'static str, params: &'static [Key]) -> Optimizer {
    let params = Ok(params);
    Optimizer { name, params }
}

const fn refused(name: &'static str, why: &'static str) -> Optimizer {
    let params = Err(why);
    Optimizer { name, params }
}

const ONE_BIT: &str = "compressed communication is not supported; use AdamW or Lamb";
const MU: &str = "the mup package's learning rates by width are not supported; use AdamW or SGD";

/// The optimizers.
pub const OPTIMIZERS: &[Optimizer] = &[
    known("adam", ADAM),
    known("adamw", ADAM),
    known("adamw8bit", ADAM_8_BIT),
    known("adagrad", ADAGRAD),
    known("lion", LION),
    known("lamb", LAMB),
    known("sgd", SGD),
    known("muon", MUON),
    refused("onebitadam", ONE_BIT),
    refused("zerooneadam", ONE_BIT),
    refused("onebitlamb", ONE_BIT),
    refused("muadam", MU),
    refused("muadamw", MU),
    refused("musgd", MU),
];

const ADAM: &[Key] = &[
    key("lr", NOT_NEGATIVE, "0.001", YES),
    key("betas", BETAS, "[0.9, 0.999]", YES),
    key("eps", NOT_NEGATIVE, "1e-8", YES),
    key("weight_decay", NOT_NEGATIVE, "0.0", YES),
    key("bias_correction", BOOL, "true", YES),
    key("adam_w_mode", BOOL, "true", YES),
    key("torch_adam", BOOL, "false", ONE),
    key("fused", BOOL, "null", ONE),
    key("foreach", BOOL, "null", ONE),
    key("set_grad_none", BOOL, "true", ONE),
    key("fp32_optimizer_states", BOOL, "true", STATES),
    key("amsgrad", BOOL, "false", AMSGRAD),
];

/// AdamW with `"torch_adam": true`: PyTorch's defaults.
pub const TORCH_ADAMW: &[Key] = &[
    key("lr", NOT_NEGATIVE, "0.001", YES),
    key("betas", BETAS, "[0.9, 0.999]", YES),
    key("eps", NOT_NEGATIVE, "1e-8", YES),
    key("weight_decay", NOT_NEGATIVE, "0.01", YES),
    key("adam_w_mode", BOOL, "true", YES),
    key("torch_adam", BOOL, "true", ONE),
    key("fused", BOOL, "null", ONE),
    key("foreach", BOOL, "null", ONE),
    key("amsgrad", BOOL, "false", AMSGRAD),
];

const ADAM_8_BIT: &[Key] = &[
    key("lr", NOT_NEGATIVE, "0.001", YES),
    key("betas", BETAS, "[0.9, 0.999]", YES),
    key("eps", NOT_NEGATIVE, "1e-8", YES),
    key("weight_decay", NOT_NEGATIVE, "0.01", YES),
    key("min_8bit_size", COUNT, "4096", YES),
    key(
        "is_paged",
        BOOL,
        "false",
        NoMeaning("offload_optimizer moves states"),
    ),
    key("amsgrad", BOOL, "false", AMSGRAD),
];

const ADAGRAD: &[Key] = &[
    key("lr", NOT_NEGATIVE, "0.01", YES),
    key("eps", NOT_NEGATIVE, "1e-10", YES),
    key("weight_decay", NOT_NEGATIVE, "0.0", YES),
    key("fp32_optimizer_states", BOOL, "true", STATES),
    key("amsgrad", BOOL, "false", AMSGRAD),
];

const LION: &[Key] = &[
    key("lr", NOT_NEGATIVE, "0.001", YES),
    key("betas", BETAS, "[0.9, 0.999]", YES),
    key("weight_decay", NOT_NEGATIVE, "0.0", YES),
    key("fp32_optimizer_states", BOOL, "true", STATES),
];

const LAMB: &[Key] = &[
    key("lr", NOT_NEGATIVE, "0.001", YES),
    key("betas", BETAS, "[0.9, 0.999]", YES),
    key("eps", NOT_NEGATIVE, "1e-8", YES),
    key("weight_decay", NOT_NEGATIVE, "0.0", YES),
    key("bias_correction", BOOL, "true", YES),
    key("max_coeff", NOT_NEGATIVE, "10.0", YES),
    key("min_coeff", NOT_NEGATIVE, "0.01", YES),
    key(
        "eps_inside_sqrt",
        BOOL,
        "false",
        Unsupported("epsilon is added to the root"),
    ),
    key("amsgrad", BOOL, "false", AMSGRAD),
];

const SGD: &[Key] = &[
    key("lr", NOT_NEGATIVE, "0.001", YES),
    key("momentum", UNIT, "0.0", YES),
    key("dampening", UNIT, "0.0", YES),
    key("weight_decay", NOT_NEGATIVE, "0.0", YES),
    key("nesterov", BOOL, "false", YES),
    key("fused", BOOL, "null", ONE),
    key("foreach", BOOL, "null", ONE),
];

const MUON: &[Key] = &[
    key("lr", NOT_NEGATIVE, "0.001", YES),
    key("momentum", UNIT, "0.95", YES),
    key("weight_decay", NOT_NEGATIVE, "0.0", YES),
    key("muon_lr", NOT_NEGATIVE, "null", YES),
    key("adam_lr", NOT_NEGATIVE, "null", YES),
    key("betas", BETAS, "[0.9, 0.95]", YES),
    key("eps", NOT_NEGATIVE, "1e-10", YES),
    key(
        "ns_method",
        Kind::Choice(&["gram", "standard"]),
        r#""gram""#,
        Status::NoMeaning("both ways give the same matrix"),
    ),
];
