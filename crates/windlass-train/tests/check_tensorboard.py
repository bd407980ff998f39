"""Checks that real TensorBoard reads a run's event files, and that they say what metrics.jsonl says.

usage: python check_tensorboard.py RUN_FOLDER    (needs: pip install tensorboard)

RUN_FOLDER holds metrics.jsonl; event files are looked for in it and below it.
"""

import json
import math
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main() -> None:
    run = Path(sys.argv[1])
    folders = {path.parent for path in run.rglob("events.out.tfevents.*")}
    if not folders:
        sys.exit(f"no event file in {run}")
    scalars = {}
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                key = (tag, event.step)
                if key in scalars:
                    sys.exit(f"{tag} has two values at step {event.step}")
                scalars[key] = event.value
    compared = 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        for tag, value in record.items():
            seen = scalars.pop((tag, step), None)
            if seen is None:
                sys.exit(f"TensorBoard does not know {tag} at step {step}")
            same = math.isclose(seen, value, rel_tol=1e-6) if value is not None else not math.isfinite(seen)
            if not same:
                sys.exit(f"{tag} at step {step} is {seen}, not {value}")
            compared += 1
    if scalars:
        sys.exit(f"TensorBoard knows scalars that metrics.jsonl does not: {list(scalars)[:5]}")
    print(f"{compared} scalars agree")


if __name__ == "__main__":
    main()
