"""Files written by windlass in llama.cpp, and files written by llama.cpp in windlass: do the logits agree?

Usage, in a throw-away environment with llama-cpp-python and numpy:

    python benchmarks/llama_cpp_agreement.py --windlass target/release/windlass [--model FOLDER ...] [--types F32 Q8_0 ...]

Without --model it makes models with random weights, one for each architecture. Each model is written by `windlass
convert` in each type, read by llama.cpp and by windlass, and the divergence of windlass' next-token distributions from
llama.cpp's on the same file is printed; then llama.cpp quantizes the F32 file, and both read that.

Both programs round activations to 8 bits before products with quantized weights, each in its own way. How much that
costs is printed beside: the divergence of each program from the file's weights in F32, without such rounding (the file
converted back to a folder). Exits with 1 where the mean divergence is above the limit and windlass is further from those
than llama.cpp is.
"""

import argparse
import ctypes
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

import llama_cpp
import numpy as np

HIDDEN, VOCABULARY, LAYERS = 256, 512, 6
LIMIT = 1e-3
# Rounded activations tip the near ties of a random router, in each program others.
ROUTED = 1e-2
BASE = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1 + i / 32 for i in range(32)],
        "long_factor": [1 + i / 8 for i in range(32)], "original_max_position_embeddings": 512}
# Name, model_type, what differs, and the limit.
MODELS = [
    ("llama", "llama", {}, LIMIT),
    ("llama-biases-tied", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, LIMIT),
    ("llama-llama3", "llama", {"rope_scaling": LLAMA3}, LIMIT),
    ("llama-linear", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, LIMIT),
    ("llama-yarn", "llama", {"rope_scaling": YARN}, LIMIT),
    ("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, ROUTED),
    ("smollm3", "smollm3", {}, LIMIT),
    ("qwen2", "qwen2", {}, LIMIT),
    ("qwen3", "qwen3", {"head_dim": 64}, LIMIT),
    ("qwen3_moe", "qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
                                "norm_topk_prob": True, "head_dim": 64}, ROUTED),
    ("gemma2", "gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 50.0,
                          "final_logit_softcapping": 30.0, "sliding_window": 16, "tie_word_embeddings": True}, LIMIT),
    ("gemma3", "gemma3_text", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16,
                               "rope_theta": 1e6, "rope_local_base_freq": 1e4, "tie_word_embeddings": True}, LIMIT),
    ("gemma3-period", "gemma3_text", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16,
                                      "sliding_window_pattern": 3, "rope_theta": 1e6, "tie_word_embeddings": True,
                                      "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, LIMIT),
    ("stablelm", "stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.25}, LIMIT),
    ("stablelm-parallel", "stablelm", {"use_parallel_residual": True, "qk_layernorm": True}, LIMIT),
    ("olmo2", "olmo2", {}, LIMIT),
    ("phi3", "phi3", {}, LIMIT),
    ("phi3-longrope", "phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 512,
                               "max_position_embeddings": 2048}, LIMIT),
    ("gpt2", "gpt2", {"tie_word_embeddings": True, "num_key_value_heads": 4}, LIMIT),
    ("gpt_neox", "gpt_neox", {"num_key_value_heads": 4, "rotary_pct": 0.25}, LIMIT),
    ("gpt_neox-sequential", "gpt_neox", {"num_key_value_heads": 4, "use_parallel_residual": False}, LIMIT),
]
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
         "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "MXFP4_MOE", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M",
         "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
# The numbers of llama_ftype.
NUMBERS = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
           "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
           "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38}
