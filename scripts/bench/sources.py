"""Try each kind of source: what lasts of a file's identity, and whether cleanfs finds its pages again.

Each source holds the same files. They are read through cleanfs, the kernel is made to drop its caches,
so that it forgets every inode, and they are read again. What the machine lacks (a program, or a file
system of the kernel) is skipped with a line. Programs: Debian's openssh-server, sshfs, rclone, bindfs,
mergerfs, ntfs-3g, squashfs-tools, erofs-utils, xfsprogs, btrfs-progs, dosfstools, exfatprogs.
"""

import contextlib
import hashlib
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cleanfs.linux import syscalls
from cleanfs.linux.mounts import mounted_at
from tests.harness import mounting, renumbering
from tests.harness.faulty import faulty
from tests.harness.mounting import MountedFs, mounted

FILES = 8
SIZE = 2 << 20
PROGRAM_SECONDS = 60
FORGETTING_SECONDS = 1.0
"""What FORGETs take to arrive."""

RACY_SECONDS = 2.5
"""How old a change must be for what is read then to be kept (docs/coherency.md)."""

LIFETIME = 900.0
"""Seconds after which a daemon is killed if this program has not ended."""

console = Console(width=140)


class MissingError(Exception):
    """Says that this machine cannot do that."""


def run(*command: str | Path) -> None:
    """Run a program. Raises MissingError if it is not there, or fails."""
    name = str(command[0])
    if shutil.which(name) is None:
        raise MissingError(f"no {name}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        said = [line for line in lines if "dmesg(1)" not in line] or [f"status {done.returncode}"]
        raise MissingError(said[-1] if said[-1].startswith(name) else f"{name}: {said[-1]}")


@contextmanager
def unmounted(path: Path) -> Iterator[Path]:
    """Unmount what is mounted there when the block ends."""
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=False, capture_output=True, timeout=30)


