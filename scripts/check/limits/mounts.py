"""1,000 mounts and unmounts leave nothing: no process, mount, connection, descriptor or file.

Most are made by a child of this process that has loaded cleanfs already, as starting Python takes
longer than the rest; some by the command line. Then some more one after the other in one process.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cleanfs.mount.config import MountConfig
from cleanfs.mount.mount import serve
from tests.harness import mounting

from .lab import Lab

CONNECTIONS = Path("/sys/fs/fuse/connections")


def run(lab: Lab) -> None:
    """See the module."""
    source, point = lab.directory("source"), lab.directory("mnt")
    temporary = lab.directory("tmp")
    for i in range(100):
        (source / f"f{i}").write_bytes(b"x" * 5000)
    with _fusectl(), _in_directory(temporary):
        before = _traces(point)
        by_command, forked, in_one = lab.pick(20, 5), lab.pick(980, 50), lab.pick(100, 30)
        start = time.monotonic()
        for i in range(by_command):
            _by_command(source, point, kill=i % 10 == 9)
        each = (time.monotonic() - start) / by_command
        lab.inform(f"{by_command} mounts and unmounts by command", f"{each * 1000:.0f} ms each")
        start = time.monotonic()
        for i in range(forked):
            _forked(source, point, kill=i % 10 == 9)
        each = (time.monotonic() - start) / forked
        lab.inform(f"{forked} by children, a tenth of them killed", f"{each * 1000:.0f} ms each")
        after = _traces(point)
        for what, count in after.items():
            if what != "fuse_inode":
                lab.at_most(f"{what} left", count - before[what], 0)
        lab.inform(
            "fuse_inode objects in the kernel's slab",
            f"{before['fuse_inode']} -> {after['fuse_inode']}",
        )
        lab.same("temporary files left", os.listdir(temporary), [])
        _in_one_process(lab, source, point, in_one)
        lab.same("mounts left in the end", _traces(point)["mounts"] - before["mounts"], 0)


def _by_command(source: Path, point: Path, *, kill: bool) -> None:
    mounting.cleanfs("mount", "--log-file", "/dev/null", source, point, timeout=60).check_returncode()
    _use(point)
    if kill:
        os.kill(json.loads((point / ".cleancache" / "stats.json").read_text())["pid"], signal.SIGKILL)
        subprocess.run(["umount", point], check=True, timeout=60)
    else:
        mounting.cleanfs("umount", point, timeout=60).check_returncode()


def _use(point: Path) -> None:
    for i in range(0, 100, 7):
        assert len((point / f"f{i}").read_bytes()) == 5000
    assert len(os.listdir(point)) == 100


def _serve(source: Path, point: Path, ready: int) -> None:
    def tell() -> None:
        os.write(ready, b"!")

    serve(MountConfig(str(source), str(point), pool_limit=8 << 20), tell)


def _forked(source: Path, point: Path, *, kill: bool) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _serve(source, point, writer)
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    _use(point)
    if kill:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    subprocess.run(["umount", point], check=True, timeout=60)
    if not kill:
        os.waitpid(pid, 0)


def _in_one_process(lab: Lab, source: Path, point: Path, count: int) -> None:
    """Find what one process keeps of mounts that it had."""
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(
        target=_many_in_this_process, args=(source, point, count, send)
    )
    child.start()
    send.close()
    try:
        first, last = receive.recv(), receive.recv()
        child.join(60)
    finally:
        child.kill()
    for what in first:
        if what == "rss":
            kib = (last[what] - first[what]) / count
            # No promise: a daemon serves one mount, and ends.
            lab.inform(f"memory that each of {count} mounts in one process leaves", f"{kib:.0f} KiB")
        else:
            lab.same(f"{what} left by {count} mounts in one process", last[what] - first[what], 0)


def _many_in_this_process(source: Path, point: Path, count: int, send: object) -> None:
    for i in range(count + 10):
        if i in (9, count + 9):
            send.send(_own_figures(point))  # type: ignore[attr-defined]  # the end of a pipe
        reader, writer = os.pipe()
        user = threading.Thread(target=_use_and_unmount, args=(point, reader))
        user.start()
        _serve(source, point, writer)
        user.join()
        os.close(writer)
        os.close(reader)


def _use_and_unmount(point: Path, ready: int) -> None:
    os.read(ready, 1)
    script = (
        "import os,sys\n"
        "for i in range(0,100,7): open(f'{sys.argv[1]}/f{i}').read()\n"
        "assert len(os.listdir(sys.argv[1])) == 100"
    )
    subprocess.run([sys.executable, "-I", "-S", "-c", script, point], check=True, timeout=60)
    subprocess.run(["umount", point], check=True, timeout=60)


def _own_figures(point: Path) -> dict[str, int]:
    deadline = time.monotonic() + 15
    while len(os.listdir("/proc/self/task")) > 2 and time.monotonic() < deadline:
        time.sleep(0.5)  # worker threads live for 10 idle seconds
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "rss": int(status["VmRSS"].split()[0]),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": Path("/proc/self/mountinfo").read_text().count(str(point)),
    }


def _traces(point: Path) -> dict[str, int]:
    """Count what a mount could leave on this machine; other mounts may come and go."""
    mountinfo = Path("/proc/self/mountinfo").read_text()
    return {
        "mounts": mountinfo.count(str(point)),
        "connections": len(_own_connections(point)),
        "processes": _processes(point),
        "own descriptors": len(os.listdir("/proc/self/fd")),
        "own threads": len(os.listdir("/proc/self/task")),
        "fuse_inode": _slab("fuse_inode"),
    }


def _own_connections(point: Path) -> set[str]:
    """Return connections that no mount in sight has: those of mounts that are gone."""
    with contextlib.suppress(OSError):
        minors = {
            line.split()[2].partition(":")[2]
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
        }
        time.sleep(0.5)  # for those that others make just now
        return {name for name in os.listdir(CONNECTIONS) if name not in minors}
    return set()


def _processes(point: Path) -> int:
    count = 0
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            count += str(point).encode() in entry.read_bytes()
    return count


def _slab(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/slabinfo").read_text().splitlines():
            if line.startswith(name + " "):
                return int(line.split()[1])
    return -1


@contextlib.contextmanager
def _fusectl() -> Iterator[None]:
    """Mount it, where it is not mounted, for as long as we look."""
    if os.path.ismount(CONNECTIONS):
        yield
        return
    subprocess.run(["mount", "-t", "fusectl", "none", CONNECTIONS], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", CONNECTIONS], check=True)


@contextlib.contextmanager
def _in_directory(temporary: Path) -> Iterator[None]:
    before = tempfile.tempdir
    os.environ["TMPDIR"] = str(temporary)
    tempfile.tempdir = None
    try:
        yield
    finally:
        del os.environ["TMPDIR"]
        tempfile.tempdir = before
