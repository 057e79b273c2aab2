"""Serve a directory that fails or hangs on command, and mount it."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL_CACHES
from tests.harness.faulty import Faulty
from tests.harness.mounting import (
    MountedFs,
    end_of,
    mounted,
    settle,
)

PAGE = 4096
DATA = bytes(range(256)) * 4096
"""1 MiB. All pages are equal; bytes differ within 256 bytes."""

MANY = 150
"""More requests than the default tasks of pyfuse3 (99) and than the threads of cleanfs."""


@contextmanager
def on(source: Path, base: Path, *options: str) -> Iterator[MountedFs]:
    """Mount a source with small caches, without attribute timeout and read-ahead."""
    mountpoint = base / "mnt"
    mountpoint.mkdir()
    words = (*SMALL_CACHES, "--attr-timeout", "0", "--read-ahead", "0", *options)
    with mounted(source, mountpoint, *words) as fs:
        yield fs


def make_directories(base: Path) -> tuple[Path, Path]:
    """Make a real directory with the files ``f`` and ``other``, and one to serve it on."""
    real, path = base / "real", base / "served"
    real.mkdir()
    path.mkdir()
    fill(real)
    return real, path


def fill(real: Path) -> None:
    for name in os.listdir(real):
        (real / name).rmdir() if (real / name).is_dir() else (real / name).unlink()
    (real / "f").write_bytes(DATA)
    (real / "other").write_bytes(b"other" * 5000)
    settle()


@dataclass(frozen=True)
class Site:
    """Holds a source that fails on command, and its mount."""

    source: Faulty
    fs: MountedFs


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


@contextmanager
def fails(number: int) -> Iterator[None]:
    """Check that the block raises this error."""
    with pytest.raises(OSError) as raised:  # noqa: PT011  # only the errno matters
        yield
    assert raised.value.errno == number


@contextmanager
def hung(source: Faulty, *calls: Callable[[], object]) -> Iterator[None]:
    """Let calls hang in the source, in threads, until the block ends. Then all must return."""
    before = source.hanging()

    def call_it(call: Callable[[], object]) -> None:
        with contextlib.suppress(OSError):
            call()

    threads = [threading.Thread(target=call_it, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    try:
        source.wait_hanging(before + 1)
        yield
        assert all(thread.is_alive() for thread in threads)
    finally:
        source.heal()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def within(seconds: float, call: Callable[[], object]) -> None:
    """Make a call that must not wait for the source."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "the call waits"


def check_alive(fs: MountedFs) -> None:
    """Check that control files and statistics work."""

    def use() -> None:
        assert fs.stats()["pid"] == fs.process.pid
        assert int(fs.control("puts").read_text()) >= 0
        fs.control("drop").write_text("3\n")
        fs.control("page_cache").write_text("2M\n")
        assert os.stat(fs.path / ".cleancache").st_mode

    within(10, use)


@contextmanager
def program(code: str, *args: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python program that prints a line before the calls that may hang."""
    script = f"import os, sys, time\nprint(flush=True)\n{code}"
    words = [sys.executable, "-I", "-S", "-c", script, *map(str, args)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    with process.stdout:
        try:
            process.stdout.readline()
            yield process
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it ends with its mount
                end_of(process, 10)
