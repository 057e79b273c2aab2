"""Take the pages that the kernel evicts from its page cache of the mount, and put them.

A program in the kernel copies them into a ring buffer (``linux/native/evictions.bpf.c``). The native
half puts them from there (``native/evicted_pages.hpp`` has the rules). Here it is loaded, tried out and
woken. Where that does not work, cleanfs keeps pages of its own, and puts what falls out of those.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Final, Protocol

import trio

from cleanfs.backends.engines import native_module
from cleanfs.cache.state import CacheState
from cleanfs.sizes import format_size
from cleanfs.vfs.eviction_trial import Run, Trial, TrialError, TrialProgram
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inode_state import InodeStates

log = logging.getLogger(__name__)

PAGE_SIZE: Final = 4096
"""The kernel's, and so the only one with which its pages can be put."""

MAX_RING: Final = 16 << 20
RING_SHARE: Final = 16
"""The ring takes at most one part in so many of the pool limit, which it counts against."""

MIN_POOL_LIMIT: Final = 2 << 20
"""The least pool limit from which that can be taken."""

WAKE_SHARE: Final = 4
"""The daemon is woken when the ring is filled to one part in so many. Until then pages wait there, and
reads find them."""

BATCH: Final = 256
"""Pages put between two checkpoints."""


class EvictionSource(StrEnum):
    """Says whose evictions are put."""

    AUTO = "auto"
    """The kernel's where possible."""
    KERNEL = "kernel"
    OWN = "own"
    """Those of cleanfs's own page cache."""


class Program(TrialProgram, Protocol):
    """The loaded program (``linux/native/eviction_program.hpp``)."""

    fd: int
    """The ring's: readable when it has filled up to the wake-up mark."""
    ring_bytes: int

    def watch(self, device: int, wake_bytes: int) -> None:
        """Copy evicted pages of a file system; wake the daemon when so much is in the ring."""

    def counts(self) -> dict[str, int]:
        """Return its part of the counters of ``EvictionStats``, without their prefix."""


class EvictedPages(Protocol):
    """The consumer of the ring (``native/evicted_pages.hpp``)."""

    def table(self) -> object:
        """Return the capsule for ``CacheState.use_evictions``, valid as long as this."""

    def drain(self, most: int) -> int:
        """Put up to ``most`` pages. Returns how many there were."""

    def hold(self, node: int) -> None:
        """Put nothing of a node."""

    def release(self, node: int) -> None:
        """End a ``hold``; what was evicted before is not put."""

    def forget(self, node: int) -> None:
        """Put what was evicted of a node, and nothing of that later."""

    def counters(self) -> dict[str, int]:
        """Return its part of the counters of ``EvictionStats``, without their prefix."""


class UnavailableError(Exception):
    """Says why the kernel's evictions cannot be used; the message is for the user."""


@dataclass(frozen=True, slots=True)
class EvictionStats:
    """A snapshot. Pages unless said otherwise."""

    evictions: str
    """``kernel``, or ``own`` with the reason why it is not the kernel's."""
    evictions_seen: int = 0
    """Pages of the mount that left the kernel's page cache, for whatever reason."""
    evictions_put: int = 0
    evictions_kept: int = 0
    """Not put because the pool had them."""
    evictions_removed: int = 0
    """Not put: truncated or invalidated."""
    evictions_unclean: int = 0
    """Not put: never filled, or not yet written back."""
    evictions_stale: int = 0
    """Not put: flushed since, or the kernel had been told to drop them."""
    evictions_unknown: int = 0
    """Not put: no record of the file."""
    evictions_past_end: int = 0
    """Not put: past the end of the file."""
    evictions_refused: int = 0
    """Not put: there was no pool, or it failed."""
    evictions_unreadable: int = 0
    """Lost: they could not be copied."""
    evictions_lost: int = 0
    """Lost: the ring was full."""
    evictions_ring_bytes: int = 0
    """The size of the ring."""
    evictions_ring_high_water: int = 0
    """The most bytes that were found in it."""
    evictions_held_nodes: int = 0
    """Inodes of which the kernel may evict stale pages, or may have done so just now."""


