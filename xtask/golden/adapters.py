"""Known answers of adapters: PEFT on the tiny models of `fixtures/arch`.

    python adapters.py ARCH_FOLDER OUT_FOLDER [CASE...]

Needs torch (CPU), transformers and peft. Each case is a folder with the adapter as PEFT saves it and `golden.safetensors`:

- `logits`, `loss`, `grad.NAME` (NAME as in the adapter's file) in float64, rounded to F32;
- `losses`: the loss before each of 20 AdamW steps (lr 1e-3, betas 0.9 and 0.95, eps 1e-8, decay 0.1,
  of norms 0) in float64, and after
  them; `final.NAME`: the parameters then;
- of the case `llama`, `dpo.loss`, `dpo.grad.NAME` and the same of `orpo` and `kto` (beta 0.3; DPO with label smoothing 0.1).
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CASES = {
    "llama": ("llama", dict(r=4, lora_alpha=8, target_modules="all-linear")),
    "llama_rslora_patterns": (
        "llama",
        dict(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"down_proj": 2, "layers.1.self_attn.q_proj": 3},
            alpha_pattern={"v_proj": 5},
        ),
    ),
    "llama_regex_layers": (
        "llama",
        dict(r=3, lora_alpha=3, target_modules=r".*layers\.1\..*(o|up)_proj"),
    ),
    "llama_to_transform": (
        "llama",
        dict(
            r=2,
            lora_alpha=4,
            target_modules=["k_proj", "gate_proj"],
            layers_to_transform=[1],
        ),
    ),
    "llama_dora": (
        "llama",
        dict(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    ),
    "llama_biases_dora": (
        "llama_biases_tied",
        dict(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj", "up_proj"], use_dora=True),
    ),
    "llama_modules_to_save": (
        "llama",
        dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    ),
    "llama_tied": (
        "llama_biases_tied",
        dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "gpt2": (
        "gpt2",
        dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
    "gpt2_usual": ("gpt2", dict(r=2, lora_alpha=2, fan_in_fan_out=True)),
    "gpt_neox": ("gpt_neox", dict(r=4, lora_alpha=8, target_modules="all-linear")),
    "gpt_neox_dora": (
        "gpt_neox",
        dict(r=2, lora_alpha=8, target_modules=["query_key_value"], use_dora=True),
    ),
    "phi3": ("phi3", dict(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True)),
    "qwen3": ("qwen3", dict(r=4, lora_alpha=8, target_modules="all-linear")),
    "gemma2": ("gemma2", dict(r=4, lora_alpha=8, exclude_modules=["k_proj"], target_modules="all-linear")),
}
STEPS = 20


def loss_of(model, golden):
    """Logits of all sequences, and the mean loss over their targets."""
    ids, targets = golden["ids"].long(), golden["targets"].long()
    starts = golden["cu_seqlens"].tolist()
    logits = [model(input_ids=ids[a:b][None]).logits[0] for a, b in zip(starts, starts[1:])]
    logits = torch.cat(logits)
    return logits, torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100)


def preference_losses(model, golden):
    """DPO, ORPO and KTO by TRL's formulas on sequences 0 and 2, 3 and 0 of the known ones; the first two tokens are prompts."""
    ids, starts = golden["ids"].long(), golden["cu_seqlens"].tolist()
    sequences = [ids[starts[i] : starts[i + 1]] for i in (0, 2, 3, 0)]

    def answers(sequences):
        sums, counts = [], []
        for sequence in sequences:
            logps = each(sequence)[1:]
            sums.append(logps.sum())
            counts.append(len(logps))
        return torch.stack(sums), torch.tensor(counts, dtype=torch.float64)

    def each(sequence):
        logps = model(input_ids=sequence[None]).logits[0, :-1].log_softmax(-1)
        return logps.gather(-1, sequence[1:, None])[:, 0]

    mismatched = [torch.cat([a[:2], b[2:]]) for a, b in zip(sequences, sequences[1:] + sequences[:1])]
    with torch.no_grad(), model.disable_adapter():
        reference, _ = answers(sequences)
        reference_kl, _ = answers(mismatched)
    beta, logsigmoid = 0.3, torch.nn.functional.logsigmoid

    def dpo():
        logps, _ = answers(sequences)
        delta = logps - reference
        x = beta * (delta[0::2] - delta[1::2])
        return (-0.9 * logsigmoid(x) - 0.1 * logsigmoid(-x)).mean()

    def orpo():
        logps, counts = answers(sequences)
        means = logps / counts
        chosen, rejected = means[0::2], means[1::2]
        odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
        # TRL: "orpo chosen nll loss is computed over the full prompt and response".
        likelihood = -torch.cat([each(sequence) for sequence in sequences[0::2]]).mean()
        return likelihood - (beta * logsigmoid(odds)).mean()

    def kto():
        with torch.no_grad():
            kl = (answers(mismatched)[0] - reference_kl).mean().clamp(min=0)
        ratios = answers(sequences)[0] - reference
        labels = torch.tensor([True, False, True, False])
        good, bad = 1 - torch.sigmoid(beta * (ratios - kl)), 1 - torch.sigmoid(beta * (kl - ratios))
        return torch.where(labels, good, bad).mean()

    for name, loss in (("dpo", dpo), ("orpo", orpo), ("kto", kto)):
        model.zero_grad()
        value = loss()
        value.backward()
        yield f"{name}.loss", value[None]
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield f"{name}.grad.{name_of(parameter_name)}", parameter.grad.clone()


