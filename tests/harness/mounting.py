"""Make real mounts for tests as a user would, with a limit on every wait and a clean-up in any case."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import pytest

from cleanfs.linux.fusectl import open_connections
from cleanfs.linux.mounts import mounted_at
from tests.harness import machine, uring, zygote
from tests.harness.machine import Deadline

START_TIMEOUT = 20.0
STOP_TIMEOUT = 20.0
LIFETIME = 100.0
"""Seconds that a daemon may run after a test began or got more time. Then it is killed, even if it
hangs in a system call on its mount."""

Process = subprocess.Popen[bytes] | zygote.Started

watchdogs: list[subprocess.Popen[bytes]] = []
"""The processes of ``killed_after`` that are waiting."""


def cleanfs(*args: str | Path, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run a command line of cleanfs."""
    if zygote.in_use:
        return zygote.run([str(arg) for arg in args], timeout)
    return subprocess.run(
        [sys.executable, "-m", "cleanfs", *map(str, args)],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=timeout,
        check=False,
    )


def end_of(process: subprocess.Popen[Any] | zygote.Started, timeout: float = STOP_TIMEOUT) -> int:
    """Return the status of a process. It must end within ``timeout`` seconds on an idle machine."""
    assert ends(process, timeout), "the process does not end"
    return process.wait(0)


def start(
    module: str,
    arguments: Iterable[str | Path],
    output: IO[bytes],
    *,
    prefix: tuple[str, ...] = (),
    patch: str = "",
) -> Process:
    """Start a module as ``python -m`` does, with its output in a file, from the zygote if possible.

    ``patch`` is code that runs first, in a ``cleanfs``.
    """
    words = [str(argument) for argument in arguments]
    if zygote.in_use and not prefix:
        return zygote.zygote().start(module, words, output.fileno(), output.fileno(), patch=patch)
    program = patched_program(patch) if patch else [sys.executable, "-m", module]
    return subprocess.Popen(
        [*prefix, *program, *words],
        stdout=output,
        stderr=output,
        stdin=subprocess.DEVNULL,
        cwd=zygote.CHECKOUT if module.startswith("tests.") else None,
    )


def patched_program(patch: str) -> list[str]:
    """Return the command of a ``cleanfs`` that runs some code first."""
    code = f"{zygote.PATCH_IMPORTS}\n{patch}\ncli.main()\n"
    return [sys.executable, "-c", code]


def command_line(*args: str | Path) -> list[str]:
    """Return a command in a process of its own, for cases that a fork of the zygote cannot cover.

    As in the zygote, ``list`` asks only the mounts of this test process: calls would disturb others.
    """
    own_mounts = (
        "every = cli.mount_points\n"
        f"cli.mount_points = lambda: [p for p in every() if p.path.startswith({zygote.below!r})]"
    )
    program = patched_program(own_mounts) if "list" in args else [sys.executable, "-m", "cleanfs"]
    return [*program, *map(str, args)]


def forked_command_line(*args: str | Path) -> list[str]:
    """Return a command that shares locale, namespaces and user with the zygote, but nothing else."""
    return zygote.zygote().command(*args) if zygote.in_use else command_line(*args)


def is_mounted(path: Path) -> bool:
    """Return whether a file system is mounted on ``path``; works for a dead mount too."""
    return mount_line(path) is not None


def mount_line(path: Path, proc: Path = Path("/proc/self")) -> str | None:
    """Return the mountinfo line of the topmost mount on a path, as a process sees it."""
    lines = (proc / "mountinfo").read_bytes().decode(errors="surrogateescape").split("\n")
    escaped = re.sub(r"[\\ \t\n#]", lambda match: f"\\{ord(match[0]):03o}", str(path))
    found = [line for line in lines if line and line.split(" ")[4] == escaped]
    return found[-1] if found else None


