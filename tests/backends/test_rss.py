"""The process of a native engine uses as much memory as the limit allows."""

import json
from typing import Any

import pytest

from tests.backends.engines import ZBUD, needs_native
from tests.backends.pages import MIB
from tests.backends.programs import run

pytestmark = needs_native

NATIVE_OPTIONS: dict[str, dict[str, Any]] = {"log": {}, "zbud": ZBUD}


@pytest.fixture(params=["log", "zbud"])
def engine(request: pytest.FixtureRequest) -> str:
    """Return the native engine's name, with either allocator."""
    name: str = request.param
    return name


def measure(engine: dict[str, Any], rounds: int, **more: object) -> dict[str, Any]:
    """Run tests/backends/rss.py in a process of its own, and return its measurements."""
    arguments = json.dumps({"engine": engine, "rounds": rounds, **more})
    program = "import runpy; runpy.run_module('tests.backends.rss', run_name='__main__')"
    measured: dict[str, Any] = json.loads(run(program, arguments))
    return measured


@pytest.mark.parametrize("method", ["lz4", "zstd"])
def test_the_process_stays_near_the_limit(engine: str, method: str) -> None:
    limit = (256 if (engine, method) == ("log", "lz4") else 64) * MIB
    measured = measure(
        {"pool_limit": limit, "method": method, **NATIVE_OPTIONS[engine]}, 4, then=8 * MIB
    )
    counters = measured["counters"]
    assert counters["evicted_eph_zpages"] + counters["evicted_raw_pages"] > 1000
    assert counters["revived_zpages"] > 100
    assert counters["flobj_found"] > 50
    assert 0.9 * limit < measured["used_peak"] < limit + 2 * MIB
    assert 0.8 * limit < measured["rss"] < 1.03 * limit + 16 * MIB
    assert measured["used_then"] <= 8 * MIB
    # malloc may keep the memory of pages that were on loan, at most an eighth of the limit.
    assert measured["rss_then"] < 8 * MIB + limit / 6 + 8 * MIB


def test_a_lower_limit_returns_memory_to_the_system(engine: str) -> None:
    options = {"pool_limit": 128 * MIB, **NATIVE_OPTIONS[engine]}
    measured = measure(options, 2, lends=False, then=8 * MIB)
    assert measured["rss"] > 64 * MIB
    assert measured["rss_then"] < 16 * MIB


def test_ended_loans_return_memory_to_the_system() -> None:
    measured = measure({"pool_limit": 256 * MIB}, 2, then=8 * MIB)
    assert measured["rss_then"] < 24 * MIB


@pytest.mark.parametrize("method", ["lz4", "zstd"])
def test_capacity_does_not_decay_over_time(engine: str, method: str) -> None:
    measured = measure(
        {"pool_limit": 16 * MIB, "method": method, **NATIVE_OPTIONS[engine]}, 40, lends=False
    )
    held = measured["held"]
    # Rounds differ by some percent, because their pages differ.
    early, late = sum(held[8:16]), sum(held[32:40])
    assert late > 0.95 * early
    assert measured["rss"] < 1.03 * 16 * MIB + 16 * MIB


def test_contexts_for_large_pages_count_against_the_limit() -> None:
    printed = run(
        """
        from cleanfs.backends._zcache import Engine
        from tests.backends.pages import KEY, text
        from tests.backends.rss import anonymous_bytes

        page = text("x", 1 << 20)
        before = anonymous_bytes()
        z = Engine(64 << 20, method="zstd", level=19)
        pool = z.init_fs(1 << 20)
        for i in range(5):
            z.put_page(pool, KEY, i, page)
        z.sync()
        print(anonymous_bytes() - before, z.counters()["pool_used"])
        """
    )
    grown, used = map(int, printed.split())
    assert grown < used + 4 * MIB
