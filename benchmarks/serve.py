"""`windlass serve` beside llama-server over the same GGUF file, one after the other, and the curve of both over more and more clients.

Usage, in a throw-away environment with aiohttp:

    python benchmarks/serve.py MODEL.gguf --windlass target/release/windlass --llama-server llama-server [--test headline]

`headline` is 8 clients with prompts of 512 tokens and answers of 128, driven by a load generator (`--load`) that prints its figures as JSON. `curve` is
FastGen's workload at the size of a processor: lengths drawn from normal distributions with a spread of 30 %, 1 to 32 clients, each
asking again when its answer is complete. `chat` asks a second turn and shows what of it was computed. Requests, lengths and seeds
are the same for both servers, no two prompts begin alike, greedy, answers have exactly the length asked for.
llama-server runs with continuous batching, a slot for each client, flash attention and `-ub`/`-b` as given; of several settings
(`--flash on,off`, `--ubatch 512,128`) the best counts, by total throughput. Each line ends with the share of the processors' time
that other virtual machines took meanwhile. With `--out FOLDER` figures go to `serve.json` and the
curves to `serve.svg` there.
"""

import argparse
import asyncio
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import aiohttp

COLORS = {"windlass": "#b0215e", "llama-server": "#7aa6da"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 400, 60, 20, 700, 350


@contextmanager
def server(command, url, log):
    """Runs a server until the block ends."""
    process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    try:
        start = time.monotonic()
        while True:
            try:
                if urllib.request.urlopen(url + "/health", timeout=2).status == 200:
                    break
            except OSError:
                pass
            if process.poll() is not None or time.monotonic() - start > 120:
                raise SystemExit(f"{command[0]} does not start: see {log.name}")
            time.sleep(0.05)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def commands(args, clients, longest):
    """The settings of both servers for so many clients with texts of this length: name, setting, command."""
    room = -(-longest // 64) * 64 * clients
    ours = [args.windlass, "serve", "--model", args.model, "--threads", args.threads, "--port", args.port, "--log-level", "error",
            "--max-sequences", max(clients, 8), "--kv-tokens", room, "--served-name", "m", *args.ours.split()]
    if args.windlass:
        yield "windlass", args.ours, ours
    if not args.llama_server:
        return
    for flash, ubatch in itertools.product(args.flash.split(","), args.ubatch.split(",")):
        theirs = [args.llama_server, "-m", args.model, "-t", args.threads, "-tb", args.threads, "--port", args.port, "-np", clients,
                  "-c", room, "-fa", flash, "-b", 2048, "-ub", ubatch, "--cache-ram", 0, "--alias", "m", *args.theirs.split()]
        yield "llama-server", f"flash {flash}, ubatch {ubatch} {args.theirs}".strip(), theirs


def clock():
    """Time that this machine's processors had, and what other machines beside it took of that."""
    times = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    return sum(times), times[7]


def stolen(before):
    """The share that others took since then: figures with much of it say little."""
    (all_before, theirs_before), (all_now, theirs) = before, clock()
    return (theirs - theirs_before) / max(all_now - all_before, 1)


def quantile(values, part):
    values = sorted(values)
    at = (len(values) - 1) * part
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


async def ask(session, url, prompt, length, into):
    """One streamed answer: when it was asked for, and when each piece of text came."""
    body = {"model": "m", "prompt": prompt, "max_tokens": length, "stream": True, "temperature": 0, "ignore_eos": True,
            "stream_options": {"include_usage": True}}
    start, pieces, tokens = time.perf_counter(), [], None
    async with session.post(url + "/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise SystemExit(f"{answer.status}: {await answer.text()}")
        async for line in answer.content:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            event = json.loads(line[5:])
            if event.get("error"):
                raise SystemExit(str(event["error"]))
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if event.get("choices") and event["choices"][0].get("text"):
                pieces.append(time.perf_counter())
    end = time.perf_counter()
    into.append({"prompt": len(prompt), "tokens": tokens, "latency": end - start, "first": (pieces or [end])[0] - start,
                 "gaps": [b - a for a, b in zip(pieces, pieces[1:])]})


async def drive(url, requests, clients):
    """So many clients take the requests in turn: figures of all answers."""
    answers, left = [], iter(requests)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3600), connector=connector) as session:

        async def client():
            for prompt, length in left:
                await ask(session, url, prompt, length, answers)

        await ask(session, url, [7] * 16, 4, [])
        spent, start = inside_steps(url), time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        wall = time.perf_counter() - start
        spent = inside_steps(url) - spent
    gaps = [gap for answer in answers for gap in answer["gaps"]]
    inside, out = sum(answer["prompt"] for answer in answers), sum(answer["tokens"] for answer in answers)
    return {"clients": clients, "requests": len(answers), "wall": wall, "prompt_tokens": inside, "new_tokens": out,
            "total": (inside + out) / wall, "output": out / wall, "rate": len(answers) / wall,
            "latency": quantile([answer["latency"] for answer in answers], 0.5),
            "latency95": quantile([answer["latency"] for answer in answers], 0.95),
            "first": quantile([answer["first"] for answer in answers], 0.5),
            "first95": quantile([answer["first"] for answer in answers], 0.95),
            "gap": quantile(gaps, 0.5), "gap95": quantile(gaps, 0.95), "outside": 1 - spent / wall if spent else None}


def inside_steps(url):
    """Seconds that windlass has computed; 0 for a server that does not tell."""
    try:
        page = urllib.request.urlopen(url + "/metrics").read().decode()
    except urllib.error.HTTPError:
        return 0
    found = re.search(r"^windlass:iteration_seconds_sum\{[^}]*\} (\S+)$", page, re.M)
    return float(found[1]) if found else 0


def workload(args, clients):
    """FastGen's: lengths around means, 30 % apart; tokens at random. The same for whoever is asked."""
    source = random.Random(clients)
    near = lambda mean: max(4, round(source.gauss(mean, 0.3 * mean)))
    count = max(args.least, args.each * clients)
    return [([source.randrange(300, 30000) for _ in range(min(near(args.prompt), 3 * args.prompt))],
             min(near(args.answer), 3 * args.answer)) for _ in range(count)]


def show(name, setting, found):
    print(f"{name:12} {setting:24} {found['clients']:3} clients {found['requests']:3} requests  total {found['total']:7.1f} t/s  "
          f"output {found['output']:6.1f} t/s  first token p50 {found['first']:6.2f} p95 {found['first95']:6.2f} s  between tokens "
          f"p50 {1e3 * found['gap']:6.1f} p95 {1e3 * found['gap95']:7.1f} ms  answer p50 {found['latency']:6.2f} s  "
          f"stolen {100 * found['stolen']:.0f} %" + (f"  outside steps {100 * found['outside']:.2f} %" if found.get("outside") else ""), flush=True)


def headline(args, url, log):
    """8 clients, 512 tokens in, 128 out, by the load generator."""
    if not args.load:
        raise SystemExit("headline needs --load")
    best = {}
    for name, setting, command in commands(args, 8, 512 + 128 + 8):
        with server(command, url, log):
            load = [sys.executable, args.load, "--url", url, "--model", "m", "--concurrency", 8, "--requests", args.requests,
                    "--prompt-len", 512, "--out-len", 128]
            before = clock()
            done = subprocess.run(list(map(str, load)), check=True, stdout=subprocess.PIPE)
            share = stolen(before)
            report = json.loads(done.stdout)
            if report.get("errors") or not report["usage_reported"]:
                raise SystemExit(f"{name}: {report}")
            found = {"clients": 8, "requests": report["completed"], "wall": report["wall_s"], "total": report["total_tok_s"],
                     "output": report["output_tok_s"], "latency": report["latency_s"]["p50"], "latency95": report["latency_s"]["p95"],
                     "first": report["ttft_s"]["p50"], "first95": report["ttft_s"]["p95"], "gap": report["itl_s"]["p50"],
                     "gap95": report["itl_s"]["p95"], "setting": setting, "stolen": share, "metrics": steps(url) if name == "windlass" else None}
        show(name, setting, found)
        if name not in best or found["total"] > best[name]["total"]:
            best[name] = found
    if len(best) == 2:
        ours, theirs = best["windlass"], best["llama-server"]
        print(f"throughput {ours['total'] / theirs['total']:.2f} times, p95 of the first token {ours['first95'] / theirs['first95']:.2f}, "
              f"p95 between tokens {ours['gap95'] / theirs['gap95']:.2f} of llama-server's")
    if "windlass" in best:
        print(json.dumps(best["windlass"]["metrics"]))
    return best


def steps(url):
    """What the server says of its own steps."""
    text = urllib.request.urlopen(url + "/metrics").read().decode()
    value = lambda name: float(re.search(rf"^windlass:{name}\{{[^}}]*\}} (\S+)$", text, re.M)[1])
    spent, between, count = value("iteration_seconds_sum"), value("engine_overhead_seconds_total"), value("iteration_seconds_count")
    return {"steps": count, "seconds in steps": round(spent, 3), "seconds between them": round(between, 5),
            "overhead": round(between / spent, 5), "tokens a step": round(value("iteration_tokens_total_sum") / count, 1)}


def curve(args, url, log):
    """More and more clients."""
    curves = {"windlass": [], "llama-server": []}
    for clients in map(int, args.clients.split(",")):
        requests = workload(args, clients)
        longest = max(len(prompt) + length for prompt, length in requests) + 8
        best = {}
        for name, setting, command in commands(args, clients, longest):
            with server(command, url, log):
                before = clock()
                found = asyncio.run(drive(url, requests, clients)) | {"setting": setting, "stolen": stolen(before)}
            show(name, setting, found)
            if name not in best or found["total"] > best[name]["total"]:
                best[name] = found
        for name, found in best.items():
            curves[name].append(found)
    return curves


def chat(args, url, log):
    """A second turn of a conversation computes what is new."""
    if not args.windlass:
        raise SystemExit("--test chat is for --windlass")
    name, setting, command = next(commands(args, 2, 2048))
    with server(command, url, log):
        source = random.Random(5)
        tokens = [source.randrange(300, 30000) for _ in range(700)]
        seen = []
        for known in (600, 700):
            body = {"model": "m", "prompt": tokens[:known], "max_tokens": 1, "temperature": 0}
            request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
            start = time.perf_counter()
            usage = json.loads(urllib.request.urlopen(request).read())["usage"]
            seen.append({"prompt": usage["prompt_tokens"], "cached": usage["prompt_tokens_details"]["cached_tokens"],
                         "seconds": time.perf_counter() - start})
    for turn in seen:
        print(f"turn of {turn['prompt']} tokens, {turn['cached']} of them known: {turn['seconds']:.2f} s")
    return seen


def text(x, y, words, anchor="middle", color="#444444", more=""):
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{color}"{more}>{words}</text>'


def plot(curves):
    """Throughput against the median time of an answer, as FastGen draws it."""
    points = [found for found in itertools.chain(*curves.values())]
    most, longest = 1.1 * max(found["total"] for found in points), 1.1 * max(found["latency"] for found in points)
    x = lambda value: LEFT + (RIGHT - LEFT) * value / most
    y = lambda value: BOTTOM - (BOTTOM - TOP) * value / longest
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']
    for part in range(6):
        out.append(f'<path d="M{LEFT} {y(longest * part / 5):.0f}H{RIGHT}" stroke="#dddddd"/>')
        out.append(text(LEFT - 6, y(longest * part / 5) + 4, f"{longest * part / 5:.0f}", "end"))
        out.append(text(x(most * part / 5), BOTTOM + 18, f"{most * part / 5:.0f}"))
    out.append(text((LEFT + RIGHT) / 2, HEIGHT - 8, "throughput, prompt and new tokens a second"))
    out.append(text(16, (TOP + BOTTOM) / 2, "median time of an answer, s", more=f' transform="rotate(-90 16 {(TOP + BOTTOM) / 2:.0f})"'))
    for row, (name, found) in enumerate((name, found) for name, found in curves.items() if found):
        color = COLORS[name]
        line = " ".join(f"{x(at['total']):.1f},{y(at['latency']):.1f}" for at in found)
        out.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{line}"/>')
        for at in found:
            out.append(f'<circle cx="{x(at["total"]):.1f}" cy="{y(at["latency"]):.1f}" r="4" fill="{color}"/>')
            out.append(text(x(at["total"]) + 7, y(at["latency"]) - 6, at["clients"], "start", color))
        out.append(text(LEFT + 14, TOP + 16 + 18 * row, f"{name} (number of clients beside each point)", "start", color))
    return "\n".join([*out, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windlass", help="the program; without it the other server alone")
    parser.add_argument("--llama-server", help="the program; without it windlass alone")
    parser.add_argument("--load", help="the load generator of `headline`")
    parser.add_argument("--test", action="append", choices=["headline", "curve", "chat"], help="several times for several [default: all]")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=18431)
    parser.add_argument("--flash", default="on", help="settings of llama-server, parted by commas")
    parser.add_argument("--ubatch", default="512")
    parser.add_argument("--ours", default="", help="more flags of windlass serve")
    parser.add_argument("--theirs", default="", help="more flags of llama-server")
    parser.add_argument("--requests", type=int, default=32, help="of the headline")
    parser.add_argument("--clients", default="1,2,4,8,16,32", help="of the curve")
    parser.add_argument("--each", type=int, default=2, help="requests for each client of the curve")
    parser.add_argument("--least", type=int, default=4, help="requests of each point at least")
    parser.add_argument("--prompt", type=int, default=128, help="mean tokens of the curve's prompts")
    parser.add_argument("--answer", type=int, default=60, help="mean tokens of the curve's answers")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    url = f"http://127.0.0.1:{args.port}"
    found = {}
    with tempfile.NamedTemporaryFile("w", suffix=".log", delete=False) as log:
        for test in args.test or ["headline", "curve", "chat"]:
            found[test] = {"headline": headline, "curve": curve, "chat": chat}[test](args, url, log)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / "serve.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | found, indent=1) + "\n")
        if "curve" in found:
            (args.out / "serve.svg").write_text(plot(found["curve"]))


if __name__ == "__main__":
    main()
