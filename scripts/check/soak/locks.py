"""Lock byte ranges of one file outside of the mount, among the processes.

Open file description locks, so each process opens the file for itself after it is forked, and what
a killed process held is free. Everybody takes them in this order: names, by number; creation; the
cells of one file; that file's floor.
"""

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .model import Shape, Slot

_FLOCK = struct.Struct("hhqqi4x")

_CREATION = 1 << 20
_FLOORS = 1 << 21
_CELLS = 1 << 24


class Locks:
    """Is one process' view."""

    def __init__(self, path: Path, shape: Shape) -> None:
        """Open the file, which is made if need be."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._cells = shape.cells + 1

    @contextmanager
    def names(self, *numbers: int, shared: bool = False) -> Iterator[None]:
        """Lock some names: what they lead to stays, or is the caller's to change."""
        with ExitStack() as stack:
            for number in sorted(set(numbers)):
                stack.enter_context(self._held(number, 1, shared))
            yield

    @contextmanager
    def creation(self, *, shared: bool = False) -> Iterator[None]:
        """Lock, shared, that no slot gets to stand for another file."""
        with self._held(_CREATION, 1, shared):
            yield

    @contextmanager
    def cells(self, slot: Slot, first: int, stop: int | None) -> Iterator[None]:
        """Lock cells of a file; to the end and beyond if ``stop`` is None, for who changes its size."""
        count = self._cells - first if stop is None else stop - first
        with self._held(_CELLS + slot.number * self._cells + first, count, False):
            yield

    def would_wait(self, slot: Slot, first: int, stop: int | None) -> bool:
        """Tell whether somebody else has some of these cells."""
        count = self._cells - first if stop is None else stop - first
        start = _CELLS + slot.number * self._cells + first
        packed = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, count, 0)
        found = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, packed)
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)

    @contextmanager
    def floor(self, slot: Slot) -> Iterator[None]:
        """Lock the floor of a file."""
        with self._held(_FLOORS + slot.number, 1, False):
            yield

    @contextmanager
    def _held(self, start: int, count: int, shared: bool) -> Iterator[None]:
        self._set(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, start, count)
        try:
            yield
        finally:
            self._set(fcntl.F_UNLCK, start, count)

    def _set(self, kind: int, start: int, count: int) -> None:
        packed = _FLOCK.pack(kind, os.SEEK_SET, start, count, 0)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, packed)
