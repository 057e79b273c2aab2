"""Play the kinds of rounds: each ends a daemon at another time, and mounts again."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cleanfs.linux.mounts import mounted_at
from tests.harness import load, mounting

from .faults import FAULTS, Fault
from .load_round import Round
from .site import (
    END_TIMEOUT,
    START_TIMEOUT,
    Daemon,
    Failure,
    Site,
    differences,
    no_complaints,
    nothing_left,
    processes_of,
    stacks,
    unmount,
    wait,
)

SHARED = "00000000-0000-0000-0000-000000000001"

CONFIGURATIONS: tuple[tuple[str, ...], ...] = (
    ("--page-cache", "1M", "--pool-limit", "8M"),
    ("--page-cache", "64K", "--pool-limit", "2M", "--attr-timeout", "0"),
    ("--page-cache", "0", "--pool-limit", "4M", "--page-size", "16K"),
    ("--page-cache", "1M", "--pool-limit", "8M", "--shared-pool", SHARED),
    ("--page-cache", "1M", "--pool-limit", "4M", "--backend", "none"),
    ("--page-cache", "1M", "--pool-limit", "8M", "--coherency", "none"),
    ("--page-cache", "1M", "--pool-limit", "8M", "--coherency", "none", "--writeback"),
)  # fmt: skip


@dataclass
class Tally:
    """Counts what happened to the rounds of one fault."""

    rounds: int = 0
    turns: int = 0
    remounts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


def loaded_round(site: Site, seed: int, fault: Fault, tally: Tally) -> None:
    """Mount, load, end it, look; mount again, look, unmount."""
    choose = random.Random(seed)
    options = choose.choice(CONFIGURATIONS)
    turn = Round(site, seed, list(load.CLIENTS))
    served = site.mount(options)
    with turn.load():
        turn.until_it_goes()
        begun = time.monotonic()
        accept = fault.end(site, choose)
        # A daemon that is asked to end lets a writeback cache empty itself, for up to a minute while
        # somebody goes on to write. What was written before they end is all to be there then.
        emptied = served.writeback and (fault.orderly or fault.runs_on)
        if fault.runs_on or emptied:
            time.sleep(choose.random() * 0.4)
            turn.kill_clients()
        try:
            if not (fault.runs_on or emptied):
                tally.errors += turn.until_all_have_noticed(accept)
            wait("the daemon's end", lambda: served.process.poll() is not None, END_TIMEOUT)
        except Failure as exc:
            pids = [served.process.pid, *(client.pid for client in turn.clients.values())]
            raise Failure("\n".join([str(exc), *map(stacks, pids)])) from None
        tally.ends.append(time.monotonic() - begun)
    if fault.status is not None and served.process.returncode != fault.status:
        raise Failure(f"the daemon ended with {served.process.returncode}: {site.log_text()}")
    no_complaints(site)
    if not fault.stale and mounted_at(str(site.mountpoint)) is not None:
        raise Failure("a dead mount was left behind")
    tally.turns += turn.check(served.writeback and not emptied)
    turn.change_source()
    again = site.mount(options)
    tally.remounts.append(again.seconds)
    turn.compare()
    unmount(site)
    turn.restore_source()
    nothing_left(site)
    tally.rounds += 1


def startup_round(site: Site, seed: int, tally: Tally, *, number: int) -> None:
    """End the daemon while it starts."""
    choose = random.Random(seed)
    process = site.start(choose.choice(CONFIGURATIONS))
    site.daemon = Daemon(process, (), 0.0)
    time.sleep(choose.random() * 0.6)
    begun = time.monotonic()
    process.send_signal(number)
    wait("the daemon's end", lambda: process.poll() is not None, END_TIMEOUT)
    tally.ends.append(time.monotonic() - begun)
    if number != signal.SIGKILL and mounted_at(str(site.mountpoint)) is not None:
        raise Failure("a dead mount was left behind")
    mount_and_unmount(site, tally)


def unmount_round(site: Site, seed: int, tally: Tally, *, number: int) -> None:
    """End the daemon while it unmounts."""
    choose = random.Random(seed)
    process = site.mount(choose.choice(CONFIGURATIONS)).process
    for path in (site.mountpoint / "load" / "unchanged").iterdir():
        path.read_bytes()
    command = ["umount", str(site.mountpoint)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as umount:
        time.sleep(choose.random() * 0.05)
        begun = time.monotonic()
        process.send_signal(number)
        wait("umount", lambda: umount.poll() is not None, END_TIMEOUT)
    wait("the daemon's end", lambda: process.poll() is not None, END_TIMEOUT)
    tally.ends.append(time.monotonic() - begun)
    mount_and_unmount(site, tally)


def background_round(site: Site, seed: int, tally: Tally) -> None:
    """Kill what `cleanfs mount` left in the background to start, or the command that waits for it."""
    choose = random.Random(seed)
    command = mounting.command_line("mount", "--log-file", site.log, site.source, site.mountpoint)
    waiting = subprocess.Popen(
        [*site.environment, *command], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    of_command = choose.random() < 0.5
    deadline = time.monotonic() + 0.1 + choose.random() * 0.5
    while time.monotonic() < deadline and waiting.poll() is None:
        time.sleep(0.005)
    begun = time.monotonic()
    if of_command:
        waiting.kill()
    else:
        for pid in processes_of(site):
            if pid != waiting.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    _, error = waiting.communicate(timeout=END_TIMEOUT)
    tally.ends.append(time.monotonic() - begun)
    if waiting.returncode == 1 and len(error.strip().splitlines()) != 1:
        raise Failure(f"cleanfs mount said: {error}")
    if waiting.returncode == 1 and mounted_at(str(site.mountpoint)) is not None:
        raise Failure("cleanfs mount failed and left a dead mount behind")

    def settled() -> bool:  # the daemon is up, or has gone
        return not processes_of(site) or site.replies()

    wait("the daemon", settled, START_TIMEOUT)
    if processes_of(site):
        unmount(site, None)
    mount_and_unmount(site, tally)


def mount_and_unmount(site: Site, tally: Tally) -> None:
    """Mount and unmount over whatever is there."""
    again = site.mount(CONFIGURATIONS[0])
    tally.remounts.append(again.seconds)
    if differences(site.source, site.mountpoint):
        raise Failure("the new mount does not show the source")
    unmount(site)
    nothing_left(site)
    tally.rounds += 1


def rounds() -> dict[str, Callable[[Site, int, Tally], None]]:
    """Return all kinds of rounds by name."""

    def loaded(fault: Fault) -> Callable[[Site, int, Tally], None]:
        return lambda site, seed, tally: loaded_round(site, seed, fault, tally)

    def signalled(play: Callable[..., None], number: int) -> Callable[[Site, int, Tally], None]:
        return lambda site, seed, tally: play(site, seed, tally, number=number)

    return {
        **{name: loaded(fault) for name, fault in FAULTS.items()},
        "startup-kill": signalled(startup_round, signal.SIGKILL),
        "startup-term": signalled(startup_round, signal.SIGTERM),
        "umount-kill": signalled(unmount_round, signal.SIGKILL),
        "umount-term": signalled(unmount_round, signal.SIGTERM),
        "background": background_round,
    }
