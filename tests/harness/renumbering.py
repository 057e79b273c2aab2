"""A FUSE source that names its files anew once the kernel has forgotten them, as sshfs does.

``renumbering(real, path)`` serves ``real`` on ``path``: a plain directory, by paths, each of which has
a node for as long as the kernel refers to it. Needs root.
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
    """A served directory."""

    path: Path
    process: Process
    real: Path

    def forget(self) -> None:
        """Have the kernel forget all that nobody holds. What is looked up then has another number."""
        forgotten = self.path.with_name(self.path.name + ".forgotten")
        forgotten.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        wait_until(forgotten.exists)


@contextmanager
def renumbering(
    real: Path, path: Path, numbers: str = "fresh", *options: str, timeout: float = 0.0
) -> Iterator[Source]:
    """Serve ``real`` on ``path`` (both exist) until the block ends.

    ``numbers``: ``fresh`` (never given again), ``again`` (the lowest that is free), ``one`` (all files
    show the same inode number). ``--whole-seconds``: stamps are, and ctime is mtime.
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
