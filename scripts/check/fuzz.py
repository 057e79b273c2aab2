"""Feed parsers, control files and the command line bad input, chosen at random, for a bounded time."""

import os
import random
import signal
import subprocess
import sys
import time

import click

from scripts.lib.checkout import CHECKOUT

SUITES = (
    "tests/fuzz/test_cli.py",
    "tests/fuzz/test_parsers.py",
    "tests/fuzz/test_stats.py",
    "tests/e2e/test_bad_input.py",
)

NOTHING_LEFT = 5
"""Exit status of pytest when ``-k`` chose no test."""


@click.command()
@click.option("--seconds", type=click.FloatRange(1), default=300, show_default=True)
@click.option("--factor", type=click.IntRange(1), default=10, show_default=True,
              help="Examples in a round: so many times those of scripts/test.")  # fmt: skip
@click.option(
    "--seed", type=int, help="Of the first round; random unless given. With --rounds 1: replay."
)
@click.option("--rounds", type=click.IntRange(1), help="End after so many.")
@click.option("-k", "chosen", help="Only tests whose name has this, as pytest understands it.")
def main(seconds: float, factor: int, seed: int | None, rounds: int | None, chosen: str | None) -> None:
    """Give every option, control file, parser and reader of statistics bad input, chosen at random.

    Rounds until the time is over: a round that it cuts off counts as it stands. Exits with 1 at the
    first failure, whose smallest input and seed are printed.
    """
    deadline = time.monotonic() + seconds
    choose = random.Random(seed)
    number = 0
    while rounds is None or number < rounds:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        seed = seed if number == 0 and seed is not None else choose.getrandbits(32)
        number += 1
        click.echo(f"round {number}: --seed {seed} --factor {factor}")
        status = one_round(seed, factor, left, chosen)
        if status not in (0, None):
            sys.exit(2 if status == NOTHING_LEFT else 1)
    click.echo(f"nothing found in {number} rounds")


def one_round(seed: int, factor: int, left: float, chosen: str | None) -> int | None:
    """Run the suites once. Returns their exit status; None if the time was over before."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header",
        "--timeout", str(left + 60), f"--hypothesis-seed={seed}", *SUITES,
    ]  # fmt: skip
    command += ["-k", chosen] if chosen else []
    with subprocess.Popen(
        command, cwd=CHECKOUT, env=os.environ | {"CLEANFS_FUZZ": str(factor)}
    ) as running:
        try:
            return running.wait(left)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as why:
            running.send_signal(signal.SIGINT)  # pytest then unmounts what it mounted
            running.wait(60)
            if isinstance(why, KeyboardInterrupt):
                sys.exit(130)
            return None


if __name__ == "__main__":
    main(prog_name="scripts/run check/fuzz")
