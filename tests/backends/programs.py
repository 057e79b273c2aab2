"""Run Python programs that need a process of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def run(program: str, *args: str, **environment: str) -> str:
    """Run a Python program in its own process and return its output. Fails unless it exits with 0."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *args],
        cwd=CHECKOUT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    return done.stdout
