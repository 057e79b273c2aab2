"""Directory listings of the source: names, and the attributes of some of them.

Plain functions over descriptors, run in worker threads. They touch no state of ours. All raise OSError.
"""

import os
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from cleanfs.cache.state import native
from cleanfs.linux import syscalls


def _handle_of_name(dir_fd: int, name: bytes) -> bytes | None:
    try:
        return syscalls.name_to_handle(dir_fd, 0, name)
    except OSError:  # the attributes matter more
        return None


class ListedEntry(NamedTuple):
    """Describes a directory entry."""

    stat: os.stat_result
    handle: bytes | None
    """Its file handle; None if not requested or not available, empty if the file system has none."""


EntryStat = ListedEntry | OSError | None
"""The outcome of the stat of a directory entry: attributes, an error, or None if it is gone."""


def stat_names(dir_fd: int, names: list[bytes], handles: bool = False) -> list[EntryStat]:
    """Stat directory entries. An entry whose stat fails does not fail the others."""
    stats: list[EntryStat] = []
    for name in names:
        try:
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            stats.append(ListedEntry(st, _handle_of_name(dir_fd, name) if handles else None))
        except FileNotFoundError:
            stats.append(None)
        except OSError as exc:
            stats.append(exc)
    return stats


class PythonNames:
    """The names in a directory, in order, packed.

    Each open directory keeps its names. A list of 20,000 took 82 bytes a name, a fifth of which
    stayed when it was gone; packed, a name takes its own length and 9 bytes.
    """

    __slots__ = ("_packed", "_starts")

    def __init__(self, names: Sequence[bytes] = ()) -> None:
        """Pack the names."""
        self._packed = b"/".join(names)
        self._starts = array("Q", accumulate((len(name) + 1 for name in names), initial=0))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._starts) - 1

    def __getitem__(self, position: int) -> bytes:
        """Return the name at a position >= 0. Raises IndexError."""
        stop = self._starts[position + 1] - 1
        return self._packed[self._starts[position] : stop]

    def some(self, position: int, count: int) -> list[bytes]:
        """Return up to ``count`` names from a position on."""
        return [self[i] for i in range(position, min(position + count, len(self)))]

    @property
    def memory(self) -> int:
        """Return how many bytes the names take."""
        return sys.getsizeof(self._packed) + sys.getsizeof(self._starts)


Names = PythonNames
if native is not None and not TYPE_CHECKING:
    Names = native.Names


@dataclass(frozen=True, slots=True)
class Listing:
    """A directory at one moment: names without the dots, and the attributes of the first ones."""

    names: Names
    stats: list[EntryStat]
    dot: os.stat_result
    dot_dot: os.stat_result
    seconds: float
    """How long it took to read the names."""


def list_directory(dir_fd: int, batch: int, handles: bool = False) -> Listing:
    """List a directory in the source's order, with the attributes of the first ``batch`` names."""
    began = time.perf_counter()
    found = os.listdir(dir_fd)
    seconds = time.perf_counter() - began
    names = [os.fsencode(name) for name in found]
    stats = stat_names(dir_fd, names[:batch], handles)
    return Listing(Names(names), stats, os.fstat(dir_fd), os.stat("..", dir_fd=dir_fd), seconds)
