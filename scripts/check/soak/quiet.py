"""Keep files that the mount does not open again: only ``--coherency watch`` can tell that they changed.

Each process opens them once, when it begins, and keeps them open. Everything else opens files all the
time, and each open makes the mount look at the file, for the others' benefit, too. The source changes
these files in turn: each rests for longer than a change may take to be seen, so that the next event
does not make good a lost one. They are small, and the first is not read past the kernel's page cache:
a read that gets as far as the source finds the change by itself.

A clock measures how stale their bytes are. A read that finds a version that was not the latest when it
began notes for how long a newer one had been complete.
"""

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

from . import rules
from .content import CELL, cell_at
from .model import Model, Slot, clock
from .plan import SHOWN, Plan
from .process import Handle, Process
from .reading import BLOCK, SIZES, direct_read

TURN = 8.0
"""Seconds that a file is changed before it rests for as long, or longer."""

CELLS = 64
"""In each file."""


def path_below(top: Path, number: int) -> Path:
    """Return where one of these files is."""
    return top / f"quiet{number}"


def make(plan: Plan, model: Model) -> None:
    """Make them, in the source, before any process begins."""
    for number, slot in enumerate(model.quiet):
        slot.reset(model.new_serial(), CELL, SHOWN)
        with path_below(plan.source, number).open("wb") as file:
            file.truncate(CELLS * CELL)
        slot.size.begin(CELLS * CELL)
        slot.size.lift(slot.size.done())


def turn(model: Model) -> int:
    """Return the number of the file that is changed now."""
    return int(time.monotonic() / TURN) % len(model.quiet)


class QuietFiles:
    """Holds one process's open files of that kind."""

    def __init__(self, p: Process) -> None:
        """Open them, by the page cache and past it."""
        self._p = p
        self._handles: list[tuple[Slot, list[Handle]]] = []
        for number, slot in enumerate(p.model.quiet):
            handles = []
            for flags in (os.O_RDWR, os.O_RDWR, os.O_RDONLY | os.O_DIRECT):
                with p.binding(slot):
                    fd = os.open(path_below(p.plan.mount, number), flags)
                handles.append(Handle(fd, flags, [(slot, slot.serial)]))
            fd = handles[0].fd
            handles[0].mapping = mmap.mmap(fd, CELLS * CELL, mmap.MAP_SHARED, mmap.PROT_READ)
            self._handles.append((slot, handles))

    def look(self, p: Process) -> None:
        """Read one of them, or write to the one that the source changes, too."""
        number = p.choose.randrange(len(self._handles))
        slot, (mapped, plain, direct) = self._handles[number]
        offset = p.choose.randrange(CELLS * CELL // BLOCK) * BLOCK
        size = min(p.choose.choice(SIZES), CELLS * CELL - offset)
        how = p.choose.choice(("mapping", "pread", "O_DIRECT" if number else "pread", "write"))
        if how == "mapping":
            mapping = mapped.mapping
            assert mapping is not None
            self._read(mapped, offset, size, how, lambda: mapping[offset : offset + size])
        elif how == "pread":
            self._read(plain, offset, size, how, lambda: os.pread(plain.fd, size, offset))
        elif how == "O_DIRECT":
            blocks = -(-size // BLOCK) * BLOCK
            self._read(direct, offset, blocks, how, lambda: direct_read(direct.fd, offset, blocks))
        elif number == turn(p.model):
            first = cell_at(offset, CELL)
            stop = first + BLOCK // CELL
            with p.locks.cells(slot, first, stop):
                p.change(slot, first, stop, lambda data: os.pwrite(plain.fd, data, slot.bound(first)))
            p.counts["quiet: write"] += 1

    def _read(
        self, handle: Handle, offset: int, size: int, how: str, call: Callable[[], bytes]
    ) -> None:
        p, slot = self._p, handle.slots[0][0]
        first, stop = cell_at(offset, CELL), cell_at(offset + size - 1, CELL) + 1
        latest, since, began = slot.latest.get(first, stop), slot.since.get(first, stop), clock()
        found: list[bytes] = []

        def noted() -> bytes:
            found.append(call())
            return found[0]

        p.read(handle, offset, size, f"quiet, {how}", noted)
        cells = [found[0][at : at + CELL] for at in range(0, size, CELL)]
        p.model.note_staleness(p.index, rules.staleness(cells, latest, since, began))
