"""Hold what the processes tell each other: shared memory, mapped before they are forked.

A *slot* stands for one file from its creation until nobody has it open and no name leads to it;
then it serves for another, with a new serial number. Its cells' versions and the series of its
sizes are published before the call that changes them (``begin``) and after (``done``). Names are
series, too, of serial numbers.

Each word has one writer at a time: the process that holds the lock of that cell, name or slot
(``locks``). Readers take none. They look at the floor before their call and at what was begun after
it.
"""

import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .content import CELL, bound

RING = 64
"""Values of a series that are remembered."""

SERIES_WORDS = 3 + RING

OLD_VALUES = 8
"""How many sizes from before a change of the source a kernel may use that has missed the change."""


class Words:
    """Is a run of 32-bit words in the shared memory."""

    def __init__(self, view: memoryview) -> None:
        """Take the words themselves."""
        self.view = view

    def get(self, first: int, stop: int) -> list[int]:
        """Return a copy."""
        return self.view[first:stop].tolist()

    def put(self, first: int, stop: int, value: int) -> None:
        """Set all to one value."""
        packed = value.to_bytes(4, "little") * (stop - first)
        self.view[first:stop] = memoryview(packed).cast("I")


class Series:
    """Holds a value that changes, one writer at a time: its last values, by number."""

    def __init__(self, view: memoryview) -> None:
        """Take ``view``: the numbers of floor, latest and begun, then the ring."""
        self._view = view

    @property
    def floor(self) -> int:
        """Return the number of the oldest value that may still be seen."""
        return self._view[0]

    @property
    def floor_value(self) -> int:
        """Return that value."""
        return self._view[3 + self._view[0] % RING]

    @property
    def latest(self) -> int:
        """Return the value that is set."""
        return self._view[3 + self._view[1] % RING]

    @property
    def latest_number(self) -> int:
        """Return its number."""
        return self._view[1]

    @property
    def begun(self) -> int:
        """Return the number of the last value that somebody began to set."""
        return self._view[2]

    def reset(self, value: int) -> None:
        """Begin anew."""
        self._view[3 + self._view[2] % RING] = value
        self._view[0] = self._view[1] = self._view[2]

    def begin(self, value: int) -> None:
        """Note that a value is about to be set."""
        number = self._view[2] + 1
        self._view[3 + number % RING] = value
        self._view[2] = number

    def done(self) -> int:
        """Note that it is set. Returns its number; ``lift`` makes it binding."""
        self._view[1] = self._view[2]
        return self._view[2]

    def lift(self, number: int) -> None:
        """Nothing older may be seen from now on."""
        if number > self._view[0]:
            self._view[0] = number

    def before(self, stop: int) -> list[int]:
        """Return the last values before number ``stop``, as far as they are remembered."""
        oldest = max(0, stop - OLD_VALUES, self._view[2] - RING + 3)
        return [self._view[3 + number % RING] for number in range(oldest, stop)]

    def legal(self, floor: int) -> list[int]:
        """Return the values from number ``floor`` to what is begun; empty if that is too long ago."""
        begun = self._view[2]
        if begun - floor >= RING - 2:
            return []
        values = [self._view[3 + number % RING] for number in range(floor, begun + 1)]
        return values if self._view[2] - floor < RING - 2 else []


def clock() -> int:
    """Return milliseconds, modulo 2**32."""
    return time.monotonic_ns() // 1_000_000 % (1 << 32)


@dataclass(frozen=True)
class Seen:
    """Holds what was binding before a read began."""

    first: int
    versions: list[int]
    size: int


@dataclass(frozen=True)
class Shape:
    """Says how much there is of everything."""

    slots: int
    names: int
    processes: int
    cells: int
    quiet: int = 0
    """Slots of files that have no name in the model (``quiet``)."""


