"""Hold what cases have at hand: directories, mounts, a daemon's figures, and where results go."""

import contextlib
import os
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tests.harness import mounting
from tests.harness.mounting import MountedFs

MIB = 1 << 20

CONSTANT_MIB = 48.0
"""What a daemon takes beside its caches and tables (docs/sizes.md): 35 MiB when it is idle, the rest
for requests under way."""

REQUESTS_MIB = 128.0
"""What requests under way may take on top, while there are many large ones at a time."""

INODE_KIB = 1.0
FILE_KIB = 0.7
"""What an inode and a file record take."""


class NotHereError(Exception):
    """Says that the machine lacks what the case needs, and what that is."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Holds one thing that was measured, beside what was promised."""

    case: str
    engine: str
    what: str
    measured: str
    promise: str
    holds: bool | None
    """None where nothing is promised."""


@dataclass
class Lab:
    """Is the place for one case with one engine."""

    case: str
    engine: str
    quick: bool
    base: Path
    """A directory of its own, in RAM."""
    disk_base: Path
    """The same on a disk."""
    seconds: float
    """How long a daemon may live."""
    say: Callable[[str], None]
    figures: list[Figure] = field(default_factory=list)

    def pick(self, full: int, quick: int) -> int:
        """Choose a size, by how thorough we are."""
        return quick if self.quick else full

    # -- results ------------------------------------------------------------------------------

    def inform(self, what: str, measured: object) -> None:
        """Note a figure without a promise."""
        self._add(what, str(measured), "", None)

    def hold(self, what: str, measured: object, promise: object, holds: bool) -> None:
        """Note a figure and whether its promise holds."""
        self._add(what, str(measured), str(promise), holds)

    def same(self, what: str, measured: object, promise: object) -> None:
        """The figure must be what was promised."""
        self.hold(what, measured, promise, measured == promise)

    def at_most(self, what: str, measured: float, most: float, unit: str = "") -> None:
        """The figure must not be larger than what was promised."""
        self.hold(what, f"{measured:,.6g} {unit}", f"<= {most:,.6g} {unit}", measured <= most)

    def _add(self, what: str, measured: str, promise: str, holds: bool | None) -> None:
        self.figures.append(
            Figure(self.case, self.engine, what, measured.strip(), promise.strip(), holds)
        )
        verdict = "" if holds is None else "ok  " if holds else "BROKEN  "
        self.say(f"  {verdict}{what}: {measured} {f'(promise: {promise})' if promise else ''}")

    # -- mounts -------------------------------------------------------------------------------

    def directory(self, name: str, *, on_disk: bool = False) -> Path:
        """Make a new directory."""
        path = (self.disk_base if on_disk else self.base) / name
        path.mkdir()
        return path

    @contextlib.contextmanager
    def mount(self, source: Path, *options: str, prefix: tuple[str, ...] = ()) -> Iterator[MountedFs]:
        """Mount the source; the daemon's log must show no error."""
        mountpoint = Path(tempfile.mkdtemp(prefix="mnt", dir=self.base))
        mounting.LIFETIME = self.seconds
        with mounting.mounted(source, mountpoint, *options, prefix=prefix) as fs:
            yield fs

    @contextlib.contextmanager
    def loop(self, kind: str, size: int, *options: str) -> Iterator[Path]:
        """Mount a file system of its own, on a sparse file. Raises NotHereError."""
        image = self.disk_base / f"{kind}.img"
        where = self.directory(f"{kind}-{len(list(self.base.iterdir()))}")
        with image.open("wb") as file:
            file.truncate(size)
        try:
            _run(f"mkfs.{kind}", *options, str(image))
            _run("mount", "-o", "loop", str(image), str(where))
            try:
                yield where
            finally:
                _run("umount", str(where))
        finally:
            image.unlink()


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as exc:
        raise NotHereError(f"{command[0]}: {exc}") from exc


# -- a daemon ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """Shows a daemon at one moment; sizes in MiB."""

    seconds: float
    rss: float
    pss: float
    fds: int
    threads: int
    inodes: int = 0
    files: int = 0


