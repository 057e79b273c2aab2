"""Measure how long reads and writes take in the daemon, as histograms.

The buckets are logarithmic, as in HdrHistogram: four of equal width per power of two. So a bucket's
width is at most a quarter of its lower bound. Below 8 ns, faster than any read, each value has its own.
The index comes from the number's bits, and the counts are ints in a list, because this runs for each
request.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PAGECACHE_HIT = 0
"""All pages of the read were in the page cache."""
CLEANCACHE_HIT = 1
"""All pages were in the page cache or in cleancache, at least one of them in cleancache."""
SOURCE_READ = 2
"""The read needed the source: a read of its own, or another requester's in-flight read."""
WRITE = 3

KINDS = ("pagecache_hit", "cleancache_hit", "source_read", "write")
"""The names of the kinds above."""

READ_KINDS = KINDS[:WRITE]

BUCKETS = 248
"""Enough for all 63-bit numbers, so that the index needs no check."""


def bucket_index(ns: int) -> int:
    """Return the bucket of a value."""
    shift = (ns >> 3).bit_length()
    return (shift << 2) + (ns >> shift)


def bucket_bounds(index: int) -> tuple[int, int]:
    """Return the bounds of a bucket: ``low <= ns < high``."""
    shift = max((index >> 2) - 1, 0)
    low = (index - (shift << 2)) << shift
    return low, low + (1 << shift)


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """Holds a histogram at one moment. The difference of two is the histogram of the interval."""

    counts: tuple[int, ...] = (0,) * BUCKETS
    sum_ns: int = 0

    @property
    def total(self) -> int:
        """Return the number of values."""
        return sum(self.counts)

    def percentile(self, percent: float) -> float:
        """Return the value in ns that ``percent`` of all values do not exceed; 0 if there are none.

        It lies in the same bucket as the exact one (nearest rank), interpolated within the bucket like
        Prometheus' ``histogram_quantile``.
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
        """Count the values below ``ns``, which must be the lower bound of a bucket."""
        return sum(self.counts[: bucket_index(ns)])

    def __add__(self, other: "HistogramSnapshot") -> "HistogramSnapshot":
        """Return the sum of two histograms."""
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return HistogramSnapshot(counts, self.sum_ns + other.sum_ns)

    def __sub__(self, earlier: "HistogramSnapshot") -> "HistogramSnapshot":
        """Return the histogram of the values since an earlier snapshot."""
        counts = tuple(a - b for a, b in zip(self.counts, earlier.counts, strict=True))
        return HistogramSnapshot(counts, self.sum_ns - earlier.sum_ns)

    def as_json(self) -> dict[str, Any]:
        """Return count, sum, and the counts of non-empty buckets by upper bound (exclusive)."""
        buckets = {str(bucket_bounds(i)[1]): count for i, count in enumerate(self.counts) if count}
        return {"count": self.total, "sum_ns": self.sum_ns, "buckets_ns": buckets}

    @classmethod
    def from_json(cls, member: Mapping[str, Any]) -> "HistogramSnapshot":
        """Parse the output of ``as_json``."""
        counts = [0] * BUCKETS
        for high, count in member["buckets_ns"].items():
            counts[bucket_index(int(high) - 1)] = count
        return cls(tuple(counts), member["sum_ns"])


class Histogram:
    """Counts durations."""

    __slots__ = ("_counts", "_sum_ns")

    def __init__(self) -> None:
        """Start empty."""
        self._counts = [0] * BUCKETS
        self._sum_ns = 0

    def record(self, ns: int) -> None:
        """Count one value, a difference of a monotonic clock."""
        shift = (ns >> 3).bit_length()  # bucket_index, without the call
        self._counts[(shift << 2) + (ns >> shift)] += 1
        self._sum_ns += ns

    def snapshot(self) -> HistogramSnapshot:
        """Return a snapshot."""
        return HistogramSnapshot(tuple(self._counts), self._sum_ns)


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """Holds a snapshot of reads and writes and their latencies, without failed requests."""

    pagecache_hit: HistogramSnapshot = HistogramSnapshot()
    cleancache_hit: HistogramSnapshot = HistogramSnapshot()
    source_read: HistogramSnapshot = HistogramSnapshot()
    write: HistogramSnapshot = HistogramSnapshot()
    read_bytes: int = 0
    write_bytes: int = 0

    @property
    def reads(self) -> int:
        """Return the number of reads of all kinds."""
        return sum(getattr(self, kind).total for kind in READ_KINDS)

    def __add__(self, other: "LatencyStats") -> "LatencyStats":
        """Return the sum of two snapshots."""
        histograms = {kind: getattr(self, kind) + getattr(other, kind) for kind in KINDS}
        read_bytes, write_bytes = (
            self.read_bytes + other.read_bytes,
            self.write_bytes + other.write_bytes,
        )
        return LatencyStats(**histograms, read_bytes=read_bytes, write_bytes=write_bytes)

    def by_kind(self) -> dict[str, HistogramSnapshot]:
        """Return the four histograms by name."""
        return {kind: getattr(self, kind) for kind in KINDS}


class Latencies:
    """Holds one mount's histograms and byte counts."""

    __slots__ = ("_histograms", "_read_bytes", "_write_bytes")

    def __init__(self) -> None:
        """Start empty."""
        self._histograms = tuple(Histogram() for _ in KINDS)
        self._read_bytes = self._write_bytes = 0

    def read(self, kind: int, ns: int, size: int) -> None:
        """Count a read of ``size`` bytes; ``kind`` says where they came from."""
        self._histograms[kind].record(ns)
        self._read_bytes += size

    def write(self, ns: int, size: int) -> None:
        """Count a finished write of ``size`` bytes."""
        self._histograms[WRITE].record(ns)
        self._write_bytes += size

    def stats(self) -> LatencyStats:
        """Return a snapshot."""
        hit, got, source, write = (histogram.snapshot() for histogram in self._histograms)
        return LatencyStats(hit, got, source, write, self._read_bytes, self._write_bytes)
