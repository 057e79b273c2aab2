"""End the daemon at random moments of a load, in every way there is; look for what is lost or left.

A round: mount, let eight programs change and read files in it (tests/harness/load.py), do it, and hold
the source against what the programs were told. Then files are changed in the source, the next daemon
mounts over what the last one left, and all that is read through it must be what the source has. A
failure prints the seed that its round follows from.

Exit status: 0 nothing was lost or left behind, 1 something was (it is said what), 2 wrong call.
"""

import argparse
import contextlib
import errno
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cleanfs.linux.mounts import mounted_at
from tests.harness import load, mounting

START_TIMEOUT = 30.0
END_TIMEOUT = 30.0

DEATH = {"ENOTCONN", "ECONNABORTED", "ENODEV"}
"""How calls on a mount end whose daemon is dead."""

GONE = {*DEATH, "ENOENT", "ENOTDIR"}
"""The same where the mount has gone, too, and what is below it is seen again."""

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


class Failure(Exception):  # noqa: N818  # it is the outcome, not a mishap
    """Something is lost, wrong or left behind; the message says what."""


@dataclass
class Daemon:
    """A foreground process that serves a mount."""

    process: mounting.Process
    options: tuple[str, ...]
    seconds: float
    """From its start until the mount answered."""

    @property
    def writeback(self) -> bool:
        """Whether the kernel may have the only copy of what was written."""
        return "--writeback" in self.options


@dataclass
class Tally:
    """What happened to the rounds of one fault."""

    rounds: int = 0
    turns: int = 0
    remounts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


class Site:
    """A source, a mount point, and all that a round may leave behind, below one directory."""

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
        """A daemon, that need not have come up yet."""
        arguments: list[str | Path] = ["mount", "-f", *options, self.source, self.mountpoint]
        with self.log.open("ab") as log:
            return mounting.start("cleanfs", arguments, log, prefix=self.environment)

    def mount(self, options: tuple[str, ...]) -> Daemon:
        """A daemon that answers. Raises Failure if it does not come up."""
        self.log.write_bytes(b"")
        begun = time.monotonic()
        process = self.start(options)
        self.daemon = Daemon(process, options, 0.0)
        wait("the mount", lambda: process.poll() is not None or self.answers(), START_TIMEOUT)
        if process.poll() is not None:
            raise Failure(f"the daemon ended with {process.returncode}: {self.log_text()}")
        self.daemon.seconds = time.monotonic() - begun
        return self.daemon

    def answers(self) -> bool:
        """Whether a live daemon serves the mount point."""
        try:
            return (self.mountpoint / ".cleancache" / "stats").exists()
        except OSError as exc:
            if exc.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
                raise
            return False

    def log_text(self) -> str:
        """What the daemon said."""
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


