"""End the daemon of a loaded mount in each of the ways that there are."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from cleanfs.linux.mounts import mounted_at
from tests.harness import mounting

from .site import END_TIMEOUT, Failure, Site, daemon

DEATH = {"ENOTCONN", "ECONNABORTED", "ENODEV"}
"""How calls on a mount end whose daemon is dead."""

GONE = {*DEATH, "ENOENT", "ENOTDIR"}
"""The same where the mount has gone, too, and what is below it is seen again."""


# -- the faults: each ends the daemon of a loaded mount, or tries to -----------------------------------


def kill(site: Site, choose: random.Random) -> set[str]:
    """Send SIGKILL."""
    daemon(site).send_signal(signal.SIGKILL)
    return DEATH


def stop_and_kill(site: Site, choose: random.Random) -> set[str]:
    """Send SIGSTOP, SIGCONT, a while later SIGKILL; nothing may come of the first two."""
    daemon(site).send_signal(signal.SIGSTOP)
    time.sleep(choose.random() * 0.4)
    daemon(site).send_signal(signal.SIGCONT)
    time.sleep(choose.random() * 0.4)
    daemon(site).send_signal(signal.SIGKILL)
    return DEATH


def orderly(number: int) -> Callable[[Site, random.Random], set[str]]:
    """Send a signal after which the daemon unmounts."""

    def send(site: Site, choose: random.Random) -> set[str]:
        daemon(site).send_signal(number)
        return GONE

    return send


def twice(site: Site, choose: random.Random) -> set[str]:
    """Send two signals or three, the later ones at any moment of what the first brings about."""
    for _ in range(choose.choice((2, 2, 3))):
        with contextlib.suppress(ProcessLookupError):
            daemon(site).send_signal(choose.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))
        time.sleep(choose.random() ** 2 * 0.5)
    return GONE


def umount_lazily(site: Site, choose: random.Random) -> set[str]:
    """``cleanfs umount`` is refused while programs are there; ``umount -l`` is not."""
    done = mounting.cleanfs("umount", site.mountpoint, timeout=END_TIMEOUT)
    if done.returncode != 1 or "busy" not in done.stderr:
        raise Failure(f"cleanfs umount of a busy mount: {done.returncode}, {done.stderr}")
    if not site.replies():
        raise Failure("the mount is gone after cleanfs umount was refused")
    subprocess.run(["umount", "-l", str(site.mountpoint)], check=True, timeout=END_TIMEOUT)
    # Programs that have files open go on; those that use a path find nothing.
    return GONE


def umount_force(site: Site, choose: random.Random) -> set[str]:
    """``umount -f`` severs the connection, and then finds the mount busy."""
    subprocess.run(
        ["umount", "-f", str(site.mountpoint)], check=False, timeout=END_TIMEOUT, capture_output=True
    )
    return GONE


def abort(site: Site, choose: random.Random) -> set[str]:
    """Sever the connection as an administrator does, in the fusectl file system."""
    point = mounted_at(str(site.mountpoint))
    if point is None:
        raise Failure("there is no mount to sever")
    control = site.base / "fusectl"
    subprocess.run(["mount", "-t", "fusectl", "none", str(control)], check=True, timeout=END_TIMEOUT)
    try:
        (control / str(os.minor(point.device)) / "abort").write_text("1")
    finally:
        subprocess.run(["umount", "-l", str(control)], check=True, timeout=END_TIMEOUT)
    return GONE


@dataclass(frozen=True)
class Fault:
    """Is a way to end."""

    end: Callable[[Site, random.Random], set[str]]
    """Does it; which errors programs may see."""
    status: int | None = 0
    """What the daemon's process must end with; None: it is not looked at."""
    stale: bool = False
    """Whether the dead mount stays, for the next one to clean up."""
    orderly: bool = False
    """Whether the daemon unmounts by itself, after what a writeback cache has was written."""
    runs_on: bool = False
    """Whether programs that have files open go on with them until they are killed."""


FAULTS = {
    "kill": Fault(kill, status=-signal.SIGKILL, stale=True),
    "stop": Fault(stop_and_kill, status=-signal.SIGKILL, stale=True),
    "term": Fault(orderly(signal.SIGTERM), orderly=True),
    "int": Fault(orderly(signal.SIGINT), orderly=True),
    "hup": Fault(orderly(signal.SIGHUP), orderly=True),
    "twice": Fault(twice, orderly=True),
    "lazy": Fault(umount_lazily, runs_on=True),
    "force": Fault(umount_force, status=None),
    "abort": Fault(abort, status=None),
}
