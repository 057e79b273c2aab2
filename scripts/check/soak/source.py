"""Change the source behind the mount's back.

What it does is not binding for readers at once: contents are when somebody has opened the file
through the mount after the change (``Process.binding``), or with ``watch`` a second later; names
when the mount's attribute timeout is over.
"""

import mmap
import os
import time
from collections.abc import Callable

from . import quiet
from .model import Slot
from .naming import Naming
from .plan import MAPPED, PLAIN, SLACK, WATCH_DELAY
from .process import IllegalError, Process
from .writing import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, must_fallocate

Later = list[tuple[float, Callable[[], None]]]


class Intruder:
    """See the module."""

    def __init__(self, p: Process) -> None:
        """Work as this process."""
        self._p = p
        self._names: Later = []
        self._contents: Later = []
        self._quiet: dict[int, int] = {}
        """Open files of that kind: a close would be an event, too."""

    def step(self) -> None:
        """Make one change."""
        p = self._p
        self._promote()
        kinds = ("cells", "cells", "cells", "append", "cut", "punch", "name")
        what = p.choose.choice(kinds)
        if p.model.quiet and p.choose.random() < 0.5:
            self._change_a_quiet_file()
        elif what == "name":
            if p.choose.random() < 0.2:
                self._change_a_name()
        else:
            self._change_a_file(what)
        time.sleep(p.choose.choice((0, 0, 0.001, 0.01, 0.05)))

    def _promote(self) -> None:
        """Make what is old enough binding."""
        now = time.monotonic()
        for later in (self._names, self._contents):
            while later and later[0][0] <= now:
                later.pop(0)[1]()

    def _change_a_name(self) -> None:
        p = self._p
        naming = Naming(p, str(p.plan.source), self._told)
        p.choose.choice((naming.make, naming.rename, naming.link, naming.unlink))()

    def _told(self, name: int, number: int) -> None:
        when = time.monotonic() + self._p.plan.attr_timeout + SLACK
        series = self._p.model.names[name]
        self._names.append((when, lambda: series.lift(number)))

    def _change_a_file(self, what: str) -> None:
        p = self._p
        name = p.choose.randrange(len(p.model.names))
        with p.locks.names(name, shared=True):
            slot = p.model.find(p.model.names[name].latest)
            if (
                slot is None
                or slot.kind == MAPPED
                or (slot.kind != PLAIN and what in ("append", "cut"))
            ):
                return
            fd = os.open(p.source_path(name), os.O_RDWR)
            p.hold(slot)
        try:
            {
                "cells": self._cells,
                "append": self._append,
                "cut": self._cut,
                "punch": self._punch,
            }[what](slot, fd)
        finally:
            os.close(fd)
            p.release(slot)

    def _change_a_quiet_file(self) -> None:
        p = self._p
        number = quiet.turn(p.model)
        if number not in self._quiet:
            self._quiet[number] = os.open(quiet.path_below(p.plan.source, number), os.O_RDWR)
        self._cells(p.model.quiet[number], self._quiet[number])

    def _cells(self, slot: Slot, fd: int) -> None:
        p = self._p
        at, many = p.choose.random(), p.choose.choice((1, 1, 4, 30))
        set_back = p.choose.random() < 0.3
        mapped = p.plan.coherency == "watch" and p.choose.random() < 0.3
        size = slot.size_in_cells()
        if size == 0:
            return
        first = int(at * size)
        stop = min(first + many, size)
        with p.locks.cells(slot, first, stop):
            if stop > slot.size_in_cells():
                return
            offset = slot.bound(first)

            def call(data: bytes) -> None:
                st = os.fstat(fd)
                if mapped:
                    _store(fd, offset, data)
                elif os.pwrite(fd, data, offset) != len(data):
                    raise IllegalError("short write to the source")
                if set_back:
                    os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))

            self._note(
                f"cells {first}-{stop} at {offset}, set back: {set_back}, mapped: {mapped}", slot
            )
            p.change(slot, first, stop, call, source=self._source(slot, first))
            self._note("done", slot)
        p.counts[f"source: {'store' if mapped else 'write'}"] += 1

    def _append(self, slot: Slot, fd: int) -> None:
        p = self._p
        many = p.choose.choice((1, 2, 10))
        first = slot.size_in_cells()
        stop = min(first + many, slot.cells)
        if stop == first:
            return
        with p.locks.cells(slot, first, None):
            if slot.size_in_cells() != first:
                return
            offset = slot.bound(first)
            self._note(f"append cells {first}-{stop} at {offset}", slot)
            p.change(
                slot, first, stop, lambda data: os.pwrite(fd, data, offset),
                size=slot.bound(stop), source=self._source(slot, first),
            )  # fmt: skip
            self._note("done", slot)
        p.counts["source: append"] += 1

    def _cut(self, slot: Slot, fd: int) -> None:
        p = self._p
        at = p.choose.random()
        old = slot.size_in_cells()
        new = int(at * (min(old * 2, slot.cells) + 1))
        with p.locks.cells(slot, min(new, old), None):
            if slot.size_in_cells() != old:
                return
            size = slot.bound(new) if new else 0
            self._note(f"truncate {old} to {new} cells, {size} bytes", slot)
            p.change(
                slot, new, slot.cells if new < old else new, lambda _: os.ftruncate(fd, size),
                zeros=True, size=size, source=self._source(slot, new),
            )  # fmt: skip
            self._note("done", slot)
        p.counts["source: truncate"] += 1

    def _punch(self, slot: Slot, fd: int) -> None:
        p = self._p
        at, many = p.choose.random(), p.choose.choice((1, 4, 16))
        size = slot.size_in_cells()
        if size == 0:
            return
        first = int(at * size)
        stop = min(first + many, size)
        with p.locks.cells(slot, first, stop):
            if stop > slot.size_in_cells():
                return
            offset, length = slot.bound(first), slot.bound(stop) - slot.bound(first)
            mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
            self._note(f"punch cells {first}-{stop}", slot)
            p.change(
                slot, first, stop, lambda _: must_fallocate(fd, mode, offset, length),
                zeros=True, source=self._source(slot, first),
            )  # fmt: skip
            self._note("done", slot)
        p.counts["source: punch"] += 1

    def _source(self, slot: Slot, first: int) -> Callable[[list[int], int | None], None]:
        """Take what ``Process.change`` tells of a change that is not binding yet."""

        def told(versions: list[int], size: int | None) -> None:
            if self._p.plan.coherency != "watch":
                return
            when = time.monotonic() + WATCH_DELAY + SLACK
            serial = slot.serial

            def lift() -> None:
                with self._p.locks.creation(shared=True), self._p.locks.floor(slot):
                    if slot.serial == serial:
                        slot.lift(first, versions, size)

            self._contents.append((when, lift))

        return told

    def _note(self, text: str, slot: Slot) -> None:
        self._p.journal.note(f"source of file {slot.serial}. {text}")


def _store(fd: int, offset: int, data: bytes) -> None:
    """Store through a mapping by another fd: the change is complete, with an event, at its close."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(again, offset - start + len(data), offset=start) as area:
        area[offset - start :] = data
    os.close(again)
