"""Test the lines of ``stats --watch``, each made from two snapshots."""

import json
from dataclasses import replace
from typing import Any

import pytest

from cleanfs.cli.watch import COLUMNS, HEADER, LINES_PER_HEADER, format_ns, watch_line, watch_lines
from cleanfs.latency import CLEANCACHE_HIT, PAGECACHE_HIT, SOURCE_READ, Latencies
from cleanfs.vfs.evictions import EvictionStats
from tests.fs.test_stats import STATS

HEADINGS = [heading for heading, _ in COLUMNS]


def parsed(seconds: float, latencies: Latencies, **pages: int) -> dict[str, Any]:
    """Make a ``stats.json`` of a mount of that age."""
    stats = replace(
        STATS,
        uptime_seconds=seconds,
        latencies=latencies.stats(),
        pagecache=replace(STATS.pagecache, hits=pages.get("hits", 0), misses=pages.get("misses", 0)),
        cleancache=replace(STATS.cleancache, succ_gets=pages.get("succ_gets", 0)),
        backing=replace(STATS.backing, source_read_bytes=pages.get("source_bytes", 0)),
        counters={"pool_used": 3 << 19, "pool_limit": 64 << 20, "eph_zbytes": 4, "eph_pagebytes": 9},
    )
    result: dict[str, Any] = json.loads(stats.as_json())
    return result


def cells(line: str) -> dict[str, str]:
    words = line.split()
    assert len(words) == len(HEADINGS)
    return dict(zip(HEADINGS, words, strict=True))


def test_a_line_covers_its_interval_only() -> None:
    latencies = Latencies()
    for _ in range(1000):
        latencies.read(SOURCE_READ, 900_000_000, 1_000_000)
    before = parsed(10, latencies, hits=5000, misses=5000, succ_gets=1000, source_bytes=10**9)
    for _ in range(94):
        latencies.read(PAGECACHE_HIT, 25_000, 131_072)
    for _ in range(4):
        latencies.read(CLEANCACHE_HIT, 100_000, 131_072)
    for _ in range(2):
        latencies.read(SOURCE_READ, 5_000_000, 131_072)
    latencies.write(60_000_000_000, 10)
    now = parsed(12, latencies, hits=5940, misses=5060, succ_gets=1040, source_bytes=10**9 + 600_000)
    line = cells(watch_line(now, before))
    assert line["reads/s"] == "50"
    assert line["MB/s"] == "6.6"
    assert (line["pc%"], line["zc%"]) == ("94.0", "4.0")
    assert line["srcMB/s"] == "0.3"
    assert (line["pool"], line["ratio"]) == ("1.5M/64.0M", "2.25")
    assert 24.5 <= float(line["p50"].removesuffix("us")) <= 29
    assert 4.1 <= float(line["p99"].removesuffix("ms")) <= 5.3


def test_an_interval_without_reads_has_no_percentages() -> None:
    line = cells(watch_line(parsed(2, Latencies()), parsed(1, Latencies())))
    assert {line[name] for name in ("pc%", "zc%", "p50", "p99")} == {"-"}
    assert (line["reads/s"], line["MB/s"], line["srcMB/s"]) == ("0", "0.0", "0.0")


def test_evictions_of_the_kernel_are_counted() -> None:
    before = replace(STATS, uptime_seconds=STATS.uptime_seconds - 2)
    seen, lost = STATS.evictions.evictions_seen + 500, STATS.evictions.evictions_lost + 3
    more = replace(STATS.evictions, evictions_seen=seen, evictions_lost=lost)
    now = replace(STATS, evictions=more)
    line = cells(watch_line(json.loads(now.as_json()), json.loads(before.as_json())))
    assert (line["evict/s"], line["lost"]) == ("250", "3")
    own = replace(now, evictions=EvictionStats("own (as asked)"))
    line = cells(watch_line(json.loads(own.as_json()), json.loads(before.as_json())))
    assert (line["evict/s"], line["lost"]) == ("-", "-")


def test_without_a_backend_there_is_no_pool() -> None:
    alone = replace(STATS, uptime_seconds=9, backend="none", counters={})
    line = cells(watch_line(json.loads(alone.as_json()), json.loads(STATS.as_json())))
    assert (line["pool"], line["ratio"]) == ("-", "-")


def test_headings_are_aligned_with_their_columns() -> None:
    line = watch_line(parsed(2, Latencies()), parsed(1, Latencies()))
    end = -1
    for heading, width in COLUMNS:
        end += 1 + width
        assert HEADER[:end].endswith(heading)
        assert line[end : end + 1] in ("", " ")
    assert len(line) == len(HEADER) == end < 100


def test_the_header_comes_first_and_again_after_each_screen() -> None:
    lines = watch_lines(iter([parsed(i, Latencies()) for i in range(2 * LINES_PER_HEADER + 2)]))
    assert next(lines) == HEADER
    rest = list(lines)
    assert [i for i, line in enumerate(rest) if line == HEADER] == [
        LINES_PER_HEADER,
        2 * LINES_PER_HEADER + 1,
    ]
    assert len(rest) == 2 * LINES_PER_HEADER + 1 + 2


def test_a_new_daemon_starts_from_zero() -> None:
    busy = Latencies()
    busy.read(PAGECACHE_HIT, 25_000, 4096)
    old, new = parsed(100, busy, hits=7), {**parsed(1, Latencies()), "pid": 4343}
    then = {**parsed(2, busy, hits=3), "pid": 4343}
    [header, line] = watch_lines(iter([old, new, then]))
    assert header == HEADER
    assert cells(line)["reads/s"] == "1"
    assert cells(line)["pc%"] == "100.0"


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0.0us"), (940, "0.9us"), (9_940, "9.9us"), (9_960, "10us"), (31_400, "31us"),
        (999_499, "999us"), (999_501, "1.0ms"), (1_240_000, "1.2ms"), (999_600_000, "1.0s"),
        (72e9, "72s"),
    ],
)  # fmt: skip
def test_durations_are_short(ns: float, text: str) -> None:
    assert format_ns(ns) == text
