"""Test the three formats of one snapshot."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cleanfs.backends.options import BackendOptions
from cleanfs.backends.reference import ReferenceZcache
from cleanfs.cache.cleancache import CleancacheStats
from cleanfs.cache.pagecache import PageCacheStats
from cleanfs.fs.stats import GAUGES, MountStats
from cleanfs.fuse.channel import ChannelStats
from cleanfs.fuse.request_limits import RequestLimits
from cleanfs.latency import HistogramSnapshot, Latencies, LatencyStats
from cleanfs.memory.cache_limits import CacheLimitsStats
from cleanfs.source.io import BackingStats
from cleanfs.vfs.evictions import EvictionStats
from cleanfs.vfs.inodes import InodeStats
from cleanfs.vfs.source_watch import WatchStats
from tests.backends.pages import KEY, noise, text


def some_latencies() -> LatencyStats:
    made = Latencies()
    for ns in (900, 20_000, 20_001, 30_000):
        made.read(0, ns, 100)
    for ns in range(100_000, 200_000, 1000):
        made.read(1, ns, 1)
    made.read(2, 5_000_000_000, 7)
    made.write(1 << 40, 12)
    return made.stats()


STATS = MountStats(
    version="1.2.3",
    source="/source",
    mountpoint="/mnt",
    pid=4242,
    uptime_seconds=1.23456,
    rss_bytes=1000,
    page_size=4096,
    backend="zcache",
    engine="python",
    pool_id=0,
    coherency="open",
    source_cache="auto",
    identity="inode",
    requests=RequestLimits(read_ahead_kb=1024, max_background=64),
    changes_found=9,
    doubtful_flushes=10,
    watch=WatchStats("fanotify-inode", 1, 2, 3, 4, 5, 6, 7),
    evictions=EvictionStats("kernel", *range(20, 34)),
    open_files=3,
    cleancache=CleancacheStats(succ_gets=30, failed_gets=20, puts=11, flushes=12, backend_errors=13),
    pagecache=PageCacheStats(
        limit=1,
        used=2,
        resident=3,
        files=4,
        hits=50,
        misses=50,
        evictions=7,
        shared_reads=8,
        stale_reads=9,
        lost_files=10,
        lost_pages=11,
    ),
    backing=BackingStats(1, 2, 3, 4, 5, 6, 7),
    inodes=InodeStats(inodes=100, held=50, parked_total=7),
    limits=CacheLimitsStats("meminfo,psi:machine", 5 << 20, 3 << 20, 7, 2, 1, 512 << 20, 509 << 20),
    channel=ChannelStats(
        busy_poll_limit_us=50.0,
        busy_poll_polled=6,
        busy_poll_slept=4,
        served_natively=2,
        requests={"read": 5, "write": 3},
    ),
    latencies=some_latencies(),
    counters={"pool_used": 77, "eph_zbytes": 100, "eph_pagebytes": 250, "flush_total": 5},
)


def test_the_hit_ratio_covers_pages_requested_from_both_caches() -> None:
    assert STATS.hit_ratio == 0.8


def test_ratios_of_nothing_are_0() -> None:
    idle = replace(STATS, pagecache=replace(STATS.pagecache, hits=0, misses=0), counters={})
    assert idle.hit_ratio == 0
    assert idle.compression_ratio == 0
    assert replace(STATS, counters={"eph_pagebytes": 4096, "eph_zbytes": 0}).compression_ratio == 0


def test_the_compression_ratio_is_page_bytes_over_stored_bytes() -> None:
    assert STATS.compression_ratio == 2.5


def parse_text(text: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in text.splitlines())


def test_text_has_a_line_for_each_value() -> None:
    values = parse_text(STATS.as_text())
    assert len(values) == len(STATS.as_text().splitlines()) == len(STATS.values()) + 12 + 2 + 4
    assert values["succ_gets"] == "30"
    assert values["pagecache_hits"] == "50"
    assert values["uptime_seconds"] == "1.235"
    assert values["inodes_parked_total"] == "7"
    assert values["zcache_pool_used"] == "77"
    assert values["reads"] == "105"
    assert values["read_bytes"] == "507"
    assert values["writes"] == "1"
    assert values["requests_write"] == "3"
    assert values["write_bytes"] == "12"
    assert values["latency_pagecache_hit_count"] == "4"
    assert values["latency_cleancache_hit_count"] == "100"
    assert values["latency_write_count"] == "1"
    assert 16 <= float(values["latency_pagecache_hit_p50_us"]) <= 20.48
    assert 131 <= float(values["latency_cleancache_hit_p50_us"]) <= 164
    assert 196 <= float(values["latency_cleancache_hit_p99_us"]) <= 230
    assert STATS.as_text().endswith("\n")


@pytest.mark.parametrize("path", ["/a\nsucc_gets 5", "/ä\n", "/back\\slash\n"])
def test_a_newline_in_a_path_does_not_begin_a_line(path: str) -> None:
    text = replace(STATS, source=path).as_text()
    assert len(text.splitlines()) == len(STATS.as_text().splitlines())
    assert parse_text(text)["succ_gets"] == "30"
    assert parse_text(text)["source"].encode().decode("unicode_escape") == path


def test_json_has_the_same_values_and_the_backend_counters_separately() -> None:
    parsed = json.loads(STATS.as_json())
    assert parsed.pop("backend_counters") == dict(STATS.counters)
    latencies = parsed.pop("latencies")
    assert parsed.pop("requests") == {"read": 5, "write": 3}
    assert parsed == {**STATS.values(), **STATS.latency_values()}
    assert {
        kind: HistogramSnapshot.from_json(member) for kind, member in latencies.items()
    } == STATS.latencies.by_kind()
    assert latencies["pagecache_hit"] == {
        "count": 4,
        "sum_ns": 70_901,
        "buckets_ns": {"1024": 1, "20480": 2, "32768": 1},
    }


def test_every_part_of_the_snapshot_is_in_the_values() -> None:
    values = STATS.values()
    for name in (
        "source_reads",
        "source_errors",
        "puts",
        "backend_errors",
        "changes_found",
        "doubtful_flushes",
        "open_files",
        "source_cache",
        "read_ahead_kb",
        "max_background",
    ):
        assert name in values
    assert [values[f"pagecache_{name}"] for name in PageCacheStats.__slots__] == [
        1,
        2,
        3,
        4,
        50,
        50,
        7,
        8,
        9,
        10,
        11,
    ]
    assert [values[name] for name in BackingStats.__slots__] == [1, 2, 3, 4, 5, 6, 7]


def test_prometheus_text_parses_and_has_every_number_labelled_with_its_mount() -> None:
    families = list(text_string_to_metric_families(STATS.as_prometheus()))
    samples = {sample.name: sample for family in families for sample in family.samples}
    assert samples["cleanfs_succ_gets_total"].value == 30
    assert samples["cleanfs_zcache_flush_total"].value == 5
    assert samples["cleanfs_zcache_pool_used"].value == 77
    assert samples["cleanfs_hit_ratio"].value == 0.8
    assert samples["cleanfs_inodes_parked_total"].value == 7
    assert samples["cleanfs_info"].labels == {
        "mountpoint": "/mnt", "source": "/source", "backend": "zcache", "engine": "python",
        "version": "1.2.3",
    }  # fmt: skip
    requests = {
        sample.labels["opcode"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "cleanfs_requests_total"
    }
    assert requests == {"read": 5, "write": 3}
    numbers = [v for k, v in STATS.values().items() if not isinstance(v, str) and k != "pid"]
    histogram = {"bucket", "count", "sum"}
    assert len(samples) == 2 + len(numbers) + len(STATS.counters) + len(histogram)
    assert {name.rpartition("_")[2] for name in samples if "latency" in name} == histogram
    assert {s.labels["mountpoint"] for s in samples.values()} == {"/mnt"}


def test_latencies_are_prometheus_histograms() -> None:
    families = {f.name: f for f in text_string_to_metric_families(STATS.as_prometheus())}
    family = families["cleanfs_request_latency_seconds"]
    assert family.type == "histogram"
    for kind, snapshot in STATS.latencies.by_kind().items():
        samples = [sample for sample in family.samples if sample.labels["kind"] == kind]
        buckets = [(float(s.labels["le"]), s.value) for s in samples if s.name.endswith("_bucket")]
        [count] = [s.value for s in samples if s.name.endswith("_count")]
        [total] = [s.value for s in samples if s.name.endswith("_sum")]
        assert buckets == sorted(buckets)
        assert [n for _, n in buckets] == sorted(n for _, n in buckets)
        assert all(b == pytest.approx(2 * a) for (a, _), (b, _) in pairwise(buckets[:-1]))
        assert buckets[-1] == (math.inf, count)
        assert count == snapshot.total
        assert total == pytest.approx(snapshot.sum_ns / 1e9)
    of_hits = {
        s.labels["le"]: s.value for s in family.samples if s.labels["kind"] == "pagecache_hit"
        if s.name.endswith("_bucket")
    }  # fmt: skip
    assert (of_hits["1.024e-06"], of_hits["1.6384e-05"], of_hits["3.2768e-05"]) == (1, 1, 4)
    # A duration above the last bound counts in +Inf only.
    of_writes = [
        s.value for s in family.samples if s.labels["kind"] == "write" and s.name.endswith("_bucket")
    ]
    assert set(of_writes[:-1]) == {0}
    assert of_writes[-1] == 1


def test_gauges_are_gauges_and_all_other_values_counters() -> None:
    families = {f.name: f.type for f in text_string_to_metric_families(STATS.as_prometheus())}
    assert families["cleanfs_pagecache_used"] == "gauge"
    assert families["cleanfs_pagecache_hits"] == "counter"
    for name in ("reads", "read_bytes", "writes", "write_bytes"):
        assert families[f"cleanfs_{name}"] == "counter"
    assert families["cleanfs_zcache_eph_zbytes"] == "gauge"
    assert families["cleanfs_read_ahead_kb"] == families["cleanfs_max_background"] == "gauge"
    assert families["cleanfs_zcache_flush"] == "counter"


def test_a_zcache_counter_that_can_decrease_is_a_gauge() -> None:
    z = ReferenceZcache(BackendOptions(4 << 20))
    pool = z.init_fs(4096)
    busy = dict(z.counters())
    z.put_pages(
        pool, KEY, [(0, bytes(4096)), (1, b"\1" * 4096), (2, text("x")), (3, noise(1)), (4, text("y"))]
    )
    z.get_page(pool, KEY, 4)
    busy = dict(z.counters())
    z.flush_fs(pool)
    z.resize(1 << 20)
    idle = z.counters()
    fell = {name for name in busy if idle[name] < busy[name]}
    assert fell == {name for name in idle if name in GAUGES and not name.endswith("_max")}


@pytest.mark.parametrize("path", ["/caf\udce9", "/new\nline", '/quo"te', "/back\\slash"])
def test_any_path_can_be_a_label(path: str) -> None:
    text = replace(STATS, source=path, mountpoint=path).as_prometheus()
    [info] = [f for f in text_string_to_metric_families(text) if f.name == "cleanfs_info"]
    assert info.samples[0].labels["source"] == path.replace("\udce9", "�")
    text.encode()


def test_any_path_can_be_in_the_json() -> None:
    path = "/caf\udce9\n"
    assert json.loads(replace(STATS, source=path).as_json().encode().decode())["source"] == path


def test_the_text_of_a_path_outside_utf_8_can_be_encoded_back() -> None:
    text = replace(STATS, source="/caf\udce9", mountpoint="/caf\udce9\n").as_text()
    assert b"source /caf\xe9\n" in text.encode("utf-8", "surrogateescape")
