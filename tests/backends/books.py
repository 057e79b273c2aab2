"""Check the Python engine's counters against its tables, as ``Engine.check`` does in the native one."""

# ruff: noqa: SLF001  # the invariants concern private tables

from typing import Any

from cleanfs.backends import reference
from cleanfs.backends.reference import LOAN_SHARE, ReferenceZcache


def check_books(z: ReferenceZcache) -> None:
    """Assert the invariants that the code states, and recompute every gauge from the tables."""
    queues: list[dict[int, Any]] = [z._zpages, z._raw, z._loans]
    ids = [zid for queue in queues for zid in queue]
    assert len(ids) == len(set(ids))
    assert sorted(ids) == sorted(zid for obj in z._objects.values() for zid in obj.ids)
    assert all(obj.ids for obj in z._objects.values()), "an object without pages"
    by_pool = [obj for pool in z._pools.values() for obj in pool.objects.values()]
    assert {id(obj) for obj in by_pool} == {id(obj) for obj in z._objects.values()}
    for serial, obj in z._objects.items():
        assert all(zid >> reference.INDEX_BITS == serial for zid in obj.ids)
    counters = z.counters()
    kept = [*z._zpages.values(), *z._raw.values(), *(zpage for zpage, _ in z._loans.values())]
    lent = sum(len(page) for _, page in z._loans.values())
    used = sum(map(reference._cost, kept)) + lent + reference.OBJECT_BYTES * len(z._objects)
    assert counters["pool_used"] == used <= z.pool_limit
    assert z._loan_bytes == lent <= z.pool_limit * LOAN_SHARE
    assert counters["eph_zbytes"] == sum(len(zpage) for zpage in kept if isinstance(zpage, bytes))
    assert counters["eph_zpages"] == len(z._zpages) + len(z._raw)
    assert counters["raw_pages"] == len(z._raw)
    assert counters["loaned_zpages"] == len(z._loans)
    assert counters["obj_count"] == len(z._objects)
    assert counters["same_filled_pages"] == sum(isinstance(zpage, int) for zpage in kept)
    assert counters["zero_filled_pages"] == kept.count(0)
