"""Run one soak: set up, processes, a watch over them, a last look at everything, the end."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.harness import mounting
from tests.harness.memory_limit import memory_group

from . import journal, quiet, worker
from .content import cell_at, cells_bytes
from .model import Model, Shape
from .naming import Naming
from .plan import NAMES, Plan
from .process import Process, place
from .writing import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
)

SLOTS = 80

STEP_LIMIT = 60.0
"""Seconds that a step may take on a busy machine; beyond, the mount hangs."""

END_LIMIT = 90.0
"""Seconds for all processes to end."""


@dataclass
class Outcome:
    """Says what came of a soak."""

    found: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    stats: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    staleness: int = 0
    """Milliseconds for which the stalest bytes that a read may show had been stale."""


def run(plan: Plan, options: list[str], prefix: tuple[str, ...]) -> Outcome:
    """Mount, soak, look, unmount, look again. Whatever happens, nothing is left but the evidence."""
    outcome = Outcome()
    for directory in ("a", "b"):
        (plan.source / directory).mkdir()
    model = Model(Shape(SLOTS, NAMES, len(worker.roles(plan)), plan.cells, plan.quiet_files))
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        fs = None
        if not plan.plain:
            # For the soak, its end, and the last look; then the daemon is killed.
            mounting.START_TIMEOUT = STEP_LIMIT
            mounting.LIFETIME = plan.seconds + STEP_LIMIT + END_LIMIT + 120
            stack.enter_context(_noting(outcome))
            fs = stack.enter_context(mounting.mounted(plan.source, plan.mount, *options, prefix=prefix))
        if plan.kernel_evicts:
            plan = replace(plan, group=stack.enter_context(memory_group()))
        plan = replace(plan, holes=_can_punch(plan.mount))
        _soak(plan, model, outcome, fs)
        outcome.seconds = time.monotonic() - began
        if fs is not None and _has_ended(fs, outcome):
            outcome.found.append(f"the daemon ended with status {fs.process.returncode}")
        elif not outcome.found:
            if fs is not None:
                outcome.stats = fs.stats()
            if plan.source_changes:
                time.sleep(plan.attr_timeout + 0.5)  # names that were removed in the source
            outcome.found += _look(model, plan.mount, "at rest, on the mount")
            outcome.found += _look(model, plan.source, "at rest, in the source")
        elif fs is not None:
            outcome.stats = fs.stats()
    if not outcome.found:
        outcome.found += _look(model, plan.source, "after unmounting, in the source")
    return outcome


def _has_ended(fs: mounting.MountedFs, outcome: Outcome) -> bool:
    """Tell whether the daemon has ended. Programs can know of that a moment before we do."""
    if outcome.found:
        with contextlib.suppress(subprocess.TimeoutExpired):
            fs.process.wait(1)
    return fs.process.poll() is not None


@contextlib.contextmanager
def _noting(outcome: Outcome) -> Iterator[None]:
    """Note a daemon that did not start, or complained in its log."""
    try:
        yield
    except (AssertionError, subprocess.TimeoutExpired, OSError) as exc:
        outcome.found.append(f"the daemon: {exc!s}")


def _can_punch(directory: Path) -> bool:
    path = directory / ".probe"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        modes = FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
        return all(fallocate(fd, FALLOC_FL_KEEP_SIZE | mode, 0, 4096) == 0 for mode in modes)
    finally:
        os.close(fd)
        path.unlink()


def _soak(plan: Plan, model: Model, outcome: Outcome, fs: mounting.MountedFs | None) -> None:
    _first_files(plan, model)
    quiet.make(plan, model)
    children = {}
    for index in range(len(worker.roles(plan))):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                if plan.group is not None:
                    (plan.group / "cgroup.procs").write_text("0")
                status = worker.live(plan, model, index)
            finally:
                worker.exit_now(status)
        children[pid] = index
    try:
        _watch(plan, model, children, outcome, fs)
    finally:
        model.stop()
        _end(model, plan, children, outcome, fs)
    outcome.staleness = model.staleness
    outcome.found += worker.evidence_of(plan.evidence)
    for path in plan.evidence.glob("counts-*.json"):
        outcome.counts.update(json.loads(path.read_text()))


def _first_files(plan: Plan, model: Model) -> None:
    """Make something for every process to begin with."""
    evidence = plan.evidence / "first"
    evidence.mkdir()
    p = Process(replace(plan, evidence=evidence), model, 0)
    p.choose.seed(f"{plan.seed}/first")
    naming = Naming(p, str(plan.mount))
    for _ in range(NAMES):
        naming.make()
    for handle in list(p.handles):
        p.close(handle)


def _watch(
    plan: Plan,
    model: Model,
    children: dict[int, int],
    outcome: Outcome,
    fs: mounting.MountedFs | None,
) -> None:
    """Watch until the time is over, somebody found something, dies or hangs."""
    deadline = time.monotonic() + plan.seconds
    while time.monotonic() < deadline and not model.stopping:
        time.sleep(0.05)
        if fs is not None and fs.process.poll() is not None:
            return  # which is noted afterwards
        _collect(children, outcome)
        if outcome.found:
            return
        hung = _hung(model, children)
        if hung:
            outcome.found.append(hung)
            _dump_stacks(plan, children, fs)
            return


def _hung(model: Model, children: dict[int, int]) -> str | None:
    for index in children.values():
        beat, step = model.last_beat(index)
        age = (time.monotonic_ns() - beat) / 1e9
        if beat and age > STEP_LIMIT:
            return f"process {index} hangs in step {step} for {age:.0f} s"
    return None


def _dump_stacks(plan: Plan, children: dict[int, int], fs: mounting.MountedFs | None) -> None:
    """Note where everybody waits, as the kernel sees it."""
    lines = []
    pids = [*children, *([fs.process.pid] if fs is not None else [])]
    for pid in pids:
        for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
            with contextlib.suppress(OSError):
                lines.append(f"{pid}/{task.name}: {(task / 'wchan').read_text()}")
                lines.append((task / "stack").read_text())
    (plan.evidence / "stacks.txt").write_text("\n".join(lines))


def _end(
    model: Model,
    plan: Plan,
    children: dict[int, int],
    outcome: Outcome,
    fs: mounting.MountedFs | None,
) -> None:
    """Wait for all, not for ever."""
    deadline = time.monotonic() + (END_LIMIT if not outcome.found else 10)
    while children and time.monotonic() < deadline:
        _collect(children, outcome)
        time.sleep(0.02)
    if not children:
        return
    if not outcome.found:
        outcome.found.append(f"processes {sorted(children.values())} do not end")
        _dump_stacks(plan, children, fs)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    if fs is not None:
        fs.process.kill()  # frees those that wait for it
    deadline = time.monotonic() + 20
    while children and time.monotonic() < deadline:
        _collect(children, outcome)
        time.sleep(0.02)


def _collect(children: dict[int, int], outcome: Outcome) -> None:
    """Note the ends of those that have ended."""
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended != pid:
            continue
        index = children.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, worker.FOUND, -signal.SIGKILL):
            name = signal.Signals(-code).name if code < 0 else f"status {code}"
            outcome.found.append(f"process {index} ended with {name}")


def _look(model: Model, top: Path, when: str) -> list[str]:
    """Everything must be exactly what was written."""
    found = []
    files = [(top / place(name), series.latest) for name, series in enumerate(model.names)]
    files += [(quiet.path_below(top, number), slot.serial) for number, slot in enumerate(model.quiet)]
    for path, serial in files:
        name = path.name
        if serial == 0:
            if path.exists():
                found.append(f"{when}: name {name} is there and must not be")
            continue
        slot = model.find(serial)
        assert slot is not None
        cells = slot.size_in_cells()
        expected = cells_bytes(serial, slot.shift, 0, slot.latest.get(0, cells))
        try:
            data = path.read_bytes()
        except OSError as exc:
            found.append(f"{when}: name {name}, file {serial}: {exc}")
            continue
        if data != expected:
            at = next((i for i, (a, b) in enumerate(zip(data, expected, strict=False)) if a != b), -1)
            found.append(
                f"{when}: name {name} is not file {serial}. as it was written: {len(data)} of "
                f"{len(expected)} bytes, first difference at {at} (cell {slot_cell(slot.shift, at)})"
            )
    return found


def slot_cell(shift: int, at: int) -> int:
    """Return the cell of an offset."""
    return cell_at(max(at, 0), shift)


def keep_evidence(plan: Plan, outcome: Outcome, log: Path) -> None:
    """Keep everything that helps to understand it, beside what the processes wrote."""
    (plan.evidence / "found.txt").write_text("\n\n".join(outcome.found) + "\n")
    (plan.evidence / "stats.json").write_text(json.dumps(outcome.stats, indent=2))
    (plan.evidence / "history.txt").write_text("\n".join(journal.merged(plan.evidence, last=20000)))
    if log.exists():
        shutil.copy(log, plan.evidence / "daemon.log")
