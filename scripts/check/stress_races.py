"""Run programs whose parts race on a mount, on a plain directory and, if it is there, on bindfs.

Each program (tests/harness/races.py) must end and find what every file system owes. Prints seconds,
and how many times those of the plain directory they are.
"""

import argparse
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.harness import mounting, races
from tests.harness.mounting import mounted, unmount_by_force
from tests.harness.races import KINDS

OPTIONS = (
    (),
    ("--page-cache", "1M", "--pool-limit", "8M"),
    ("--page-cache", "0", "--backend", "none"),
    ("--page-size", "64K", "--page-cache", "2M", "--pool-limit", "8M"),
    ("--coherency", "watch"),
    ("--coherency", "none", "--writeback"),
)
"""What a round's mount is started with, one after the other."""


def main() -> None:
    """Run all kinds, round after round; exits with 1 if one of them fails or does not end."""
    parser = argparse.ArgumentParser(
        prog="scripts/run check/stress_races", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--rounds", type=int, default=len(OPTIONS), help="mounts, one after the other (6)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="how much is done (1.0)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each program (120)")
    parser.add_argument("--seed", type=int, help="start with this seed instead of a random one")
    parser.add_argument(
        "--kind", choices=KINDS, action="append", help="only this one; may be given again"
    )
    parser.add_argument(
        "--base", type=Path, help="directory whose file system to use (the temporary one)"
    )
    args = parser.parse_args()
    kinds = args.kind or list(KINDS)
    mounting.LIFETIME = 3 * len(kinds) * args.limit + 100
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    failed = False
    for number in range(args.rounds):
        options = OPTIONS[number % len(OPTIONS)]
        print(f"round {number}: --seed {seed}", *options, flush=True)
        with (
            tempfile.TemporaryDirectory(prefix="races", dir=args.base) as base,
            sites(Path(base), options) as places,
        ):
            for kind in kinds:
                failed |= not one_kind(kind, places, args.scale, seed, args.limit)
        seed = random.Random(seed).getrandbits(32)
    sys.exit(1 if failed else 0)


@contextlib.contextmanager
def sites(base: Path, options: tuple[str, ...]) -> Iterator[dict[str, Path]]:
    """Return directories to compare, by name."""
    for name in ("source", "cleanfs", "plain", "bindfs"):
        (base / name).mkdir()
    places = {"plain": base / "plain", "cleanfs": base / "cleanfs"}
    with mounted(base / "source", base / "cleanfs", *options):
        if shutil.which("bindfs") is None:
            yield places
            return
        subprocess.run(["bindfs", base / "source", base / "bindfs"], check=True, timeout=30)
        try:
            yield {**places, "bindfs": base / "bindfs"}
        finally:
            unmount_by_force(base / "bindfs")


def one_kind(kind: str, places: dict[str, Path], scale: float, seed: int, limit: float) -> bool:
    """Run one program everywhere. Returns whether it ended well on cleanfs."""
    seconds, errors = {}, {}
    for name, place in places.items():
        directory = place / kind
        directory.mkdir()
        program = [
            sys.executable,
            "-I",
            "-S",
            races.__file__,
            kind,
            str(directory),
            str(scale),
            str(seed),
        ]
        began = time.monotonic()
        try:
            done = subprocess.run(
                program, stderr=subprocess.PIPE, text=True, timeout=limit, check=False
            )
            if done.returncode:
                errors[name] = done.stderr.strip() or f"status {done.returncode}"
        except subprocess.TimeoutExpired:
            errors[name] = f"did not end in {limit} s"
        seconds[name] = time.monotonic() - began
        shutil.rmtree(directory, ignore_errors=True)
    shown = [
        f"{name} {took:6.2f} s ({took / seconds['plain']:4.1f}x)" for name, took in seconds.items()
    ]
    print(f"  {kind:24}", "  ".join(shown), flush=True)
    for name, error in errors.items():
        print(f"  {kind} FAILED on {name}:\n{error}", flush=True)
    return "cleanfs" not in errors


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and nothing stays mounted
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
