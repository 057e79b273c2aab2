"""Serve a plain directory by a FUSE process of its own that fails on command.

``faulty(real, path)`` serves ``real`` on ``path``. ``Faulty.fault`` adds a fault, and ``Faulty.heal``
removes all; other requests pass through. The kernel caches no data of the served mount (direct I/O)
and, by default, no attributes or names. So each call of a program reaches the server.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.harness.faulty_server import Fault
from tests.harness.mounting import Process, end_of, is_mounted, killed_after, start, wait_until

LIFETIME = 110.0
"""The longest time that a server runs, in seconds."""


class Faulty:
    """Sends commands to a server."""

    def __init__(self, path: Path, real: Path, process: Process, address: str) -> None:
        """Take the parts that ``faulty`` made."""
        self.path = path
        self.real = real
        self.process = process
        self._address = address

    def fault(self, op: str, error: int = 0, name: str | None = None, **fields: Any) -> None:  # noqa: ANN401  # the fields of ``Fault``
        """Add a fault (see ``Fault``)."""
        self._command(do="fault", **asdict(Fault(op, error, name, **fields)))

    def heal(self) -> None:
        """Remove all faults and let hanging requests continue."""
        self._command(do="heal")

    def replace_inodes(self) -> None:
        """Give all later lookups another generation: inodes held now stay stale."""
        self._command(do="replace")

    def served(self, op: str) -> int:
        """Return how many requests of a kind have come."""
        return int(self._command(do="served", op=op)["served"])

    def hanging(self) -> int:
        """Return how many requests hang."""
        return int(self._command(do="served", op="")["hanging"])

    def wait_hanging(self, number: int) -> None:
        """Wait until at least ``number`` requests hang."""
        wait_until(lambda: self.hanging() >= number)

    def kill(self) -> None:
        """Kill the server: calls then fail with ENOTCONN."""
        self.process.kill()
        end_of(self.process, 20)

    def _command(self, **command: object) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(20)
            sock.connect(self._address)
            sock.send(json.dumps(command).encode())
            reply: dict[str, Any] = json.loads(sock.recv(1 << 16))
        return reply


@contextmanager
def faulty(
    real: Path,
    path: Path,
    *,
    attr_timeout: float = 0.0,
    entry_timeout: float = 0.0,
    lifetime: float = LIFETIME,
) -> Iterator[Faulty]:
    """Serve ``real`` on ``path`` (both exist) until the block ends."""
    address = f"\0faulty-{os.getpid()}-{time.monotonic_ns()}"
    log = path.with_name(path.name + ".log")
    with log.open("wb") as output:
        words = [str(real), str(path), "@" + address[1:]]
        timeouts = ["--attr-timeout", str(attr_timeout), "--entry-timeout", str(entry_timeout)]
        process = start("tests.harness.faulty_server", [*words, *timeouts], output)
    try:
        with killed_after(lifetime, process.pid, path):
            wait_until(lambda: is_mounted(path) or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield Faulty(path, real, process, address)
    finally:
        process.kill()
        end_of(process, 20)
        if is_mounted(path):
            subprocess.run(["umount", "-l", path], check=False, timeout=20)
    assert "Traceback" not in log.read_text(), log.read_text()
