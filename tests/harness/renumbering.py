"""Serve a FUSE source that renumbers its files once the kernel has forgotten them, as sshfs does.

``renumbering(real, path)`` serves the plain directory ``real`` on ``path``. The server works by paths;
each path has a node while the kernel refers to it. It needs root.
"""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness.mounting import LIFETIME, Process, is_mounted, killed_after, start, wait_until


@dataclass
class Source:
    """Holds a served directory."""

    path: Path
    process: Process
    real: Path

    def forget(self) -> None:
        """Make the kernel forget all unused inodes. Later lookups return other numbers."""
        forgotten = self.path.with_name(self.path.name + ".forgotten")
        forgotten.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        wait_until(forgotten.exists)


@contextmanager
def renumbering(
    real: Path, path: Path, numbers: str = "fresh", *options: str, timeout: float = 0.0
) -> Iterator[Source]:
    """Serve ``real`` on ``path`` (both exist) until the block ends.

    ``numbers``: ``fresh`` (never reused), ``again`` (the lowest free one), ``one`` (all files have the
    same inode number). ``--whole-seconds``: stamps are whole seconds, and ctime is mtime.
    """
    log = path.with_name(path.name + ".log")
    with log.open("wb") as output:
        words = [str(real), str(path), "--numbers", numbers, "--timeout", str(timeout), *options]
        process = start("tests.harness.renumbering_server", words, output)
    try:
        with killed_after(LIFETIME, process.pid, path):
            wait_until(lambda: is_mounted(path) or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield Source(path, process, real)
    finally:
        subprocess.run(["umount", "-l", path], check=False, timeout=20)
        process.kill()
        process.wait(20)
    assert "Traceback" not in log.read_text(), log.read_text()
