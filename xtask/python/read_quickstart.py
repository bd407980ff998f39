"""Reads what the quickstart wrote with the tools its users have: safetensors, tokenizers, TensorBoard.

Usage: read_quickstart.py FOLDER. Exits with 1 when a file cannot be read or says nothing.
"""

import json
import math
import sys
from pathlib import Path

from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer


def read_model(folder: Path) -> None:
    """A folder with config.json has finite weights and a tokenizer that returns its text."""
    config = json.loads((folder / "config.json").read_text())
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as weights:
            # numpy has no bfloat16: shapes are read for every type, values where they can be.
            for name in weights.keys():
                part = weights.get_slice(name)
                count += math.prod(part.get_shape())
                if part.get_dtype() == "F32" and not (abs(part[:]) < math.inf).all():
                    sys.exit(f"{path}: {name} is not finite")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Once there was one."
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
    if decoded.strip() != text:
        sys.exit(f"{folder}: the tokenizer turns {text!r} into {decoded!r}")
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        sys.exit(f"{folder}: {tokenizer.get_vocab_size()} tokens, vocab_size {config['vocab_size']}")
    print(f"{folder.name}: {config['model_type']}, {count} parameters, tokenizer agrees")


def read_events(path: Path) -> None:
    """An event file has a scalar with more than one finite value."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    series = {tag: [event.value for event in events.Scalars(tag)] for tag in tags}
    if not any(len(values) > 1 for values in series.values()):
        sys.exit(f"{path}: no series of scalars in {tags}")
    bad = [tag for tag, values in series.items() if not all(map(math.isfinite, values))]
    if bad:
        sys.exit(f"{path}: {bad} are not finite")
    print(f"{path.name}: {len(series)} series, the longest of {max(map(len, series.values()))} steps")


def main() -> None:
    root = Path(sys.argv[1])
    models = [path.parent for path in root.rglob("config.json") if any(path.parent.glob("*.safetensors"))]
    if not models:
        sys.exit(f"{root}: the quickstart left no model folder")
    for folder in models:
        read_model(folder)
    events = list(root.rglob("*tfevents*"))
    for path in events:
        read_events(path)
    if not events:
        print("no event files: nothing read with TensorBoard")


main()
