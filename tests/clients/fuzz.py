"""Sends requests that schemathesis makes of the OpenAPI document: none may be answered with a 5xx, or end the server.

Usage: fuzz.py WINDLASS MODEL [CASES]: for each operation, about so many cases [default: 20], right and wrong ones.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from server import running

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def document(url: str) -> dict:
    """The server's own, with the model's name, so that requests get beyond it."""
    found = json.loads(urllib.request.urlopen(url + "/openapi.json").read())
    named = 0
    for schema in found["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": ["tiny"]}
            named += 1
    assert named > 5, found
    return found


def main() -> None:
    cases = sys.argv[3] if len(sys.argv) > 3 else "20"
    # Answers are short, for what is fuzzed is what is asked.
    with running(sys.argv[1], sys.argv[2], None, "--context", "48") as url, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "openapi.json"
        file.write_text(json.dumps(document(url)))
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(file), "--url", url, "--checks", CHECKS]
        command += ["--phases", "coverage,fuzzing", "--mode", "all", "--max-examples", cases, "--seed", "1", "--no-color", "--workers", "2"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        report = done.stdout.partition("SUMMARY")[2]
        if done.returncode:
            sys.exit(done.stdout)
        (line,) = [line.strip() for line in report.splitlines() if "generated" in line and "passed" in line]
        assert urllib.request.urlopen(url + "/health").status == 200
    print(f"requests by schemathesis: {line}")


if __name__ == "__main__":
    main()
