"""Runs lm-eval's `local-completions` over a task of this file against `windlass serve`.

Usage: harness.py WINDLASS MODEL, with the model of the quickstart, in an environment with `lm-eval[api]` and `transformers` (no
torch). The task is made on the spot: sentences like those of its training beside noise to choose between, their perplexity, and
beginnings to go on from.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from server import running

QUESTIONS = [
    ("Story: Anna is in the", [" kitchen.", " xq zvv."], 0),
    ("Story: Tom is in the park with a white", [" pfft zz gx.", " book."], 1),
    ("Story: Sam is in the kitchen. He has a yellow", [" qqq jj.", " cup."], 1),
    ("Story: Kate has a blue", [" drum.", " vvx nng qz."], 0),
]
COMMON = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICES = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_target: "{{question}}{{choices[answer]}}"
metric_list: [{metric: byte_perplexity}]
"""
GOING_ON = """output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, running(sys.argv[1], sys.argv[2], None) as url:
        place = Path(folder)
        data = place / "data.jsonl"
        rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks = {"windlass_choices": CHOICES, "windlass_rolling": ROLLING, "windlass_going_on": GOING_ON}
        for name, rest in tasks.items():
            head = COMMON.format(name=name, file=data)
            if name == "windlass_rolling":
                head = head.replace('"{{question}}"', '""')
            (place / f"{name}.yaml").write_text(head + rest)
        settings = f"model=tiny,base_url={url}/v1/completions,tokenizer={Path(sys.argv[2]).resolve()},max_length=128,num_concurrent=4,max_retries=1"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", settings]
        command += ["--tasks", *tasks, "--include_path", folder, "--output_path", str(place / "out"), "--batch_size", "1"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "cache"), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=os.environ | offline, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found = list((place / "out").rglob("results*.json"))
        if done.returncode or not found:
            sys.exit(done.stdout)
        results = json.loads(found[0].read_text())["results"]
        assert results.keys() == tasks.keys(), results
        # The model of the quickstart was trained on such sentences.
        assert results["windlass_choices"]["acc,none"] == 1, results
        assert 1 < results["windlass_rolling"]["byte_perplexity,none"] < 4, results
        for name, metrics in results.items():
            print(name, {metric: value for metric, value in metrics.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
