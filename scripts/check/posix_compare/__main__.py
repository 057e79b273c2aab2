"""Read the command line of the comparison."""

import json
import os
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from .case import USERS
from .explained import EXPLANATIONS, Explanation, explain
from .groups import select
from .run import Difference, compare
from .sites import sites

console = Console(highlight=False, soft_wrap=True)

MOST_SHOWN = 400


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--filter", "filters", multiple=True, help="Only cases whose names match (or begin so).")
@click.option("--list", "only_list", is_flag=True, help="List the cases and their users; run nothing.")
@click.option("--users", help="Comma separated, of: " + ", ".join(USERS) + ". Default: all.")
@click.option("--every", type=click.IntRange(1), default=1, help="Only each nth case: a quick look.")
@click.option(
    "--coherency", type=click.Choice(["open", "watch", "none"]), default="open", show_default=True
)
@click.option(
    "--option", "mount_options", multiple=True, help="For cleanfs mount, e.g. --option=--writeback."
)
@click.option("--base", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Where source and plain directory are made. Default: ext4 of its own.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path),
              help="Write all differences there.")  # fmt: skip
@click.option("--explained", "show_explained", is_flag=True, help="Show explained differences, too.")
def main(
    filters: tuple[str, ...],
    only_list: bool,
    users: str | None,
    every: int,
    coherency: str,
    mount_options: tuple[str, ...],
    base: Path | None,
    json_file: Path | None,
    show_explained: bool,
) -> None:
    """Run a table of system calls on a plain directory and on a cleanfs mount; print what differs.

    The calls are made by root and by three other users. Exits with 1 if a difference is not one of
    those that docs/limits.md explains, or if an explanation has become unnecessary.
    """
    chosen_users = tuple(users.split(",")) if users else ()
    if unknown := set(chosen_users) - set(USERS):
        raise click.BadParameter(f"no such user: {', '.join(sorted(unknown))}", param_hint="--users")
    jobs = select(filters, chosen_users, every)
    if only_list:
        for case, user in jobs:
            print(f"{case.name} ({user})")
        return
    if not jobs:
        raise click.BadParameter("matches no case", param_hint="--filter")
    if os.getuid():
        raise click.UsageError("needs root, to act as other users and to mount file systems")
    options = (
        "--coherency",
        coherency,
        *(word for each in mount_options for word in shlex.split(each)),
    )
    started = time.monotonic()
    found: list[tuple[Difference, Explanation | None]] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        sites(base, options) as (plain, mount),
        Progress(*columns, console=console, transient=True) as bar,
    ):
        task = bar.add_task("", total=len(jobs))
        for difference in compare(plain, mount, jobs, lambda count: bar.advance(task, count)):
            found.append((difference, explain(difference, options)))
    unexplained = [difference for difference, why in found if why is None]
    whole = not filters and not chosen_users and every == 1
    used = {why for _, why in found if why is not None}
    unused = [e for e in EXPLANATIONS if whole and e.applies(options) and e not in used]
    _show(found if show_explained else [(d, None) for d in unexplained])
    for explanation in unused:
        console.print(f"explains nothing any more: {explanation}", markup=False)
    cases = len({case.name for case, _ in jobs})
    seconds = time.monotonic() - started
    console.print(
        f"{len(jobs)} cases of {cases} kinds in {seconds:.0f} s: {len(unexplained)} "
        f"unexplained differences in {len({(d.case, d.user) for d in unexplained})} cases, "
        f"{len(found) - len(unexplained)} explained ones"
    )
    for heading, number in Counter(why.heading for _, why in found if why is not None).most_common():
        console.print(f"  {number:5} {heading}", markup=False)
    if json_file:
        said = [{**d.as_dict(), "explained": why.heading if why else None} for d, why in found]
        json_file.write_text(
            json.dumps({"options": options, "cases": len(jobs), "differences": said}, indent=1)
        )
    sys.exit(1 if unexplained or unused else 0)


def _show(found: list[tuple[Difference, Explanation | None]]) -> None:
    last = None
    for difference, why in found[:MOST_SHOWN]:
        if last != (difference.case, difference.user):
            last = difference.case, difference.user
            console.print(f"{difference.case} ({difference.user})", markup=False)
        reason = f"   [{why.heading}]" if why else ""
        line = (
            f"    {difference.aspect}: plain {difference.plain!r}, mount {difference.mount!r}{reason}"
        )
        console.print(line[:400], markup=False)
    if len(found) > MOST_SHOWN:
        console.print(f"... and {len(found) - MOST_SHOWN} more")


if __name__ == "__main__":
    main(prog_name="scripts/run check/posix_compare")
