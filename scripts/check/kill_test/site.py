"""Keep a source, a mount point and the daemon that serves it, and find what it leaves behind."""

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cleanfs.linux.mounts import mounted_at
from tests.harness import load, mounting

START_TIMEOUT = 30.0
END_TIMEOUT = 30.0


class Failure(Exception):  # noqa: N818  # it is the outcome, not a mishap
    """Says that something is lost, wrong or left behind, and what."""


@dataclass
class Daemon:
    """Is a foreground process that serves a mount."""

    process: mounting.Process
    options: tuple[str, ...]
    seconds: float
    """From its start until the mount replied."""

    @property
    def writeback(self) -> bool:
        """Tell whether the kernel may have the only copy of what was written."""
        return "--writeback" in self.options


class Site:
    """Holds a source, a mount point, and all that a round may leave behind, below one directory."""

    def __init__(self, base: Path) -> None:
        """Make it."""
        self.base = base
        for name in ("source", "mnt", "said", "tmp", "fusectl"):
            (base / name).mkdir()
        self.source, self.mountpoint = base / "source", base / "mnt"
        load.make_unchanged(self.source / "load")
        self.log = base / "log"
        self.environment = ("env", f"TMPDIR={base}/tmp", f"HOME={base}/tmp")
        self.daemon: Daemon | None = None

    def start(self, options: tuple[str, ...]) -> mounting.Process:
        """Start a daemon, which need not have come up yet."""
        arguments: list[str | Path] = ["mount", "-f", *options, self.source, self.mountpoint]
        with self.log.open("ab") as log:
            return mounting.start("cleanfs", arguments, log, prefix=self.environment)

    def mount(self, options: tuple[str, ...]) -> Daemon:
        """Start a daemon that replies. Raises Failure if it does not come up."""
        self.log.write_bytes(b"")
        begun = time.monotonic()
        process = self.start(options)
        self.daemon = Daemon(process, options, 0.0)
        wait("the mount", lambda: process.poll() is not None or self.replies(), START_TIMEOUT)
        if process.poll() is not None:
            raise Failure(f"the daemon ended with {process.returncode}: {self.log_text()}")
        self.daemon.seconds = time.monotonic() - begun
        return self.daemon

    def replies(self) -> bool:
        """Tell whether a live daemon serves the mount point."""
        try:
            return (self.mountpoint / ".cleancache" / "stats").exists()
        except OSError as exc:
            if exc.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
                raise
            return False

    def log_text(self) -> str:
        """Return what the daemon said."""
        return self.log.read_text(errors="replace")[-4000:]

    def clean_up(self) -> None:
        """Leave nothing, whatever happened."""
        if self.daemon is not None:
            with contextlib.suppress(ProcessLookupError):
                self.daemon.process.send_signal(signal.SIGCONT)
            self.daemon.process.kill()
        if mounted_at(str(self.mountpoint)) is not None:  # it may hang, and its daemon with it
            command = ["umount", "-f", str(self.mountpoint)]
            subprocess.run(command, check=False, timeout=END_TIMEOUT, capture_output=True)
        if self.daemon is not None:
            self.daemon.process.wait(END_TIMEOUT)
        for path in (self.mountpoint, self.base / "fusectl"):
            while mounted_at(str(path)) is not None:
                subprocess.run(["umount", "-l", str(path)], check=True, timeout=END_TIMEOUT)


def unmount(site: Site, process: subprocess.Popen[bytes] | None = None) -> None:
    """Unmount by the command, which waits for the daemon's end."""
    done = mounting.cleanfs("umount", site.mountpoint, timeout=END_TIMEOUT)
    if done.returncode:
        raise Failure(f"cleanfs umount: {done.stderr}")
    if site.daemon is not None and site.daemon.process.wait(END_TIMEOUT) not in (0, -signal.SIGKILL):
        raise Failure(f"the daemon ended with {site.daemon.process.returncode}: {site.log_text()}")


def daemon(site: Site) -> mounting.Process:
    """Return the process that serves the mount."""
    assert site.daemon is not None
    return site.daemon.process


def stacks(pid: int) -> str:
    """Return where in the kernel each thread of a process waits."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            calls = [
                line.split()[-1].partition("+")[0] for line in (task / "stack").read_text().splitlines()
            ]
            found.append(f"thread {task.name}: {' < '.join(calls[:6])}")
    return "\n".join(found)


def no_complaints(site: Site) -> None:
    """Raise Failure if the daemon's log has what is ours to mend."""
    text = site.log.read_text(errors="replace")
    if "Traceback" in text or " ERROR " in text:
        raise Failure(f"the daemon's log: {text[-4000:]}")


def processes_of(site: Site) -> list[int]:
    """Return the processes whose command line or directory is below the site."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if str(site.mountpoint).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def nothing_left(site: Site) -> None:
    """Raise Failure for a mount, a process or a file of a daemon that has ended."""
    no_complaints(site)
    if mounted_at(str(site.mountpoint)) is not None:
        raise Failure("a mount is left")
    deadline = time.monotonic() + 5
    while processes_of(site) and time.monotonic() < deadline:
        time.sleep(0.01)
    if left := processes_of(site):
        raise Failure(f"processes are left: {left}")
    names = {path.name for path in site.base.iterdir()} - {
        "source",
        "mnt",
        "said",
        "tmp",
        "fusectl",
        "log",
    }
    names |= {f"tmp/{path.name}" for path in (site.base / "tmp").rglob("*")}
    names |= {f"mnt/{path.name}" for path in site.mountpoint.iterdir()}
    names |= {path.name for path in site.source.iterdir()} - {"load"}
    if names:
        raise Failure(f"files are left: {sorted(names)}")


def wait(what: str, condition: Callable[[], bool], timeout: float) -> None:
    """Poll. Raises Failure."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"{what} did not come within {timeout:g} s")
        time.sleep(0.005)


def differences(source: Path, path: Path) -> list[str]:
    """Return the names that do not lead to the same in two trees."""
    names = {entry.name: entry for entry in os.scandir(source)}
    different = list({entry.name for entry in os.scandir(path)} ^ set(names))
    for name in names.keys() - set(different):
        one, other = source / name, path / name
        if mode(one) != mode(other):
            different.append(name)
        elif one.is_symlink():
            different += [] if one.readlink() == other.readlink() else [name]
        elif one.is_dir():
            different += differences(one, other)
        elif one.read_bytes() != other.read_bytes():
            different.append(str(one))
    return different


def mode(path: Path) -> int:
    """Return type and permissions."""
    return path.lstat().st_mode