def name_of(parameter):
    """A parameter's name in the adapter's file."""
    for part in (".modules_to_save.default", ".default"):
        parameter = parameter.replace(part, "")
    if parameter.endswith("lora_magnitude_vector.weight"):
        parameter = parameter.removesuffix(".weight")
    return parameter


def one(case, base, settings, arch, out):
    torch.manual_seed(sum(map(ord, case)))
    golden = load_file(arch / base / "golden.safetensors")
    model = AutoModelForCausalLM.from_pretrained(arch / base, dtype=torch.float64, attn_implementation="eager")
    model.config.use_cache = False
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(model, config)
    # Not the zeros that B begins with, and numbers that F32 holds exactly.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_" in name or config.ensure_weight_tying):
                noise = torch.randn_like(parameter) * 0.1
                parameter.copy_((parameter + noise).float().double())
    model.eval()
    model.peft_config["default"].inference_mode = True
    folder = out / case
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    state = load_file(folder / "adapter_model.safetensors")
    save_file({k: v.float().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
    settings_file = folder / "adapter_config.json"
    saved = json.loads(settings_file.read_text()) | {"base_model_name_or_path": f"tiny/{base}"}
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(saved[key], list):
            saved[key] = sorted(saved[key])
    settings_file.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")

    trained = [(name_of(n), p) for n, p in model.named_parameters() if p.requires_grad]
    if config.ensure_weight_tying:
        # A table that is the head too is one parameter, and two tensors of the file.
        heads = [n for n in state if n.endswith("lm_head.weight")]
        trained += [(head, p) for head in heads for n, p in trained if n.endswith("embed_tokens.weight")]
    assert {n for n, _ in trained} == set(state), (case, sorted(state), sorted(n for n, _ in trained))
    logits, loss = loss_of(model, golden)
    loss.backward()
    answers = {"logits": logits, "loss": loss[None]}
    answers |= {f"grad.{name}": p.grad.clone() for name, p in trained}
    if case == "llama":
        answers |= dict(preference_losses(model, golden))
    # As transformers' Trainer has it: weights of norms do not decay.
    norms = [p for n, p in trained if n.endswith("norm.weight")]
    others = list({id(p): p for n, p in trained if not n.endswith("norm.weight")}.values())
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        _, loss = loss_of(model, golden)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    losses.append(loss_of(model, golden)[1].item())
    answers["losses"] = torch.tensor(losses)
    answers |= {f"final.{name}": p for name, p in trained}
    count = sum(p.numel() for p in norms + others)
    total = sum(p.numel() for p in model.parameters())
    answers["parameters"] = torch.tensor([count, total], dtype=torch.int32)
    answers = {k: v if v.dtype == torch.int32 else v.detach().float().contiguous() for k, v in answers.items()}
    save_file(answers, folder / "golden.safetensors")
    print(case, base, count, losses[0], losses[-1])


if __name__ == "__main__":
    for case in sys.argv[3:] or CASES:
        base, settings = CASES[case]
        one(case, base, settings, Path(sys.argv[1]), Path(sys.argv[2]))
