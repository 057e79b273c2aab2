"""Run programs that change a directory and report their progress, and check afterwards for losses.

A client is a process of its own: ``python load.py KIND DIRECTORY REPORT SEED``. Its turn ``n`` follows
from kind, seed and ``n``. After a turn it appends to the file REPORT

    a N  every system call of turn N has returned
    f N  all turns up to N were also synced
    e E  it ended with that errno (0: another kind of error, which follows)

A write-through mount may lose no reported turn, however its daemon ends. A mount with a write-back
cache may lose only turns after the last ``f``. Any part of the turn in progress may be done.
"""

import errno
import mmap
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

SLOTS, SLOT = 16, 10_000
"""The number of blocks in files written in place, and their size in bytes."""

UNCHANGED = 64
"""The number of files that no client changes, for the client that reads."""


def block(kind: str, seed: int, turn: int) -> bytes:
    """Make the data that a client writes in a turn: always different, of many lengths up to SLOT."""
    random = Random(f"{kind} {seed} {turn}")
    words = random.randbytes(40) if random.random() < 0.5 else f"{kind} {turn}/".encode()
    return (words * (SLOT // len(words) + 1))[: random.randrange(1, SLOT)]


def slot_of(kind: str, seed: int, turn: int) -> int:
    """Return the slot that a client writes in place in a turn."""
    return Random(f"slot {kind} {seed} {turn}").randrange(SLOTS)


def unchanged(number: int) -> bytes:
    """Make the content of a file that no client changes."""
    random = Random(number)
    unit = random.randbytes(4096 if number % 2 else 100)
    return (unit * (65536 // len(unit) + 1))[: random.randrange(65536)]


class Client:
    """Does the work of one kind of client in ``turn``, and looks for losses in ``missing``."""

    name: str
    changes_names_only = False
    """Whether its changes never stay in a write-back cache."""

    def __init__(self, directory: str, seed: int) -> None:
        self.directory, self.seed = directory, seed
        self.path = f"{directory}/{self.name}"

    def block(self, turn: int) -> bytes:
        return block(self.name, self.seed, turn)

    def begin(self) -> None:
        """Open the files of the client."""

    def turn(self, number: int) -> bool:
        """Do the work of a turn. Return whether it is synced."""
        raise NotImplementedError

    def missing(self, done: int, begun: int) -> str | None:
        """Describe the loss in the directory after ``done`` confirmed turns, or return None.

        Later turns below ``begun`` may have been done completely, in part or not at all.
        """
        raise NotImplementedError


class Append(Client):
    """Appends with O_APPEND."""

    name = "append"

    def begin(self) -> None:
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def turn(self, number: int) -> bool:
        data = self.block(number)
        write_all(self.fd, data)
        if number % 4 == 3:
            os.fsync(self.fd)
        return number % 4 == 3

    def missing(self, done: int, begun: int) -> str | None:
        data = read(self.path)
        whole = b"".join(map(self.block, range(done)))
        if not data.startswith(whole):
            return f"{len(whole)} bytes were appended; {len(data)} are there, {same(data, whole)} right"
        if begun == done + 1 and not (whole + self.block(done)).startswith(data):
            return f"{len(data)} bytes are there, more than were written"
        return None


class InPlace(Client):
    """Overwrites blocks, with an fdatasync every fourth turn."""

    name = "inplace"

    def begin(self) -> None:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def turn(self, number: int) -> bool:
        at = slot_of(self.name, self.seed, number) * SLOT
        data = self.block(number)
        os.lseek(self.fd, at, os.SEEK_SET)
        write_all(self.fd, data)
        assert os.pread(self.fd, len(data), at) == data, "the data read differs from the data written"
        if number % 4 == 3:
            os.fdatasync(self.fd)
        return number % 4 == 3

    def missing(self, done: int, begun: int) -> str | None:
        data = read(self.path).ljust(SLOTS * SLOT, b"\0")
        expected = [bytes(SLOT)] * SLOTS
        for number in range(done):
            self._write(expected, number)
        allowed = [[content] for content in expected]
        for number in range(done, begun):
            slot = self._write(expected, number)
            allowed[slot].append(expected[slot])
        for slot, contents in enumerate(allowed):
            found = data[slot * SLOT : (slot + 1) * SLOT]
            if found not in contents and not mixed(found, contents):
                return f"slot {slot}: {same(found, contents[0])} of {SLOT} bytes are right"
        return None

    def _write(self, slots: list[bytes], number: int) -> int:
        slot = slot_of(self.name, self.seed, number)
        data = self.block(number)
        slots[slot] = data + slots[slot][len(data) :]
        return slot


class Mapped(InPlace):
    """Writes through a shared mapping, with msync."""

    name = "mapped"

    def begin(self) -> None:
        super().begin()
        os.ftruncate(self.fd, SLOTS * SLOT)
        self.map = mmap.mmap(self.fd, SLOTS * SLOT)

    def turn(self, number: int) -> bool:
        at = slot_of(self.name, self.seed, number) * SLOT
        data = self.block(number)
        self.map[at : at + len(data)] = data
        self.map.flush()
        return True


class Replace(Client):
    """Saves as careful programs do: write, fsync, rename, fsync of the directory."""

    name = "replace"

    def turn(self, number: int) -> bool:
        new = os.open(self.path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(new, self.block(number))
            os.fsync(new)
        finally:
            os.close(new)
        os.rename(self.path + ".new", self.path)
        parent = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        return True

    def missing(self, done: int, begun: int) -> str | None:
        if not done:
            return None
        data = read(self.path)
        if data in (self.block(number) for number in range(done - 1, begun)):
            return None
        return "this is not the file last renamed to this name"


class Names(Client):
    """Creates, renames and removes names."""

    name = "names"
    changes_names_only = True

    def begin(self) -> None:
        os.mkdir(self.path)

    def turn(self, number: int) -> bool:
        self.apply(self.path, number)
        return True

    def apply(self, top: str, number: int) -> None:
        """Make one operation on a name; which one depends on the existing names."""
        random = Random(f"{self.seed} {number}")
        path, other = (f"{top}/{random.randrange(12)}" for _ in range(2))
        if not os.path.lexists(path):
            choice = random.randrange(4)
            if choice == 0:
                os.mkdir(path)
            elif choice == 1:
                os.symlink(f"target {number}", path)
            elif choice == 2 and os.path.isfile(other) and not os.path.islink(other):
                os.link(other, path)
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 + number % 64))
        elif not os.path.lexists(other):
            os.rename(path, other)
        elif os.path.isdir(path) and not os.path.islink(path):
            os.rmdir(path)
        else:
            os.unlink(path)

    def missing(self, done: int, begun: int) -> str | None:
        twin = f"{self.path}.twin"
        os.mkdir(twin)
        try:
            states = []
            for number in range(begun):
                if number >= done:
                    states.append(tree(twin))
                self.apply(twin, number)
            states.append(tree(twin))
        finally:
            shutil.rmtree(twin)
        found = tree(self.path) if os.path.isdir(self.path) else []
        return None if found in states else f"{found} instead of {states[0]}"


class Sqlite(Client):
    """Writes to a database with a rollback journal."""

    name = "sqlite"
    journal = "delete"

    def begin(self) -> None:
        self.db = sqlite3.connect(self.path, isolation_level=None)
        self.db.execute(f"PRAGMA journal_mode={self.journal}")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, data BLOB)")

    def turn(self, number: int) -> bool:
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute("INSERT INTO t VALUES (?, ?)", (number, self.block(number)))
        self.db.execute("COMMIT")
        return True

    def missing(self, done: int, begun: int) -> str | None:
        if not done:
            return None
        copies = Path(f"{self.path}.copies")
        copies.mkdir()
        try:
            for suffix in ("", "-wal", "-journal"):
                if os.path.exists(self.path + suffix):
                    shutil.copy(self.path + suffix, copies / ("db" + suffix))
            with closing(sqlite3.connect(copies / "db")) as db:
                [(verdict,)] = db.execute("PRAGMA integrity_check").fetchall()
                rows = db.execute("SELECT n, data FROM t ORDER BY n").fetchall()
        finally:
            shutil.rmtree(copies)
        if verdict != "ok":
            return f"integrity check: {verdict}"
        if [n for n, _ in rows] not in [list(range(count)) for count in range(done, begun + 1)]:
            return f"{done} transactions were committed; {len(rows)} rows are there"
        return next((f"row {n} is wrong" for n, data in rows if data != self.block(n)), None)


class SqliteWal(Sqlite):
    """Writes to a database with a write-ahead log, and so with shared memory in a mapped file."""

    name = "wal"
    journal = "wal"


class Reader(Client):
    """Reads the unchanged files through page cache and cleancache."""

    name = "reader"

    def turn(self, number: int) -> bool:
        number_of_file = Random(f"{self.seed} {number}").randrange(UNCHANGED)
        fd = os.open(f"{self.directory}/unchanged/{number_of_file}", os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # else the kernel would serve the read
            data = b"".join(iter(lambda: os.read(fd, 131072), b""))
        finally:
            os.close(fd)
        assert data == unchanged(number_of_file), (
            f"unchanged/{number_of_file}: {len(data)} bytes differ"
        )
        return True

    def missing(self, done: int, begun: int) -> str | None:
        return None


CLIENTS: dict[str, type[Client]] = {
    kind.name: kind for kind in (Append, InPlace, Mapped, Replace, Names, Sqlite, SqliteWal, Reader)
}


def make_unchanged(directory: Path) -> None:
    """Make the files for ``Reader``."""
    (directory / "unchanged").mkdir(parents=True)
    for number in range(UNCHANGED):
        (directory / "unchanged" / str(number)).write_bytes(unchanged(number))


@dataclass(frozen=True)
class Progress:
    """Holds the reported progress of a client."""

    done: int = 0
    """Turns that returned."""
    synced: int = 0
    """Turns that were synced."""
    error: str | None = None
    """The error that ended it: an errno's name or a sentence. None: it runs, or was killed."""


def read_progress(path: Path) -> Progress:
    """Read the progress of a client so far, from complete lines."""
    done = synced = 0
    error = None
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines(keepends=True):
        kind, _, rest = line.partition(" ")
        if not line.endswith("\n"):
            break
        if kind == "a":
            done = int(rest) + 1
        elif kind == "f":
            synced = int(rest) + 1
        else:
            number, _, message = rest.strip().partition(" ")
            error = errno.errorcode[int(number)] if int(number) else message
    return Progress(done, synced, error)


def lost(
    kind: str, directory: Path, progress: Progress, seed: int, writeback: bool = False
) -> str | None:
    """Describe a confirmed change that is not in the source, or return None."""
    client = CLIENTS[kind](str(directory), seed)
    done = progress.synced if writeback and not client.changes_names_only else progress.done
    wrong = client.missing(done, progress.done + 1)
    return None if wrong is None else f"{kind}, {done} turns confirmed: {wrong}"


def read(path: str) -> bytes:
    """Return the content of a file, or nothing if it does not exist."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return b""


def write_all(fd: int, data: bytes) -> None:
    """Write all data: a write may be short, for example if the daemon dies in the middle of it."""
    while data:
        data = data[os.write(fd, data) :]


def same(found: bytes, expected: bytes) -> int:
    """Count the bytes that are right."""
    return sum(a == b for a, b in zip(found, expected, strict=False))


def mixed(found: bytes, contents: list[bytes]) -> bool:
    """Return whether every byte comes from one of the contents."""
    return all(byte in column for byte, *column in zip(found, *contents, strict=True))


def tree(top: str) -> list[tuple[str, int, int, str]]:
    """Return name, mode, link count and target of all entries of a directory."""

    def entries() -> Iterator[tuple[str, int, int, str]]:
        for entry in os.scandir(top):
            st = entry.stat(follow_symlinks=False)
            target = os.readlink(entry.path) if entry.is_symlink() else ""
            yield entry.name, st.st_mode, st.st_nlink, target

    return sorted(entries())


def main(kind: str, directory: str, report: str, seed: str) -> None:
    """Run one turn after another until a call fails."""
    out = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    client = CLIENTS[kind](directory, int(seed))
    number = 0
    try:
        client.begin()
        while True:
            synced = client.turn(number)
            os.write(out, f"a {number}\nf {number}\n".encode() if synced else f"a {number}\n".encode())
            number += 1
    except sqlite3.OperationalError as exc:
        os.write(out, f"e 0 sqlite: {exc}\n".encode())
    except OSError as exc:
        os.write(out, f"e {exc.errno}\n".encode())
    except AssertionError as exc:
        os.write(out, f"e 0 wrong data: {exc}\n".encode())
    os._exit(0)  # a destructor could wait for a dead mount


if __name__ == "__main__":
    main(*sys.argv[1:])
