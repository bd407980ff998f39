"""Compares Windlass's curves with PyTorch's and draws them.

    python shakespeare_plot.py        reads and writes beside itself, in `shakespeare/`; needs no packages

Prints the largest and the mean relative difference of the losses, and fails above 1 % (f32) or 2 % (bf16) at any step.
"""

import json
import os

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shakespeare")
LIMITS = dict(f32=0.01, bf16=0.02)
WIDTH, HEIGHT, LEFT, TOP, RIGHT = 720, 420, 52, 16, 708
LOSS_BOTTOM, REST_TOP, REST_BOTTOM = 262, 290, 384
LINES = [("torch", "f32", "#222222", 4.0), ("windlass", "f32", "#f5a623", 1.6)]
LINES += [("torch", "bf16", "#7aa6da", 4.0), ("windlass", "bf16", "#b0215e", 1.6)]


def path(values, x, y, color, width):
    points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
    return f'<polyline fill="none" stroke="{color}" stroke-width="{width}" stroke-linejoin="round" points="{points}"/>'


def text(x, y, words, anchor="start", color="#444444"):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}">{words}</text>'


def main():
    read = lambda who, dtype: json.load(open(os.path.join(HERE, f"{who}_{dtype}.json")))
    curves = {(who, dtype): read(who, dtype) for who in ("torch", "windlass") for dtype in LIMITS}
    apart = {}
    for dtype, limit in LIMITS.items():
        ours, theirs = (curves[who, dtype]["loss"] for who in ("windlass", "torch"))
        assert len(ours) == len(theirs)
        apart[dtype] = [a / b - 1 for a, b in zip(ours, theirs)]
        sizes = [abs(d) for d in apart[dtype]]
        worst = max(sizes)
        print(f"{dtype}: largest {worst:.2e} at step {sizes.index(worst)}, mean {sum(sizes) / len(sizes):.2e}")
        assert worst <= limit, f"{dtype} is {worst:.2%} apart"
    steps = len(curves["torch", "f32"]["loss"])
    x = lambda i: LEFT + (RIGHT - LEFT) * i / (steps - 1)
    y = lambda loss: LOSS_BOTTOM - (LOSS_BOTTOM - TOP) * (loss - 1.75) / 2.75
    z = lambda d: (REST_TOP + REST_BOTTOM) / 2 - (REST_BOTTOM - REST_TOP) * d / 0.04
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">']
    out.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>')
    ticks = [(y(v), f"{v:.1f}") for v in (2.0, 2.5, 3.0, 3.5, 4.0, 4.5)]
    ticks += [(z(v), f"{100 * v:+.0f} %") for v in (-0.02, -0.01, 0.01, 0.02)] + [(z(0), "0")]
    for at, words in ticks:
        out.append(f'<path d="M{LEFT} {at:.1f}H{RIGHT}" stroke="#dddddd"/>' + text(LEFT - 6, round(at) + 4, words, "end"))
    for i in range(0, steps + 1, 50):
        out.append(text(round(x(min(i, steps - 1))), REST_BOTTOM + 18, i, "middle"))
    out.append(text(RIGHT, HEIGHT - 4, "optimizer step", "end"))
    for row, (who, dtype, color, width) in enumerate(LINES):
        out.append(path(curves[who, dtype]["loss"], x, y, color, width))
        out.append(f'<path d="M500 {34 + 18 * row}h30" stroke="{color}" stroke-width="{width}"/>')
        name = "PyTorch" if who == "torch" else "Windlass"
        out.append(text(540, 38 + 18 * row, f"{name} {dtype}"))
    for dtype, color in (("bf16", "#b0215e"), ("f32", "#f5a623")):
        out.append(path(apart[dtype], x, z, color, 1.2))
    out.append(text(LEFT + 6, REST_TOP - 6, "Windlass / PyTorch - 1"))
    out.append(text(LEFT + 6, TOP + 8, "training loss, nats"))
    with open(os.path.join(HERE, "curves.svg"), "w") as f:
        f.write("\n".join(out + ["</svg>", ""]))


if __name__ == "__main__":
    main()