class Slot:
    """Describes one file. See the module and ``rules``."""

    def __init__(self, number: int, view: memoryview, shape: Shape) -> None:
        """``view`` is its part of the memory."""
        self.number = number
        self._head = view[:4]
        cells = shape.cells
        at = 4
        self.size = Series(view[at : at + SERIES_WORDS])
        at += SERIES_WORDS
        self.opens = view[at : at + shape.processes]
        at += shape.processes
        self.floor = Words(view[at : at + cells])
        self.latest = Words(view[at + cells : at + 2 * cells])
        self.begun = Words(view[at + 2 * cells : at + 3 * cells])
        self.since = Words(view[at + 3 * cells : at + 4 * cells])
        """When (``clock``) the latest version was complete."""
        self.cells = cells

    @staticmethod
    def words(shape: Shape) -> int:
        """Return the memory that one takes."""
        return 4 + SERIES_WORDS + shape.processes + 4 * shape.cells

    @property
    def serial(self) -> int:
        """Return which file it stands for; 0 for none."""
        return self._head[0]

    @property
    def shift(self) -> int:
        """Return the length of the first cell."""
        return self._head[1]

    @property
    def kind(self) -> int:
        """Return what is done to the file (``kinds``)."""
        return self._head[2]

    def reset(self, serial: int, shift: int, kind: int) -> None:
        """Stand for a new, empty file."""
        self._head[0], self._head[1], self._head[2], self._head[3] = serial, shift, kind, 0
        for words in (self.floor, self.latest, self.begun):
            words.put(0, self.cells, 0)
        self.size.reset(0)

    def size_set_in_source(self, number: int) -> None:
        """The size with this number was set in the source."""
        self._head[3] = number

    def missed_sizes(self, floor: int) -> list[int]:
        """Return sizes that the kernel may have kept, none of which is legal.

        They are those from before the source's last change of size. What programs have appended since
        then, the kernel counts from there.
        """
        number = self._head[3]
        missed = self.size.before(min(floor, number))
        set_in_source, *since = self.size.legal(number) or [0]
        appended = [size - set_in_source for size in since if size > set_in_source]
        return missed + [old + count for count in appended for old in missed]

    @property
    def in_use(self) -> bool:
        """Tell whether any process has it open."""
        return any(self.opens)

    def seen(self, first: int, stop: int) -> Seen:
        """Return what is binding now."""
        return Seen(first, self.floor.get(first, stop), self.size.floor)

    def next_version(self, first: int, stop: int, zeros: bool) -> int:
        """Return the version that comes next for all of these cells."""
        return ((max(self.begun.get(first, stop)) >> 1) + 1) << 1 | zeros

    def begin(self, first: int, stop: int, version: int) -> None:
        """Note that cells are about to be written."""
        self.begun.put(first, stop, version)

    def done(self, first: int, stop: int, version: int) -> None:
        """Note that they are written, somewhere; ``lift`` makes it binding."""
        self.since.put(first, stop, clock())  # first: readers take the latest version, then the time
        self.latest.put(first, stop, version)

    def lift(self, first: int, versions: Sequence[int], size: int | None) -> None:
        """Nothing older may be read from now on. Under the slot's lock."""
        for cell, (old, new) in enumerate(
            zip(self.floor.get(first, first + len(versions)), versions, strict=True), first
        ):
            if old < new:
                self.floor.view[cell] = new
        if size is not None:
            self.size.lift(size)

    def bound(self, cell: int) -> int:
        """Return where a cell begins."""
        return bound(cell, self._head[1])

    def size_in_cells(self) -> int:
        """Return the cells that the file has; its size is where a cell begins, or would."""
        size = self.size.latest
        return 0 if size == 0 else (size - self._head[1]) // CELL + 1


class Model:
    """Holds all of the shared memory."""

    def __init__(self, shape: Shape) -> None:
        """Map it, empty."""
        self.shape = shape
        words = Slot.words(shape)
        total = 10 + shape.names * SERIES_WORDS + shape.processes * 4
        total += (shape.slots + shape.quiet) * words
        self._map = mmap.mmap(-1, (total * 4 + 4095) // 4096 * 4096)
        view = memoryview(self._map)
        words32 = view[: total * 4].cast("I")
        self._head = words32[:8]
        at = 8
        self.names = []
        for _ in range(shape.names):
            self.names.append(Series(words32[at : at + SERIES_WORDS]))
            at += SERIES_WORDS
        self._steps = words32[at : at + shape.processes]
        at += shape.processes + (at + shape.processes) % 2
        self._beats = words32[at : at + 2 * shape.processes].cast("B").cast("Q")
        at += 2 * shape.processes
        self._staleness = words32[at : at + shape.processes]
        at += shape.processes
        slots = []
        for number in range(shape.slots + shape.quiet):
            slots.append(Slot(number, words32[at : at + words], shape))
            at += words
        self.slots, self.quiet = slots[: shape.slots], slots[shape.slots :]

    # -- one word each ------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Tell whether everybody should end."""
        return bool(self._head[0])

    def stop(self) -> None:
        """Tell everybody to end."""
        self._head[0] = 1

    def new_serial(self) -> int:
        """Return a serial number that no other file has or had. Under the lock of creation."""
        self._head[1] += 1
        return self._head[1]

    def beat(self, process: int, step: int) -> None:
        """Note that a process lives, and begins a step."""
        self._steps[process] = step
        self._beats[process] = time.monotonic_ns()

    def last_beat(self, process: int) -> tuple[int, int]:
        """Return when (monotonic ns) a process began its present step, and the step's number."""
        return self._beats[process], self._steps[process]

    def note_staleness(self, process: int, milliseconds: int) -> None:
        """A process has read bytes that were stale for so long."""
        self._staleness[process] = max(self._staleness[process], milliseconds)

    @property
    def staleness(self) -> int:
        """Return the most of all processes, in milliseconds."""
        return max(self._staleness)

    # -- files --------------------------------------------------------------------------------

    def find(self, serial: int) -> Slot | None:
        """Return the slot of a file, unless it serves for another by now."""
        for slot in (*self.slots, *self.quiet):
            if serial and slot.serial == serial:
                return slot
        return None

    def free_slot(self) -> Slot | None:
        """Return one that nobody uses and no name leads to. Under the lock of creation."""
        named = {name for series in self.names for name in series.legal(series.floor)}
        named |= {series.latest for series in self.names}
        for slot in self.slots:
            if (slot.serial == 0 or slot.serial not in named) and not slot.in_use:
                return slot
        return None
