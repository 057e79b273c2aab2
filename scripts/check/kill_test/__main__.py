"""Run the kill test from the command line."""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import __doc__ as description
from .rounds import Tally, rounds
from .site import Failure, Site


def main() -> int:
    """Run the test. Returns the exit status."""
    known = rounds()
    parser = argparse.ArgumentParser(
        prog="scripts/run check/kill_test",
        description=description,
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
    # A user who ends us with a signal gets what was found so far, and nothing is left.
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
    """Print what was done, and what programs saw."""
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