class Round:
    """One load and its end."""

    def __init__(self, site: Site, seed: int, kinds: list[str]) -> None:
        """``kinds`` of clients; all choices follow from ``seed``."""
        self.site, self.seed, self.kinds = site, seed, kinds
        self.random = random.Random(seed)
        self.clients: dict[str, subprocess.Popen[bytes]] = {}

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        """The clients run; they end by themselves when the mount does."""
        for kind in self.kinds:
            command = [
                sys.executable,
                "-I",
                "-S",
                load.__file__,
                kind,
                str(self.site.mountpoint / "load"),
            ]
            command += [str(self.said(kind)), str(self.seed)]
            self.clients[kind] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        try:
            yield
        finally:
            self.kill_clients()

    def kill_clients(self) -> None:
        """End what has not ended yet."""
        for client in self.clients.values():
            client.kill()
        for client in self.clients.values():
            client.wait(END_TIMEOUT)

    def said(self, kind: str) -> Path:
        """Where a client says what it has done."""
        return self.site.base / "said" / kind

    def until_it_goes(self) -> None:
        """Wait until the load is going, and then some: the random moment."""
        wait("the load", lambda: all(map(self._going, self.kinds)), START_TIMEOUT)
        time.sleep(self.random.random() * 0.5)

    def _going(self, kind: str) -> bool:
        said = load.read_progress(self.said(kind))
        if said.error is not None or self.clients[kind].poll() is not None:
            raise Failure(f"client {kind} failed by itself: {said.error}")
        return said.done > 0

    def until_all_have_noticed(self, accept: set[str]) -> Counter[str]:
        """Wait for the ends of the clients; with which errors."""
        wait(
            "the clients", lambda: all(c.poll() is not None for c in self.clients.values()), END_TIMEOUT
        )
        errors = Counter[str]()
        for kind, client in self.clients.items():
            error = load.read_progress(self.said(kind)).error
            # A page of a mapping that can not be read is a SIGBUS: the client has said nothing more.
            if client.returncode == -signal.SIGBUS and kind in ("mapped", "wal"):
                error = "SIGBUS"
            # sqlite has its own words, and msync of what can not be written says EIO.
            elif error is None or not (
                error in accept or error.startswith("sqlite:") or (error == "EIO" and kind == "mapped")
            ):
                raise Failure(f"client {kind} ended with {client.returncode}, {error}")
            errors[error] += 1
        return errors

    def check(self, writeback: bool) -> int:
        """Raises Failure if something that was confirmed is not in the source; how much was."""
        turns = 0
        for kind in self.kinds:
            said = load.read_progress(self.said(kind))
            turns += said.done
            wrong = load.lost(kind, self.site.source / "load", said, self.seed, writeback)
            if wrong is not None:
                raise Failure(wrong)
        return turns

    def change_source(self) -> None:
        """While nobody serves the mount: contents that no cache of before may answer for."""
        for number in range(0, load.UNCHANGED, 7):
            path = self.site.source / "load" / "unchanged" / str(number)
            st = path.stat()
            path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
            os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))

    def restore_source(self) -> None:
        """As ``change_source`` found it, and nothing of the clients."""
        top = self.site.source / "load"
        for number in range(0, load.UNCHANGED, 7):
            (top / "unchanged" / str(number)).write_bytes(load.unchanged(number))
        for path in top.iterdir():
            if path.name != "unchanged":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for kind in self.kinds:
            self.said(kind).unlink(missing_ok=True)

    def compare(self) -> None:
        """Everything read through the mount is what the source has."""
        different = differences(self.site.source, self.site.mountpoint)
        if different:
            raise Failure(f"through the new mount these are not what the source has: {different[:5]}")


def differences(source: Path, path: Path) -> list[str]:
    """Names that do not lead to the same in two trees."""
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
    """Type and permissions."""
    return path.lstat().st_mode


# -- the faults: each ends the daemon of a loaded mount, or tries to -----------------------------------


def kill(site: Site, choose: random.Random) -> set[str]:
    """SIGKILL."""
    daemon(site).send_signal(signal.SIGKILL)
    return DEATH


def stop_and_kill(site: Site, choose: random.Random) -> set[str]:
    """SIGSTOP, SIGCONT, a while later SIGKILL; nothing may come of the first two."""
    daemon(site).send_signal(signal.SIGSTOP)
    time.sleep(choose.random() * 0.4)
    daemon(site).send_signal(signal.SIGCONT)
    time.sleep(choose.random() * 0.4)
    daemon(site).send_signal(signal.SIGKILL)
    return DEATH


def orderly(number: int) -> Callable[[Site, random.Random], set[str]]:
    """A signal after which the daemon unmounts."""

    def send(site: Site, choose: random.Random) -> set[str]:
        daemon(site).send_signal(number)
        return GONE

    return send


def twice(site: Site, choose: random.Random) -> set[str]:
    """Two signals or three, the later ones at any moment of what the first brings about."""
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
    if not site.answers():
        raise Failure("the mount is gone after cleanfs umount was refused")
    subprocess.run(["umount", "-l", str(site.mountpoint)], check=True, timeout=END_TIMEOUT)
    # Programs that have files open go on; whoever takes a path finds nothing.
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
    """A way to end."""

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
        return not processes_of(site) or site.answers()

    wait("the daemon", settled, START_TIMEOUT)
    if processes_of(site):
        unmount(site, None)
    mount_and_unmount(site, tally)


def mount_and_unmount(site: Site, tally: Tally) -> None:
    """Over whatever is there."""
    again = site.mount(CONFIGURATIONS[0])
    tally.remounts.append(again.seconds)
    if differences(site.source, site.mountpoint):
        raise Failure("the new mount does not show the source")
    unmount(site)
    nothing_left(site)
    tally.rounds += 1


