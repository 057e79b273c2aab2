"""Change names: create, replace, rename, exchange, link, unlink.

The same for the mount and, where the source may change by itself, for the source.
"""

import os
from collections.abc import Callable, Sequence

from cleanfs.linux import syscalls

from .content import CELL
from .model import Slot
from .plan import KINDS
from .process import Handle, IllegalError, Process, place

AT_FDCWD = -100
RENAME_EXCHANGE = 2

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

SHIFTS = (CELL, CELL, CELL, 1, 17, 300, 1000)

Told = Callable[[int, int], None]
"""What becomes of names that others change behind the mount: told of a name and the number of its
value."""


class Naming:
    """Changes names below one directory, which is the mount or the source."""

    def __init__(self, p: Process, top: str, told: Told | None = None) -> None:
        """Call ``told`` for each change, which is not binding yet; None if changes are at once."""
        self._p = p
        self._top = top
        self._told = told

    def path(self, name: int) -> str:
        """Return the path of a name."""
        return f"{self._top}/{place(name)}"

    def set(self, values: Sequence[tuple[int, int]], call: Callable[[], None], what: str) -> None:
        """Do what gives these names these values."""
        p = self._p
        p.journal.note(f"{what} {[f'name {n} = file {serial}.' for n, serial in values]}")
        with p.locks.creation(shared=True):  # a serial on its way from name to name is in neither
            for name, serial in values:
                p.model.names[name].begin(serial)
            call()
            for name, _ in values:
                number = p.model.names[name].done()
                if self._told is None:
                    p.model.names[name].lift(number)
                else:
                    self._told(name, number)
        p.journal.note(f"{what} done")
        p.counts[f"{'' if self._told is None else 'source: '}{what}"] += 1

    def _new_slot(self) -> Slot | None:
        """Return a slot for a file that is about to be made; it is held."""
        p = self._p
        with p.locks.creation():
            slot = p.model.free_slot()
            if slot is not None:
                serial = p.model.new_serial()
                slot.reset(serial, p.choose.choice(SHIFTS), KINDS[serial // 3 % len(KINDS)])
                p.hold(slot)
            return slot

    def make(self) -> None:
        """Make a file where there is none, or replace one, as an editor does."""
        p = self._p
        name = p.choose.randrange(len(p.model.names))
        cells = p.choose.choice((1, 2, 10, 50, p.plan.cells // 2, p.plan.cells))
        with p.locks.names(name):
            if not self._is_settled(name):
                return
            path = self.path(name)
            if p.model.names[name].latest == 0 and self._told is None:
                self._create(name, path, cells)
            else:
                self._replace(name, path, cells)

    def _create(self, name: int, path: str, cells: int) -> None:
        p = self._p
        if (slot := self._new_slot()) is None:
            return
        opened: list[int] = []
        self.set([(name, slot.serial)], lambda: opened.append(os.open(path, NEW, 0o644)), "create")
        with p.locks.cells(slot, 0, None):
            if slot.size.latest == 0:  # nobody was faster
                with p.binding(slot):
                    fd = os.open(f"/proc/self/fd/{opened[0]}", os.O_RDWR)
                self._fill(slot, fd, cells)
                os.close(fd)
        self._done_with(slot, opened[0])

    def _replace(self, name: int, path: str, cells: int) -> None:
        p = self._p
        if (slot := self._new_slot()) is None:
            return
        new = f"{self._top}/.new-{p.index}"
        fd = os.open(new, NEW, 0o644)
        with p.locks.cells(slot, 0, None):
            self._fill(slot, fd, cells)
        self.set([(name, slot.serial)], lambda: os.rename(new, path), "replace")
        self._done_with(slot, fd)

    def _fill(self, slot: Slot, fd: int, cells: int) -> None:
        self._p.change(slot, 0, cells, lambda data: _write(fd, data), size=slot.bound(cells))

    def _done_with(self, slot: Slot, fd: int) -> None:
        p = self._p
        if self._told is None and p.choose.random() < 0.5:
            p.keep(Handle(fd, os.O_RDWR, [(slot, slot.serial)]))
        else:
            os.close(fd)
            p.release(slot)

    def rename(self) -> None:
        """Move a name to another, over what is there; or exchange the two."""
        p = self._p
        one, two = p.choose.sample(range(len(p.model.names)), 2)
        exchange = p.choose.random() < 0.4
        with p.locks.names(one, two):
            if not self._is_settled(one) or not self._is_settled(two):
                return
            first, second = p.model.names[one].latest, p.model.names[two].latest
            if first == 0 or first == second or (exchange and second == 0):
                return
            paths = [os.fsencode(self.path(name)) for name in (one, two)]
            flags = RENAME_EXCHANGE if exchange else 0
            self.set(
                [(one, second if exchange else 0), (two, first)],
                lambda: syscalls.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], flags),
                "exchange" if exchange else "rename over" if second else "rename",
            )

    def link(self) -> None:
        """Add one more name for a file."""
        p = self._p
        one, two = p.choose.sample(range(len(p.model.names)), 2)
        with p.locks.names(one, two):
            if not self._is_settled(one) or not self._is_settled(two):
                return
            first = p.model.names[one].latest
            if first == 0 or p.model.names[two].latest != 0:
                return
            # FUSE counts links by itself when it removes a name, and makes none of a file that has none
            # by its count, which may be old: have it asked.
            os.stat(self.path(one))
            self.set([(two, first)], lambda: os.link(self.path(one), self.path(two)), "link")

    def unlink(self) -> None:
        """Remove a name; who has the file open goes on with it."""
        p = self._p
        name = p.choose.randrange(len(p.model.names))
        with p.locks.names(name):
            if self._is_settled(name) and p.model.names[name].latest:
                self.set([(name, 0)], lambda: os.unlink(self.path(name)), "unlink")

    def _is_settled(self, name: int) -> bool:
        series = self._p.model.names[name]
        return series.floor == series.latest_number


def _write(fd: int, data: bytes) -> None:
    if (count := os.pwrite(fd, data, 0)) != len(data):
        raise IllegalError(f"short write: {count} of {len(data)} bytes")


def make(p: Process) -> None:
    """Make a file through the mount."""
    Naming(p, str(p.plan.mount)).make()


def rename(p: Process) -> None:
    """Rename through the mount."""
    Naming(p, str(p.plan.mount)).rename()


def link(p: Process) -> None:
    """Link through the mount."""
    Naming(p, str(p.plan.mount)).link()


def unlink(p: Process) -> None:
    """Unlink through the mount."""
    Naming(p, str(p.plan.mount)).unlink()


OPERATIONS = {make: 3, rename: 2, link: 1, unlink: 1}
"""With how often each is done."""
