"""Run cases on both sites, and find what differs."""

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from . import observe, worker
from .case import USERS, Case
from .observe import State, Stats
from .sites import Site

BATCH = 100
SETTLE_SECONDS = 0.03
"""Between setups and actions, so that a time that moves is seen to: two ticks of the kernel's clock."""

Job = tuple[Case, str]
"""A case and the name of its user."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Is something that the mount does not do as the plain directory does."""

    case: str
    user: str
    aspect: str
    """``result``, or a view, a path and a field of what was left there."""
    plain: Any
    mount: Any

    def as_dict(self) -> dict[str, Any]:
        """Make a dict for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Holds what a case did on a site."""

    result: Any
    states: dict[str, State]


def compare(
    plain: Site, mount: Site, jobs: Sequence[Job], done: Callable[[int], None] = lambda count: None
) -> Iterator[Difference]:
    """Run all; ``done`` is told how many more are."""
    numbers = count()
    for start in range(0, len(jobs), BATCH):
        batch = [(next(numbers), *job) for job in jobs[start : start + BATCH]]
        expected, found = _run(plain, batch), _run(mount, batch)
        for (_, case, user), one, other in zip(batch, expected, found, strict=True):
            yield from differences(case, user, one, other)
        done(len(batch))


def differences(case: Case, user: str, plain: Outcome, mount: Outcome) -> Iterator[Difference]:
    """Compare aspect by aspect."""
    for aspect, one, other in _unequal("result", plain.result, mount.result):
        yield Difference(case.name, user, aspect, one, other)
    expected = plain.states["plain"]
    for view, state in mount.states.items():
        for path in sorted({*expected, *state}):
            one, other = expected.get(path), state.get(path)
            if one is None or other is None:
                yield Difference(
                    case.name,
                    user,
                    f"{view}: {path}",
                    "there" if one else "none",
                    "there" if other else "none",
                )
                continue
            for field in sorted({*one, *other}):
                if one.get(field) != other.get(field):
                    aspect = f"{view}: {path}: {field}"
                    yield Difference(case.name, user, aspect, one.get(field), other.get(field))


def _unequal(aspect: str, one: object, other: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _unequal(f"{aspect}[{place}]", a, b)
    elif one != other:
        yield aspect, one, other


def _run(site: Site, batch: list[tuple[int, Case, str]]) -> list[Outcome]:
    tops = [os.path.join(site.top, str(number)) for number, _, _ in batch]
    for top, (_, case, _) in zip(tops, batch, strict=True):
        _set_up(top, case)
    before = [_age(site, str(number)) for number, _, _ in batch]
    time.sleep(SETTLE_SECONDS)
    outcomes = []
    for (number, case, user), stats in zip(batch, before, strict=True):
        work = os.path.join(site.top, str(number), "work")
        result = worker.run(USERS[user], work, case.action)
        outcomes.append(Outcome(result, _look(site, str(number), stats)))
    for top in tops:
        shutil.rmtree(top)
    return outcomes


def _set_up(top: str, case: Case) -> None:
    """Set up as root; what is not to be created under a umask sets its mode itself."""
    os.mkdir(top)
    os.mkdir(f"{top}/work")
    os.chmod(top, 0o777)
    os.chmod(f"{top}/work", 0o777)
    home = os.getcwd()
    os.chdir(f"{top}/work")
    try:
        case.setup()
    except OSError as exc:
        raise RuntimeError(f"setup of {case.name}: {exc}") from exc
    finally:
        os.chdir(home)


def _age(site: Site, number: str) -> dict[str, Stats]:
    top = os.path.join(site.top, number)
    known = observe.paths(top)
    observe.age(top, known)
    return {view: observe.stats(os.path.join(path, number), known) for view, path in site.views.items()}


def _look(site: Site, number: str, before: dict[str, Stats]) -> dict[str, State]:
    """Look first at what moves no time, in all views; then at what is new, and what is in it all."""
    tops = {view: os.path.join(path, number) for view, path in site.views.items()}
    after = {view: observe.stats(top, list(before[view])) for view, top in tops.items()}
    if site.writeback:
        _write_back(tops["mount"])
        for view, top in tops.items():
            files = [path for path, st in after[view].items() if stat.S_ISREG(st.st_mode)]
            after[view] |= observe.stats(top, files)
    for view, top in tops.items():
        after[view] = observe.stats(top, observe.paths(top)) | after[view]
    return {view: observe.state(top, before[view], after[view]) for view, top in tops.items()}


def _write_back(top: str) -> None:
    """Have the kernel write what it still keeps to the source, unless that refuses it."""
    for path, st in observe.stats(top, observe.paths(top)).items():
        if stat.S_ISREG(st.st_mode):
            fd = os.open(os.path.join(top, path), os.O_RDONLY)
            with contextlib.suppress(OSError):
                os.fsync(fd)
            os.close(fd)
