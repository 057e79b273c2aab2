"""Test ``cleanfs stats --watch``."""

import itertools
import json
import mmap
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cleanfs.cli.watch import COLUMNS, HEADER
from tests.e2e.conftest import Mounter
from tests.harness.mounting import (
    end_of,
    settle,
    wait_until,
)

HEADINGS = [heading for heading, _ in COLUMNS]


def watching(mountpoint: Path, *options: str) -> list[str]:
    """Return the command of ``stats --watch`` with the default action for SIGINT.

    A shell without job control starts background processes with SIGINT ignored. Their children, such as
    those of pytest, inherit this.
    """
    python = ["env", "--default-signal=INT", sys.executable]
    return [*python, "-m", "cleanfs", "stats", "--watch", *options, str(mountpoint)]


def test_stats_watch_continues_until_interrupted(background: Path) -> None:
    command = watching(background, "0.05", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            uptimes = [json.loads(process.stdout.readline())["uptime_seconds"] for _ in range(3)]
        finally:
            process.send_signal(signal.SIGINT)
        assert end_of(process, 10) in (0, 130)
        assert b"Traceback" not in process.stderr.read()
    assert uptimes == sorted(set(uptimes))


def test_stats_watch_shows_plain_lines_on_a_terminal(background: Path) -> None:
    master, terminal = pty.openpty()
    with subprocess.Popen(
        watching(background, "0.05"), stdout=terminal, stderr=subprocess.PIPE
    ) as process:
        os.close(terminal)
        text = b""

        def three_lines() -> bool:
            nonlocal text
            text += os.read(master, 65536)
            return text.count(b"\n") > 3

        try:
            wait_until(three_lines, 10)
            process.send_signal(signal.SIGINT)
            assert end_of(process, 10) == 130
        finally:
            process.kill()
            os.close(master)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert text.startswith(HEADER.encode())
    assert b"\x1b" not in text


def cells_of_interval(process: subprocess.Popen[str], reads: bool) -> dict[str, str]:
    """Return the cells of the first line of an interval with reads, or of one without."""
    assert process.stdout is not None
    while True:
        cells = dict(zip(HEADINGS, process.stdout.readline().split(), strict=True))
        if cells["time"] != "time" and (cells["reads/s"] != "0") is reads:
            return cells


def test_the_lines_of_stats_watch_add_up(source: Path, mount: Mounter) -> None:
    size, page = 16 << 20, 4096
    (source / "f").write_bytes(b"".join(b"%07d\n" % i for i in range(size // 8)))
    settle()
    fs = mount()  # the file is 16 times its page cache, so most goes to cleancache
    (fs.path / "f").read_bytes()
    command = watching(fs.path, "0.2")
    fd = os.open(fs.path / "f", os.O_RDONLY | os.O_DIRECT)
    stop = threading.Event()

    def read_pages() -> None:
        buffer = mmap.mmap(-1, page)
        for offset in itertools.cycle(range(0, size, page)):
            if stop.is_set():
                return
            assert os.preadv(fd, [buffer], offset) == page

    reader = threading.Thread(target=read_pages)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            idle = cells_of_interval(process, reads=False)
            reader.start()
            cells_of_interval(process, reads=True)  # the first interval may have been idle for a part
            busy = cells_of_interval(process, reads=True)
        finally:
            stop.set()
            process.send_signal(signal.SIGINT)
    reader.join()
    os.close(fd)
    assert {idle[name] for name in ("pc%", "zc%", "p50", "p99")} == {"-"}
    assert float(busy["MB/s"]) == pytest.approx(int(busy["reads/s"]) * page / 1e6, abs=0.06)
    assert float(busy["pc%"]) + float(busy["zc%"]) == pytest.approx(100, abs=0.11)
    assert float(busy["zc%"]) > 90
    assert busy["srcMB/s"] == "0.0"
    assert busy["pool"].endswith("/64.0M")
    assert float(busy["ratio"]) > 1.5
    assert busy["p50"].endswith("us")
    assert re.fullmatch(r"[0-9.]+(us|ms|s)", busy["p99"])