class Daemon:
    """Shows the process behind a mount, from outside."""

    def __init__(self, fs: MountedFs) -> None:
        """Look at the daemon of ``fs``."""
        self.fs = fs
        self.proc = Path("/proc") / str(fs.process.pid)

    def sample(self) -> Sample:
        """Look at it now."""
        sizes = {}
        for line in (self.proc / "smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split()[:2]
            sizes[name] = int(value) / 1024
        stats = self.stats()
        return Sample(
            time.monotonic(),
            sizes["Rss:"],
            sizes["Pss:"],
            len(os.listdir(self.proc / "fd")),
            len(os.listdir(self.proc / "task")),
            stats.get("inodes", 0),
            stats.get("pagecache_files", 0),
        )

    def stats(self) -> dict[str, Any]:
        """Return its statistics; nothing if it cannot reply."""
        try:
            return self.fs.stats()
        except OSError:
            return {}

    def open_files(self, wanted: int = 0) -> int:
        """Count files that it has open; closing comes some time after close."""
        deadline = time.monotonic() + 30
        while (found := self.fs.stats()["open_files"]) > wanted and time.monotonic() < deadline:
            time.sleep(0.1)
        return int(found)

    @contextlib.contextmanager
    def watched(self, every: float = 0.5) -> Iterator[list[Sample]]:
        """Take samples in the time of the block, one at least."""
        samples = [self.sample()]
        over = threading.Event()

        def watch() -> None:
            while not over.wait(every):
                with contextlib.suppress(OSError, ValueError):
                    samples.append(self.sample())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield samples
        finally:
            over.set()
            thread.join()
            samples.append(self.sample())

    def settled(self, seconds: float = 10.0) -> Sample:
        """Wait until worker threads have ended, or the time is over; they live for 10 idle seconds."""
        before = self.sample()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.5)
            now = self.sample()
            if (now.threads, now.fds, now.inodes) == (before.threads, before.fds, before.inodes):
                break
            before = now
        return self.sample()


def promised_mib(fs_stats: dict[str, Any], inodes: int, files: int, *, busy: bool) -> float:
    """Return what a daemon may take (docs/sizes.md), with so many inodes and file records at most."""
    limits = fs_stats["pagecache_limit"] + fs_stats["backend_counters"].get("pool_limit", 0)
    tables = (inodes * INODE_KIB + files * FILE_KIB) / 1024
    return float(limits) / MIB + tables + CONSTANT_MIB + (REQUESTS_MIB if busy else 0)


def growth(samples: list[Sample]) -> float:
    """Return how much more PSS in the last quarter of the time than in the second, in MiB (medians)."""
    quarter = max(len(samples) // 4, 1)
    late = median(sample.pss for sample in samples[-quarter:])
    early = median(sample.pss for sample in samples[quarter : 2 * quarter] or samples[:1])
    return late - early


# -- processes ----------------------------------------------------------------------------------


def in_processes(count: int, work: Callable[[int], None], timeout: float) -> list[str]:
    """Run ``work(i)`` in as many processes at once. Returns what went wrong, a line for each."""
    pipes: dict[int, int] = {}
    for i in range(count):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reader)
                work(i)
                status = 0
            except BaseException:  # a child must not return
                os.write(writer, traceback.format_exc()[-800:].encode())
            finally:
                os._exit(status)
        os.close(writer)
        pipes[pid] = reader
    failures = []
    deadline = time.monotonic() + timeout
    for pid, reader in pipes.items():
        ended = _wait(pid, deadline)
        complaint = os.read(reader, 4096).decode(errors="replace") if ended else ""
        os.close(reader)
        if ended:
            failures.append(f"process ended with {ended}: {complaint}")
    return failures


def _wait(pid: int, deadline: float) -> int | str:
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "the time limit"


def as_json(figures: list[Figure]) -> list[dict[str, Any]]:
    """Make a dict for a file."""
    return [asdict(figure) for figure in figures]
