"""Tiny random models of each architecture and their known answers.

One folder a case: `config.json`, `config.v4.json`, `model.safetensors` as transformers saves them, and
`golden.safetensors` with logits, loss, every gradient and a greedy continuation, computed in float64 by transformers
itself. The README beside this file says how to run it, the one beside the cases what each file holds.

    python architectures.py OUT_FOLDER [CASE ...]
"""

import json
import os
import shutil
import sys
import tempfile

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

LENGTHS = [7, 1, 13, 5]
IGNORED = [(0, 3), (2, 6), (2, 7)]  # (sequence, position) whose label is -100
PROMPT_LENGTH = 5
NEW_TOKENS = 20
MIN_MARGIN = 2e-2
EAGER = dict(attn_implementation="eager", experts_implementation="eager")

BASE = dict(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    tie_word_embeddings=False,
    rms_norm_eps=1e-3,  # far from every family's default, and large enough to matter
)
LAYER_NORM = {k: v for k, v in BASE.items() if k != "rms_norm_eps"} | dict(layer_norm_eps=1e-3)
NEOX = {k: v for k, v in LAYER_NORM.items() if k != "num_key_value_heads"} | dict(num_attention_heads=2)
GPT2 = dict(
    layer_norm_epsilon=1e-3,
    vocab_size=24,
    n_embd=16,
    n_layer=2,
    n_head=4,
    n_inner=20,
    n_positions=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def rope(kind="default", theta=100.0, **more):
    # A small base gives every pair of a four- or eight-dimensional head a visible angle at these positions.
    return dict(rope_type=kind, rope_theta=theta, **more)


WIDE_HEADS = dict(num_attention_heads=2, num_key_value_heads=1)  # head_dim 8: four rotated pairs
LLAMA3_ROPE = rope(
    "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
LONG_ROPE = dict(
    kind="longrope", partial_rotary_factor=1.0, short_factor=[1.0, 1.3, 1.9, 2.4], long_factor=[1.1, 2.5, 5.0, 9.0]
)
GEMMA = dict(BASE, head_dim=6, intermediate_size=12, query_pre_attn_scalar=9, sliding_window=4)
MOE = dict(BASE, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.2)

# name: (model_type, dtype of the saved weights, config)
CASES = {
    "llama": ("llama", "float32", dict(BASE, rope_parameters=rope())),
    "llama_rope_llama3": ("llama", "bfloat16", dict(BASE, **WIDE_HEADS, rope_parameters=LLAMA3_ROPE)),
    "llama_rope_linear": ("llama", "float16", dict(BASE, rope_parameters=rope("linear", factor=2.5))),
    "llama_biases_tied": (
        "llama",
        "float32",
        dict(BASE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=rope()),
    ),
    "smollm": ("llama", "bfloat16", dict(BASE, tie_word_embeddings=True, rope_parameters=rope(theta=10000.0))),
    "mistral_window_4": ("mistral", "float32", dict(BASE, sliding_window=4, rope_parameters=rope())),
    "mistral_window_64": ("mistral", "bfloat16", dict(BASE, head_dim=6, sliding_window=64, rope_parameters=rope())),
    "qwen2": ("qwen2", "float32", dict(BASE, tie_word_embeddings=True, rope_parameters=rope())),
    "qwen2_window": (
        "qwen2",
        "bfloat16",
        dict(BASE, use_sliding_window=True, sliding_window=3, max_window_layers=1, rope_parameters=rope()),
    ),
    "qwen3": ("qwen3", "float32", dict(BASE, **WIDE_HEADS, head_dim=10, rope_parameters=rope())),
    "gemma2": (
        "gemma2",
        "float32",
        dict(
            GEMMA,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=2.0,
            tie_word_embeddings=True,
            rope_parameters=rope(),
        ),
    ),
    "gemma3": (
        "gemma3_text",
        "bfloat16",
        dict(
            GEMMA,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            tie_word_embeddings=True,
            rope_parameters={
                "full_attention": rope("linear", 100.0, factor=2.0),
                "sliding_attention": rope(theta=10.0),
            },
        ),
    ),
    "phi3": (
        "phi3",
        "bfloat16",
        dict(BASE, original_max_position_embeddings=64, rope_parameters=rope(partial_rotary_factor=1.0)),
    ),
    "phi3_longrope_short": (
        "phi3",
        "bfloat16",
        dict(BASE, **WIDE_HEADS, original_max_position_embeddings=32, rope_parameters=rope(**LONG_ROPE)),
    ),
    "smollm3": (
        "smollm3",
        "bfloat16",
        dict(BASE, no_rope_layers=[1, 0], tie_word_embeddings=True, rope_parameters=rope()),
    ),
    "stablelm": (
        "stablelm",
        "float16",
        dict(LAYER_NORM, **WIDE_HEADS, use_qkv_bias=True, rope_parameters=rope(partial_rotary_factor=0.25)),
    ),
    "stablelm_parallel": (
        "stablelm",
        "bfloat16",
        dict(
            LAYER_NORM,
            **WIDE_HEADS,
            use_parallel_residual=True,
            qk_layernorm=True,
            rope_parameters=rope(partial_rotary_factor=0.5),
        ),
    ),
    "olmo2": ("olmo2", "bfloat16", dict(BASE, rope_parameters=rope())),
    "bitnet": (
        "bitnet",
        "float32",
        dict(BASE, hidden_act="silu", tie_word_embeddings=True, rope_parameters=rope()),
    ),
    "gpt2": ("gpt2", "float32", GPT2),
    "gpt_neox": (
        "gpt_neox",
        "float16",
        dict(
            NEOX,
            use_parallel_residual=True,
            rope_parameters=rope(partial_rotary_factor=0.25),
        ),
    ),
    "gpt_neox_sequential": (
        "gpt_neox",
        "bfloat16",
        dict(
            NEOX,
            use_parallel_residual=False,
            rope_parameters=rope(partial_rotary_factor=0.5),
        ),
    ),
    "mixtral": (
        "mixtral",
        "bfloat16",
        dict(MOE, num_local_experts=4, intermediate_size=6, sliding_window=None, rope_parameters=rope()),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "float32",
        dict(
            MOE,
            num_experts=5,
            head_dim=4,
            moe_intermediate_size=6,
            norm_topk_prob=True,
            mlp_only_layers=[0],
            rope_parameters=rope(),
        ),
    ),
    "qwen3_moe_unnormalized": (
        "qwen3_moe",
        "bfloat16",
        dict(
            MOE,
            num_experts=4,
            head_dim=4,
            moe_intermediate_size=6,
            norm_topk_prob=False,
            decoder_sparse_step=2,
            rope_parameters=rope(),
        ),
    ),
}


class Double(TorchFunctionMode):
    """Turns every request for float32 into float64: transformers upcasts norms, softmax and angles to float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(x):
            return torch.float64 if x is torch.float32 else x

        args = tuple(widen(a) for a in args)
        kwargs = {k: widen(v) for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*args, **kwargs)


def random_weights(model, dtype, generator):
    """Weights at which every part matters, exactly representable in `dtype`."""
    gemma = "gemma" in model.config.model_type  # scales embeddings up by sqrt(hidden_size) and norms by 1 + w
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            module = name.rsplit(".", 2)[-2]
            if name.endswith("bias"):
                value = 0.3 * noise
            elif "norm" in module or module.startswith("ln_") or module.isdigit() and "layernorm" in name:
                value = 0.8 * noise if gemma else 1.0 + 0.3 * noise
            elif "embed" in module or module in ("wte", "wpe"):
                value = (0.25 if gemma else 0.7) * noise
            else:
                value = 0.4 * noise
            p.copy_(value.to(dtype))
    return model


def build_double(config, state):
    """The same model with float64 weights, tables of angles and intermediate values."""
    torch.set_default_dtype(torch.float64)
    try:
        with Double():
            model = AutoModelForCausalLM.from_config(config, **EAGER, dtype=torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    model = model.double().eval()
    model.load_state_dict({k: v.double() for k, v in state.items()})
    assert all(b.dtype != torch.float32 for b in model.buffers()), "a buffer stayed float32"
    return model


def shifted(sequence, labels):
    """The target of each position: the label of the next one, -100 at the end of the sequence."""
    assert len(sequence) == len(labels)
    return torch.cat([labels[1:], torch.tensor([-100])])


def forward(model, sequences, is_moe):
    """Logits of each sequence alone, concatenated, and the router logits of each routed layer, likewise."""
    logits, gates = [], []
    for ids in sequences:
        more = dict(output_router_logits=True) if is_moe else {}
        # Called below the head's own loss so that nothing but the network itself is in play.
        out = model(input_ids=ids[None], use_cache=False, **more)
        logits.append(out.logits[0])
        if is_moe:
            gates.append(out.router_logits)
    merged = tuple(torch.cat(layer) for layer in zip(*gates)) if is_moe else None
    return torch.cat(logits), merged


def greedy(model, prompt):
    """Greedy continuation by recomputing everything for each token, and the smallest lead of a chosen token."""
    ids, margin = prompt.clone(), float("inf")
    for _ in range(NEW_TOKENS):
        last = model(input_ids=ids[None], use_cache=False).logits[0, -1]
        top = last.topk(2).values
        margin = min(margin, (top[0] - top[1]).item())
        ids = torch.cat([ids, last.argmax()[None]])
    return ids[len(prompt) :], margin


def router_margin(gates, top_k):
    """Smallest distance between the last chosen and the first rejected expert: rounding must not change a choice."""
    margin = float("inf")
    for gate in gates:
        p = gate.softmax(-1).sort(-1, descending=True).values
        margin = min(margin, (p[:, top_k - 1] - p[:, top_k]).min().item())
    return margin


def v4_config(config):
    """The same configuration in the keys that transformers 4 wrote and most published folders have."""
    c = json.loads(json.dumps(config))
    c["torch_dtype"] = c.pop("dtype")
    c["transformers_version"] = "4.57.0"
    ropes = c.pop("rope_parameters", None)
    if ropes is None:
        return c
    if "full_attention" in ropes:
        c["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        ropes = ropes["full_attention"]
        kinds = c.pop("layer_types")
        c["sliding_window_pattern"] = kinds.index("full_attention") + 1
    theta, partial = ropes.pop("rope_theta"), ropes.pop("partial_rotary_factor", None)
    if c["model_type"] == "gpt_neox":
        c["rotary_emb_base"], c["rotary_pct"] = theta, partial
    else:
        c["rope_theta"] = theta
        if partial is not None:
            c["partial_rotary_factor"] = partial
    if c["model_type"] == "phi3":
        ropes.pop("original_max_position_embeddings", None)
        if ropes["rope_type"] == "longrope":
            ropes = {"type": "longrope", **{k: v for k, v in ropes.items() if k != "rope_type"}}
    c["rope_scaling"] = None if ropes.get("rope_type") == "default" else ropes
    return c


def check_v4(path, config):
    """transformers reads the older keys as the same model."""
    folder = tempfile.mkdtemp()
    shutil.copy(path, os.path.join(folder, "config.json"))
    again = AutoConfig.from_pretrained(folder).to_dict()
    want = config.to_dict()
    if again.get("rope_parameters"):
        again["rope_parameters"].pop("type", None)  # the older name of rope_type, kept beside it
    shutil.rmtree(folder)
    for key in want:
        if key not in ("dtype", "transformers_version", "_name_or_path") and "sliding_window_pattern" not in key:
            assert again[key] == want[key], f"{path}: {key}: {again[key]} != {want[key]}"


def named_as_saved(model, values, folder):
    """`values` (by parameter name) under the names and in the layout in which transformers saves the parameters."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
    model.save_pretrained(folder)
    return load_file(os.path.join(folder, "model.safetensors"))


def save_case(folder, model, double, golden, grads):
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(os.path.join(tmp, file), os.path.join(folder, file))
    with open(os.path.join(folder, "config.json")) as f:
        saved = json.load(f)
    v4 = os.path.join(folder, "config.v4.json")
    with open(v4, "w") as f:
        json.dump(v4_config(saved), f, indent=2, sort_keys=True)
        f.write("\n")
    check_v4(v4, model.config)
    with tempfile.TemporaryDirectory() as tmp:
        named = named_as_saved(double, grads, tmp)
    weights = load_file(os.path.join(folder, "model.safetensors"))
    assert {k: v.shape for k, v in named.items()} == {k: v.shape for k, v in weights.items()}
    for name, grad in named.items():
        assert grad.abs().max() > 1e-5, f"{folder}: nothing depends on {name}"
        golden["grad." + name] = grad
    golden = {k: (v.float() if v.is_floating_point() else v.int()).contiguous().clone() for k, v in golden.items()}
    save_file(golden, os.path.join(folder, "golden.safetensors"))


def compute(double, sequences, labels, config, is_moe):
    """Loss, logits and gradients: cross-entropy over all targets, plus the balancing loss of all tokens together."""
    targets = torch.cat([shifted(s, l) for s, l in zip(sequences, labels)])
    logits, gates = forward(double, sequences, is_moe)
    ce = F.cross_entropy(logits, targets, ignore_index=-100)
    golden = {"targets": targets, "logits": logits.detach(), "ce_loss": ce.detach().reshape(1)}
    loss, lead = ce, float("inf")
    if is_moe:
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        aux = load_balancing_loss_func(gates, experts, config.num_experts_per_tok)
        loss = ce + config.router_aux_loss_coef * aux
        golden["aux_loss"] = aux.detach().reshape(1)
        lead = router_margin(gates, config.num_experts_per_tok)
    golden["loss"] = loss.detach().reshape(1)
    double.zero_grad()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in double.named_parameters()}
    return golden, grads, lead


def build_case(out, name, seed):
    """Writes one case; false if its greedy tokens or routes are too close to call with this seed."""
    model_type, dtype, options = CASES[name]
    dtype = getattr(torch, dtype)
    config = AutoConfig.for_model(model_type, **options)
    is_moe = model_type in ("mixtral", "qwen3_moe")
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    single = AutoModelForCausalLM.from_config(config, **EAGER, dtype=torch.float32).eval()
    random_weights(single, dtype, generator)
    double = build_double(config, single.state_dict())
    vocab = config.vocab_size
    sequences = [torch.randint(vocab, (n,), generator=generator) for n in LENGTHS]
    labels = [s.clone() for s in sequences]
    for s, t in IGNORED:
        labels[s][t] = -100
    prompt = torch.randint(vocab, (PROMPT_LENGTH,), generator=generator)
    with Double():
        with torch.no_grad():
            tokens, margin = greedy(double, prompt)
        golden, grads, lead = compute(double, sequences, labels, config, is_moe)
    if margin < MIN_MARGIN or lead < 1e-3 or len(set(tokens.tolist())) < 5:
        return False
    starts = torch.tensor([0] + LENGTHS).cumsum(0)
    golden.update(ids=torch.cat(sequences), cu_seqlens=starts, labels=torch.cat(labels))
    golden.update({"greedy.prompt": prompt, "greedy.tokens": tokens})
    _, single_grads, _ = compute(single, sequences, labels, config, is_moe)
    worst = max(((single_grads[n] - g).abs().max() / g.abs().max()).item() for n, g in grads.items())
    save_case(os.path.join(out, name), single.to(dtype), double, golden, grads)
    size = sum(os.path.getsize(os.path.join(out, name, f)) for f in os.listdir(os.path.join(out, name)))
    print(
        f"{name:24} seed {seed} loss {golden['loss'].item():.4f} margin {margin:.3f} {size:6} bytes; "
        f"transformers in float32 is within {worst:.1e} on gradients",
        flush=True,
    )
    return True


def main():
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    out = sys.argv[1]
    for name in sys.argv[2:] or CASES:
        first = 1000 * (1 + list(CASES).index(name))
        assert any(build_case(out, name, first + i) for i in range(60)), f"{name}: no seed is clear enough"


if __name__ == "__main__":
    main()