# Types of codebooks, which windlass reads and llama.cpp writes, with importances of one.
CODEBOOKS = {"IQ1_S": 24, "IQ1_M": 31, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ2_S": 28, "IQ3_XXS": 23, "IQ3_S": 26}


def shapes(config):
    """The tensors of a model as a Hugging Face folder names them."""
    c, kind = config, config["model_type"]
    h, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    heads, keys = c["num_attention_heads"], c["num_key_value_heads"]
    d = c.get("head_dim", h // heads)
    out = {}

    def linear(name, rows, cols, bias=False):
        out[name + ".weight"] = (rows, cols)
        if bias:
            out[name + ".bias"] = (rows,)

    def norm(name, width=h, bias=False):
        out[name + ".weight"] = (width,)
        if bias:
            out[name + ".bias"] = (width,)

    if kind == "gpt2":
        out["transformer.wte.weight"] = (v, h)
        out["transformer.wpe.weight"] = (c["max_position_embeddings"], h)
        norm("transformer.ln_f", bias=True)
        for i in range(c["num_hidden_layers"]):
            at = f"transformer.h.{i}."
            norm(at + "ln_1", bias=True)
            norm(at + "ln_2", bias=True)
            for name, rows, cols in [("attn.c_attn", h, 3 * h), ("attn.c_proj", h, h), ("mlp.c_fc", h, f),
                                     ("mlp.c_proj", f, h)]:
                out[f"{at}{name}.weight"], out[f"{at}{name}.bias"] = (rows, cols), (cols,)
        return out
    if kind == "gpt_neox":
        out["gpt_neox.embed_in.weight"] = out["embed_out.weight"] = (v, h)
        norm("gpt_neox.final_layer_norm", bias=True)
        for i in range(c["num_hidden_layers"]):
            at = f"gpt_neox.layers.{i}."
            norm(at + "input_layernorm", bias=True)
            norm(at + "post_attention_layernorm", bias=True)
            linear(at + "attention.query_key_value", 3 * h, h, True)
            linear(at + "attention.dense", h, h, True)
            linear(at + "mlp.dense_h_to_4h", f, h, True)
            linear(at + "mlp.dense_4h_to_h", h, f, True)
        return out
    layer_norm = kind == "stablelm"
    out["model.embed_tokens.weight"] = (v, h)
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (v, h)
    norm("model.norm", bias=layer_norm)
    bias = c.get("attention_bias", False) or c.get("use_qkv_bias", False) or kind == "qwen2"
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        if kind == "phi3":
            linear(at + "self_attn.qkv_proj", (heads + 2 * keys) * d, h)
        else:
            for name, rows in [("q", heads * d), ("k", keys * d), ("v", keys * d)]:
                linear(f"{at}self_attn.{name}_proj", rows, h, bias)
        linear(at + "self_attn.o_proj", h, heads * d, c.get("attention_bias", False))
        if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
            norm(at + "self_attn.q_norm", d)
            norm(at + "self_attn.k_norm", d)
        if kind == "olmo2":
            norm(at + "self_attn.q_norm", heads * d)
            norm(at + "self_attn.k_norm", keys * d)
        if c.get("qk_layernorm"):
            for name, count in [("q", heads), ("k", keys)]:
                for head in range(count):
                    norm(f"{at}self_attn.{name}_layernorm.norms.{head}", d)
        if kind != "olmo2":
            norm(at + "input_layernorm", bias=layer_norm)
        if not (layer_norm and c.get("use_parallel_residual")):
            norm(at + "post_attention_layernorm", bias=layer_norm)
        if kind.startswith("gemma"):
            norm(at + "pre_feedforward_layernorm")
        if kind.startswith("gemma") or kind == "olmo2":
            norm(at + "post_feedforward_layernorm")
        if kind == "mixtral":
            linear(at + "block_sparse_moe.gate", c["num_local_experts"], h)
            for e in range(c["num_local_experts"]):
                for name, rows, cols in [("w1", f, h), ("w3", f, h), ("w2", h, f)]:
                    linear(f"{at}block_sparse_moe.experts.{e}.{name}", rows, cols)
        elif kind == "qwen3_moe":
            m = c["moe_intermediate_size"]
            linear(at + "mlp.gate", c["num_experts"], h)
            for e in range(c["num_experts"]):
                for name, rows, cols in [("gate", m, h), ("up", m, h), ("down", h, m)]:
                    linear(f"{at}mlp.experts.{e}.{name}_proj", rows, cols)
        elif kind == "phi3":
            linear(at + "mlp.gate_up_proj", 2 * f, h)
            linear(at + "mlp.down_proj", h, f)
        else:
            for name, rows, cols in [("gate", f, h), ("up", f, h), ("down", h, f)]:
                linear(f"{at}mlp.{name}_proj", rows, cols, c.get("mlp_bias", False))
    return out


def write_tensors(path, tensors):
    """A safetensors file."""
    header, chunks, offset = {}, [], 0
    for name, values in tensors.items():
        data = values.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        chunks.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def write_folder(folder, config):
    """A folder of random weights.

    Layers have a gain above 1, so that attention is far from uniform and every rotation matters; embeddings and head have
    the usual initializer's 0.02, as a divergence grows with the square of the logits.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(1)
    tensors = {}
    zero_centered = config["model_type"].startswith("gemma")
    for name, shape in shapes(config).items():
        is_norm = len(shape) == 1 and name.endswith("weight")
        spread = 0.1 if len(shape) == 1 else 1.5 / np.sqrt(HIDDEN)
        values = generator.normal(0, spread, shape) + (1.0 if is_norm and not zero_centered else 0.0)
        if "embed" in name or "wte" in name or "lm_head" in name:
            values = generator.normal(0, 0.02, shape)
        tensors[name] = values
    write_tensors(folder / "model.safetensors", tensors)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def theirs(path, ids, adapter=None):
    """llama.cpp's logits."""
    model = llama_cpp.Llama(str(path), n_ctx=256, n_batch=256, n_ubatch=256, logits_all=True, n_threads=2, verbose=False,
                            flash_attn=False, lora_path=adapter and str(adapter))
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)], dtype=np.float32)
    model.close()
    return logits


