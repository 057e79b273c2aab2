"""Compare zcache's native engine with a dict (tests/backends/machine.py) for long, at random.

Rounds of steps, each with a seed of its own, which is printed: ``--seed`` and ``--rounds 1`` repeat it
(but for the timing of the engine's worker). A process that dies has printed what it was doing.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from cleanfs.backends._zcache import Engine
from cleanfs.backends.ops import FileKey
from tests.backends.machine import KEYS, MAKERS, UUIDS, Twin
from tests.backends.pages import MIB

PAGE_SIZES = (4096, 4096, 4096, 8192, 65536, MIB)
ZBUD = {"allocator": "zbud", "keep_poor": False}
ENGINES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"checksum": True}),
    (1, {"level": 17, "was_active": True}),
    (1, {"method": "lz4hc", "level": 9}),
    (1, {"method": "none", "level": 0}),
    (1, {"keep_poor": False}),
    (4, {"method": "zstd"}),
    (4, {"method": "zstd", "level": 3, "was_active": True}),
    (8, {"method": "zstd", "dictionary": True}),
    (1, ZBUD),
    (1, {**ZBUD, "was_active": True}),
    (1, {**ZBUD, "method": "lz4hc", "level": 1}),
    (4, {**ZBUD, "method": "zstd"}),
    (8, {**ZBUD, "method": "zstd", "dictionary": True, "checksum": True}),
]
"""The least limit in MiB, and the options."""


def main() -> None:
    """Run rounds until there were enough steps, or the time is over. Raises at the first difference."""
    parser = argparse.ArgumentParser(
        prog="scripts/run check/stress_zcache", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=2_000_000, help="stop after that many (2000000)")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this time (3600)")
    parser.add_argument("--round", type=int, default=2000, help="steps with one engine (2000)")
    parser.add_argument("--rounds", type=int, default=1 << 30, help="stop after that many engines")
    parser.add_argument("--seed", type=int, help="start with this seed instead of a random one")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    steps = 0
    for _ in range(args.rounds):
        if steps >= args.steps or time.monotonic() >= deadline:
            break
        one_round(seed, args.round, deadline)
        steps += args.round
        seed = random.Random(seed).getrandbits(32)
    print(f"no difference found in {steps} steps")


def one_round(seed: int, steps: int, deadline: float) -> None:
    """Make some thousand steps with one engine."""
    choose = random.Random(seed)
    least, options = choose.choice(ENGINES)
    limits = [least * MIB, least * MIB + 100_000, 2 * least * MIB, 9 * least * MIB]
    print(f"--rounds 1 --seed {seed}  # {least}M {options}", end="", flush=True)
    z = Engine(choose.choice(limits), **options)
    twin = Twin(z)
    actions = _actions(twin, choose, limits)
    names = list(actions)
    # Each round has likes of its own: much reading, much flushing, hardly any pools.
    weights = [choose.choice((1, 3, 10)) / (1 if name in EVERYDAY else 15) for name in names]
    every = choose.choice((1, 10, 100))
    step = 0
    try:
        for step in range(steps):
            if step % 100 == 0 and time.monotonic() >= deadline:
                break
            if len(twin.pools) < 2:
                twin.open(choose.choice(PAGE_SIZES))
                twin.join(choose.choice(UUIDS), choose.choice(PAGE_SIZES))
            if not twin.pools:  # refused: the limit is small for what large pages needed once
                twin.resize(limits[-1])
                continue
            actions[choose.choices(names, weights)[0]]()
            if step % every == 0:
                z.check()
        twin.sync()
        z.check()
    except BaseException:
        print(f"\nat step {step}", file=sys.stderr)
        raise
    counters = z.counters()
    evicted = counters["evicted_eph_zpages"] + counters["evicted_raw_pages"]
    print(
        f": {evicted} evicted, {counters['revived_zpages']} revived, {twin.excess} above the limit",
        flush=True,
    )


EVERYDAY = {"put", "put_back", "get", "get_into", "flush", "fill", "sync"}


def _actions(twin: Twin, choose: random.Random, limits: list[int]) -> dict[str, Callable[[], None]]:
    """Return what can be done next, by name."""

    def pool() -> int:
        return choose.choice(twin.pools)

    def pages_of(pool: int, most: int) -> int:
        return max(1, choose.choice((1, 2, 20, most)) * 4096 // twin.page_size(pool))

    def handle(most: int) -> tuple[int, FileKey, int, int]:
        at = pool()
        return at, choose.choice(KEYS), choose.randrange(61), pages_of(at, most)

    def put_back() -> None:
        if twin.got:
            handle = choose.choice(list(twin.got))
            same_file = [other for other in twin.got if other[:2] == handle[:2]]
            twin.put_back(choose.choice((same_file, [handle])))

    def flush() -> None:
        at = pool()
        start = choose.choice((0, choose.randrange(61)))
        twin.flush(at, choose.choice(KEYS), start, choose.choice((None, 1, choose.randrange(99))))

    return {
        "put": lambda: twin.put(*handle(80), choose.choice(list(MAKERS))),
        "put_back": put_back,
        "get": lambda: twin.get(*handle(40)),
        "get_into": lambda: twin.get_into(*handle(40)),
        "flush": flush,
        "fill": lambda: twin.fill(pool(), choose.choice((10, 100, 1000))),
        "sync": twin.sync,
        "open": lambda: twin.open(choose.choice(PAGE_SIZES)),
        "join": lambda: twin.join(choose.choice(UUIDS), choose.choice(PAGE_SIZES)),
        "close": lambda: twin.close(pool()),
        "resize": lambda: twin.resize(choose.choice(limits)),
    }


if __name__ == "__main__":
    main()
