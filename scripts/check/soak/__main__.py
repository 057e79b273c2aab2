"""Read the command line of the soak."""

import json
import os
import random
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console

from cleanfs.fuse.size_sync import can_open_handles
from tests.harness.twin import cache_size, least_pool
from tests.harness.unprivileged import NO_DAC_READ_SEARCH

from . import journal, matrix, report, soak
from .plan import Plan

console = Console(width=None if sys.stdout.isatty() else 160)

PAGES = (3, 5, 20, 60)
"""Room in the page cache, in turn."""

ATTR_TIMEOUTS = {"open": (0.0, 0.05, 0.2, 1.0), "watch": (0.2, 10.0, 10.0), "none": (3600.0,)}
"""One is chosen by the seed. Those of ``watch`` are also longer than a change may take to be seen."""


@click.command()
@click.option("--seconds", type=click.FloatRange(0.5), default=60, show_default=True)
@click.option("--seed", type=int, help="Repeat what each process did; random unless given.")
@click.option(
    "--coherency", type=click.Choice(["open", "none", "watch"]), default="open", show_default=True
)
@click.option("--engine", type=click.Choice(["native", "python"]), default="native", show_default=True)
@click.option("--allocator", type=click.Choice(["log", "zbud"]), default="log", show_default=True)
@click.option("--page-size", type=int, default=4096, show_default=True)
@click.option("--compression", default="lz4", show_default=True)
@click.option("--processes", type=click.IntRange(3), default=7, show_default=True)
@click.option("--base", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Directory whose file system to use (the temporary one).")  # fmt: skip
@click.option("--shared-pool", is_flag=True, help="In a shared pool: hits leave the page in it.")
@click.option("--writeback", is_flag=True, help="With the kernel's writeback cache (coherency none).")
@click.option("--evictions", type=click.Choice(["own", "kernel"]), default="own", show_default=True,
              help="kernel: it is also made to reclaim memory all the time.")  # fmt: skip
@click.option("--plain", is_flag=True, help="No mount: checks the checker.")
@click.option("--matrix", "whole_matrix", is_flag=True,
              help="Every engine, allocator and coherency, each for so many seconds.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Of them at a time.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    seconds: float,
    seed: int | None,
    coherency: str,
    engine: str,
    allocator: str,
    page_size: int,
    compression: str,
    processes: int,
    base: Path | None,
    shared_pool: bool,
    writeback: bool,
    evictions: str,
    plain: bool,
    whole_matrix: bool,
    jobs: int,
    json_file: Path | None,
) -> None:
    """Many processes change and read files on a mount; every read must be legal (docs/trust.md).

    Exits with 0 if everything was, with 1 if not: then it says what was read, what would have been
    legal, and where the evidence is.
    """
    if writeback and coherency != "none":
        raise click.UsageError("--writeback needs --coherency none")
    if engine == "python" and allocator != "log":
        raise click.UsageError("the Python engine has no allocator but log")
    if whole_matrix:
        sys.exit(matrix.run(seconds, jobs, base, json_file, console))
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    if engine == "python":
        os.environ["CLEANFS_PUREPYTHON"] = "1"
    top = Path(tempfile.mkdtemp(prefix="soak-", dir=base)).resolve()
    (top / "source").mkdir()
    (top / "mnt").mkdir()
    (top / "evidence").mkdir()
    choose = random.Random(seed)
    attr_timeout = choose.choice(ATTR_TIMEOUTS[coherency])
    watches_as_root = coherency == "watch" and os.geteuid() == 0
    prefix = choose.choice(((), NO_DAC_READ_SEARCH)) if watches_as_root else ()
    plan = Plan(
        seed=seed,
        seconds=seconds,
        source=top / "source",
        mount=top / ("source" if plain else "mnt"),
        evidence=top / "evidence",
        coherency=coherency,
        processes=processes,
        cells=256 if page_size <= 16384 else 1024,
        page_size=page_size,
        attr_timeout=attr_timeout,
        least_pool=(2 << 20) if evictions == "kernel" else least_pool(page_size),
        page_caches=(0, *(cache_size(pages, page_size) for pages in PAGES)),
        writeback=writeback,
        kernel_evicts=evictions == "kernel",
        opens_handles=not prefix and can_open_handles(),
    )
    options = [
        "--coherency", coherency, "--page-size", str(page_size), "--allocator", allocator,
        "--compression", compression, "--attr-timeout", str(attr_timeout),
        "--page-cache", str(plan.page_caches[2]), "--pool-limit", str(plan.least_pool),
        "--evictions", evictions,
    ]  # fmt: skip
    if engine == "python":
        options = [word for word in options if word not in ("--allocator", allocator)]
    options += ["--writeback"] if writeback else []
    options += ["--shared-pool", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"] if shared_pool else []
    console.print(
        f"--seed {seed}",
        "plain" if plain else shlex.join([*prefix, *options]),
        soft_wrap=True,
        highlight=False,
    )
    try:
        outcome = soak.run(plan, options, prefix)
        outcome.found += report.missing(plan, outcome)
        if json_file:
            json_file.write_text(
                json.dumps(report.as_json(plan, outcome, sys.argv[1:]), indent=2) + "\n"
            )
        if outcome.found:
            soak.keep_evidence(plan, outcome, top / "mnt.log")
    except BaseException:
        shutil.rmtree(top, ignore_errors=True)
        raise
    console.print(report.table(plan, outcome, f"{outcome.seconds:.0f} s, --seed {seed}"))
    if not outcome.found:
        shutil.rmtree(top)
        print("every read was legal")
        return
    print("\n".join(outcome.found))
    serial = _serial(outcome.found[0])
    print(f"\nlast operations{f' on {serial}' if serial else ''}:")
    print("\n".join(journal.merged(plan.evidence, serial)))
    shutil.rmtree(top / "source")
    print(f"\nsoak: illegal; --seed {seed}; evidence in {plan.evidence}", file=sys.stderr)
    sys.exit(1)


def _serial(text: str) -> str:
    """Return ``file N.`` of what was found, as the journals name it."""
    before, _, rest = text.partition("file ")
    number = rest.partition(".")[0]
    return f"file {number}." if before and number.isdigit() else ""


if __name__ == "__main__":
    main(prog_name="scripts/run check/soak")
