"""Live as one process: its role, its steps, its end."""

import gc
import json
import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path

from . import naming, reading, writing
from .disturb import Disturber
from .model import Model
from .plan import Plan
from .process import IllegalError, Process
from .quiet import QuietFiles
from .source import Intruder

FOUND = 3
"""Exit status of who found something illegal."""

ERA = 400
"""Steps after which a process gets other likes."""


def roles(plan: Plan) -> list[str]:
    """Return what each process is: one disturbs, one changes the source, all others do everything."""
    special = ["disturb"] + (["source"] if plan.source_changes else [])
    return special + ["mixed"] * max(1, plan.processes - len(special))


def live(plan: Plan, model: Model, index: int) -> int:
    """Make steps until it is time to stop. Returns the exit status."""
    gc.freeze()
    p = Process(plan, model, index)
    step = _steps(p, roles(plan)[index])
    try:
        while not model.stopping:
            p.choose = random.Random(f"{plan.seed}/{index}/{p.step}")
            model.beat(index, p.step)
            step()
            p.step += 1
        for handle in list(p.handles):
            p.close(handle)
    except IllegalError as exc:
        return _report(p, str(exc))
    except Exception:  # also an error that no call may give
        return _report(p, traceback.format_exc())
    finally:
        (plan.evidence / f"counts-{index}.json").write_text(json.dumps(p.counts))
    return 0


def _report(p: Process, text: str) -> int:
    p.model.stop()
    p.journal.note(f"FOUND: {text.splitlines()[-1]}")
    head = f"process {p.index} ({roles(p.plan)[p.index]}), step {p.step}\n"
    (p.plan.evidence / f"found-{p.index}.txt").write_text(head + text + "\n")
    return FOUND


def _steps(p: Process, role: str) -> Callable[[], None]:
    if role == "disturb":
        return Disturber(p).step
    if role == "source":
        return Intruder(p).step
    operations = {**reading.OPERATIONS, **writing.OPERATIONS, **naming.OPERATIONS}
    if p.model.quiet:
        operations[QuietFiles(p).look] = 30
    names = list(operations)

    def step() -> None:
        # Each era has likes of its own: much of one thing, little of another.
        likes = random.Random(f"{p.plan.seed}/{p.index}/era{p.step // ERA}")
        weights = [operations[name] * likes.choice((0.3, 1, 1, 3)) for name in names]
        operation = p.choose.choices(names, weights)[0]
        operation(p)
        p.counts["steps"] += 1

    return step


def evidence_of(directory: Path) -> list[str]:
    """Return what the processes found."""
    return [path.read_text() for path in sorted(directory.glob("found-*.txt"))]


def exit_now(status: int) -> None:
    """End a forked process without what its parent would do at its end."""
    os._exit(status)
