"""Read the command line of the comparison, and run it."""

import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scripts.lib.packages import install_debian_packages, install_extra

from . import daemon, equal_ram, names, overhead, plots, reads, report, tree, writes
from .lab import FULL, QUICK, Clock, Lab
from .machine import SkippedError, facts, mounts
from .rows import CONTESTANTS, Bench, Row

console = Console(width=None if sys.stdout.isatty() else 140)

PARTS: dict[str, list[tuple[Callable[[Lab, Clock], None], float]]] = {
    "equal-ram": [(equal_ram.bench, 9), (equal_ram.sweep, 5), (tree.bench, 6)],
    "overhead": [(overhead.bench, 4)],
}
"""Rows on disks of their own, with contestants of their own, and the minutes after which each begins no
further round."""

ROWS: dict[str, Row] = {**reads.ROWS, **writes.ROWS, **names.ROWS, **daemon.ROWS}

GROUPS = {
    "roundtrip": tuple(reads.ROWS),
    "writes": tuple(writes.ROWS),
    "metadata": ("create", *names.ROWS),
}
"""Several rows by one name."""

PEERS = ("mergerfs", "bindfs")
PARTS_PACKAGES = (
    *PEERS, "rclone", "btrfs-progs", "e2fsprogs", "fio", "git",
    "linux-source", "xz-utils", "flex", "bison", "bc", "make", "gcc",
)  # fmt: skip
"""Contestants, disks, and what unpacks and compiles the kernel."""


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Split names with commas between them, and check each."""
    known = (*PARTS, *GROUPS, *ROWS) if parameter.name == "rows" else CONTESTANTS
    found = tuple(value.split(",")) if value else ()
    for name in found:
        if name not in known:
            raise click.BadParameter(f"there is no {name!r}; there are {', '.join(known)}")
    return found


@click.command(
    epilog=f"""
Rows: {", ".join((*PARTS, *ROWS))}. Groups of rows: {", ".join(GROUPS)}.

Contestants: {", ".join(CONTESTANTS)}.
"""
)
@click.option("--rows", callback=_names, metavar="NAME,...", help="Only these (default: all).")
@click.option(
    "--contestants", callback=_names, metavar="NAME,...",
    help=f"Only these (default: each row's own). {' and '.join(PARTS)} always have their own.",
)  # fmt: skip
@click.option(
    "--baseline", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    help="Another checkout of cleanfs, with its .venv: one more contestant.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Small sizes, one round, short jobs.")
@click.option(
    "--rounds", type=click.IntRange(1), help="Default: 3; one less where a round takes minutes."
)
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), help="Of a job of fio (default: 3)."
)
@click.option(
    "--whole-tree", is_flag=True, help="grep and compile at equal RAM in all of the kernel's tree."
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--markdown", "markdown_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plots", "plots_directory", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--directory", default="/var/tmp", show_default=True,
    help="For sources and images of disks: up to 16 GiB.",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)  # fmt: skip
def main(
    rows: tuple[str, ...],
    contestants: tuple[str, ...],
    baseline: Path | None,
    quick: bool,
    rounds: int | None,
    seconds: float | None,
    whole_tree: bool,
    json_file: Path | None,
    markdown_file: Path | None,
    plots_directory: Path | None,
    directory: Path,
) -> None:
    """Measure cleanfs beside the page cache, compressing file systems, other mounts, and itself."""
    if os.geteuid() != 0:
        raise click.UsageError("needs root, for loop devices and control groups")
    if "baseline" in contestants and baseline is None:
        raise click.UsageError("the contestant baseline needs --baseline CHECKOUT")
    chosen = [each for name in rows or (*PARTS, *ROWS) for each in GROUPS.get(name, (name,))]
    parts = [name for name in PARTS if name in chosen]
    peers = [name for name in PEERS if name in (contestants or PEERS)]
    install_debian_packages(PARTS_PACKAGES if parts else ("fio", "git", *peers), console.print)
    if plots_directory:
        install_extra("bench", "matplotlib", console.print)
    plan = QUICK if quick else FULL
    plan = replace(plan, rounds=rounds or plan.rounds, seconds=seconds or plan.seconds)
    if whole_tree:
        plan = replace(plan, tree="whole", tree_ram=1000)
    signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, _interrupted)
    start = time.monotonic()
    machine = facts()
    command = shlex.join(["scripts/run", "bench/compare", *_arguments()])
    scratch = Path(tempfile.mkdtemp(prefix="cleanfs-compare-", dir=directory))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    lab = None
    try:
        with ExitStack() as stack:
            progress = stack.enter_context(Progress(*columns, console=console, transient=True))
            lab = Lab(scratch, stack, plan, console, progress)
            for part in parts:
                for bench, minutes in PARTS[part]:
                    begun = time.monotonic()
                    try:
                        bench(lab, Clock(minutes))
                    except SkippedError as exc:
                        lab.skip(part, exc)
                    name = bench.__module__.rpartition(".")[2]
                    lab.say(f"{name}, {bench.__name__}: {time.monotonic() - begun:.0f} s")
            bench_rows = Bench(lab, baseline)
            for name in ROWS:
                if name in chosen:
                    begun = time.monotonic()
                    bench_rows.run(name, ROWS[name], contestants)
                    lab.say(f"{name}: {time.monotonic() - begun:.0f} s")
    finally:
        minutes = (time.monotonic() - start) / 60
        try:
            if lab is not None:
                _report(lab, machine, command, minutes, json_file, markdown_file, plots_directory)
        finally:
            _remove(scratch)


def _report(
    lab: Lab,
    machine: dict[str, str],
    command: str,
    minutes: float,
    json_file: Path | None,
    markdown_file: Path | None,
    plots_directory: Path | None,
) -> None:
    """Show and write whatever was measured until now."""
    drawn: dict[str, Path] = {}
    if plots_directory:
        try:
            drawn = plots.draw(lab.results, plots_directory)
        except ImportError as exc:
            lab.skip("plots", exc)
    report.show(lab.results, console)
    console.print(f"{minutes:.1f} minutes")
    if markdown_file:
        text = report.markdown(lab.results, machine, command, minutes, drawn, markdown_file.parent)
        markdown_file.write_text(text)
    if json_file:
        json_file.write_text(report.as_json(lab.results, machine, command, minutes))


def _interrupted(number: int, frame: FrameType | None) -> None:
    """End, and let nobody interrupt the cleaning up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _arguments() -> list[str]:
    """Return what was asked for, without where it is written to."""
    found: list[str] = []
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument.partition("=")[0] in {"--json", "--markdown", "--plots", "--directory"}:
            if "=" not in argument:
                next(arguments, None)
        else:
            found.append(argument)
    return found


def _remove(scratch: Path) -> None:
    """Delete our directory, unless something is still mounted below it."""
    below = f" {os.path.realpath(scratch)}/"
    if any(below in line for line in mounts()):
        console.print(f"{scratch}: something is still mounted there: left as it is", markup=False)
    else:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main(prog_name="scripts/run bench/compare")
