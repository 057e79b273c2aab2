"""Decide when a read is legal. Pure functions, no file system: ``tests/check/`` feeds them lies.

A cell has one writer at a time, so its versions are a sequence. Three of them matter:

* ``begun``: the last that somebody began to write. Nothing newer can be read.
* ``latest``: the last that is written, through the mount or in the source.
* ``floor``: the newest that every read must see from now on. A change through the mount lifts it at
once when
  it is done. A change of the source lifts it when the mount has promised to show it: when an open
  that began after it returns, and with ``watch`` when its delay is over.

A read may show any version from the floor before it began to what was begun when it ended. While a
write goes on its bytes may be mixed with the old ones: no file system that we know promises
otherwise (ext4 copies without a lock that readers would take). If only one version is possible
every byte is its.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .content import CELL, bound, cell_at, cell_bytes, cells_bytes, claim, is_zero

MAX_BETWEEN = 6
"""Versions that a cell may have passed through during one read; beyond, what the cell shows is only
asked to be its own."""


@dataclass(frozen=True)
class Violation:
    """Says that a read was illegal."""

    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}"


def check_size(size: int, legal: Sequence[int]) -> Violation | None:
    """Check a size that stat told. ``legal`` are the sizes from the floor to what was begun.

    A change from one to the next may show any size between: large appends grow page by page.
    """
    if min(legal) <= size <= max(legal) and (len(legal) > 1 or size == legal[0]):
        return None
    return Violation("wrong size", f"{size}, legal: {_few(legal)}")


def check_length(offset: int, asked: int, got: int, legal: Sequence[int]) -> Violation | None:
    """Check how much a read gave, by the sizes that the file may have had."""
    lengths = [max(0, min(asked, size - offset)) for size in legal]
    if min(lengths) <= got <= max(lengths):
        return None
    return Violation(
        "wrong length", f"{got} of {asked} bytes at {offset}; legal file sizes: {_few(legal)}"
    )


def ends_at(offset: int, asked: int, got: int, sizes: Sequence[int]) -> bool:
    """Tell whether a read gave less than it asked for because the file had one of these sizes."""
    return got < asked and any(max(0, size - offset) == got for size in sizes)


def check_data(
    serial: int, shift: int, offset: int, data: bytes, floor: Sequence[int], begun: Sequence[int]
) -> Violation | None:
    """Check what a read at ``offset`` gave; ``floor`` and ``begun`` are of the cells it touches."""
    if not data:
        return None
    first = cell_at(offset, shift)
    last = cell_at(offset + len(data) - 1, shift)
    count = last + 1 - first
    if floor[:count] == begun[:count]:
        skip = offset - bound(first, shift)
        expected = cells_bytes(serial, shift, first, list(floor[:count]))
        if expected[skip : skip + len(data)] == data:
            return None
    for cell in range(first, last + 1):
        start = max(bound(cell, shift), offset)
        stop = min(bound(cell + 1, shift), offset + len(data))
        part = data[start - offset : stop - offset]
        at = start - bound(cell, shift)
        low, high = floor[cell - first], begun[cell - first]
        if not _is_legal(serial, cell, at, part, low, high, shift):
            return _explain(serial, cell, start, at, part, low, high, shift)
    return None


def staleness(cells: Sequence[bytes], latest: Sequence[int], since: Sequence[int], began: int) -> int:
    """Return for how many ms a newer version of the stalest cell was complete when its read began.

    ``latest``: the versions that were complete then; ``since``: when they got so. That is a lower bound
    where a cell shows a version older than the last but one.
    """
    worst = 0
    for cell, version, when in zip(cells, latest, since, strict=True):
        said = claim(cell)
        if said is not None and said[2] < version:
            worst = max(worst, (began - when) % (1 << 32))
    return worst


def legal_versions(low: int, high: int) -> list[int]:
    """Return the versions from the floor to what was begun. Of those between, no kind is known."""
    numbers = range((low >> 1) + 1, high >> 1)
    between = [number << 1 | kind for number in numbers for kind in (0, 1)]
    return list(dict.fromkeys([low, *between, high]))


def _is_legal(serial: int, cell: int, at: int, part: bytes, low: int, high: int, shift: int) -> bool:
    length = shift if cell == 0 else CELL
    if (high >> 1) - (low >> 1) > MAX_BETWEEN:
        said = claim(part)
        return said is None or said[:2] == (serial, cell)
    candidates = [
        cell_bytes(serial, cell, version, length)[at : at + len(part)]
        for version in legal_versions(low, high)
    ]
    if part in candidates:
        return True
    if len(candidates) == 1:
        return False
    return all(byte in legal for byte, *legal in zip(part, *candidates, strict=True))


def _explain(
    serial: int, cell: int, start: int, at: int, part: bytes, low: int, high: int, shift: int
) -> Violation:
    legal = _few([_name(version) for version in legal_versions(low, high)])
    where = f"cell {cell} of file {serial}, {len(part)} bytes at {start}"
    length = shift if cell == 0 else CELL
    older = [
        version
        for version in range(max(0, low - 40), low)
        if part == cell_bytes(serial, cell, version, length)[at : at + len(part)]
    ]
    said = claim(part)
    if not any(part):
        what = "zeros where data is due"
    elif older:
        what = f"stale data ({_name(older[-1])})"
    elif said is None:
        what = "bytes that say nothing of themselves"
    elif said[0] != serial:
        what = f"data of another file ({said[0]}, cell {said[1]}, {_name(said[2])})"
    elif said[1] != cell:
        what = f"data of another place (cell {said[1]}, {_name(said[2])})"
    elif said[2] > high:
        what = f"data that nobody has written ({_name(said[2])})"
    elif part != cell_bytes(serial, cell, said[2], length)[at : at + len(part)]:
        what = f"torn data (begins as {_name(said[2])})"
    elif low <= said[2] <= high:
        what = f"data that was cut away ({_name(said[2])})"
    else:
        what = f"stale data ({_name(said[2])})"
    return Violation(what, f"{where}; legal: {legal}; read: {part[:48].hex(' ', 4)}...")


def _name(version: int) -> str:
    return f"v{version >> 1}{' zeros' if is_zero(version) else ''}"


def _few(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) for value in values[:8])
    return shown + (f", ... {len(values)} in all" if len(values) > 8 else "")
