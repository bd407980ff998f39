"""A server for a while, for scripts that need no more than the standard library."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEY = "key-of-this-test"


@contextmanager
def running(windlass: str, model: str, key: str | None, *flags: str) -> Iterator[str]:
    """The URL of a server that is ready; in the end it stops as it should."""
    template = Path(__file__).with_name("template.jinja")
    command = [windlass, "serve", "--model", model, "--template", str(template), "--port", "0", "--served-name", "tiny"]
    command += ["--log-level", "error", *(["--api-key", key] if key else []), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