class Evictions:
    """The kernel's evictions of one mount; until ``start`` succeeds there are none."""

    def __init__(self, caches: CacheState, inodes: InodeStates) -> None:
        """Put pages of files that ``inodes`` knows."""
        self._caches = caches
        self._inodes = inodes
        self._held: Counter[int] = Counter()  # nodes
        self._module: ModuleType | None = None
        self._program: Program | None = None
        self._pages: EvictedPages | None = None  # once the program was tried out
        self.reason = "as asked"
        """Why they are not used."""

    @property
    def ring_bytes(self) -> int:
        """Return the memory that the ring takes."""
        return 0 if self._program is None else self._program.ring_bytes

    @property
    def loaded(self) -> bool:
        """Tell whether the program is in the kernel."""
        return self._program is not None

    def load(self, pool_limit: int, fast_ops: object) -> None:
        """Load the program. Raises UnavailableError.

        ``fast_ops`` is what the backend offers, if that is anything (``ops.FastOps``).
        """
        if pool_limit < MIN_POOL_LIMIT:
            raise UnavailableError(f"it takes a --pool-limit of {format_size(MIN_POOL_LIMIT)}")
        if fast_ops is None:
            raise UnavailableError("the backend takes no pages from native code")
        if self._caches.page_size != PAGE_SIZE:
            raise UnavailableError(f"it takes --page-size {PAGE_SIZE}")
        if not self._caches.native:
            raise UnavailableError("the native engine is not in use")
        try:
            self._module = native_module("cleanfs.vfs._evictions")
        except ValueError as exc:
            raise UnavailableError(str(exc)) from exc
        if self._module is None:
            raise UnavailableError(
                "this build lacks the program, which takes clang, bpftool and libbpf"
            )
        try:
            self._program = self._module.EvictionProgram(_ring_size(pool_limit))
        except RuntimeError as exc:
            raise UnavailableError(str(exc)) from exc

    async def start(
        self,
        path: str,
        content: bytes,
        device: int,
        run: Run,
        invalidate: Callable[[int], Awaitable[None]],
    ) -> None:
        """Try the program out with the file ``path`` of the mount, and serve.

        ``content`` is the file's. Raises UnavailableError.
        """
        program, module = self._program, self._module
        assert program is not None
        assert module is not None
        program.watch(device, program.ring_bytes // WAKE_SHARE)
        try:
            await Trial(program, content, run).find_direct_map(path, invalidate)
        except (TrialError, OSError) as exc:
            self.close()
            raise UnavailableError(str(exc)) from exc
        pages = module.EvictedPages(program.fd, program.ring_bytes, self._inodes, self._caches)
        for node in self._held.elements():
            pages.hold(node)
        self._pages = pages
        self._caches.use_evictions(pages.table())

    async def run(self) -> None:
        """Put pages as they come, until cancelled."""
        while self._program is not None and self._pages is not None:
            await trio.lowlevel.wait_readable(self._program.fd)
            self._pages.drain(BATCH)

    def close(self) -> None:
        """Remove the program from the kernel."""
        self._caches.use_evictions(None)
        self._pages = self._program = None

    # -- what the kernel may still hold -------------------------------------------------------

    def hold(self, node: int) -> None:
        """Put nothing of a node from now on: the kernel is about to drop its pages, which are stale."""
        self._held[node] += 1
        if self._pages is not None:
            self._pages.hold(node)

    def release(self, node: int) -> None:
        """Note that it has dropped them."""
        self._held[node] -= 1
        if not self._held[node]:
            del self._held[node]
        if self._pages is not None:
            self._pages.release(node)

    def forget(self, inode: Inode) -> None:
        """Put what the kernel evicted of an inode that it has forgotten: its node id may be reused."""
        if self._pages is not None:
            self._pages.forget(inode.node)

    def stats(self) -> EvictionStats:
        """Return a snapshot, after putting what waits."""
        program, pages = self._program, self._pages
        if program is None or pages is None:
            return EvictionStats(f"{EvictionSource.OWN} ({self.reason})")
        pages.drain(program.ring_bytes // PAGE_SIZE)
        counters = {**program.counts(), **pages.counters()}
        return EvictionStats(
            EvictionSource.KERNEL,
            evictions_ring_bytes=program.ring_bytes,
            **{f"evictions_{name}": value for name, value in counters.items()},
        )


def _ring_size(pool_limit: int) -> int:
    """Return the size of the ring for a pool limit, a power of 2."""
    return 1 << (min(MAX_RING, pool_limit // RING_SHARE).bit_length() - 1)
