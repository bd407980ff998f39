"""Prompts and generation of windlass beside llama.cpp's best settings, in turn, on the same GGUF file.

Usage, in a throw-away environment with llama-cpp-python:

    python benchmarks/llama_cpp_speed.py MODEL.gguf --windlass target/release/windlass [-t 2] [-p 512] [-n 64] [-d 0] [--rounds 2]

Each round runs windlass and then llama.cpp with every setting that changes its speed on a processor (repacked weights or
not, flash attention or not; at a depth also 8-bit keys and values). Medians of a run are printed as they come, and at the
end the best run of windlass beside the best of all runs of llama.cpp: machines change from minute to minute, and so the
ratio of bests, not of means, is the figure to quote. At a depth windlass keeps keys and values in 8 bits.

What both do on a processor without AVX-512: set WINDLASS_KERNELS=avx2, and use a llama.cpp that was built without it
(`--no-cache-dir`, for pip would else install the native build that it keeps); its features are printed first.

    export CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF"
    pip install --no-cache-dir --no-binary llama-cpp-python llama-cpp-python
"""

import argparse
import ctypes
import itertools
import json
import random
import statistics
import subprocess
import time

import llama_cpp as llama

KV_TYPES = {"f16": 1, "q8_0": 8}


def peer(args, repack, flash, kv):
    """Tokens a second of prompts and of generation, `reps` runs of each after one that does not count."""
    settings = llama.llama_model_default_params()
    settings.use_extra_bufts, settings.n_gpu_layers = repack, 0
    model = llama.llama_model_load_from_file(args.model.encode(), settings)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {args.model}")
    settings = llama.llama_context_default_params()
    settings.n_ctx = args.depth + args.prompt + args.gen + 64
    settings.n_threads = settings.n_threads_batch = args.threads
    settings.n_batch, settings.n_ubatch, settings.flash_attn_type = 2048, 512, int(flash)
    settings.type_k = settings.type_v = KV_TYPES[kv]
    context = llama.llama_init_from_model(model, settings)
    memory = llama.llama_get_memory(context)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    source = random.Random(0)

    def read(tokens):
        while tokens > 0:
            count = min(tokens, 2048)
            ids = (llama.llama_token * count)(*(source.randrange(3, vocabulary) for _ in range(count)))
            if llama.llama_decode(context, llama.llama_batch_get_one(ids, count)) != 0:
                raise SystemExit("llama.cpp refused a batch")
            tokens -= count
        llama.llama_synchronize(context)

    read(args.depth)
    rates = {test: [] for test in asked(args)}
    for run in range(args.reps + 1):
        for test in rates:
            llama.llama_memory_seq_rm(memory, 0, args.depth, -1)
            start = time.perf_counter()
            if test == "prompt":
                read(args.prompt)
            else:
                for _ in range(args.gen):
                    read(1)
            if run > 0:
                tokens = args.prompt if test == "prompt" else args.gen
                rates[test].append(tokens / (time.perf_counter() - start))
    llama.llama_free(context)
    llama.llama_model_free(model)
    return rates


def asked(args):
    """The tests to run: a length of 0 leaves one out, as in llama-bench."""
    return [test for test, tokens in [("prompt", args.prompt), ("generation", args.gen)] if tokens]


def ours(args):
    """The same of `windlass bench`, and what it measured of the machine."""
    command = [args.windlass, "bench", "--model", args.model, "--json", "--threads", args.threads, "-p", args.prompt,
               "-n", args.gen, "-d", args.depth, "-r", args.reps]
    if args.depth:
        command += ["--kv-cache-dtype", "int8"]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    report = json.loads(done.stdout)
    rates = {test: [] for test in asked(args)}
    for test in report["tests"]:
        rates["prompt" if test["test"].startswith("pp") else "generation"] += test["runs"]
    return rates, report["ceilings"][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windlass", required=True)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--gen", type=int, default=64)
    parser.add_argument("-d", "--depth", type=int, default=0)
    parser.add_argument("-r", "--reps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    print(llama.llama_print_system_info().decode())
    best = {}

    def note(who, setting, rates):
        medians = "   ".join(f"{test} {statistics.median(values):8.2f} t/s" for test, values in rates.items())
        print(f"{who:10} {setting:28} {medians}", flush=True)
        for test, values in rates.items():
            best[who, test] = max(best.get((who, test), 0.0), *values)

    for _ in range(args.rounds):
        rates, ceilings = ours(args)
        streams = max(ceilings["bandwidth_by_streams"].values()) / 1e9
        print(f"memory {streams:.1f} GB/s, int8 {(ceilings['int8_operations'] or 0) / 1e12:.2f} TOP/s")
        note("windlass", "int8 keys and values" if args.depth else "", rates)
        for repack, flash, kv in itertools.product([True, False], [True, False], ["f16", "q8_0"] if args.depth else ["f16"]):
            if kv == "q8_0" and not flash:
                continue
            setting = f"{'repacked' if repack else 'as stored'}, {'flash' if flash else 'plain'}, {kv}"
            note("llama.cpp", setting, peer(args, repack, flash, kv))
    for test in asked(args):
        ratio = best["windlass", test] / best["llama.cpp", test]
        print(f"best {test}: {best['windlass', test]:.2f} beside {best['llama.cpp', test]:.2f} t/s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
