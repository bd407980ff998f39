"""Adapters written by windlass in llama.cpp: do the logits agree?

Usage, in a throw-away environment with llama-cpp-python and numpy:

    python benchmarks/llama_cpp_adapters.py --windlass target/release/windlass

For random models of each architecture a random adapter on all linear layers is written as PEFT does (LoRA, and rsLoRA with
ranks by patterns), `windlass adapter convert` makes a GGUF file of it, and the divergence of windlass' next-token distributions
with PEFT's folder from llama.cpp's with the GGUF file is printed, beside the change that the adapter makes, and whether windlass
gives the same bits with either file. Exits with 1 where one of these fails.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from llama_cpp_agreement import BASE, LIMIT, MODELS, divergence, ours, shapes, theirs, write_folder, write_tensors

ENDS = ("embed", "wte", "wpe", "lm_head")
SETTINGS = {
    "lora": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"o_proj": 2, "layers.1.mlp.*": 3},
               "alpha_pattern": {"down_proj": 5}},
}


def rank(settings, module):
    for pattern, r in settings.get("rank_pattern", {}).items():
        if pattern.replace(".*", "") in module:
            return r
    return settings["r"]


def write_adapter(folder, config, settings):
    """A random adapter, as PEFT saves one."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(3)
    tensors, modules = {}, []
    transposed = config["model_type"] == "gpt2"
    for name, shape in shapes(config).items():
        if len(shape) != 2 or any(end in name for end in ENDS):
            continue
        module = name.removesuffix(".weight")
        rows, cols = reversed(shape) if transposed else shape
        r = rank(settings, module)
        modules.append(module)
        tensors[f"base_model.model.{module}.lora_A.weight"] = generator.normal(0, 1 / np.sqrt(cols), (r, cols))
        tensors[f"base_model.model.{module}.lora_B.weight"] = generator.normal(0, 0.3, (rows, r))
    write_tensors(folder / "adapter_model.safetensors", tensors)
    saved = {"peft_type": "LORA", "target_modules": modules, "fan_in_fan_out": transposed, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(saved))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windlass", required=True)
    arguments = parser.parse_args()
    failures = 0
    print(f"{'model':<22} {'adapter':<8} {'change':>10} {'between':>10}")
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        run = lambda *words: subprocess.run([arguments.windlass, *map(str, words)], check=True, capture_output=True)
        for name, kind, changes, _ in MODELS:
            if "experts" in str(changes):
                continue
            config = {"model_type": kind, **BASE, **changes}
            folder, plain, peft, file = place / name, place / "model.gguf", place / "peft", place / "adapter.gguf"
            write_folder(folder, config)
            run("convert", folder, plain, "--type", "F32")
            ids = np.random.default_rng(2).integers(0, config["vocab_size"], 64).tolist()
            for what, settings in SETTINGS.items():
                write_adapter(peft, config, settings)
                try:
                    run("adapter", "convert", "--model", folder, "--adapter", peft, "--out", file)
                    before = ours(arguments.windlass, plain, ids, place)
                    our = ours(arguments.windlass, plain, ids, place, peft)
                    change, between = divergence(before, our), divergence(theirs(plain, ids, file), our)
                    same = np.array_equal(our, ours(arguments.windlass, plain, ids, place, file))
                    bad = not (between < LIMIT and change > 10 * between) or not same and what == "lora"
                    print(f"{name:<22} {what:<8} {change:10.2e} {between:10.2e}{'' if same else ', other bits'}"
                          f"{'  fails' if bad else ''}", flush=True)
                except Exception as error:  # One model that fails must not hide the others.
                    words = getattr(error, "stderr", b"") or b""
                    print(f"{name:<22} {what:<8} fails: {error} {words.decode()[-300:]}", flush=True)
                    bad = True
                failures += bad
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
