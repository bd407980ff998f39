"""Keeps `windlass serve` at full load for minutes and watches its memory: resident size must stay flat within 2 %.

Usage: soak.py WINDLASS MODEL [MINUTES]. Needs Linux and nothing but Python. 48 clients ask for completions, chats, several choices,
streams, scores and embeddings of lengths that vary, some go away in the middle of an answer; with 32 places and a small memory for
keys and values something always waits and blocks are taken back. A warm-up of a minute and 5000 answers does not count: buffers grow
to their size.
"""

import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

CLIENTS, WARM_UP, WARM_ANSWERS, LIMIT = 48, 60, 5000, 0.02
WORDS = "Story Anna is in the kitchen She has a green kite Tom park with white book Then goes to school".split()
counts = {"answers": 0, "left": 0, "refused": 0}
failures: list[str] = []


def body(source: random.Random) -> tuple[str, dict]:
    """Any request."""
    words = " ".join(source.choice(WORDS) for _ in range(source.randrange(2, 60)))
    tokens = source.randrange(1, 120)
    common = {"model": "tiny", "max_tokens": tokens, "seed": source.randrange(1000), "stream": source.random() < 0.6}
    kind = source.randrange(6)
    if kind == 0:
        return "/v1/embeddings", {"model": "tiny", "input": [words, words[:90][::-1]]}
    if kind == 1:
        return "/v1/chat/completions", common | {"messages": [{"role": "user", "content": words}]}
    if kind == 2:
        return "/v1/completions", common | {"prompt": words, "n": 3, "logprobs": 3}
    if kind == 3:
        return "/v1/completions", common | {"prompt": words, "echo": True, "logprobs": 1}
    if kind == 4:
        schema = {"type": "object", "properties": {"at": {"enum": words.split()[:9]}}, "required": ["at"], "additionalProperties": False}
        return "/v1/chat/completions", common | {"messages": [{"role": "user", "content": words}], "guided_json": schema}
    return "/v1/completions", common | {"prompt": words, "ignore_eos": True}


def client(url: str, number: int, ended: threading.Event) -> None:
    source = random.Random(number)
    while not ended.is_set():
        path, asked = body(source)
        request = urllib.request.Request(url + path, json.dumps(asked).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                if source.random() < 0.1:
                    answer.read(200)
                    counts["left"] += 1
                    continue
                text = answer.read()
                counts["answers"] += 1
                if asked.get("stream") and not text.endswith(b"data: [DONE]\n\n"):
                    failures.append(f"{asked}: {text[-300:]!r}")
        except urllib.error.HTTPError as error:
            counts["refused"] += 1
            if error.code != 429:
                failures.append(f"{asked}: {error.code} {error.read()!r}")


def resident(process: subprocess.Popen) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def main() -> None:
    minutes = float(sys.argv[3]) if len(sys.argv) > 3 else 10
    template = Path(__file__).resolve().parents[1] / "tests/clients/template.jinja"
    command = [sys.argv[1], "serve", "--model", sys.argv[2], "--served-name", "tiny", "--port", "0", "--log-level", "error",
               "--template", str(template), "--kv-tokens", "4096"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = process.stdout.readline().strip()
    ended = threading.Event()
    threads = [threading.Thread(target=client, args=(url, number, ended), daemon=True) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    sizes: list[int] = []
    while len(sizes) < 12 * minutes:
        time.sleep(5)
        warm = sizes or time.monotonic() - begin >= WARM_UP and counts["answers"] >= WARM_ANSWERS
        if warm:
            sizes.append(resident(process))
        if len(sizes) % 12 == 1 or not warm:
            print(f"{time.monotonic() - begin:6.0f} s  {resident(process) / 2**20:8.2f} MiB  {counts}", flush=True)
    ended.set()
    for thread in threads:
        thread.join(timeout=120)
    page = urllib.request.urlopen(url + "/metrics").read().decode()
    value = lambda name: float(re.search(rf"^windlass:{name}\{{.*\}} (\S+)$", page, re.M)[1])
    batch = value("iteration_sequences_sum") / value("iteration_sequences_count")
    used = value("kv_cache_blocks_used")
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=60)
    tenth = max(1, len(sizes) // 10)
    first, last = sum(sizes[:tenth]) / tenth, sum(sizes[-tenth:]) / tenth
    grown = last / first - 1
    spread = max(sizes) / min(sizes) - 1
    print(f"{minutes:g} minutes: {counts}, {value('generation_tokens_total'):.0f} tokens, {batch:.1f} sequences a step, "
          f"{value('num_preemptions_total'):.0f} preemptions")
    print(f"resident {first / 2**20:.2f} MiB in the first tenth, {last / 2**20:.2f} MiB in the last: {100 * grown:+.2f} %; "
          f"largest over smallest {100 * spread:.2f} %")
    assert not failures, failures[:5]
    assert used == 0 and code == 0, (used, code)
    assert abs(grown) <= LIMIT, "resident memory is not flat"


if __name__ == "__main__":
    main()
