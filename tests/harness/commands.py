"""Check the output of a command, and clean up after one that mounts in the background."""

import json
import subprocess
from pathlib import Path

from tests.harness.mounting import (
    mount_line,
    wait_until,
)


def complains(done: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    """Check for exactly one line on stderr with these parts, and for the status."""
    assert done.returncode == status, done
    assert done.stdout == ""
    assert done.stderr.startswith("cleanfs: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 300
    for part in parts:
        assert part in done.stderr


def clean_up(mountpoint: Path) -> None:
    """Unmount everything on the mount point, and wait for the daemon if it still reports its pid."""
    while mount_line(mountpoint):
        try:
            pid = json.loads((mountpoint / ".cleancache" / "stats.json").read_text())["pid"]
        except OSError:
            pid = 0
        subprocess.run(["umount", "-l", mountpoint], check=True, timeout=10)
        wait_until(lambda: not is_alive(pid), 10)  # noqa: B023  # called before pid changes


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
