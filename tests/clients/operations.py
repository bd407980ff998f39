"""What an operator relies on: a server that is killed is back at once, a server that is asked to end finishes its answers, and a log
that tells everything but what was said.

Usage: operations.py WINDLASS MODEL.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

SECRET = "Nobody but Anna knows"


def start(windlass: str, model: str, *flags: str, port: int = 0) -> tuple[subprocess.Popen, str]:
    """A server that is ready, and its URL."""
    command = [windlass, "serve", "--model", model, "--port", str(port), "--served-name", "tiny", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def ask(url: str, tokens: int, stream: bool):
    """The response to a completion, before it is read."""
    body = {"model": "tiny", "prompt": SECRET, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": stream}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def killed(windlass: str, model: str, folder: Path) -> None:
    """kill -9 in the middle of answers, and a start from packed weights at the same port."""
    packed = str(folder / "packed")
    process, url = start(windlass, model, "--load-in", "q4", "--save-packed", packed)
    with ask(url, 5, stream=False) as answer:
        before = json.loads(answer.read())["choices"][0]["text"]
    port = int(url.rpartition(":")[2])
    answers = [ask(url, 400, stream=True) for _ in range(4)]
    assert answers[0].readline().startswith(b"data: ")
    process.kill()
    process.communicate()
    begin = time.monotonic()
    process, url = start(windlass, packed, port=port)
    with ask(url, 5, stream=False) as answer:
        after = json.loads(answer.read())["choices"][0]["text"]
    took = time.monotonic() - begin
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert before == after, (before, after)
    assert took < 2, f"an answer came {took:.2f} s after the start"
    print(f"killed and restarted: an answer after {took:.2f} s")


def ended(windlass: str, model: str) -> None:
    """SIGTERM under load: running answers are finished, new ones refused, the exit is clean."""
    process, url = start(windlass, model)
    texts: list[str] = []
    begun = threading.Barrier(9)

    def client() -> None:
        answer = ask(url, 400, stream=True)
        first = answer.readline().decode()
        begun.wait()
        texts.append(first + answer.read().decode())

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    begun.wait(timeout=60)
    with urllib.request.urlopen(url + "/metrics") as page:
        running = re.search(rb"^windlass:num_requests_running\{.*\} (\d+)$", page.read(), re.M)
    process.send_signal(signal.SIGTERM)
    assert int(running[1]) > 0, "the answers were complete before the signal"
    for thread in threads:
        thread.join()
    process.communicate(timeout=30)
    assert process.returncode == 0, process.returncode
    assert len(texts) == 8
    for text in texts:
        assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text, text[-300:]
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0
    print("ended by SIGTERM: 8 answers were finished")


def logged(windlass: str, model: str) -> None:
    """Lines are JSON with the request's id; what was said is in them only with --log-prompts."""
    for flags, told in [(["--log-json"], False), (["--log-json", "--log-prompts"], True)]:
        process, url = start(windlass, model, *flags)
        with ask(url, 5, stream=False) as answer:
            id = answer.headers["x-request-id"]
            answer.read()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        own = [line for line in lines if id in json.dumps(line)]
        assert any(line["fields"]["message"] == "answered" for line in own), log
        assert (SECRET in log) == told, log
    print("logged: ids, and prompts only where they are asked for")


def main() -> None:
    windlass, model = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as folder:
        killed(windlass, model, Path(folder))
    ended(windlass, model)
    logged(windlass, model)


if __name__ == "__main__":
    main()
