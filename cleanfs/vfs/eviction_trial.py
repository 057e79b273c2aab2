"""Try out, with a file of our own, what the kernel's evictions look like to our program.

The program copies pages from the kernel's direct map of memory, whose place it does not know, and tells
evictions from truncations by the reference count. Both are found, or verified, on the running kernel
before a page of a user's file is taken.

The file is in the control directory. Its pages are made to leave the page cache in two ways: by
posix_fadvise, as reclaim would, and by a notification, as a change of the file would.
"""

import logging
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

log = logging.getLogger(__name__)

PAGES: Final = 16
"""They must fit into the smallest ring."""

PAGE_SIZE: Final = 4096

MARK_BYTES: Final = 8
"""The first bytes of each page, by which the program finds one."""

MAX_SEEKS: Final = 16
"""Evictions of the file during which places for the direct map are tried, ``CANDIDATES`` GiB each."""

ATTEMPTS: Final = 5
"""Something else on the machine may evict pages of the file meanwhile, which spoils an attempt."""

RECLAIMED: Final = 0
REMOVED: Final = 2
"""Causes, as the program numbers them (``linux/native/eviction.h``)."""

CANDIDATES: Final = 512
"""Places that it tries for each page."""

Run = Callable[..., Awaitable[Any]]
"""Runs a call in one thread, whose fds may be its own."""


class TrialProgram(Protocol):
    """The part of the loaded program that is used here."""

    def begin_trial(self, inode: int, mark: int) -> None:
        """Report all pages of an inode that leave the page cache. ``mark`` begins each of them."""

    def seek(self, base: int) -> None:
        """Look for the direct map with each page, from the ``base``th place on."""

    def use_direct_map(self, direct_map: int) -> None:
        """Copy pages from there."""

    def end_trial(self) -> None:
        """Report that inode's pages like all others."""

    def trial_pages(self) -> list[tuple[int, int, int, bytes | None]]:
        """Return what was reported since the last call: index, cause, direct map, content."""

    def touch(self, fd: int, size: int) -> None:
        """Have the kernel bring a file into its page cache. Other threads can run meanwhile."""


class TrialError(Exception):
    """Says why the kernel's evictions cannot be used; the message is for the user."""


@dataclass(frozen=True, slots=True)
class TrialPage:
    """One page of the file that left the page cache."""

    index: int
    cause: int
    direct_map: int
    content: bytes | None


def make_content() -> str:
    """Return the file's text: random pages with the same first bytes."""
    mark = secrets.token_hex(MARK_BYTES // 2)
    return "".join(mark + secrets.token_hex((PAGE_SIZE - MARK_BYTES) // 2) for _ in range(PAGES))


class Trial:
    """Tries out one loaded program (see the module)."""

    def __init__(self, program: TrialProgram, content: bytes, run: Run) -> None:
        """Prepare to try out a program with a file of that content."""
        self._program = program
        self._run = run
        self._pages = [
            content[start : start + PAGE_SIZE] for start in range(0, len(content), PAGE_SIZE)
        ]

    async def find_direct_map(self, path: str, invalidate: Callable[[int], Awaitable[None]]) -> None:
        """Have the program use the direct map. ``path`` is the file; ``invalidate`` takes a node.

        Raises TrialError, OSError.
        """
        fd, node = await self._run(_open, path)
        try:
            self._program.begin_trial(node, int.from_bytes(self._pages[0][:MARK_BYTES], "little"))
            self._program.use_direct_map(await self._seek(fd))
            for attempt in range(ATTEMPTS):
                problem = await self._try_out(fd, node, invalidate)
                if not problem:
                    break
                log.debug("attempt %d: %s", attempt, problem)
            if problem:
                raise TrialError(problem)
            self._program.end_trial()
        finally:
            await self._run(os.close, fd)

    async def _try_out(self, fd: int, node: int, invalidate: Callable[[int], Awaitable[None]]) -> str:
        """Return what is wrong with the pages that leave the page cache; empty if nothing is."""
        problem = self._problem_of_evicted(await self._evict(fd))
        if problem:
            return problem
        await self._touch(fd)
        await invalidate(node)
        removed = self._leaving()
        if len(removed) != len(self._pages) or any(page.cause != REMOVED for page in removed):
            return "this kernel does not tell evicted pages from invalidated ones"
        return ""

    async def _seek(self, fd: int) -> int:
        """Find the direct map. Another page may begin with the mark, too: only whole ones prove it."""
        for base in range(MAX_SEEKS):
            self._program.seek(base * CANDIDATES)
            for page in await self._evict(fd):
                if page.content == self._pages[page.index]:
                    return page.direct_map
        raise TrialError("this kernel's direct map of memory was not found")

    def _problem_of_evicted(self, pages: list[TrialPage]) -> str:
        if sorted(page.index for page in pages) != list(range(len(self._pages))):
            return "this kernel does not report each page that it evicts"
        if any(page.cause != RECLAIMED for page in pages):
            return "this kernel does not show by the reference count that it evicts a page"
        if any(page.content != self._pages[page.index] for page in pages):
            return "evicted pages cannot be copied from this kernel's memory"
        return ""

    async def _touch(self, fd: int) -> None:
        """Have all pages of the file read."""
        await self._run(self._program.touch, fd, len(self._pages) * PAGE_SIZE)
        self._program.trial_pages()  # of an earlier attempt

    async def _evict(self, fd: int) -> list[TrialPage]:
        """Have all pages of the file read, and evicted."""
        await self._touch(fd)
        await self._run(os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return self._leaving()

    def _leaving(self) -> list[TrialPage]:
        return [TrialPage(*page) for page in self._program.trial_pages()]


def _open(path: str) -> tuple[int, int]:
    """Open a file. Returns the fd and the inode number."""
    fd = os.open(path, os.O_RDONLY)
    return fd, os.fstat(fd).st_ino
