"""Prompts and generation of windlass beside OpenVINO GenAI's int4, in turn, on the same random weights.

Usage, in a throw-away environment with openvino-genai, optimum-intel, nncf and transformers, HF being the folder of a model in
bf16 (its values do not change the speed):

    optimum-cli export openvino --model HF --task text-generation-with-past --weight-format int4 EXPORTED
    windlass bench --model HF --load-in q4g128 --save-packed PACKED -p 8 -n 2
    python benchmarks/openvino_speed.py EXPORTED PACKED --windlass target/release/windlass [-t 2] [-p 512] [-n 64] [--rounds 2]

That export has 4-bit integers with a zero for each 128 columns, as q4g128 has; embedding and head stay in 8 bits a channel,
unless the export is asked for `--all-layers`. PACKED may be any model that `windlass bench` opens, a GGUF file too.

Each round runs windlass and then OpenVINO with its default and its best setting, activations rounded in groups as long as the
weights' (`--settings` takes others, as JSON). Medians of a run are printed as they come, and at the end the best run
of windlass beside the best of all runs of OpenVINO: machines change from minute to minute, and so the ratio of bests, not of
means, is the figure to quote.
"""

import argparse
import json
import statistics
import subprocess

import numpy
import openvino
import openvino_genai as genai

SETTINGS = ["{}", '{"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}']


def peer(args, settings):
    """Tokens a second of prompts and of generation, `reps` runs of each after one that does not count."""
    pipeline = genai.LLMPipeline(args.exported, "CPU", INFERENCE_NUM_THREADS=args.threads, **settings)
    config = genai.GenerationConfig(max_new_tokens=args.gen + 1, min_new_tokens=args.gen + 1, ignore_eos=True, do_sample=False)
    source = numpy.random.default_rng(0)
    rates = {"prompt": [], "generation": []}
    for run in range(args.reps + 1):
        # Another prompt each time: the pipeline keeps the keys and values of a prefix that it has seen.
        ids = source.integers(300, args.vocabulary, (1, args.prompt))
        prompt = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
        measured = pipeline.generate(prompt, config).perf_metrics
        if measured.get_num_generated_tokens() != args.gen + 1:
            raise SystemExit("OpenVINO stopped early")
        if run > 0:
            rates["prompt"].append(args.prompt / measured.get_ttft().mean * 1000)
            rates["generation"].append(1000 / measured.get_tpot().mean)
    return rates


def ours(args):
    """The same of `windlass bench`, generation after as many tokens too, and what it measured of the machine."""
    rates = {}
    for name, test in {"prompt": ["-p", args.prompt, "-n", 0], "generation": ["-p", 0, "-n", args.gen, "-d", args.prompt]}.items():
        command = [args.windlass, "bench", "--model", args.model, "--json", "--threads", args.threads, "-r", args.reps, *test]
        done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        report = json.loads(done.stdout)
        rates[name] = report["tests"][0]["runs"]
    return rates, report["ceilings"][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported")
    parser.add_argument("model")
    parser.add_argument("--windlass", required=True)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--gen", type=int, default=64)
    parser.add_argument("-r", "--reps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--settings", nargs="*", default=SETTINGS, metavar="JSON")
    args = parser.parse_args()
    print(f"OpenVINO {openvino.__version__}")
    best = {}

    def note(who, setting, rates):
        medians = {test: round(statistics.median(values), 2) for test, values in rates.items()}
        print(f"{who:10} {setting:64} prompt {medians['prompt']:8.2f} t/s   generation {medians['generation']:7.2f} t/s", flush=True)
        for test, values in rates.items():
            best[who, test] = max(best.get((who, test), 0.0), *values)

    for _ in range(args.rounds):
        rates, ceilings = ours(args)
        streams = max(ceilings["bandwidth_by_streams"].values()) / 1e9
        print(f"memory {streams:.1f} GB/s, int8 {(ceilings['int8_operations'] or 0) / 1e12:.2f} TOP/s")
        note("windlass", "", rates)
        for setting in args.settings:
            note("OpenVINO", setting, peer(args, json.loads(setting)))
    for test in ["prompt", "generation"]:
        ratio = best["windlass", test] / best["OpenVINO", test]
        print(f"best {test}: {best['windlass', test]:.2f} beside {best['OpenVINO', test]:.2f} t/s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
