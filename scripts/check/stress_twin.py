"""Run the twin machine (tests/harness/twin.py) for long, at random; make a failure small."""

import argparse
import contextlib
import random
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test

from tests.harness import mounting
from tests.harness.twin import Site, TwinMachine, cache_size, least_pool

PAGE_SIZES = (4096, 4096, 16384, 65536, 1 << 20)
BACKENDS = ("zcache", "zcache", "zcache", "none")
ATTR_TIMEOUTS = (0, 0, 0.05, 0.2)
"""What a round's mount may be started with, each as likely as it is often here."""


def main() -> None:
    """Run rounds until the time is over; exits with 1 at the first failure."""
    parser = argparse.ArgumentParser(
        prog="scripts/run check/stress_twin", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=300, help="stop after this time (300)")
    parser.add_argument("--rounds", type=int, default=1 << 30, help="stop after this many mounts")
    parser.add_argument("--examples", type=int, default=30, help="machines per mount (30)")
    parser.add_argument("--steps", type=int, default=60, help="steps per machine (60)")
    parser.add_argument("--seed", type=int, help="start with this seed instead of a random one")
    parser.add_argument("--no-noise", action="store_true", help="no concurrent readers")
    parser.add_argument("--no-shrink", action="store_true", help="report a failure as it was found")
    parser.add_argument(
        "--base", type=Path, help="directory whose file system to use (the temporary one)"
    )
    args = parser.parse_args()

    deadline = time.monotonic() + args.seconds
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    for number in range(args.rounds):
        if time.monotonic() >= deadline:
            break
        print(f"round {number}: --seed {seed}", flush=True)
        one_round(args, seed, deadline)
        seed = random.Random(seed).getrandbits(32)
    print("no difference found")


def one_round(args: argparse.Namespace, seed: int, deadline: float) -> None:
    """Run some machines on one mount."""
    choose = random.Random(seed)
    page_size = choose.choice(PAGE_SIZES)
    backend = choose.choice(BACKENDS)
    attr_timeout = choose.choice(ATTR_TIMEOUTS)
    alone = choose.random() < 0.2
    options = [
        "--page-size", str(page_size), "--backend", backend, "--attr-timeout", str(attr_timeout),
        "--coherency", "none" if alone else choose.choice(("open", "watch")),
        "--page-cache", str(cache_size(choose.choice((0, 1, 3, 4, 50)), page_size)),
        "--pool-limit", str(least_pool(page_size)),
    ]  # fmt: skip
    writeback = alone and choose.random() < 0.5
    if writeback:
        options.append("--writeback")
    print("   ", *options, flush=True)
    phases = (Phase.generate,) if args.no_shrink else (Phase.generate, Phase.shrink)
    settings_ = settings(
        max_examples=args.examples,
        stateful_step_count=args.steps,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    # For what is left and the longest that making a failure small takes; then the daemon is killed.
    mounting.LIFETIME = max(0.0, deadline - time.monotonic()) + 400.0
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twin", dir=args.base)))
        for name in ("source", "mnt", "twins"):
            (base / name).mkdir()
        fs = stack.enter_context(mounting.mounted(base / "source", base / "mnt", *options))

        class Machine(TwinMachine):
            site = Site(
                fs,
                base / "twins",
                attr_timeout,
                page_size,
                noise=not args.no_noise,
                changes_source=not alone,
                writeback=writeback,
            )

        run_state_machine_as_test(seeded(seed)(Machine), settings=settings_)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
