"""Let threads and processes race for one file or directory, and check the result.

Each kind does the same as some generic tests of xfstests, whose numbers its docstring has. It gets an
empty directory, a scale (1: seconds on a local file system) and a seed. It raises AssertionError if the
result is one that no file system may give. The kinds are in one module, as they share the pieces at the
top, and a check picks them by name.
"""

import ctypes
import mmap
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from ctypes.util import find_library
from pathlib import Path
from typing import Final

libc = ctypes.CDLL(find_library("c"), use_errno=True)

PAGE: Final = mmap.PAGESIZE
SECTOR: Final = 512
MIB: Final = 1 << 20
HUGE: Final = 2 * MIB


# -- helpers --------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    """Open a file until the end of the block."""
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def child(work: Callable[[], None], forever: bool = False) -> Iterator[None]:
    """Run ``work`` in another process during the block. It must succeed, or ``forever`` be killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        with suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    try:
        yield
    except BaseException:
        forever = True
        raise
    finally:
        if forever:
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    assert status == (signal.SIGKILL if forever else 0), status


def in_threads(*works: Callable[[], None]) -> None:
    """Run all at once, each in a thread, and raise the first error."""
    raised: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:
            raised.append(exc)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


class Memory:
    """Accesses a mapping by its address: stores through ctypes let other threads run meanwhile."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        self.address = ctypes.addressof(self._view)

    def store(self, offset: int, data: bytes) -> None:
        """Store bytes. This may cause page faults."""
        ctypes.memmove(self.address + offset, data, len(data))

    def close(self) -> None:
        """Release the address. This must precede the close of the mapping."""
        del self._view


@contextmanager
def mapped(fd: int, size: int, flags: int = mmap.MAP_SHARED) -> Iterator[tuple[mmap.mmap, Memory]]:
    """Map the first ``size`` bytes of a file."""
    with closing(mmap.mmap(fd, size, flags)) as mapping, closing(Memory(mapping)) as memory:
        yield mapping, memory


