"""Talks to `windlass serve` with the openai client for Node.

Usage: node.py WINDLASS MODEL FOLDER, where `npm install openai` was run in FOLDER.
"""

import subprocess
import sys
from pathlib import Path

from server import KEY, running


def main() -> None:
    script = Path(__file__).with_name("streams.mjs")
    with running(sys.argv[1], sys.argv[2], KEY) as url:
        subprocess.run(["node", str(script), sys.argv[3], url, KEY], check=True, timeout=120)


if __name__ == "__main__":
    main()