def fill(directory: Path) -> None:
    """Make the files; half of each compresses away. Their stamps are old."""
    for number in range(FILES):
        noise = random.Random(number).randbytes(SIZE // 2)
        path = directory / f"file{number}"
        path.write_bytes(b"".join(noise[i : i + 2048] + bytes(2048) for i in range(0, SIZE // 2, 2048)))
        os.utime(path, (1_600_000_000, 1_600_000_000))


def plain(base: Path) -> Path:
    """Make a directory with the files, on whatever /var/tmp is on."""
    path = base / "plain"
    if not path.exists():
        path.mkdir()
        fill(path)
    return path


# -- sources: each is given a directory of its own, and yields one with the files ----------------------


@contextmanager
def local(base: Path) -> Iterator[Path]:
    """Use the file system of /var/tmp."""
    yield plain(base)


@contextmanager
def tmpfs(base: Path) -> Iterator[Path]:
    """Mount a tmpfs."""
    with unmounted(base / "mnt") as mnt:
        run("mount", "-t", "tmpfs", "none", mnt)
        fill(mnt)
        yield mnt


def image(fs_type: str, *mkfs: str) -> Callable[[Path], AbstractContextManager[Path]]:
    """Mount a new file system, made by a program whose last argument is the image."""

    @contextmanager
    def source(base: Path) -> Iterator[Path]:
        file = base / "image"
        with file.open("wb") as made:
            made.truncate(400 << 20)
        run(*mkfs, file)
        with unmounted(base / "mnt") as mnt:
            run("mount", "-o", "loop", "-t", fs_type, file, mnt)
            fill(mnt)
            run("sync", "-f", mnt)
            yield mnt

    return source


def read_only_image(fs_type: str, *make: str) -> Callable[[Path], AbstractContextManager[Path]]:
    """Mount an image made by a program, to which ``%d`` is the directory, ``%i`` the image."""

    @contextmanager
    def source(base: Path) -> Iterator[Path]:
        named = {"%d": str(plain(base)), "%i": str(base / "image")}
        run(*(named.get(word, word) for word in make))
        with unmounted(base / "mnt") as mnt:
            run("mount", "-o", "loop,ro", "-t", fs_type, base / "image", mnt)
            yield mnt

    return source


def ntfs_3g(program: str) -> Callable[[Path], AbstractContextManager[Path]]:
    """Start one of the two servers of ntfs-3g."""

    @contextmanager
    def source(base: Path) -> Iterator[Path]:
        file = base / "image"
        with file.open("wb") as made:
            made.truncate(100 << 20)
        run("mkntfs", "-F", "-q", file)
        with unmounted(base / "mnt") as mnt:
            run(program, file, mnt)
            fill(mnt)
            yield mnt

    return source


def overlay(options: str = "", lower: str = "") -> Callable[[Path], AbstractContextManager[Path]]:
    """Mount overlayfs; ``lower`` is what serves the lower directory (``bindfs``), if anything."""

    @contextmanager
    def source(base: Path) -> Iterator[Path]:
        for name in ("upper", "work", "lower"):
            (base / name).mkdir()
        with unmounted(base / "lower"), unmounted(base / "mnt") as mnt:
            if lower:
                run(lower, plain(base), base / "lower")
            below = base / "lower" if lower else plain(base)
            where = f"lowerdir={below},upperdir={base}/upper,workdir={base}/work"
            run("mount", "-t", "overlay", "none", "-o", where + options, mnt)
            yield mnt

    return source


def serving(*command: str) -> Callable[[Path], AbstractContextManager[Path]]:
    """Start a FUSE server in the background; ``%s`` is the directory, ``%m`` where to mount."""

    @contextmanager
    def source(base: Path) -> Iterator[Path]:
        named = {"%s": str(plain(base)), "%m": str(base / "mnt")}
        with unmounted(base / "mnt") as mnt:
            run(*(named.get(word, word) for word in command))
            yield mnt

    return source


@contextmanager
def numbers_again(base: Path) -> Iterator[Path]:
    """Start the tests' own server, which gives numbers again."""
    with renumbering.renumbering(plain(base), base / "mnt", "again", "--whole-seconds") as source:
        yield source.path


@contextmanager
def passthrough(base: Path) -> Iterator[Path]:
    """Start the tests' pyfuse3 server: node ids are the numbers of the real files."""
    with faulty(plain(base), base / "mnt") as source:
        yield source.path


@contextmanager
def another_cleanfs(base: Path) -> Iterator[Path]:
    """Make a directory in a mount of ours, which keeps nothing itself."""
    (base / "below").mkdir()
    options = ("--page-cache", "0", "--backend", "none")
    with mounted(plain(base / "below").parent, base / "mnt", *options) as below:
        yield below.path / "plain"


def sshfs(latency_ms: float) -> Callable[[Path], AbstractContextManager[Path]]:
    """Mount sshfs from a server on this machine, behind a proxy: a round trip takes that long."""

    @contextmanager
    def source(base: Path) -> Iterator[Path]:
        if not Path("/usr/sbin/sshd").exists():
            raise MissingError("no sshd")
        for name in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", base / name)
        Path("/run/sshd").mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        settings = (
            f"ListenAddress 127.0.0.1:{port}\nHostKey {base}/host\nAuthorizedKeysFile {base}/user.pub\n"
            f"StrictModes no\nPidFile {base}/pid\nUsePAM no\nPasswordAuthentication no\n"
            "PermitRootLogin yes\nSubsystem sftp internal-sftp\n"
        )
        (base / "config").write_text(settings)
        server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", base / "config", "-E", base / "log"])
        options = f"IdentityFile={base}/user,StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null"
        try:
            with delaying(port, latency_ms) as front, unmounted(base / "mnt") as mnt:
                run(
                    *("sshfs", "-p", str(front), "-o", options, "-o", "LogLevel=ERROR"),
                    *(f"root@127.0.0.1:{plain(base)}", mnt),
                )
                yield mnt
        finally:
            server.terminate()
            server.wait(30)

    return source


@contextmanager
def delaying(port: int, milliseconds: float) -> Iterator[int]:
    """Open a port that leads to ``port``, later. Its threads end with the connections."""
    if not milliseconds:
        yield port
        return
    listener = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, target: socket.socket) -> None:
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def deliver() -> None:
            data = b"-"
            while data:
                due, data = under_way.get()
                time.sleep(max(0, due - time.monotonic()))
                with contextlib.suppress(OSError):
                    target.sendall(data) if data else target.shutdown(socket.SHUT_WR)

        threading.Thread(target=deliver, daemon=True).start()
        data = b"-"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            under_way.put((time.monotonic() + milliseconds / 2000, data))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", port))
                for pair in ((near, far), (far, near)):
                    pair[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.close()


SOURCES: dict[str, Callable[[Path], AbstractContextManager[Path]]] = {
    "/var/tmp": local,
    "ext4": image("ext4", "mkfs.ext4", "-q", "-F"),
    "xfs": image("xfs", "mkfs.xfs", "-q", "-f"),
    "btrfs": image("btrfs", "mkfs.btrfs", "-q", "-f"),
    "tmpfs": tmpfs,
    "overlay": overlay(),
    "overlay, nfs_export": overlay(",index=on,nfs_export=on"),
    "overlay on bindfs": overlay(lower="bindfs"),
    "squashfs": read_only_image("squashfs", "mksquashfs", "%d", "%i", "-quiet", "-no-progress"),
    "erofs": read_only_image("erofs", "mkfs.erofs", "%i", "%d"),
    "vfat": image("vfat", "mkfs.vfat"),
    "exfat": image("exfat", "mkfs.exfat"),
    "ntfs-3g": ntfs_3g("ntfs-3g"),
    "lowntfs-3g": ntfs_3g("lowntfs-3g"),
    "bindfs": serving("bindfs", "%s", "%m"),
    "mergerfs": serving("mergerfs", "%s", "%m"),
    "rclone": serving("rclone", "mount", "--config", "/dev/null", "--daemon", "%s", "%m"),
    "pyfuse3 passthrough": passthrough,
    "a server that gives numbers again": numbers_again,
    "cleanfs": another_cleanfs,
    "sshfs": sshfs(0),
    "sshfs, 5 ms": sshfs(5),
}


# -- the trial ---------------------------------------------------------------------------------------


def identities(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Return number and file handle of each file, as the source gives them now."""
    found = {}
    for number in range(FILES):
        fd = os.open(directory / f"file{number}", os.O_PATH)
        try:
            found[f"file{number}"] = os.fstat(fd).st_ino, syscalls.event_handle(fd)
        finally:
            os.close(fd)
    return found


@dataclass
class Trial:
    """Holds one source, while it is tried."""

    name: str
    source: Path
    fs: MountedFs
    identities: dict[str, tuple[int, bytes]]
    seconds: float
    digest: str
    before: dict[str, Any]

    def row(self) -> list[str]:
        """Make the second pass, and return what it says."""
        begun = time.perf_counter()
        digest = read(self.fs.path)
        seconds = time.perf_counter() - begun
        assert digest == self.digest, f"{self.name}: other bytes"
        after = self.fs.stats()
        now = identities(self.source)
        number = all(now[name][0] == self.identities[name][0] for name in now)
        handles = {now[name][1] == self.identities[name][1] for name in now}
        handle = "no" if False in handles else "yes"
        handle = handle if self.identities["file0"][1] else "none"
        st = (self.source / "file0").stat()
        point = mounted_at(str(self.source)) or mounted_at(str(self.source.parent))
        return [
            self.name,
            point.fs_type if point else "",
            "yes" if number else "no",
            handle,
            "mtime" if st.st_ctime_ns == st.st_mtime_ns else "own",
            str(after["identity"]),
            f"{after['source_read_bytes'] - self.before['source_read_bytes']:,}",
            f"{seconds / self.seconds:.2f}",
        ]


def read(mountpoint: Path) -> str:
    """Read all files. Returns a digest of them."""
    digest = hashlib.sha256()
    for number in range(FILES):
        digest.update((mountpoint / f"file{number}").read_bytes())
    return digest.hexdigest()


def begin(name: str, base: Path, stack: ExitStack) -> Trial:
    """Make a source and read it once. MissingError, OSError, AssertionError: it cannot be tried."""
    (base / "mnt").mkdir(parents=True)
    (base / "clean").mkdir()
    with ExitStack() as own:
        source = own.enter_context(SOURCES[name](base))
        made = max((source / f"file{number}").stat().st_ctime for number in range(FILES))
        time.sleep(max(0, made + RACY_SECONDS - time.time()))
        ids = identities(source)
        fs = own.enter_context(
            mounted(source, base / "clean", "--page-cache", "1M", "--pool-limit", "64M")
        )
        begun = time.perf_counter()
        digest = read(fs.path)
        trial = Trial(name, source, fs, ids, time.perf_counter() - begun, digest, fs.stats())
        stack.push(own.pop_all())
        return trial


def drop_caches() -> None:
    """Drop them several times: a file can be forgotten only after the one in the mount on it."""
    for _ in range(3):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        time.sleep(FORGETTING_SECONDS)


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SOURCES)), help="All by default.")
@click.option("--markdown", is_flag=True, help="Print the table as the documents have it.")
def main(only: tuple[str, ...], markdown: bool) -> None:
    """Read each source twice through cleanfs, with the kernel's caches dropped in between."""
    if os.geteuid() != 0:
        raise click.UsageError("needs root, to mount file systems")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # all is unmounted then, too
    mounting.LIFETIME = LIFETIME
    table = Table(
        "source", "type", "number lasts", "handle lasts", "ctime", "known by", "bytes", "time"
    )
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="cleanfs-sources-", dir="/var/tmp") as top,
        ExitStack() as all_,
    ):
        trials = []
        for index, name in enumerate(only or SOURCES):
            try:
                trials.append(begin(name, Path(top).resolve() / str(index), all_))
            except (MissingError, OSError, AssertionError) as exc:
                console.print(f"{name}: skipped: {exc}", highlight=False)
        drop_caches()
        rows = [trial.row() for trial in trials]
    for row in rows:
        table.add_row(*row)
        if markdown:
            print("| " + " | ".join(row) + " |")
    if not markdown:
        console.print(table)
    console.print("bytes: of data that the second pass read from the source; time: of the first pass")


if __name__ == "__main__":
    main(prog_name="scripts/run bench/sources")
