"""Run one load to its end, and check what must be in the source then."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.harness import load

from .site import END_TIMEOUT, START_TIMEOUT, Failure, Site, differences, wait


class Round:
    """Is one load and its end."""

    def __init__(self, site: Site, seed: int, kinds: list[str]) -> None:
        """Choose ``kinds`` of clients; all choices follow from ``seed``."""
        self.site, self.seed, self.kinds = site, seed, kinds
        self.random = random.Random(seed)
        self.clients: dict[str, subprocess.Popen[bytes]] = {}

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        """The clients run; they end by themselves when the mount does."""
        for kind in self.kinds:
            command = [
                sys.executable,
                "-I",
                "-S",
                load.__file__,
                kind,
                str(self.site.mountpoint / "load"),
            ]
            command += [str(self.said(kind)), str(self.seed)]
            self.clients[kind] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        try:
            yield
        finally:
            self.kill_clients()

    def kill_clients(self) -> None:
        """End what has not ended yet."""
        for client in self.clients.values():
            client.kill()
        for client in self.clients.values():
            client.wait(END_TIMEOUT)

    def said(self, kind: str) -> Path:
        """Return where a client says what it has done."""
        return self.site.base / "said" / kind

    def until_it_goes(self) -> None:
        """Wait until the load is going, and then some: the random moment."""
        wait("the load", lambda: all(map(self._going, self.kinds)), START_TIMEOUT)
        time.sleep(self.random.random() * 0.5)

    def _going(self, kind: str) -> bool:
        said = load.read_progress(self.said(kind))
        if said.error is not None or self.clients[kind].poll() is not None:
            raise Failure(f"client {kind} failed by itself: {said.error}")
        return said.done > 0

    def until_all_have_noticed(self, accept: set[str]) -> Counter[str]:
        """Wait for the ends of the clients. Returns with which errors."""
        wait(
            "the clients", lambda: all(c.poll() is not None for c in self.clients.values()), END_TIMEOUT
        )
        errors = Counter[str]()
        for kind, client in self.clients.items():
            error = load.read_progress(self.said(kind)).error
            # A page of a mapping that cannot be read is a SIGBUS: the client has said nothing more.
            if client.returncode == -signal.SIGBUS and kind in ("mapped", "wal"):
                error = "SIGBUS"
            # sqlite has its own words, and msync of what cannot be written says EIO.
            elif error is None or not (
                error in accept or error.startswith("sqlite:") or (error == "EIO" and kind == "mapped")
            ):
                raise Failure(f"client {kind} ended with {client.returncode}, {error}")
            errors[error] += 1
        return errors

    def check(self, writeback: bool) -> int:
        """Raise Failure if something that was confirmed is not in the source. Returns how much was."""
        turns = 0
        for kind in self.kinds:
            said = load.read_progress(self.said(kind))
            turns += said.done
            wrong = load.lost(kind, self.site.source / "load", said, self.seed, writeback)
            if wrong is not None:
                raise Failure(wrong)
        return turns

    def change_source(self) -> None:
        """Write, while nothing serves the mount, contents that no cache from before may hold."""
        for number in range(0, load.UNCHANGED, 7):
            path = self.site.source / "load" / "unchanged" / str(number)
            st = path.stat()
            path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
            os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))

    def restore_source(self) -> None:
        """Put back what ``change_source`` found, and nothing of the clients."""
        top = self.site.source / "load"
        for number in range(0, load.UNCHANGED, 7):
            (top / "unchanged" / str(number)).write_bytes(load.unchanged(number))
        for path in top.iterdir():
            if path.name != "unchanged":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for kind in self.kinds:
            self.said(kind).unlink(missing_ok=True)

    def compare(self) -> None:
        """Everything read through the mount is what the source has."""
        different = differences(self.site.source, self.site.mountpoint)
        if different:
            raise Failure(f"through the new mount these are not what the source has: {different[:5]}")
