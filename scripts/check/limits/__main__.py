"""Read the command line of the limits."""

import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import (
    data,
    descriptors,
    directories,
    directory,
    leaks,
    million,
    mounts,
    names,
    offsets,
    processes,
    tiny,
)
from .lab import Figure, Lab, NotHereError, as_json

console = Console(highlight=False)

CASES: dict[str, Callable[[Lab], None]] = {
    "data": data.run,
    "million": million.run,
    "directory": directory.run,
    "descriptors": descriptors.run,
    "names": names.run,
    "offsets": offsets.run,
    "processes": processes.run,
    "mounts": mounts.run,
    "leaks": leaks.run,
    "tiny": tiny.run,
    "directories": directories.run,
}
ENGINES = ("native", "python")


@click.command()
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Only these.")
@click.option("--list", "only_list", is_flag=True, help="Say what there is, and do nothing.")
@click.option("--quick", is_flag=True, help="Small numbers: shows that all works, in minutes.")
@click.option("--engine", type=click.Choice((*ENGINES, "both")), default="both", show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--minutes", default=30.0, show_default=True, help="How long one case may take at most.")
@click.option(
    "--directory", "disk", default="/var/tmp", show_default=True, help="For images of disks.",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)  # fmt: skip
def main(
    cases: tuple[str, ...],
    only_list: bool,
    quick: bool,
    engine: str,
    json_file: Path | None,
    minutes: float,
    disk: Path,
) -> None:
    """Hold cleanfs against what it promises about sizes and numbers.

    Prints what was measured beside what is promised; the exit status is 1 if a promise is broken. Needs
    root, and RAM for the data (4 GiB).
    """
    if only_list:
        for name, run in CASES.items():
            console.print(f"{name:12} {(sys.modules[run.__module__].__doc__ or '').splitlines()[0]}")
        return
    if os.geteuid() != 0:
        raise click.UsageError("needs root")
    figures: list[Figure] = []
    for name in cases or CASES:
        for each in ENGINES if engine == "both" else (engine,):
            figures += run_case(name, each, quick, minutes, disk)
    show(figures)
    if json_file is not None:
        facts = {"cores": os.cpu_count(), "kernel": platform.release(), "quick": quick}
        json_file.write_text(json.dumps({**facts, "figures": as_json(figures)}, indent=2) + "\n")
    sys.exit(any(figure.holds is False for figure in figures))


def run_case(name: str, engine: str, quick: bool, minutes: float, disk: Path) -> list[Figure]:
    """Run one case with one engine."""
    console.print(f"{name}, {engine}", style="bold")
    os.environ["CLEANFS_PUREPYTHON"] = "1" if engine == "python" else "0"
    os.environ["CLEANFS_REQUIRE_NATIVE"] = "0" if engine == "python" else "1"
    began = time.monotonic()
    with ExitStack() as stack:
        base, disk_base = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cleanfs-limits-", dir=where)))
            for where in ("/dev/shm", disk)
        )
        lab = Lab(name, engine, quick, base, disk_base, minutes * 60, say)
        signal.alarm(int(minutes * 60) + 60)
        try:
            CASES[name](lab)
        except NotHereError as exc:
            lab.inform("skipped", exc)
        except Exception as exc:
            console.print_exception()
            lab.hold("the case runs to its end", f"{type(exc).__name__}: {exc}", "yes", False)
        finally:
            signal.alarm(0)
    lab.inform("seconds", f"{time.monotonic() - began:.0f}")
    return lab.figures


def say(line: str) -> None:
    """Report progress."""
    console.print(escape(line))


def show(figures: list[Figure]) -> None:
    """Show the table."""
    table = Table("case", "engine", "what", "measured", "promise", "", title="limits")
    verdicts = {True: "[green]ok[/]", False: "[red]broken[/]", None: ""}
    for figure in figures:
        words = (figure.case, figure.engine, figure.what, figure.measured, figure.promise)
        table.add_row(*map(escape, words), verdicts[figure.holds])
    wide = Console(highlight=False, width=max(shutil.get_terminal_size().columns, 120))
    wide.print(table)


def overdue(*_: object) -> None:
    """Note that a case hangs."""
    raise TimeoutError("the case took longer than --minutes")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, overdue)
    main(prog_name="scripts/run check/limits")
