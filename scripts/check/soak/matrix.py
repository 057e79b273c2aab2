"""Run every engine, allocator and coherency, some at a time."""

import json
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COMBINATIONS: list[list[str]] = [
    [*engine, "--coherency", *coherency]
    for engine in (
        ["--engine", "native", "--allocator", "log"],
        ["--engine", "native", "--allocator", "zbud"],
        ["--engine", "python"],
    )
    for coherency in (["open"], ["watch"], ["none"], ["none", "--writeback"])
] + [
    ["--evictions", "kernel", "--coherency", *coherency]
    for coherency in (["open"], ["watch"], ["none"], ["none", "--writeback"])
]

COLUMNS = (
    ("reads checked", "counts"), ("bytes checked", "counts"), ("bytes written", "counts"),
    ("pagecache_hits", "stats"), ("succ_gets", "stats"), ("pagecache_evictions", "stats"),
    ("flushes", "stats"), ("changes_found", "stats"), ("doubtful_flushes", "stats"),
)  # fmt: skip


def run(seconds: float, jobs: int, base: Path | None, json_file: Path | None, console: Console) -> int:
    """Run all. Returns the exit status."""
    seeds = random.SystemRandom()
    arguments = [
        [*words, "--page-size", str(_page_size(words, number)), "--seed", str(seeds.getrandbits(32))]
        for number, words in enumerate(COMBINATIONS)
    ]
    with tempfile.TemporaryDirectory(prefix="soak-matrix-", dir=base) as scratch:

        def one(number: int) -> tuple[int, str, dict[str, Any]]:
            result = Path(scratch) / f"{number}.json"
            words = [*arguments[number], "--seconds", str(seconds), "--json", str(result)]
            words += ["--base", str(base)] if base else []
            done = subprocess.run(
                [sys.executable, "-m", __package__, *words],
                capture_output=True,
                text=True,
                timeout=seconds + 400,
                check=False,
            )
            read = json.loads(result.read_text()) if result.exists() else {}
            return done.returncode, done.stdout + done.stderr, read

        with ThreadPoolExecutor(jobs) as pool:
            results = list(pool.map(one, range(len(arguments))))
    table = Table("", *(name for name, _ in COLUMNS), "")
    for words, (status, output, read) in zip(arguments, results, strict=True):
        cells = [f"{read[where].get(name, 0):,}" if read else "-" for name, where in COLUMNS]
        title = " ".join(word.removeprefix("--") for word in words)
        table.add_row(title, *cells, "ok" if status == 0 else "ILLEGAL")
        if status:
            print(output)
    console.print(table)
    if json_file:
        json_file.write_text(json.dumps([read for _, _, read in results], indent=2) + "\n")
    return int(any(status for status, _, _ in results))


def _page_size(words: list[str], number: int) -> int:
    """Return the page size of the nth combination. The kernel's evictions take its own."""
    return 4096 if "kernel" in words else (4096, 16384, 65536)[number % 3]
