"""Changes of a file that cleanfs makes itself: one at a time, with invalidation before and after.

What one change saw of the file when it was done is what the next one sees before it begins. An
invalidation before the change keeps later reads from the old pages. One after it discards what
overlapping reads have brought back.

Main thread only. The lock is taken without a checkpoint when it is free, and has no owner (``eager``).
It is fair: the task that has waited longest holds it as soon as it is released. It is never held across
a notification to the kernel.

These are classes, as a generator and its wrapper take longer than a write.
"""

from collections.abc import Callable

import trio

from cleanfs.cache.files import CachedFile
from cleanfs.eager import before_wait


class Changing:
    """Lets this task alone change a file in a block, and keeps the file's record."""

    __slots__ = ("_file",)

    def __init__(self, file: CachedFile) -> None:
        """Prepare the block; nothing is held yet."""
        self._file = file

    async def __aenter__(self) -> None:
        """Wait for the changes before this one."""
        file = self._file
        if file.lock is None:
            file.lock = trio.Semaphore(1)
        file.pins += 1
        try:
            if not file.lock.value:
                await before_wait()
            if file.lock.value:
                file.lock.acquire_nowait()
            else:
                await file.lock.acquire()
        except BaseException:
            file.pins -= 1
            raise
        file.mutations += 1

    async def __aexit__(self, *exc: object) -> None:
        """Let the next change begin."""
        file = self._file
        assert file.lock is not None
        file.mutations -= 1
        file.lock.release()
        file.pins -= 1


class Mutating(Changing):
    """Does what ``Changing`` does, and invalidates the bytes ``start <= i < stop`` before and after.

    Without a stop the end of the file moves: invalidate from the old end on, if that is before
    ``start``, as the page that was the last one grows.
    """

    __slots__ = ("_invalidate", "_start", "_stop")

    def __init__(
        self,
        invalidate: Callable[[CachedFile, int, int | None], None],
        file: CachedFile,
        start: int,
        stop: int | None,
    ) -> None:
        """Prepare the block; nothing is held or invalidated yet."""
        super().__init__(file)
        self._invalidate = invalidate
        self._start = start
        self._stop = stop

    async def __aenter__(self) -> None:
        """Wait for the changes before this one, then invalidate."""
        await super().__aenter__()
        if self._stop is None:
            self._start = min(self._start, self._file.size)
        self._invalidate(self._file, self._start, self._stop)

    async def __aexit__(self, *exc: object) -> None:
        """Invalidate again, and let the next change begin."""
        try:
            self._invalidate(self._file, self._start, self._stop)
        finally:
            await super().__aexit__()
