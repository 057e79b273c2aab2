"""How long programs' reads and writes took in the daemon, as histograms.

Log buckets, as in HdrHistogram: four of equal width to each power of two, so a bucket is at most a
quarter as wide as where it begins (below 8 ns, where no read ends, each value has its own). The index
comes from the number's bits, and what is counted is an int in a list: this runs with every request.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PAGECACHE_HIT = 0
"""All pages of the read were in the page cache."""
CLEANCACHE_HIT = 1
"""All were in the page cache or in cleancache, one at least in cleancache."""
SOURCE_READ = 2
"""The read needed the source: its own read, or one that was under way for somebody else."""
WRITE = 3

KINDS = ("pagecache_hit", "cleancache_hit", "source_read", "write")
"""Names of the above."""

READ_KINDS = KINDS[:WRITE]

BUCKETS = 248
"""For all numbers of 63 bits: the index needs no check."""


def bucket_index(ns: int) -> int:
    """The bucket of a value."""
    shift = (ns >> 3).bit_length()
    return (shift << 2) + (ns >> shift)


def bucket_bounds(index: int) -> tuple[int, int]:
    """``low <= ns < high`` of a bucket."""
    shift = max((index >> 2) - 1, 0)
    low = (index - (shift << 2)) << shift
    return low, low + (1 << shift)


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """A histogram at one moment. One minus an earlier one is what came in between."""

    counts: tuple[int, ...] = (0,) * BUCKETS
    sum_ns: int = 0

    @property
    def total(self) -> int:
        """How many values."""
        return sum(self.counts)

    def percentile(self, percent: float) -> float:
        """The value that ``percent`` of all do not exceed, in ns; 0 if there are none.

        It lies in the same bucket as the exact one (nearest rank), at its share of the bucket's
        values, as Prometheus' ``histogram_quantile`` has it.
        """
        rank = self.total * percent / 100
        below = 0
        high = 0
        for index, count in enumerate(self.counts):
            if count:
                low, high = bucket_bounds(index)
                if below + count >= rank:
                    return low + (high - low) * max(rank - below, 0) / count
                below += count
        return high

    def below(self, ns: int) -> int:
        """How many values are less than ``ns``, which must be where a bucket begins."""
        return sum(self.counts[: bucket_index(ns)])

    def __add__(self, other: "HistogramSnapshot") -> "HistogramSnapshot":
        """Both together."""
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return HistogramSnapshot(counts, self.sum_ns + other.sum_ns)

    def __sub__(self, earlier: "HistogramSnapshot") -> "HistogramSnapshot":
        """What came since."""
        counts = tuple(a - b for a, b in zip(self.counts, earlier.counts, strict=True))
        return HistogramSnapshot(counts, self.sum_ns - earlier.sum_ns)

    def as_json(self) -> dict[str, Any]:
        """Count, sum, and the counts of the buckets that have any, by where each ends (exclusive)."""
        buckets = {str(bucket_bounds(i)[1]): count for i, count in enumerate(self.counts) if count}
        return {"count": self.total, "sum_ns": self.sum_ns, "buckets_ns": buckets}

    @classmethod
    def from_json(cls, member: Mapping[str, Any]) -> "HistogramSnapshot":
        """The snapshot that ``as_json`` wrote."""
        counts = [0] * BUCKETS
        for high, count in member["buckets_ns"].items():
            counts[bucket_index(int(high) - 1)] = count
        return cls(tuple(counts), member["sum_ns"])


class Histogram:
    """Counts durations."""

    __slots__ = ("_counts", "_sum_ns")

    def __init__(self) -> None:
        """Nothing yet."""
        self._counts = [0] * BUCKETS
        self._sum_ns = 0

    def record(self, ns: int) -> None:
        """One more value, of a monotonic clock."""
        shift = (ns >> 3).bit_length()  # bucket_index, without the call
        self._counts[(shift << 2) + (ns >> shift)] += 1
        self._sum_ns += ns

    def snapshot(self) -> HistogramSnapshot:
        """This moment."""
        return HistogramSnapshot(tuple(self._counts), self._sum_ns)


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """A snapshot of what programs asked for and how long it took. Failed requests are not in it."""

    pagecache_hit: HistogramSnapshot = HistogramSnapshot()
    cleancache_hit: HistogramSnapshot = HistogramSnapshot()
    source_read: HistogramSnapshot = HistogramSnapshot()
    write: HistogramSnapshot = HistogramSnapshot()
    read_bytes: int = 0
    write_bytes: int = 0

    @property
    def reads(self) -> int:
        """Reads that were answered, wherever from."""
        return sum(getattr(self, kind).total for kind in READ_KINDS)

    def by_kind(self) -> dict[str, HistogramSnapshot]:
        """The four histograms by their names."""
        return {kind: getattr(self, kind) for kind in KINDS}


class Latencies:
    """The histograms of one mount, and the bytes that went through."""

    __slots__ = ("_histograms", "_read_bytes", "_write_bytes")

    def __init__(self) -> None:
        """Nothing yet."""
        self._histograms = tuple(Histogram() for _ in KINDS)
        self._read_bytes = self._write_bytes = 0

    def read(self, kind: int, ns: int, size: int) -> None:
        """A read was answered with ``size`` bytes; ``kind`` says where from."""
        self._histograms[kind].record(ns)
        self._read_bytes += size

    def write(self, ns: int, size: int) -> None:
        """A write of ``size`` bytes is done."""
        self._histograms[WRITE].record(ns)
        self._write_bytes += size

    def stats(self) -> LatencyStats:
        """A snapshot."""
        hit, got, source, write = (histogram.snapshot() for histogram in self._histograms)
        return LatencyStats(hit, got, source, write, self._read_bytes, self._write_bytes)
