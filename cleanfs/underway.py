"""Requests that others wait for."""

import trio


class UnderWay:
    """A read or write that is not done yet: bytes ``start <= i < stop``, to the file's end if None."""

    __slots__ = ("_done", "_ended", "start", "stop")

    def __init__(self, start: int, stop: int | None) -> None:
        """It has just been asked for."""
        self.start = start
        self.stop = stop
        self._done: trio.Event | None = None
        self._ended = False

    def touches(self, offset: int, size: int) -> bool:
        """Whether it is about some of these bytes."""
        return self.start < offset + size and (self.stop is None or offset < self.stop)

    async def wait(self) -> None:
        """Return when it is done, or was refused.

        It may be by now: who waits for several gets to the second after the first.
        """
        if self._ended:
            return
        if self._done is None:
            self._done = trio.Event()
        await self._done.wait()

    def end(self) -> None:
        """It is."""
        self._ended = True
        if self._done is not None:
            self._done.set()
