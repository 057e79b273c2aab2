"""The source as a whole: run calls to it in threads or inline, and count the traffic.

A call that may wait for the source runs in a worker thread. On local file systems calls on names that
prove as fast as memory run inline, on the main thread, until one of them waits (``inline_policy``).
``file`` does the same for reads and writes.
"""

import contextlib
import functools
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NoReturn, TypeVar, TypeVarTuple, cast

import trio

from cleanfs.cache.state import NowaitState
from cleanfs.eager import before_wait
from cleanfs.source.inline_policy import SLOW_SECONDS, InlinePolicy, NowaitProbe
from cleanfs.source.space_retry import SpaceRetry
from cleanfs.source.thread_limiter import ThreadLimiter

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class SourceCache(StrEnum):
    """Whether reads populate the source's page cache."""

    AUTO = "auto"
    """Drop what they bring while cleanfs keeps pages itself; otherwise as KEEP."""
    KEEP = "keep"
    """What the kernel sees fit stays."""
    DROP = "drop"
    """Nothing stays."""


@dataclass(frozen=True, slots=True)
class BackingStats:
    """A snapshot of the traffic with the source."""

    source_reads: int
    source_read_bytes: int
    source_reads_inline: int
    """Reads that were served whole without a thread."""
    source_writes: int
    source_write_bytes: int
    source_writes_inline: int
    """Writes that were done whole without a thread."""
    source_errors: int


@dataclass(slots=True)
class Traffic:
    """The counters that ``BackingStats`` is a snapshot of."""

    reads: int = 0
    read_bytes: int = 0
    reads_inline: int = 0
    writes: int = 0
    write_bytes: int = 0
    writes_inline: int = 0
    errors: int = 0


class SourceFs(NowaitState):
    """Describes one file system of the source: what it can do, and how fast it was lately."""

    __slots__ = (
        "listings",
        "local",
        "lookups",
        "names",
        "nowait_probe",
        "nowait_write_probe",
        "reads",
        "sizes",
        "write_nowait",
        "writes",
    )  # fmt: skip

    def __init__(self, local: bool) -> None:
        """Assume that it can do everything; each ability is tried until it is refused."""
        super().__init__()
        self.local = local
        """Whether calls that could wait may ever be made inline."""
        self.write_nowait = True
        self.reads = InlinePolicy()
        self.writes = InlinePolicy()
        # Of their own, as a lookup that returns does not show that changes are not frozen.
        self.lookups = InlinePolicy(steps=4)
        self.names = InlinePolicy(steps=4)  # changes of names; a rename is two lookups and more
        self.listings = InlinePolicy(steps=4)
        self.sizes = InlinePolicy(steps=4)  # of small files
        self.nowait_probe = NowaitProbe(self)
        self.nowait_write_probe = NowaitProbe(NowaitState())


class Backing:
    """The source, as seen by the file handlers. Counts its traffic."""

    def __init__(self) -> None:
        """Start without traffic."""
        self.drop_behind = True
        """Whether what was read is dropped from the source's page cache."""
        self.thread_limiter = ThreadLimiter()
        self.space_retry = SpaceRetry()
        self.abandoned_calls = 0
        """Requests under way whose requesters are gone."""
        self.traffic = Traffic()
        self._file_systems: dict[int, SourceFs] = {}
        self._on_file_system: Callable[[int, SourceFs], None] = lambda _, __: None

    def file_system(self, device: int, local: bool) -> SourceFs:
        """Return what is known of a device's file system, anew once another kind has its number."""
        known = self._file_systems.get(device)
        if known is None or known.local != local:
            known = self._file_systems[device] = SourceFs(local)
            self._on_file_system(device, known)
        return known

    def on_file_system(self, call: Callable[[int, SourceFs], None]) -> None:
        """Call ``call`` with the device and what is known of each file system, now and later."""
        self._on_file_system = call
        for device, known in self._file_systems.items():
            call(device, known)

    async def in_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a call that may wait for the source in a worker thread."""
        await before_wait()
        # trio uses only the two methods that it has.
        limiter = cast(trio.CapacityLimiter, self.thread_limiter)
        return await trio.to_thread.run_sync(call, *args, abandon_on_cancel=True, limiter=limiter)

    async def run_by(self, policy: InlinePolicy, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a call on a local file system: inline, if those of its kind before it did not wait."""
        if policy.inline and policy.recent:
            with watched(policy):
                return call(*args)
        seconds, outcome = await self.in_thread(_timed, call, *args)
        policy.took(seconds, 0)
        return outcome()

    def stats(
        self, served_reads: tuple[int, int] = (0, 0), served_writes: tuple[int, int] = (0, 0)
    ) -> BackingStats:
        """Return a snapshot, with the calls that the FUSE channel made: how many, and their bytes."""
        traffic = self.traffic
        return BackingStats(
            source_reads=traffic.reads + served_reads[0],
            source_read_bytes=traffic.read_bytes + served_reads[1],
            source_reads_inline=traffic.reads_inline + served_reads[0],
            source_writes=traffic.writes + served_writes[0],
            source_write_bytes=traffic.write_bytes + served_writes[1],
            source_writes_inline=traffic.writes_inline + served_writes[0],
            source_errors=traffic.errors,
        )


@contextlib.contextmanager
def watched(policy: InlinePolicy) -> Iterator[None]:
    """Watch a block on the main thread: if it waits, the next call of its kind is made in a thread."""
    sleeps, start = _sleeps(), time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        policy.returned()
        if seconds > SLOW_SECONDS and _sleeps() > sleeps:
            policy.waited(seconds)


def _sleeps() -> int:
    """Count how often this thread has slept. Preemption does not count: it is no wait."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _timed(call: Callable[[*Ts], T], *args: *Ts) -> tuple[float, Callable[[], T]]:
    """Time a call, in a thread. Returns its seconds, and a function that gives its result."""
    start = time.perf_counter()
    try:
        result = call(*args)
    except OSError as exc:
        return time.perf_counter() - start, functools.partial(_raise, exc)
    return time.perf_counter() - start, lambda: result


def _raise(exc: OSError) -> NoReturn:
    raise exc