def aligned(size: int, huge: bool = False) -> mmap.mmap:
    """Make a buffer for O_DIRECT, with ``huge`` in huge pages if possible."""
    buffer = mmap.mmap(-1, -(-size // HUGE) * HUGE if huge else size)
    if huge:
        with suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


# -- names ----------------------------------------------------------------------------------------


def names(directory: Path, scale: float, seed: int) -> None:
    """Create, rename and remove files; each call has the right result (007)."""
    choose = random.Random(seed)
    known: dict[str, int] = {}
    os.chdir(directory)
    for _ in range(int(8000 * scale)):
        name = f"name.{choose.randrange(100)}"
        match choose.randrange(4):
            case 0:
                try:
                    with opened(Path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
                        assert name not in known
                        known[name] = os.fstat(fd).st_ino
                except FileExistsError:
                    assert name in known
            case 1:
                try:
                    os.unlink(name)
                    del known[name]
                except FileNotFoundError:
                    assert name not in known
            case 2:
                other = f"name.{choose.randrange(100)}"
                try:
                    os.rename(name, other)
                    known[other] = known[name] if other == name else known.pop(name)
                except FileNotFoundError:
                    assert name not in known
            case _:
                try:
                    assert os.stat(name).st_ino == known[name]
                except FileNotFoundError:
                    assert name not in known
    assert set(os.listdir()) == set(known)


def listing_while_renaming(directory: Path, scale: float, _: int) -> None:
    """Rename each file and back when it is listed; the listing ends (736)."""
    os.chdir(directory)
    files = int(5000 * scale)
    for number in range(files):
        Path(str(number)).touch()
    listed = 0
    with os.scandir() as entries:
        for entry in entries:
            listed += 1
            assert listed <= 3 * files
            os.rename(entry.name, "temporary")
            os.rename("temporary", entry.name)
    assert listed >= files


def positions_in_a_listing(directory: Path, scale: float, seed: int) -> None:
    """Find each entry again at its position; no position fails otherwise (676)."""
    choose = random.Random(seed)
    for _ in range(int(4000 * scale)):
        name = "".join(choose.choices("abcdefghij", k=choose.randrange(8, 70)))
        (directory / name).touch()
    with opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        seen = {}
        at = 0
        while entry := first_entry(fd, at):
            seen[at] = entry
            at = entry[0]
        assert len(seen) == len(os.listdir(directory)) + 2
        for at in choose.choices(list(seen), k=len(seen)):
            assert first_entry(fd, at) == seen[at]
        for _ in range(len(seen)):
            with suppress(OSError):
                first_entry(fd, choose.randrange(max(seen)))


def first_entry(fd: int, position: int) -> tuple[int, int, int, bytes] | None:
    """Return the next position, number, type and name of the entry at a position; None at the end."""
    os.lseek(fd, position, os.SEEK_SET)
    listed = entries_at(fd, 320)
    return listed[0] if listed else None


def entries_at(fd: int, size: int) -> list[tuple[int, int, int, bytes]]:
    """Return the entries of one getdents64(2) call with a buffer of that size."""
    buffer = ctypes.create_string_buffer(size)
    got = libc.getdents64(fd, buffer, size)
    if got < 0:
        raise OSError(ctypes.get_errno(), "getdents64")
    found, at = [], 0
    while at < got:
        number = int.from_bytes(buffer.raw[at : at + 8], sys.byteorder)
        following = int.from_bytes(buffer.raw[at + 8 : at + 16], sys.byteorder)
        length = int.from_bytes(buffer.raw[at + 16 : at + 18], sys.byteorder)
        name = buffer.raw[at + 19 : at + length].split(b"\0")[0]
        found.append((following, number, buffer.raw[at + 18], name))
        at += length
    return found


def one_listing_for_two(directory: Path, scale: float, seed: int) -> None:
    """List in one thread while another seeks on the same fd and tries to read it (310)."""
    choose = random.Random(seed)
    files = {b".", b".."}
    for number in range(1000):
        (directory / str(number)).touch()
        files.add(b"%d" % number)
    with opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        disturbances = int(100 * scale)
        now = threading.Semaphore(0)

        def list_it() -> None:
            try:
                for turn in range(20 * disturbances):
                    if turn % 20 == 0:
                        now.release()
                    listed = entries_at(fd, 4096)
                    assert {name for *_, name in listed} <= files
                    if not listed:
                        os.lseek(fd, 0, os.SEEK_SET)
            finally:
                now.release(disturbances)

        def disturb() -> None:
            for _ in range(disturbances):
                now.acquire()
                os.lseek(fd, choose.randrange(1000), os.SEEK_SET)
                with suppress(IsADirectoryError):
                    os.read(fd, 100)

        in_threads(list_it, disturb)


# -- one file, written in two ways ------------------------------------------------------------------


def direct_and_mapped(directory: Path, scale: float, _: int) -> None:
    """Write from the beginning with O_DIRECT, from the end by mappings in another process (247)."""
    path, size = directory / "f", int(32 * scale) * MIB
    path.write_bytes(b"0" * size)

    def direct() -> None:
        buffer = aligned(MIB)
        buffer.write(b"d" * MIB)
        with opened(path, os.O_RDWR | os.O_DIRECT) as fd:
            for at in range(0, size, MIB):
                assert os.pwrite(fd, buffer, at) == MIB

    with child(direct):
        for at in range(size - MIB, -1, -MIB):
            with (
                opened(path) as fd,
                closing(mmap.mmap(fd, MIB, offset=at)) as mapping,
                closing(Memory(mapping)) as memory,
            ):
                memory.store(0, b"m" * MIB)
    content = path.read_bytes()
    assert len(content) == size
    assert set(content) <= set(b"dm"), set(content)


WAYS: Final = ("zeros", "allocated", "hole")
"""The ways to give a file its size."""


def sized(path: Path, size: int, way: str) -> None:
    """Make a file that reads as zeros."""
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
        if way == "zeros":
            os.pwrite(fd, bytes(size), 0)
        elif way == "allocated":
            os.posix_fallocate(fd, 0, size)
        else:
            os.ftruncate(fd, size)


def holes(directory: Path, scale: float, _: int) -> None:
    """Mark each page of a mapped file by two writers, each at its own place (340, 344, 346)."""
    size = int(2048 * scale) * PAGE
    for way in WAYS:
        for second in ("thread", "process", "write"):
            for fault_first in (False, True):
                path = directory / f"{way} {second} {fault_first}"
                sized(path, size, way)
                mark_pages(path, size, second, fault_first)
                path.unlink()


def mark_pages(path: Path, size: int, second: str, fault_first: bool) -> None:
    """Mark the pages by two threads, by two processes, or by a thread and one with pwrite."""
    marks = {PAGE // 4: b"first***", 3 * PAGE // 4: b"second**"}
    with opened(path) as fd, mapped(fd, size) as (mapping, memory):
        if fault_first:
            assert not any(mapping[at] for at in range(0, size, PAGE))

        def store(place: int) -> None:
            for at in range(place, size, PAGE):
                memory.store(at, marks[place])

        def write(place: int) -> None:
            for at in range(place, size, PAGE):
                assert os.pwrite(fd, marks[place], at) == 8

        one, two = marks
        if second == "process":
            with child(lambda: store(two)):
                store(one)
        else:
            other = store if second == "thread" else write
            in_threads(lambda: store(one), lambda: other(two))
        check_marks(mapping, marks)
    check_marks(path.read_bytes(), marks)


def check_marks(content: bytes | mmap.mmap, marks: dict[int, bytes]) -> None:
    """Check that each page has the marks and otherwise zeros."""
    page = bytearray(PAGE)
    for place, mark in marks.items():
        page[place : place + 8] = mark
    for at in range(0, len(content), PAGE):
        assert content[at : at + PAGE] == page, (
            at // PAGE,
            content[at : at + PAGE].replace(b"\0", b""),
        )


def private_holes(directory: Path, scale: float, _: int) -> None:
    """Mark pages of private mappings: no one else sees the marks (354)."""
    size = int(2048 * scale) * PAGE
    for way in WAYS:
        path = directory / way
        sized(path, size, way)
        with opened(path) as fd, mapped(fd, size, mmap.MAP_PRIVATE) as (mapping, memory):

            def store(place: int, memory: Memory = memory) -> None:
                for at in range(place, size, PAGE):
                    memory.store(at, b"mine")

            with child(lambda: store(100)):
                in_threads(lambda: store(1000), lambda: store(2000))
            for at in range(0, size, PAGE):
                page = mapping[at : at + PAGE]
                assert page.replace(b"\0", b"") == b"minemine"
        assert not any(path.read_bytes())


def grown_and_mapped(directory: Path, scale: float, _: int) -> None:
    """Grow a file by truncation and fill it by a mapping while another process syncs it (438)."""
    path, step, steps = directory / "f", 5 * PAGE // 2 + 100, int(400 * scale)
    path.touch()

    def sync() -> None:
        with opened(path) as fd:
            while True:
                os.fsync(fd)

    with child(sync, forever=True), opened(path) as fd:
        for number in range(steps):
            size = (number + 1) * step
            os.ftruncate(fd, size)
            with mapped(fd, size) as (mapping, memory):
                memory.store(number * step, bytes([number % 255 + 1]) * step)
                assert mapping[max(0, size - 2 * step) : size].count(0) == 0
    content = path.read_bytes()
    for number in range(steps):
        assert set(content[number * step : (number + 1) * step]) == {number % 255 + 1}, number


def direct_and_buffered(directory: Path, scale: float, seed: int) -> None:
    """Write, read, truncate and map a file, half of the calls with O_DIRECT (263, 759, 760)."""
    choose = random.Random(seed)
    most = 500_000 // SECTOR * SECTOR
    model = bytearray()
    path = directory / "f"
    buffer = aligned(most + HUGE, huge=bool(seed % 2))
    with opened(path) as plain, opened(path, os.O_RDWR | os.O_DIRECT) as direct:
        for number in range(int(3000 * scale)):
            longest = choose.choice((8192, 128_000))
            fd, unit = choose.choice(((plain, 1), (direct, SECTOR)))
            at = choose.randrange(most - longest) // unit * unit
            size = max(unit, choose.randrange(longest) // unit * unit)
            skip = choose.randrange(8) * SECTOR
            match choose.randrange(5):
                case 0 | 1:
                    buffer[skip : skip + size] = bytes([number % 255 + 1]) * size
                    assert os.pwrite(fd, memoryview(buffer)[skip : skip + size], at) == size
                    model.extend(bytes(max(0, at + size - len(model))))
                    model[at : at + size] = buffer[skip : skip + size]
                case 2:
                    with memoryview(buffer) as view:
                        got = os.preadv(fd, [view[skip : skip + size]], at)
                    expected = bytes(model[at : at + size])
                    assert buffer[skip : skip + got] == expected, (number, at, size, got, len(expected))
                case 3:
                    length = choose.choice((at, len(model) + 1, len(model) // 2))
                    length = min(length, most)
                    os.ftruncate(plain, length)
                    del model[length:]
                    model.extend(bytes(length - len(model)))
                case _ if model:
                    with mapped(plain, len(model)) as (mapping, memory):
                        assert mapping[at : at + size] == model[at : at + size], (number, at, size)
                        if at + size <= len(model):
                            memory.store(at, b"m" * size)
                            model[at : at + size] = b"m" * size
    assert path.read_bytes() == model


def small_direct(directory: Path, scale: float, seed: int) -> None:
    """Write small pieces by four processes with O_DIRECT and read them back (240, 300)."""
    path, pieces, size = directory / "f", 64, 4 * SECTOR
    path.write_bytes(bytes(4 * pieces * size))

    def write(own: int) -> None:
        choose = random.Random(seed + own)
        there = {}
        buffer = aligned(PAGE)
        with opened(path, os.O_RDWR | os.O_DIRECT) as fd:
            for turn in range(int(400 * scale)):
                at = (choose.randrange(pieces) * 4 + own) * size
                there[at] = bytes([turn % 255 + 1]) * size
                buffer[:size] = there[at]
                assert os.pwrite(fd, memoryview(buffer)[:size], at) == size
                at = choose.choice(list(there))
                assert os.preadv(fd, [memoryview(buffer)[:size]], at) == size
                assert buffer[:size] == there[at]
        content = path.read_bytes()
        assert all(content[at : at + size] == data for at, data in there.items())

    with child(lambda: write(1)), child(lambda: write(2)), child(lambda: write(3)):
        write(0)


def appenders(directory: Path, scale: float, seed: int) -> None:
    """Append records by four processes, in small and large writes; none is lost or torn (069)."""
    path, turns = directory / "f", int(500 * scale)
    path.touch()

    def record(own: int, turn: int) -> bytes:
        length = random.Random(f"{seed} {own} {turn}").choice((1, 50, 5000, 20_000))
        return b"%d %d %s\n" % (own, turn, b"x" * length)

    def append(own: int) -> None:
        with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            for turn in range(turns):
                data = record(own, turn)
                assert os.write(fd, data) == len(data)

    with (
        child(lambda: append(0)),
        child(lambda: append(1)),
        child(lambda: append(2)),
        child(lambda: append(3)),
    ):
        seen = 0
        for _ in range(turns):
            content = path.read_bytes()
            assert len(content) >= seen
            seen = len(content)
            assert content.count(b"\0") == 0
    following = [0] * 4
    for line in path.read_bytes().splitlines(keepends=True):
        own = int(line.split()[0])
        assert line == record(own, following[own])
        following[own] += 1
    assert following == [turns] * 4


def far_offsets(directory: Path, scale: float, seed: int) -> None:
    """Write around the powers of two up to 8 TiB, also by O_DIRECT and mappings (285, 394, 525)."""
    choose = random.Random(seed)
    path = directory / "f"
    there = {}
    buffer = aligned(2 * PAGE)
    with opened(path) as fd, opened(path, os.O_RDWR | os.O_DIRECT) as direct:
        for bits in range(31, int(31 + 12 * min(scale, 1))):
            for way in ("write", "direct", "map"):
                at = (1 << bits) + 4 * PAGE * ("write", "direct", "map").index(way) - PAGE
                data = choose.randbytes(2 * PAGE)
                there[at] = data
                buffer[:] = data
                if way == "write":
                    assert os.pwrite(fd, data, at) == len(data)
                elif way == "direct":
                    assert os.pwrite(direct, buffer, at) == len(data)
                else:
                    os.ftruncate(fd, at + len(data))
                    with closing(mmap.mmap(fd, len(data), offset=at)) as mapping:
                        mapping[:] = data
        for at, data in there.items():
            assert os.pread(fd, len(data), at) == data, hex(at)
            assert os.preadv(direct, [buffer], at) == len(data)
            assert buffer[:] == data, hex(at)
            assert os.pread(fd, PAGE, at + 3 * PAGE) in (b"", bytes(PAGE)), hex(at)
        assert os.fstat(fd).st_size == max(there) + 2 * PAGE


KINDS: dict[str, Callable[[Path, float, int], None]] = {
    kind.__name__: kind
    for kind in (
        names,
        listing_while_renaming,
        positions_in_a_listing,
        one_listing_for_two,
        direct_and_mapped,
        holes,
        private_holes,
        grown_and_mapped,
        direct_and_buffered,
        small_direct,
        appenders,
        far_offsets,
    )
}

if __name__ == "__main__":
    signal.alarm(int(sys.argv[5]) if len(sys.argv) > 5 else 0)
    KINDS[sys.argv[1]](Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
