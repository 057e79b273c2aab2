"""Run one process of a soak: its open files, and the two things that all it does is made of.

``read`` holds what a call gave against the rules. ``change`` publishes what a call is about to write.
"""

import errno
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from mmap import mmap

from . import rules
from .content import cell_at, cells_bytes
from .journal import Journal
from .locks import Locks
from .model import Model, Seen, Slot
from .plan import SLACK, Plan

MAX_HANDLES = 6


class IllegalError(Exception):
    """Says that something happened that must not."""


@dataclass
class Handle:
    """Is an open file."""

    fd: int
    flags: int
    slots: list[tuple[Slot, int]]
    """Which files it may be, with their serials: more than one if names changed while it was opened."""
    mapping: mmap | None = None
    position: int = 0
    """Of a sequential reader."""
    closed: bool = field(default=False)

    @property
    def known(self) -> Slot | None:
        """Return the file, if that is certain."""
        return self.slots[0][0] if len(self.slots) == 1 else None

    @property
    def label(self) -> str:
        """Name it for the journal."""
        serials = "|".join(f"file {serial}." for _, serial in self.slots)
        return f"fd {self.fd} {serials}"


class Process:
    """See the module."""

    def __init__(self, plan: Plan, model: Model, index: int) -> None:
        """Begin after the fork."""
        self.plan = plan
        self.model = model
        self.index = index
        self.locks = Locks(plan.evidence / "locks", model.shape)
        self.journal = Journal(plan.evidence / f"process-{index}.log")
        self.counts: Counter[str] = Counter()
        self.handles: list[Handle] = []
        self.choose = random.Random(0)
        self.step = 0

    # -- names and files ----------------------------------------------------------------------

    def path(self, name: int) -> str:
        """Return the path of a name, through the mount."""
        return f"{self.plan.mount}/{place(name)}"

    def source_path(self, name: int) -> str:
        """Return the path of a name, in the source."""
        return f"{self.plan.source}/{place(name)}"

    def open_settled(self, name: int, flags: int) -> Handle | None:
        """Open a name while nobody changes it, so that it is certain which file that is."""
        with self.locks.names(name, shared=True):
            slot = self.settled(name)
            if slot is None:
                return None
            self.hold(slot)
            try:
                with self.binding(slot):
                    fd = os.open(self.path(name), flags)
            except BaseException:
                self.release(slot)
                raise
        self.journal.note(f"opened {name} {flags:o}: fd {fd} file {slot.serial}.")
        return self.keep(Handle(fd, flags, [(slot, slot.serial)]))

    def open_anytime(self, name: int, flags: int) -> Handle | None:
        """Open a name while others may change it."""
        series = self.model.names[name]
        with self.locks.creation(shared=True):
            floor = series.floor
            before = {}
            for serial in series.legal(floor):
                if (slot := self.model.find(serial)) is not None:
                    before[serial] = self._latest(slot)
            try:
                fd = os.open(self.path(name), flags)
            except OSError as exc:
                legal = series.legal(floor)
                if exc.errno != errno.ENOENT or (legal and 0 not in legal):
                    raise IllegalError(
                        f"open of name {name} {flags:o}: {errno.errorcode[exc.errno or 0]}; "
                        f"it may lead to: {legal} (0: nothing)"
                    ) from exc
                return None
            legal = series.legal(floor)
            found = [(slot, s) for s in dict.fromkeys(legal) if s and (slot := self.model.find(s))]
            for slot, _ in found:
                self.hold(slot)
        self.journal.note(f"opened {name} {flags:o}: fd {fd} may be {legal}")
        handle = Handle(fd, flags, found)
        if not found:
            if legal:
                raise IllegalError(
                    f"open of name {name} {flags:o} found a file; it may lead to {legal}"
                )
            os.close(fd)
            return None
        if len(found) == 1 and found[0][1] in before:
            slot, serial = found[0]
            self._lift(slot, *before[serial])
        return self.keep(handle)

    def reopened(self, handle: Handle, slot: Slot, flags: int) -> int:
        """Open the same file anew: it must show all that was changed before."""
        with self.binding(slot):
            return os.open(f"/proc/self/fd/{handle.fd}", flags)

    @contextmanager
    def binding(self, slot: Slot) -> Iterator[None]:
        """Run an open: what the source had before it must be seen after it, by everybody."""
        latest = self._latest(slot)
        yield
        self._lift(slot, *latest)

    def _latest(self, slot: Slot) -> tuple[list[int], int]:
        return slot.latest.get(0, slot.cells), slot.size.latest_number

    def _lift(self, slot: Slot, versions: list[int], size: int) -> None:
        if self.plan.source_changes:
            with self.locks.floor(slot):
                slot.lift(0, versions, size)

    def settled(self, name: int) -> Slot | None:
        """Return the file of a name, if there is one and everybody must know. Under the name's lock."""
        series = self.model.names[name]
        if series.floor != series.latest_number:
            return None
        return self.model.find(series.latest)

    def hold(self, slot: Slot) -> None:
        """The slot stands for what it stands for while this process has the file open."""
        slot.opens[self.index] += 1

    def release(self, slot: Slot) -> None:
        """Release it."""
        slot.opens[self.index] -= 1

    def keep(self, handle: Handle) -> Handle:
        """Remember an open file for later steps; the oldest is closed if there are too many."""
        self.handles.append(handle)
        while len(self.handles) > MAX_HANDLES:
            self.close(self.handles[0])
        return handle

    def close(self, handle: Handle) -> None:
        """Close it."""
        if handle.closed:
            return
        handle.closed = True
        if handle in self.handles:
            self.handles.remove(handle)
        if handle.mapping is not None:
            handle.mapping.close()
        self.journal.note(f"close {handle.label}")
        os.close(handle.fd)
        for slot, _ in handle.slots:
            self.release(slot)

    # -- reading --------------------------------------------------------------------------------

    def read(
        self,
        handle: Handle,
        offset: int,
        size: int,
        how: str,
        call: Callable[[], bytes],
        *,
        may_be_short: bool = False,
    ) -> int:
        """Make a call that reads, and check what it gives. Returns how many bytes that is."""
        before: list[tuple[Slot, int, Seen]] = []
        for slot, serial in handle.slots:
            first = min(cell_at(offset, slot.shift), slot.cells)
            stop = min(cell_at(offset + size - 1, slot.shift) + 1, slot.cells)
            before.append((slot, serial, slot.seen(first, stop)))
        began = time.monotonic()
        data = call()
        if self.may_have_missed_a_size(before, offset, size, data):
            self.counts["reads of an old size made again"] += 1
            data = self._later(before, offset, size, call)
        found: list[str] = []
        for slot, serial, seen in before:
            begun = slot.begun.get(seen.first, seen.first + len(seen.versions))
            sizes = slot.size.legal(seen.size)
            asked = len(data) if may_be_short else size
            wrong = rules.check_length(offset, asked, len(data), sizes) if sizes else None
            wrong = wrong or rules.check_data(serial, slot.shift, offset, data, seen.versions, begun)
            if wrong is None:
                if len(handle.slots) > 1:
                    self._narrow(handle, [slot.number for slot, _, _ in before[: len(found)]])
                self.counts[f"read: {how}"] += 1
                self.counts["reads checked"] += 1
                self.counts["bytes checked"] += len(data)
                self.journal.note(f"read {how} {handle.label} {size} at {offset}: {len(data)}")
                return len(data)
            found.append(f"as file {serial}: {wrong}")
        again = self._again(before, offset, size, call)
        text = "\n".join([*found, again])
        self.journal.note(f"read {how} {handle.label} {size} at {offset}: ILLEGAL")
        raise IllegalError(
            f"{how} of {size} bytes at {offset}, {handle.label}flags {handle.flags:o}, begun at "
            f"{began:.6f}, done at {time.monotonic():.6f}\n{text}"
        )

    def may_have_missed_a_size(
        self, before: list[tuple[Slot, int, Seen]], offset: int, size: int, data: bytes
    ) -> bool:
        """Tell whether a read is short as the kernel took no other size (docs/coherency.md).

        That takes a daemon that may not open files by handle. All bytes must be legal, and the file
        must have ended there before its source changed.
        """
        if self.plan.opens_handles or not self.plan.source_changes or len(data) == size:
            return False
        missed = False
        for slot, serial, seen in before:
            begun = slot.begun.get(seen.first, seen.first + len(seen.versions))
            if rules.check_data(serial, slot.shift, offset, data, seen.versions, begun):
                continue
            sizes = slot.size.legal(seen.size)
            if not sizes or not rules.check_length(offset, size, len(data), sizes):
                return False
            missed |= rules.ends_at(offset, size, len(data), slot.missed_sizes(seen.size))
        return missed

    def _later(
        self,
        before: list[tuple[Slot, int, Seen]],
        offset: int,
        size: int,
        call: Callable[[], bytes],
    ) -> bytes:
        """Return what a read gives when the kernel has had the time to take the size."""
        deadline = time.monotonic() + SLACK
        while True:
            data = call()
            missed = self.may_have_missed_a_size(before, offset, size, data)
            if not missed or time.monotonic() > deadline:
                return data
            time.sleep(0.01)

    def _again(
        self, before: list[tuple[Slot, int, Seen]], offset: int, size: int, call: Callable[[], bytes]
    ) -> str:
        """Tell whether what was illegal goes away by itself."""
        for delay in (0.0, 0.01, 0.1, 1.0):
            time.sleep(delay)
            data = call()
            for slot, serial, seen in before:
                stop = seen.first + len(seen.versions)
                floor, begun = seen.versions, slot.begun.get(seen.first, stop)
                sizes = slot.size.legal(seen.size)
                wrong = rules.check_length(offset, size, len(data), sizes) if sizes else None
                if not (wrong or rules.check_data(serial, slot.shift, offset, data, floor, begun)):
                    return f"the same read is legal {delay} s later"
        return "the same read stays illegal for more than a second"

    def _narrow(self, handle: Handle, wrong: list[int]) -> None:
        """Exclude files that a handle turned out not to be."""
        for slot, serial in list(handle.slots):
            if slot.number in wrong:
                handle.slots.remove((slot, serial))
                self.release(slot)

    # -- changing -------------------------------------------------------------------------------

    def change(
        self,
        slot: Slot,
        first: int,
        stop: int,
        call: Callable[[bytes], object],
        *,
        zeros: bool = False,
        size: int | None = None,
        source: "Callable[[list[int], int | None], None] | None" = None,
    ) -> None:
        """Write cells ``first <= cell < stop``, whose locks are held, and set the size if given.

        ``call`` gets the bytes. ``source`` is told of what is not binding yet.
        """
        version = slot.next_version(first, stop, zeros) if stop > first else 0
        data = b"" if zeros else cells_bytes(slot.serial, slot.shift, first, [version] * (stop - first))
        slot.begin(first, stop, version)
        if size is not None:
            slot.size.begin(size)
        call(data)
        slot.done(first, stop, version)
        number = None if size is None else slot.size.done()
        versions = [version] * (stop - first)
        if source is not None:
            if number is not None:
                slot.size_set_in_source(number)
            source(versions, number)
        else:
            with self.locks.floor(slot):
                slot.lift(first, versions, number)
        self.counts["bytes written"] += len(data)


def place(name: int) -> str:
    """Names are in two directories."""
    return f"{'ab'[name % 2]}/name{name}"
