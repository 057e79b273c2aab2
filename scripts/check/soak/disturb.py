"""Make pages go round: by control files, limits, the kernel's pages, memory."""

import contextlib
import errno
import os
import time
from pathlib import Path

from .process import Process


class Disturber:
    """See the module."""

    def __init__(self, p: Process) -> None:
        """Work as this process."""
        self._p = p
        self._control = Path(p.plan.mount) / ".cleancache"
        self._ballast = b""
        self._has_backend = True

    def step(self) -> None:
        """Make one disturbance."""
        p = self._p
        what = p.choose.choice(
            ("advice", "advice", "memory") if p.plan.plain
            else ("drop", "advice", "reclaim", "reclaim", "limit", "backend", "memory", "stats")
            if p.plan.group
            else ("drop", "advice", "advice", "limit", "limit", "page cache", "page cache",
                  "backend", "memory", "stats")
        )  # fmt: skip
        p.journal.note(f"disturb: {what}")
        if what == "drop":
            self._write("drop", p.choose.choice(("1", "1", "2", "3")))
        elif what == "limit":
            least = p.plan.least_pool
            self._write("pool_limit", str(p.choose.choice((least, least, 2 * least, 8 * least))))
        elif what == "page cache":
            self._write("page_cache", str(p.choose.choice(p.plan.page_caches)))
        elif what == "backend":
            # Rarely, and soon back: without one there is nothing to see.
            if self._has_backend and p.choose.random() < 0.3:
                self._write("backend", "none")
                self._has_backend = False
        elif what == "reclaim":
            assert p.plan.group is not None
            (p.plan.group / "memory.force_empty").write_text("0")
        elif what == "memory":
            self._ballast = os.urandom(4096) * p.choose.choice((0, 256, 4096))
        elif what == "stats":
            (self._control / p.choose.choice(("stats", "stats.json", "metrics"))).read_text()
        else:
            self._advise()
        p.counts[f"disturb: {what}"] += 1
        time.sleep(p.choose.choice((0.001, 0.005, 0.02, 0.1)))
        if not self._has_backend:
            self._write("backend", "zcache")
            self._has_backend = True

    def _advise(self) -> None:
        p = self._p
        name = p.choose.randrange(len(p.model.names))
        advice = p.choose.choice(
            (os.POSIX_FADV_DONTNEED, os.POSIX_FADV_DONTNEED, os.POSIX_FADV_WILLNEED)
        )
        where = p.source_path(name) if p.choose.random() < 0.2 else p.path(name)
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(where, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, advice)
            finally:
                os.close(fd)

    def _write(self, name: str, text: str) -> None:
        try:
            (self._control / name).write_text(text + "\n")
        except OSError as exc:
            # The old backend may have gone on its own way; nothing else may be refused.
            if exc.errno != errno.EBUSY:
                raise
