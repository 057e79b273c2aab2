"""The native engine survives a system without memory."""

import json
from typing import Any

import pytest

from tests.backends.engines import ZBUD, needs_native
from tests.backends.programs import run

pytestmark = needs_native


@pytest.mark.parametrize("options", [{}, ZBUD, {"was_active": True}], ids=["log", "zbud", "was-active"])
def test_the_engine_survives_a_system_without_memory(options: dict[str, Any]) -> None:
    printed = run(
        """
        import json, resource, sys
        from random import Random
        from cleanfs.backends._zcache import Engine
        from cleanfs.backends.ops import FileKey
        from tests.backends.pages import KEY, UUID_A, noise
        from tests.backends.pages import FILLER_PAGES

        errors = puts = 0
        for seed in range(8):
            choose = Random(seed)
            z = Engine(256 << 20, **json.loads(sys.argv[1]))
            pools = [z.init_fs(4096), z.init_shared_fs(UUID_A, 4096)]
            z.put_page(pools[0], KEY, 0, bytes(4096))
            z.sync()  # the worker runs
            size = int(open("/proc/self/statm").read().split()[0]) * 4096
            limits = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (size + choose.randrange(40 << 20), limits[1]))
            buffer = bytearray(40 * 4096)
            on_loan = []
            for step in range(600):
                key = FileKey(1, choose.randrange(20) if choose.random() < 0.8 else step * 1000, b"")
                pool, first = choose.choice(pools), choose.randrange(1000) * 32
                try:
                    puts += 1
                    z.put_pages(pool, key, list(enumerate(FILLER_PAGES[seed : seed + 40], first)))
                    if step % 3 == 0:
                        for i in range(20):
                            small = FileKey(2, step * 20 + i, b"x" * 50)
                            z.put_page(pool, small, 1 << i, FILLER_PAGES[i])
                    if step % 5 == 0:
                        on_loan.append(z.get_pages(pool, key, first, 40))
                    if step % 7 == 0:
                        z.get_pages_into(pool, key, choose.randrange(1000) * 32, buffer)
                    if step % 11 == 0:
                        z.flush_inode(pool, key)
                    if step % 50 == 0:
                        z.resize(choose.choice([8, 32, 256]) << 20)
                        z.sync()
                except MemoryError:
                    errors += 1
            resource.setrlimit(resource.RLIMIT_AS, limits)
            z.sync()
            z.check()
            del on_loan
            for _ in range(2):  # was-active wants two
                z.put_page(pools[0], KEY, 0, FILLER_PAGES[0])
            z.sync()
            assert z.get_page(pools[0], KEY, 0) == FILLER_PAGES[0]
        print(errors, puts, z.counters()["failed_eph_puts"])
        """,
        json.dumps(options),
        MALLOC_ARENA_MAX="1",
    )
    errors, puts, failed = map(int, printed.split())
    assert errors + failed > 0
    assert puts > errors
