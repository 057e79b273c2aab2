"""Fill the caches of a mount, and write to its control files."""

import errno
import os
from typing import Any

from tests.harness.mounting import MountedFs, settle, wait_until

SIZE = 4 << 20


def fill(fs: MountedFs, name: str = "f") -> bytes:
    """Read a compressible file of four times the page cache, so that most pages go to cleancache."""
    data = b"".join(b"%07d\n" % i for i in range(SIZE // 8))
    (fs.source / name).write_bytes(data)
    settle()
    wait_until((fs.path / name).exists, 2)
    assert (fs.path / name).read_bytes() == data
    return data


def settled_stats(fs: MountedFs) -> dict[str, Any]:
    """Return the statistics once the backend's worker is idle."""
    stats: dict[str, Any] = {}

    def is_idle() -> bool:
        nonlocal stats
        before, stats = stats, fs.stats()
        return bool(before.get("backend_counters") == stats["backend_counters"])

    wait_until(is_idle, 5)
    return stats


def refused(fs: MountedFs, name: str, text: str | bytes) -> str:
    """Return the name of the error of a write; empty if there was none."""
    data = text.encode() if isinstance(text, str) else text
    fd = os.open(fs.control(name), os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(fd, data)
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    finally:
        os.close(fd)
    return ""