def ours(windlass, path, ids, folder, adapter=None):
    """windlass' logits."""
    out = folder / "logits.bin"
    command = [windlass, "eval", "logits", "--model", str(path), "--ids", ",".join(map(str, ids)), "--out", str(out),
               "--dtype", "f32", "--threads", "2"]
    command += ["--adapter", str(adapter)] if adapter else []
    subprocess.run(command, check=True, capture_output=True)
    return np.fromfile(out, dtype="<f4").reshape(len(ids), -1)


def divergence(p, q):
    """The mean over positions of the divergence of q from p, both as logits."""
    p, q = log_softmax(p), log_softmax(q)
    return (np.exp(p) * (p - q)).sum(axis=-1).mean()


def compare(windlass, path, ids, folder):
    """Mean divergence of ours from theirs, of either from exact numbers, share of equal first tokens."""
    their, our = theirs(path, ids), ours(windlass, path, ids, folder)
    back = folder / "back"
    shutil.rmtree(back, ignore_errors=True)
    subprocess.run([windlass, "convert", path, back, "--type", "F32"], check=True, capture_output=True)
    exact = ours(windlass, back, ids, folder)
    same = (their.argmax(-1) == our.argmax(-1)).mean()
    return divergence(their, our), divergence(exact, our), divergence(exact, their), same


def even(windlass, path):
    """Importances of one for every matrix of a file, and what keeps them alive."""
    text = subprocess.run([windlass, "inspect", path, "--json"], check=True, capture_output=True).stdout
    matrices = [t for t in json.loads(text)["tensors"] if len(t["shape"]) > 1]
    entry, arrays = llama_cpp.llama_model_imatrix_data, []
    for tensor in matrices:
        count = tensor["shape"][-1] * (tensor["shape"][0] if len(tensor["shape"]) == 3 else 1)
        arrays.append((tensor["name"].encode(), (ctypes.c_float * count)(*[1.0] * count)))
    entries = [entry(name, ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), len(data)) for name, data in arrays]
    return (entry * (len(entries) + 1))(*entries, entry(None, None, 0)), arrays


def quantize(source, target, number, importances=None):
    """llama.cpp's own quantization."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = number, 2
    if importances:
        parameters.imatrix = importances
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if code != 0:
        raise RuntimeError(f"llama.cpp's quantize returns {code}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windlass", required=True)
    parser.add_argument("--model", action="append", default=[], help="a Hugging Face folder instead of random models")
    parser.add_argument("--only", action="append", default=[], help="names of random models")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        models = [(name, pathlib.Path(name), LIMIT) for name in arguments.model]
        for name, kind, changes, limit in [] if models else MODELS:
            if arguments.only and name not in arguments.only:
                continue
            folder = place / name
            write_folder(folder, {"model_type": kind, **BASE, **changes})
            models.append((name, folder, limit))
        print(f"{'model':<22} {'type':<10} {'written by':<10} {'between':>10} {'windlass':>10} {'llama.cpp':>10}"
              f" {'top 1':>6}")
        for name, folder, limit in models:
            vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
            ids = np.random.default_rng(2).integers(0, vocabulary, arguments.tokens).tolist()
            plain = place / "plain.gguf"
            subprocess.run([arguments.windlass, "convert", folder, plain, "--type", "F32"], check=True,
                           capture_output=True)
            for kind in arguments.types:
                for writer in ["windlass", "llama.cpp"]:
                    path = place / "model.gguf"
                    if writer == "windlass" and kind in CODEBOOKS:
                        continue
                    try:
                        if writer == "windlass":
                            subprocess.run([arguments.windlass, "convert", folder, path, "--type", kind], check=True,
                                           capture_output=True)
                        elif kind in NUMBERS:
                            quantize(plain, path, NUMBERS[kind])
                        elif kind in CODEBOOKS:
                            importances, alive = even(arguments.windlass, plain)
                            quantize(plain, path, CODEBOOKS[kind], importances)
                        else:
                            continue
                        between, our, their, top = compare(arguments.windlass, path, ids, place)
                        # Codebooks are rounded once more, to blocks of 8 bits.
                        most = 2 * limit if kind in CODEBOOKS else limit
                        bad = not (between < most or our <= their)
                        print(f"{name:<22} {kind:<10} {writer:<10} {between:10.2e} {our:10.2e} {their:10.2e} {top:6.3f}"
                              f"{'  above the limit' if bad else ''}", flush=True)
                    except Exception as error:  # One model that fails must not hide the others.
                        words = getattr(error, "stderr", b"") or b""
                        print(f"{name:<22} {kind:<10} {writer:<10} fails: {error} {words.decode()[-300:]}", flush=True)
                        bad = True
                    failures += bad
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
