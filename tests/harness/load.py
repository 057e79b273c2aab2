"""Programs that change a directory and say what was confirmed; and whether all of that is there.

A client is a process of its own: ``python load.py KIND DIRECTORY SAID SEED``. What it does in its turn
``n`` follows from kind, seed and ``n``. After a turn it appends to the file SAID

    a N  every system call of turn N has returned
    f N  all turns up to N were synced, too
    e E  it ended with that errno (0: another kind of error, which follows)

A mount that writes through may lose nothing of what was said, whatever becomes of its daemon; one with
a writeback cache only what came after the last ``f``. Of the turn that had begun any part may be done.
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
"""Blocks of the files that are written in place, and their bytes."""

SETTLED = 64
"""Files that nobody changes, for the client that reads."""


def block(kind: str, seed: int, turn: int) -> bytes:
    """What a client writes in a turn: never the same twice, of many lengths up to SLOT."""
    random = Random(f"{kind} {seed} {turn}")
    words = random.randbytes(40) if random.random() < 0.5 else f"{kind} {turn}/".encode()
    return (words * (SLOT // len(words) + 1))[: random.randrange(1, SLOT)]


def slot_of(kind: str, seed: int, turn: int) -> int:
    """Where the clients that write in place do it."""
    return Random(f"slot {kind} {seed} {turn}").randrange(SLOTS)


def settled(number: int) -> bytes:
    """A file that nobody changes."""
    random = Random(number)
    unit = random.randbytes(4096 if number % 2 else 100)
    return (unit * (65536 // len(unit) + 1))[: random.randrange(65536)]


class Client:
    """A kind of client; ``turn`` does the work, ``missing`` looks for it afterwards."""

    name: str
    changes_names_only = False
    """What it does is never in a writeback cache."""

    def __init__(self, directory: str, seed: int) -> None:
        self.directory, self.seed = directory, seed
        self.path = f"{directory}/{self.name}"

    def block(self, turn: int) -> bytes:
        return block(self.name, self.seed, turn)

    def begin(self) -> None:
        """Open what is needed."""

    def turn(self, number: int) -> bool:
        """Do something; whether it is synced."""
        raise NotImplementedError

    def missing(self, done: int, begun: int) -> str | None:
        """What is wrong with the directory if the turns below ``done`` were confirmed, for people.

        The turns from there on up to below ``begun`` may have been done, in part or not at all.
        """
        raise NotImplementedError


class Append(Client):
    """O_APPEND."""

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
    """pwrite, fdatasync now and then."""

    name = "inplace"

    def begin(self) -> None:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def turn(self, number: int) -> bool:
        at = slot_of(self.name, self.seed, number) * SLOT
        data = self.block(number)
        os.lseek(self.fd, at, os.SEEK_SET)
        write_all(self.fd, data)
        assert os.pread(self.fd, len(data), at) == data, "read is not what was written"
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
    """A shared mapping, msync."""

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
    """Write, fsync, rename, fsync of the directory: how careful programs save."""

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
        return "it is not the file that was renamed to this name last"


class Names(Client):
    """Names come, move and go."""

    name = "names"
    changes_names_only = True

    def begin(self) -> None:
        os.mkdir(self.path)

    def turn(self, number: int) -> bool:
        self.apply(self.path, number)
        return True

    def apply(self, top: str, number: int) -> None:
        """One operation on a name; which one depends on what is there."""
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
    """A database with a rollback journal."""

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
    """A database with a write-ahead log, and so with shared memory in a mapping of a file."""

    name = "wal"
    journal = "wal"


class Reader(Client):
    """Reads what nobody changes, through page cache and cleancache."""

    name = "reader"

    def turn(self, number: int) -> bool:
        which = Random(f"{self.seed} {number}").randrange(SETTLED)
        fd = os.open(f"{self.directory}/settled/{which}", os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # or the kernel would answer
            data = b"".join(iter(lambda: os.read(fd, 131072), b""))
        finally:
            os.close(fd)
        assert data == settled(which), f"settled/{which}: {len(data)} bytes, not what it holds"
        return True

    def missing(self, done: int, begun: int) -> str | None:
        return None


CLIENTS: dict[str, type[Client]] = {
    kind.name: kind for kind in (Append, InPlace, Mapped, Replace, Names, Sqlite, SqliteWal, Reader)
}


def make_settled(directory: Path) -> None:
    """What the reader reads."""
    (directory / "settled").mkdir(parents=True)
    for number in range(SETTLED):
        (directory / "settled" / str(number)).write_bytes(settled(number))


@dataclass(frozen=True)
class Said:
    """What a client has said."""

    done: int = 0
    """Turns that returned."""
    synced: int = 0
    """Turns that were synced."""
    error: str | None = None
    """With what it ended: an errno's name, or a sentence. None: it runs, or was killed."""


def said(path: Path) -> Said:
    """What a client has said so far, of whole lines."""
    done = synced = 0
    error = None
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines(keepends=True):
        what, _, rest = line.partition(" ")
        if not line.endswith("\n"):
            break
        if what == "a":
            done = int(rest) + 1
        elif what == "f":
            synced = int(rest) + 1
        else:
            number, _, message = rest.strip().partition(" ")
            error = errno.errorcode[int(number)] if int(number) else message
    return Said(done, synced, error)


def lost(kind: str, directory: Path, said: Said, seed: int, writeback: bool = False) -> str | None:
    """What was confirmed to a client and is not in the source, for people."""
    client = CLIENTS[kind](str(directory), seed)
    done = said.synced if writeback and not client.changes_names_only else said.done
    wrong = client.missing(done, said.done + 1)
    return None if wrong is None else f"{kind}, {done} turns confirmed: {wrong}"


def read(path: str) -> bytes:
    """The content; nothing of a file that is not there."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return b""


def write_all(fd: int, data: bytes) -> None:
    """A write may come short, for one when the daemon dies in the middle of it."""
    while data:
        data = data[os.write(fd, data) :]


def same(found: bytes, expected: bytes) -> int:
    """Bytes that are right."""
    return sum(a == b for a, b in zip(found, expected, strict=False))


def mixed(found: bytes, contents: list[bytes]) -> bool:
    """Whether every byte is of one of the contents."""
    return all(byte in column for byte, *column in zip(found, *contents, strict=True))


def tree(top: str) -> list[tuple[str, int, int, str]]:
    """Name, mode, links and target of all that is in a directory."""

    def entries() -> Iterator[tuple[str, int, int, str]]:
        for entry in os.scandir(top):
            st = entry.stat(follow_symlinks=False)
            target = os.readlink(entry.path) if entry.is_symlink() else ""
            yield entry.name, st.st_mode, st.st_nlink, target

    return sorted(entries())


def main(kind: str, directory: str, said_path: str, seed: str) -> None:
    """Turn after turn until something fails."""
    out = os.open(said_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
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
    os._exit(0)  # no destructor that would wait for a dead mount


if __name__ == "__main__":
    main(*sys.argv[1:])
