"""The state of an open directory that the FUSE channel reads, to list it without Python.

The class here is for the Python engine. The native one that replaces it
(``native/directory_state.hpp``) has the same fields, and the channel's C++ code reads and writes these.
"""

from typing import TYPE_CHECKING

from cleanfs.cache.state import native
from cleanfs.source.listing import Names


class DirectoryState:
    """The state of one open directory."""

    __slots__ = ("fd", "names", "rewinding")

    def __init__(self, fd: int) -> None:
        """List by ``fd``, from a snapshot without names on."""
        self.fd = fd
        self.names = Names()
        """The snapshot. Whoever takes another one replaces it."""
        self.rewinding = 0
        """How many threads read the names by ``fd``, whose position they share."""


if native is not None and not TYPE_CHECKING:
    DirectoryState = native.DirectoryState
