"""Real mounts for tests: started as a user would, always cleaned up, never waited for without end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_TIMEOUT = 20.0
STOP_TIMEOUT = 20.0


def cleanfs(*args: str | Path, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return subprocess.run(
        [sys.executable, "-m", "cleanfs", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def is_mounted(path: Path) -> bool:
    """Whether something is mounted on ``path``; works on a dead mount, too."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in lines)


def wait_until(condition: Callable[[], bool], timeout: float = STOP_TIMEOUT) -> None:
    """Poll; fails after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@dataclass
class MountedFs:
    """A source directory and its mount."""

    source: Path
    path: Path
    process: subprocess.Popen[bytes]
    log: Path
    options: tuple[str, ...] = field(default=())

    def control(self, name: str) -> Path:
        """A control file."""
        return self.path / ".cleancache" / name

    def stats(self) -> dict[str, Any]:
        """``stats.json``; the backend's counters are under ``backend_counters``."""
        parsed: dict[str, Any] = json.loads(self.control("stats.json").read_text())
        return parsed

    def drop(self, what: int = 3) -> None:
        """Drop our caches, and the kernel's of this machine, so that reads reach the daemon."""
        self.control("drop").write_text(f"{what}\n")
        self.drop_kernel()

    def drop_kernel(self, path: Path | None = None) -> None:
        """Make the kernel drop its clean pages of a file, or of all files below the mount."""
        for file in [path] if path else [p for p in self.path.rglob("*") if p.is_file()]:
            fd = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def kill(self) -> None:
        """SIGKILL the daemon: the mount point is dead afterwards."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT)


@contextmanager
def mounted(source: Path, mountpoint: Path, *options: str) -> Iterator[MountedFs]:
    """Mount in a foreground process and clean up whatever happens."""
    log = mountpoint.with_name(mountpoint.name + ".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cleanfs", "mount", "-f", *options, str(source), str(mountpoint)],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
    try:
        wait_until(lambda: is_mounted(mountpoint) or process.poll() is not None, START_TIMEOUT)
        assert process.poll() is None, log.read_text()
        yield MountedFs(source, mountpoint, process, log, options)
    finally:
        _clean_up(process, mountpoint)
    unexpected = [
        line for line in log.read_text().splitlines() if "Traceback" in line or " ERROR " in line
    ]
    assert not unexpected, log.read_text()


def _clean_up(process: subprocess.Popen[bytes], mountpoint: Path) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT)
    if is_mounted(mountpoint):
        subprocess.run(["umount", "-l", str(mountpoint)], check=False, timeout=STOP_TIMEOUT)
