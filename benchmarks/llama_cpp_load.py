"""From nothing to the first token, and the memory that takes: windlass beside llama.cpp, in turn, on the same GGUF file.

Usage, in a throw-away environment with llama-cpp-python:

    python benchmarks/llama_cpp_load.py MODEL.gguf --windlass target/release/windlass [--packed FOLDER] [--rounds 5]

A round is a process each for windlass on the file, windlass on the folder that `--save-packed` made of it, and llama.cpp
with repacked weights and without. The time of windlass is that of the whole process; that of llama.cpp begins with the
call that loads the file, when the interpreter and the library are there already. Two tokens are read and one is chosen.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time


def peer(model, repack):
    """In a process of its own: loads, reads two tokens, prints the seconds."""
    import llama_cpp as llama

    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    start = time.perf_counter()
    settings = llama.llama_model_default_params()
    settings.use_extra_bufts, settings.n_gpu_layers = repack, 0
    loaded = llama.llama_model_load_from_file(model.encode(), settings)
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 2, 2
    context = llama.llama_init_from_model(loaded, settings)
    if llama.llama_decode(context, llama.llama_batch_get_one((llama.llama_token * 2)(1, 300), 2)) != 0:
        raise SystemExit("llama.cpp refused a batch")
    llama.llama_synchronize(context)
    llama.llama_get_logits_ith(context, -1)[0]
    print(time.perf_counter() - start)


def timed(command):
    """Seconds of a command, what it prints, and its peak memory in MB."""
    before = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return time.perf_counter() - before, out, usage.ru_maxrss * 1024 / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windlass", required=True)
    parser.add_argument("--packed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", choices=["repacked", "stored"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.model, args.peer == "repacked")
    runs = {}

    def note(name, seconds, memory):
        runs.setdefault(name, []).append((seconds, memory))
        print(f"{name:28} {seconds:6.2f} s {memory:8.0f} MB", flush=True)

    with open(args.model, "rb") as file:
        while file.read(1 << 24):
            pass
    for _ in range(args.rounds):
        for name, source in [("windlass, the file", args.model), ("windlass, packed folder", args.packed)]:
            if source:
                ask = [args.windlass, "generate", "--model", source, "--prompt", "hi", "--max-tokens", "1"]
                seconds, _, memory = timed(ask)
                note(name, seconds, memory)
        for setting in ["repacked", "stored"]:
            command = [sys.executable, __file__, args.model, "--windlass", args.windlass, "--peer", setting]
            _, out, memory = timed(command)
            note(f"llama.cpp, {setting}", float(out), memory)
    size = os.path.getsize(args.model) / 1e6
    print(f"file {size:.0f} MB; median and best seconds, peak memory:")
    for name, values in runs.items():
        seconds = [value for value, _ in values]
        memory = max(memory for _, memory in values)
        print(f"{name:28} {statistics.median(seconds):6.2f} {min(seconds):6.2f} s {memory:8.0f} MB ({memory / size:.2f} of the file)")


if __name__ == "__main__":
    main()
