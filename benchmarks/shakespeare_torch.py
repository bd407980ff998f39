"""PyTorch's loss curve of a small Llama on tinyshakespeare, for comparison step by step.

    python shakespeare_torch.py init input.txt FOLDER          weights, tokens and batches, from one seed
    python shakespeare_torch.py run FOLDER --dtype f32|bf16 --out curve.json

`init` writes a Hugging Face folder (`config.json`, `model.safetensors` in F32), `tokens.bin` (u16, little endian: one
id a character, characters sorted by code point) and `batches.json` (hyper-parameters, and for each step the first token
of each of its sequences). Sequence s of a step reads `tokens[s .. s + context]` and predicts `tokens[s + 1 ..=
s + context]`. `run` trains on exactly these batches in exactly this order. bf16 is `torch.autocast`: f32 weights,
moments and loss, matrix products and attention in bf16. README.md in `shakespeare/` has the recipe in words.
"""

import argparse
import hashlib
import json
import math
import os
import resource
import time

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

RECIPE = dict(
    seed=1337,
    steps=300,
    batch=16,
    context=128,
    lr=1e-3,
    lr_min=1e-4,
    warmup=20,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip=1.0,
)
MODEL = dict(
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    initializer_range=0.02,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    use_cache=False,
)


def learning_rate(step, r):
    """Linear warm-up, then a cosine from `lr` to `lr_min` over the remaining steps; `step` counts from 0."""
    if step < r["warmup"]:
        return r["lr"] * (step + 1) / r["warmup"]
    progress = (step - r["warmup"]) / (r["steps"] - r["warmup"])
    return r["lr_min"] + (r["lr"] - r["lr_min"]) * 0.5 * (1 + math.cos(math.pi * progress))


def init(text_path, folder):
    text = open(text_path, encoding="utf-8", newline="").read()
    alphabet = sorted(set(text))
    ids = {c: i for i, c in enumerate(alphabet)}
    tokens = torch.tensor([ids[c] for c in text])
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "tokens.bin"), "wb") as f:
        f.write(tokens.to(torch.uint16).numpy().astype("<u2").tobytes())
    generator = torch.Generator().manual_seed(RECIPE["seed"])
    last = len(tokens) - RECIPE["context"] - 1
    starts = torch.randint(last + 1, (RECIPE["steps"], RECIPE["batch"]), generator=generator)
    with open(os.path.join(folder, "batches.json"), "w") as f:
        json.dump(dict(recipe=RECIPE, alphabet="".join(alphabet), starts=starts.tolist()), f)
    torch.manual_seed(RECIPE["seed"])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), **MODEL))
    model.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokens)} tokens of {len(alphabet)} kinds")


def optimizer(model, r):
    """AdamW with decoupled decay of everything but the norms."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=decayed, weight_decay=r["weight_decay"]), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=r["lr"], betas=(r["beta1"], r["beta2"]), eps=r["eps"], foreach=True)


def run(folder, dtype, out, steps, threads):
    torch.set_num_threads(threads)
    batches = json.load(open(os.path.join(folder, "batches.json")))
    r = batches["recipe"]
    tokens = torch.from_numpy(np.fromfile(os.path.join(folder, "tokens.bin"), "<u2").astype(np.int64))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    opt = optimizer(model, r)
    curve, norms, began = [], [], time.time()
    for step, starts in enumerate(batches["starts"][:steps]):
        rows = torch.stack([tokens[s : s + r["context"] + 1] for s in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(input_ids=rows[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), r["clip"]).item())
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, r)
        opt.step()
        opt.zero_grad(set_to_none=True)
        curve.append(loss.item())
        if step % 25 == 0 or step + 1 == len(batches["starts"]):
            print(f"step {step} loss {curve[-1]:.5f} norm {norms[-1]:.3f} {time.time() - began:.0f} s", flush=True)
    seconds = time.time() - began
    digest = hashlib.sha256(open(os.path.join(folder, "model.safetensors"), "rb").read()).hexdigest()
    result = dict(
        dtype=dtype,
        initial_weights_sha256=digest,
        torch=torch.__version__,
        transformers=transformers.__version__,
        threads=threads,
        seconds=round(seconds, 1),
        tokens_per_second=round(len(curve) * r["batch"] * r["context"] / seconds),
        peak_resident_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        recipe=r,
        loss=[round(x, 6) for x in curve],
        gradient_norm=[round(x, 5) for x in norms],
    )
    with open(out, "w") as f:
        f.write(json.dumps(result) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(dest="verb", required=True)
    v = verbs.add_parser("init")
    v.add_argument("text")
    v.add_argument("folder")
    v = verbs.add_parser("run")
    v.add_argument("folder")
    v.add_argument("--dtype", choices=["f32", "bf16"], required=True)
    v.add_argument("--out", required=True)
    v.add_argument("--steps", type=int)
    v.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    transformers.logging.disable_progress_bar()
    if a.verb == "init":
        init(a.text, a.folder)
    else:
        run(a.folder, a.dtype, a.out, a.steps, a.threads)


if __name__ == "__main__":
    main()
