"""Fine-tunes a small trained model by LoRA, QLoRA and in full, on the same samples in the same order, and draws the curves.

    python finetune.py --windlass target/release/windlass --data FOLDER [--work FOLDER]

FOLDER is that of `WINDLASS_TEST_DATA`. Needs no packages. A base model is trained by `windlass train` on TinyStories (kept in
the working folder for a second run), then fine-tuned on `instruct/instruction-data.json`, a tenth of it held out, until the held-out
loss falls no more. The vocabulary is small, so that stories alone teach what its tokens are: a table that does not know the
words of the instructions is learned anew by full fine-tuning, and LoRA does not adapt tables; what it reaches with the table trained
whole (`--modules-to-save`) is drawn too. Writes
`finetune/curves.json` and `finetune/curves.svg` beside itself. Exits with 1 where QLoRA's best held-out loss is more than 2 %
above LoRA's, or LoRA's more than 10 % above that of full fine-tuning.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent / "finetune"
BASE = "--separator <|endoftext|> --size 1m --vocab-size 512 --steps 800 --seq-len 256 --batch 8 --lr 3e-3 --dtype f32 --seed 1"
TUNE = "--template plain --max-length 256 --held-out 0.1 --batch 8 --epochs 8 --patience 6 --eval-every 25 --dtype f32 --seed 1"
METHODS = {
    "full": "--method full --lr 1e-3",
    "lora": "--method lora --rank 16 --lr 5e-3",
    "qlora": "--method qlora --rank 16 --lr 5e-3",
    "table": "--method lora --rank 16 --lr 2e-3 --modules-to-save embed_tokens",
}
COLORS = {"full": "#222222", "lora": "#f5a623", "qlora": "#b0215e", "table": "#2a7ab8"}
NAMES = {"full": "full", "lora": "LoRA, r 16", "qlora": "QLoRA, r 16, base in 4 bits", "table": "LoRA, r 16, and the table whole"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 380, 52, 16, 708, 336


def read(folder):
    """Steps and held-out losses of a run."""
    records = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    held = [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None]
    seen = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    return {"held_out": held, "loss": seen}


def line(points, x, y, color, width, more=""):
    points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in points)
    return f'<polyline fill="none" stroke="{color}" stroke-width="{width}" stroke-linejoin="round" {more} points="{points}"/>'


def text(x, y, words, anchor="start"):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="#444444">{words}</text>'


def smooth(points, window=11):
    values = [v for _, v in points]
    half = window // 2
    mean = lambda part: sum(part) / len(part)
    return [(step, mean(values[max(0, i - half) : i + half + 1])) for i, (step, _) in enumerate(points)]


def draw(curves):
    held = [v for c in curves.values() for _, v in c["held_out"]]
    seen = [v for c in curves.values() for _, v in smooth(c["loss"])]
    low, high = min(held + seen), max(held[0], *seen)
    steps = max(step for c in curves.values() for step, _ in c["held_out"])
    x = lambda i: LEFT + (RIGHT - LEFT) * i / steps
    y = lambda v: BOTTOM - (BOTTOM - TOP) * (v - low) / (high - low)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">']
    out.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>')
    tick = 0.5
    at = (int(low / tick) + 1) * tick
    while at < high:
        out.append(f'<path d="M{LEFT} {y(at):.1f}H{RIGHT}" stroke="#dddddd"/>' + text(LEFT - 6, round(y(at)) + 4, f"{at:.1f}", "end"))
        at += tick
    for step in range(0, steps + 1, 100):
        out.append(text(round(x(step)), BOTTOM + 18, step, "middle"))
    out.append(text(RIGHT, HEIGHT - 6, "optimizer step; thick: held-out loss, thin: training loss, mean of 11 steps", "end"))
    for row, (name, curve) in enumerate(curves.items()):
        out.append(line(smooth(curve["loss"]), x, y, COLORS[name], 0.8, 'opacity="0.6"'))
        out.append(line(curve["held_out"], x, y, COLORS[name], 2.4))
        out.append(f'<path d="M440 {34 + 18 * row}h30" stroke="{COLORS[name]}" stroke-width="2.4"/>')
        best = min(v for _, v in curve["held_out"])
        out.append(text(480, 38 + 18 * row, f"{NAMES[name]}: {best:.4f}"))
    return "\n".join(out) + "\n</svg>\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windlass", required=True)
    parser.add_argument("--data", default=os.environ.get("WINDLASS_TEST_DATA"))
    parser.add_argument("--work", default="finetune-runs", type=pathlib.Path)
    arguments = parser.parse_args()
    corpora = pathlib.Path(arguments.data) / "corpora"
    run = lambda *words: subprocess.run([arguments.windlass, *map(str, words)], check=True)
    base = arguments.work / "base"
    if not base.exists():
        stories = [corpora / "tinystories" / name for name in ("tinystories_10k.txt", "val_decoded.txt")]
        run("train", *stories, *BASE.split(), "--out", base)
    curves = {}
    for name, flags in METHODS.items():
        out = arguments.work / name
        if not out.exists():
            samples = corpora / "instruct" / "instruction-data.json"
            run("finetune", "--model", base, "--data", samples, *TUNE.split(), *flags.split(), "--out", out)
        curves[name] = read(out)
    best = {name: min(v for _, v in curve["held_out"]) for name, curve in curves.items()}
    first = curves["lora"]["held_out"][0][1]
    print(f"held-out loss: first {first:.4f}; best " + ", ".join(f"{name} {value:.4f}" for name, value in best.items()))
    apart = best["qlora"] / best["lora"] - 1, best["lora"] / best["full"] - 1
    print(f"QLoRA over LoRA {apart[0]:+.2%} (at most 2 %), LoRA over full {apart[1]:+.2%} (at most 10 %)")
    HERE.mkdir(exist_ok=True)
    (HERE / "curves.json").write_text(json.dumps(curves) + "\n")
    (HERE / "curves.svg").write_text(draw(curves))
    sys.exit(0 if apart[0] <= 0.02 and apart[1] <= 0.10 else 1)


main()