@contextmanager
def tmpfs(path: Path) -> Iterator[None]:
    """Mount a tmpfs on a directory, which is made if need be, until the end of the block."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True, timeout=30)


def mount_namespace() -> list[str]:
    """Return the prefix of a command that runs in a mount namespace of its own, which takes root.

    Skip the test where this is impossible: in a chroot whose root is not a mount point, unshare(1)
    cannot make the mounts private.
    """
    unshare = ["unshare", "--mount"]
    tried = subprocess.run([*unshare, "true"], check=False, timeout=30, capture_output=True)
    if tried.returncode:
        pytest.skip(f"no mount namespace: {tried.stderr.decode().strip()}")
    return unshare


def as_user(
    directory: Path,
    code: str,
    *,
    uid: int = 12345,
    gid: int = 23456,
    groups: tuple[int, ...] = (),
    umask: int = 0o022,
) -> str:
    """Return the output of Python code run in ``directory`` as another user, or its OSError's name."""
    body = "".join(f"    {line}\n" for line in code.splitlines())
    script = (
        f"{zygote.CODE_IMPORTS}os.umask({umask}); os.setgroups({list(groups)})\n"
        f"os.setresgid({gid}, {gid}, {gid}); os.setresuid({uid}, {uid}, {uid})\n"
        f"try:\n{body}"
        "except OSError as exc:\n    print(errno.errorcode[exc.errno])\n"
    )
    done = zygote.run([script], 30, "code", directory)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_until(condition: Callable[[], bool], timeout: float = STOP_TIMEOUT) -> None:
    """Poll a condition. Fail after ``timeout`` seconds on an idle machine."""
    deadline = Deadline(timeout)
    while not condition():
        assert not deadline.over(), "timed out"
        time.sleep(0.01)


def ends(process: subprocess.Popen[Any] | zygote.Started, timeout: float = STOP_TIMEOUT) -> bool:
    """Return whether a process ends within ``timeout`` seconds on an idle machine."""
    deadline = Deadline(timeout)
    while not deadline.over():
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline.left(), 0.01))
            return True
    return False


@dataclass
class MountedFs:
    """Holds a source directory and its mount."""

    source: Path
    path: Path
    process: Process
    log: Path
    options: tuple[str, ...] = field(default=())
    mountpoint: Path | None = None
    """Where it is mounted, if not on ``path``."""

    def below(self, name: str) -> "MountedFs":
        """Return the same mount with a directory of it for source and path."""
        mountpoint = self.mountpoint or self.path
        return replace(self, source=self.source / name, path=self.path / name, mountpoint=mountpoint)

    def control(self, name: str) -> Path:
        """Return the path of a control file."""
        return (self.mountpoint or self.path) / ".cleancache" / name

    def stats(self) -> dict[str, Any]:
        """Return ``stats.json``. The backend's counters are under ``backend_counters``."""
        parsed: dict[str, Any] = json.loads(self.control("stats.json").read_text())
        return parsed

    def drop(self, caches: int = 3) -> None:
        """Drop cleanfs's caches and the kernel's pages of the mount, so that reads reach the daemon."""
        self.control("drop").write_text(f"{caches}\n")
        self.drop_kernel()

    def drop_kernel(self, path: Path | None = None) -> None:
        """Make the kernel drop its clean pages of a file, or of all files below the mount."""
        for file in [path] if path else [p for p in self.path.rglob("*") if p.is_file()]:
            fd = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def kill(self) -> None:
        """Kill the daemon by SIGKILL. Its mount point is dead afterwards."""
        self.process.send_signal(signal.SIGKILL)
        assert ends(self.process)