def unmount(site: Site, process: subprocess.Popen[bytes] | None = None) -> None:
    """By the command, which waits for the daemon's end."""
    done = mounting.cleanfs("umount", site.mountpoint, timeout=END_TIMEOUT)
    if done.returncode:
        raise Failure(f"cleanfs umount: {done.stderr}")
    if site.daemon is not None and site.daemon.process.wait(END_TIMEOUT) not in (0, -signal.SIGKILL):
        raise Failure(f"the daemon ended with {site.daemon.process.returncode}: {site.log_text()}")


def daemon(site: Site) -> mounting.Process:
    """The process that serves the mount."""
    assert site.daemon is not None
    return site.daemon.process


def stacks(pid: int) -> str:
    """Where in the kernel each thread of a process waits."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            calls = [
                line.split()[-1].partition("+")[0] for line in (task / "stack").read_text().splitlines()
            ]
            found.append(f"thread {task.name}: {' < '.join(calls[:6])}")
    return "\n".join(found)


def no_complaints(site: Site) -> None:
    """Raises Failure if the daemon's log has what is ours to mend."""
    text = site.log.read_text(errors="replace")
    if "Traceback" in text or " ERROR " in text:
        raise Failure(f"the daemon's log: {text[-4000:]}")


def processes_of(site: Site) -> list[int]:
    """Processes whose command line or directory is below the site."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if str(site.mountpoint).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def nothing_left(site: Site) -> None:
    """Raises Failure for a mount, a process or a file of a daemon that has ended."""
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


def rounds() -> dict[str, Callable[[Site, int, Tally], None]]:
    """All kinds of rounds by name."""

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


def main() -> int:
    """The exit status."""
    known = rounds()
    parser = argparse.ArgumentParser(
        prog="scripts/run check/kill_test",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=200, help="rounds of SIGKILL under load (200)")
    parser.add_argument("--others", type=int, default=10, help="rounds of each of the others (10)")
    parser.add_argument("--only", choices=known, action="append", help="only this fault")
    parser.add_argument("--seed", type=int, help="of the first round, instead of a random one")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this time (3600)")
    parser.add_argument("--base", type=Path, help="directory to work in (the temporary one)")
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("this takes root")
    if args.kills < 0 or args.others < 0:
        parser.error("a number of rounds is not negative")
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    plan = [
        name
        for name in args.only or known
        for _ in range(args.kills if name == "kill" else args.others)
    ]
    random.Random(seed).shuffle(plan)
    tallies = {name: Tally() for name in known if name in plan}
    deadline = time.monotonic() + args.seconds
    failed = False
    # Whoever ends us with a signal gets what was found so far, and nothing is left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{len(plan)} rounds, --seed {seed}", file=sys.stderr)
    base = Path(tempfile.mkdtemp(prefix="cleanfs-kill-", dir=args.base)).resolve()
    site = Site(base)
    try:
        for name in plan:
            if time.monotonic() > deadline:
                print("kill_test: the time is over", file=sys.stderr)
                break
            try:
                known[name](site, seed, tallies[name])
            except Failure as exc:
                print(
                    f"kill_test: {name}: {exc}\n"
                    f"  again: scripts/run check/kill_test --only {name} --kills 1 --others 1 "
                    f"--seed {seed}",
                    file=sys.stderr,
                )
                failed = True
                break
            seed = random.Random(seed).getrandbits(32)
    finally:
        site.clean_up()
        shutil.rmtree(base)
        print_table(tallies)
    return 1 if failed else 0


def print_table(tallies: dict[str, Tally]) -> None:
    """What was done, and what programs saw."""
    table = Table()
    for heading in ("fault", "rounds", "turns confirmed", "end s, max", "mount again s, median, max"):
        table.add_column(heading, justify="left" if heading == "fault" else "right")
    table.add_column("what programs saw")
    for name, tally in tallies.items():
        table.add_row(
            name,
            str(tally.rounds),
            f"{tally.turns:,}" if tally.turns else "-",
            f"{max(tally.ends):.2f}" if tally.ends else "-",
            f"{statistics.median(tally.remounts):.2f}, {max(tally.remounts):.2f}"
            if tally.remounts
            else "-",
            ", ".join(f"{error} {count}" for error, count in tally.errors.most_common()) or "-",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
