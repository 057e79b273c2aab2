"""A source that fails on command: a plain directory, served by a FUSE process of its own.

``faulty(real, path)`` serves ``real`` on ``path``. What goes wrong is said by ``Faulty.fault`` and
taken back by ``Faulty.heal``; everything else passes through. Nothing of a file's data is kept by the
kernel of the served mount (direct I/O), and by default no attribute or name: what a program asks
reaches us.
"""

import json
import os
import signal
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
"""Seconds that a server may live."""


class Faulty:
    """The commander of a server."""

    def __init__(self, path: Path, real: Path, process: Process, address: str) -> None:
        """See ``faulty``."""
        self.path = path
        self.real = real
        self.process = process
        self._address = address

    def fault(self, op: str, error: int = 0, name: str | None = None, **how: Any) -> None:  # noqa: ANN401  # as ``Fault`` says
        """From now on this goes wrong (see ``Fault``)."""
        self._command(do="fault", **asdict(Fault(op, error, name, **how)))

    def heal(self) -> None:
        """Nothing goes wrong any more, and what hung goes on."""
        self._command(do="heal")

    def replace_inodes(self) -> None:
        """What is looked up from now on has another generation: what is held is stale for good."""
        self._command(do="replace")

    def served(self, op: str) -> int:
        """How many requests of a kind have come."""
        return int(self._command(do="served", op=op)["served"])

    def hanging(self) -> int:
        """How many requests hang."""
        return int(self._command(do="served", op="")["hanging"])

    def wait_hanging(self, number: int) -> None:
        """Wait until so many requests hang."""
        wait_until(lambda: self.hanging() >= number)

    def stop(self) -> None:
        """The server no longer gets to run: it reads no request."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """And does again."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """The server is gone: ENOTCONN."""
        self.process.kill()
        end_of(self.process, 20)

    def _command(self, **command: object) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(20)
            sock.connect(self._address)
            sock.send(json.dumps(command).encode())
            answer: dict[str, Any] = json.loads(sock.recv(1 << 16))
        return answer


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