def cpu_ticks(fs: MountedFs) -> int:
    """Return the user and system time of the daemon, in units of 10 ms."""
    fields = Path(f"/proc/{fs.process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def settle() -> None:
    """Wait until another change would give a file just written another stamp.

    Before that its fingerprint is racy, and the next open flushes.
    """
    time.sleep(0.12)


def _started(pid: int) -> str:
    """Return the start time of a process in ticks (proc_pid_stat(5)); a reused pid has another one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:  # the process has ended
        return ""
    return stat.rpartition(")")[2].split()[19]


@contextmanager
def killed_after(seconds: float, pid: int, mountpoint: Path | None = None) -> Iterator[None]:
    """Let another process kill a process if the block, or this whole process, does not end in time.

    It also unmounts the process's mount, which frees all that wait for it. ``renew_lifetimes`` restarts
    the time.
    """
    script = f"""
        trap : HUP INT TERM  # which may go to the whole process group of the tests
        while read -t {seconds} line; do [ "$line" = ended ] && exit; done
        read -r stat <"/proc/$0/stat" && set -- "$1" "$2" ${{stat##*) }}
        [ "${{22}}" = "$2" ] && kill -9 "$0"
        [ -n "$1" ] || exit
        timeout 20 umount -f "$1" || timeout 20 umount -l "$1"
    """
    command = ["bash", "-c", script, str(pid), str(mountpoint or ""), _started(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0) as watchdog:
        watchdogs.append(watchdog)
        try:
            yield
        finally:
            watchdogs.remove(watchdog)
            watchdog.communicate(b"ended\n")


def renew_lifetimes() -> None:
    """Restart the time of all processes: another test begins, or this one gets more time."""
    for watchdog in watchdogs:
        with suppress(BrokenPipeError):  # the watched process has ended
            assert watchdog.stdin is not None
            watchdog.stdin.write(b"\n")


machine.more_time.append(renew_lifetimes)


@contextmanager
def mounted(
    source: Path, mountpoint: Path, *options: str, prefix: tuple[str, ...] = (), patch: str = ""
) -> Iterator[MountedFs]:
    """Mount in a foreground process and clean up in any case.

    ``prefix`` is a command that executes the daemon, such as prlimit(1). ``patch`` is code that the
    daemon runs first. Evictions are cleanfs's own unless ``options`` say otherwise: most tests look at
    what its page cache does.
    """
    if "--evictions" not in options:
        options = ("--evictions", "own", *options)
    log = mountpoint.with_name(mountpoint.name + ".log")
    with ExitStack() as stack:
        transport = ("--transport", uring.TRANSPORT)
        stack.enter_context(uring.enabled_for((*transport, *options)))
        arguments = ["mount", "-f", *transport, *options, str(source), str(mountpoint)]
        with log.open("wb") as output:
            process = start("cleanfs", arguments, output, prefix=prefix, patch=patch)
        starting = stack.pop_all()
    abort = -1
    try:
        with killed_after(LIFETIME, process.pid, mountpoint):
            with starting:
                wait_until(
                    lambda: (
                        (_is_served(mountpoint) and ("--log-file" in options or _has_started(log)))
                        or process.poll() is not None
                    ),
                    START_TIMEOUT,
                )
            assert process.poll() is None, log.read_text()
            abort = _open_abort(mountpoint)
            yield MountedFs(source, mountpoint, process, log, options)
    finally:
        _clean_up(process, mountpoint, abort)
        if abort >= 0:
            os.close(abort)
    unexpected = [
        line for line in log.read_text().splitlines() if "Traceback" in line or " ERROR " in line
    ]
    assert not unexpected, log.read_text()


def _is_served(mountpoint: Path) -> bool:
    """Return whether a daemon serves a mount there. The kernel's cached attributes do not show it."""
    try:
        return is_mounted(mountpoint) and bool(os.statvfs(mountpoint))
    except OSError as exc:
        if exc.errno != errno.ENOTCONN:
            raise
        return False


def _has_started(log: Path) -> bool:
    """Return whether the log reports the start. Until then the daemon makes calls on its own mount."""
    return b"cleanfs.mount.mount: mounted " in log.read_bytes()


def _open_abort(mountpoint: Path) -> int:
    """Open the abort file of a connection (fusectl) early, as numbers are reused; -1 if impossible."""
    point = mounted_at(str(mountpoint))
    if point is None or os.geteuid() != 0:
        return -1
    connections = open_connections()
    try:
        path = f"/proc/self/fd/{connections}/{os.minor(point.device)}/abort"
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # the mount has ended
        return -1
    finally:
        os.close(connections)


def _clean_up(process: Process, mountpoint: Path, abort: int) -> None:
    if process.poll() is None:
        process.terminate()
        if not ends(process):
            process.kill()
            unmount_by_force(mountpoint)
            if abort >= 0:  # processes may wait in it even after the unmount
                with suppress(OSError):
                    os.write(abort, b"1")
            assert ends(process)
    unmount_by_force(mountpoint)


def unmount_by_force(mountpoint: Path) -> None:
    """Unmount, if necessary, and end all requests there, even if the daemon cannot be killed."""
    for option in ("-f", "-l"):
        if is_mounted(mountpoint):
            subprocess.run(
                ["umount", option, str(mountpoint)],
                check=False,
                timeout=STOP_TIMEOUT,
                stderr=subprocess.DEVNULL,
            )
